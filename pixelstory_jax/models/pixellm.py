"""PixelLM (arXiv 2312.02228): a language model that answers about a picture in text and masks.

B images, Q questions per image, T tokens of a question (image placeholders expanded), I image tokens of the language
model, P patches, g grid side, S target slots per image, L feature scales, N codebook tokens per scale, G = L * N
tokens per target, D width of the language model, E width of the tower, W width of the decoder, m side of the masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from pixelstory_jax.models.clip_vision import ClipVision, ClipVisionConfig, patch_validity
from pixelstory_jax.models.layers import Linear, gelu
from pixelstory_jax.models.llama import Llama, LlamaConfig, LoraConfig
from pixelstory_jax.models.partitioning import constrain
from pixelstory_jax.models.pixel_decoder import (
    MaskDecoder,
    Neck,
    PixelDecoderConfig,
    PromptEncoder,
    fuse_scales,
)
from pixelstory_jax.models.resize import nearest_indices, resize_bilinear
from pixelstory_jax.models.sizes import check_sizes

IMAGE_TOKEN = -200  # placeholder id of an image token
PIXEL_MEAN = (123.675, 116.28, 103.53)  # of values 0..255; PixelLM uses ImageNet's, not CLIP's
PIXEL_STD = (58.395, 57.12, 57.375)
FAITHFUL_FUSED_SIZE = 128


@dataclass(frozen=True)
class PixelLMConfig:
    """Sizes and mode of the whole model.

    Attributes:
      feature_layers: hidden-state numbers of the tower, high-level features first; one feature scale each.
      codebook_tokens: N; a target is written with L * N tokens.
      image_tokens_side: the language model gets image_tokens_side ** 2 image tokens.
      mode: what the released weights need ("faithful") or what the paper describes ("paper").
        Both read a codebook token at the position that predicts it, and never train the decoder's position matrices.
        faithful: token weights 1 / G and scale weights 1 / L are constants; masks are fused at 128 x 128; the tower's
        position table was resized with the released slip (`resize_position_table(..., faithful=True)`); the decoder's
        position codes are computed in its own dtype (the released runs: bfloat16) rather than in float32; the neck and
        the prompt encoder stay at their random start, which `frozen` lists for objectives.
        paper: token and scale weights are parameters that start at those constants; masks are fused at the side of the
        finest scale; neck and prompt encoder are trained.
    """

    vision: ClipVisionConfig = field(default_factory=ClipVisionConfig)
    llama: LlamaConfig = field(default_factory=LlamaConfig.llama_7b)
    decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    feature_layers: tuple[int, ...] = (23, 14)
    codebook_tokens: int = 3
    image_tokens_side: int = 16
    mode: str = "paper"

    def __post_init__(self) -> None:
        if self.mode not in ("paper", "faithful"):
            raise ValueError(f'mode is "paper" or "faithful", not "{self.mode}".')
        if self.decoder.scales != len(self.feature_layers):
            raise ValueError(f"{self.decoder.scales} decoder scales for {len(self.feature_layers)} feature layers.")
        if not self.feature_layers or max(self.feature_layers) > self.vision.layers or min(self.feature_layers) < 0:
            raise ValueError(f"feature_layers {self.feature_layers} must be among 0..{self.vision.layers}.")
        check_sizes(self, "codebook_tokens", "image_tokens_side")

    @property
    def scales(self) -> int:
        return len(self.feature_layers)

    @property
    def group(self) -> int:
        """Codebook tokens of one target, G."""
        return self.scales * self.codebook_tokens

    @property
    def image_tokens(self) -> int:
        return self.image_tokens_side**2

    @property
    def mask_side(self) -> int:
        """Side of the fused mask, m."""
        finest = self.vision.grid * 2**self.scales
        return self.decoder.fused_size or (FAITHFUL_FUSED_SIZE if self.mode == "faithful" else finest)

    @property
    def resolved_decoder(self) -> PixelDecoderConfig:
        """The decoder with the position dtype that the mode asks for, unless `decoder` names one."""
        by_mode = self.decoder.dtype if self.mode == "faithful" else "float32"
        return replace(self.decoder, position_dtype=self.decoder.position_dtype or by_mode)

    @property
    def frozen(self) -> tuple[str, ...]:
        """First parts of the parameter paths that this mode leaves at their start, beyond what a recipe freezes."""
        always = ("prompt_encoder/position_matrix", "mask_decoder/position_matrix")
        return (*always, "neck", "prompt_encoder") if self.mode == "faithful" else always

    @classmethod
    def tiny(
        cls, *, vocab: int = 912, canvas: int = 144, decoder_width: int = 64, lora_rank: int = 0, **changes: Any
    ) -> PixelLMConfig:
        """Trains on two CPU cores in minutes: 12 x 12 patches, 36 image tokens, masks of 48 x 48."""
        feature_layers = changes.setdefault("feature_layers", (5, 3))
        vision = ClipVisionConfig(
            canvas=canvas, patch_size=12, width=192, layers=max(feature_layers), heads=3, mlp_width=768
        )
        llama = LlamaConfig(
            vocab=vocab,
            width=160,
            layers=4,
            heads=4,
            kv_heads=4,
            mlp_width=432,
            max_length=512,
            lora=LoraConfig(rank=lora_rank),
        )
        decoder = PixelDecoderConfig(
            width=decoder_width,
            heads=2,
            cross_downsample=1,  # heads of 32 numbers: with fewer, a name is hard to tell from 160 others
            mlp_width=decoder_width * 4,
            iou_width=decoder_width,
            scales=len(feature_layers),
        )
        sizes = {"vision": vision, "llama": llama, "decoder": decoder, "image_tokens_side": 6}
        return cls(**{**sizes, **changes})

    @classmethod
    def pixellm_7b(cls, *, lora_rank: int = 0, **changes: Any) -> PixelLMConfig:
        """The released PixelLM-7B. `lora_rank` 8 is the paper's for training; merged weights have 0."""
        return cls._published(LlamaConfig.llama_7b, 32003, lora_rank, changes)

    @classmethod
    def pixellm_13b(cls, *, lora_rank: int = 0, **changes: Any) -> PixelLMConfig:
        """PixelLM on Llama-2 13B."""
        return cls._published(LlamaConfig.llama_13b, 32002, lora_rank, changes)

    @classmethod
    def _published(cls, llama: Any, base_vocab: int, lora_rank: int, changes: dict[str, Any]) -> PixelLMConfig:
        feature_layers = changes.setdefault("feature_layers", (23, 14))
        group = len(feature_layers) * changes.get("codebook_tokens", 3)
        sizes = {
            "vision": ClipVisionConfig(layers=max(feature_layers), dtype="bfloat16", remat="full"),
            "llama": llama(vocab=base_vocab + group, lora=LoraConfig(rank=lora_rank)),
            "decoder": PixelDecoderConfig(scales=len(feature_layers), dtype="bfloat16"),
        }
        return cls(**{**sizes, **changes})


class ImageFeatures(NamedTuple):
    """What is computed once per image.

    `llm_tokens` [B, I, D], `llm_valid` [B, I] bool, `mask_features` [B, L, g, g, W] after the neck.
    """

    llm_tokens: jax.Array
    llm_valid: jax.Array
    mask_features: jax.Array


class DecodedMasks(NamedTuple):
    """Mask logits on the padded canvas.

    `logits` [B, S, m, m] fused; `scales` one [B, S, h, h] per scale; `prompts` [B, S, L, W] fused codebook embeddings;
    `all_masks` [B, S, M, h, h] and `quality` [B, S, M] per scale, empty unless asked for.
    """

    logits: jax.Array
    scales: tuple[jax.Array, ...]
    prompts: jax.Array
    all_masks: tuple[jax.Array, ...] = ()
    quality: tuple[jax.Array, ...] = ()


class PixelLMOutput(NamedTuple):
    """`logits` [B, Q, T, vocab], `hidden` [B, Q, T, D], `mask_logits` [B, S, m, m], `scale_masks` [B, S, h, h] each."""

    logits: jax.Array
    hidden: jax.Array
    mask_logits: jax.Array
    scale_masks: tuple[jax.Array, ...]


def normalise_pixels(image: jax.Array, image_size: jax.Array) -> jax.Array:
    """uint8 [B, C, C, 3] with the picture in the top left `image_size` [B, 2] to float32, zero in the padding."""
    pixels = (image.astype(jnp.float32) - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
    inside = patch_validity(image_size, 1, image.shape[1]).reshape(*image.shape[:3], 1)
    return jnp.where(inside, pixels, 0.0)


def image_token_validity(image_size: jax.Array, patch: int, grid: int, side: int) -> jax.Array:
    """[B, side * side] bool: the patch mask resized to the image tokens by nearest neighbour."""
    index = nearest_indices(grid, side)
    valid = patch_validity(image_size, patch, grid).reshape(-1, grid, grid)
    return valid[:, index][:, :, index].reshape(-1, side * side)


class Mlp(nn.Module):
    """Two linear maps with an activation between."""

    hidden: int
    features: int
    activation: str
    dtype: Any
    torch_init: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Linear(self.hidden, dtype=self.dtype, torch_init=self.torch_init, name="first")(x)
        x = jax.nn.relu(x) if self.activation == "relu" else gelu(x)
        return Linear(self.features, dtype=self.dtype, torch_init=self.torch_init, name="second")(x)


class PixelLM(nn.Module):
    """The model. `__call__` is a training step's forward pass; generation uses the methods below it one by one."""

    config: PixelLMConfig

    def setup(self) -> None:
        config, decoder = self.config, self.config.resolved_decoder
        width, dtype = config.llama.width, config.llama.dtype
        self.vision = ClipVision(config.vision)
        self.llama = Llama(config.llama)
        self.mm_projector = Mlp(2 * width, width, "gelu", dtype)
        self.out_mm_projector = Mlp(2 * width, width, "gelu", dtype)
        self.text_projector = Mlp(width, decoder.width, "relu", dtype, torch_init=True)
        self.neck = Neck(decoder)
        self.prompt_encoder = PromptEncoder(decoder)
        self.mask_decoder = MaskDecoder(decoder)
        if config.mode == "paper":
            shape = (config.scales, config.codebook_tokens)
            self.token_weights = self.param("token_weights", nn.initializers.constant(1 / config.group), shape)
            self.scale_weights = self.param(
                "scale_weights", nn.initializers.constant(1 / config.scales), (config.scales,)
            )

    def __call__(self, batch: dict[str, jax.Array], dropout_rng: jax.Array | None = None) -> PixelLMOutput:
        """One pass over a training batch. Empty target slots give masks to ignore.

        Args:
          batch: `image` uint8 [B, C, C, 3], `image_size` [B, 2], `tokens` and `token_valid` [B, Q, T],
            `target_positions` [B, S, G], indices of codebook tokens into the flattened [Q * T] axis.
          dropout_rng: key for LoRA dropout; None for none.
        """
        pixels = normalise_pixels(batch["image"], batch["image_size"])
        features = self.encode_image(pixels, batch["image_size"])
        hidden = self.states(batch["tokens"], batch["token_valid"], features, dropout_rng)
        masks = self.decode_masks(features, self.target_states(hidden, batch["target_positions"]))
        return PixelLMOutput(self.logits(hidden), hidden, masks.logits, masks.scales)

    def vision_features(self, pixels: jax.Array, image_size: jax.Array) -> jax.Array:
        """Patch states [L, B, P, E] of the feature layers, class token dropped, of normalised pixels [B, C, C, 3]."""
        vision = self.config.vision
        valid = patch_validity(image_size, vision.patch_size, vision.grid)
        return self.vision(pixels, valid, self.config.feature_layers)[:, :, 1:]

    def language_tokens(self, high: jax.Array) -> jax.Array:
        """Image tokens [B, I, D] of the high-level features [B, P, E]: resized to the token grid, then projected."""
        side = self.config.image_tokens_side
        grid = rearrange(high, "b (r c) e -> b r c e", r=self.config.vision.grid)
        return self.mm_projector(rearrange(resize_bilinear(grid, side, side, axes=(1, 2)), "b r c e -> b (r c) e"))

    def projected_features(self, states: jax.Array) -> jax.Array:
        """[L, B, P, E] to [L, B, P, D] by the projector that all scales share."""
        return constrain(self.out_mm_projector(states), None, "batch")

    def encode_image(self, pixels: jax.Array, image_size: jax.Array) -> ImageFeatures:
        """Everything that depends on the image alone.

        Args:
          pixels: [B, C, C, 3] normalised, zero in the padding. image_size: [B, 2] (height, width) inside the canvas.
        """
        return self.image_features(self.vision_features(pixels, image_size), image_size)

    def image_features(self, states: jax.Array, image_size: jax.Array) -> ImageFeatures:
        """The same from the patch states [L, B, P, E] of the tower."""
        vision = self.config.vision
        features = rearrange(self.projected_features(states), "l b (r c) d -> b l r c d", r=vision.grid)
        valid = image_token_validity(image_size, vision.patch_size, vision.grid, self.config.image_tokens_side)
        return ImageFeatures(self.language_tokens(states[0]), valid, self.neck(features))

    def embed(self, tokens: jax.Array, token_valid: jax.Array, features: ImageFeatures) -> tuple[jax.Array, jax.Array]:
        """Embeddings [B, Q, T, D] with the image tokens at the placeholders, and which keys may be attended to.

        The k-th placeholder of a row gets image token k; padded image tokens keep their position but are no keys.
        """
        is_image = tokens == IMAGE_TOKEN
        place = jnp.clip(jnp.cumsum(is_image, axis=-1) - 1, 0, self.config.image_tokens - 1)  # [B, Q, T]
        flat = rearrange(place, "b q t -> b (q t)")
        image = jnp.take_along_axis(features.llm_tokens, flat[:, :, None], axis=1).reshape(*tokens.shape, -1)
        image_valid = jnp.take_along_axis(features.llm_valid, flat, axis=1).reshape(tokens.shape)
        text = self.llama.embed(jnp.where(is_image, 0, tokens))
        embeddings = constrain(jnp.where(is_image[..., None], image.astype(text.dtype), text), "batch")
        return embeddings, token_valid & (image_valid | ~is_image)

    def states(
        self,
        tokens: jax.Array,
        token_valid: jax.Array,
        features: ImageFeatures,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, Q, T, D] after the final norm, of tokens [B, Q, T]."""
        embeddings, valid = self.embed(tokens, token_valid, features)
        flat = rearrange(embeddings, "b q t d -> (b q) t d")
        hidden, _ = self.llama(flat, rearrange(valid, "b q t -> (b q) t"), dropout_rng=dropout_rng)
        return hidden.reshape(*tokens.shape, -1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits [..., vocab] float32."""
        return self.llama.logits(hidden)

    def target_states(self, hidden: jax.Array, target_positions: jax.Array) -> jax.Array:
        """States [B, S, G, D] that predicted the tokens at `target_positions` [B, S, G], of hidden [B, Q, T, D]."""
        flat = rearrange(hidden, "b q t d -> b (q t) d")
        index = jnp.maximum(rearrange(target_positions, "b s g -> b (s g)") - 1, 0)
        states = jnp.take_along_axis(flat, index[:, :, None], axis=1)
        return constrain(states.reshape(*target_positions.shape, flat.shape[-1]), "batch")

    def prompts(self, target_states: jax.Array, token_weights: jax.Array | None = None) -> jax.Array:
        """Fused embeddings [B, S, L, W] of target states [B, S, G, D]: projected, then summed over a scale's tokens."""
        config = self.config
        if token_weights is None:
            constant = jnp.full((config.scales, config.codebook_tokens), 1 / config.group)
            token_weights = self.token_weights if config.mode == "paper" else constant
        embedded = rearrange(self.text_projector(target_states), "b s (l n) w -> b s l n w", l=config.scales)
        return jnp.einsum("bslnw,ln->bslw", embedded, token_weights.astype(embedded.dtype))

    def decode_masks(
        self,
        features: ImageFeatures,
        target_states: jax.Array,
        token_weights: jax.Array | None = None,
        scale_weights: jax.Array | None = None,
        all_masks: bool = False,
    ) -> DecodedMasks:
        """Masks of the targets of each image.

        Args:
          features: from `encode_image`.
          target_states: [B, S, G, D], the states that predicted each codebook token, scale by scale.
          token_weights, scale_weights: [L, N] and [L] in place of the model's own.
          all_masks: also return the masks of all mask tokens and the predicted qualities.
        """
        config = self.config
        if scale_weights is None:
            constant = jnp.full((config.scales,), 1 / config.scales)
            scale_weights = self.scale_weights if config.mode == "paper" else constant
        prompts = self.prompts(target_states, token_weights)
        dense, code = self.prompt_encoder(config.vision.grid)
        results = self.mask_decoder(features.mask_features, prompts, dense, code, all_masks)
        scales = tuple(result.masks[:, :, 0] for result in results)
        fused = fuse_scales(list(scales), scale_weights, config.mask_side)
        if not all_masks:
            return DecodedMasks(fused, scales, prompts)
        quality = tuple(result.quality for result in results if result.quality is not None)
        return DecodedMasks(fused, scales, prompts, tuple(result.masks for result in results), quality)
