"""The words of the questions and answers: templates, group and attribute phrases, lists and articles.

Placeholders of the templates: {a} a name after its indefinite article ("an apple", "scissors"), {c} the bare name,
{be} is or are, {it} it or them, {list} a list of names with "the", {s} and {p} singular and plural of a group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pixelstory_jax.data.builtin.things import Thing

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# The first four are those of PixelLM's segmentation data, the rest everyday ones.
ONE = (
    "Can you segment the {c} in this image?",
    "Please segment the {c} in this image.",
    "What {be} the {c} in this image? Please respond with segmentation mask.",
    "What {be} the {c} in this image? Please output segmentation mask.",
    "Where {be} the {c}?",
    "Where can I see the {c}?",
    "Show me the {c}.",
    "Find the {c}.",
    "Mark the {c} in the picture.",
    "Which part of the picture shows the {c}?",
    "I am looking for the {c}.",
    "Point out the {c}, please.",
    "Segment the {c}.",
)
YES_NO = (
    "{Be} there {a} in this picture?",
    "Can you see {a} here?",
    "Do you see {a}?",
)
SEVERAL = (
    "Can you segment {list} in this image?",
    "Please segment {list}.",
    "Where are {list}?",
    "Show me {list}.",
    "Find {list}.",
    "Mark {list} in the picture.",
    "I am looking for {list}.",
    "Point out {list}, please.",
    "Give me masks of {list}.",
)
CATEGORY = (
    "Which of these are {p}?",
    "What {p} are in this picture?",
    "Segment all the {p}.",
    "Show me every {s}.",
    "Find all the {p} in this image.",
    "Mark each {s}.",
    "Where are the {p}?",
    "Can you segment the {p} in this image?",
    "Point out every {s}, please.",
    "Please segment all {p}.",
)
COLOUR = (
    "Which things are {colour}?",
    "Show me everything {colour}.",
    "What here is {colour}?",
    "Segment all {colour} things.",
    "Find the {colour} things.",
)
COUNT = (
    "How many {p} are there?",
    "How many {p} can you see?",
    "How many {p} are in this picture?",
    "Count the {p}.",
    "Can you count the {p}?",
    "Please count all the {p} in this image.",
    "What is the number of {p} here?",
    "How many {p} do you see here?",
)
RELATION: dict[str, tuple[str, ...]] = {
    "left": (
        "What is to the left of the {c}?",
        "What do you see left of the {c}?",
        "Segment everything to the left of the {c}.",
    ),
    "right": (
        "What is to the right of the {c}?",
        "What do you see right of the {c}?",
        "Segment everything to the right of the {c}.",
    ),
    "above": (
        "What is above the {c}?",
        "What do you see higher than the {c}?",
        "Segment everything above the {c}.",
    ),
    "below": (
        "What is below the {c}?",
        "What do you see lower than the {c}?",
        "Segment everything below the {c}.",
    ),
    "nearest": (
        "What is nearest to the {c}?",
        "Which thing is closest to the {c}?",
        "Segment the nearest neighbour of the {c}.",
    ),
    "largest": ("Which thing is the largest?", "What is the biggest thing here?", "Segment the largest thing."),
    "smallest": ("Which thing is the smallest?", "What is the smallest thing here?", "Segment the smallest thing."),
    "leftmost": ("Which thing is farthest to the left?", "What is the leftmost thing?"),
    "rightmost": ("Which thing is farthest to the right?", "What is the rightmost thing?"),
    "highest": ("Which thing is at the top?", "What is the highest thing in the picture?"),
    "lowest": ("Which thing is at the bottom?", "What is the lowest thing in the picture?"),
}
FOLLOW_RELATION: dict[str, tuple[str, ...]] = {
    "left": ("What is to the left of {it}?", "And what is left of {it}?"),
    "right": ("What is to the right of {it}?", "And what is right of {it}?"),
    "above": ("What is above {it}?", "And what is higher than {it}?"),
    "below": ("What is below {it}?", "And what is lower than {it}?"),
    "nearest": ("What is nearest to {it}?", "And which thing is closest to {it}?"),
}
FOLLOW_SUPERLATIVE: dict[str, tuple[str, ...]] = {
    "largest": ("And which of these is the largest?", "Which one of them is the biggest?", "Now only the largest one."),
    "smallest": (
        "And which of these is the smallest?",
        "Which one of them is the smallest?",
        "Now only the smallest one.",
    ),
    "leftmost": ("Which of them is farthest to the left?", "Now only the leftmost one."),
    "rightmost": ("Which of them is farthest to the right?", "Now only the rightmost one."),
}
FOLLOW_COLOUR = ("Now only the {colour} one.", "And which of them is {colour}?")
FOLLOW_NAME = ("And the {c}?", "What about the {c}?", "Now the {c}, please.", "And where {be} the {c}?")

# The list of a wordy answer, with the share of answers that use it. The short form is the most frequent one.
ANSWERS = (("{list}.", 0.5), ("{It_is} {list}.", 0.3), ("Here {be} {list}.", 0.2))
YES_ANSWERS = (("Yes, {list}.", 0.7), ("Yes, here {be} {list}.", 0.3))
COUNT_ANSWERS = (("There {be} {number}: {list}.", 0.5), ("{Number}: {list}.", 0.3), ("I count {number}: {list}.", 0.2))
ABSENT_ANSWERS = (("There {be} no {c} in this picture.", 0.6), ("There {be} no {c} here.", 0.4))

# Singular and plural of the groups that are asked for. "household" and "stationery" are too vague to ask.
GROUPS: dict[str, tuple[str, str]] = {
    "animal": ("animal", "animals"),
    "ball": ("ball", "balls"),
    "bird": ("bird", "birds"),
    "boat": ("boat", "boats"),
    "building": ("building", "buildings"),
    "clothing": ("piece of clothing", "clothes"),
    "electronics": ("electronic device", "electronic devices"),
    "farm animal": ("farm animal", "farm animals"),
    "flower": ("flower", "flowers"),
    "food": ("food item", "food items"),
    "fruit": ("fruit", "fruits"),
    "furniture": ("piece of furniture", "pieces of furniture"),
    "hat": ("hat", "hats"),
    "insect": ("insect", "insects"),
    "instrument": ("musical instrument", "musical instruments"),
    "kitchenware": ("piece of kitchenware", "pieces of kitchenware"),
    "plant": ("plant", "plants"),
    "reptile": ("reptile", "reptiles"),
    "sea animal": ("sea animal", "sea animals"),
    "shoe": ("shoe", "shoes"),
    "sport": ("piece of sports equipment", "pieces of sports equipment"),
    "sweet": ("sweet treat", "sweet treats"),
    "tool": ("tool", "tools"),
    "toy": ("toy", "toys"),
    "vegetable": ("vegetable", "vegetables"),
    "vehicle": ("vehicle", "vehicles"),
}
# Attribute: questions, and the answer where nothing in the picture has it.
ATTRIBUTES: dict[str, tuple[tuple[str, ...], str]] = {
    "edible": (
        (
            "What here could you eat?",
            "Which of these can be eaten?",
            "Show me everything edible.",
            "What is food here?",
        ),
        "There is nothing to eat here.",
    ),
    "flies": (
        (
            "What here can fly?",
            "Which of these can fly?",
            "Show me everything that flies.",
            "Segment all that can fly.",
        ),
        "Nothing here can fly.",
    ),
    "has_wheels": (
        ("What here has wheels?", "Which of these have wheels?", "Show me everything with wheels."),
        "Nothing here has wheels.",
    ),
    "lives_in_water": (
        ("What here lives in water?", "Which of these live in the sea?", "Show me all that lives in water."),
        "Nothing here lives in water.",
    ),
    "has_legs": (
        ("What here has legs?", "Which of these have legs?", "Show me everything with legs."),
        "Nothing here has legs.",
    ),
    "is_worn": (
        ("What here could you wear?", "Which of these can be worn?", "Show me everything that people wear."),
        "There is nothing to wear here.",
    ),
    "makes_music": (
        ("What here makes music?", "Which of these could you play music on?", "Show me all that makes music."),
        "Nothing here makes music.",
    ),
    "is_electric": (
        ("What here needs electricity?", "Which of these need electric power?", "Show me all that needs electricity."),
        "Nothing here needs electricity.",
    ),
    "grows": (
        (
            "What here grows in soil or on a plant?",
            "Which of these grow in soil or on a plant?",
            "Show me all that grows in soil or on a plant.",
        ),
        "Nothing here grows.",
    ),
}


def counted(group: str) -> str:
    """The plural of a group after a number: clothes cannot be counted, pieces of clothing can."""
    return "pieces of clothing" if group == "clothing" else GROUPS[group][1]


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def pick_weighted(rng: np.random.Generator, choices: Sequence[tuple[str, float]]) -> str:
    return choices[int(rng.choice(len(choices), p=[weight for _, weight in choices]))][0]


def be(thing: Thing) -> str:
    return "are" if thing.is_plural else "is"


def fill(template: str, thing: Thing) -> str:
    """A template about one thing."""
    verb = be(thing)
    return template.format(
        c=thing.name,
        a=f"any {thing.name}" if not thing.article else thing.with_article,
        be=verb,
        Be=verb.capitalize(),
        it="them" if thing.is_plural else "it",
    )


def listed(parts: Sequence[str]) -> str:
    """ "the apple", "the apple and the car", "the apple, the car and the dog"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def with_slots(frame: str, things: Sequence[Thing], targets: Sequence[int], **words: str) -> tuple[str | int, ...]:
    """Fills an answer frame: its {list} becomes the names, each followed by its object index as the slot.

    Args:
      frame: an answer template with {list} and the words {be}, {It_is}.
      things: the things named, in the order of the answer.
      targets: object index of each.
    """
    plural = len(things) > 1 or things[0].is_plural
    if not frame.startswith(("There", "I count", "{Number}")):
        words = {"be": "are" if plural else "is", **words}
    words = {"It_is": "They are" if plural else "It is", **words}
    names = listed([f"the {thing.name} \0" for thing in things])
    text = frame.format(list=names, **words)
    text = text[0].upper() + text[1:]
    pieces = text.split("\0")
    answer: list[str | int] = [pieces[0]]
    for target, piece in zip(targets, pieces[1:], strict=True):
        answer += [target, piece]
    return tuple(answer)


def plain(answer: Sequence[str | int]) -> str:
    """The answer in words only, with the spaces that the slots leave behind removed."""
    text = "".join(piece for piece in answer if isinstance(piece, str))
    return re.sub(r"\s+([.,:;!?])", r"\1", re.sub(r"\s{2,}", " ", text)).strip()
