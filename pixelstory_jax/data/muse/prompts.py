"""What a language model is told, so that it writes questions as those of MUSE were written.

The construction is that of PixelLM (section 4 of the paper): all names with boxes by their corners and the size of the
picture, and the picture itself where the model sees pictures. The words are our own.
"""

from __future__ import annotations

from collections.abc import Sequence

from pixelstory_jax.data.muse.pictures import Picture
from pixelstory_jax.inference.language_client import Message

ROLE = """\
You quiz a machine agent about pictures. The agent answers in words and outlines every thing that it mentions. You \
write questions that test how well it understands a picture, and you write the right answers."""

RULES = """\
Rules for each question:
- It needs reasoning about the picture: about purpose, action, relation, comparison or a small plan. Naming things is \
not enough.
- It is about one complete activity or situation, not several questions glued together. It is meaningful and not so \
broad that anything could be an answer.
- Its answer is made of the stated number of things of the list. It gives away neither their boxes nor their numbers.
Rules for each answer:
- It names every thing that the question asks for, and implies no other thing of the picture.
- Wherever it names one, the words that name it stand in square brackets, followed by its number in the list in \
parentheses, as [the red cup by the window](3). One number in each parentheses; each thing is named once.
- Those words describe the thing by kind, place, shape or action, so that nobody could mistake it for another one.
- It is one to three sentences of plain English. It never speaks of lists, numbers, boxes or coordinates."""

FORM = """\
Reply with JSON alone, in this form:
{"pairs": [{"question": "...", "answer": "... [words](number) ... [words](number) ..."}]}"""

SEEN = "The picture is attached."
UNSEEN = "You cannot see the picture: claim nothing that does not follow from the list."


def messages_for(picture: Picture, counts: Sequence[int], is_seen: bool) -> tuple[Message, ...]:
    """What is asked about a picture.

    Args:
      counts: for each wanted pair, the number of things in its answer.
      is_seen: whether the picture is sent along.
    """
    listed = "\n".join(
        f"{number}. {instance.name} at [{', '.join(str(round(value)) for value in _corners(instance.box))}]"
        for number, instance in enumerate(picture.instances, start=1)
    )
    wanted = "; ".join(f"pair {number}: {count} things" for number, count in enumerate(counts, start=1))
    text = (
        f"The picture is {picture.width} pixels wide and {picture.height} pixels high. {SEEN if is_seen else UNSEEN}\n"
        f"Things in it, each with left, top, right and bottom of its box:\n{listed}\n\n{RULES}\n\n"
        f"Write {len(counts)} question-answer pairs. Things in the answers: {wanted}.\n{FORM}"
    )
    return Message("system", ROLE), Message("user", text)


def _corners(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height
