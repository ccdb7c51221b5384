"""How many operations one answer takes, by part, for the published sizes of PixelLM and LISA.

Counted are the multiply-adds (MACs) of matrix products and convolutions, as papers and their tools count "FLOPs"; an
addition and a multiplication counted apart would be twice as many. Attention counts all pairs of a query and a key.
Sizes: PixelLM and LISA as released, SAM ViT-H (arXiv 2304.02643). For PixelLM the formulas agree exactly with what is
traced of our own network (tests/evaluation/test_answer_flops.py).

T  tokens of the language model: 256 of the picture, and those of question and answer, in one pass as in training
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pixelstory_jax.models.clip_vision import ClipVisionConfig
from pixelstory_jax.models.llama import LlamaConfig
from pixelstory_jax.models.pixel_decoder import PixelDecoderConfig
from pixelstory_jax.models.pixellm import PixelLMConfig

CLAIMS = {"PixelLM-7B": 3.57e12, "LISA-7B": 7.16e12, "PixelLM-13B": 6.65e12, "LISA-13B": 10.24e12}
"""What the PixelLM paper's tables say (TFLOPs)."""

MODELS = tuple(CLAIMS)
TOKENS = (320, 400, 512)
SAM_WIDTH, SAM_LAYERS, SAM_GLOBAL_LAYERS, SAM_GRID, SAM_WINDOW = 1280, 32, 4, 64, 14


def vision_macs(config: ClipVisionConfig) -> int:
    """The CLIP tower: patches, then its layers on all patches and the class token."""
    patches, width = config.grid**2, config.width
    tokens = patches + 1
    layer = tokens * (4 * width**2 + 2 * width * config.mlp_width) + 2 * tokens**2 * width
    return patches * 3 * config.patch_size**2 * width + config.layers * layer


def projector_macs(tokens: int, source: int, hidden: int, target: int) -> int:
    """Two linear maps."""
    return tokens * (source * hidden + hidden * target)


def language_macs(config: LlamaConfig, tokens: int, past: int = 0) -> int:
    """The layers of the language model on new tokens, `past` ones being in its cache; the head is apart."""
    per_token = 2 * config.width**2 + 2 * config.width * config.kv_heads * config.head_width
    per_token += 3 * config.width * config.mlp_width
    return config.layers * (tokens * per_token + 2 * tokens * (past + tokens) * config.width)


def head_macs(config: LlamaConfig, tokens: int) -> int:
    return tokens * config.width * config.vocab


def neck_macs(scales: int, grid: int, source: int, width: int) -> int:
    """A convolution of one pixel and one of 3 x 3, whose padding counts for nothing."""
    return scales * (grid**2 * source * width + (3 * grid - 2) ** 2 * width**2)


def two_way_macs(config: PixelDecoderConfig, cells: int, tokens: int) -> int:
    """SAM's two-way transformer between the tokens of a target and the cells of the picture."""
    width, inner = config.width, config.width // config.cross_downsample
    attend = 2 * tokens * cells * inner + 2 * (tokens + cells) * width * inner  # in either direction
    own = tokens * 4 * width**2 + 2 * tokens**2 * width
    return config.depth * (own + 2 * attend + 2 * tokens * width * config.mlp_width) + attend


def heads_macs(config: PixelDecoderConfig, cells: int) -> int:
    """Hypernetworks of all mask tokens, their masks on `cells` cells, and the quality head."""
    width = config.width
    hypernetworks = config.mask_tokens * (2 * width**2 + width * width // 8)
    quality = width * config.iou_width + config.iou_width**2 + config.iou_width * config.mask_tokens
    return hypernetworks + quality + config.mask_tokens * cells * width // 8


def decoder_macs(config: PixelDecoderConfig, grid: int) -> int:
    """PixelLM's pixel decoder for one target, position codes included; the features of finer scales are its own."""
    total = 0
    for scale in range(config.scales):
        cells, width = (grid * 2**scale) ** 2, config.width
        total += two_way_macs(config, cells, config.mask_tokens + 2) + cells * width * 4 * width // 8
        total += heads_macs(config, 4 * cells) + cells * width
        for step in range(scale):
            total += (grid * 2**step) ** 2 * width * 4 * width
    return total


def sam_encoder_macs(all_global: bool = False) -> int:
    """SAM ViT-H on 1024 x 1024 pixels: windows of 14 x 14, padded to 70 x 70, but for four layers.

    Args:
      all_global: counts the attention of every layer over all cells, as if there were no windows.
    """
    width, cells, window = SAM_WIDTH, SAM_GRID**2, SAM_WINDOW**2
    windows = (-(-SAM_GRID // SAM_WINDOW)) ** 2
    mlp = 8 * cells * width**2
    whole = mlp + 4 * cells * width**2 + 2 * cells**2 * width + 2 * cells * SAM_GRID * width
    windowed = mlp + windows * (4 * window * width**2 + 2 * window**2 * width + 2 * window * SAM_WINDOW * width)
    global_layers = SAM_LAYERS if all_global else SAM_GLOBAL_LAYERS
    patches = cells * 3 * 16**2 * width
    return (
        patches + global_layers * whole + (SAM_LAYERS - global_layers) * windowed + neck_macs(1, SAM_GRID, width, 256)
    )


def sam_decoder_macs() -> int:
    """SAM's mask decoder for one target: one prompt token, two steps of upscaling."""
    config, cells = PixelDecoderConfig(scales=1), SAM_GRID**2
    upscaled = cells * 256 * 4 * 64 + 4 * cells * 64 * 4 * 32
    return two_way_macs(config, cells, config.mask_tokens + 2) + upscaled + heads_macs(config, 16 * cells)


@dataclass(frozen=True)
class AnswerCost:
    """Multiply-adds of one answer by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def pixellm_cost(config: PixelLMConfig, tokens: int, targets: int = 1, vision_layers: int = 24) -> AnswerCost:
    """PixelLM with `tokens` (the picture's included) in one pass, and `targets` masks.

    Args:
      vision_layers: 24 as the released code computes them; the last one is not needed, and ours leaves it out.
    """
    vision, llama, width = config.vision, config.llama, config.llama.width
    tower = ClipVisionConfig(canvas=vision.canvas, patch_size=vision.patch_size, layers=vision_layers)
    patches = vision.grid**2
    return AnswerCost(
        {
            "CLIP": vision_macs(tower),
            "SAM encoder": 0,
            "projectors": projector_macs(config.image_tokens, vision.width, 2 * width, width)
            + projector_macs(config.scales * patches, vision.width, 2 * width, width)
            + neck_macs(config.scales, vision.grid, width, config.decoder.width),
            "language model": language_macs(llama, tokens) + head_macs(llama, tokens),
            "masks": targets
            * (
                decoder_macs(config.decoder, vision.grid)
                + projector_macs(config.group, width, width, config.decoder.width)
            ),
        }
    )


def lisa_cost(llama: LlamaConfig, tokens: int, targets: int = 1, all_global: bool = False) -> AnswerCost:
    """LISA: CLIP on 224 x 224 pixels for the language model, SAM for the masks."""
    tower = ClipVisionConfig(canvas=224, layers=24)
    return AnswerCost(
        {
            "CLIP": vision_macs(tower),
            "SAM encoder": sam_encoder_macs(all_global),
            "projectors": tower.grid**2 * tower.width * llama.width,
            "language model": language_macs(llama, tokens) + head_macs(llama, tokens),
            "masks": targets * (sam_decoder_macs() + projector_macs(1, llama.width, llama.width, 256)),
        }
    )


def published_cost(name: str, tokens: int, targets: int = 1, all_global: bool = False) -> AnswerCost:
    """The cost of one of `MODELS`; `all_global` see `sam_encoder_macs`."""
    large = name.endswith("13B")
    if name.startswith("PixelLM"):
        return pixellm_cost(PixelLMConfig.pixellm_13b() if large else PixelLMConfig.pixellm_7b(), tokens, targets)
    llama = LlamaConfig.llama_13b(vocab=32003) if large else LlamaConfig.llama_7b(vocab=32004)
    return lisa_cost(llama, tokens, targets, all_global)


def tokens_for(total: float, cost: Callable[[int], AnswerCost]) -> int:
    """The number of tokens whose cost comes closest to `total`, from 0 to 4096."""
    return min(range(4097), key=lambda tokens: abs(cost(tokens).total - total))


def decoding_macs(llama: LlamaConfig, prompt: int, new: int) -> int:
    """Writing `new` tokens behind a prompt with a cache; the first one comes from the prompt's last state."""
    return sum(language_macs(llama, 1, prompt + done) for done in range(new - 1)) + head_macs(llama, new)


def flops_report() -> str:
    """The tables of docs/evaluation.md."""
    lines = ["Multiply-adds of one answer with one mask, in one pass over T tokens, in 10^12", ""]
    parts = list(published_cost(MODELS[0], 1).parts)
    lines.append(f"{'':<12} {'T':>5} " + " ".join(f"{part:>14}" for part in (*parts, "total")))
    for name in MODELS:
        for tokens in TOKENS:
            cost = published_cost(name, tokens)
            cells = " ".join(f"{value / 1e12:14.4f}" for value in (*cost.parts.values(), cost.total))
            lines.append(f"{name:<12} {tokens:>5} {cells}")
    lines += [
        "",
        "PixelLM over LISA: " + ", ".join(_ratio(size, tokens) for size in ("7B", "13B") for tokens in TOKENS),
    ]
    lines += ["", "An answer of 32 tokens written with a cache behind 300 tokens, in 10^12: prompt, writing"]
    for name, llama in (("7B", LlamaConfig.llama_7b()), ("13B", LlamaConfig.llama_13b())):
        lines.append(f"{name:<12} {language_macs(llama, 300) / 1e12:.4f} {decoding_macs(llama, 300, 32) / 1e12:.4f}")
    return "\n".join([*lines, "", *_claims()])


def _ratio(size: str, tokens: int) -> str:
    ratio = published_cost(f"PixelLM-{size}", tokens).total / published_cost(f"LISA-{size}", tokens).total
    return f"{size} at T={tokens} {ratio:.3f}"


def closest_tokens(all_global: bool) -> int:
    """The one T that comes closest to all four claims (least sum of squared relative errors)."""

    def error(tokens: int) -> float:
        return sum(
            (published_cost(name, tokens, all_global=all_global).total / claim - 1) ** 2
            for name, claim in CLAIMS.items()
        )

    return min(range(257, 1025), key=error)


def _claims() -> list[str]:
    """What number of tokens gives the paper's figures, under three ways of counting."""
    best, all_best = closest_tokens(False), closest_tokens(True)
    lines = [
        "The paper's figures (TFLOPs); the T at which we count as many multiply-adds, and as many operations where a",
        f"multiplication and an addition are two; our count at the one T that fits all four best, {best}; and that at",
        f"T={all_best} where the attention of SAM's windowed layers is counted as if it were global:",
        f"{'':<12} {'paper':>7} {'T, MACs':>8} {'T, x 2':>8} {f'T={best}':>8} {f'T={all_best}, all global':>18}",
    ]
    for name, claim in CLAIMS.items():

        def cost(tokens: int, name: str = name) -> AnswerCost:
            return published_cost(name, tokens)

        double = tokens_for(claim / 2, cost)
        impossible = f"{double:>8}" if double > 256 else f"{'none':>8}"
        counted = [cost(best).total, published_cost(name, all_best, all_global=True).total]
        lines.append(
            f"{name:<12} {claim / 1e12:7.2f} {tokens_for(claim, cost):>8} {impossible} "
            f"{counted[0] / 1e12:8.2f} {counted[1] / 1e12:18.2f}"
        )
    return lines
