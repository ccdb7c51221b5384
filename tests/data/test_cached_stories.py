"""Caches of encoded stories: what they hold equals what the networks give, and they are never half or mixed."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pixelstory_jax.data.cached_stories import (
    CachedStories,
    CacheError,
    cache_stories,
    encoder_params,
    networks_digest,
)
from pixelstory_jax.data.pipeline import stack_examples
from pixelstory_jax.inference.noise_schedule import NoiseSchedule
from pixelstory_jax.models.autoencoder import AutoencoderConfig
from pixelstory_jax.models.clip_text import ClipTextConfig
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.models.unet import UNetConfig
from pixelstory_jax.objectives.storydiffusion import DiffusionLoss, StoryDiffusionObjective
from tests.models.small import random_like

SIZE, PANELS, LENGTH, STORIES = 16, 3, 6, 5


def smallest(texts: int = 2) -> StoryDiffusion:
    """Of the kind of SD 1.5 (one text encoder) or of SDXL (two, and a pooled vector)."""
    text = ClipTextConfig(vocab=50, length=LENGTH, width=8, layers=2, heads=2, mlp_width=16, eos_id=49)
    second = dataclasses.replace(text, width=12, projection=10, activation="gelu")
    unet = UNetConfig(
        channels=(8, 16),
        depths=(0, 1),
        heads=(1, 2),
        layers_per_block=1,
        context_width=20 if texts == 2 else 8,
        pooled_width=10 if texts == 2 else 0,
        time_id_width=4,
        groups=4,
    )
    autoencoder = AutoencoderConfig((8, 8), layers_per_block=1, groups=4, scaling_factor=0.7)
    sizes = StoryDiffusionConfig(unet, autoencoder, text, second if texts == 2 else None, -2 if texts == 2 else -1)
    return StoryDiffusion(sizes)


def drawn_params(model: StoryDiffusion, logvar: float = -2.0) -> dict[str, Any]:
    """Random parameters; the log-variances of the latents are about `logvar`."""
    params = jax.device_get(jax.jit(model.init)(jax.random.key(3)))
    bias = np.array(params["autoencoder"]["moments"]["bias"])
    bias[len(bias) // 2 :] = logvar
    params["autoencoder"]["moments"]["bias"] = bias
    return params


class DrawnStories:
    """Random pictures and ids. Notes which examples were asked for; from `fails` on there are none."""

    def __init__(self, texts: int = 2, fails: int = STORIES):
        self.fields = ("tokens", "tokens_2")[:texts]
        self.fails, self.asked = fails, []

    def __len__(self) -> int:
        return STORIES

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        self.asked.append(index)
        if index >= self.fails:
            raise OSError("the disk is gone")
        rng = np.random.default_rng(index)
        tokens = {field: rng.integers(1, 49, (PANELS, LENGTH)).astype(np.int32) for field in self.fields}
        return {"images": rng.integers(0, 256, (PANELS, SIZE, SIZE, 3), np.uint8), **tokens}


def empty_ids(model: StoryDiffusion) -> dict[str, np.ndarray]:
    return {name: np.full(LENGTH, 49, np.int32) for name in model.encoders}


def write(model: StoryDiffusion, params: dict[str, Any], out: Path, source: Any = None, **changes: Any) -> None:
    options: dict[str, Any] = {"data": "drawn", "batch": 2, "shard": 3, **changes}
    cache_stories(model, params, source or DrawnStories(len(model.encoders)), out, empty_ids(model), **options)


@pytest.fixture(scope="module")
def networks() -> tuple[StoryDiffusion, dict[str, Any]]:
    model = smallest()
    return model, drawn_params(model)


@pytest.fixture(scope="module")
def finished(networks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "stories"
    write(*networks, out)
    return out


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def objective_of(model: StoryDiffusion, empty: dict[str, np.ndarray]) -> StoryDiffusionObjective:
    loss = DiffusionLoss(min_snr=0.0, drop_caption=0.5)
    spec: dict[str, Any] = {}

    def evaluator(params: Any, step: int) -> Any:
        raise AssertionError("nothing is evaluated here")

    return StoryDiffusionObjective(
        model.config,
        NoiseSchedule(prediction="v_prediction"),
        loss,
        spec,
        empty,
        SIZE,
        train_text=False,
        train_unet="full",
        evaluator=evaluator,
    )


@pytest.mark.slow
@pytest.mark.parametrize("texts", [1, 2])
def test_the_loss_is_that_of_the_pictures(texts, tmp_path):
    """Where the posterior has no width, training from the cache is training from pictures, up to float16."""
    model = smallest(texts)
    params = drawn_params(model, logvar=-1000.0)
    params["unet"] = random_like(params["unet"], scale=0.3)  # a new one does not look at the text
    write(model, params, tmp_path / "cache")
    stories, source = CachedStories(tmp_path / "cache"), DrawnStories(texts)
    cached, pictures, others = (
        stack_examples([examples[index] for index in indices], indices)
        for examples, indices in ((stories, (1, 4)), (source, (1, 4)), (stories, (0, 2)))
    )
    assert set(cached) == {"latents", "context", *(["pooled"] if texts == 2 else [])}

    loss = jax.jit(objective_of(model, stories.empty).loss)
    expected = jax.jit(objective_of(model, empty_ids(model)).loss)
    for seed in range(3):  # at seed 1 every caption is dropped
        rng = jax.random.key(seed)
        value = float(loss(params, cached, rng)[0])
        np.testing.assert_allclose(value, expected(params, pictures, rng)[0], rtol=3e-4)
        if seed == 0:  # and every field of the cache counts
            for field in cached:
                other = float(loss(params, {**cached, field: others[field]}, rng)[0])
                assert abs(other - value) > 3e-3 * value, field


def test_fields_are_what_the_networks_give(networks, finished):
    (model, params), stories, source = networks, CachedStories(finished), DrawnStories()
    encode_images, encode_text = jax.jit(model.encode_images), jax.jit(model.encode_text)
    assert len(stories) == STORIES
    for index in range(STORIES):
        example, origin = stories[index], source[index]
        assert all(value.dtype == np.float16 for value in example.values())
        noise = np.random.default_rng((0, index)).standard_normal((PANELS, 8, 8, 4), np.float32)
        latents = encode_images(params, origin["images"], noise)
        np.testing.assert_allclose(example["latents"], latents, rtol=2e-3, atol=2e-3)
        tokens = {"text": origin["tokens"], "text_2": origin["tokens_2"]}
        context, pooled = encode_text(params, tokens)
        np.testing.assert_allclose(example["context"], context, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(example["pooled"], pooled, rtol=2e-3, atol=2e-3)
    context, pooled = encode_text(params, {name: ids[None] for name, ids in empty_ids(model).items()})
    np.testing.assert_allclose(stories.empty["context"], context[0], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(stories.empty["pooled"], pooled[0], rtol=2e-3, atol=2e-3)


def test_draws_of_the_latents(finished):
    stories = CachedStories(finished, seed=1, draws=200)
    assert len(stories) == 200 * STORIES
    draws = np.stack([stories[2 + STORIES * draw]["latents"] for draw in range(200)]).astype(np.float64)
    mean, std = (np.load(finished / "shard-00000" / f"{field}.npy")[2] for field in ("mean", "std"))
    assert 0.1 < std.mean() < 0.5
    np.testing.assert_allclose(((draws - mean) / std).mean(0).std(), 200**-0.5, rtol=0.15)
    np.testing.assert_allclose(draws.std(0) / std, 1.0, atol=0.25)
    again, other = CachedStories(finished, seed=1, draws=200), CachedStories(finished, seed=2)
    np.testing.assert_array_equal(again[7]["latents"], stories[7]["latents"])
    np.testing.assert_array_equal(again[7]["context"], stories[2]["context"])
    assert (other[2]["latents"] != stories[2]["latents"]).any()
    with pytest.raises(IndexError, match=f"example {STORIES} does not exist"):
        other[STORIES]
    with pytest.raises(ValueError, match="draws at least 1"):
        CachedStories(finished, draws=0)


def test_a_reader_goes_to_worker_processes_without_its_arrays(finished):
    stories = CachedStories(finished)
    sent = pickle.dumps(stories)
    assert len(sent) < 5_000
    np.testing.assert_array_equal(pickle.loads(sent)[4]["latents"], stories[4]["latents"])


def test_a_stopped_run_is_continued(networks, finished, tmp_path):
    out, source = tmp_path / "cache", DrawnStories(fails=4)
    with pytest.raises(OSError, match="the disk is gone"):
        write(*networks, out, source)
    assert sorted(path.name for path in out.iterdir()) == ["empty", "index.json", "shard-00000"]
    with pytest.raises(CacheError, match="incomplete: 1 of its 3 parts are missing, shard-00001 first"):
        CachedStories(out)
    source, seen = DrawnStories(), []
    # Another batch, and a size of shards that the cache does not have: what it has counts.
    write(*networks, out, source, batch=1, shard=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 5), (4, 5), (5, 5)]
    assert sorted(set(source.asked)) == [0, 3, 4]  # the first for its sizes
    for file in finished.rglob("*.npy"):
        np.testing.assert_allclose(np.load(out / file.relative_to(finished)), np.load(file), rtol=2e-3, atol=2e-3)
    source = DrawnStories()
    write(*networks, out, source)
    assert set(source.asked) == {0}


def changed(params: dict[str, Any], path: str) -> dict[str, Any]:
    """A copy with another value of one parameter."""
    copy = pickle.loads(pickle.dumps(params))
    *parents, last = path.split("/")
    node = copy
    for parent in parents:
        node = node[parent]
    node[last] = node[last] + np.float32(1e-3)
    return copy


def test_caches_of_different_networks_are_not_mixed(networks, finished, tmp_path):
    model, params = networks
    out = copied(finished, tmp_path)
    before = (out / "index.json").read_text()
    for path in ("autoencoder/encoder/conv_in/bias", "autoencoder/moments/kernel", "text_2/token_embedding"):
        with pytest.raises(CacheError, match=f"{out} is a cache of other networks or weights"):
            write(model, changed(params, path), out)
        with pytest.raises(CacheError, match="another autoencoder or other text encoders"):
            CachedStories(out).check_networks(model, changed(params, path))
    scaled = dataclasses.replace(model.config.autoencoder, scaling_factor=0.8)
    with pytest.raises(CacheError, match="of other networks"):
        write(StoryDiffusion(dataclasses.replace(model.config, autoencoder=scaled)), params, out)
    with pytest.raises(CacheError, match="of other stories"):
        write(model, params, out, data="others")
    assert (out / "index.json").read_text() == before

    decoder = next(path for path in flatten(params) if path.startswith("autoencoder/decoder/"))
    CachedStories(out).check_networks(model, changed(params, decoder))  # it does not encode


def test_the_digest_knows_no_precision_of_computing(networks):
    model, params = networks
    text = dataclasses.replace(model.config.text, dtype="bfloat16")
    assert networks_digest(StoryDiffusion(dataclasses.replace(model.config, text=text)), params) == networks_digest(
        model, params
    )


def test_other_folders_are_left_alone(networks, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(CacheError, match=f"{out} exists and is no cache of stories"):
            write(*networks, out)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_values_that_float16_cannot_hold(networks, tmp_path):
    model, params = networks
    huge = pickle.loads(pickle.dumps(params))
    huge["autoencoder"]["moments"]["kernel"] = huge["autoencoder"]["moments"]["kernel"] * np.float32(1e7)
    with pytest.raises(CacheError, match=r"mean(?: and std)? of stories 0 to 1 is not finite in float16"):
        write(model, huge, tmp_path / "cache")


def without_tokens_2(example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in example.items() if name != "tokens_2"}


def not_square(example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**example, "images": example["images"][:, :, :8]}


@pytest.mark.parametrize(
    "change, sentence",
    [(without_tokens_2, "The source has no tokens_2, only images, tokens"), (not_square, "have 16 x 8 pixels; square")],
)
def test_sources_that_do_not_fit(networks, tmp_path, change, sentence):
    class Changed(DrawnStories):
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return change(super().__getitem__(index))

    with pytest.raises(CacheError, match=sentence):
        write(*networks, tmp_path / "cache", Changed())
    assert not (tmp_path / "cache").exists()


def cut_short(folder: Path) -> None:
    file = folder / "shard-00001" / "context.npy"
    file.write_bytes(file.read_bytes()[:-10])


def of_another_shape(folder: Path) -> None:
    np.save(folder / "shard-00001" / "mean.npy", np.zeros((1, 2), np.float16))


def of_another_type(folder: Path) -> None:
    file = folder / "empty" / "context.npy"
    np.save(file, np.load(file).astype(np.float32))


def pickled(folder: Path) -> None:
    np.save(folder / "shard-00000" / "std.npy", np.array([{}], object))


def without_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def broken_index(folder: Path) -> None:
    (folder / "index.json").write_text("{")


def foreign_index(folder: Path) -> None:
    (folder / "index.json").write_text("[1, 2]")


def of_a_later_format(folder: Path) -> None:
    table = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**table, "format": 2}))


def of_no_stories(folder: Path) -> None:
    table = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**table, "stories": 0}))


DAMAGES: dict[Callable[[Path], None], str] = {
    cut_short: r"context\.npy is missing or damaged .*; delete .*shard-00001 and run",
    of_another_shape: r"mean\.npy is float16 \[1, 2\], the index says float16 \[2, 3, 8, 8, 4\]",
    of_another_type: r"context\.npy is float32 \[6, 20\], the index says float16 \[6, 20\]",
    pickled: r"std\.npy is missing or damaged",
    without_index: r"index\.json cannot be read \(No such file",
    broken_index: r"index\.json is not JSON",
    foreign_index: r"index\.json is not the index of a cache",
    of_a_later_format: r"has format 2, this version reads 1",
    of_no_stories: r"index\.json is not the index of a cache of stories: its sizes",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_caches_are_refused(finished, tmp_path, damage):
    folder = copied(finished, tmp_path)
    CachedStories(folder)
    damage(folder)
    with pytest.raises(CacheError, match=DAMAGES[damage]) as error:
        CachedStories(folder)
    assert "\n" not in str(error.value)


def test_weights_must_hold_all_that_encodes(networks):
    model, params = networks
    flat = flatten(params)
    chosen = flatten(encoder_params(model, {path: value.astype(np.float16) for path, value in flat.items()}))
    assert {path.split("/")[0] for path in chosen} == {"autoencoder", "text", "text_2"}
    assert all(value.dtype == np.float32 for value in chosen.values())
    weights = {path: value for path, value in flat.items() if path != "text/token_embedding"}
    weights["autoencoder/moments/bias"] = np.zeros(3)
    with pytest.raises(CacheError, match=r"text/token_embedding is missing; .*moments/bias has shape \[3\], not \[8\]"):
        encoder_params(model, weights)
