"""Wordings of the questions that are written by rules: (question, answer).

In an answer {and} and {or} are lists of mentions joined so, {And} and {Or} the same at the start of a sentence, {be} is
"is" or "are" as that list needs it; {and1}, {or2}, {be2} are those of the first and of the second list. In a question
{and} and {or} list, without mentions, what is to be chosen from.
"""

from __future__ import annotations

Wordings = tuple[tuple[str, str], ...]

FACTS: dict[str, Wordings] = {
    "alive": (
        ("Who or what in this picture is alive and would need water before long?", "{And} {be} alive and need water."),
        ("Which beings in this picture grow and age?", "{And} {be} alive, so they grow and age."),
    ),
    "animal": (
        ("A zoologist studies this picture. What would be of interest for the work?", "{And} {be} animals."),
        ("What in this picture could a vet be asked to look after?", "A vet could look after {and}."),
        ("Which animals would run off or fly off if there were a loud bang?", "{And} could take fright."),
    ),
    "edible": (
        ("Someone comes home hungry. What in this picture could they eat?", "They could eat {or}."),
        ("A lunch is packed from what is here. What goes into the box?", "{And} {be} food, so they go into the box."),
        ("What in this picture should be eaten before it spoils?", "{And} {be} food and will not keep forever."),
    ),
    "vehicle": (
        ("Which things here are built to take somebody from place to place?", "{And} {be} made to travel with."),
        ("What in this picture needs somebody to steer it before it goes anywhere?", "Somebody has to steer {and}."),
    ),
    "motor": (
        ("What in this picture could be heard starting its engine?", "One could hear the engines of {and}."),
        ("Which things here move by the force of an engine?", "{And} {be} driven by engines."),
    ),
    "has_wheels": (
        ("What in this picture could roll down a slope on its own wheels?", "{And} have wheels and could roll."),
        ("Which things here would stand still if their wheels were taken off?", "{And} need their wheels to move."),
    ),
    "flies": (
        ("What in this picture can be up in the air without falling down?", "{And} can fly."),
        ("Which of the things here could pass over a high wall without touching it?", "{And} could fly over it."),
    ),
    "electric": (
        (
            "A child asks what electricity is good for. What in this picture could serve as an example?",
            "{And} work by electricity.",
        ),
        ("Which things here have to be plugged in, charged or given batteries?", "{And} run on electricity."),
    ),
    "worn": (
        ("Somebody is getting dressed. What in this picture could they put on?", "They could put on {and}."),
        ("Which things here are made to be worn on the body?", "{And} {be} made to be worn."),
    ),
    "sport": (
        ("Which things in this picture would a sports shop sell?", "A sports shop would sell {and}."),
        ("A team is packing its sports equipment. What would it take from here?", "It would take {and}."),
    ),
    "sit_on": (
        ("Someone is tired from a long walk. What could they sit down on?", "They could sit down on {or}."),
        ("Visitors have come and are still standing. Which seats can be offered to them?", "They can sit on {or}."),
    ),
    "drink_from": (
        ("There is fresh lemonade. What in this picture could people drink it from?", "They could use {or}."),
        ("Someone is thirsty. What here could hold a drink for them?", "{And} can hold a drink."),
    ),
    "carry_in": (
        ("Somebody is packing for a trip. What could they carry their things in?", "They could use {or}."),
        ("Where in this picture would you look for a lost purse first?", "It could be inside {or}."),
    ),
    "screen": (
        (
            "Someone wants to watch a film. What in this picture could show it?",
            "{And} have a screen that could show it.",
        ),
        ("Which things here should you not stare at for hours to spare your eyes?", "{And} have bright screens."),
    ),
    "tableware": (
        ("The table is being laid. What in this picture is there to eat or drink with?", "{And} belong on the table."),
        ("Dinner is over. What in this picture has to be washed up?", "{And} have to be washed up."),
    ),
    "furniture": (
        ("A family is moving house. Which furniture in this picture has to be carried?", "They have to carry {and}."),
        ("What here would a carpenter or a furniture shop have delivered?", "{And} {be} pieces of furniture."),
    ),
    "street": (
        ("What in this picture did the city put up to keep the street in order?", "The city put up {and}."),
        ("Which things here are fixed to the street for everybody's use or safety?", "{And} {be} part of the street."),
    ),
}

# Two facts together.
FACT_PAIRS: dict[tuple[str, str], Wordings] = {
    ("edible", "tableware"): (
        (
            "It is time for a meal. What is there to eat, and what is there to eat or drink with?",
            "One can eat {and1}, with {and2} at hand.",
        ),
    ),
    ("edible", "sit_on"): (
        (
            "Someone wants to eat something while sitting down. What could they eat, and where could they sit?",
            "They could eat {or1} and sit on {or2}.",
        ),
    ),
    ("edible", "carry_in"): (
        (
            "Somebody wants to take food along. What could they take, and what could they carry it in?",
            "They could take {or1} and carry it in {or2}.",
        ),
    ),
    ("screen", "sit_on"): (
        (
            "Someone wants to watch a film in comfort. What could show it, and where could they sit?",
            "{Or1} could show the film, and they could sit on {or2}.",
        ),
    ),
    ("animal", "vehicle"): (
        (
            "Which animals would have to be fed, and what is there to travel with?",
            "One would have to feed {and1}, and one could travel with {and2}.",
        ),
    ),
    ("animal", "sit_on"): (
        (
            "Somebody wants to sit down near the animals. Which animals are meant, and what is there to sit on?",
            "The animals are {and1}, and one could sit on {or2}.",
        ),
    ),
    ("animal", "edible"): (
        (
            "Which animals are there, and what food should be kept out of their reach?",
            "The food, {and2}, should be kept away from {and1}.",
        ),
    ),
    ("sport", "alive"): (
        (
            "Who or what here is alive, and which sports equipment lies ready or is in use?",
            "{And2} {be2} alive, while {and1} {be1} sports equipment.",
        ),
    ),
}

ALL_OF_A_NAME: Wordings = (
    ("Somebody counts the {plural} in this picture. How many do they find, and which?", "They find {number}: {and}."),
    ("Every one of the {plural} is to get a label. Where do the labels go?", "The {number} labels go to {and}."),
    ("How many {plural} can be seen, and how could you tell them apart?", "There are {number}: {and}."),
)
LEFT_TO_RIGHT: Wordings = (
    (
        "A finger moves over the picture from left to right. In which order does it pass {and}?",
        "It passes {and}, in this order.",
    ),
    (
        "The picture is slowly uncovered, beginning at its left border. In which order do {and} show up?",
        "They show up in this order: {and}.",
    ),
    ("How are {and} arranged, from the left to the right?", "From left to right there are {and}."),
)
TOP_TO_BOTTOM: Wordings = (
    ("Going down from the top of the picture, in which order do you meet {and}?", "You meet {and}, in this order."),
    ("How are {and} arranged, from the top to the bottom?", "From top to bottom there are {and}."),
)
SIZES: Wordings = (
    (
        "Compare {and}. Which takes up the most room in the picture, and which the least?",
        "The most room is taken up by {and1}, the least by {and2}.",
    ),
    (
        "Someone colours in {and}. What needs the most paint, and what the least?",
        "The most paint is needed for {and1}, the least for {and2}.",
    ),
)
NEAREST: Wordings = (
    (
        "A fly on {start} wants the shortest way in the picture to {or}. Where does it go?",
        "From {and1} the shortest way leads to {and2}.",
    ),
    (
        "Which is closest to {start} in the picture: {or}?",
        "Of these, {and2} {be2} the closest to {and1}.",
    ),
)
HALF: Wordings = (
    (
        "The {far} half of the picture is covered. Which of {and} can still be seen as a whole?",
        "One can still see all of {and}.",
    ),
    (
        "The picture is cut down the middle. Which of {and} are entirely in the {near} part?",
        "{And} are entirely in the {near} part.",
    ),
)
