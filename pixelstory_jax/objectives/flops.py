"""Floating-point operations of PixelLM, counted from its sizes: a multiplication and an addition are two.

Norms, activations and softmax are left out; attention counts all pairs, causal or not (it is computed so).
Letters as in models/pixellm.py.
"""

from __future__ import annotations

from pixelstory_jax.models.pixellm import PixelLMConfig


def attention_block(tokens: int, width: int, key_width: int, mlp: int, mlp_matrices: int) -> float:
    """One transformer layer: projections, scores and weighted sums, MLP."""
    projections = 2 * width * width + 2 * width * key_width
    return 2 * tokens * (projections + mlp_matrices * width * mlp) + 4 * tokens**2 * width


def forward_flops(config: PixelLMConfig, questions: int, length: int, slots: int) -> dict[str, float]:
    """Operations of one image's forward pass, by part.

    Args:
      questions, length, slots: Q rows of T tokens with S target slots, padding included.
    """
    vision, llama, decoder = config.vision, config.llama, config.decoder
    patches, width = vision.grid**2, llama.width
    projector = vision.width * 2 * width + 2 * width * width
    tower = vision.layers * attention_block(patches + 1, vision.width, vision.width, vision.mlp_width, 2)
    key_width = llama.kv_heads * llama.head_width
    layers = llama.layers * attention_block(length, width, key_width, llama.mlp_width, 3)
    neck = width * decoder.width + 9 * decoder.width**2
    return {
        "vision": tower + 2 * patches * 3 * vision.patch_size**2 * vision.width,
        "mm_projector": 2 * config.image_tokens * projector,
        "out_mm_projector": 2 * config.scales * patches * projector,
        "neck": 2 * config.scales * patches * neck,
        "llama": questions * (layers + 2 * length * width * llama.vocab),
        "text_projector": 2 * slots * config.group * (width * width + width * decoder.width),
        "mask_decoder": sum(mask_scale_flops(config, scale, slots) for scale in range(config.scales)),
    }


def mask_scale_flops(config: PixelLMConfig, scale: int, slots: int) -> float:
    """One scale of the mask decoder for `slots` targets of an image; the few prompt tokens' own maps are left out."""
    decoder = config.decoder
    cells, width = (config.vision.grid * 2**scale) ** 2, decoder.width
    inner, tokens = width // decoder.cross_downsample, decoder.mask_tokens + 2
    # Per block: keys and values for the tokens, queries and outputs of the image; then one last look of the tokens.
    maps = (4 * decoder.depth + 2) * width * inner
    pairs = (2 * decoder.depth + 1) * 2 * tokens * inner
    upscaled = 4 * width * (width // 8) + 4 * (width // 8)
    shared = sum(2 * (config.vision.grid * 2**step) ** 2 * 4 * width**2 for step in range(scale))
    return slots * 2 * cells * (maps + pairs + upscaled) + shared
