"""Prompt text, labels and target positions of conversations; PixelLM's format (docs of its released code)."""

from __future__ import annotations

import numpy as np
import pytest

from pixelstory_jax.data.conversations import (
    IGNORE,
    STYLES,
    Turn,
    answer_text,
    encode_conversation,
    pad_conversations,
)
from pixelstory_jax.data.tokenizers import IMAGE_TOKEN, Tokenizer, small_tokenizer

IMAGE_TOKENS = 9
FIRST = Turn("Where are the cup and the dog?", ("The cup ", 1, " and the dog ", 0, "."))
SECOND = Turn("What is left of it?", ("It is the bird ", 3, "."))
ABSENT = Turn("Where is the boat?", ("There is no boat.",))


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(6)


def encode(turns, tokenizer, style="plain"):
    return encode_conversation(turns, tokenizer, IMAGE_TOKENS, style)


def text_of(encoded, tokenizer):
    return tokenizer.decode(encoded.ids)


def test_prompt_text_of_llava_v1(tokenizer):
    text = text_of(encode([Turn("Where is the cup?")], tokenizer, "llava_v1"), tokenizer)
    assert text == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <im_start> <im_end> Where is the cup? ASSISTANT:"
    )
    assert text.startswith(STYLES["llava_v1"].first)


def written(encoded) -> str:
    """The text letter by letter, with all marks; white space beside added tokens is dropped by the tokenizer."""
    names = {1: "<s>", 2: "</s>", IMAGE_TOKEN: "#", **{id_: name for name, id_ in SPELLING.added.items()}}
    return "".join(names[id_] if id_ in names else chr(id_) for id_ in encoded.ids.tolist())


SPELLING = Tokenizer(
    lambda text: [ord(letter) for letter in text],
    str,
    128,
    {"<im_start>": 500, "<im_end>": 501, "[SEG]": 502},
    ("[SEG]",),
)


def test_exact_text_of_both_styles_of_llava():
    turns = [Turn("Where is the cup?", ("The cup ", 0, " is here.")), Turn("And the dog?", ("Gone.",)), Turn("Why?")]
    assert written(encode_conversation(turns, SPELLING, 3, "llava_llama_2")) == (
        f"<s>[INST] <<SYS>>\n{SYSTEM_OF_LLAMA_2}\n<</SYS>><im_start>###<im_end>Where is the cup? [/INST]"
        "The cup[SEG]is here. </s><s>[INST] And the dog? [/INST]Gone. </s><s>[INST] Why? [/INST]"
    )
    assert written(encode_conversation(turns, SPELLING, 3, "llava_v1")) == (
        f"<s>{STYLES['llava_v1'].first.strip()}<im_start>###<im_end>Where is the cup? ASSISTANT:"
        "The cup[SEG]is here.</s>USER: And the dog? ASSISTANT:Gone.</s>USER: Why? ASSISTANT:"
    )


SYSTEM_OF_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def reference_string(turns, tokenizer) -> str:
    """The whole text by the rules of LLaVA's `SeparatorStyle.LLAMA_2`: messages wrapped one by one, joined by marks."""
    text = ""
    for number, turn in enumerate(turns):
        message = f"<image>\n{turn.question}" if number == 0 else turn.question
        system = f"<<SYS>>\n{SYSTEM_OF_LLAMA_2}\n<</SYS>>\n\n" if number == 0 else ""
        text += f"<s>[INST] {system}{message} [/INST] {answer_text(turn.answer, tokenizer)} </s>"
    return text.lstrip("<s>")  # as written there: it strips these three letters


def reference_rounds(text, tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels by LISA's `collate_fn`: the instruction of each round, up to "[/INST] ", is masked."""
    ids, labels = [tokenizer.bos_id], [IGNORE]
    for number, written in enumerate(text.removesuffix("</s>").split("</s>")):
        if number:
            assert written.startswith("<s>")
            ids.append(tokenizer.bos_id)
            labels.append(IGNORE)
        instruction, answer = written.removeprefix("<s>").split("[/INST] ")
        before, _, after = instruction.rpartition("<image>")
        asked = tokenizer.encode(before + "<im_start>") + [IMAGE_TOKEN] * IMAGE_TOKENS if before else []
        asked += tokenizer.encode(("<im_end>" if before else "") + after + "[/INST]")
        ids += [*asked, *tokenizer.encode(answer), tokenizer.eos_id]
        labels += [IGNORE] * len(asked) + [*tokenizer.encode(answer), tokenizer.eos_id]
    return ids, labels


@pytest.mark.parametrize("turns", [[FIRST], [FIRST, SECOND], [ABSENT, FIRST, SECOND]])
def test_llava_llama_2_follows_the_string_rules_of_the_reference(turns, tokenizer):
    text = reference_string(turns, tokenizer)
    assert text.startswith("[INST] <<SYS>>\nYou are a helpful") and text.endswith(" </s>")
    assert text.count("</s><s>[INST] ") == len(turns) - 1
    encoded = encode(turns, tokenizer, "llava_llama_2")
    ids, labels = reference_rounds(text, tokenizer)
    assert encoded.ids.tolist() == ids and encoded.labels.tolist() == labels
    assert encoded.ids.tolist().count(tokenizer.bos_id) == encoded.ids.tolist().count(tokenizer.eos_id) == len(turns)
    for start in encoded.group_starts:
        assert tuple(encoded.ids[start : start + 6]) == tokenizer.codebook_ids


def test_prompt_text_of_plain(tokenizer):
    assert text_of(encode([Turn("Where is the cup?")], tokenizer), tokenizer) == (
        "USER: <im_start> <im_end> Where is the cup? ASSISTANT:"
    )


def test_ids_piece_by_piece(tokenizer):
    """One beginning of sequence, the image between its markers, the answer and its end directly behind the colon."""
    group = list(tokenizer.codebook_ids)
    expected = [
        tokenizer.bos_id,
        *tokenizer.encode("USER:"),
        tokenizer.image_start_id,
        *[IMAGE_TOKEN] * IMAGE_TOKENS,
        tokenizer.image_end_id,
        *tokenizer.encode("Where are the cup and the dog? ASSISTANT:"),
        *tokenizer.encode("The cup"),
        *group,
        *tokenizer.encode("and the dog"),
        *group,
        *tokenizer.encode("."),
        tokenizer.eos_id,
        *tokenizer.encode("USER: What is left of it? ASSISTANT:"),
        *tokenizer.encode("It is the bird"),
        *group,
        *tokenizer.encode("."),
        tokenizer.eos_id,
    ]
    ids = encode([FIRST, SECOND], tokenizer).ids
    # The blank behind "USER:" belongs to the word boundary of the image marker and vanishes.
    assert ids.tolist() == expected and ids.dtype == np.int32


def test_image_placeholders_are_contiguous_and_of_the_right_number(tokenizer):
    encoded = encode([FIRST, SECOND], tokenizer)
    places = np.flatnonzero(encoded.ids == IMAGE_TOKEN)
    assert len(places) == IMAGE_TOKENS and places[-1] - places[0] == IMAGE_TOKENS - 1
    assert encoded.ids[places[0] - 1] == tokenizer.image_start_id
    assert encoded.ids[places[-1] + 1] == tokenizer.image_end_id


def test_labels_cover_answers_and_their_ends_only(tokenizer):
    encoded = encode([FIRST, SECOND], tokenizer, "llava_v1")
    supervised = encoded.labels != IGNORE
    assert (encoded.labels[supervised] == encoded.ids[supervised]).all()
    runs = np.split(encoded.labels, np.flatnonzero(np.diff(supervised)) + 1)
    answers = [run.tolist() for run in runs if run[0] != IGNORE]
    expected = [[*tokenizer.encode(answer_text(t.answer, tokenizer)), tokenizer.eos_id] for t in (FIRST, SECOND)]
    assert answers == expected
    assert encoded.labels[0] == IGNORE


def test_prompts_to_generate_from_hold_no_labels_and_no_end(tokenizer):
    whole, prompt = encode([FIRST, SECOND], tokenizer), encode([FIRST, Turn(SECOND.question)], tokenizer)
    size = len(prompt.ids)
    assert (whole.ids[:size] == prompt.ids).all()
    assert whole.labels[size] != IGNORE and whole.labels[size - 1] == IGNORE
    assert prompt.ids[-1] != tokenizer.eos_id and prompt.targets.tolist() == [1, 0]
    alone = encode([Turn("Where is the cup?")], tokenizer)
    assert (alone.labels == IGNORE).all() and alone.group_starts.size == 0


def test_groups_and_their_targets(tokenizer):
    encoded = encode([FIRST, SECOND], tokenizer)
    assert encoded.targets.tolist() == [1, 0, 3]
    assert encoded.target_turns.tolist() == [0, 0, 1] and encoded.turns == 2
    for start in encoded.group_starts:
        assert tuple(encoded.ids[start : start + 6]) == tokenizer.codebook_ids
    before = tokenizer.decode(encoded.ids[: encoded.group_starts[2]])
    assert before.endswith("It is the bird")


def test_answers_without_targets(tokenizer):
    encoded = encode([ABSENT], tokenizer)
    assert encoded.targets.size == 0 and encoded.group_starts.size == 0
    assert (encoded.labels != IGNORE).sum() == len(tokenizer.encode("There is no boat.")) + 1


def test_codebook_names_written_as_text_are_refused(tokenizer):
    with pytest.raises(ValueError, match="has 1 targets but 2 token groups"):
        encode([Turn("Where?", (f"It {tokenizer.group} or ", 0, "."))], tokenizer)


def padded(conversations, rows=3, length=64, slots=4):
    masks = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((1, 5, 5), np.uint8)
    return pad_conversations(conversations, rows, length, slots, 6, masks)


def test_padded_rows(tokenizer):
    conversations = [encode([FIRST], tokenizer), encode([SECOND], tokenizer), encode([ABSENT], tokenizer)]
    batch = padded(conversations)
    flat = batch["tokens"].reshape(-1)
    assert batch["target_valid"].tolist() == [True, True, True, False]
    assert batch["target_question"].tolist()[:3] == [0, 0, 1]
    for slot in range(3):
        positions = batch["target_positions"][slot]
        assert tuple(flat[positions]) == tokenizer.codebook_ids
        assert positions[0] // 64 == [0, 0, 1][slot]
    assert (batch["target_positions"][3] == 1).all()
    assert [int(mask[0, 0]) for mask in batch["target_masks"]] == [1, 0, 3, 0]
    for row, conversation in enumerate(conversations):
        size = len(conversation.ids)
        assert (batch["tokens"][row, :size] == conversation.ids).all()
        assert batch["token_valid"][row].sum() == size and batch["token_valid"][row, :size].all()
        assert (batch["labels"][row, size:] == IGNORE).all()


def test_what_does_not_fit_is_left_out_whole(tokenizer):
    long, short = encode([FIRST, SECOND], tokenizer), encode([ABSENT], tokenizer)
    batch = padded([long, short], length=len(long.ids) - 1)
    assert (batch["tokens"][0, : len(short.ids)] == short.ids).all()  # the next one takes its row
    assert not batch["target_valid"].any() and not batch["token_valid"][1].any()
    exact = padded([long, short], length=len(long.ids))
    assert exact["target_valid"].sum() == 3 and exact["token_valid"][0].all()


def test_words_alone_are_cut(tokenizer):
    talk = encode([ABSENT, ABSENT], tokenizer)
    begins = int(np.flatnonzero(talk.labels != IGNORE)[0])
    batch = padded([talk], length=begins + 1)
    assert batch["token_valid"][0].all() and (batch["tokens"][0] == talk.ids[: begins + 1]).all()
    assert (batch["labels"][0] == talk.labels[: begins + 1]).all()
    assert not padded([talk], length=begins)["token_valid"].any()  # nothing to learn would be left


def test_rows_and_slots_are_limits(tokenizer):
    two, one = encode([FIRST], tokenizer), encode([SECOND], tokenizer)
    batch = padded([two, two, one], slots=3)  # the second would need slots 2 and 3
    assert batch["target_valid"].tolist() == [True, True, True]
    assert batch["target_question"].tolist() == [0, 0, 1]
    assert padded([one, one, one, one], rows=2)["target_valid"].sum() == 2


def test_every_answer_has_a_number_of_its_own(tokenizer):
    """Refinement looks for overlap within an answer: a second turn must not meet the masks of the first."""
    talk, absent, one = (
        encode([FIRST, SECOND], tokenizer),
        encode([ABSENT, SECOND], tokenizer),
        encode([SECOND], tokenizer),
    )
    batch = padded([talk, absent, one], length=100, slots=6)
    assert batch["target_question"].tolist() == [0, 0, 1, 3, 4, 0]
    assert batch["target_valid"].sum() == 5
    assert [int(positions[0]) // 100 for positions in batch["target_positions"][:5]] == [0, 0, 0, 1, 2]
    # One that is left out takes no numbers.
    assert padded([talk, talk, one], length=100)["target_question"].tolist() == [0, 0, 1, 2]


def test_nothing_at_all_gives_an_empty_example(tokenizer):
    batch = padded([])
    assert not batch["token_valid"].any() and (batch["labels"] == IGNORE).all() and not batch["target_masks"].any()
