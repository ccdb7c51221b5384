"""Questions and answers about one picture, as the token ids, labels and target positions that the objective reads.

A conversation is written as PixelLM and LLaVA v1 do, or as LLaVA with the chat models of LLaMA-2 does:

    {system} USER: <im_start><image><im_end>\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: ...

    [INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n<im_start><image><im_end>\\n{question} [/INST] {answer} </s><s>[INST] ...

`<image>` becomes as many placeholders as the language model gets image tokens. Every target of an answer is written
as one group of codebook tokens. Source of the formats: PixelLM's `model/llava/conversation.py` (`llava_v1` and
`llava_llama_2`) and `utils/utils.py` (released code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixelstory_jax.data.tokenizers import IMAGE_END, IMAGE_START, IMAGE_TOKEN, Tokenizer, find_groups

IGNORE = -100  # label of a position that is not trained


@dataclass(frozen=True)
class Style:
    """What stands around questions and answers.

    Attributes:
      first: before the picture and the first question; later: before each further question.
      asked: behind a question; answered: behind an answer, before the end of sequence.
      opens_turns: whether a beginning of sequence stands before each turn and not before the first one only.
    """

    first: str
    later: str
    asked: str
    answered: str = ""
    opens_turns: bool = False


STYLES = {
    "plain": Style(first="USER: ", later="USER: ", asked=" ASSISTANT:"),
    "llava_v1": Style(
        first="A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions. USER: ",
        later="USER: ",
        asked=" ASSISTANT:",
    ),
    "llava_llama_2": Style(
        first="[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural language.\n"
        "<</SYS>>\n\n",
        later="[INST] ",
        asked=" [/INST]",
        answered=" ",
        opens_turns=True,
    ),
}


@dataclass(frozen=True)
class Turn:
    """One question with its answer; `answer` holds text and target numbers (an int stands for that target's token
    group).

    `answer` is None where the model is to answer.
    """

    question: str
    answer: tuple[str | int, ...] | None = None


@dataclass(frozen=True)
class EncodedConversation:
    """ids [T] int32 with image placeholders expanded; labels [T]; group_starts, targets and target_turns [K]: where
    each target's group begins, which target it stands for and in the answer of which turn; turns: how many there are.
    """

    ids: np.ndarray
    labels: np.ndarray
    group_starts: np.ndarray
    targets: np.ndarray
    target_turns: np.ndarray
    turns: int


def answer_text(answer: Sequence[str | int], tokenizer: Tokenizer) -> str:
    """The answer with every target written as its token group."""
    return "".join(f" {tokenizer.group} " if isinstance(part, int) else part for part in answer)


def encode_conversation(
    turns: Sequence[Turn], tokenizer: Tokenizer, image_tokens: int, style: str = "plain"
) -> EncodedConversation:
    """Encodes a conversation in one of `STYLES`; the last turn may lack its answer (a prompt to generate from).

    Labels cover the answers and their end-of-sequence tokens only.

    Raises:
      ValueError: an answer's targets and its token groups disagree (for example codebook names inside a question's
        text).
    """
    around = STYLES[style]
    ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    targets: list[int] = []
    target_turns: list[int] = []
    for number, turn in enumerate(turns):
        prompt = [tokenizer.bos_id] if number == 0 or around.opens_turns else []
        if number == 0:
            prompt += tokenizer.encode(around.first + IMAGE_START)
            prompt += [IMAGE_TOKEN] * image_tokens
            prompt += tokenizer.encode(f"{IMAGE_END}\n{turn.question}{around.asked}")
        else:
            prompt += tokenizer.encode(f"{around.later}{turn.question}{around.asked}")
        ids += prompt
        labels += [IGNORE] * len(prompt)
        if turn.answer is None:
            break
        answer = [*tokenizer.encode(answer_text(turn.answer, tokenizer) + around.answered), tokenizer.eos_id]
        found = find_groups(answer, tokenizer.codebook_ids)
        wanted = [part for part in turn.answer if isinstance(part, int)]
        if len(found) != len(wanted):
            raise ValueError(f"the answer {turn.answer!r} has {len(wanted)} targets but {len(found)} token groups")
        starts += [len(ids) + start for start in found]
        targets += wanted
        target_turns += [number] * len(wanted)
        ids += answer
        labels += answer
    return EncodedConversation(
        np.asarray(ids, np.int32),
        np.asarray(labels, np.int32),
        np.asarray(starts, np.int32),
        np.asarray(targets, np.int32),
        np.asarray(target_turns, np.int32),
        len(turns),
    )


def pad_conversations(
    conversations: Sequence[EncodedConversation], rows: int, length: int, slots: int, group: int, masks: np.ndarray
) -> dict[str, np.ndarray]:
    """Static arrays of one picture's conversations: one with targets that does not fit whole is left out.

    One of words alone is cut at the end of its row, as the released code does with all; it is left out where no word of
    an answer would remain.

    Args:
      rows, length, slots: Q conversations of T tokens with S targets in all.
      group: G codebook tokens per target.
      masks: uint8 [M, C, C], indexed by the conversations' targets.

    Returns:
      tokens, token_valid, labels [Q, T]; target_positions [S, G]; target_question, target_valid [S]; target_masks [S,
      C, C]. target_question numbers the turns of all conversations in a row, so that targets share a number exactly
      where they belong to one answer.
    """
    out = {
        "tokens": np.zeros((rows, length), np.int32),
        "token_valid": np.zeros((rows, length), bool),
        "labels": np.full((rows, length), IGNORE, np.int32),
        "target_positions": np.ones((slots, group), np.int32),  # 1, not 0: the state read lies one position earlier
        "target_question": np.zeros(slots, np.int32),
        "target_valid": np.zeros(slots, bool),
        "target_masks": np.zeros((slots, *masks.shape[1:]), np.uint8),
    }
    row = slot = question = 0
    for conversation in conversations:
        size, count = len(conversation.ids), len(conversation.targets)
        if not count and (conversation.labels[:length] != IGNORE).any():
            size = min(size, length)
        if row == rows or size > length or slot + count > slots:
            continue
        out["tokens"][row, :size] = conversation.ids[:size]
        out["token_valid"][row, :size] = True
        out["labels"][row, :size] = conversation.labels[:size]
        here = slice(slot, slot + count)
        out["target_positions"][here] = row * length + conversation.group_starts[:, None] + np.arange(group)
        out["target_question"][here] = question + conversation.target_turns
        out["target_valid"][here] = True
        out["target_masks"][here] = masks[conversation.targets]
        row, slot, question = row + 1, slot + count, question + conversation.turns
    return out
