"""Whole pipelines from prompts to pictures: sdxl_pipeline, and stories with consistent attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.inference import schedulers
from pixelstory_jax.inference.diffusion import TextStates
from pixelstory_jax.inference.painter import Painter, PaintOptions
from pixelstory_jax.interop.diffusers_folder import read_pipeline
from pixelstory_jax.models.autoencoder import byte_pixels
from pixelstory_jax.models.consistent_attention import Sample, Sharing, see_each_other
from pixelstory_jax.models.story_diffusion import StoryDiffusion
from tests.golden_cases.fixture import Fixture
from tests.golden_cases.unet import nchw, nhwc, samples


def load(fixture: Fixture, sampler: str) -> Painter:
    folder = read_pipeline(fixture.folder, sampler)
    return Painter(
        StoryDiffusion(folder.config), folder.tree(), folder.tokenizers, folder.sampler, folder.zero_negative
    )


def trace_nchw(trace: Any, panels: int) -> np.ndarray:
    """[S, 1, A, h, w, C] to [S, A, C, h, w]."""
    return np.moveaxis(np.asarray(trace)[:, 0], -1, 2)


def plain(fixture: Fixture) -> dict[str, np.ndarray]:
    """sdxl_pipeline."""
    meta, painter = fixture.meta, load(fixture, "ddim")
    results: dict[str, np.ndarray] = {
        "timesteps": np.asarray(schedulers.plan(painter.sampler, meta["steps"]).rows.timestep).astype(np.int64)
    }
    many = len(meta["prompts"])
    for size in sorted({name.split("/")[0] for name in fixture.inputs}):
        height, width = map(int, size.split("x"))
        options = PaintOptions(meta["steps"], meta["guidance_scale"], height=height, width=width)
        positive = painter.encode(meta["prompts"], options)
        noise = nhwc(fixture.inputs[f"{size}/latents"])
        for name, prompt in (("no_negative", None), ("negative", meta["negative_prompt"])):
            negative = painter.encode_negative(prompt, options)
            states = {"prompt": positive, "negative_prompt": jax.tree.map(lambda x: jnp.stack([x] * many), negative)}
            for kind, value in states.items():
                results[f"text/{name}/{kind}_embeds"] = np.asarray(value.context)
                prefix = "negative_" if kind == "negative_prompt" else ""
                results[f"text/{name}/{prefix}pooled_prompt_embeds"] = np.asarray(value.pooled)
            done = painter.paint(noise[None], jax.tree.map(lambda x: x[None], positive), negative, options, None, True)
            decoded = painter.decode(done.latents[0])
            results[f"{size}/{name}/latents_per_step"] = trace_nchw(done.trace, many)
            results[f"{size}/{name}/latents"] = nchw(done.latents[0])
            results[f"{size}/{name}/decoded"] = nchw(decoded)
            results[f"{size}/{name}/image_uint8"] = np.asarray(byte_pixels(decoded))
    return results


def padded_steps(steps: list[dict[int, Sample]]) -> dict[int, Sample]:
    """Samples of every step with the steps as leading axis; index lists are padded to the longest."""
    stacked = {}
    for grid in steps[0]:
        longest = max(step[grid].valid.shape[-1] for step in steps)

        def pad(x, longest=longest):
            return np.pad(np.asarray(x), ((0, 0), (0, longest - x.shape[-1])))

        valid = np.stack([pad(step[grid].valid) for step in steps])
        index = None if steps[0][grid].index is None else np.stack([pad(step[grid].index) for step in steps])
        stacked[grid] = Sample(valid, index)
    return stacked


def story(fixture: Fixture) -> dict[str, np.ndarray]:
    """story_mask, story_index: write pass over the anchors, then one more panel that reads their bank."""
    meta, painter = fixture.meta, load(fixture, "ddim")
    anchors = meta["id_length"]
    drawn = padded_steps([samples(fixture, step, anchors) for step in range(meta["steps"])])
    gates = np.asarray(fixture.inputs["use_consistent"])
    noise = nhwc(fixture.inputs["latents"])
    results = {}
    for name in ("freeu", "nofreeu"):
        options = PaintOptions(
            meta["steps"], meta["guidance_scale"], freeu=name == "freeu", height=meta["height"], width=meta["width"]
        )
        positive = painter.encode(meta["prompts"], options)
        negative = painter.encode_negative(meta["negative_prompt"], options)

        def part(states: TextStates, chosen: slice) -> TextStates:
            return jax.tree.map(lambda x: x[None, chosen], states)

        writing = Sharing(see_each_other(anchors), drawn, gates, store=True)
        first = slice(0, anchors)
        written = painter.paint(noise[None, first], part(positive, first), negative, options, writing, True)
        reading = Sharing(np.ones((1, 1, anchors), bool), drawn, gates, written.bank)
        last = slice(anchors, anchors + 1)
        read = painter.paint(noise[None, last], part(positive, last), negative, options, reading, True)
        for kind, done in (("write", written), ("read", read)):
            results[f"{name}/{kind}/latents_per_step"] = trace_nchw(done.trace, done.latents.shape[1])
            results[f"{name}/{kind}/decoded"] = nchw(painter.decode(done.latents[0]))
    return results
