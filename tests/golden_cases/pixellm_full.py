"""pixellm_full.npz: training and inference passes with gradients, and generation by our cached decoding.

Letters as in `models.pixellm`. Batches of all cases are padded to one shape, so that each function is compiled once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from pixelstory_jax.inference.generate import generate
from pixelstory_jax.interop.tables import Table, pixellm
from pixelstory_jax.interop.torch_layout import Params, to_torch_tensors
from pixelstory_jax.models.pixel_decoder import PixelDecoderConfig
from pixelstory_jax.models.pixellm import IMAGE_TOKEN, PixelLM, PixelLMConfig
from pixelstory_jax.objectives.losses import IGNORE, next_token_loss
from tests.golden_cases.fixture import Fixture
from tests.golden_cases.llava_prep import expand, model_config, read_params, select_layers
from tests.golden_cases.losses import batch_mask_losses
from tests.golden_cases.restored import restore_masks, restored

LLAMA_STOP_ID = 2
MAIN = "main"


@dataclass(frozen=True)
class Shape:
    """The common padded shape of all batches."""

    images: int
    questions: int
    tokens: int
    slots: int


@dataclass(frozen=True)
class Case:
    """A batch of the fixture: per image the expanded rows [Q_b, T], and per row the positions of its targets [K, G]."""

    name: str
    pixels: np.ndarray
    image_size: np.ndarray
    original_size: np.ndarray
    tokens: list[np.ndarray]
    valid: list[np.ndarray]
    labels: list[np.ndarray]
    groups: list[list[np.ndarray]]
    masks: list[np.ndarray]

    @property
    def prefix(self) -> str:
        return "" if self.name == MAIN else f"{self.name}/"

    @property
    def length(self) -> int:
        return self.tokens[0].shape[1]

    def targets(self, image: int) -> int:
        return sum(len(groups) for groups in self.groups[image])


def codebook_groups(tokens: np.ndarray, codebook: list[int]) -> np.ndarray:
    """Where the targets of one answer stand by the reference's rule, int [K, G] positions into `tokens` [n].

    All codebook tokens in reading order, whatever stands between them, and no target at all if their number is not a
    multiple of G. Our answers keep every complete group instead (`data.tokenizers.find_groups`).
    """
    found = np.flatnonzero(np.isin(tokens, codebook))
    size = len(codebook)
    return found.reshape(-1, size) if len(found) % size == 0 else np.zeros((0, size), int)


def read_case(fixture: Fixture, name: str, config: PixelLMConfig) -> Case:
    prefix = "" if name == MAIN else f"{name}/"
    inputs = {key.removeprefix(prefix): value for key, value in fixture.inputs.items() if key.startswith(prefix)}
    is_image = inputs["input_ids"] == IMAGE_TOKEN

    def by_image(key: str, fill: int) -> list[np.ndarray]:
        return np.split(expand(inputs[key], config.image_tokens, fill, is_image), inputs["offset"][1:-1])

    tokens = by_image("input_ids", IMAGE_TOKEN)
    codebook = fixture.meta["seg_token_idx"]
    return Case(
        name,
        rearrange(inputs["images_clip"], "b c h w -> b h w c"),
        inputs["clip_resize"],
        inputs["original_size"],
        tokens,
        by_image("attention_masks", 1),
        by_image("labels", IGNORE),
        [[codebook_groups(row, codebook) for row in rows] for rows in tokens],
        [inputs[f"masks_{image}"] for image in range(len(tokens))],
    )


def pad_batch(case: Case, shape: Shape, only: int | None = None) -> dict[str, np.ndarray]:
    """The batch in the common shape; with `only`, one image and its rows alone."""
    canvas, group = case.pixels.shape[1], case.groups[0][0].shape[1]
    batch = {
        "pixels": np.zeros((shape.images, canvas, canvas, 3), np.float32),
        "image_size": np.zeros((shape.images, 2), np.int32),
        "tokens": np.zeros((shape.images, shape.questions, shape.tokens), np.int32),
        "token_valid": np.zeros((shape.images, shape.questions, shape.tokens), bool),
        "labels": np.full((shape.images, shape.questions, shape.tokens), IGNORE, np.int32),
        "positions": np.zeros((shape.images, shape.slots, group), np.int32),
    }
    for image in range(len(case.tokens)) if only is None else [only]:
        rows, length = case.tokens[image].shape
        batch["pixels"][image], batch["image_size"][image] = case.pixels[image], case.image_size[image]
        batch["tokens"][image, :rows, :length] = case.tokens[image]
        batch["token_valid"][image, :rows, :length] = case.valid[image]
        batch["labels"][image, :rows, :length] = case.labels[image]
        positions = [row * shape.tokens + groups for row, groups in enumerate(case.groups[image])]
        batch["positions"][image, : case.targets(image)] = np.concatenate(positions)
    return batch


class Reference:
    """The model of a fixture and its compiled passes."""

    def __init__(self, fixture: Fixture):
        meta, weights = fixture.meta, fixture.weights
        width = meta["out_dim"]
        prefix = "model.mask_decoder."
        cross = weights[prefix + "transformer.0.layers.0.cross_attn_token_to_image.q_proj.weight"].shape[0]
        decoder = PixelDecoderConfig(
            width=width,
            heads=meta["decoder_num_heads"],
            mlp_width=meta["decoder_mlp"],
            depth=meta["transformer_depth"],
            cross_downsample=width // cross,
            mask_tokens=weights[prefix + "mask_tokens.weight"].shape[0],
            iou_width=weights[prefix + "iou_prediction_head.layers.0.weight"].shape[0],
            scales=len(select_layers(fixture)),
            fused_size=meta["fused_out_size"],
        )
        self.meta, self.select_layers = meta, select_layers(fixture)
        self.config = model_config(fixture, decoder)
        self.model = PixelLM(self.config)
        self.table: Table = pixellm(decoder.scales, decoder.depth, tower=True)
        self.params = read_params(fixture, self.config, self.table)
        self.scalars = {name: fixture.inputs[name] for name in ("multiscale_scalar", "multiseg_scalar")}
        self.forward = jax.jit(self._forward)
        self.backward = jax.jit(self._backward)
        self.encode = jax.jit(lambda params, *inputs: self.call(params, PixelLM.encode_image, *inputs))
        self.states = jax.jit(lambda params, *inputs: self.call(params, PixelLM.states, *inputs))
        self.decode = jax.jit(self._decode)

    def call(self, params: Params, method: Any, *arguments: Any) -> Any:
        return self.model.apply({"params": params}, *arguments, method=method)

    def _decode(self, params: Params, scalars: dict[str, Any], features: Any, states: Any) -> Any:
        per_token = scalars["multiseg_scalar"][: self.config.codebook_tokens]
        token_weights = jnp.tile(per_token, (self.config.scales, 1))
        weights = scalars["multiscale_scalar"]
        return self.call(params, PixelLM.decode_masks, features, states, token_weights, weights, True)

    def _forward(self, params: Params, scalars: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        states = self.call(params, PixelLM.vision_features, batch["pixels"], batch["image_size"])
        features = self.call(params, PixelLM.image_features, states, batch["image_size"])
        tokens, valid = batch["tokens"], batch["token_valid"]
        embeddings, key_valid = self.call(params, PixelLM.embed, tokens, valid, features)
        hidden = self.call(params, PixelLM.states, tokens, valid, features)
        target_states = self.call(params, PixelLM.target_states, hidden, batch["positions"])
        return {
            "clip": states,
            "projected": self.call(params, PixelLM.projected_features, states),
            "embeddings": embeddings,
            "key_valid": key_valid,
            "hidden": hidden,
            "logits": self.call(params, PixelLM.logits, hidden),
            "masks": self._decode(params, scalars, features, target_states),
        }

    def _backward(self, params: Params, scalars: Any, batch: Any, logits: Any, fused: Any) -> tuple[Params, Any]:
        """Gradients from those of the logits and the fused masks."""

        def outputs(params: Params, scalars: Any) -> tuple[jax.Array, jax.Array]:
            result = self._forward(params, scalars, batch)
            return result["logits"], result["masks"].logits

        return jax.vjp(outputs, params, scalars)[1]((logits, fused))


def train_outputs(reference: Reference, case: Case, shape: Shape, asked: list[str]) -> dict[str, np.ndarray]:
    meta, config = reference.meta, reference.config
    batch = pad_batch(case, shape)
    result = reference.forward(reference.params, reference.scalars, batch)
    images, length = range(len(case.tokens)), case.length

    @jax.jit
    def losses(logits: jax.Array, fused: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        whole = [
            restore_masks(fused[b, : case.targets(b)], tuple(case.image_size[b]), tuple(case.original_size[b]))
            for b in images
        ]
        terms = batch_mask_losses(whole, case.masks, meta["bce_loss_weight"], meta["dice_loss_weight"])
        terms["ce_loss"] = meta["ce_loss_weight"] * next_token_loss(logits, batch["labels"])
        terms["loss"] = terms["ce_loss"] + terms["mask_loss"]
        return terms["loss"], {**terms, **{f"pred_masks_{b}": whole[b] for b in images}}

    gradient = jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)
    (_, ours), cotangents = gradient(result["logits"], result["masks"].logits)
    gradients, scalar_gradients = reference.backward(reference.params, reference.scalars, batch, *cotangents)
    by_name = {**to_torch_tensors(reference.table, gradients), **scalar_gradients}

    def rows(values: Any) -> np.ndarray:
        """[B, Q, T, ...] to the rows of the fixture."""
        return np.concatenate([np.asarray(values)[b, : len(case.tokens[b]), :length] for b in images])

    def per_row(values: Any) -> np.ndarray:
        """[L, B, P, D] to one copy per row."""
        return np.repeat(np.asarray(values), [len(case.tokens[b]) for b in images], axis=1)

    clip = per_row(result["clip"][:, : len(images)])
    ours |= {
        "logits": rows(result["logits"]),
        "inputs_embeds": rows(result["embeddings"]),
        "llm_attention_mask": rows(result["key_valid"]),
        "llm_labels": rows(batch["labels"]),
        "last_hidden_state": rows(result["hidden"]),
        "image_features": per_row(result["projected"][:, : len(images)]),
        "clip_features_select_layer": clip[0],
        **{f"clip_features_layer_minus_{-reference.select_layers[i]}": clip[i] for i in range(1, config.scales)},
    }
    masks = result["masks"]
    for b in images:
        count = case.targets(b)
        ours[f"pred_embeddings_{b}"] = masks.prompts[b, :count]
        ours[f"fused_low_res_masks_{b}"] = masks.logits[b, :count, None]
        for level in range(config.scales):
            ours[f"low_res_masks_{b}_level{level}"] = masks.scales[level][b, :count, None]
            ours[f"iou_predictions_{b}_level{level}"] = masks.quality[level][b, :count, :1]
    ours |= {f"grad/{name}": value for name, value in by_name.items()}
    return {name: np.asarray(ours[name]) for name in asked if name in ours}


def inference_outputs(reference: Reference, case: Case, shape: Shape) -> dict[str, np.ndarray]:
    """Each image alone."""
    ours: dict[str, Any] = {}
    for b in range(len(case.tokens)):
        masks = reference.forward(reference.params, reference.scalars, pad_batch(case, shape, only=b))["masks"]
        count = case.targets(b)
        pictures = restored(masks.logits[b, :count], case.image_size[b], case.original_size[b])
        ours[f"pred_masks_{b}"], ours[f"mask_scores_{b}"] = pictures
        ours[f"pred_embeddings_{b}"] = masks.prompts[b, :count]
        # The reference counts a target scales ** 2 times, by a slip in operator precedence.
        ours[f"batch_seg_token_counts_{b}"] = [len(g) * reference.config.scales**2 for g in case.groups[b]]
    return {name: np.asarray(value) for name, value in ours.items()}


def evaluate_outputs(reference: Reference, fixture: Fixture, case: Case) -> dict[str, np.ndarray]:
    """Greedy generation of every image's prompts, then the masks of what prompts and answers contain together."""
    config, meta = reference.config, reference.meta
    prompts = [
        [row[: np.flatnonzero(row == 0)[0]] if (row == 0).any() else row for row in rows]
        for rows in fixture.numbered(f"{case.prefix}evaluate/input_ids_")
    ]
    questions = max(len(rows) for rows in prompts)
    longest = max(len(row) for rows in prompts for row in rows) + config.image_tokens - 1
    new_tokens = meta["cases"][case.name]["new_tokens"]
    ours: dict[str, Any] = {}
    for b, rows in enumerate(prompts):
        tokens = np.zeros((1, questions, longest), np.int32)
        lengths = [len(row) + config.image_tokens - 1 for row in rows]
        for number, row in enumerate(rows):
            expanded = expand(row[None], config.image_tokens, IMAGE_TOKEN, row[None] == IMAGE_TOKEN)[0]
            tokens[0, number, : lengths[number]] = expanded
        valid = np.arange(longest) < np.array(lengths + [0] * (questions - len(rows)))[None, :, None]
        features = reference.encode(reference.params, case.pixels[b : b + 1], case.image_size[b : b + 1])
        generated = generate(
            reference.model,
            reference.params,
            features,
            tokens,
            valid,
            max_new_tokens=new_tokens,
            stop_ids=(meta.get("eos_token_id", LLAMA_STOP_ID),),
        )
        answers = [np.asarray(generated.tokens[n, : generated.length[n]]) for n in range(len(rows))]
        whole = [np.concatenate(pair) for pair in zip(rows, answers, strict=True)]
        groups = [codebook_groups(ids, meta["seg_token_idx"]) for ids in whole]
        prompt_states = reference.states(reference.params, tokens, valid, features)[0]
        states = []
        for number, positions in enumerate(groups):
            # The state that predicted token j: of the position before it in the prompt, or kept by the generation.
            before = np.asarray(prompt_states[number, : lengths[number] - 1])
            predicting = np.concatenate([before, np.asarray(generated.states[number])])
            states.append(predicting[positions + config.image_tokens - 1 - 1])
        target_states = np.concatenate(states)[None]
        count = target_states.shape[1]
        masks = reference.decode(reference.params, reference.scalars, features, target_states)
        pictures = restored(masks.logits[0], case.image_size[b], case.original_size[b])
        width = max(len(ids) for ids in whole)
        ours[f"output_ids_{b}"] = np.stack([np.pad(ids, (0, width - len(ids))) for ids in whole])
        ours[f"output_lengths_{b}"] = [len(ids) for ids in whole]
        ours[f"question_target_counts_{b}"] = [len(positions) for positions in groups]
        ours[f"pred_embeddings_{b}"] = masks.prompts[0, :count]
        ours[f"pred_masks_{b}"], ours[f"mask_scores_{b}"] = pictures
    return {name: np.asarray(value) for name, value in ours.items()}


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    reference = Reference(fixture)
    cases = [read_case(fixture, name, reference.config) for name in fixture.meta["cases"]]
    shape = Shape(
        images=max(len(case.tokens) for case in cases),
        questions=max(len(rows) for case in cases for rows in case.tokens),
        tokens=max(case.length for case in cases),
        slots=max(case.targets(b) for case in cases for b in range(len(case.tokens))),
    )
    results: dict[str, np.ndarray] = {}
    for case in cases:
        start = f"{case.prefix}train/"
        asked = [name.removeprefix(start) for name in fixture.expected if name.startswith(start)]
        parts = {
            "train": train_outputs(reference, case, shape, asked),
            "inference": inference_outputs(reference, case, shape),
        }
        if "new_tokens" in fixture.meta["cases"][case.name]:
            parts["evaluate"] = evaluate_outputs(reference, fixture, case)
        for part, values in parts.items():
            results |= {f"{case.prefix}{part}/{name}": value for name, value in values.items()}
    return results
