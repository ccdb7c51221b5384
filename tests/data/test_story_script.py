"""Scripts are read as the reference reads them, and every mistake is one sentence with its line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pixelstory_jax.data.builtin.story_wording import plain_caption
from pixelstory_jax.data.story_script import (
    Character,
    StoryError,
    StoryScript,
    read_script,
    reference_plan,
)
from pixelstory_jax.data.story_styles import NO_STYLE, STYLES, Style, apply_style, find_style
from tests.golden_cases.prompt_parsing import check

EXAMPLES = Path(__file__).parents[2] / "examples"
CAST = "[Bob] A man, in a suit\n[Alice]a woman # the friend\n\n"


def panel(line: str, cast: str = CAST):
    return StoryScript.from_text(cast + "[Bob] and [Alice] talk #\n" + line).panels[1]


def test_reference_plan():
    plan = reference_plan(
        "a line without a name\n[Bob] A man #x #y\n[Alice]a woman",
        ["[Bob] runs", "[NC] rain", "[Bob] and [Alice] dance", "[Alice] [Alice] sits #c", "[Bob] eats"],
        1,
    )
    assert plan.character_dict == {"[Bob]": " A man #x ", "[Alice]": "a woman"}
    assert plan.replaced_prompts[0] == " A man #x   runs" and plan.replaced_prompts[1] == "[NC] rain"
    assert plan.replaced_prompts[3] == "a woman  a woman  sits #c"
    assert plan.character_index_dict == {"[Bob]": [0, 2, 4], "[Alice]": [2, 3]}
    assert plan.invert_character_index_dict == {0: ["[Bob]"], 2: ["[Bob]", "[Alice]"], 3: ["[Alice]"], 4: ["[Bob]"]}
    assert plan.ref_index_dict == {"[Bob]": [0], "[Alice]": [3]} and plan.ref_totals == [0, 3]
    assert plan.characters_in_prompt[1] == []
    with pytest.raises(ValueError, match="described twice"):
        reference_plan("[A] one\n[A] two", ["[A]"], 1)
    with pytest.raises(ValueError, match=r"\[A\] needs 2 panels"):
        reference_plan("[A] one\n[B] two", ["[A] x", "[A] and [B]"], 2)


CASE = {
    "general_prompt": "[A] one",
    "prompts": ["[A] x", "[A] y"],
    "id_length": 1,
    "character_dict": {"[A]": " one"},
    "character_list": ["[A]"],
    "character_index_dict": {"[A]": [0, 1]},
    "invert_character_index_dict": {"0": ["[A]"], "1": ["[A]"]},
    "replaced_prompts": [" one  x", " one  y"],
    "ref_index_dict": {"[A]": [0]},
    "ref_totals": [0],
    "characters_in_prompt": [["[A]"], ["[A]"]],
}


def test_the_golden_check_finds_differences(tmp_path):
    path = tmp_path / "prompt_parsing.json"
    wrong = {**CASE, "ref_totals": [1]}
    refused = {"general_prompt": "[A] one", "prompts": ["[A] x"], "id_length": 1, "error": "no"}
    lacking = {key: value for key, value in CASE.items() if key != "ref_totals"}
    path.write_text(json.dumps([CASE, wrong, refused, lacking]))
    assert [good for good, _ in check(path)] == [True, False, False, False]


def test_panels_show_what_the_reference_shows():
    lines = ["[Bob] at home, reading", "[Bob] and [Alice] dance #Together #1", "[Alice] sits", "no one here"]
    story = StoryScript.from_text(CAST + "\n".join(lines))
    plan = reference_plan(CAST, lines, 1)
    for read, replaced, names in zip(story.panels, plan.replaced_prompts, plan.characters_in_prompt, strict=True):
        wanted = replaced.rpartition("#")[0] if "#" in replaced else replaced
        assert read.prompt.split() == wanted.split() and [f"[{name}]" for name in read.characters] == names
    assert [read.line for read in story.panels] == [4, 5, 6, 7]
    assert story.characters == (Character("Bob", "A man, in a suit"), Character("Alice", "a woman"))
    assert story.panels[1].prompt == "A man, in a suit and a woman dance #Together" and story.panels[1].caption == "1"


def test_captions_speech_and_markers():
    full = panel('[Bob] on a beach "Where is  everybody?" “Hello!” #He was "alone".')
    assert full.prompt == "A man, in a suit on a beach" and full.caption == 'He was "alone".'
    assert full.bubbles == ("Where is everybody?", "Hello!")
    assert panel("[Bob] runs «Allez !» 「走吧」").bubbles == ("Allez !", "走吧")
    assert panel('[Bob] runs "Go!" away').caption == "Bob runs away"
    assert panel("[Bob] runs #").caption == ""
    empty = panel("[NC]an empty beach#")
    assert empty.no_character and empty.characters == () and empty.prompt == "an empty beach"
    nobody = panel("an empty beach")
    assert not nobody.no_character and nobody.characters == () and nobody.caption == "an empty beach"
    assert panel("[Alice] and [Bob] run").characters == ("Bob", "Alice")
    assert panel("[Bob]").prompt == "A man, in a suit"


def test_settings():
    settings = "\ntitle: To the moon: a story\nSTYLE: comic BOOK\n\nnegative: rain, fog\nseed: 7\n"
    story = StoryScript.from_text(settings + CAST + "[Bob] and [Alice] run")
    assert story.title == "To the moon: a story" and story.style is STYLES["Comic book"]
    assert story.negative == "rain, fog" and story.seed == 7 and story.panels[0].line == 10
    plain = StoryScript.from_text("[NC] rain\n\n[NC] snow\r\n")
    assert (plain.title, plain.style.name, plain.negative, plain.seed) == ("", NO_STYLE, "", None)
    assert [read.prompt for read in plain.panels] == ["rain", "snow"] and plain.characters == ()


TEXT_MISTAKES = [
    ("", 1, "the file is empty"),
    (" \n\n", 1, "the file is empty"),
    ("hello\n", 1, "expected a setting"),
    ("styel: Comic book\n[Bob] r\n\n[Bob] x", 1, "did you mean style?"),
    ("titel: a\n[Bob] r\n\n[Bob] x", 1, "did you mean title?"),
    ("colour: red\n[Bob] r\n\n[Bob] x", 1, "known are title, style, negative, seed"),
    ("title: a\ntitle: b\n[Bob] r\n\n[Bob] x", 2, "a second time, the first time was in line 1"),
    ("title:\n[Bob] r\n\n[Bob] x", 1, "title has no value"),
    ("title: a\nstyle: Comix\n[Bob] r\n\n[Bob] x", 2, "Line art, Black and White Film Noir, Isometric Rooms"),
    ("seed: -1\n[Bob] r\n\n[Bob] x", 1, "seed must be a whole number"),
    ("seed: 4294967296\n[Bob] r\n\n[Bob] x", 1, "seed must be a whole number"),
    ("[Bob r\n\n[Bob] x", 1, "a bracket is not closed"),
    ("[] r\n\n[] x", 1, "must not be empty"),
    ("[ Bob] r\n\n[ Bob] x", 1, "begin or end with a space"),
    ("[Bob]\n\n[Bob] x", 1, "[Bob] has no description"),
    ("[Bob] # a remark\n\n[Bob] x", 1, "[Bob] has no description"),
    ("[Bob] r\n[Bob] s\n\n[Bob] x", 2, "[Bob] is described in line 1 already"),
    ("[Bob] r\n[NC] beach\n\n[Bob] x", 2, "[NC] means that a panel shows no character"),
    ("[Bob] r\n[Al] and [Bob] run\n\n[Bob] x", 2, "panels begin after an empty line"),
    ("[Bob] r\nwalking\n\n[Bob] x", 2, "expected a character"),
    ("[Bob] r\n[Al] s\n\n[Bob] x", 2, "no panel shows [Al]"),
    ("[Bob] r\n\n", 3, "there are no panels"),
    ("title: a\n", 2, "there are no characters and no panels"),
    ("[Bob] r\n\n[Bob] x\n[bob] y", 4, "did you mean [Bob]?"),
    ("[Bob] r\n\n[Bob] x\n[Zoe] y", 4, "known are [Bob]"),
    ("[NC] x\n[Zoe] y", 2, "no character is described"),
    ("[Bob] r\n\n[Bob] x\n[Bob y", 4, "a bracket is not closed"),
    ("[Bob] r\n\n[Bob] x\nBob] y", 4, "a bracket is closed that was not opened"),
    ("[Bob] r\n\n[Bob] x\n#Only this.", 4, "the panel has only a caption;"),
    ('[Bob] r\n\n[Bob] x\n"Hi!"', 4, "the panel has only speech;"),
    ('[Bob] r\n\n[Bob] x\n"Hi!" #c', 4, "the panel has only a caption and speech;"),
    ("[Bob] r\n\n[Bob] x\n[NC] #", 4, "the panel has nothing;"),
    ("[Bob] r\n\n[Bob] x\n[NC] [Bob] y", 4, "it names [Bob]"),
    ('[Bob] r\n\n[Bob] x "a" "b" "c" "d" "e"', 3, "5 speech balloons"),
    ('[Bob] r\n\n[Bob] x " "', 3, "a speech balloon is empty"),
    ('[Bob] r\n\n[Bob] x "a', 3, 'one " stands alone'),
    ('[Bob] r\n\n[Bob] x "We are #1!"', 3, 'one " stands alone in front of the #'),
]


@pytest.mark.parametrize(("text", "line", "words"), TEXT_MISTAKES)
def test_mistakes_of_texts(tmp_path, text, line, words):
    path = tmp_path / "story.txt"
    path.write_text(text)
    with pytest.raises(StoryError) as error:
        read_script(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line {line}: ") and words in message
    assert message[-1] in ".?" and "\n" not in message


PROJECT = """\
title: Moon
style: {{name: mine, positive: "flat {{prompt}} drawing", negative: fog}}
negative: rain
seed: 3
characters:
  Bob: a robot
  Ada: {{description: a woman, anchors: [2]}}
places:
  beach: on a beach
shots:
{shots}"""
SHOTS = """\
  - {text: "[Bob] standing", place: beach, caption: 7 o'clock, bubbles: [Hi!, "[?]"], seed: 5}
  - text: running at {place} again
    characters: [Ada]
    place: beach
  - text: >
      walking
      away
    characters: [Bob, Ada]
  - text: rain
    no_character: true
  - text: "[NC] snow"
"""


def test_project_files():
    story = StoryScript.from_yaml(PROJECT.format(shots=SHOTS))
    assert story.title == "Moon" and story.negative == "rain" and story.seed == 3
    assert story.style == Style("mine", "flat {prompt} drawing", "fog")
    assert story.characters == (Character("Bob", "a robot"), Character("Ada", "a woman", (1,)))
    first, second, third, rain, snow = story.panels
    assert first.prompt == "a robot standing on a beach" and first.caption == "7 o'clock" and first.seed == 5
    assert first.bubbles == ("Hi!", "[?]") and first.line == 11 and second.line == 12
    assert second.prompt == "a woman running at on a beach again" and second.caption == "" and second.seed is None
    assert third.prompt == "a robot and a woman walking away" and third.characters == ("Bob", "Ada")
    assert rain.no_character and snow.no_character and rain.characters == () and snow.prompt == "snow"


def project(shot: str, extra: str = "") -> str:
    return f"characters: {{Bob: r}}\n{extra}shots:\n  - text: '[Bob] x'\n{shot}"


YAML_MISTAKES = [
    ("", 1, "the file is empty"),
    ("# only a remark\n", 1, "the file is empty"),
    ("- a\n- b\n", 1, "must be fields with values"),
    ("titel: x\nshots: []\n", 1, "did you mean title?"),
    ("title: x\n\ncolour: red\n", 3, "known are title"),
    ("title: x\ntitle: y\n", 2, "a second time, the first time was in line 1"),
    ("title: [a, b]\nshots: [{text: x}]", 1, "title must be a text"),
    ("shots: 3\n", 1, "shots must be a list"),
    ("title: x\nshots:\n", 2, "the story has no panels"),
    ("characters: {Bob: r}\n", 1, "the story has no panels"),
    ("a: [1, 2\nb: 3\n", 2, "not YAML"),
    ("a: [\n", 1, "not YAML"),
    ("characters:\n  Bob: [x\n", 2, "begins with [ must stand in quotes"),
    ("a:\n\tb: 3\n", 2, "not YAML"),
    ("a: 1\nb: \x07\n", 2, "not YAML"),
    ("a: 1\n---\nb: 2\n", 2, "not YAML"),
    ("[" * 5000, 1, "nested too deeply"),
    ("shots:\n  - text: [Bob] x\n", 2, "begins with [ must stand in quotes"),
    ("shots:\n  - text: [Bob]\n", 2, "in quotes where it begins with ["),
    ("characters: {Bob: }\nshots: [{text: '[Bob]'}]", 1, "[Bob] has no description"),
    ("characters: {NC: x}\nshots: [{text: '[NC] y'}]", 1, "[NC] means"),
    ("characters:\n  '[Bob': r\nshots: [{text: x}]", 2, "a bracket is not closed"),
    ("characters:\n  Bob: r\n  Al: {descripton: s}\nshots: [{text: '[Bob]'}]", 3, "did you mean description?"),
    ("characters:\n  Bob: r\n  Al: s\nshots: [{text: '[Bob] x'}]", 3, "no panel shows [Al]"),
    (project("    plaec: a\n"), 4, "did you mean place?"),
    (project("    place: baech\n", "places: {beach: b}\n"), 5, "did you mean beach?"),
    (project("    place: beach\n"), 4, "there are no places"),
    (project("  - {text: 'at {place}'}\n"), 4, "has no place"),
    (project("    characters: [bob]\n"), 4, "did you mean [Bob]?"),
    (project("    characters: Bob\n"), 4, "characters must be a list"),
    (project("    no_character: maybe\n"), 4, "true or false"),
    (project("    no_character: true\n"), 3, "but the shot names [Bob]"),
    (project("    seed: x\n"), 4, "seed must be a whole number"),
    (project("    bubbles: [a, b, c, d, e]\n"), 3, "5 speech balloons"),
    (project("    bubbles: ['']\n"), 3, "a speech balloon is empty"),
    (project("  - caption: only\n"), 4, "the shot is empty"),
    (project("  - text:\n"), 4, "the shot is empty"),
    (project("  - text: '[Bob x'\n"), 4, "a bracket is not closed"),
    (project("", "style: Comix\n"), 2, "known are (No style), Japanese Anime"),
    (project("", "style: {positive: abc}\n"), 2, "lacks {prompt}"),
    (project("", "style: {positiv: abc}\n"), 2, "did you mean positive?"),
    ("characters:\n  Bob: {description: r,\n    anchors: [2]}\nshots: [{text: '[Bob] x'}]", 3, "numbered from 1 to 1"),
    ("characters:\n  Bob: {description: r, anchors: [1]}\n  A: s\nshots: [{text: '[Bob] [A]'}]", 2, "Bob alone"),
]


@pytest.mark.parametrize(("text", "line", "words"), YAML_MISTAKES)
def test_mistakes_of_project_files(tmp_path, text, line, words):
    path = tmp_path / "story.yaml"
    path.write_text(text)
    with pytest.raises(StoryError) as error:
        read_script(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line {line}: ") and words in message
    assert message[-1] in ".?" and "\n" not in message


def test_project_files_run_no_code(tmp_path):
    path = tmp_path / "story.yml"
    path.write_text(f"title: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'touched'}]\nshots: [{{text: x}}]")
    with pytest.raises(StoryError):
        read_script(path)
    assert not (tmp_path / "touched").exists()


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(StoryError, match="missing.txt cannot be read"):
        read_script(tmp_path / "missing.txt")
    path = tmp_path / "latin.txt"
    path.write_bytes("[Bob] a robot\n\n[Bob] in a caf\xe9".encode("latin-1"))
    with pytest.raises(StoryError, match=r"latin.txt, line 3: this is not UTF-8"):
        read_script(path)
    path.write_bytes(b"\xef\xbb\xbf" + "[Bob] a robot\r\n\r\n[Bob] in a café".encode())
    assert read_script(path).panels[0].prompt == "a robot in a café"


def test_styles():
    assert len(STYLES) == 9 and find_style("no style") is STYLES[NO_STYLE]
    assert apply_style(STYLES[NO_STYLE], " a {prompt} b ") == ("a {prompt} b", "")
    positive, negative = apply_style(STYLES["Line art"], "a robot", "fog")
    assert "a robot" in positive and negative == f"{STYLES['Line art'].negative} fog"
    assert all("{prompt}" not in apply_style(style, "x")[0] for style in STYLES.values())
    with pytest.raises(ValueError, match="lacks {prompt}"):
        Style("mine", "no place")
    with pytest.raises(ValueError, match="known are"):
        find_style("")


def test_examples():
    text, project_file = read_script(EXAMPLES / "moon.txt"), read_script(EXAMPLES / "moon.yaml")
    assert len(text.panels) == 8 and len(text.characters) == 2 and sum(p.no_character for p in text.panels) == 1
    assert (text.title, text.style, text.seed) == (project_file.title, project_file.style, project_file.seed)
    for ours, theirs in zip(text.panels, project_file.panels, strict=True):
        kept = {"line": 0, "text": ""}
        assert dataclasses.replace(ours, **kept) == dataclasses.replace(theirs, **kept)
    # The words are those that the tiny network is trained on.
    assert text.panels[0].prompt == plain_caption("a robot", "standing", "beach")
    assert text.panels[6].prompt == plain_caption("a robot", "jumping", "moon")
