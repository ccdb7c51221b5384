"""PixelLM in PyTorch, to compare with: CLIP and LLaMA of transformers, and SAM's decoder, under the released names.

Written from the paper (arXiv 2312.02228) and the layout of the released weights; it does what the released code does,
but for attention, which is PyTorch's fused one everywhere. Pictures fill their canvas: there is no padding to mask.

B images, K targets of an image, L scales, g grid side, W decoder width, D width of the language model, T tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, LlamaForCausalLM
from transformers import LlamaConfig as TheirLlamaConfig

from pixelstory_jax.models.clip_vision import ClipVisionConfig
from pixelstory_jax.models.llama import LlamaConfig
from pixelstory_jax.models.pixel_decoder import PixelDecoderConfig
from pixelstory_jax.models.pixellm import IMAGE_TOKEN, PIXEL_MEAN, PIXEL_STD, PixelLMConfig


def clip_vision(config: ClipVisionConfig) -> nn.Module:
    """The tower of these sizes."""
    settings = CLIPVisionConfig(  # type: ignore[call-arg]
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=config.canvas,
        patch_size=config.patch_size,
        hidden_act=config.activation,
        layer_norm_eps=config.norm_eps,
        attn_implementation="sdpa",
    )
    tower = CLIPVisionModel(settings)
    return getattr(tower, "vision_model", tower)  # older ones of transformers wrap it once more


def clip_states(tower: Any, pixels: Tensor, wanted: tuple[int, ...]) -> list[Tensor]:
    """The states [B, P, E] after these layers, without the class token, of pixels [B, 3, C, C]."""
    state, found = tower.pre_layrnorm(tower.embeddings(pixels)), {}
    for number, layer in enumerate(tower.encoder.layers[: max(wanted)], 1):
        state = layer(state, None)
        found[number] = state[:, 1:]
    return [found[number] for number in wanted]


def llama(config: LlamaConfig) -> Any:
    """LlamaForCausalLM of these sizes."""
    return LlamaForCausalLM(
        TheirLlamaConfig(  # type: ignore[call-arg]
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_length,
            attn_implementation="sdpa",
        )
    )


def continue_greedily(model: Any, embeddings: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, M] that follow embeddings [B, T, D], by transformers' cache, and the states [B, M, D] behind them."""
    cache = DynamicCache(config=model.model.config)
    tokens, states = [], []
    for _ in range(new_tokens):
        # Ids, mask and positions are left to it; the cache has had two names, so it goes by its place.
        state = model.model(None, None, None, cache, embeddings, use_cache=True).last_hidden_state[:, -1]
        tokens.append(model.lm_head(state).argmax(-1))
        states.append(state)
        embeddings = model.model.embed_tokens(tokens[-1])[:, None]
    return torch.stack(tokens, 1), torch.stack(states, 1)


class LayerNorm2d(nn.Module):
    """Over the channels of [B, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Attention(nn.Module):
    """SAM's: [K, T, W] queries over [K, S, W] keys and values, inside of a smaller width."""

    def __init__(self, width: int, heads: int, downsample: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width // downsample) for _ in range(3))
        self.out_proj = nn.Linear(width // downsample, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        split = [
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        ]
        return self.out_proj(functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear maps with ReLU between."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


class TwoWayBlock(nn.Module):
    def __init__(self, config: PixelDecoderConfig, first: bool) -> None:
        super().__init__()
        self.first, width = first, config.width
        self.self_attn = Attention(width, config.heads, 1)
        self.cross_attn_token_to_image = Attention(width, config.heads, config.cross_downsample)
        self.cross_attn_image_to_token = Attention(width, config.heads, config.cross_downsample)
        self.mlp = nn.ModuleDict(
            {"lin1": nn.Linear(width, config.mlp_width), "lin2": nn.Linear(config.mlp_width, width)}
        )
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))

    def forward(self, tokens: Tensor, image: Tensor, token_code: Tensor, image_code: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            coded = tokens + token_code
            tokens = tokens + self.self_attn(coded, coded, tokens)
        tokens = self.norm1(tokens)
        attended = self.cross_attn_token_to_image(tokens + token_code, image + image_code, image)
        tokens = self.norm2(tokens + attended)
        tokens = self.norm3(tokens + self.mlp["lin2"](functional.relu(self.mlp["lin1"](tokens))))
        attended = self.cross_attn_image_to_token(image + image_code, tokens + token_code, tokens)
        return tokens, self.norm4(image + attended)


class TwoWayTransformer(nn.Module):
    def __init__(self, config: PixelDecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(config, number == 0) for number in range(config.depth))
        self.final_attn_token_to_image = Attention(config.width, config.heads, config.cross_downsample)
        self.norm_final_attn = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, image: Tensor, image_code: Tensor) -> tuple[Tensor, Tensor]:
        code = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, code, image_code)
        attended = self.final_attn_token_to_image(tokens + code, image + image_code, image)
        return self.norm_final_attn(tokens + attended), image


class PositionCode(nn.Module):
    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.zeros(2, width // 2))

    def forward(self, side: int) -> Tensor:
        """[side * side, W]"""
        place = ((torch.arange(side) + 0.5) / side) * 2 - 1
        points = torch.stack(torch.meshgrid(place, place, indexing="xy"), -1).flatten(0, 1)
        angle = 2 * math.pi * points @ self.positional_encoding_gaussian_matrix
        return torch.cat([angle.sin(), angle.cos()], -1)


class MaskDecoder(nn.Module):
    """`MaskDecoderMultiScale`: scale after scale, each guided by the mask of the one before."""

    def __init__(self, config: PixelDecoderConfig) -> None:
        super().__init__()
        width, few = config.width, config.width // 8
        self.config = config
        self.iou_token, self.mask_tokens = nn.Embedding(1, width), nn.Embedding(config.mask_tokens, width)
        self.level_embed = nn.Embedding(config.scales, width)
        self.transformer = nn.ModuleList(TwoWayTransformer(config) for _ in range(config.scales))
        for scale in range(1, config.scales):
            self.add_module(f"pe{scale}", PositionCode(width))
        self.upsample_2x = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), LayerNorm2d(width), nn.GELU())
        self.output_upscaling = nn.Sequential(nn.ConvTranspose2d(width, few, 2, 2), LayerNorm2d(few), nn.GELU())
        self.output_hypernetworks_mlps = nn.ModuleList(Mlp(width, width, width, few) for _ in range(config.mask_tokens))
        self.iou_prediction_head = Mlp(width, config.iou_width, config.iou_width, config.mask_tokens)

    def forward(self, features: Tensor, prompts: Tensor, dense: Tensor, image_code: Tensor) -> list[Tensor]:
        """Logits [K, h, w] of every scale, of one image's features [L, W, g, g] and its prompts [K, L, W]."""
        targets, results = len(prompts), list[Tensor]()
        for scale in range(self.config.scales):
            image = features[scale].expand(targets, -1, -1, -1)
            if scale:
                for _ in range(scale):
                    image = self.upsample_2x(image)
                image = image * (1 + results[-1].sigmoid()[:, None])
                image_code = getattr(self, f"pe{scale}")(image.shape[-1])
            masks = self.one_scale(scale, image + dense[:, None, None], prompts[:, scale], image_code)
            results.append(masks[:, 0])
        return results

    def one_scale(self, scale: int, image: Tensor, prompt: Tensor, image_code: Tensor) -> Tensor:
        """[K, M, 2 h, 2 w] of image [K, W, h, w]."""
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(len(prompt), -1, -1)
        tokens = torch.cat([own, prompt[:, None]], 1) + self.level_embed.weight[scale]
        tokens, flat = self.transformer[scale](tokens, image.flatten(2).transpose(1, 2), image_code)
        upscaled = self.output_upscaling(flat.transpose(1, 2).unflatten(2, image.shape[2:]))
        self.iou_prediction_head(tokens[:, 0])  # the released decoder computes it, and nothing reads it
        hyper = torch.stack([mlp(tokens[:, 1 + n]) for n, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        return torch.einsum("kmc,kchw->kmhw", hyper, upscaled)


class PromptEncoder(nn.Module):
    """What PixelLM reads of SAM's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pe_layer, self.no_mask_embed = PositionCode(width), nn.Embedding(1, width)


def doubling_mlp(source: int, target: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(source, 2 * target), nn.GELU(), nn.Linear(2 * target, target))


class PixelDecoder(nn.Module):
    """Neck, prompt encoder and mask decoder on features of width D."""

    def __init__(self, config: PixelDecoderConfig, features: int) -> None:
        super().__init__()
        width = config.width
        self.image_feature_neck = nn.Sequential(
            nn.Conv2d(features, width, 1, bias=False),
            LayerNorm2d(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            LayerNorm2d(width),
        )
        self.prompt_encoder, self.mask_decoder = PromptEncoder(width), MaskDecoder(config)

    def masks(self, features: Tensor, prompts: Tensor, side: int, weights: Tensor) -> Tensor:
        """Fused logits [K, side, side] of necked features [L, W, g, g] and prompts [K, L, W]."""
        dense, code = self.prompt_encoder.no_mask_embed.weight[0], self.prompt_encoder.pe_layer(features.shape[-1])
        scales = self.mask_decoder(features, prompts, dense, code)
        resized = [functional.interpolate(mask[None], (side, side), mode="bilinear")[0] for mask in scales]
        return torch.einsum("lkhw,l->khw", torch.stack(resized), weights)


class TorchPixelLM(nn.Module):
    """The whole. Sizes and the fusion weights of the mode "paper" are ours; everything else has its released name."""

    def __init__(self, config: PixelLMConfig) -> None:
        super().__init__()
        self.config, width = config, config.llama.width
        language = llama(config.llama)
        self.model, self.lm_head = language.model, language.lm_head
        self.model.vision_tower = nn.ModuleDict({"vision_tower": nn.ModuleDict()})
        self.model.vision_tower["vision_tower"]["vision_model"] = clip_vision(config.vision)
        self.model.mm_projector = doubling_mlp(config.vision.width, width)
        self.model.out_mm_projector = doubling_mlp(config.vision.width, width)
        text = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.decoder.width))
        self.model.text_hidden_fcs = nn.ModuleList([text])
        decoder = PixelDecoder(config.decoder, width)
        self.model.image_feature_neck, self.model.prompt_encoder = decoder.image_feature_neck, decoder.prompt_encoder
        self.model.mask_decoder = decoder.mask_decoder
        self.decoder = [decoder]  # in a list, so that its parameters have one name each
        shape = (config.scales, config.codebook_tokens)
        self.token_weights = nn.Parameter(torch.full(shape, 1 / config.group))
        self.scale_weights = nn.Parameter(torch.full((config.scales,), 1 / config.scales))

    def normalised(self, pictures: Tensor) -> Tensor:
        """float32 [B, 3, C, C] of uint8 [B, C, C, 3]."""
        pixels = (pictures.float() - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        return pixels.permute(0, 3, 1, 2).contiguous()

    def vision(self, pixels: Tensor) -> list[Tensor]:
        tower = self.model.vision_tower["vision_tower"]["vision_model"]
        return clip_states(tower, pixels, self.config.feature_layers)

    def encode_image(self, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Image tokens [B, I, D] and necked features [B, L, W, g, g] of the tower's states [B, P, E]."""
        config, grid = self.config, (self.config.vision.grid,) * 2
        high = states[0].transpose(1, 2).unflatten(2, grid)
        few = functional.interpolate(high, (config.image_tokens_side,) * 2, mode="bilinear").flatten(2).transpose(1, 2)
        features = self.model.out_mm_projector(torch.stack(states, 1)).transpose(2, 3).unflatten(3, grid)
        necked = self.model.image_feature_neck(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return self.model.mm_projector(few), necked

    def embed(self, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Embeddings [B, T, D] of tokens [B, T] whose run of placeholders the image tokens [B, I, D] take."""
        embeddings = self.model.embed_tokens(tokens.clamp(min=0))
        return embeddings.masked_scatter((tokens == IMAGE_TOKEN)[..., None], image_tokens)

    def masks(self, necked: Tensor, states: Tensor) -> Tensor:
        """Logits [K, m, m] of one image's targets by the states [K, G, D] that predicted their tokens."""
        embedded = self.model.text_hidden_fcs[0](states).unflatten(1, self.token_weights.shape)
        prompts = torch.einsum("klnw,ln->klw", embedded, self.token_weights)
        return self.decoder[0].masks(necked, prompts, self.config.mask_side, self.scale_weights)

    def answer_without_cache(self, pixels: Tensor, tokens: Tensor, new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """As the released code: tower, projectors and the whole text anew for every token.

        Ids [1, M], the states [1, M, D] behind them, and necked features.
        """
        for _ in range(new_tokens):
            image_tokens, necked = self.encode_image(self.vision(pixels))
            hidden = self.model(inputs_embeds=self.embed(tokens, image_tokens), use_cache=False).last_hidden_state
            tokens = torch.cat([tokens, self.lm_head(hidden[:, -1:]).argmax(-1)], 1)
        return tokens[:, -new_tokens:], hidden[:, -new_tokens:], necked

    def answer_with_cache(self, pixels: Tensor, tokens: Tensor, new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """As transformers generates: the picture once, then a token at a time."""
        image_tokens, necked = self.encode_image(self.vision(pixels))
        return (*continue_greedily(self, self.embed(tokens, image_tokens), new_tokens), necked)
