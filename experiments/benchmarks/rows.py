"""All rows of the table, in its order."""

from __future__ import annotations

from experiments.benchmarks.data_rows import data_rows
from experiments.benchmarks.diffusion_rows import diffusion_rows, full_unet_row
from experiments.benchmarks.language_rows import language_rows
from experiments.benchmarks.row import Row
from experiments.benchmarks.training_rows import training_rows


def all_rows(quick: bool) -> list[Row]:
    """`quick` makes every computation small; names stay."""
    return [
        *language_rows(quick),
        *diffusion_rows(quick),
        *training_rows(quick),
        *data_rows(quick),
        full_unet_row(quick),
    ]


def find_row(name: str, quick: bool) -> Row:
    return next(row for row in all_rows(quick) if row.name == name)
