"""A file of reference numbers: weights `w/`, inputs `in/`, results `out/`, and `meta`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fixture:
    """One file. `weights`, `inputs` and `expected` have their prefix removed."""

    name: str
    meta: dict[str, Any]
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    directory: Path = Path()  # where the file is; `meta["folder"]` names a folder of weights beside it

    @property
    def folder(self) -> Path:
        return self.directory / self.meta["folder"]

    @classmethod
    def load(cls, path: Path) -> Fixture:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}

        return cls(meta.get("fixture", path.stem), meta, part("w/"), part("in/"), part("out/"), path.parent)

    def tolerance(self, output: str) -> float:
        """The largest allowed difference.

        Fixtures of StoryDiffusion: 20 times the reference's own rounding, and 1e-4 for the constants of schedulers,
        that are float32 in both. Others: 10 times the reference's own rounding, or 1e-4 of the largest value.
        """
        value = self.expected[output]
        if output.endswith("image_uint8"):  # rounded: neighbouring values are both right at a half
            return 1.0
        if value.dtype.kind in "iub":
            return 0.0
        if f"out/{output}" in self.meta.get("f32_vs_f64", {}):
            return max(
                20 * self.meta["f32_vs_f64"][f"out/{output}"]["max_abs_err_f32"], 1e-4 * (self.name == "schedulers")
            )
        rounding = self.meta.get("tolerance_f32_vs_f64", {}).get(f"out/{output}", [0.0, 0.0])[0]
        return max(10 * rounding, 1e-4 * float(np.abs(value).max(initial=0.0)))

    def numbered(self, prefix: str) -> list[np.ndarray]:
        """The inputs prefix0, prefix1, … in order."""
        found = []
        while f"{prefix}{len(found)}" in self.inputs:
            found.append(self.inputs[f"{prefix}{len(found)}"])
        return found
