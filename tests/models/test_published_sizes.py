"""Published sizes key for key, without a single array: the released checkpoint layout against ours."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import jax
import numpy as np
import pytest

from pixelstory_jax.interop.tables import CLIP_VISION, pixellm
from pixelstory_jax.interop.torch_layout import torch_shapes
from pixelstory_jax.interop.unet_table import unet_table
from pixelstory_jax.models.clip_vision import ClipVision, ClipVisionConfig
from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.models.unet import UNetConfig
from tests.golden_cases.unet import unet_shapes

CHECKPOINT = """
model.embed_tokens.weight [V,H]
lm_head.weight [V,H]
model.norm.weight [H]
model.layers.{LAYERS}.self_attn.{q,k,v,o}_proj.weight [H,H]
model.layers.{LAYERS}.mlp.{gate,up}_proj.weight [M,H]
model.layers.{LAYERS}.mlp.down_proj.weight [H,M]
model.layers.{LAYERS}.{input,post_attention}_layernorm.weight [H]
model.{mm_projector,out_mm_projector}.0.weight [2H,1024]
model.{mm_projector,out_mm_projector}.0.bias [2H]
model.{mm_projector,out_mm_projector}.2.weight [H,2H]
model.{mm_projector,out_mm_projector}.2.bias [H]
model.text_hidden_fcs.0.0.weight [H,H]
model.text_hidden_fcs.0.0.bias [H]
model.text_hidden_fcs.0.2.weight [256,H]
model.text_hidden_fcs.0.2.bias [256]
model.image_feature_neck.0.weight [256,H,1,1]
model.image_feature_neck.{1,3}.{weight,bias} [256]
model.image_feature_neck.2.weight [256,256,3,3]
model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix [2,128]
model.prompt_encoder.point_embeddings.{0,1,2,3}.weight [1,256]
model.prompt_encoder.{not_a_point_embed,no_mask_embed}.weight [1,256]
model.prompt_encoder.mask_downscaling.0.weight [4,1,2,2]
model.prompt_encoder.mask_downscaling.0.bias [4]
model.prompt_encoder.mask_downscaling.1.{weight,bias} [4]
model.prompt_encoder.mask_downscaling.3.weight [16,4,2,2]
model.prompt_encoder.mask_downscaling.3.bias [16]
model.prompt_encoder.mask_downscaling.4.{weight,bias} [16]
model.prompt_encoder.mask_downscaling.6.weight [256,16,1,1]
model.prompt_encoder.mask_downscaling.6.bias [256]
TWO_WAY.layers.{0,1}.self_attn.{q,k,v,out}_proj.weight [256,256]
TWO_WAY.layers.{0,1}.self_attn.{q,k,v,out}_proj.bias [256]
TWO_WAY.layers.{0,1}.{cross_attn_token_to_image,cross_attn_image_to_token}.{q,k,v}_proj.weight [128,256]
TWO_WAY.layers.{0,1}.{cross_attn_token_to_image,cross_attn_image_to_token}.{q,k,v}_proj.bias [128]
TWO_WAY.layers.{0,1}.{cross_attn_token_to_image,cross_attn_image_to_token}.out_proj.weight [256,128]
TWO_WAY.layers.{0,1}.{cross_attn_token_to_image,cross_attn_image_to_token}.out_proj.bias [256]
TWO_WAY.layers.{0,1}.mlp.lin1.weight [2048,256]
TWO_WAY.layers.{0,1}.mlp.lin1.bias [2048]
TWO_WAY.layers.{0,1}.mlp.lin2.weight [256,2048]
TWO_WAY.layers.{0,1}.mlp.lin2.bias [256]
TWO_WAY.layers.{0,1}.{norm1,norm2,norm3,norm4}.{weight,bias} [256]
TWO_WAY.final_attn_token_to_image.{q,k,v}_proj.weight [128,256]
TWO_WAY.final_attn_token_to_image.{q,k,v}_proj.bias [128]
TWO_WAY.final_attn_token_to_image.out_proj.weight [256,128]
TWO_WAY.final_attn_token_to_image.out_proj.bias [256]
TWO_WAY.norm_final_attn.{weight,bias} [256]
model.mask_decoder.iou_token.weight [1,256]
model.mask_decoder.mask_tokens.weight [4,256]
model.mask_decoder.level_embed.weight [2,256]
model.mask_decoder.output_upscaling.0.weight [256,32,2,2]
model.mask_decoder.output_upscaling.0.bias [32]
model.mask_decoder.output_upscaling.1.{weight,bias} [32]
model.mask_decoder.upsample_2x.0.weight [256,256,2,2]
model.mask_decoder.upsample_2x.0.bias [256]
model.mask_decoder.upsample_2x.1.{weight,bias} [256]
model.mask_decoder.pe1.positional_encoding_gaussian_matrix [2,128]
model.mask_decoder.output_hypernetworks_mlps.{0,1,2,3}.layers.{0,1}.weight [256,256]
model.mask_decoder.output_hypernetworks_mlps.{0,1,2,3}.layers.{0,1}.bias [256]
model.mask_decoder.output_hypernetworks_mlps.{0,1,2,3}.layers.2.weight [32,256]
model.mask_decoder.output_hypernetworks_mlps.{0,1,2,3}.layers.2.bias [32]
model.mask_decoder.iou_prediction_head.layers.{0,1}.weight [256,256]
model.mask_decoder.iou_prediction_head.layers.{0,1}.bias [256]
model.mask_decoder.iou_prediction_head.layers.2.weight [4,256]
model.mask_decoder.iou_prediction_head.layers.2.bias [4]
""".replace("TWO_WAY", "model.mask_decoder.transformer.{0,1}")
CLIP_CHECKPOINT = """
vision_model.embeddings.class_embedding [1024]
vision_model.embeddings.patch_embedding.weight [1024,3,14,14]
vision_model.embeddings.position_embedding.weight [577,1024]
vision_model.{pre_layrnorm,post_layernorm}.{weight,bias} [1024]
vision_model.encoder.layers.{LAYERS}.{layer_norm1,layer_norm2}.{weight,bias} [1024]
vision_model.encoder.layers.{LAYERS}.self_attn.{q,k,v,out}_proj.weight [1024,1024]
vision_model.encoder.layers.{LAYERS}.self_attn.{q,k,v,out}_proj.bias [1024]
vision_model.encoder.layers.{LAYERS}.mlp.fc1.weight [4096,1024]
vision_model.encoder.layers.{LAYERS}.mlp.fc1.bias [4096]
vision_model.encoder.layers.{LAYERS}.mlp.fc2.weight [1024,4096]
vision_model.encoder.layers.{LAYERS}.mlp.fc2.bias [1024]
"""


def braces(name: str) -> list[str]:
    """Shell-like expansion of {a,b}."""
    match = re.search(r"\{([^}]*)\}", name)
    if match is None:
        return [name]
    return [
        expanded
        for choice in match.group(1).split(",")
        for expanded in braces(name[: match.start()] + choice + name[match.end() :])
    ]


def listed(text: str, layers: int, **sizes: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for line in text.strip().splitlines():
        name, shape = line.split()
        numbers = ",".join(map(str, range(layers)))
        sides = tuple(sizes[side] if side in sizes else int(side) for side in shape.strip("[]").split(","))
        shapes.update(dict.fromkeys(braces(name.replace("{LAYERS}", f"{{{numbers}}}")), sides))
    return shapes


def parameter_shapes(config: PixelLMConfig):
    canvas = config.vision.canvas
    batch = {
        "image": jax.ShapeDtypeStruct((1, canvas, canvas, 3), np.uint8),
        "image_size": jax.ShapeDtypeStruct((1, 2), np.int32),
        "tokens": jax.ShapeDtypeStruct((1, 1, 300), np.int32),
        "token_valid": jax.ShapeDtypeStruct((1, 1, 300), bool),
        "target_positions": jax.ShapeDtypeStruct((1, 1, config.group), np.int32),
    }
    return jax.eval_shape(PixelLM(config).init, jax.random.key(0), batch)["params"]


PUBLISHED = {
    "7b": (PixelLMConfig.pixellm_7b, 32, {"V": 32009, "H": 4096, "2H": 8192, "M": 11008}, 6_849_448_240, 6738.5),
    "13b": (PixelLMConfig.pixellm_13b, 40, {"V": 32008, "H": 5120, "2H": 10240, "M": 13824}, 13_178_816_816, 13015.9),
}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("mode", ["faithful", "paper"])
def test_pixellm(size, mode):
    preset, layers, sizes, total, llama_millions = PUBLISHED[size]
    shapes = parameter_shapes(preset(mode=mode))
    expected = listed(CHECKPOINT, layers, **sizes)
    assert torch_shapes(pixellm(), shapes) == expected
    assert sum(map(prod, expected.values())) == total
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["llama"])) / 1e6 == pytest.approx(llama_millions, abs=0.05)
    ours = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    vision, fusion = ours.pop("vision"), ours.pop("token_weights", 0) + ours.pop("scale_weights", 0)
    assert sum(ours.values()) == total
    assert fusion == (8 if mode == "paper" else 0)
    # CLIP-L/14-336 has 303.5 M; the 24th layer and the last norm are not needed, and the grid is 32 x 32.
    assert vision == 303_507_456 - 12_596_224 - 2048 + (1025 - 577) * 1024


def test_the_two_generations_of_llama():
    """PixelLM-7B is made of LLaMA, PixelLM-13B of Llama 2, with another eps and twice the context."""
    small, large = PixelLMConfig.pixellm_7b().llama, PixelLMConfig.pixellm_13b().llama
    assert (small.norm_eps, small.max_length, small.rope_theta) == (1e-6, 2048, 1e4)
    assert (large.norm_eps, large.max_length, large.rope_theta) == (1e-5, 4096, 1e4)


def test_lora_of_the_paper():
    """Rank 8 on query and value: 64 pairs of 2 x 8 x 4096."""
    plain, lora = (parameter_shapes(PixelLMConfig.pixellm_7b(lora_rank=rank)) for rank in (0, 8))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (plain, lora)]
    assert sizes[1] - sizes[0] == 64 * 2 * 8 * 4096
    assert torch_shapes(pixellm(), lora) == torch_shapes(pixellm(), plain)


def test_clip():
    model = ClipVision(ClipVisionConfig.clip_large_336())
    pixels = jax.ShapeDtypeStruct((1, 336, 336, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, None, (24,)), pixels)["params"]
    expected = listed(CLIP_CHECKPOINT, 24)
    assert torch_shapes(CLIP_VISION, shapes) == expected
    assert sum(map(prod, expected.values())) == 303_507_456


UNETS = {  # what diffusers needs to build the released networks; parameters and tensors of their files
    "sdxl": (
        UNetConfig.sdxl(),
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
        1680,
    ),
    "sd15": (UNetConfig.sd15(), {"attention_head_dim": 8, "cross_attention_dim": 768}, 859_520_964, 686),
}


@pytest.mark.parametrize("size", UNETS)
def test_unet(size):
    """Every tensor by name and shape, as diffusers builds the network."""
    config, settings, total, tensors = UNETS[size]
    shapes = torch_shapes(unet_table(config), unet_shapes(config))
    assert len(shapes) == tensors
    assert sum(map(prod, shapes.values())) == total
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    with torch.device("meta"):  # shapes without memory
        theirs = diffusers.UNet2DConditionModel(**settings).state_dict()
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


PARTS = {
    "sdxl": {"unet": 2_567_463_684, "autoencoder": 83_653_863, "text": 123_060_480, "text_2": 694_659_840},
    "sd15": {"unet": 859_520_964, "autoencoder": 83_653_863, "text": 123_060_480},
}


@pytest.mark.parametrize("size", PARTS)
def test_story_diffusion(size):
    config = getattr(StoryDiffusionConfig, size)()
    shapes: dict[str, Any] = jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0))
    assert {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()} == PARTS[size]
