"""What the command that scores a checkpoint may replace."""

from __future__ import annotations

import pytest

from experiments.evaluate import check_replaceable
from pixelstory_jax.objectives.objective import Evaluation
from pixelstory_jax.training.errors import UserError
from pixelstory_jax.training.loop import write_evaluation


def test_new_and_empty_folders_and_earlier_scores_may_be_replaced(tmp_path):
    check_replaceable(tmp_path / "new")
    check_replaceable(tmp_path)
    scores = tmp_path / "scores"
    write_evaluation(Evaluation({"giou": 0.5}, score=0.5, table="giou 0.5"), scores)
    check_replaceable(scores)


@pytest.mark.parametrize("name", ["notes.txt", "metrics.json", "table.txt"])
def test_whatever_else_stands_there_is_kept(tmp_path, name):
    """Half of what scores consist of is not enough to take a folder for scores."""
    (tmp_path / name).write_text("mine")
    for out in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"{out} exists and holds no scores .*--out"):
            check_replaceable(out)
    assert (tmp_path / name).read_text() == "mine"
