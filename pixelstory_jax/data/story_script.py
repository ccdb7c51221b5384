"""Story scripts: a text in the line format of StoryDiffusion, or a YAML project file.

A text script has three parts. Optional settings, one a line (title, style, negative, seed); then the characters, one a
line; then, after an empty line, the panels, one a line:

    title: The Moon
    style: Comic book

    [Bob] a robot
    [Ada] a woman with a hat

    [Bob] standing on a beach "Where is everybody?" #He was alone.
    [NC] an empty beach at night #Night fell.
    [Bob] and [Ada] walking in a forest #

In a panel [Name] stands for the description of a character, [NC] says that it shows none. Text in double quotes is
speech, one balloon for each; typographic quotes “ ”, « » and 「 」 do as well. What stands behind the last # is the
caption: without a # all words of the panel are its caption, with nothing behind the # it has none. Behind the last # of
a character's line stands a remark. Everything but the speech is read as the reference does (`utils/gradio_utils.py` of
the released code, whose rules `reference_plan` gives exactly).

A project file has the same parts, see `StoryScript.from_yaml`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import yaml

from pixelstory_jax.data.story_styles import NO_STYLE, STYLES, Style, find_style

NO_CHARACTER = "[NC]"
MOST_BUBBLES = 4
LARGEST_SEED = 2**32 - 1
QUOTES = {'"': '"', "“": "”", "«": "»", "「": "」"}
_SPEECH = re.compile("|".join(f"{start}[^{start}{end}]*{end}" for start, end in QUOTES.items()))
_NAME = re.compile(r"\[([^\[\]]*)\]")


class StoryError(ValueError):
    """A script cannot be read; the message names file and line."""


@dataclasses.dataclass(frozen=True)
class Character:
    """anchors: numbers from 0 of the panels that fix the character's looks; empty: chosen automatically."""

    name: str
    description: str
    anchors: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class PanelScript:
    """One panel.

    line: number in the file, from 1. text: as written. prompt: what is drawn, with descriptions in the place of names,
    without speech and caption, before any style. bubbles: up to four. characters: names in the order of their
    definitions. no_character: marked with [NC]. seed: of this panel alone, or None.
    """

    line: int
    text: str
    prompt: str
    caption: str = ""
    bubbles: tuple[str, ...] = ()
    characters: tuple[str, ...] = ()
    no_character: bool = False
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class StoryScript:
    """A story before it is drawn. Prompts are without the style: `story_styles.apply_style` adds it."""

    title: str
    style: Style
    negative: str
    seed: int | None
    characters: tuple[Character, ...]
    panels: tuple[PanelScript, ...]

    @classmethod
    def from_text(cls, text: str, name: str = "story") -> StoryScript:
        """Reads a script in the line format; `name` of the file is for errors. Raises StoryError."""
        return _TextReader(text, name).read()

    @classmethod
    def from_yaml(cls, text: str, name: str = "story") -> StoryScript:
        """Reads a project file; `name` of the file is for errors.

            title: The Moon
            style: Comic book          # or {name: ..., positive: "... {prompt} ...", negative: ...}
            negative: blurry
            seed: 7
            characters:
              Bob: a robot             # or {description: a robot, anchors: [1, 2]}: shots that fix its looks
            places:
              beach: on a beach
            shots:
              - text: "[Bob] standing"
                characters: [Bob]      # those that the text does not name are put in front of it
                place: beach           # goes to the end of the text, or where it says {place}
                caption: He was alone.
                bubbles: [Where is everybody?]
                no_character: false
                seed: 3

        Only characters and shots are needed, and of a shot the text. Unlike in a text script, a shot without caption
        has none.

        Raises:
          StoryError: with file and line.
        """
        return _YamlReader(text, name).read()


def read_script(path: Path) -> StoryScript:
    """Reads a project file (.yaml, .yml) or a text script (any other name).

    Raises:
      StoryError: the file cannot be read, or has a mistake; the message names file and line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoryError(f"{path} cannot be read ({error.strerror or type(error).__name__}).") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise StoryError(f"{path}, line {line}: this is not UTF-8 text; save the file as UTF-8.") from None
    if path.suffix.lower() in (".yaml", ".yml"):
        return StoryScript.from_yaml(text, str(path))
    return StoryScript.from_text(text, str(path))


@dataclasses.dataclass(frozen=True)
class ReferencePlan:
    """What the reference finds in a script, in its own terms: names keep their brackets, panels count from 0.

    invert_character_index_dict: characters of each panel that has any. replaced_prompts: panels with descriptions in
    the place of names. ref_index_dict, ref_totals: panels that make the characters' banks.
    """

    character_dict: dict[str, str]
    character_list: list[str]
    character_index_dict: dict[str, list[int]]
    invert_character_index_dict: dict[int, list[str]]
    replaced_prompts: list[str]
    ref_index_dict: dict[str, list[int]]
    ref_totals: list[int]
    characters_in_prompt: list[list[str]]


def reference_plan(general_prompt: str, prompts: Sequence[str], id_length: int) -> ReferencePlan:
    """The rules of the reference (`utils/gradio_utils.py`, character_to_dict and process_original_prompt).

    Args:
      general_prompt: lines `[Name] description`; lines without brackets are passed over.
      prompts: panels.
      id_length: panels that every character needs for itself.

    Raises:
      ValueError: a character is described twice, or has fewer than `id_length` panels for itself.
    """
    characters = reference_characters(general_prompt)
    present = [[name for name in characters if name in prompt] for prompt in prompts]
    appearances: dict[str, list[int]] = {}
    for number, names in enumerate(present):
        for name in names:
            appearances.setdefault(name, []).append(number)
    banks = {}
    for name, numbers in appearances.items():
        alone = [number for number in numbers if len(present[number]) == 1]
        if len(alone) < id_length:
            raise ValueError(f"{name} needs {id_length} panels for itself, but has {len(alone)}")
        banks[name] = alone[:id_length]
    return ReferencePlan(
        character_dict=characters,
        character_list=list(characters),
        character_index_dict=appearances,
        invert_character_index_dict={number: names for number, names in enumerate(present) if names},
        replaced_prompts=[describe(prompt, characters) for prompt in prompts],
        ref_index_dict=banks,
        ref_totals=[number for numbers in banks.values() for number in numbers],
        characters_in_prompt=present,
    )


def reference_characters(general_prompt: str) -> dict[str, str]:
    """Descriptions by name in brackets, as `reference_plan`. Raises ValueError where one is described twice."""
    found: dict[str, str] = {}
    for line in general_prompt.splitlines():
        start, end = line.find("["), line.find("]")
        if start < 0 or end < 0:
            continue
        name, description = line[start : end + 1], line[end + 1 :]
        if "#" in description:
            description = description.rpartition("#")[0]
        if name in found:
            raise ValueError(f"the character {name} is described twice")
        found[name] = description
    return found


def describe(prompt: str, characters: Mapping[str, str]) -> str:
    """`prompt` with every name in brackets replaced by its description and a space, one name after the other."""
    for name in [name for name in characters if name in prompt]:
        prompt = prompt.replace(name, characters[name] + " ")
    return prompt


class _Reader:
    """What both formats share: errors that name the line, and the rules for characters and panels."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.characters: dict[str, Character] = {}
        self.lines: dict[str, int] = {}

    def fail(self, line: int, message: str) -> NoReturn:
        raise StoryError(f"{self.name}, line {line}: {message}{'' if message.endswith('?') else '.'}")

    def add_character(self, line: int, character: Character) -> None:
        name = character.name
        if not name or name != name.strip():
            self.fail(line, f"the name in [{name}] must not be empty and not begin or end with a space")
        if f"[{name}]" == NO_CHARACTER:
            self.fail(line, "[NC] means that a panel shows no character, so no character can have this name")
        if not character.description:
            self.fail(line, f"[{name}] has no description; write what the character looks like, as [{name}] a robot")
        self.characters[name], self.lines[name] = character, line

    def check_brackets(self, line: int, text: str) -> None:
        rest = _NAME.sub("", text)
        if "[" in rest:
            self.fail(line, f"a bracket is not closed; names are written as [Bob], in {text.strip()!r}")
        if "]" in rest:
            self.fail(line, f"a bracket is closed that was not opened; names are written as [Bob], in {text.strip()!r}")

    def find_characters(self, line: int, text: str) -> tuple[tuple[str, ...], bool]:
        """Names in the order of their definitions, and whether the panel is marked with [NC]."""
        self.check_brackets(line, text)
        named = _NAME.findall(text)
        for name in named:
            if name not in self.characters and f"[{name}]" != NO_CHARACTER:
                known = f"known are {', '.join(f'[{known}]' for known in self.characters)}" if self.characters else ""
                hint = _nearest(name, self.characters, "[{}]") or known or "no character is described"
                self.fail(line, f"the panel names [{name}], who is not described; {hint}")
        marked = NO_CHARACTER in text
        present = tuple(name for name in self.characters if name in named)
        if marked and present:
            self.fail(line, f"[NC] means that the panel shows no character, but it names [{present[0]}]")
        return present, marked

    def drawn(self, text: str) -> str:
        """The prompt of a panel's text: names replaced as in the reference, and single spaces."""
        descriptions = {f"[{name}]": character.description for name, character in self.characters.items()}
        return " ".join(describe(text.replace(NO_CHARACTER, ""), descriptions).split())

    def check_bubbles(self, line: int, bubbles: Sequence[str]) -> None:
        if len(bubbles) > MOST_BUBBLES:
            self.fail(line, f"the panel has {len(bubbles)} speech balloons, but there is room for {MOST_BUBBLES} only")
        if not all(bubbles):
            self.fail(line, "a speech balloon is empty; write its words or leave it out")

    def check_story(self, panels: Sequence[PanelScript], line: int) -> None:
        if not panels:
            self.fail(line, "the story has no panels")
        for name in self.characters:
            if not any(name in panel.characters for panel in panels):
                self.fail(self.lines[name], f"no panel shows [{name}]; use the name in a panel or leave the line out")

    def style(self, line: int, name: str) -> Style:
        try:
            return find_style(name)
        except ValueError as error:
            self.fail(line, str(error))

    def number(self, line: int, key: str, value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", value) or int(value) > LARGEST_SEED:
            self.fail(line, f"{key} must be a whole number from 0 to {LARGEST_SEED}, not {value!r}")
        return int(value)


class _TextReader(_Reader):
    SETTINGS = ("title", "style", "negative", "seed")

    def __init__(self, text: str, name: str) -> None:
        super().__init__(name)
        self.source = [(number, line.strip()) for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1)]

    def read(self) -> StoryScript:
        if not any(line for _, line in self.source):
            self.fail(1, "the file is empty; it needs lines as [Bob] a robot, an empty line, then the panels")
        start = next((i for i, (_, line) in enumerate(self.source) if line.startswith("[")), len(self.source))
        settings = self._settings(self.source[:start])
        lines = self.source[start:]
        if not lines or not lines[0][1].startswith(NO_CHARACTER):
            end = next((i for i, (_, line) in enumerate(lines) if not line), len(lines))
            for number, line in lines[:end]:
                self._character(number, line)
            lines = lines[end:]
        panels = tuple(self._panel(number, line) for number, line in lines if line)
        if not panels and not self.characters:
            self.fail(self.source[-1][0], "there are no characters and no panels; a character's line is [Bob] a robot")
        if not panels:
            self.fail(self.source[-1][0], "there are no panels; they begin after an empty line below the characters")
        self.check_story(panels, self.source[-1][0])
        seed = settings.get("seed")
        style_line, style = settings.get("style", (1, NO_STYLE))
        return StoryScript(
            title=settings.get("title", (1, ""))[1],
            style=self.style(style_line, style),
            negative=settings.get("negative", (1, ""))[1],
            seed=None if seed is None else self.number(seed[0], "seed", seed[1]),
            characters=tuple(self.characters.values()),
            panels=panels,
        )

    def _settings(self, lines: Iterable[tuple[int, str]]) -> dict[str, tuple[int, str]]:
        """Values of the settings with their lines."""
        found: dict[str, tuple[int, str]] = {}
        for number, line in lines:
            if not line:
                continue
            key, colon, value = (part.strip() for part in line.partition(":"))
            key = key.lower()
            if not colon:
                self.fail(number, f"expected a setting (title: ...) or a character ([Bob] a robot), not {line[:60]!r}")
            if key not in self.SETTINGS:
                hint = _nearest(key, self.SETTINGS) or f"known are {', '.join(self.SETTINGS)}"
                self.fail(number, f"there is no setting {key!r}; {hint}")
            if key in found:
                self.fail(number, f"{key} is given a second time, the first time was in line {found[key][0]}")
            if not value:
                self.fail(number, f"{key} has no value; write one or leave the line out")
            found[key] = number, value
        return found

    def _character(self, number: int, line: str) -> None:
        self.check_brackets(number, line.rpartition("#")[0] or line)
        match = _NAME.match(line)
        if not match:
            self.fail(
                number, f"expected a character ([Bob] a robot), not {line[:60]!r}; panels begin after an empty line"
            )
        description = line[match.end() :]
        if "#" in description:
            description = description.rpartition("#")[0]
        if _NAME.search(description):
            self.fail(
                number, f"the description of [{match[1]}] names another character; panels begin after an empty line"
            )
        if match[1] in self.characters:
            first = self.lines[match[1]]
            self.fail(number, f"[{match[1]}] is described in line {first} already; panels begin after an empty line")
        self.add_character(number, Character(match[1], description.strip()))

    def _panel(self, number: int, line: str) -> PanelScript:
        drawn, hash_sign, caption = line.rpartition("#") if "#" in line else (line, "", "")
        bubbles = tuple(" ".join(speech[1:-1].split()) for speech in _SPEECH.findall(drawn))
        silent = _SPEECH.sub(" ", drawn)
        for mark in {*QUOTES, *QUOTES.values()}:
            if mark in silent:
                where = " in front of the #" if hash_sign else ""
                self.fail(number, f"speech is written in a pair of quotes, but one {mark} stands alone{where}")
        characters, marked = self.find_characters(number, silent)
        self.check_bubbles(number, bubbles)
        prompt = self.drawn(silent)
        if not re.search(r"\w", prompt):
            has = " ".join(filter(None, ("a caption" if caption else "", "speech" if bubbles else "")))
            only = f"only {has.replace(' s', ' and s') if caption and bubbles else has}" if has else "nothing"
            self.fail(number, f"the panel has {only}; write in front of it what the picture shows")
        if not hash_sign:
            caption = _NAME.sub(r"\1", silent.replace(NO_CHARACTER, ""))
        return PanelScript(number, line, prompt, " ".join(caption.split()), bubbles, characters, marked)


class _YamlReader(_Reader):
    SETTINGS = ("title", "style", "negative", "seed", "characters", "places", "shots")
    STYLE = ("name", "positive", "negative")
    CHARACTER = ("description", "anchors")
    SHOT = ("text", "characters", "place", "caption", "bubbles", "seed", "no_character")

    def __init__(self, text: str, name: str) -> None:
        super().__init__(name)
        try:
            self.root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            lines = text.splitlines() or [""]
            line = min(mark.line + 1 if mark else 1, len(lines))  # what is never closed is missed behind the last line
            bracket = re.search(r"[:-]\s*\[", lines[line - 1])
            hint = "; a text that begins with [ must stand in quotes" if bracket else ""
            self.fail(line, f"this is not YAML ({error.problem or error.context}){hint}")
        except yaml.reader.ReaderError as error:
            self.fail(text[: error.position].count("\n") + 1, f"this is not YAML ({error.reason})")
        except RecursionError:
            self.fail(1, "this is nested too deeply for a project file")
        if self.root is None:
            self.fail(1, "the file is empty; it needs characters and shots")

    def read(self) -> StoryScript:
        top = self.mapping(self.root, "a project file", self.SETTINGS)
        anchors: dict[str, yaml.Node] = {}
        for name, (line, node) in self.entries(top.get("characters"), "characters").items():
            self._character(line, name, node, anchors)
        places = {
            name: self.words(node, f"the place {name}")
            for name, (_, node) in self.entries(top.get("places"), "places").items()
        }
        line = top["shots"].start_mark.line + 1 if "shots" in top else 1
        shots = self.sequence(top.get("shots"), "shots")
        panels = tuple(self._shot(node, places) for node in shots)
        self.check_story(panels, line)
        for name, node in anchors.items():
            self.characters[name] = dataclasses.replace(
                self.characters[name], anchors=self._anchors(name, node, panels)
            )
        return StoryScript(
            title=self.words(top.get("title"), "title", ""),
            style=self._style(top.get("style")),
            negative=self.words(top.get("negative"), "negative", ""),
            seed=self._seed(top.get("seed")),
            characters=tuple(self.characters.values()),
            panels=panels,
        )

    def _character(self, line: int, name: str, node: yaml.Node, anchors: dict[str, yaml.Node]) -> None:
        if isinstance(node, yaml.MappingNode):
            fields = self.mapping(node, f"the character {name}", self.CHARACTER)
            if "anchors" in fields:
                anchors[name] = fields["anchors"]
            description = self.words(fields.get("description"), f"the description of {name}", "")
        else:
            description = self.words(node, f"the description of {name}", "")
        self.check_brackets(line, name)
        self.add_character(line, Character(name, description))

    def _anchors(self, name: str, node: yaml.Node, panels: Sequence[PanelScript]) -> tuple[int, ...]:
        chosen = []
        for item in self.sequence(node, f"the anchors of {name}"):
            line, number = (
                item.start_mark.line + 1,
                self.number(item.start_mark.line + 1, "an anchor", self.words(item)),
            )
            if not 1 <= number <= len(panels):
                self.fail(
                    line, f"the anchor {number} of {name} is not a shot; shots are numbered from 1 to {len(panels)}"
                )
            if panels[number - 1].characters != (name,):
                self.fail(line, f"shot {number} cannot be an anchor of {name}: it must show {name} alone")
            chosen.append(number - 1)
        return tuple(dict.fromkeys(chosen))

    def _shot(self, node: yaml.Node, places: Mapping[str, str]) -> PanelScript:
        line = node.start_mark.line + 1
        fields = self.mapping(node, "a shot", self.SHOT)
        text = self.words(fields.get("text"), "text", "")
        added = []
        for item in self.sequence(fields.get("characters"), "characters"):
            name, item_line = self.words(item), item.start_mark.line + 1
            self.find_characters(item_line, f"[{name}]")
            added += [] if f"[{name}]" in text else [f"[{name}]"]
        full = " ".join([" and ".join(dict.fromkeys(added)), text]).strip()
        characters, marked = self.find_characters(line, full)
        if "no_character" in fields and self.flag(fields["no_character"], "no_character"):
            marked = True
            if characters:
                self.fail(line, f"no_character is true, but the shot names [{characters[0]}]")
        if "place" in fields:
            full = self._with_place(fields["place"], full, places)
        elif "{place}" in full:
            self.fail(line, "the text says {place}, but the shot has no place")
        bubbles = tuple(self.words(item, "a bubble", "") for item in self.sequence(fields.get("bubbles"), "bubbles"))
        self.check_bubbles(line, bubbles)
        prompt = self.drawn(full)
        if not re.search(r"\w", prompt):
            self.fail(line, "the shot is empty; its text says what the picture shows")
        caption = self.words(fields.get("caption"), "caption", "")
        return PanelScript(line, full, prompt, caption, bubbles, characters, marked, self._seed(fields.get("seed")))

    def _with_place(self, node: yaml.Node, text: str, places: Mapping[str, str]) -> str:
        name = self.words(node, "place")
        if name not in places:
            hint = _nearest(name, places) or (f"known are {', '.join(places)}" if places else "there are no places")
            self.fail(node.start_mark.line + 1, f"the place {name!r} is not described; {hint}")
        return text.replace("{place}", places[name]) if "{place}" in text else f"{text} {places[name]}"

    def _style(self, node: yaml.Node | None) -> Style:
        if node is None:
            return STYLES[NO_STYLE]
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            return self.style(line, self.words(node, "style"))
        fields = self.mapping(node, "a style", self.STYLE)
        texts = [
            self.words(fields.get(key), key, default) for key, default in zip(self.STYLE, ("own", "", ""), strict=True)
        ]
        try:
            return Style(*texts)
        except ValueError:
            self.fail(line, "the positive text of the style lacks {prompt}, the place of a panel's own words")

    def _seed(self, node: yaml.Node | None) -> int | None:
        return None if node is None else self.number(node.start_mark.line + 1, "seed", self.words(node, "seed"))

    def mapping(self, node: yaml.Node, what: str, known: Sequence[str]) -> dict[str, yaml.Node]:
        """The fields of a node that must have no others than the known ones."""
        entries = self.entries(node, what)
        for key, (line, _) in entries.items():
            if key not in known:
                hint = _nearest(key, known) or f"known are {', '.join(known)}"
                self.fail(line, f"{what} has no field {key!r}; {hint}")
        return {key: value for key, (_, value) in entries.items()}

    def entries(self, node: yaml.Node | None, what: str) -> dict[str, tuple[int, yaml.Node]]:
        """Fields with their lines; none where the node is missing."""
        if node is None or _is_null(node):
            return {}
        if not isinstance(node, yaml.MappingNode):
            self.fail(node.start_mark.line + 1, f"{what} must be fields with values, as 'name: text'")
        found: dict[str, tuple[int, yaml.Node]] = {}
        for key_node, value in node.value:
            line, key = key_node.start_mark.line + 1, self.words(key_node, "a field's name")
            if key in found:
                self.fail(line, f"{key} is given a second time, the first time was in line {found[key][0]}")
            found[key] = line, value
        return found

    def sequence(self, node: yaml.Node | None, what: str) -> list[yaml.Node]:
        if node is None or _is_null(node):
            return []
        if not isinstance(node, yaml.SequenceNode):
            self.fail(node.start_mark.line + 1, f"{what} must be a list, as [first, second] or one '- item' a line")
        return node.value

    def words(self, node: yaml.Node | None, what: str = "a name", default: str | None = None) -> str:
        """A node's text as it is written, with single spaces; `default` where it is missing or null."""
        if node is not None and not isinstance(node, yaml.ScalarNode):
            self.fail(node.start_mark.line + 1, f"{what} must be a text; in quotes where it begins with [ or {{")
        if node is None or _is_null(node):
            if default is None:
                self.fail(node.start_mark.line + 1 if node is not None else 1, f"{what} must not be empty")
            return default
        return " ".join(node.value.split())

    def flag(self, node: yaml.Node, what: str) -> bool:
        value = self.words(node, what).lower()
        if value not in ("true", "false"):
            self.fail(node.start_mark.line + 1, f"{what} must be true or false, not {value!r}")
        return value == "true"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _nearest(word: str, known: Iterable[str], form: str = "{}") -> str:
    """A question for the known word that is most like `word`, "" if none is."""
    folded: dict[str, str] = {name.casefold(): name for name in known}
    matches = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.5)
    return f"did you mean {form.format(folded[matches[0]])}?" if matches else ""
