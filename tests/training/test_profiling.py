"""The section `profile`, and the trace that it asks for."""

from __future__ import annotations

import gzip
import json

import pytest

from pixelstory_jax.training.errors import ConfigError
from pixelstory_jax.training.loop import train
from pixelstory_jax.training.options import ProfileOptions
from tests.training.runs import finish, start
from tests.training.toy import ToyObjective, ToySource, toy_config


@pytest.mark.parametrize("steps", ["10", "a:b", "0:3", "5:3", "3:13", "1:2:3", "-1:2", " 1:2"])
def test_wrong_steps_are_refused_in_one_sentence(steps, tmp_path):
    config = {**toy_config(), "profile": {"steps": steps}}
    with pytest.raises(ConfigError) as caught:
        train(config, ToyObjective(), ToySource(), tmp_path / "run")
    assert str(caught.value) == (
        f"profile.steps must be FIRST:LAST, two steps from 1 to train.steps (12), as 10:13, got {steps!r}"
    )
    assert not (tmp_path / "run").exists()


def test_unknown_fields_are_refused():
    with pytest.raises(ConfigError, match=r"no field profile.step; it has profile.steps"):
        ProfileOptions.from_config({"step": "1:2"}, 12)


def test_no_steps_leave_no_trace(tmp_path):
    assert ProfileOptions.from_config({}, 12).span is None
    train({**toy_config(steps=2), "profile": {"steps": ""}}, ToyObjective(), ToySource(), tmp_path)
    assert not (tmp_path / "profile").exists()


# In processes of their own: where the compiler for TPUs was loaded, as other tests do, JAX's profiler asks it for a
# trace of chips that are not there, and crashes.
def test_the_trace_holds_the_steps_that_were_asked_for(tmp_path):
    code, shown, errors = finish(start(tmp_path, "--profile=3:5"))
    assert code == 0, errors
    assert f"Trace in {tmp_path}/profile" in shown and "xprof" in shown
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert steps_in(tmp_path) == {3, 4, 5}


def test_a_run_that_ends_within_the_steps_still_writes_its_trace(tmp_path):
    code, _, errors = finish(start(tmp_path, "--profile=1:12", "--broken=40"))
    assert code != 0 and "Example 40" in errors
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def steps_in(workdir):
    (path,) = (workdir / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {int(event["args"]["step_num"]) for event in events if event.get("name") == "train"}
