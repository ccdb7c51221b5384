"""Pipelines written for diffusers: its own come back bit for bit, and ours paint there what they paint here."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from configs.storydiffusion import get_config
from pixelstory_jax.data.builtin.tiny_autoencoder import read_tiny_autoencoder
from pixelstory_jax.data.clip_tokenizer import small_clip_tokenizer
from pixelstory_jax.inference.noise_schedule import NoiseSchedule
from pixelstory_jax.inference.painter import Painter
from pixelstory_jax.inference.schedulers import SamplerConfig
from pixelstory_jax.interop.autoencoder_table import autoencoder_settings
from pixelstory_jax.interop.clip_text_table import clip_text_settings, released_names
from pixelstory_jax.interop.diffusers_folder import PipelineFolder, pipeline_files, pipeline_parts, read_pipeline
from pixelstory_jax.interop.exports import Export, write_export
from pixelstory_jax.interop.safetensors_files import read_safetensors
from pixelstory_jax.interop.shapes import check_params
from pixelstory_jax.interop.tensor_files import open_tensors
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.interop.torch_layout import torch_shapes
from pixelstory_jax.interop.unet_table import unet_settings
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from tests.interop.test_diffusers_folder import (
    CONFIGS,
    GUIDANCE,
    HEIGHT,
    NEGATIVE,
    PROMPTS,
    STEPS,
    WIDTH,
    assert_same_pictures,
    build_pipeline,
)
from tests.models.small import random_like

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# diffusers copies tensors of torch in a way that numpy complains about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning"),  # older versions know no other name
]

CLASSES = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
SMALL_SHARD = 8_000  # bytes


@pytest.fixture(scope="module", params=list(CONFIGS))
def original(request, tmp_path_factory):
    """Kind, and the folder of a pipeline of diffusers with random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    build_pipeline(request.param, folder)
    return request.param, folder / "saved"


def write_pipeline(folder: Path, pipeline: PipelineFolder, dtype: str = "keep", shard: int = 10**9) -> None:
    """As export_weights does, from a pipeline that was read."""
    files = pipeline_files(pipeline)
    check_params("storydiffusion", pipeline.config, pipeline.params)
    folder.mkdir()
    export = Export(tuple(pipeline_parts(pipeline.config)), pipeline.params, files)
    write_export(folder, export, dtype, shard)


def load(kind: str, folder: Path, **options: Any):
    pipeline = CLASSES[kind].from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def states(pipeline) -> dict[str, dict[str, Any]]:
    """State dict of every network."""
    return {name: getattr(pipeline, name).state_dict() for name in NETWORKS if getattr(pipeline, name, None)}


def assert_same_states(first, second) -> None:
    for name, tensors in states(first).items():
        others = states(second)[name]
        assert tensors.keys() == others.keys()
        for key, value in tensors.items():
            assert value.dtype == others[key].dtype and torch.equal(value, others[key]), (name, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("shard", [SMALL_SHARD, 10**9])
def test_pipelines_of_diffusers_come_back(original, tmp_path, dtype, shard):
    """Read and written again: every tensor bit for bit in its own dtype, from one file and from many."""
    kind, folder = original
    theirs, variant = load(kind, folder, torch_dtype=dtype), "fp16" if dtype == torch.float16 else None
    theirs.save_pretrained(tmp_path / "theirs", variant=variant)
    write_pipeline(tmp_path / "ours", read_pipeline(tmp_path / "theirs"), shard=shard)
    indexed = {path.parent.name for path in (tmp_path / "ours").rglob("*.safetensors.index.json")}
    assert indexed == (states(theirs).keys() if shard == SMALL_SHARD else set())
    loaded = load(kind, tmp_path / "ours", torch_dtype=dtype)
    assert_same_states(theirs, loaded)
    for name in ("unet", "vae"):
        files = open_tensors(tmp_path / "ours" / name)
        tensors = {key: torch.tensor(np.asarray(tensor)) for key, tensor in files.items()}
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        getattr(loaded, name).load_state_dict(tensors, strict=True)


def test_the_same_picture(original, tmp_path):
    """The whole way from prompts to pixels, by their code, with the folder's own tokenizers and scheduler."""
    kind, folder = original
    write_pipeline(tmp_path / "ours", read_pipeline(folder))
    latents = torch.randn(len(PROMPTS), 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0))
    first, second = (
        load(kind, source)(
            prompt=list(PROMPTS),
            negative_prompt=[NEGATIVE] * len(PROMPTS),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=latents.clone(),
            output_type="np",
        ).images
        for source in (folder, tmp_path / "ours")
    )
    np.testing.assert_array_equal(first, second)
    assert first.std() > 0.02


@functools.cache
def our_pipeline() -> PipelineFolder:
    """The tiny model of the config with random networks and the shipped autoencoder."""
    autoencoder, weights = read_tiny_autoencoder()
    config = dataclasses.replace(StoryDiffusionConfig.tiny(), autoencoder=autoencoder)
    params = flatten(random_like(jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0)), scale=0.05))
    params |= {f"autoencoder/{path}": value for path, value in flatten(weights).items()}
    settings = get_config("tiny")
    sampler = SamplerConfig(schedule=NoiseSchedule(**settings.schedule), **settings.sampler)
    return PipelineFolder(config, params, {"text": small_clip_tokenizer()}, sampler, 96, settings.zero_negative)


@pytest.mark.slow
def test_a_model_of_ours_paints_the_same_there(tmp_path):
    """Trained here from scratch: two samplers without noise, as that of the config draws noise of its own."""
    ours = our_pipeline()
    painter = Painter(StoryDiffusion(ours.config), unflatten(ours.params), ours.tokenizers, ours.sampler)
    schedule = ours.sampler.schedule
    for sampler in (
        SamplerConfig("ddim", schedule, "trailing"),
        SamplerConfig("euler", NoiseSchedule(prediction="v_prediction"), "trailing"),
    ):
        folder = tmp_path / sampler.kind
        write_pipeline(folder, dataclasses.replace(ours, sampler=sampler))
        painter.sampler = sampler
        assert_same_pictures(load("sd15", folder), painter, 32, 40, None)
    write_pipeline(tmp_path / "noisy", ours)
    loaded, again = load("sd15", tmp_path / "noisy"), read_pipeline(tmp_path / "noisy")
    assert SamplerConfig.from_diffusers(loaded.scheduler.config) == ours.sampler
    assert loaded(PROMPTS[0], num_inference_steps=1, output_type="np").images.shape == (1, 96, 96, 3)
    assert dataclasses.replace(again, params={}, tokenizers={}) == dataclasses.replace(ours, params={}, tokenizers={})
    assert again.params.keys() == ours.params.keys()
    assert all((np.asarray(again.params[path]) == value).all() for path, value in ours.params.items())


def test_half_precision(tmp_path):
    ours = our_pipeline()
    write_pipeline(tmp_path / "out", ours, "bfloat16")
    tensors, metadata = read_safetensors(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert metadata == {"format": "pt"}
    read = read_pipeline(tmp_path / "out").tree()
    expected = np.asarray(ours.params["text/token_embedding"]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(read["text"]["token_embedding"], expected)
    assert read["text"]["token_embedding"].dtype == np.float32


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_published_sizes(kind):
    """diffusers and transformers build exactly our tensors from our settings; no weights are made."""
    config = getattr(StoryDiffusionConfig, kind)()
    with torch.device("meta"):
        theirs = {
            "unet": diffusers.UNet2DConditionModel.from_config(unet_settings(config.unet)),
            "vae": diffusers.AutoencoderKL.from_config(autoencoder_settings(config.autoencoder)),
        }
        for name, text in (("text_encoder", config.text), ("text_encoder_2", config.text_2)):
            if text:
                settings = clip_text_settings(text)
                network = getattr(transformers, settings["architectures"][0])
                theirs[name] = network(transformers.CLIPTextConfig(**settings))
    shapes: dict[str, Any] = jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0))
    parts = pipeline_parts(config)
    assert [part.folder for part in parts] == list(theirs)
    for part in parts:
        state = theirs[part.folder].state_dict()
        state = released_names(state) if part.folder.startswith("text") else state
        ours = torch_shapes(part.table, shapes[part.prefix.rstrip("/")])
        assert ours == {key: tuple(tensor.shape) for key, tensor in state.items()}, part.folder


TINY = StoryDiffusionConfig.tiny()
PROJECTED = dataclasses.replace(TINY.text, projection=4)
TWO = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, context_width=128), text_2=TINY.text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"zero_negative": True},
            "as a StableDiffusionPipeline: an absent negative prompt is an empty text, not zeros",
        ),
        ({"picture_size": 90}, "pictures are multiples of 4 pixels, not 90"),
        ({"tokenizers": {}}, r"it has tokenizers for text, not \[\]"),
        ({"config": dataclasses.replace(TINY, text_layer=-2)}, "it takes text states of layer -1, not -2"),
        ({"config": dataclasses.replace(TINY, text=PROJECTED)}, "its first text encoder has no projection"),
        ({"config": TWO}, "as a StableDiffusionXLPipeline: it takes text states of layer -2, not -1; its second text"),
    ],
)
def test_what_diffusers_cannot_have(tmp_path, changes, message):
    with pytest.raises(WeightsError, match=message):
        write_pipeline(tmp_path / "out", dataclasses.replace(our_pipeline(), **changes))
    assert not list(tmp_path.iterdir())


def test_parameters_that_do_not_fit(tmp_path):
    ours = our_pipeline()
    wrong = {path: value for path, value in ours.params.items() if path != "text/final_norm/scale"}
    wrong["unet/conv_in/bias"] = np.zeros(3, np.float32)
    with pytest.raises(WeightsError) as caught:
        write_pipeline(tmp_path / "out", dataclasses.replace(ours, params=wrong))
    assert str(caught.value).splitlines()[1:] == [
        "  missing: text/final_norm/scale [64]",
        "  mis-shaped: unet/conv_in/bias is [3], expected [32]",
    ]
    with pytest.raises(WeightsError, match=r"unexpected: unet/other \[3\]"):
        other = {**ours.params, "unet/other": np.zeros(3)}
        write_pipeline(tmp_path / "out", dataclasses.replace(ours, params=other))
    assert not list(tmp_path.iterdir())
