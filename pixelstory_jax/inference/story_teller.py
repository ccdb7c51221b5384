"""From a script to pictures and comic pages.

    teller = StoryTeller.from_checkpoint("runs/storydiffusion-tiny")
    story = teller.tell("examples/moon.txt")
    story.pages[0].show()
    story.save("stories/moon")

What is needed to make the same pictures again is in the story's manifest, which `save` writes as story.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import pixelstory_jax
from pixelstory_jax.data.images import open_image
from pixelstory_jax.data.story_script import Character, PanelScript, StoryError, StoryScript, read_script
from pixelstory_jax.data.story_styles import Style, apply_style
from pixelstory_jax.inference.comic_page import ComicError, draw_pages, save_comic
from pixelstory_jax.inference.fonts import FontError
from pixelstory_jax.inference.painter import Painter, PaintOptions, story_mesh
from pixelstory_jax.inference.saving import png_bytes, write_whole
from pixelstory_jax.inference.sharing import SharingPlan
from pixelstory_jax.inference.story_painter import Shot, StoryPainter

MANIFEST = "story.json"
FORMAT = 2
PORTRAIT = 1_000_000  # added to the number of a character: the place of its portrait in the sequence of seeds


@dataclass(frozen=True)
class PageOptions:
    """How the comic is laid out, see `comic_page.draw_pages`."""

    style: str = "grid"
    width: int = 1400
    fonts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Story:
    """A told story.

    Attributes:
      panels: uint8 [H, W, 3] each.
      pages: of the comic.
      portraits: pictures by name of characters that are never alone in a panel; the others look at them.
      manifest: everything that makes the same pictures again, and their hashes; JSON-able.
    """

    panels: tuple[np.ndarray, ...]
    pages: tuple[Image.Image, ...]
    portraits: dict[str, np.ndarray]
    manifest: dict[str, Any]

    @property
    def page(self) -> Image.Image:
        """The first page."""
        return self.pages[0]

    def save(self, folder: str | Path, changed: Sequence[int] | None = None) -> list[Path]:
        """Writes panel_01.png, …, page_1.png, …, comic.pdf and story.json; `changed` panels only, if given.

        Raises:
          OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, picture in enumerate(self.panels):
            paths.append(folder / panel_file(number))
            if changed is None or number in changed:
                write_whole(paths[-1], png_bytes(picture))
        for number, (name, picture) in enumerate(self.portraits.items()):
            paths.append(folder / f"portrait_{number + 1:02d}_{_slug(name)}.png")
            write_whole(paths[-1], png_bytes(picture))
        paths += save_comic(self.pages, folder, self.manifest["script"]["title"])
        paths.append(folder / MANIFEST)
        write_whole(paths[-1], (json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n").encode())
        return paths


def panel_file(number: int) -> str:
    """File name of a panel, counted from 0."""
    return f"panel_{number + 1:02d}.png"


class StoryTeller:
    """Tells stories with one model.

    Args:
      painter: model, weights, tokenizers, sampler.
      options: sampling. plan: how panels share; None for independent panels.
      page: layout. at_once: later panels per call. source: where the weights are from, for the manifest.
    """

    def __init__(
        self,
        painter: Painter,
        options: PaintOptions | None = None,
        plan: SharingPlan | None = SharingPlan("bank"),  # noqa: B008 (frozen)
        page: PageOptions = PageOptions(),
        at_once: int = 4,
        source: str = "",
    ) -> None:
        self.painter, self.options = painter, options or PaintOptions()
        self.plan, self.page, self.at_once, self.source = plan, page, at_once, source

    @classmethod
    def from_checkpoint(cls, path: str | Path, **changes: Any) -> StoryTeller:
        """Reads a workdir of `experiments.train` (its best checkpoint), one checkpoint, or a folder of diffusers.

        What is not given is as in the evaluation that scored the checkpoint or, for a pipeline, as in the released app;
        stories share by a bank of anchors.

        Args:
          changes: fields of `PaintOptions` (steps, guidance, …) and of `SharingPlan` (strategy, rate, …), and plan (in
            place of the latter), page, at_once.

        Raises:
          CheckpointError: there is none, it is damaged, or it holds something else than a StoryDiffusion.
          WeightsError: a file of a pipeline is missing or does not fit.
        """
        if (Path(path) / "model_index.json").is_file():
            return cls._from(*_released(path), str(path), changes)
        from pixelstory_jax.training.checkpoints import load_params
        from pixelstory_jax.training.errors import CheckpointError

        params, saved = load_params(path)
        if saved.get("objective") != "storydiffusion":
            raise CheckpointError(f"{path} holds a checkpoint of {saved.get('objective')!r}, not of 'storydiffusion'")
        painter = Painter.from_config(saved, jax.device_put(params), story_mesh())
        size, section = saved["data"]["size"], saved["eval"]
        own = {name: section[name] for name in ("steps", "guidance", "guide_sharing")} | {"height": size, "width": size}
        return cls._from(painter, own | {"rate": section["rate"]}, str(path), changes)

    @classmethod
    def _from(cls, painter: Painter, own: Mapping[str, Any], source: str, changes: Mapping[str, Any]) -> StoryTeller:
        """own: what the weights suggest, by the names of `from_checkpoint`'s `changes`, which go before it."""
        settings = _tuples({"strategy": "bank", **own, **changes})
        options = PaintOptions(**_of_fields(PaintOptions, settings))
        plan = SharingPlan(**_of_fields(SharingPlan, settings))
        rest = {name: value for name, value in changes.items() if name not in {*vars(options), *vars(plan)}}
        return cls(painter, options, source=source, **{"plan": plan, **rest})

    def tell(
        self,
        script: StoryScript | str | Path,
        seed: int | None = None,
        redrawn: Mapping[int, int] | None = None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> Story:
        """Tells a whole story.

        Args:
          script: a script, or the path of its file.
          seed: of the story; None for that of the script, or 0.
          redrawn: number of a panel (from 0) -> seed from which it is drawn again, after the story as a whole.
          on_progress: gets the number of pictures that were just finished.

        Raises:
          StoryError: the script has a mistake, or words that cannot be lettered.
          ComicError, FontError: the page cannot be drawn, or its title not be lettered.
        """
        script = script if isinstance(script, StoryScript) else read_script(Path(script))
        seed = (script.seed or 0) if seed is None else seed
        self.check_pages(script, seed)
        shots, portraits, painter = self.plan_story(script, seed)
        painted = painter.paint(shots, portraits, on_progress)
        panels = list(painted.pictures)
        for number, again in (redrawn or {}).items():
            panels[number] = painter.redraw(number, again, shots, portraits)
        names = [character.name for character in script.characters]
        return self.finish(
            script,
            seed,
            panels,
            {names[number]: picture for number, picture in painted.portraits.items()},
            redrawn or {},
        )

    def redraw(self, script: StoryScript, seed: int, panel: int, again: int) -> np.ndarray:
        """One panel (from 0) from another seed, uint8 [H, W, 3]; the other panels are not touched."""
        shots, portraits, painter = self.plan_story(script, seed)
        return painter.redraw(panel, again, shots, portraits)

    def memory(self, script: StoryScript, seed: int = 0) -> int:
        """Bytes that `tell` takes at its peak, from the compiled programs; nothing is painted."""
        shots, portraits, painter = self.plan_story(script, seed)
        return painter.memory(shots, portraits)

    def plan_story(self, script: StoryScript, seed: int) -> tuple[list[Shot], list[Shot], StoryPainter]:
        """Shots of the panels, portraits of the characters, and what paints them."""
        names = [character.name for character in script.characters]
        shots = []
        for number, panel in enumerate(script.panels):
            prompt, _ = apply_style(script.style, panel.prompt)
            own = (seed, number) if panel.seed is None else (panel.seed,)
            shots.append(Shot(prompt, tuple(names.index(name) for name in panel.characters), own))
        portraits = [
            Shot(
                apply_style(script.style, f"{character.description} standing")[0], (number,), (seed, PORTRAIT + number)
            )
            for number, character in enumerate(script.characters)
        ]
        chosen = {number: character.anchors for number, character in enumerate(script.characters) if character.anchors}
        _, negative = apply_style(script.style, "", script.negative)
        painter = StoryPainter(
            self.painter, self.plan, self.options, negative or None, seed, self.at_once, chosen_anchors=chosen
        )
        return shots, portraits, painter

    def finish(
        self,
        script: StoryScript,
        seed: int,
        panels: Sequence[np.ndarray],
        portraits: Mapping[str, np.ndarray],
        redrawn: Mapping[int, int],
    ) -> Story:
        """Letters the pages and writes down how everything was made."""
        pages = self._pages(script, panels, seed)
        manifest = {
            "format": FORMAT,
            "script": dataclasses.asdict(script),
            "seed": seed,
            "redrawn": {str(number): again for number, again in redrawn.items()},
            "sharing": None if self.plan is None else dataclasses.asdict(self.plan),
            "sampling": {**dataclasses.asdict(self.options), "at_once": self.at_once},
            "page": dataclasses.asdict(self.page),
            "checkpoint": self.source,
            **self.model_record(),
            "panels_sha256": [picture_hash(picture) for picture in panels],
            "versions": {
                "pixelstory_jax": pixelstory_jax.__version__,
                **{name: _version(name) for name in ("jax", "jaxlib", "flax", "numpy", "pillow")},
                "device": jax.devices()[0].device_kind,
            },
        }
        return Story(tuple(panels), tuple(pages), dict(portraits), manifest)

    def model_record(self) -> dict[str, Any]:
        """What a manifest says of the model: the hash of its weights, and its sampler."""
        return {
            "weights_sha256": tree_hash(self.painter.params),
            "sampler": json.loads(json.dumps(dataclasses.asdict(self.painter.sampler))),
        }

    def check_model(self, manifest: Mapping[str, Any]) -> None:
        """Raises StoryError if another model than this one told the story of a manifest."""
        if any(manifest[name] != value for name, value in self.model_record().items()):
            raise StoryError(
                f"The story was told by other weights or another sampler ({manifest['checkpoint'] or 'not named'}) "
                f"than those of {self.source or 'this model'}; they would not draw its pictures."
            )

    def check_pages(self, script: StoryScript, seed: int = 0) -> None:
        """Lays out and letters empty panels: what is wrong with words, fonts or sizes shows before anything is painted.

        Raises:
          StoryError: the words of a panel cannot be lettered.
          ComicError, FontError: the page cannot be drawn, or its title not be lettered.
        """
        blank = np.zeros((self.options.height, self.options.width, 3), np.uint8)
        try:
            self._pages(script, [blank] * len(script.panels), seed)
        except (ComicError, FontError) as error:
            if error.panel is None:
                raise
            line = script.panels[error.panel].line
            raise StoryError(f"Line {line} of the script (panel {error.panel + 1}): {error}") from None

    def _pages(self, script: StoryScript, panels: Sequence[np.ndarray], seed: int) -> list[Image.Image]:
        return draw_pages(
            [Image.fromarray(picture) for picture in panels],
            [panel.caption for panel in script.panels],
            [panel.bubbles for panel in script.panels],
            script.title,
            self.page.style,
            self.page.width,
            seed,
            [Path(font) for font in self.page.fonts],
        )


def script_from_manifest(manifest: Mapping[str, Any]) -> StoryScript:
    """The script that a manifest holds."""
    script = dict(manifest["script"])
    return StoryScript(
        **{
            **script,
            "style": Style(**script["style"]),
            "characters": tuple(Character(**_tuples(values)) for values in script["characters"]),
            "panels": tuple(PanelScript(**_tuples(values)) for values in script["panels"]),
        }
    )


def plan_from_manifest(manifest: Mapping[str, Any]) -> SharingPlan | None:
    """How the panels of a manifest share."""
    sharing = manifest["sharing"]
    return None if sharing is None else SharingPlan(**_tuples(sharing))


def page_from_manifest(manifest: Mapping[str, Any]) -> PageOptions:
    """How the pages of a manifest are laid out."""
    return PageOptions(**_tuples(manifest["page"]))


def _released(folder: str | Path) -> tuple[Painter, dict[str, Any]]:
    """What paints with a pipeline of diffusers, and the settings of StoryDiffusion's app; pictures of its own size."""
    from pixelstory_jax.interop.diffusers_folder import read_pipeline
    from pixelstory_jax.models.story_diffusion import StoryDiffusion

    read = read_pipeline(folder, "ddim")
    painter = Painter(
        StoryDiffusion(read.config),
        jax.device_put(read.tree()),
        read.tokenizers,
        read.sampler,
        read.zero_negative,
        story_mesh(),
    )
    side = read.picture_size
    return painter, {"steps": 50, "guidance": 5.0, "freeu": True, "rate": 0.7, "height": side, "width": side}


def _of_fields(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of the dataclass `kind`."""
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON made lists of."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def read_manifest(path: str | Path) -> dict[str, Any]:
    """A story.json, or that of a folder.

    Raises:
      StoryError: there is none, or it is no manifest.
    """
    path = Path(path)
    path = path / MANIFEST if path.is_dir() else path
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise StoryError(f"{path} has the format {manifest['format']}; this version reads {FORMAT}.")
        for build in (script_from_manifest, plan_from_manifest, page_from_manifest):
            build(manifest)
        needed = ("seed", "redrawn", "sampling", "panels_sha256", "weights_sha256", "sampler", "checkpoint")
        _ = [manifest[name] for name in needed]
    except OSError as error:
        raise StoryError(f"{path} cannot be read ({error.strerror or error}).") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoryError):
            raise
        raise StoryError(f"{path} is not the manifest of a story.") from None
    return manifest


def read_panels(folder: Path, manifest: Mapping[str, Any]) -> list[np.ndarray]:
    """The pictures of a saved story.

    Raises:
      StoryError: a picture is missing or was changed.
    """
    panels = []
    for number, digest in enumerate(manifest["panels_sha256"]):
        path = folder / panel_file(number)
        picture = open_image(path) if path.is_file() else None
        if picture is None or picture_hash(picture) != digest:
            raise StoryError(f"{path} is missing or is not the picture that {MANIFEST} describes.")
        panels.append(picture)
    return panels


def picture_hash(picture: np.ndarray) -> str:
    """Of the pixels, whatever file they are in."""
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


def tree_hash(params: Any) -> str:
    """Of all weights with their paths."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())
