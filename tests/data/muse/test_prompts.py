"""What a language model is asked about a picture, and what a writer makes of its reply."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pixelstory_jax.data.muse.pictures import Instance, Picture
from pixelstory_jax.data.muse.prompts import messages_for
from pixelstory_jax.data.muse.writers import ModelWriter, UnreadableReply
from pixelstory_jax.inference.language_client import AnswerError, Reply

NAMES = ("dog", "traffic light", "dog", "cup")
PICTURE = Picture(
    "a.jpg", "", 480, 640, tuple(Instance(n, n, 1, (10.4 * i, 20, 30.7, 40), 99, []) for i, n in enumerate(NAMES))
)


class Scripted:
    """Replies with `text` and keeps what it was asked."""

    name = "scripted"

    def __init__(self, text):
        self.text, self.asked = text, []

    def ask(self, messages, picture=None):
        self.asked.append((messages, picture))
        return Reply(self.text)

    def stop(self):
        pass


def test_names_boxes_and_size_are_told():
    system, user = messages_for(PICTURE, (2, 4), is_seen=True)
    assert (system.role, user.role) == ("system", "user")
    assert "640 pixels wide and 480 pixels high" in user.text and "The picture is attached." in user.text
    assert "1. dog at [0, 20, 31, 60]\n2. traffic light at [10, 20, 41, 60]\n" in user.text
    assert "Write 2 question-answer pairs." in user.text and "pair 1: 2 things; pair 2: 4 things" in user.text
    assert "You cannot see the picture" in messages_for(PICTURE, (2,), is_seen=False)[1].text


def test_writer_parses_and_asks_alike(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(b"picture")
    client = Scripted('{"pairs": [{"question": "Who?", "answer": "[The dog](1) and [the cup](4)."}]}')
    for _ in range(2):
        (pair,) = ModelWriter(client, 3, 0, (2, 10), True).write(PICTURE, file)
        assert pair.targets == (0, 3)
    assert client.asked[0] == client.asked[1] and client.asked[0][1] == b"picture"
    ModelWriter(client, 3, 0, (2, 10), False).write(PICTURE, file)
    assert client.asked[2][1] is None
    with pytest.raises(AnswerError, match="cannot be read"):
        ModelWriter(client, 3, 0, (2, 10), True).write(PICTURE, Path("nowhere.jpg"))
    with pytest.raises(UnreadableReply, match=r"a.jpg holds no pair of question and answer: 'Sorry.'"):
        ModelWriter(Scripted("Sorry."), 3, 0, (2, 10), False).write(PICTURE, file)


def test_wanted_numbers_of_targets_spread():
    client = Scripted('{"question": "Who?", "answer": "It."}')
    for seed in range(60):
        ModelWriter(client, 3, seed, (2, 10), False).write(PICTURE, Path())
    wanted = Counter(word for messages, _ in client.asked for word in messages[1].text.split() if word in "234")
    assert set(wanted) == {"2", "3", "4"} and wanted["2"] > wanted["4"] > 20
