"""Single files in the original layout, against what diffusers' own conversion makes of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pixelstory_jax.data.clip_tokenizer import small_clip_tokenizer
from pixelstory_jax.inference.noise_schedule import NoiseSchedule
from pixelstory_jax.inference.schedulers import SamplerConfig
from pixelstory_jax.interop.autoencoder_table import autoencoder_settings, autoencoder_shapes, autoencoder_table
from pixelstory_jax.interop.clip_text_table import clip_text_settings
from pixelstory_jax.interop.diffusers_folder import PipelineFolder, read_pipeline
from pixelstory_jax.interop.ldm_file import ldm_kind, read_ldm
from pixelstory_jax.interop.ldm_tables import (
    OPEN_CLIP_TEXT,
    ldm_autoencoder_table,
    ldm_table,
    ldm_text_table,
    ldm_unet_table,
)
from pixelstory_jax.interop.safetensors_files import write_safetensors
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.interop.torch_layout import rows_by_path, torch_shapes
from pixelstory_jax.interop.unet_table import unet_table
from pixelstory_jax.models.autoencoder import AutoencoderConfig
from pixelstory_jax.models.clip_text import ClipTextConfig
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.models.unet import UNetConfig
from tests.golden_cases.unet import unet_shapes
from tests.models.test_unet import SHALLOW, SMALL_SD15, SMALL_SDXL, SMALLEST, unet_settings

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
TEXT_2 = dataclasses.replace(TEXT, width=12, layers=3, activation="gelu", projection=6)
AUTOENCODER = AutoencoderConfig(block_channels=(4, 8, 8), layers_per_block=1, groups=2)
CONFIGS = {
    "sd15": StoryDiffusionConfig(
        dataclasses.replace(SMALL_SD15, context_width=8, in_channels=4, out_channels=4, heads=(2, 2, 2)),
        AUTOENCODER,
        TEXT,
    ),
    "sdxl": StoryDiffusionConfig(
        dataclasses.replace(SMALL_SDXL, context_width=20, pooled_width=6), AUTOENCODER, TEXT, TEXT_2, text_layer=-2
    ),
}
EXTRA = {  # what files have beside their parameters
    "sd15": ("betas", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "model_ema.decay", "posterior_mean_coef1")
    + ("cond_stage_model.transformer.text_model.embeddings.position_ids", "model_ema.diffusion_modeltime_embed0weight"),
    "sdxl": ("denoiser.sigmas", "conditioner.embedders.1.model.logit_scale")
    + ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids",),
}


@functools.cache
def story_shapes(config: StoryDiffusionConfig) -> Any:
    return jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0))


@functools.cache
def random_file(kind: str) -> dict[str, np.ndarray]:
    """A checkpoint: every tensor that our table names, and what else files hold."""
    rng = np.random.default_rng(0)
    shapes = torch_shapes(ldm_table(CONFIGS[kind]), story_shapes(CONFIGS[kind]))
    tensors = {key: rng.standard_normal(shape).astype(np.float16) for key, shape in shapes.items()}
    return tensors | {key: np.ones(1, np.float32) for key in EXTRA[kind]}


def converted(kind: str, tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """What diffusers makes of it, by folder of a pipeline."""
    torch = pytest.importorskip("torch")
    from diffusers.loaders import single_file_utils as theirs

    config = CONFIGS[kind]
    file = {key: torch.from_numpy(value) for key, value in tensors.items()}
    states = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(file), unet_settings(config.unet)),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(file), autoencoder_settings(config.autoencoder)),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(dict(file)),
    }
    if config.text_2:
        states["text_encoder_2"] = theirs.convert_open_clip_checkpoint(
            None, dict(file), prefix="conditioner.embedders.1.model."
        )
    return {name: {key: value.numpy() for key, value in state.items()} for name, state in states.items()}


def write_settings(kind: str, folder: Path) -> Path:
    """A pipeline folder without weights."""
    config = CONFIGS[kind]
    tables = {
        "unet": unet_settings(config.unet) | {"sample_size": 6},
        "vae": autoencoder_settings(config.autoencoder),
        "text_encoder": clip_text_settings(config.text),
    }
    index: dict[str, Any] = {"text_encoder_2": [None, None]}
    TOKENIZER.save(folder / "tokenizer")
    if config.text_2:
        tables["text_encoder_2"] = clip_text_settings(config.text_2)
        TOKENIZER.save(folder / "tokenizer_2")
        index = {"text_encoder_2": ["transformers", "CLIPTextModel"], "force_zeros_for_empty_prompt": True}
    for name, table in tables.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(table))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SamplerConfig("euler").to_diffusers()))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module", params=list(CONFIGS))
def checkpoint(request, tmp_path_factory) -> tuple[str, PipelineFolder, Path]:
    """Kind, what is read of the single file, and the folder of settings."""
    root = tmp_path_factory.mktemp(request.param)
    write_safetensors(root / "model.safetensors", random_file(request.param))
    settings = write_settings(request.param, root / "settings")
    return request.param, read_ldm(root / "model.safetensors", settings), settings


def assert_same_parameters(read: PipelineFolder, expected: PipelineFolder) -> None:
    assert read.params.keys() == expected.params.keys()
    for path, value in expected.params.items():
        assert read.params[path].dtype == np.float16
        np.testing.assert_array_equal(np.asarray(read.params[path]), np.asarray(value), err_msg=path)


def test_a_file_is_what_diffusers_makes_of_it(checkpoint, tmp_path):
    """Tensor for tensor, through the folder of the converted pipeline; every name is one that diffusers knows."""
    pytest.importorskip("diffusers")
    kind, ours, settings = checkpoint
    folder = Path(shutil.copytree(settings, tmp_path / "converted"))
    for name, state in converted(kind, random_file(kind)).items():
        stem = "diffusion_pytorch_model" if name in ("unet", "vae") else "model"
        write_safetensors(folder / name / f"{stem}.safetensors", state)
    theirs = read_pipeline(folder)
    assert (ours.config, ours.sampler, ours.picture_size) == (CONFIGS[kind], SamplerConfig("euler"), 6 * 4)
    for field in ("config", "sampler", "picture_size", "zero_negative"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.tokenizers.keys() == theirs.tokenizers.keys()
    assert ours.params.keys() == flatten(story_shapes(ours.config)).keys()
    assert_same_parameters(ours, theirs)


UNETS = {
    "sdxl": UNetConfig.sdxl(),
    "sd15": UNetConfig.sd15(),
    "small": SMALL_SDXL,
    "shallow": SHALLOW,
    "smallest": SMALLEST,
    "gap": dataclasses.replace(SMALL_SD15, depths=(1, 0, 2), layers_per_block=3),
    "four": UNetConfig.sd15(channels=(8,) * 4, depths=(0, 1, 0, 1), heads=(2,) * 4, groups=4, layers_per_block=1),
}


@pytest.mark.parametrize("name", UNETS)
def test_numbers_of_the_unet_are_those_of_diffusers(name):
    """Attention on any level, any number of levels and of layers; diffusers moves the names, here, as values."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config, shapes = UNETS[name], unet_shapes(UNETS[name])
    keys = torch_shapes(ldm_unet_table(config), shapes)
    moved = convert_ldm_unet_checkpoint({f"model.diffusion_model.{key}": key for key in keys}, unet_settings(config))
    theirs, ours = (
        rows_by_path(unet_table(config), flatten(shapes)),
        rows_by_path(ldm_unet_table(config), flatten(shapes)),
    )
    for path, shape in flatten(shapes).items():
        for diffusers, ldm in zip(theirs[path].keys(shape.shape), ours[path].keys(shape.shape), strict=True):
            assert moved.pop(diffusers) == ldm
    assert not moved


@pytest.mark.parametrize(
    ("kind", "counts", "known"),
    [
        (
            "sd15",
            {"unet": 686, "autoencoder": 248, "text": 196},
            "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        ),
        (
            "sdxl",
            {"unet": 1680, "autoencoder": 248, "text": 196, "text_2": 389},
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
        ),
    ],
)
def test_tensors_of_the_published_files(kind, counts, known):
    """Each under a name of its own; diffusers tells the kinds by the two names that are `known`."""
    config = getattr(StoryDiffusionConfig, kind)()
    shapes = story_shapes(config)
    tables = {
        "unet": ldm_unet_table(config.unet),
        "autoencoder": ldm_autoencoder_table(config.autoencoder),
        "text": ldm_text_table(),
        "text_2": OPEN_CLIP_TEXT,
    }
    found = {name: torch_shapes(tables[name], tree) for name, tree in shapes.items()}
    assert {name: len(keys) for name, keys in found.items()} == counts
    keys = torch_shapes(ldm_table(config), shapes)
    assert len(keys) == sum(counts.values()) and known in keys
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sum(int(np.prod(shape)) for shape in keys.values()) == parameters
    if kind == "sdxl":
        assert keys["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
        assert keys["conditioner.embedders.1.model.text_projection"] == (1280, 1280)
    assert keys["first_stage_model.decoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_names_of_the_autoencoder_are_those_of_diffusers(levels):
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = AutoencoderConfig(block_channels=(4, 8, 12, 8)[:levels], layers_per_block=levels, groups=2)
    keys = torch_shapes(ldm_autoencoder_table(config), autoencoder_shapes(config))
    file = {f"first_stage_model.{key}": torch.empty(shape) for key, shape in keys.items()}
    theirs = convert_ldm_vae_checkpoint(file, autoencoder_settings(config))
    expected = torch_shapes(autoencoder_table(config), autoencoder_shapes(config))
    assert {key: tuple(value.shape) for key, value in theirs.items()} == expected


def test_text_names_without_their_prefix(checkpoint, tmp_path):
    """As files of some versions of transformers have them; a projection that is not used is passed over."""
    kind, expected, settings = checkpoint
    start = {"sd15": "cond_stage_model.", "sdxl": "conditioner.embedders.0."}[kind] + "transformer."
    bare = {key.replace(f"{start}text_model.", start): value for key, value in random_file(kind).items()}
    write_safetensors(tmp_path / "bare.safetensors", bare | {f"{start}text_projection.weight": np.ones((8, 8))})
    assert_same_parameters(read_ldm(tmp_path / "bare.safetensors", settings), expected)


def test_a_checkpoint_of_torch(checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    kind, expected, settings = checkpoint
    state = {key: torch.from_numpy(value) for key, value in random_file(kind).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "model.ckpt")
    assert_same_parameters(read_ldm(tmp_path / "model.ckpt", settings), expected)


def test_published_values_where_the_settings_say_nothing(checkpoint, tmp_path):
    """Without the scheduler, the index and the sizes of the U-Net."""
    kind, _, settings = checkpoint
    file = settings.parent / "model.safetensors"
    folder = Path(shutil.copytree(settings, tmp_path / "settings"))
    shutil.rmtree(folder / "scheduler")
    (folder / "model_index.json").unlink()
    (folder / "unet" / "config.json").write_text(json.dumps(unet_settings(CONFIGS[kind].unet)))
    read = read_ldm(file, folder)
    assert read.sampler == SamplerConfig() and read.zero_negative == (kind == "sdxl")
    assert read.picture_size == {"sd15": 512, "sdxl": 1024}[kind]
    shutil.rmtree(folder / "vae")
    with pytest.raises(WeightsError, match=r"mis-shaped: first_stage_model.encoder.conv_in.weight is \[4, 3, 3, 3\]"):
        read_ldm(file, folder)


def test_marks_of_the_training_are_heeded(checkpoint, tmp_path):
    kind, _, settings = checkpoint
    write_safetensors(tmp_path / "v.safetensors", random_file(kind) | {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)})
    schedule = NoiseSchedule(prediction="v_prediction", zero_terminal_snr=True)
    assert read_ldm(tmp_path / "v.safetensors", settings, "dpmpp_2m").sampler == SamplerConfig("dpmpp_2m", schedule)


def test_tensors_that_do_not_fit(checkpoint, tmp_path):
    kind, _, settings = checkpoint
    tensors = random_file(kind)
    del tensors["model.diffusion_model.out.2.bias"]
    tensors |= {"first_stage_model.quant_conv.bias": np.zeros(3), "first_stage_model.other": np.zeros(2)}
    write_safetensors(tmp_path / "damaged.safetensors", tensors)
    with pytest.raises(WeightsError) as caught:
        read_ldm(tmp_path / "damaged.safetensors", settings)
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("damaged.safetensors: These tensors do not fit:")
    assert lines == [
        "  missing: model.diffusion_model.out.2.bias [4]",
        "  mis-shaped: first_stage_model.quant_conv.bias is [3], expected [8]",
        "  unexpected: first_stage_model.other [2]",
    ]


def test_tokenizers_are_needed(checkpoint, tmp_path):
    kind, _, settings = checkpoint
    file = settings.parent / "model.safetensors"
    wanted = {"sd15": "Stable Diffusion 1.5 with tokenizer", "sdxl": "SDXL with tokenizer and tokenizer_2"}[kind]
    with pytest.raises(WeightsError, match=f"has no tokenizers; give a pipeline folder of {wanted} as settings"):
        read_ldm(file, None)
    folder = Path(shutil.copytree(settings, tmp_path / "settings"))
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(WeightsError, match=r"The settings .* have no folder tokenizer; .* needs tokenizer"):
        read_ldm(file, folder)


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
REFUSED = {
    "conditioner.embedders.0.model.ln_final.bias": "the refiner of SDXL .*; Stable Diffusion 1.5 and SDXL can be read",
    "cond_stage_model.model.ln_final.bias": "This file is Stable Diffusion 2 ",
    "edm_mean": "This file is Playground 2.5 ",
    "model.diffusion_model.joint_blocks.0.x": "This file is Stable Diffusion 3 ",
    "model.diffusion_model.double_blocks.0.x": "This file is FLUX ",
    "text_encoders.clip_l.x": "This file is a pipeline of another generation ",
    "unet.conv_in.weight": f"This file has no {CONV_IN}; a whole checkpoint of Stable Diffusion 1.5 and SDXL in the",
}


@pytest.mark.parametrize("key", REFUSED)
def test_other_models_are_refused(key):
    tensors = {key: np.zeros(1)} | ({} if key.startswith("unet") else {CONV_IN: np.zeros((4, 4, 3, 3))})
    with pytest.raises(WeightsError, match=REFUSED[key]):
        ldm_kind(tensors)


def test_other_tasks_and_parts_are_refused():
    for channels, words in ((9, r"takes 9 channels \(inpainting\); .* with 4 can be read"), (8, r"takes 8 channels;")):
        with pytest.raises(WeightsError, match=words):
            ldm_kind({CONV_IN: np.zeros((4, channels, 3, 3))})
    with pytest.raises(
        WeightsError, match=r"a U-Net but no text encoder: cond_stage_model.transformer.… or conditioner"
    ):
        ldm_kind({CONV_IN: np.zeros((4, 4, 3, 3))})
    assert ldm_kind({CONV_IN: np.zeros((4, 4, 3, 3)), "conditioner.embedders.1.model.ln_final.bias": np.zeros(1)}) == (
        "sdxl"
    )
