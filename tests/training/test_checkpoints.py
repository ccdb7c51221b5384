"""Checkpoints that are truncated, corrupt, of another model, or cannot be written."""

from __future__ import annotations

import resource
import shutil
import time

import numpy as np
import pytest

from pixelstory_jax.models.paths import flatten
from pixelstory_jax.training.checkpoints import find_checkpoint, load_params
from pixelstory_jax.training.errors import CheckpointError
from pixelstory_jax.training.loop import train
from pixelstory_jax.training.metrics import read_metrics
from tests.training.toy import ToyObjective, ToySource, toy_config


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("original") / "run"
    train(toy_config(), ToyObjective(), ToySource(), workdir)
    return workdir


@pytest.fixture
def workdir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir, "train")}


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def data_files(item):
    return [p for p in item.rglob("*") if p.is_file() and p.parent.name == "d"]


def truncate(item):
    for path in data_files(item):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(item):
    for path in data_files(item):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)


@pytest.mark.parametrize("item", ["params", "train"])
@pytest.mark.parametrize("damage", [truncate, flip, shutil.rmtree])
def test_damaged_newest_gives_way_to_the_one_before(workdir, original, capsys, item, damage):
    damage(workdir / "checkpoints/last/12" / item)
    train(toy_config(), ToyObjective(), ToySource(), workdir)
    printed = capsys.readouterr().out
    assert "last/12 is incomplete or damaged" in printed and "using step 8" in printed
    assert (workdir / "checkpoints/damaged-12").is_dir() and (workdir / "checkpoints/last/12").is_dir()
    assert losses(workdir) == losses(original)


def test_all_damaged_is_one_sentence_that_says_what_to_do(workdir):
    for step in ("8", "12"):
        truncate(workdir / "checkpoints/last" / step / "params")
    with pytest.raises(CheckpointError, match=r"last/12 and .*last/8 are incomplete or damaged.*delete") as caught:
        train(toy_config(), ToyObjective(), ToySource(), workdir)
    assert "\n" not in str(caught.value)


def test_another_model_is_refused_and_every_difference_named(workdir):
    class Wider(ToyObjective):
        def init(self, rng):
            params = super().init(rng)
            params["first"]["extra"] = params["first"].pop("bias")
            params["second"]["kernel"] = params["second"]["kernel"][:, :3]
            return params

    with pytest.raises(CheckpointError) as caught:
        train(toy_config(), Wider(), ToySource(), workdir)
    for words in ("first/bias is not known", "first/extra is missing", "second/kernel has shape [16, 4], not [16, 3]"):
        assert words in str(caught.value)
    assert (workdir / "checkpoints/last/12").is_dir()


def test_changed_optimizer_is_refused(workdir):
    with pytest.raises(CheckpointError, match="optimizer/.* does not|does not fit this config: .*optimizer/"):
        train(toy_config(optimizer="lion"), ToyObjective(), ToySource(), workdir)


def test_load_params_takes_workdir_and_checkpoint_folders(original):
    best, config = load_params(original)
    assert config["model"] == {"width": 16}
    for path in ("checkpoints/best", "checkpoints/best/12", "checkpoints", "checkpoints/last", "checkpoints/last/12"):
        params, _ = load_params(original / path)
        for name, value in flatten(best).items():
            assert isinstance(flatten(params)[name], np.ndarray)
            np.testing.assert_array_equal(flatten(params)[name], value)  # the averages, from either
    assert find_checkpoint(original / "checkpoints/last").name == "12"


def test_load_params_places_arrays(original):
    import jax

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params, _ = load_params(original / "checkpoints/last", lambda path, shape: device)
    plain, _ = load_params(original / "checkpoints/last")
    for name, value in flatten(params).items():
        assert isinstance(value, jax.Array)
        np.testing.assert_array_equal(value, flatten(plain)[name])


def test_load_params_explains_what_it_cannot_read(workdir, tmp_path):
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        load_params(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="There is no checkpoint in .*empty"):
        load_params(tmp_path / "empty")
    for damage in (truncate, flip):
        folder = workdir / "checkpoints/best/12"
        damage(folder / "params")
        with pytest.raises(CheckpointError, match="best/12 is incomplete or damaged"):
            load_params(workdir)


def test_full_disk_stops_with_one_sentence_and_keeps_the_previous_checkpoint(tmp_path):
    class Filling(ToySource):
        """From the 10th batch on no file may grow beyond 6 kB: writes of parameters fail, small ones do not."""

        taken = 0

        def __getitem__(self, index):
            Filling.taken += 1
            if Filling.taken == 16 * 10:
                while not (workdir / "checkpoints/last/8").is_dir():
                    time.sleep(0.01)
                resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, limits[1]))
            return super().__getitem__(index)

    class Large(ToyObjective):
        def init(self, rng):
            import jax

            return {**super().init(rng), "ballast": jax.random.normal(rng, (100, 100))}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    workdir = tmp_path / "run"
    try:
        with pytest.raises(CheckpointError) as caught:
            train(toy_config(data_threads=0), Large(), Filling(), workdir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    text = str(caught.value)
    assert "could not be written" in text and "the disk is full" in text and "last/8 is complete and usable" in text
    assert "\n" not in text
    assert not list((workdir / "checkpoints").rglob("*tmp*"))
    train(toy_config(data_threads=0), Large(), ToySource(), workdir)
    assert max(losses(workdir)) == 12 and (workdir / "checkpoints/best/12").is_dir()


def test_best_and_last_are_never_written_at_the_same_time(tmp_path, monkeypatch):
    import jax.numpy as jnp

    from pixelstory_jax.training.checkpoints import Checkpoints
    from pixelstory_jax.training.state import TrainState

    state = TrainState(jnp.int32(1), {"large": jnp.ones((2000, 2000))}, (), None)
    with Checkpoints(tmp_path, {}) as checkpoints:
        for one, other in ((checkpoints._best, checkpoints._last), (checkpoints._last, checkpoints._best)):
            save = one.save

            def alone(*arguments, save=save, other=other, **named):
                assert not other.is_saving_in_progress()
                return save(*arguments, **named)

            monkeypatch.setattr(one, "save", alone)
        checkpoints.save_last(state, {"examples": 1})
        assert checkpoints.save_best(1, state.params, 0.5, {})
        checkpoints.save_last(state._replace(step=jnp.int32(2)), {"examples": 2})
    assert checkpoints.newest is not None and checkpoints.newest.name == "2"
