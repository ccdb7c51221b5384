"""Questions about pictures, answered with words and masks.

    segmenter = Segmenter.from_checkpoint("runs/pixellm-tiny")
    answer = segmenter.ask("photo.jpg", "What here could you eat?")
    for target in answer.targets:
        print(target.phrase, target.score, target.mask.shape)

B conversations, T prompt tokens, S target slots, G codebook tokens per target, D width of the language model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.data.conversations import Turn, encode_conversation
from pixelstory_jax.data.images import ImageSource, fit_canvas, open_image
from pixelstory_jax.data.tokenizers import Tokenizer
from pixelstory_jax.inference.answers import Answer, RawAnswer, pieces_of, target_tokens
from pixelstory_jax.inference.decoding import check_limits
from pixelstory_jax.inference.generate import SLOT_STEP, fill_slots, generate
from pixelstory_jax.models.pixellm import ImageFeatures, PixelLM, PixelLMConfig, normalise_pixels

TokensOf = Callable[[Sequence[int], Tokenizer], np.ndarray]
BUCKET = 64  # prompts are padded to a multiple of this, so that few lengths are ever compiled


class _Batch(NamedTuple):
    """tokens int and valid bool [B, T], canvases uint8 [B, C, C, 3], sizes int [B, 2] of the pictures in them."""

    tokens: np.ndarray
    valid: np.ndarray
    canvases: np.ndarray
    sizes: np.ndarray


class Segmenter:
    """A trained PixelLM that answers.

    Args:
      config: sizes of the model.
      params: its parameters.
      tokenizer: the vocabulary that it was trained with.
      style: the prompt style that it was trained with, see `data.conversations`.
      max_new_tokens: answers are cut after this many tokens; a token group that is cut loses its mask, the others stay.
      temperature, top_p: how answers are drawn, see `generate`; at 0 every token is the likeliest. With more, asking
        again gives another answer, and a new segmenter of the same `seed` gives the same ones in the same order.

    Raises:
      ValueError: limits that make no sense, or that leave no room for a question.
    """

    def __init__(
        self,
        config: PixelLMConfig,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        style: str = "plain",
        max_new_tokens: int = 96,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_limits(max_new_tokens, temperature, top_p)
        self.config, self.tokenizer, self.style, self.max_new_tokens = config, tokenizer, style, max_new_tokens
        self.temperature, self.top_p = temperature, top_p
        self.rng, self.batches = jax.random.key(seed), 0
        if len(self._encode([Turn("?")])) > self.longest_prompt:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} leaves no room for a question in {config.llama.max_length} tokens."
            )
        self.params = jax.device_put(dict(params))

    @classmethod
    def from_checkpoint(cls, path: str | Path, max_new_tokens: int = 96, **sampling: Any) -> Segmenter:
        """Reads a workdir of `experiments.train` (its best checkpoint) or one checkpoint folder.

        Args:
          path, max_new_tokens: see above. sampling: `temperature`, `top_p` and `seed` of the segmenter.

        Raises:
          CheckpointError: there is none, it is damaged, or it holds something else than a PixelLM; one sentence.
          ValueError: as the class.
        """
        trained = read_trained(path)
        return cls(
            trained.config, trained.params, trained.tokenizer, trained.settings.data.style, max_new_tokens, **sampling
        )

    @property
    def longest_prompt(self) -> int:
        """Tokens that a conversation may have, image included, so that an answer of `max_new_tokens` fits behind it."""
        return self.config.llama.max_length - self.max_new_tokens

    def ask(self, image: ImageSource, question: str, history: Sequence[Turn] = ()) -> Answer:
        """Answers one question about a picture; `history` holds the turns before it, with their answers.

        Raises:
          ImageError: the picture cannot be read.
          ValueError: the question is empty, or longer than the model can take.
        """
        return self.ask_many([open_image(image)], [[*history, Turn(question)]])[0]

    def chat(self, image: ImageSource) -> Chat:
        """A conversation about one picture that remembers its turns."""
        return Chat(self, open_image(image))

    def ask_many(self, images: Sequence[np.ndarray], conversations: Sequence[Sequence[Turn]]) -> list[Answer]:
        """Answers the last turn of each conversation, all in one batch.

        Args:
          images: uint8 [H, W, 3], one per conversation, of any sizes.
          conversations: the last turn of each has no answer yet.
        """
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return [raw.answer(size) for raw, size in zip(self.ask_raw(images, conversations), sizes, strict=True)]

    def point_at(self, images: Sequence[np.ndarray], conversations: Sequence[Sequence[Turn]]) -> list[Answer]:
        """The masks that belong to given answers (teacher forcing), in one forward pass.

        Args:
          images: uint8 [H, W, 3], one per conversation, of any sizes.
          conversations: the last turn of each has an answer; its ints are the targets, in order.
        """
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return [raw.answer(size) for raw, size in zip(self.point_raw(images, conversations), sizes, strict=True)]

    def ask_raw(
        self, images: Sequence[np.ndarray], conversations: Sequence[Sequence[Turn]], tokens_of: TokensOf = target_tokens
    ) -> list[RawAnswer]:
        """As `ask_many`, with masks as logits on the canvas.

        Args:
          tokens_of: says which generated tokens are those of targets, int [K, G].
        """
        if not conversations:
            return []
        batch = self._batch(images, [self._prompt(conversation) for conversation in conversations])
        features = _encode(self.config, self.params, batch.canvases, batch.sizes)
        generated = generate(
            PixelLM(self.config),
            self.params,
            features,
            batch.tokens[:, None],
            batch.valid[:, None],
            max_new_tokens=self.max_new_tokens,
            stop_ids=(self.tokenizer.eos_id,),
            temperature=self.temperature,
            top_p=self.top_p,
            rng=jax.random.fold_in(self.rng, self.batches),
        )
        self.batches += 1
        ids = _on_host(generated.tokens)
        groups = [tokens_of(row, self.tokenizer) for row in ids]
        logits = np.zeros((len(ids), 0, 1, 1), np.float32)
        if any(map(len, groups)):
            states = fill_slots(_on_host(generated.states), groups, images=len(ids)).states
            logits = _on_host(_decode(self.config, self.params, features, states))
        return [
            self._raw(pieces_of(row, self.tokenizer)[0], logits[number, : len(groups[number])])
            for number, row in enumerate(ids[: len(conversations)])
        ]

    def point_raw(self, images: Sequence[np.ndarray], conversations: Sequence[Sequence[Turn]]) -> list[RawAnswer]:
        """As `point_at`, with masks as logits on the canvas.

        Raises:
          ValueError: a conversation is longer than the model can take, or its last turn has no answer.
        """
        if not conversations:
            return []
        encoded = [
            encode_conversation(turns, self.tokenizer, self.config.image_tokens, self.style) for turns in conversations
        ]
        answers = [turns[-1].answer for turns in conversations]
        longest = max(len(one.ids) for one in encoded)
        if longest > self.config.llama.max_length:
            raise ValueError(
                f"A conversation has {longest} tokens, image included, at most {self.config.llama.max_length} fit."
            )
        batch = self._batch(images, [one.ids for one in encoded])
        starts = [one.group_starts[one.target_turns == one.turns - 1] for one in encoded]
        slots = SLOT_STEP * math.ceil(max(1, *map(len, starts)) / SLOT_STEP)
        positions = np.ones((len(batch.tokens), slots, self.config.group), np.int32)
        for row, first in enumerate(starts):
            positions[row, : len(first)] = first[:, None] + np.arange(self.config.group)
        logits = _on_host(_point(self.config, self.params, batch, positions))
        raw = []
        for number, answer in enumerate(answers):
            if answer is None:
                raise ValueError("The last turn of a conversation has no answer to point at.")
            counter = itertools.count()
            pieces = tuple(piece if isinstance(piece, str) else next(counter) for piece in answer)
            raw.append(self._raw(pieces, logits[number, : len(starts[number])]))
        return raw

    def fits(self, conversation: Sequence[Turn]) -> bool:
        """Whether there is room for it, and for a new answer where its last turn has none."""
        answered = conversation[-1].answer is not None
        return len(self._encode(conversation)) <= (self.config.llama.max_length if answered else self.longest_prompt)

    def _raw(self, pieces: tuple[str | int, ...], logits: np.ndarray) -> RawAnswer:
        return RawAnswer(pieces, logits, self.config.vision.canvas)

    def _batch(self, images: Sequence[np.ndarray], prompts: Sequence[np.ndarray]) -> _Batch:
        """Rows of few lengths and numbers, so that little is compiled; rows too many repeat the last one."""
        fitted = [fit_canvas(image, self.config.vision.canvas) for image in images]
        rows = 2 ** math.ceil(math.log2(len(prompts)))
        length = min(BUCKET * math.ceil(max(map(len, prompts)) / BUCKET), self.config.llama.max_length)
        tokens = np.zeros((rows, length), np.int32)
        valid = np.zeros((rows, length), bool)
        canvases = np.zeros((rows, *fitted[0][0].shape), np.uint8)
        sizes = np.ones((rows, 2), np.int32)
        for row in range(rows):
            source = min(row, len(prompts) - 1)
            tokens[row, : len(prompts[source])] = prompts[source]
            valid[row, : len(prompts[source])] = True
            canvases[row], sizes[row] = fitted[source]
        return _Batch(tokens, valid, canvases, sizes)

    def _prompt(self, conversation: Sequence[Turn]) -> np.ndarray:
        question = conversation[-1].question
        if not question.strip():
            raise ValueError("The question is empty.")
        ids = self._encode(conversation)
        if len(ids) > self.longest_prompt:
            raise ValueError(
                f"The conversation has {len(ids)} tokens, image included, but at most {self.longest_prompt} fit; ask "
                "more briefly or start a new conversation."
            )
        return ids

    def _encode(self, conversation: Sequence[Turn]) -> np.ndarray:
        return encode_conversation(conversation, self.tokenizer, self.config.image_tokens, self.style).ids


class TrainedModel(NamedTuple):
    """What a checkpoint holds: sizes, parameters on the host, vocabulary, and the config of the training."""

    config: PixelLMConfig
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    settings: Any


def read_trained(path: str | Path) -> TrainedModel:
    """Reads a workdir or one checkpoint folder; errors as `Segmenter.from_checkpoint`."""
    from ml_collections import ConfigDict

    from pixelstory_jax.data.sources import build_tokenizer
    from pixelstory_jax.models.sizes import sizes_from_config
    from pixelstory_jax.training.checkpoints import load_params
    from pixelstory_jax.training.errors import CheckpointError

    params, saved = load_params(path)
    settings = ConfigDict(saved)
    if settings.get("objective") != "pixellm":
        raise CheckpointError(f"{path} holds a checkpoint of {settings.get('objective')!r}, not of 'pixellm'")
    config = sizes_from_config(PixelLMConfig, settings.model)
    return TrainedModel(config, params, build_tokenizer(settings.data, config.group), settings)


class Chat:
    """A conversation about one picture, uint8 [H, W, 3]; later questions are answered with the earlier ones in view."""

    def __init__(self, segmenter: Segmenter, image: np.ndarray) -> None:
        self.segmenter, self.image = segmenter, image
        self.turns: list[Turn] = []

    def ask(self, question: str) -> Answer:
        answer = self.segmenter.ask(self.image, question, self.turns)
        self.turns.append(Turn(question, answer.pieces))
        return answer


def _on_host(array: jax.Array) -> np.ndarray:
    """The whole array, also where its parts lie with other processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


@partial(jax.jit, static_argnums=0)
def _encode(config: PixelLMConfig, params: Any, canvases: jax.Array, sizes: jax.Array) -> Any:
    """`ImageFeatures` of uint8 canvases [B, C, C, 3]."""
    pixels = normalise_pixels(canvases, sizes)
    return PixelLM(config).apply({"params": params}, pixels, sizes, method=PixelLM.encode_image)


@partial(jax.jit, static_argnums=0)
def _point(config: PixelLMConfig, params: Any, batch: _Batch, positions: jax.Array) -> jax.Array:
    """Mask logits float32 [B, S, m, m] of the token groups at `positions` [B, S, G] of whole conversations."""
    features = _encode(config, params, batch.canvases, batch.sizes)
    model, tokens, valid = PixelLM(config), batch.tokens[:, None], batch.valid[:, None]
    hidden: Any = model.apply({"params": params}, tokens, valid, features, method=PixelLM.states)
    states: Any = model.apply({"params": params}, hidden, positions, method=PixelLM.target_states)
    return _decode(config, params, features, states)


@partial(jax.jit, static_argnums=0)
def _decode(config: PixelLMConfig, params: Any, features: ImageFeatures, states: jax.Array) -> jax.Array:
    """Mask logits float32 [B, S, m, m] from the states [B, S, G, D] of the targets' tokens."""
    masks: Any = PixelLM(config).apply({"params": params}, features, states, method=PixelLM.decode_masks)
    return masks.logits.astype(jnp.float32)
