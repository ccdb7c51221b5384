"""From prompts to pictures: noise, text states, one compiled loop for equal calls, and how much memory it takes."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.data.clip_tokenizer import small_clip_tokenizer
from pixelstory_jax.inference import painter as painter_module
from pixelstory_jax.inference.painter import Memory, Painter, PaintOptions
from pixelstory_jax.inference.schedulers import SamplerConfig
from pixelstory_jax.models.autoencoder import AutoencoderConfig
from pixelstory_jax.models.clip_text import ClipTextConfig
from pixelstory_jax.models.consistent_attention import Sample, Sharing, see_each_other
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.models.unet import UNet, UNetConfig
from tests.golden_cases.unet import unet_shapes
from tests.models.small import random_like

TOKENIZER = small_clip_tokenizer()
TEXT = ClipTextConfig(
    vocab=TOKENIZER.vocab_size,
    length=TOKENIZER.length,
    width=8,
    layers=1,
    heads=2,
    mlp_width=8,
    eos_id=TOKENIZER.eos_id,
)
UNET = UNetConfig(
    channels=(4, 8), depths=(0, 1), heads=(1, 2), layers_per_block=1, context_width=16, pooled_width=6, groups=2
)
CONFIG = StoryDiffusionConfig(  # two text encoders, as SDXL
    UNET,
    AutoencoderConfig(block_channels=(4, 4), layers_per_block=1, groups=2),
    TEXT,
    dataclasses.replace(TEXT, projection=6),
    text_layer=-2,
)
OPTIONS = PaintOptions(steps=2, guidance=3.0, height=8, width=12)
NOISE_SHAPE = (4, 6, 4)


@pytest.fixture(scope="module")
def painter() -> Painter:
    model = StoryDiffusion(CONFIG)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0)))
    return Painter(model, params, {"text": TOKENIZER, "text_2": TOKENIZER}, SamplerConfig(), zero_negative=True)


def stories(painter: Painter, count: int, panels: int, options: PaintOptions = OPTIONS):
    """Noise and text states of stories, and no negative prompt."""
    noise = painter.noise(range(count * panels), options).reshape(count, panels, *NOISE_SHAPE)
    positive = painter.encode([f"a fox on day {number}" for number in range(count * panels)], options)
    positive = jax.tree.map(lambda x: x.reshape(count, panels, *x.shape[1:]), positive)
    return noise, positive, painter.encode_negative(None, options)


def test_noise_is_a_function_of_its_seed(painter):
    noise = painter.noise([3, (1, 2), 3, (2, 1)], OPTIONS)
    assert noise.shape == (4, *NOISE_SHAPE) and noise.dtype == jnp.float32
    np.testing.assert_array_equal(noise[0], noise[2])
    np.testing.assert_array_equal(noise[1], np.random.default_rng((1, 2)).standard_normal(NOISE_SHAPE, np.float32))
    assert np.any(noise[1] != noise[3])


def test_text_states(painter):
    """Each prompt as alone; both encoders side by side; the size of the picture as time ids."""
    prompts = ["a red fox", "two owls, at night"]
    states = painter.encode(prompts, OPTIONS)
    assert states.context.shape == (2, TOKENIZER.length, 16) and states.pooled.shape == (2, 6)
    np.testing.assert_array_equal(states.time_ids, [[8, 12, 0, 0, 8, 12]] * 2)
    for number, prompt in enumerate(prompts):
        alone = painter.encode([prompt], OPTIONS)
        np.testing.assert_allclose(alone.context[0], states.context[number], atol=1e-6)
    assert np.abs(states.context[0] - states.context[1]).max() > 0.1


def test_absent_and_empty_negative_prompts(painter):
    """Zeros for none where the pipeline wants that; an empty text has states."""
    none, empty = (painter.encode_negative(prompt, OPTIONS) for prompt in (None, ""))
    assert not np.any(none.context) and not np.any(none.pooled) and np.any(empty.context) and np.any(empty.pooled)
    np.testing.assert_array_equal(none.time_ids, empty.time_ids)
    plain = Painter(painter.model, painter.params, painter.tokenizers, painter.sampler)
    np.testing.assert_array_equal(plain.encode_negative(None, OPTIONS).context, empty.context)


def test_equal_calls_share_a_program(painter, monkeypatch):
    """Other prompts, noise, guidance and samplers of the same shapes are not compiled again; other sizes are."""
    traced = []

    def counted(*arguments, **keywords):
        traced.append(1)
        return denoise(*arguments, **keywords)

    denoise = painter_module.denoise
    monkeypatch.setattr(painter_module, "denoise", counted)
    fresh = Painter(painter.model, painter.params, painter.tokenizers, painter.sampler, zero_negative=True)
    noise, positive, negative = stories(fresh, 1, 2)
    first = fresh.paint(noise, positive, negative, OPTIONS).latents
    assert len(traced) == 1
    again = fresh.paint(noise[:, ::-1], jax.tree.map(lambda x: x[:, ::-1], positive), negative, OPTIONS).latents
    np.testing.assert_allclose(again[:, ::-1], first, atol=1e-5)
    stronger = fresh.paint(noise, positive, negative, dataclasses.replace(OPTIONS, guidance=9.0)).latents
    fresh.sampler = SamplerConfig("dpmpp_2m")
    other = fresh.paint(noise, positive, negative, OPTIONS).latents
    assert np.abs(stronger - first).max() > 1e-3 and np.abs(other - first).max() > 1e-3
    assert fresh.memory(noise, positive, negative, OPTIONS).total > 0
    assert len(traced) == 1
    fresh.paint(noise[:, :1], jax.tree.map(lambda x: x[:, :1], positive), negative, OPTIONS)
    assert len(traced) == 2


def test_pictures(painter, monkeypatch):
    """A few at a time is all at once; the last few are fewer."""
    latents = painter.noise(range(3), OPTIONS)
    monkeypatch.setattr("pixelstory_jax.inference.painter._DECODED_AT_ONCE", 2 * latents[0, ..., 0].size)
    decoded = painter.decode(latents)
    assert decoded.shape == (3, 8, 12, 3)
    np.testing.assert_allclose(decoded, painter.model.decode_latents(painter.params, latents), atol=1e-5)
    pictures = painter.pictures(latents)
    assert pictures.dtype == np.uint8 and pictures.shape == (3, 8, 12, 3)
    np.testing.assert_allclose(pictures, np.clip(np.asarray(decoded) * 127.5 + 127.5, 0, 255), atol=0.51)


def test_options_that_are_refused(painter):
    with pytest.raises(ValueError, match="steps is 0; at least 1 is needed"):
        PaintOptions(steps=0)
    with pytest.raises(ValueError, match="Pictures of 9 x 12 pixels: sides must be multiples of 2"):
        painter.noise([0], PaintOptions(height=9, width=12))


@pytest.mark.parametrize(("pixels", "megabytes"), [(512, 55), (768, 124), (1024, 220)])
def test_size_of_a_bank(pixels, megabytes):
    """All tokens of one picture at one step, both halves of guidance, two bytes per number: the 36 layers of SDXL."""
    config, side, count = UNetConfig.sdxl(dtype="bfloat16"), pixels // 8, 2
    coarse, fine = grids = config.sharing_grids(side, side)
    everything = {grid: Sample(np.ones((count, grid), bool)) for grid in grids}

    def arrays(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2 * count, *shape), jnp.float32)

    _, bank = jax.eval_shape(
        lambda params, *inputs: UNet(config).apply(
            {"params": params}, *inputs, Sharing(see_each_other(count), everything, store=True)
        ),
        unet_shapes(config),
        arrays(side, side, 4),
        arrays(),
        arrays(77, 2048),
        {"pooled": arrays(1280), "time_ids": arrays(6)},
    )
    assert sum(stack.shape[0] for stack in bank.values()) == 36
    size = sum(math.prod(stack.shape) * stack.dtype.itemsize for stack in bank.values()) / count
    assert size == 30 * coarse * 1280 * 2 * 2 + 6 * fine * 640 * 2 * 2
    assert size / 1e6 == pytest.approx(megabytes, rel=0.05)


# What one call adds to the process: the largest anonymous memory during it (pages of files come and go with the load of
# the machine) beyond that before it. Most are scores of attention, then the bank. The first call also starts threads.
MEASURE = """
import ctypes, dataclasses, re, threading, time
import jax, numpy as np
from pixelstory_jax.inference.painter import Painter, PaintOptions
from pixelstory_jax.inference.sharing import Draws, SharingPlan, share_steps
from pixelstory_jax.models.consistent_attention import see_each_other
from tests.inference import test_painter as small

config = dataclasses.replace(
    small.CONFIG, unet=dataclasses.replace(small.UNET, channels=(8, 64), heads=(1, 2), groups=4)
)
options, panels = PaintOptions(steps=2, height=128, width=96), 4
model = small.StoryDiffusion(config)
params = small.random_like(jax.eval_shape(model.init, jax.random.key(0)))
painter = Painter(model, params, {"text": small.TOKENIZER, "text_2": small.TOKENIZER}, small.SamplerConfig(), True)
noise = painter.noise(range(panels), options)[None]
positive = jax.tree.map(lambda x: x[None], painter.encode(["a fox"] * panels, options))
negative = painter.encode_negative(None, options)
grids = config.unet.sharing_grids(64, 48)
draws = Draws.from_seed(0, options.steps, config.unet.sharing_layers, panels, grids)
plan = SharingPlan("bank", sampling="mask")
sharing = share_steps(plan, draws, np.asarray(see_each_other(panels)), reading=False, store=True)
expected = painter.memory(noise, positive, negative, options, sharing)

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))

def watch():
    while watching:
        seen.append(anonymous())
        time.sleep(0.001)

taken = []
for call in range(4):  # the first one compiles; in a busy moment a call may be over before it is seen
    ctypes.CDLL(None).malloc_trim(0)
    before, seen, watching = anonymous(), [], True
    thread = threading.Thread(target=watch)
    thread.start()
    done = jax.block_until_ready(painter.paint(noise, positive, negative, options, sharing))
    watching = False
    thread.join()
    del done
    taken.append(max(seen) - before)
print(expected.between, expected.results, max(taken[1:]))
"""


PLAIN = "from pixelstory_jax.models.attention import attention_backend\nwith attention_backend('xla'):\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel is asked")
def test_memory_is_what_a_process_takes():
    root = Path(__file__).parents[2]
    # Plain attention, so that the arrays of the program are nearly all; what XLA's libraries take beside them for a
    # moment is in no estimate.
    measure = PLAIN + indent(MEASURE, "  ")
    output = subprocess.run(
        [sys.executable, "-c", measure], capture_output=True, text=True, check=True, cwd=root
    ).stdout
    between, results, measured = map(int, output.split())
    assert results > 5e6 and between > 2e8
    assert between + results == pytest.approx(measured, rel=0.1)


# The same for whole stories: two characters, five panels. Decoding and the shares that are kept count too.
MEASURE_STORIES = (
    MEASURE.split("noise = ")[0].replace("steps=2", "steps=3")
    + MEASURE[MEASURE.index("def anonymous") : MEASURE.index("for call")]
    + """
from pixelstory_jax.inference.story_painter import Shot, StoryPainter
seen_in = [(0,), (0,), (1,), (0, 1), ()]
shots = [Shot("a fox", characters, (number,)) for number, characters in enumerate(seen_in)]
portraits = [Shot("a fox", (number,), (9, number)) for number in range(2)]
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
for strategy in ("bank", "replay", "joint", "mask"):
    plan = SharingPlan("bank", sampling="mask") if strategy == "mask" else SharingPlan(strategy, window=3)
    story = StoryPainter(painter, plan, options)
    expected = story.memory(shots, portraits) - weights
    for call in range(2):
        ctypes.CDLL(None).malloc_trim(0)
        before, seen, watching = anonymous(), [], True
        thread = threading.Thread(target=watch)
        thread.start()
        story.paint(shots, portraits)
        watching = False
        thread.join()
    print(strategy, expected, max(seen) - before)
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel is asked")
def test_memory_of_stories_is_what_a_process_takes():
    root = Path(__file__).parents[2]
    output = subprocess.run(
        [sys.executable, "-c", PLAIN + indent(MEASURE_STORIES, "  ")],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    ).stdout
    lines = [line.split() for line in output.splitlines()]
    assert [line[0] for line in lines] == ["bank", "replay", "joint", "mask"]
    for strategy, expected, measured in lines:
        assert int(measured) > 2e7, strategy
        assert int(expected) == pytest.approx(int(measured), rel=0.1), strategy


def test_memory_of_a_program():
    """Arguments, results and the largest array between."""
    compiled = jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=0)[:, 0]).lower(np.ones(1000, np.float32)).compile()
    memory = Memory.of(compiled)
    assert (memory.arguments, memory.results) == (4000, 4000)
    assert memory.between >= 4_000_000
    assert memory.total == 8000 + memory.between
