"""Whole pipelines: folders that diffusers has written, from prompts to pictures as its own pipelines paint them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from copy import deepcopy
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import as_config
from configs.storydiffusion import get_config
from pixelstory_jax.data import build_source
from pixelstory_jax.data.clip_tokenizer import small_clip_tokenizer
from pixelstory_jax.data.story_script import StoryScript
from pixelstory_jax.inference.painter import Painter, PaintOptions
from pixelstory_jax.inference.schedulers import SamplerConfig
from pixelstory_jax.inference.story_teller import PageOptions, StoryTeller
from pixelstory_jax.interop.autoencoder_table import autoencoder_settings
from pixelstory_jax.interop.clip_text_table import clip_text_settings
from pixelstory_jax.interop.diffusers_folder import read_pipeline
from pixelstory_jax.interop.safetensors_files import read_safetensors, write_safetensors
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.interop.unet_table import unet_settings
from pixelstory_jax.models.autoencoder import AutoencoderConfig
from pixelstory_jax.models.clip_text import ClipTextConfig
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.models.unet import UNetConfig
from pixelstory_jax.objectives import build_objective
from tests.data.test_story_folder import story, write_folder

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

# diffusers copies tensors of torch in a way that numpy complains about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOKENIZER = small_clip_tokenizer()
TEXT = ClipTextConfig(
    vocab=TOKENIZER.vocab_size,
    length=TOKENIZER.length,
    width=8,
    layers=2,
    heads=2,
    mlp_width=12,
    eos_id=TOKENIZER.eos_id,
)
TEXT_2 = ClipTextConfig(**{**vars(TEXT), "width": 12, "activation": "gelu", "projection": 6})
AUTOENCODER = AutoencoderConfig(block_channels=(4, 4, 8, 8), layers_per_block=1, groups=2)
UNET = UNetConfig(
    channels=(8, 16),
    depths=(0, 1),
    heads=(2, 4),
    layers_per_block=1,
    context_width=20,
    pooled_width=6,
    time_id_width=8,
    groups=4,
)
CONFIGS = {
    "sdxl": StoryDiffusionConfig(UNET, AUTOENCODER, TEXT, TEXT_2, text_layer=-2),
    "sd15": StoryDiffusionConfig(
        UNetConfig(
            **{**vars(UNET), "depths": (1, 0), "context_width": 8, "pooled_width": 0, "linear_projection": False}
            | {"time_id_width": 256}
        ),
        AUTOENCODER,
        TEXT,
    ),
}
SAMPLERS = {
    "DDIMScheduler": SamplerConfig(),
    "EulerDiscreteScheduler": SamplerConfig("euler", timestep_spacing="leading"),
    "DPMSolverMultistepScheduler": SamplerConfig("dpmpp_2m", use_karras_sigmas=True),
}
HEIGHT, WIDTH, STEPS, GUIDANCE = 40, 56, 3, 4.0  # latents of 5 x 7
PROMPTS = ("a girl in a blue hat, in the park", "two owls at night!")
NEGATIVE = "blurry, text"


def build_pipeline(kind: str, folder: Path):
    """A pipeline of diffusers with random weights, saved to `folder`."""
    import diffusers
    import transformers

    from tests.models.test_torch_parity import randomise

    config = CONFIGS[kind]
    TOKENIZER.save(folder / "vocabulary")
    parts = {"unet": diffusers.UNet2DConditionModel.from_config(unet_settings(config.unet))}
    parts["vae"] = diffusers.AutoencoderKL.from_config(autoencoder_settings(config.autoencoder))
    for name, text in (("text_encoder", config.text), ("text_encoder_2", config.text_2)):
        if text is not None:
            network = transformers.CLIPTextModelWithProjection if text.projection else transformers.CLIPTextModel
            parts[name] = network(transformers.CLIPTextConfig(**clip_text_settings(text)))
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "vocabulary")
            parts[name.replace("text_encoder", "tokenizer")] = tokenizer
    for part in parts.values():
        if hasattr(part, "named_parameters"):
            randomise(part.eval())
    parts["scheduler"] = diffusers.DDIMScheduler.from_config(SAMPLERS["DDIMScheduler"].to_diffusers())
    if kind == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "saved")
    return pipeline


@pytest.fixture(scope="module", params=list(CONFIGS))
def pipeline(request, tmp_path_factory):
    """Kind, diffusers' pipeline and the folder it is saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, build_pipeline(request.param, folder), folder / "saved"


@pytest.fixture(scope="module")
def painter(pipeline) -> Painter:
    """Ours, from the folder; one compiled program serves all samplers and scales of guidance."""
    read = read_pipeline(pipeline[2])
    return Painter(StoryDiffusion(read.config), read.tree(), read.tokenizers, read.sampler, read.zero_negative)


def test_content_of_the_folder(pipeline):
    kind, _, folder = pipeline
    read = read_pipeline(folder)
    assert read.config == CONFIGS[kind]
    assert read.sampler == SAMPLERS["DDIMScheduler"]
    assert read.zero_negative == (kind == "sdxl")
    assert set(read.tokenizers) == ({"text", "text_2"} if kind == "sdxl" else {"text"})
    shapes = jax.eval_shape(StoryDiffusion(read.config).init, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in flatten(shapes).items()} == {
        path: value.shape for path, value in read.params.items()
    }
    assert read_pipeline(folder, "euler").sampler.kind == "euler"


def assert_same_pictures(theirs, painter: Painter, height: int, width: int, negative: str | None) -> None:
    """A pipeline of diffusers and ours: latents after every step, and pictures, from the same noise."""
    import torch

    options = PaintOptions(STEPS, GUIDANCE, height=height, width=width)
    noise = painter.noise(range(len(PROMPTS)), options)
    positive = jax.tree.map(lambda x: x[None], painter.encode(PROMPTS, options))
    steps: list[torch.Tensor] = []
    expected = theirs(
        prompt=list(PROMPTS),
        negative_prompt=negative and [negative] * len(PROMPTS),
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.tensor(np.asarray(noise)).permute(0, 3, 1, 2),
        output_type="np",
        callback_on_step_end=lambda pipe, step, time, kept: steps.append(kept["latents"]) or {},
    ).images
    done = painter.paint(noise[None], positive, painter.encode_negative(negative, options), options, with_trace=True)
    trace = torch.stack(steps).permute(0, 1, 3, 4, 2).numpy()
    tolerance = 2e-5 * np.abs(trace).max((1, 2, 3, 4))
    errors = np.abs(np.asarray(done.trace)[:, 0] - trace).max((1, 2, 3, 4))
    assert np.all(errors <= tolerance), (painter.sampler.kind, negative, errors, tolerance)
    pictures = painter.pictures(done.latents[0])
    assert pictures.shape == (2, height, width, 3) and pictures.std() > 5
    np.testing.assert_allclose(pictures, np.round(expected * 255), atol=1)


def test_parity_with_the_pipeline(pipeline, painter):
    """Three samplers and two negative prompts."""
    import diffusers

    theirs = pipeline[1]
    for name, sampler in SAMPLERS.items():
        theirs.scheduler = getattr(diffusers, name).from_config(sampler.to_diffusers())
        painter.sampler = SamplerConfig.from_diffusers(theirs.scheduler.config)
        for negative in (None, NEGATIVE):
            assert_same_pictures(theirs, painter, HEIGHT, WIDTH, negative)


def test_images_without_guidance(pipeline, painter):
    """Theirs skips the negative half; ours computes it and gives it no weight."""
    import torch

    theirs = pipeline[1]
    theirs.scheduler = theirs.scheduler.__class__.from_config(theirs.scheduler.config)
    painter.sampler = SamplerConfig.from_diffusers(theirs.scheduler.config)
    options = PaintOptions(STEPS, 1.0, height=HEIGHT, width=WIDTH)
    noise = painter.noise(range(len(PROMPTS)), options)
    expected = theirs(
        prompt=list(PROMPTS),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=torch.tensor(np.asarray(noise)).permute(0, 3, 1, 2),
        output_type="latent",
    ).images
    positive = jax.tree.map(lambda x: x[None], painter.encode(PROMPTS, options))
    done = painter.paint(noise[None], positive, painter.encode_negative("x", options), options, with_trace=True)
    expected = expected.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(done.latents[0], expected, atol=2e-5 * np.abs(expected).max())


@pytest.fixture
def copy(pipeline, tmp_path):
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(pipeline[2], tmp_path / "copy"))


def test_pickled_shards(pipeline, copy):
    """As older folders have them; not read before they are asked for, and in the dtype of the file."""
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    released = read_pipeline(pipeline[2])
    weights.unlink()
    half = deepcopy(pipeline[1].unet).half()
    half.save_pretrained(copy / "unet", safe_serialization=False, max_shard_size="20KB")
    assert not weights.exists() and len(list((copy / "unet").glob("*.bin"))) > 1
    read = read_pipeline(copy)
    for path, value in released.params.items():
        dtype = np.float16 if path.startswith("unet/") else np.float32
        assert read.params[path].dtype == dtype
        np.testing.assert_array_equal(read.params[path], np.asarray(value, dtype), err_msg=path)
    assert {leaf.dtype for leaf in jax.tree.leaves(read.tree())} == {np.dtype(np.float32)}


def test_damaged_folders_are_refused(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, _ = read_safetensors(weights)
    write_safetensors(weights, {name: value for name, value in tensors.items() if name != "conv_in.bias"})
    with pytest.raises(WeightsError, match=r"missing: conv_in.bias \[8\]"):
        read_pipeline(copy)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"unet holds no weights: .*diffusion_pytorch_model.safetensors, "):
        read_pipeline(copy)
    (copy / "vae" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"vae/config.json is not JSON"):
        read_pipeline(copy)
    (copy / "model_index.json").unlink()
    with pytest.raises(WeightsError, match=r"model_index.json cannot be read .*; a diffusers pipeline has it"):
        read_pipeline(copy)


def test_other_schedulers_name_the_way_out(copy):
    """As PNDM in the folder of Stable Diffusion 1.5."""
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "PNDMScheduler"}))
    with pytest.raises(ValueError, match="PNDMScheduler is not implemented; read the file with kind='ddim'"):
        read_pipeline(copy)
    assert read_pipeline(copy, "ddim").sampler == SAMPLERS["DDIMScheduler"]


@pytest.mark.slow
def test_training_starts_from_a_folder(pipeline, copy, tmp_path):
    """With low-rank additions, on stories of a folder, and whatever the folder's scheduler is: 1.5 has PNDM."""
    kind = pipeline[0]
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "_class_name": "PNDMScheduler"}))
    config = get_config(kind)
    config.init_from = str(copy)
    config.model = as_config(
        dataclasses.replace(CONFIGS[kind], unet=dataclasses.replace(CONFIGS[kind].unet, lora_rank=2))
    )
    config.data.update({"folder": str(write_folder(tmp_path / "stories", [story(1, 2), story(3, 4)])), "size": 40})
    config.data.panels = 2
    config.train.update({"batch_size": 2, "warmup_steps": 0})
    objective = build_objective(config)
    weights = objective.starting_weights()
    params = {**flatten(objective.init(jax.random.key(0))), **{path: np.asarray(weights[path]) for path in weights}}
    released = read_pipeline(pipeline[2]).params
    assert weights.keys() == released.keys()
    assert all((np.asarray(weights[path]) == np.asarray(released[path])).all() for path in weights)
    assert len(params) > len(weights) and all(objective.trainable(path) for path in params.keys() - weights.keys())
    source = build_source(config, "train")
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), source[0], source[1])
    loss, terms = objective.loss(unflatten(params), batch, jax.random.key(1))
    assert np.isfinite(loss) and terms["error"] > 0


@pytest.mark.slow
def test_a_story_of_a_folder(copy):
    """Untrained, as the released apps: their sampler, at the size of the U-Net's training, here 6 x 6 latents."""
    settings = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(settings | {"sample_size": 6}))
    told = StoryTeller.from_checkpoint(copy, steps=2, page=PageOptions(width=600)).tell(
        StoryScript.from_text("[Bob] a girl\n\n[Bob] in the park\n[Bob] at night\n[NC] a park\n")
    )
    assert told.panels[0].shape == (48, 48, 3) and len(told.panels) == 3
    assert told.manifest["sampler"]["kind"] == "ddim" and told.manifest["sampling"]["freeu"]


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_models_that_are_noised_in_another_way(copy, name):
    """Not even their settings read as another sampler's would fit."""
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": name}))
    with pytest.raises(WeightsError, match=f"is of {name}: a model of another kind"):
        read_pipeline(copy, "ddim")
