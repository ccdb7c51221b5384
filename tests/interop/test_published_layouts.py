"""Published sizes against transformers, which builds them on the meta device: names and shapes, no numbers."""

from __future__ import annotations

from math import prod

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pixelstory_jax.interop.clip_text_table import (  # noqa: E402
    CLIP_TEXT,
    clip_text_settings,
    clip_text_shapes,
)
from pixelstory_jax.interop.clip_vision_folder import clip_vision_settings, clip_vision_shapes  # noqa: E402
from pixelstory_jax.interop.llama_folder import llama_config, llama_settings, llama_shapes, llama_table  # noqa: E402
from pixelstory_jax.interop.llava_folder import llava_hf_settings, llava_hf_table, released_hf_names  # noqa: E402
from pixelstory_jax.interop.pixellm_folder import FLOAT32_PARTS, pixellm_shapes  # noqa: E402
from pixelstory_jax.interop.tables import CLIP_VISION, pixellm  # noqa: E402
from pixelstory_jax.interop.torch_layout import torch_shapes  # noqa: E402
from pixelstory_jax.models.clip_text import ClipTextConfig  # noqa: E402
from pixelstory_jax.models.clip_vision import ClipVisionConfig  # noqa: E402
from pixelstory_jax.models.llama import LlamaConfig  # noqa: E402
from pixelstory_jax.models.llava import Llava, LlavaConfig  # noqa: E402
from pixelstory_jax.models.pixellm import PixelLMConfig  # noqa: E402


def theirs(model, config):
    """Names and shapes of a network that takes no memory."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in model(config).state_dict().items()}


def bare(shapes, prefix):
    """Versions of transformers differ in whether CLIP's names have its prefix."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("size", "total"), [("llama_7b", 6_738_415_616), ("llama_13b", 13_015_864_320)])
def test_llama_2(size, total, tied):
    config = getattr(LlamaConfig, size)(vocab=32000, norm_eps=1e-5, max_length=4096)
    settings = llama_settings(config, tied)
    ours = torch_shapes(llama_table(tied), llama_shapes(config))
    expected = theirs(transformers.LlamaForCausalLM, transformers.LlamaConfig(**settings))
    if tied:
        assert expected.pop("lm_head.weight") == expected["model.embed_tokens.weight"]  # one tensor under two names
    assert ours == expected
    assert sum(map(prod, ours.values())) == total - tied * 32000 * config.width
    assert llama_config(settings, dtype="bfloat16", remat="full") == config


def test_clip_vision():
    config = ClipVisionConfig.clip_large_336()
    ours = torch_shapes(CLIP_VISION, clip_vision_shapes(config))
    settings = transformers.CLIPVisionConfig(**clip_vision_settings(config))
    assert bare(ours, "vision_model.") == bare(theirs(transformers.CLIPVisionModel, settings), "vision_model.")
    assert sum(map(prod, ours.values())) == 303_507_456


@pytest.mark.parametrize(
    ("config", "model", "total"),
    [
        (ClipTextConfig.clip_large(), "CLIPTextModel", 123_060_480),
        (ClipTextConfig.open_clip_bigg(), "CLIPTextModelWithProjection", 694_659_840),
    ],
)
def test_clip_text(config, model, total):
    ours = torch_shapes(CLIP_TEXT, clip_text_shapes(config))
    settings = transformers.CLIPTextConfig(**clip_text_settings(config))
    expected = theirs(getattr(transformers, model), settings)
    assert bare(ours, "text_model.") == bare(expected, "text_model.")
    assert sum(map(prod, ours.values())) == total


def test_llava():
    config = LlavaConfig(llama=LlamaConfig.llama_7b(vocab=32064, norm_eps=1e-5, max_length=4096))
    ours = torch_shapes(llava_hf_table(), Llava.shapes(config))
    settings = transformers.LlavaConfig(**llava_hf_settings(config))
    meta = theirs(transformers.LlavaForConditionalGeneration, settings)
    with torch.device("meta"):
        meta = {name: torch.empty(shape) for name, shape in meta.items()}
    assert ours == {name: tuple(value.shape) for name, value in released_hf_names(meta).items()}


def test_pixellm_7b_has_the_released_file_size():
    """Two shards of 9.98 and 3.78 GB: bfloat16, with the decoder's parts in float32."""
    shapes = torch_shapes(pixellm(), pixellm_shapes(PixelLMConfig.pixellm_7b(mode="faithful")))
    size = sum(prod(shape) * (4 if name.startswith(FLOAT32_PARTS) else 2) for name, shape in shapes.items())
    assert size / 1e9 == pytest.approx(13.753, abs=0.0005)
