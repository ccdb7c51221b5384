"""Every config file: its variants load, say what they are for, and build; the published sizes by their shapes only."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import as_config, parse_variant
from experiments.command_line import check_config, load_config
from pixelstory_jax.data import build_source
from pixelstory_jax.data.builtin.tiny_autoencoder import read_tiny_autoencoder
from pixelstory_jax.inference.noise_schedule import NoiseSchedule
from pixelstory_jax.interop.torch_layout import torch_shapes
from pixelstory_jax.interop.unet_table import unet_table
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig
from pixelstory_jax.models.sizes import sizes_from_config
from pixelstory_jax.models.story_diffusion import StoryDiffusionConfig
from pixelstory_jax.objectives import build_objective
from pixelstory_jax.objectives.build import check_builtin_start, check_frozen, check_length
from pixelstory_jax.objectives.storydiffusion import DiffusionLoss, StoryDiffusionObjective
from pixelstory_jax.training.options import TrainOptions

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")
ANSWERS = ("pixellm.py", "pixellm.py:tiny", "pretrain_tiny.py:tower", "pretrain_tiny.py:language")
PICTURES = ("storydiffusion.py", "storydiffusion.py:tiny", "autoencoder_tiny.py", "panel_classifier.py")
TINY = ANSWERS + PICTURES
LARGE = ("pixellm.py:7b", "pixellm.py:13b")
FINE_TUNED = ("storydiffusion.py:sd15", "storydiffusion.py:sdxl")
OBJECTIVES = {
    "pixellm": "pixellm",
    "pretrain_tiny": "pretraining",
    "storydiffusion": "storydiffusion",
    "autoencoder_tiny": "autoencoder",
    "panel_classifier": "panel_classifier",
}


def load(name: str) -> ConfigDict:
    return load_config(f"configs/{name}")[1]


def test_every_file_is_tested():
    assert set(FILES) == {name.split(":")[0] for name in TINY} == {f"{name}.py" for name in OBJECTIVES}


def test_no_config_touches_a_device():
    """Flags are read before a process joins the others, which JAX refuses once a device has been asked for."""
    code = f"""
import jax
from experiments.command_line import load_config
for name in {TINY + LARGE + FINE_TUNED}:
    load_config("configs/" + name)
    assert not jax._src.xla_bridge.backends_are_initialized(), name
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is_for_and_how_it_is_run(name):
    text = ast.get_docstring(ast.parse((ROOT / "configs" / name).read_text(encoding="utf-8"))) or ""
    assert f"python -m experiments.train --config=configs/{name}" in text
    assert text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", TINY + LARGE + FINE_TUNED)
def test_variants_load(name):
    config = load(name)
    assert config.name and config.objective == OBJECTIVES[name.split(".")[0]]
    options = TrainOptions.from_config(config.train.to_dict())
    assert options.steps > 0 and options.batch_size > 0


@pytest.mark.parametrize("name", ANSWERS + LARGE)
def test_what_is_trained_here_follows_the_paper(name):
    assert sizes_from_config(PixelLMConfig, load(name).model).mode == "paper"


@pytest.mark.parametrize("name", TINY)
def test_tiny_variants_build(name):
    """Data, tokenizer, starting weights and all shapes, without computing anything."""
    config = load(name)
    objective = build_objective(config)
    params = flatten(jax.eval_shape(objective.init, jax.random.key(0)))
    most = 13e6 if config.objective == "storydiffusion" else 8e6  # what two CPU cores train in minutes
    assert sum(np.prod(leaf.shape) for leaf in params.values()) < most
    assert all(leaf.dtype == np.float32 for leaf in params.values())
    start = getattr(objective, "starting_weights", dict)()
    assert {path: array.shape for path, array in start.items()}.items() <= {
        path: leaf.shape for path, leaf in params.items()
    }.items()
    loss, terms = jax.eval_shape(
        objective.loss,
        jax.eval_shape(objective.init, jax.random.key(0)),
        objective.batch_spec,
        jax.eval_shape(jax.random.key, 0),
    )
    assert loss.shape == () and loss.dtype == np.float32
    assert all(term.shape == () and term.dtype == np.float32 for term in terms.values())


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_needs_released_weights(name):
    """None are named at first; a folder without them is refused too."""
    config = load(name)
    with pytest.raises(ValueError) as error:
        build_objective(config)
    assert str(error.value) == (
        "config.init_from is empty; name the folder of a diffusers pipeline, as --config.init_from=sdxl-base."
    )
    config.init_from = "nowhere"
    with pytest.raises(ValueError, match="There is no file or folder nowhere"):
        build_objective(config)


def test_tiny_starts_from_the_shipped_weights():
    config = load("pixellm.py")
    assert config.init_from == "builtin"
    objective = build_objective(config)
    started = {path.split("/")[0] for path in objective.starting_weights()}
    assert {"vision", "mm_projector", "llama"} <= started
    assert not {"mask_decoder", "neck", "prompt_encoder", "text_projector"} & started
    assert "shipped tiny vision tower" in objective.describe()


@pytest.mark.parametrize(
    ("name", "language", "width"), [(LARGE[0], 6_738_489_344, 4096), (LARGE[1], None, 5120)], ids=["7b", "13b"]
)
def test_published_sizes_by_their_shapes(name, language, width):
    """7B: 32,009 ids, 6,738.5 million parameters of LLaMA; eight ranks of LoRA on the query and value projections."""
    config = load(name)
    sizes = sizes_from_config(PixelLMConfig, config.model)
    assert (sizes.group, sizes.image_tokens, sizes.vision.canvas, sizes.llama.width) == (6, 256, 448, width)
    length = config.data.length
    batch = {
        "image": jax.ShapeDtypeStruct((1, 448, 448, 3), np.uint8),
        "image_size": jax.ShapeDtypeStruct((1, 2), np.int32),
        "tokens": jax.ShapeDtypeStruct((1, 1, length), np.int32),
        "token_valid": jax.ShapeDtypeStruct((1, 1, length), bool),
        "target_positions": jax.ShapeDtypeStruct((1, 4, 6), np.int32),
    }
    params = jax.eval_shape(PixelLM(sizes).init, jax.random.key(0), batch)["params"]
    output = jax.eval_shape(PixelLM(sizes).apply, {"params": params}, batch)
    assert output.logits.shape == (1, 1, length, sizes.llama.vocab)
    assert output.mask_logits.shape == (1, 4, sizes.mask_side, sizes.mask_side)
    flat = flatten(params)
    llama = {path: leaf for path, leaf in flat.items() if path.startswith("llama/")}
    adapters = {path: leaf for path, leaf in llama.items() if "lora_" in path}
    assert sum(leaf.size for leaf in adapters.values()) == sizes.llama.layers * 2 * 2 * 8 * width
    if language is not None:
        assert sizes.llama.vocab == 32009
        assert sum(leaf.size for leaf in llama.values()) - sum(leaf.size for leaf in adapters.values()) == language


@pytest.mark.parametrize(
    ("name", "unet", "tensors"),
    [(FINE_TUNED[0], 859_520_964, 686), (FINE_TUNED[1], 2_567_463_684, 1680)],
    ids=["sd15", "sdxl"],
)
def test_released_networks_by_their_shapes(name, unet, tensors):
    """The published U-Nets and 16 ranks of LoRA on every attention map, and the loss of a batch of stories."""
    config = load(name)
    sizes = sizes_from_config(StoryDiffusionConfig, config.model)
    side, panels, length = config.data.size, config.data.panels, sizes.text.length
    tokens = {"text": "tokens", "text_2": "tokens_2"} if sizes.text_2 else {"text": "tokens"}
    spec = {field: jax.ShapeDtypeStruct((1, panels, length), np.int32) for field in tokens.values()}
    spec["images"] = jax.ShapeDtypeStruct((1, panels, side, side, 3), np.uint8)
    objective = StoryDiffusionObjective(
        sizes,
        NoiseSchedule(**config.schedule),
        DiffusionLoss(**config.loss),
        spec,
        {encoder: np.zeros(length, np.int32) for encoder in tokens},
        side,
        config.trained.text,
        config.trained.unet,
        evaluator=lambda params, step: pytest.fail("nothing is evaluated here"),
    )
    params = jax.eval_shape(objective.init, jax.random.key(0))
    flat = flatten(params)
    adapters = {path: leaf for path, leaf in flat.items() if path.endswith(("lora_a", "lora_b"))}
    assert {path for path in flat if objective.trainable(path)} == adapters.keys()
    assert all(16 in leaf.shape for leaf in adapters.values())
    published = {path: leaf for path, leaf in flat.items() if path.startswith("unet/") and path not in adapters}
    assert sum(leaf.size for leaf in published.values()) == unet
    assert len(torch_shapes(unet_table(sizes.unet), params["unet"])) == tensors
    loss, terms = jax.eval_shape(objective.loss, params, spec, jax.eval_shape(jax.random.key, 0))
    assert loss.shape == () and loss.dtype == np.float32 and set(terms) == {"error", "error_alone", "error_shared"}


def test_every_training_option_can_be_set():
    for name in ("pixellm.py", "pixellm.py:7b", "pretrain_tiny.py", *PICTURES, *FINE_TUNED):
        config = f"--config=configs/{name}"
        given = {"accumulate": "2", "ema": "0.9", "prefetch": "1", "warmup_steps": "0.05", "no_decay": "bias"}
        check_config(["train", config, *(f"--config.train.{field}={value}" for field, value in given.items())])
        assert {field.name for field in dataclasses.fields(TrainOptions)} == set(load(name).train)


def test_frozen_parts_do_not_start_at_random():
    with pytest.raises(ValueError, match="vision tower and the language model would stay frozen .*config.init_from"):
        check_frozen(load("pixellm.py:7b"), {})
    config = load("pixellm.py")
    with pytest.raises(ValueError, match=r"The vision tower would stay frozen .*config.trained.vision=True"):
        check_frozen(config, {"llama/head": np.zeros(1)})
    config.trained.vision = True
    check_frozen(config, {})
    config = load("pixellm.py:7b")
    config.allow_random_frozen = True
    check_frozen(config, {})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model.codebook_tokens", 2, r"model.codebook_tokens is 2, not 3"),
        ("model.llama.vocab", 1000, r"model.llama.vocab is 1000"),
        ("model.vision.canvas", 288, r"model.vision.canvas is 288, not 144"),
        ("data.tokenizer", "tokenizer.model", r"data.tokenizer is 'tokenizer.model'"),
    ],
)
def test_shipped_weights_are_refused_where_they_do_not_fit(field, value, words):
    config = load("pixellm.py")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=words):
        check_builtin_start(config, sizes_from_config(PixelLMConfig, config.model))
    config = load("pixellm.py")
    check_builtin_start(config, sizes_from_config(PixelLMConfig, config.model))


def test_rows_that_are_too_short_for_every_conversation_are_refused():
    config = load("pixellm.py")
    config.data.length = 40
    with pytest.raises(ValueError, match="data.length=40"):
        check_length(build_source(config, "train"), config.data)


def test_photos_option():
    assert load("pixellm.py:tiny,data=photos").data.name == "photos"
    config = load("pixellm.py:data=photos")  # the variant may be left out
    assert config.name == "pixellm-tiny"
    with pytest.raises(FileNotFoundError, match="tuxpaint-stamps-default"):
        build_objective(config)


def test_variants_and_options_that_do_not_exist():
    with pytest.raises(ValueError, match="Unknown variant '70b'; this config has tiny, 7b, 13b"):
        parse_variant("70b", ("tiny", "7b", "13b"), data="builtin")
    with pytest.raises(ValueError, match="Unknown option 'date' after the colon; this config has data"):
        parse_variant("tiny,date=photos", ("tiny",), data="builtin")
    assert parse_variant(None, ("tiny", "7b"), data="builtin") == ("tiny", {"data": "builtin"})


@pytest.mark.parametrize(
    "preset",
    [
        PixelLMConfig.tiny,
        PixelLMConfig.pixellm_7b,
        PixelLMConfig.pixellm_13b,
        StoryDiffusionConfig.tiny,
        StoryDiffusionConfig.sd15,
        StoryDiffusionConfig.sdxl,
    ],
)
def test_sizes_survive_the_way_through_a_config(preset):
    sizes = preset(lora_rank=4)
    assert sizes_from_config(type(sizes), as_config(sizes)) == sizes
    saved = json.loads(json.dumps(as_config(sizes).to_dict()))  # as a checkpoint keeps it: tuples become lists
    assert sizes_from_config(type(sizes), saved) == sizes


def test_stories_start_from_the_shipped_autoencoder():
    """With its sizes, latents' scale included; all else at random."""
    config = load("storydiffusion.py")
    sizes, _ = read_tiny_autoencoder()
    assert sizes_from_config(StoryDiffusionConfig, config.model).autoencoder == sizes
    assert sizes.scaling_factor != StoryDiffusionConfig.tiny().autoencoder.scaling_factor
    objective = build_objective(config)
    assert {path.split("/")[0] for path in objective.starting_weights()} == {"autoencoder"}
    assert {path.split("/")[0] for path in flatten(jax.eval_shape(objective.init, jax.random.key(0)))} == {
        "unet",
        "autoencoder",
        "text",
    }
    config.data.size = 102
    with pytest.raises(ValueError, match="Pictures of 102 x 102 pixels: sides must be multiples of 4"):
        build_objective(config)


@pytest.mark.parametrize("name", ["storydiffusion.py:tiny,data=wesnoth", "storydiffusion.py:data=wesnoth"])
def test_stories_about_characters_of_a_folder(name):
    config = load(name)
    assert (config.name, config.data.name) == ("storydiffusion-tiny", "wesnoth")
    with pytest.raises(FileNotFoundError, match="No folder of Wesnoth's characters was given"):
        build_objective(config)
    config.data.name = "pictures"
    with pytest.raises(ValueError, match="Unknown data 'pictures'; known are builtin, wesnoth, folder and cached."):
        build_objective(config)
