"""Asking a tiny model with random weights: shapes, turns, targets, and the way from a checkpoint to files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import as_config
from pixelstory_jax.data.conversations import Turn, encode_conversation
from pixelstory_jax.data.images import fit_canvas
from pixelstory_jax.data.tokenizers import small_tokenizer
from pixelstory_jax.inference import segmenter as module
from pixelstory_jax.inference.answers import pieces_of
from pixelstory_jax.inference.decoding import Decoded
from pixelstory_jax.inference.segmenter import Segmenter
from pixelstory_jax.models.clip_vision import ClipVisionConfig
from pixelstory_jax.models.llama import LlamaConfig
from pixelstory_jax.models.pixel_decoder import PixelDecoderConfig
from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig
from tests.models.small import random_like

REPOSITORY = Path(__file__).resolve().parents[2]


def smallest(vocab: int) -> PixelLMConfig:
    """A PixelLM of the least sizes, for tests that only run it."""
    return PixelLMConfig(
        vision=ClipVisionConfig(canvas=32, patch_size=8, width=16, layers=2, heads=2, mlp_width=32),
        llama=LlamaConfig(vocab=vocab, width=16, layers=1, heads=2, kv_heads=1, mlp_width=32, max_length=256),
        decoder=PixelDecoderConfig(width=16, heads=2, mlp_width=32, iou_width=16, scales=2),
        feature_layers=(2, 1),
        image_tokens_side=2,
    )


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    tokenizer = small_tokenizer(6)
    config = smallest(tokenizer.vocab_size)
    batch = {
        "image": np.zeros((1, 32, 32, 3), np.uint8),
        "image_size": np.full((1, 2), 32, np.int32),
        "tokens": np.zeros((1, 1, 4), np.int32),
        "token_valid": np.ones((1, 1, 4), bool),
        "target_positions": np.ones((1, 1, 6), np.int32),
    }
    shapes = jax.eval_shape(PixelLM(config).init, jax.random.key(0), batch)["params"]
    return Segmenter(config, random_like(shapes), tokenizer, max_new_tokens=16)  # initialising would take longer


def scripted(segmenter: Segmenter, monkeypatch, texts: list[str]) -> None:
    """Lets the model say the given texts, with random states behind the tokens."""

    def generate(model, params, features, tokens, token_valid, *, max_new_tokens, **_):
        rows = len(tokens)
        ids = np.zeros((rows, max_new_tokens), np.int32)
        for row in range(rows):
            said = [*segmenter.tokenizer.encode(texts[min(row, len(texts) - 1)]), segmenter.tokenizer.eos_id]
            ids[row, : min(len(said), max_new_tokens)] = said[:max_new_tokens]
        states = np.random.default_rng(0).normal(size=(rows, max_new_tokens, model.config.llama.width))
        return Decoded(ids, np.zeros(rows, np.int32), states.astype(np.float32))

    monkeypatch.setattr(module, "generate", generate)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_random_model_says_what_it_generates(segmenter):
    """Nothing scripted: the words are those of the likeliest tokens after prompt and picture."""
    answer = segmenter.ask(picture(40, 20), "Where is the apple?")
    prompt = segmenter._prompt([Turn("Where is the apple?")])
    canvas, size = fit_canvas(picture(40, 20), 32)
    features = module._encode(segmenter.config, segmenter.params, canvas[None], np.array([size], np.int32))
    said: list[int] = []
    for _ in range(segmenter.max_new_tokens):
        whole = np.concatenate([prompt, said]).astype(np.int32)[None, None]
        said.append(int(next_logits(segmenter, features, whole).argmax()))
        if said[-1] == segmenter.tokenizer.eos_id:
            break
    assert answer.pieces == pieces_of(said, segmenter.tokenizer)[0]
    assert answer.text and len(set(answer.text.split())) > 1


def next_logits(segmenter: Segmenter, features, tokens: np.ndarray) -> np.ndarray:
    """Logits [vocab] of what follows tokens [1, 1, T], without a cache; T is padded, so that one length is compiled."""
    length = tokens.shape[-1]
    padded = np.pad(tokens, ((0, 0), (0, 0), (0, 64 - length)))
    valid = np.arange(64)[None, None] < length
    return np.asarray(_next_logits(segmenter.config, segmenter.params, features, padded, valid, length))


@partial(jax.jit, static_argnums=0)
def _next_logits(config, params, features, tokens, valid, length):
    model = PixelLM(config)
    hidden = model.apply({"params": params}, tokens, valid, features, method=PixelLM.states)
    return model.apply({"params": params}, hidden[0, 0, length - 1], method=PixelLM.logits)


def test_drawn_answers_follow_the_seed(segmenter):
    """One segmenter draws anew each time, two of the same seed draw the same; at temperature 0 nothing is drawn."""

    def answers(**sampling) -> list[tuple]:
        drawing = Segmenter(segmenter.config, segmenter.params, segmenter.tokenizer, max_new_tokens=16, **sampling)
        return [drawing.ask(picture(40, 20), "Where is the apple?").pieces for _ in range(2)]

    first, second = answers(temperature=2.0, seed=1)
    assert first != second
    assert answers(temperature=2.0, seed=1) == [first, second]
    assert answers(temperature=2.0, seed=2)[0] != first
    likeliest = answers(seed=1)
    assert likeliest[0] == likeliest[1] == answers(temperature=2.0, top_p=1e-6, seed=1)[0]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 256}, "max_new_tokens=256 leaves no room for a question in 256 tokens"),
        ({"max_new_tokens": 250}, "max_new_tokens=250 leaves no room"),
        ({"temperature": -1.0}, "temperature -1.0 must not be negative"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0 must be in"),
    ],
)
def test_limits_that_make_no_sense(segmenter, limits, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(segmenter.config, segmenter.params, segmenter.tokenizer, **limits)


def test_targets_come_with_phrase_mask_score_and_box(segmenter, monkeypatch):
    group = segmenter.tokenizer.group
    scripted(segmenter, monkeypatch, [f"The apple {group} ."])
    answer = segmenter.ask(picture(50, 31), "Where is the apple?")
    (target,) = answer.targets
    assert answer.text == "The apple [1]." and target.phrase == "apple" and answer.phrases == ["apple"]
    assert target.mask.shape == (50, 31) and target.mask.dtype == bool
    assert 0 <= target.score <= 1 and (target.score > 0.5) == bool(target.mask.any())


@pytest.mark.parametrize("size", [(1, 1), (20, 20_000), (3000, 2)])
def test_pictures_of_any_shape(segmenter, monkeypatch, size):
    scripted(segmenter, monkeypatch, [f"It {segmenter.tokenizer.group}"])
    (target,) = segmenter.ask(np.full((*size, 3), 90, np.uint8), "What?").targets
    assert target.mask.shape == size and np.isfinite(target.score)


def test_incomplete_groups_cost_only_themselves(segmenter, monkeypatch):
    group = segmenter.tokenizer.group
    monkeypatch.setattr(segmenter, "max_new_tokens", 40)
    scripted(segmenter, monkeypatch, [f"apple {group} and [SEG0] [SEG1] car {group} and dog [SEG0] [SEG1]"])
    answer = segmenter.ask(picture(20, 20), "What?")
    assert answer.phrases == ["apple", "car"]


def test_batches_of_different_pictures_equal_single_answers(segmenter, monkeypatch):
    monkeypatch.setattr(segmenter, "max_new_tokens", 40)
    group = segmenter.tokenizer.group
    pictures = [picture(50, 31), picture(10, 64), picture(33, 33)]
    texts = [f"apple {group}", "Nothing.", f"a {group} and b {group}"]
    scripted(segmenter, monkeypatch, texts)
    together = segmenter.ask_many(pictures, [[Turn("What?")]] * 3)
    assert [len(answer.targets) for answer in together] == [1, 0, 2]
    scripted(segmenter, monkeypatch, texts[:1])
    alone = segmenter.ask(pictures[0], "What?")
    np.testing.assert_array_equal(together[0].targets[0].mask, alone.targets[0].mask)
    np.testing.assert_allclose(together[0].targets[0].score, alone.targets[0].score, atol=1e-4)
    assert segmenter.ask_many([], []) == []


def test_generated_masks_equal_those_of_a_teacher_forced_pass(segmenter):
    """The states of generation and of one pass over prompt and answer give the same masks."""
    prompt = segmenter._prompt([Turn("Where is the apple?")])
    image = picture(32, 32)
    features = module._encode(segmenter.config, segmenter.params, image[None], np.full((1, 2), 32, np.int32))
    model = PixelLM(segmenter.config)
    generated = module.generate(
        model, segmenter.params, features, prompt[None, None], np.ones((1, 1, len(prompt)), bool),
        max_new_tokens=6, stop_ids=(),
    )  # fmt: skip
    whole = np.concatenate([prompt, np.asarray(generated.tokens)[0]])[None, None]
    hidden = model.apply({"params": segmenter.params}, whole, np.ones_like(whole, bool), features, method="states")
    states = np.asarray(hidden)[0, 0, len(prompt) - 1 : -1]
    np.testing.assert_allclose(np.asarray(generated.states)[0], states, atol=1e-4)
    cached, forced, other = (
        np.asarray(module._decode(segmenter.config, segmenter.params, features, np.asarray(kept)[None, None]))
        for kept in (generated.states[0], states, -states)
    )
    tolerance = 1e-3 * np.abs(forced).max()
    np.testing.assert_allclose(cached, forced, atol=tolerance)
    assert forced.shape == (1, 1, 16, 16) and np.abs(forced - other).max() > 10 * tolerance


def test_a_chat_sends_the_earlier_turns_along(segmenter, monkeypatch):
    scripted(segmenter, monkeypatch, [f"The apple {segmenter.tokenizer.group} ."])
    prompts = []
    original = segmenter._prompt
    monkeypatch.setattr(segmenter, "_prompt", lambda turns: prompts.append(list(turns)) or original(turns))
    chat = segmenter.chat(picture(20, 30))
    chat.ask("Where is the apple?")
    chat.ask("And what is left of it?")
    assert [len(turns) for turns in prompts] == [1, 2] and prompts[1][0].answer == ("The apple", 0, ".")
    ids = original(prompts[1]).tolist()
    codebook = list(segmenter.tokenizer.codebook_ids)
    assert sum(ids[i : i + 6] == codebook for i in range(len(ids))) == 1


def test_questions_that_cannot_be_asked(segmenter):
    with pytest.raises(ValueError, match="empty"):
        segmenter.ask(picture(9, 9), "  ")
    with pytest.raises(ValueError, match="at most"):
        segmenter.ask(picture(9, 9), "why " * 400)


@pytest.fixture(scope="module")
def workdir(segmenter, tmp_path_factory) -> Path:
    import orbax.checkpoint as ocp

    folder = tmp_path_factory.mktemp("run")
    config = ConfigDict({"objective": "pixellm", "data": {"tokenizer": "small", "style": "plain"}})
    config.model = as_config(segmenter.config)
    items = {
        "params": ocp.args.PyTreeSave(segmenter.params),
        "config": ocp.args.JsonSave(json.loads(config.to_json())),
    }
    step = folder / "checkpoints" / "best" / "7"
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(step, args=ocp.args.Composite(**items))
    return folder


def test_from_checkpoint(segmenter, workdir):
    restored = Segmenter.from_checkpoint(workdir, max_new_tokens=16)
    assert restored.config == segmenter.config
    image = picture(40, 20)
    assert restored.ask(image, "Where is the apple?").text == segmenter.ask(image, "Where is the apple?").text


def segment(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.segment", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, **options)


def test_command_writes_the_answer(workdir, tmp_path):
    Image.fromarray(picture(30, 50)).convert("CMYK").save(tmp_path / "photo.jpg")
    out = tmp_path / "out"
    done = segment(
        f"--checkpoint={workdir}", f"--image={tmp_path / 'photo.jpg'}", "--question=What is it?", "--question=And now?",
        f"--out={out}", "--max_tokens=8", "--temperature=0.7", "--top_p=0.9", "--seed=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads((out / "answer.json").read_text())
    assert [turn["question"] for turn in written["turns"]] == ["What is it?", "And now?"] and written["size"] == [
        30,
        50,
    ]
    assert Image.open(out / "overlay.png").width >= 480
    chat = segment(
        f"--checkpoint={workdir}", f"--image={tmp_path / 'photo.jpg'}", f"--out={out}", "--max_tokens=8",
        input="Is there a dog?\n\n",
    )  # fmt: skip
    assert chat.returncode == 0 and "Written:" in chat.stdout, chat.stderr
    assert len(json.loads((out / "answer.json").read_text())["turns"]) == 1


def cut_in_half(workdir: Path, copy: Path) -> Path:
    """A copy of a run whose files of arrays lost their second halves."""
    shutil.copytree(workdir, copy)
    arrays = [path for path in copy.rglob("params/**/d/*") if path.is_file()]
    for path in arrays:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert arrays
    return copy


def test_command_errors_are_one_sentence(workdir, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    Image.fromarray(picture(8, 8)).save(tmp_path / "good.png")
    good = f"--image={tmp_path / 'good.png'}"
    cut = cut_in_half(workdir, tmp_path / "cut")
    for arguments, word in (
        ((f"--checkpoint={workdir}", f"--image={tmp_path / 'broken.jpg'}", "--question=a"), "broken.jpg"),
        ((f"--checkpoint={workdir}", "--image=x.png", "--question=a"), "x.png"),
        ((f"--checkpoint={tmp_path / 'none'}", good, "--question=a"), f"{tmp_path / 'none'}"),
        ((f"--checkpoint={cut}", good, "--question=a"), f"{cut}"),
        ((f"--checkpoint={workdir}", good, "--question=a", "--max_tokens=600"), "leaves no room for a question"),
        ((f"--checkpoint={workdir}", good, "--question=a", "--top_p=2"), "top_p 2.0 must be in"),
        (("--image=x.png",), "--checkpoint is needed"),
    ):
        done = segment(*arguments)
        assert done.returncode == 2 and word in done.stderr
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr


def test_pointing_at_given_answers_equals_a_pass_over_the_whole(segmenter):
    """Each in a batch of two pictures; the masks of earlier turns are left out."""
    answers = [("The apple ", 0, " and the car ", 1, "."), (0, ".")]
    conversations = [
        [Turn("Where?", answers[0])],
        [Turn("Before that?", ("It is ", 0, ".")), Turn("And now, at last, where?", answers[1])],
    ]
    pictures = [picture(32, 32), picture(20, 30)]
    model, params = PixelLM(segmenter.config), segmenter.params
    raw = segmenter.point_raw(pictures, conversations)
    for image, turns, answer, given in zip(pictures, conversations, raw, answers, strict=True):
        encoded = encode_conversation(turns, segmenter.tokenizer, segmenter.config.image_tokens, segmenter.style)
        canvas, size = fit_canvas(image, 32)
        features = module._encode(segmenter.config, params, canvas[None], np.array(size)[None])
        ids = encoded.ids[None, None]
        hidden = model.apply({"params": params}, ids, np.ones_like(ids, bool), features, method="states")
        last = encoded.group_starts[encoded.target_turns == len(turns) - 1]
        positions = last[:, None] + np.arange(6)
        states = np.asarray(hidden)[0, 0, positions - 1]
        expected = np.asarray(module._decode(segmenter.config, params, features, states[None]))[0]
        assert answer.pieces == given and answer.logits.shape == (len(last), 16, 16)
        np.testing.assert_allclose(answer.logits, expected, atol=1e-3 * np.abs(expected).max())
    masks = [target.mask for target in segmenter.point_at(pictures, conversations)[1].targets]
    np.testing.assert_array_equal(masks, raw[1].picture_logits((20, 30)) > 0)
    with pytest.raises(ValueError, match="no answer"):
        segmenter.point_at(pictures[:1], [[Turn("Where?")]])
