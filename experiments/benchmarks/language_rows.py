"""Rows of attention, of the parts of PixelLM, and of a whole answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks.row import Row, Side
from pixelstory_jax.models.clip_vision import ClipVisionConfig
from pixelstory_jax.models.llama import LlamaConfig
from pixelstory_jax.models.pixel_decoder import PixelDecoderConfig
from pixelstory_jax.models.pixellm import IMAGE_TOKEN, PixelLMConfig

TRANSFORMERS = ("experiments.benchmarks.torch_pixellm",)
ANSWER_TOKENS = 33  # three words, then three times six tokens of a target with four words between
CYCLE = 10  # six tokens of a target and four words
TARGETS = 3


def language_rows(quick: bool) -> list[Row]:
    """All rows of this file; `quick` makes everything small."""
    return [*attention_rows(quick), *clip_rows(quick), *llama_rows(quick), decoder_row(quick), *answer_rows(quick)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """float32 standard normal numbers, the same in every process."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# Attention


def attention_rows(quick: bool) -> list[Row]:
    return [attention_row(tokens, width, quick) for width in (64, 40, 128) for tokens in (1024, 4096)]


def attention_row(tokens: int, width: int, quick: bool) -> Row:
    batch, heads = 2, 8

    def inputs() -> list[np.ndarray]:
        length = tokens // 32 if quick else tokens
        return [normal(batch, length, heads, width, seed=number) for number in range(3)]

    def ours() -> Side:
        import jax.numpy as jnp

        from experiments.benchmarks.work import our_side
        from pixelstory_jax.models.attention import attend

        return our_side(attend, *map(jnp.asarray, inputs()))

    def torch() -> Side:
        from torch import tensor
        from torch.nn.functional import scaled_dot_product_attention

        query, key, value = (tensor(x).transpose(1, 2).contiguous() for x in inputs())
        return inference(lambda: scaled_dot_product_attention(query, key, value).transpose(1, 2))

    return Row(f"attention, {tokens} tokens, heads of {width}", ours, torch, target=1.0, seconds=8)


def inference(run: Callable[[], Any]) -> Side:
    """A side of PyTorch that needs no gradients."""
    import torch

    return Side(torch.inference_mode()(run))


# CLIP


def clip_rows(quick: bool) -> list[Row]:
    config = ClipVisionConfig()
    if quick:
        config = ClipVisionConfig(canvas=56, width=64, layers=3, heads=2, mlp_width=128)
    return [clip_row(config, dtype) for dtype in ("float32", "bfloat16")]


def clip_row(config: ClipVisionConfig, dtype: str) -> Row:
    config, wanted = dataclasses.replace(config, dtype=dtype), (config.layers, config.layers - 1)
    shape = (1, config.canvas, config.canvas, 3)

    def ours() -> Side:
        import jax.numpy as jnp

        from experiments.benchmarks.random_weights import our_params
        from experiments.benchmarks.work import our_side
        from pixelstory_jax.interop.clip_vision_folder import clip_vision_shapes
        from pixelstory_jax.interop.tables import CLIP_VISION
        from pixelstory_jax.models.clip_vision import ClipVision

        params = our_params(CLIP_VISION, clip_vision_shapes(config), dtype)

        def states(params: Any, pixels: Any) -> Any:
            return ClipVision(config).apply({"params": params}, pixels, None, wanted)

        return our_side(states, params, jnp.asarray(normal(*shape), dtype), outputs=lambda states: states[:, :, 1:])

    def torch() -> Side:
        import torch

        from experiments.benchmarks.random_weights import fill_module
        from experiments.benchmarks.torch_pixellm import clip_states, clip_vision

        kind = getattr(torch, dtype)
        tower = fill_module(clip_vision(config), prefix="vision_model.").to(kind)
        pixels = torch.tensor(normal(*shape)).permute(0, 3, 1, 2).contiguous().to(kind)
        return inference(lambda: torch.stack(clip_states(tower, pixels, wanted)))

    name = f"CLIP-L tower, 448 px{suffix(dtype)}"
    return Row(name, ours, torch, **wanted_of(dtype), libraries=TRANSFORMERS, seconds=60)


def suffix(dtype: str) -> str:
    return "" if dtype == "float32" else ", bf16"


def wanted_of(dtype: str) -> dict[str, Any]:
    """Targets and tolerance of a row in this dtype: bfloat16 has 8 bits, and rounds after every layer."""
    if dtype == "float32":
        return {"dtype": dtype, "target": 0.9, "share": 0.75}
    return {"dtype": dtype, "target": 1.5, "tolerance": 0.05}


# LLaMA


def llama_rows(quick: bool) -> list[Row]:
    config, prompt, new = LlamaConfig(width=1024, layers=8, heads=16, kv_heads=16, mlp_width=2816), 256, 64
    if quick:
        config, prompt, new = LlamaConfig(vocab=96, width=64, layers=2, heads=2, kv_heads=2, mlp_width=96), 16, 4
    cases = [(dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 8)]
    return [
        *(prefill_row(dataclasses.replace(config, dtype=dtype), batch, prompt) for dtype, batch in cases),
        *(continuation_row(dataclasses.replace(config, dtype=dtype), batch, prompt, new) for dtype, batch in cases),
    ]


def prompt_tokens(config: LlamaConfig, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, config.vocab, (batch, length)).astype(np.int32)


def our_llama(config: LlamaConfig, draw: Any) -> Any:
    from experiments.benchmarks.random_weights import our_params
    from pixelstory_jax.interop.llama_folder import llama_shapes
    from pixelstory_jax.interop.tables import LLAMA

    return our_params(LLAMA, llama_shapes(config), config.dtype, draw)


def torch_llama(config: LlamaConfig, draw: Any) -> Any:
    import torch

    from experiments.benchmarks.random_weights import fill_module
    from experiments.benchmarks.torch_pixellm import llama

    return fill_module(llama(config), draw).to(getattr(torch, config.dtype))


def prefill_row(config: LlamaConfig, batch: int, length: int) -> Row:
    """The prompt through the layers into the cache, and the logits of its last token."""
    tokens = prompt_tokens(config, batch, length)

    def ours() -> Side:
        import jax.numpy as jnp

        from experiments.benchmarks.random_weights import draw_tensor
        from experiments.benchmarks.work import our_side
        from pixelstory_jax.models.llama import Llama, empty_cache

        def prefill(params: Any, tokens: Any) -> Any:
            def call(method: Any, *arguments: Any) -> Any:
                return Llama(config).apply({"params": params}, *arguments, method=method)

            cache = empty_cache(config, batch, length)
            states, cache = call(Llama.__call__, call(Llama.embed, tokens), tokens >= 0, None, cache, 0)
            return call(Llama.logits, states[:, -1]), cache

        params = our_llama(config, draw_tensor)
        return our_side(prefill, params, jnp.asarray(tokens), outputs=lambda result: result[0])

    def torch() -> Side:
        import torch

        from experiments.benchmarks.random_weights import draw_tensor

        model, ids = torch_llama(config, draw_tensor), torch.tensor(tokens, dtype=torch.long)
        return inference(lambda: model(ids, use_cache=True, logits_to_keep=1).logits[:, 0])

    name = f"LLaMA prefill of 256, batch {batch}{suffix(config.dtype)}"
    return Row(name, ours, torch, **wanted_of(config.dtype), libraries=TRANSFORMERS, seconds=20)


def continuation_row(config: LlamaConfig, batch: int, length: int, new: int) -> Row:
    """Greedy tokens after a prompt, prefill included. In bfloat16 the tokens are such that rounding cannot change."""
    tokens = prompt_tokens(config, batch, length)

    def draw() -> Any:
        from experiments.benchmarks.random_weights import chained, draw_tensor

        if config.dtype == "float32":
            return draw_tensor
        order = np.random.default_rng(1).permutation(config.vocab)
        successor = np.empty_like(order)
        successor[order] = np.roll(order, -1)
        return chained("model.embed_tokens.weight", "lm_head.weight", successor)

    def ours() -> Side:
        from experiments.benchmarks.work import generation_stages
        from pixelstory_jax.inference.continuation import continue_tokens

        params, valid = our_llama(config, draw()), np.ones(tokens.shape, bool)
        return Side(
            run=lambda: continue_tokens(config, params, tokens, valid, new, ()).tokens.block_until_ready(),
            stages=lambda: generation_stages(config, params, batch, length, new),
        )

    def torch() -> Side:
        import torch

        from experiments.benchmarks.torch_pixellm import continue_greedily

        model, ids = torch_llama(config, draw()), torch.tensor(tokens, dtype=torch.long)
        return inference(lambda: continue_greedily(model, model.model.embed_tokens(ids), new)[0])

    name = f"LLaMA 64 new tokens, batch {batch}{suffix(config.dtype)}"
    return Row(name, ours, torch, **wanted_of(config.dtype), libraries=TRANSFORMERS, seconds=30)


# The pixel decoder


def decoder_row(quick: bool) -> Row:
    """Neck and masks of three targets, from features of width 1024."""
    config, grid, width = PixelDecoderConfig(), 32, 1024
    if quick:
        config, grid, width = PixelDecoderConfig(width=32, heads=2, mlp_width=64, iou_width=32), 8, 48
    shapes = {"features": (1, config.scales, grid, grid, width), "prompts": (1, TARGETS, config.scales, config.width)}
    side, weights = 4 * grid, np.full(config.scales, 1 / config.scales, np.float32)

    def ours() -> Side:
        import jax
        import jax.numpy as jnp

        from experiments.benchmarks.random_weights import our_params
        from experiments.benchmarks.work import our_side
        from pixelstory_jax.interop.tables import pixel_decoder
        from pixelstory_jax.models.pixel_decoder import MaskDecoder, Neck, PromptEncoder, fuse_scales

        features, prompts = (jnp.asarray(normal(*shape)) for shape in shapes.values())

        def apply(module: Any, params: Any, *inputs: Any) -> Any:
            return module.apply({"params": params}, *inputs)

        def init(rng: Any) -> Any:
            prompt_encoder = PromptEncoder(config).init(rng, grid)["params"]
            shape = (1, config.scales, grid, grid, config.width)
            dense, code = apply(PromptEncoder(config), prompt_encoder, grid)
            decoder = MaskDecoder(config).init(rng, jnp.zeros(shape), prompts, dense, code)
            neck = Neck(config).init(rng, features)
            return {"prompt_encoder": prompt_encoder, "mask_decoder": decoder["params"], "neck": neck["params"]}

        def masks(params: Any, features: Any, prompts: Any) -> Any:
            necked = apply(Neck(config), params["neck"], features)
            dense, code = PromptEncoder(config).apply({"params": params["prompt_encoder"]}, grid)  # type: ignore[misc]
            scales = apply(MaskDecoder(config), params["mask_decoder"], necked, prompts, dense, code)
            return fuse_scales([scale.masks[:, :, 0] for scale in scales], jnp.asarray(weights), side)[0]

        table = pixel_decoder(config.scales, config.depth)
        return our_side(masks, our_params(table, jax.eval_shape(init, jax.random.key(0))), features, prompts)

    def torch() -> Side:
        from torch import tensor

        from experiments.benchmarks.random_weights import fill_module
        from experiments.benchmarks.torch_pixellm import PixelDecoder

        decoder = fill_module(PixelDecoder(config, width))
        features, prompts = (tensor(normal(*shape)[0]) for shape in shapes.values())
        features, shares = features.permute(0, 3, 1, 2).contiguous(), tensor(weights)
        return inference(lambda: decoder.masks(decoder.image_feature_neck(features), prompts, side, shares))

    return Row("pixel decoder, 3 targets", ours, torch, **wanted_of("float32"), libraries=TRANSFORMERS, seconds=12)


# A whole answer


def middle_pixellm(quick: bool) -> PixelLMConfig:
    """A PixelLM of 145 million parameters, between the tiny one and the published ones."""
    if quick:
        return PixelLMConfig(
            vision=ClipVisionConfig(canvas=56, width=48, layers=3, heads=2, mlp_width=96),
            llama=LlamaConfig(vocab=64, width=64, layers=2, heads=2, kv_heads=2, mlp_width=96),
            decoder=PixelDecoderConfig(width=32, heads=2, mlp_width=64, iou_width=32),
            feature_layers=(3, 1),
            image_tokens_side=2,
        )
    return PixelLMConfig(
        vision=ClipVisionConfig(canvas=336, width=512, layers=8, heads=8, mlp_width=2048),
        llama=LlamaConfig(vocab=32000, width=768, layers=8, heads=12, kv_heads=12, mlp_width=2048),
        decoder=PixelDecoderConfig(),
        feature_layers=(8, 5),
        image_tokens_side=12,
    )


def answer_rows(quick: bool) -> list[Row]:
    return [
        answer_row(quick, "answer_without_cache", "PixelLM answer, PyTorch as released (no cache)", 5.0, 90),
        answer_row(quick, "answer_with_cache", "PixelLM answer, PyTorch with cache", 1.2, 25),
    ]


def successors(config: PixelLMConfig) -> np.ndarray:
    """Which token follows which: the last `CYCLE` ids go round, of which the first are a target's tokens."""
    order = np.arange(config.llama.vocab)
    start = config.llama.vocab - CYCLE
    return np.where(order < start, (order + 1) % start, start + (order - start + 1) % CYCLE)


def answer_row(quick: bool, method: str, name: str, target: float, seconds: float) -> Row:
    """From pixels and a question to words and the masks of three targets."""
    config = middle_pixellm(quick)
    vocab, group, side = config.llama.vocab, config.group, config.vision.canvas

    def canvas() -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)

    # The prompt ends with the first of the four words that stand between targets.
    tokens = np.array([[1, *[IMAGE_TOKEN] * config.image_tokens, *range(5, 21), vocab - CYCLE + group]], np.int32)
    groups = np.arange(TARGETS)[:, None] * CYCLE + 3 + np.arange(group)  # [K, G] positions in the answer

    def draw() -> Any:
        from experiments.benchmarks.random_weights import chained

        return chained("model.embed_tokens.weight", "lm_head.weight", successors(config))

    def ours() -> Side:
        from experiments.benchmarks.our_answer import our_answer

        return our_answer(config, draw(), canvas(), tokens, groups, ANSWER_TOKENS)

    def torch() -> Side:
        import torch

        from experiments.benchmarks.random_weights import fill_module
        from experiments.benchmarks.torch_pixellm import TorchPixelLM

        model = fill_module(TorchPixelLM(config), draw(), kept=("token_weights", "scale_weights"))
        picture, ids, chosen = torch.tensor(canvas()), torch.tensor(tokens, dtype=torch.long), torch.tensor(groups)

        def answer() -> Any:
            pixels = model.normalised(picture)
            written, states, necked = getattr(model, method)(pixels, ids, ANSWER_TOKENS)
            return written, model.masks(necked[0], states[0, chosen])

        return inference(answer)

    return Row(name, ours, torch, target=target, libraries=TRANSFORMERS, seconds=seconds)
