"""Mapping tables between PyTorch state dicts and our parameter trees. Names on the left are facts of released files."""

from __future__ import annotations

from pixelstory_jax.interop.torch_layout import Row, Table, linear, norm

_CLIP_LAYER = "vision_model.encoder.layers.{n}."
CLIP_VISION = Table(
    rows=(
        Row("vision_model.embeddings.class_embedding", "class_embedding"),
        Row("vision_model.embeddings.patch_embedding.weight", "patch_kernel", "conv"),
        Row("vision_model.embeddings.position_embedding.weight", "position_embedding"),
        *norm("vision_model.pre_layrnorm", "pre_norm"),
        *norm("vision_model.post_layernorm", "final_norm"),
        *norm(_CLIP_LAYER + "layer_norm1", "layers/attention_norm"),
        *norm(_CLIP_LAYER + "layer_norm2", "layers/mlp_norm"),
        *linear(_CLIP_LAYER + "self_attn.q_proj", "layers/attention/query"),
        *linear(_CLIP_LAYER + "self_attn.k_proj", "layers/attention/key"),
        *linear(_CLIP_LAYER + "self_attn.v_proj", "layers/attention/value"),
        *linear(_CLIP_LAYER + "self_attn.out_proj", "layers/attention/out"),
        *linear(_CLIP_LAYER + "mlp.fc1", "layers/mlp/up"),
        *linear(_CLIP_LAYER + "mlp.fc2", "layers/mlp/down"),
    ),
    ignored=(r"vision_model\.embeddings\.position_ids",),
)
"""CLIPVisionModel, complete."""

CLIP_VISION_FEATURES = Table(
    CLIP_VISION.rows,
    ignored=(*CLIP_VISION.ignored, r"vision_model\.post_layernorm\.(weight|bias)"),
    more_layers=True,
)
"""CLIPVisionModel for a tower that stops at the last layer it is asked for: later layers and the last norm are gaps."""

_LLAMA_LAYER = "model.layers.{n}."
LLAMA = Table(
    rows=(
        Row("model.embed_tokens.weight", "embedding"),
        Row("model.norm.weight", "final_norm/scale"),
        Row("lm_head.weight", "head", "linear"),
        Row(_LLAMA_LAYER + "input_layernorm.weight", "layers/attention_norm/scale"),
        Row(_LLAMA_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
        Row(_LLAMA_LAYER + "self_attn.q_proj.weight", "layers/attention/query/kernel", "linear"),
        Row(_LLAMA_LAYER + "self_attn.k_proj.weight", "layers/attention/key/kernel", "linear"),
        Row(_LLAMA_LAYER + "self_attn.v_proj.weight", "layers/attention/value/kernel", "linear"),
        Row(_LLAMA_LAYER + "self_attn.o_proj.weight", "layers/attention/out/kernel", "linear"),
        Row(_LLAMA_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", "linear"),
        Row(_LLAMA_LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", "linear"),
        Row(_LLAMA_LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "linear"),
    ),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    ours_only=(r"layers/.*/lora_[ab]",),
)
"""LlamaForCausalLM. Low-rank additions are a gap: a merged model has none."""


def _mlp(torch: str, path: str) -> tuple[Row, ...]:
    return (*linear(f"{torch}.0", f"{path}/first"), *linear(f"{torch}.2", f"{path}/second"))


PROJECTORS = Table((*_mlp("model.mm_projector", "mm_projector"), *_mlp("model.out_mm_projector", "out_mm_projector")))
"""From the tower to the language model and to the decoder."""

TEXT_PROJECTOR = Table(_mlp("model.text_hidden_fcs.0", "text_projector"))
"""From the language model to the decoder."""

NECK = Table(
    rows=(
        Row("image_feature_neck.0.weight", "neck/reduce/kernel", "pointwise"),
        *norm("image_feature_neck.1", "neck/reduce_norm"),
        Row("image_feature_neck.2.weight", "neck/kernel", "conv"),
        *norm("image_feature_neck.3", "neck/norm"),
    )
)

PROMPT_ENCODER = Table(
    rows=(
        Row("pe_layer.positional_encoding_gaussian_matrix", "position_matrix"),
        Row("point_embeddings.{n}.weight", "points", "row"),
        Row("not_a_point_embed.weight", "not_a_point", "row"),
        Row("no_mask_embed.weight", "no_mask", "row"),
        *(
            row
            for number, torch in enumerate((0, 3, 6))
            for row in (
                Row(f"mask_downscaling.{torch}.weight", f"mask_{number}_kernel", "conv"),
                Row(f"mask_downscaling.{torch}.bias", f"mask_{number}_bias"),
            )
        ),
        *(
            row
            for number, torch in enumerate((1, 4))
            for row in (
                Row(f"mask_downscaling.{torch}.weight", f"mask_{number}_norm_scale"),
                Row(f"mask_downscaling.{torch}.bias", f"mask_{number}_norm_bias"),
            )
        ),
    )
).prefixed("prompt_encoder.", "prompt_encoder/")
"""SAM's prompt encoder."""


def _attention(torch: str, path: str) -> tuple[Row, ...]:
    return tuple(
        row
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))
        for row in linear(f"{torch}.{theirs}", f"{path}/{ours}")
    )


def _block(torch: str, path: str) -> tuple[Row, ...]:
    return (
        *_attention(f"{torch}.self_attn", f"{path}/self_attention"),
        *_attention(f"{torch}.cross_attn_token_to_image", f"{path}/token_to_image"),
        *_attention(f"{torch}.cross_attn_image_to_token", f"{path}/image_to_token"),
        *linear(f"{torch}.mlp.lin1", f"{path}/mlp_in"),
        *linear(f"{torch}.mlp.lin2", f"{path}/mlp_out"),
        *(row for number in (1, 2, 3, 4) for row in norm(f"{torch}.norm{number}", f"{path}/norm_{number}")),
    )


def two_way_transformer(depth: int) -> Table:
    """SAM's two-way transformer."""
    return Table(
        rows=(
            *(row for number in range(depth) for row in _block(f"layers.{number}", f"block_{number}")),
            *_attention("final_attn_token_to_image", "final_attention"),
            *norm("norm_final_attn", "final_norm"),
        )
    )


def mask_decoder(scales: int, depth: int) -> Table:
    """`MaskDecoderMultiScale` of PixelLM."""
    table = Table(
        rows=(
            Row("iou_token.weight", "iou_token"),
            Row("mask_tokens.weight", "mask_tokens"),
            Row("level_embed.weight", "level_embedding"),
            *linear("output_upscaling.0", "upscale", "deconv"),
            *norm("output_upscaling.1", "upscale_norm"),
            *linear("upsample_2x.0", "upsample", "deconv"),
            *norm("upsample_2x.1", "upsample_norm"),
            *(Row(f"pe{n}.positional_encoding_gaussian_matrix", f"position_matrix_{n}") for n in range(1, scales)),
            *(
                row
                for number in range(3)
                for row in (
                    Row(
                        f"output_hypernetworks_mlps.{{n}}.layers.{number}.weight",
                        f"hypernetworks/kernel_{number}",
                        "linear",
                    ),
                    Row(f"output_hypernetworks_mlps.{{n}}.layers.{number}.bias", f"hypernetworks/bias_{number}"),
                    Row(f"iou_prediction_head.layers.{number}.weight", f"iou_head/kernel_{number}", "lead_linear"),
                    Row(f"iou_prediction_head.layers.{number}.bias", f"iou_head/bias_{number}", "lead"),
                )
            ),
        )
    )
    for scale in range(scales):
        table += two_way_transformer(depth).prefixed(f"transformer.{scale}.", f"transformer_{scale}/")
    return table.prefixed("mask_decoder.", "mask_decoder/")


def pixel_decoder(scales: int = 2, depth: int = 2) -> Table:
    """Neck, prompt encoder and mask decoder, without a prefix."""
    return NECK + PROMPT_ENCODER + mask_decoder(scales, depth)


def pixellm(scales: int = 2, depth: int = 2, tower: bool = False) -> Table:
    """PixelLMForCausalLM.

    Released files hold no vision tower: it is a gap and comes from CLIP's own file. A raw training checkpoint has it
    (`tower`), with the resized position table. The learned fusion weights of paper mode are a gap: the reference keeps
    constants outside its state dict.
    """
    table = (
        LLAMA.prefixed("", "llama/") + PROJECTORS + TEXT_PROJECTOR + pixel_decoder(scales, depth).prefixed("model.", "")
    )
    # A SAM that stood beside the decoder while it was trained is of no use to it.
    table += Table((), ignored=(r"model\.visual_model\..*",), ours_only=("token_weights", "scale_weights"))
    if tower:
        return table + CLIP_VISION_FEATURES.prefixed("model.vision_tower.vision_tower.", "vision/")
    return table + Table((), ours_only=("vision/.*",))
