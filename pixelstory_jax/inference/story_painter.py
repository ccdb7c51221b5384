"""All panels of a story: which panels are anchors, who sees whom, and the calls of the denoising loop.

n panels, R anchors, A panels of one call, H x W pixels, h x w latents, C latent channels, M anchors of a character.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.inference.diffusion import Denoised, TextStates
from pixelstory_jax.inference.painter import Memory, Painter, PaintOptions
from pixelstory_jax.inference.sharing import Draws, SharingPlan, share_steps
from pixelstory_jax.models.consistent_attention import Sharing


@dataclass(frozen=True)
class Shot:
    """What one picture shows, and from which noise it starts. characters: numbers; none for a panel without any."""

    prompt: str
    characters: tuple[int, ...]
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Anchor:
    """A picture that others look at for one character: a panel of the story, or (panel None) a portrait beside it."""

    character: int
    shot: Shot
    panel: int | None


@dataclass(frozen=True)
class PaintedStory:
    """pictures: uint8 [n, H, W, 3]. portraits: uint8 by the number of the character, for those that needed one."""

    pictures: np.ndarray
    portraits: dict[int, np.ndarray]


def plan_anchors(
    shots: Sequence[Shot],
    portraits: Sequence[Shot],
    per_character: int,
    chosen: Mapping[int, Sequence[int]] | None = None,
) -> tuple[Anchor, ...]:
    """The first panels in which a character is alone; a portrait for a character that never is.

    Args:
      portraits: a shot of each character alone, by its number.
      per_character: M; a character that is alone less often has fewer anchors.
      chosen: panels that the user wants as a character's anchors.
    """
    anchors: list[Anchor] = []
    for character, portrait in enumerate(portraits):
        alone = [number for number, shot in enumerate(shots) if shot.characters == (character,)][:per_character]
        alone = list((chosen or {}).get(character, ())) or alone
        anchors += [Anchor(character, shots[number], number) for number in alone]
        if not alone and any(character in shot.characters for shot in shots):
            anchors.append(Anchor(character, portrait, None))
    return tuple(anchors)


def sees_anchors(viewers: Sequence[Shot], anchors: Sequence[Anchor]) -> np.ndarray:
    """bool [viewers, R]: the anchors of each viewer's characters."""
    return np.array([[anchor.character in shot.characters for anchor in anchors] for shot in viewers], bool).reshape(
        len(viewers), len(anchors)
    )


def anchors_see(anchors: Sequence[Anchor]) -> np.ndarray:
    """bool [R, R]: anchors see the other anchors of their character."""
    character = np.array([anchor.character for anchor in anchors])
    return (character[:, None] == character) & ~np.eye(len(anchors), dtype=bool)


def panels_see(shots: Sequence[Shot]) -> np.ndarray:
    """bool [n, n]: panels see the other panels that share a character with them."""
    shared = np.array([[bool({*a.characters} & {*b.characters}) for b in shots] for a in shots], bool)
    return shared & ~np.eye(len(shots), dtype=bool)


@dataclass(frozen=True)
class _Call:
    """One call of the denoising loop. kept: the panel that each row is, -1 - character for a portrait, or None."""

    shots: tuple[Shot, ...]
    sharing: Sharing | None
    kept: tuple[int | None, ...]
    reads_bank: bool = False


class StoryPainter:
    """Paints stories with one plan.

    Args:
      negative: the negative prompt, or None.
      seed: decides which tokens are sampled.
      at_once: panels that are denoised in one call, where they do not share or read anchors (bank, replay); more where
        the painter's mesh would else be idle.
      chosen_anchors: panels that are anchors of a character; the others choose by themselves.
    """

    def __init__(
        self,
        painter: Painter,
        plan: SharingPlan | None,
        options: PaintOptions,
        negative: str | None = None,
        seed: int = 0,
        at_once: int = 4,
        chosen_anchors: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.painter, self.plan, self.options = painter, plan, options
        self.negative, self.seed = negative, seed
        self.at_once = -(-max(1, at_once) // painter.panels_over) * painter.panels_over
        self.chosen_anchors = chosen_anchors

    def paint(
        self,
        shots: Sequence[Shot],
        portraits: Sequence[Shot] = (),
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> PaintedStory:
        """Paints all panels; `on_progress` gets the number of pictures that a call has finished."""
        return self._run(self._calls(shots, portraits), len(shots), on_progress)

    def redraw(self, panel: int, seed: int, shots: Sequence[Shot], portraits: Sequence[Shot] = ()) -> np.ndarray:
        """One panel again from another seed, uint8 [H, W, 3], with the anchors as they were; no other panel changes."""
        shot = dataclasses.replace(shots[panel], seed=(seed,))
        return self._run(self._redraw_calls(panel, shot, shots, portraits), 1, lambda done: None).pictures[0]

    def _redraw_calls(self, panel: int, shot: Shot, shots: Sequence[Shot], portraits: Sequence[Shot]) -> list[_Call]:
        alone = _Call((shot,), None, (0,))
        if self.plan is None:
            return [alone]
        if self.plan.strategy == "joint":
            return [self._joint_redraw_call(panel, shot, shots)]
        anchors = list(plan_anchors(shots, portraits, self.plan.anchors, self.chosen_anchors))
        covered = {anchor.character for anchor in anchors if anchor.panel != panel}
        anchors = [anchor for anchor in anchors if anchor.panel != panel or anchor.character not in covered]
        if not anchors:
            return [alone]
        calls = self._read_calls(anchors, [(0, shot)])
        if self._banked(anchors):
            calls = [self._write_call(anchors), *calls]
        unkept: list[tuple[int | None, ...]] = [(None,) * len(call.kept) for call in calls]
        unkept[-1] = (*unkept[-1][1:], 0)  # the last row of the last call is the new picture
        return [dataclasses.replace(call, kept=kept) for call, kept in zip(calls, unkept, strict=True)]

    def _joint_redraw_call(self, panel: int, shot: Shot, shots: Sequence[Shot]) -> _Call:
        """The panels in reach once more, and beside them the new picture, which sees what the old one saw.

        Where a window is narrower than the story, they see all panels in its reach at once, which is nearly the same.
        """
        assert self.plan is not None
        reach = self.plan.window or len(shots)
        near = range(max(0, panel - reach + 1), min(len(shots), panel + reach))
        others = [shots[number] for number in near]
        sees = panels_see(others)
        sees = np.concatenate([sees, sees[[near.index(panel)]]])
        return _Call((*others, shot), self._sharing(sees, len(others), reading=False), (None,) * len(others) + (0,))

    def memory(self, shots: Sequence[Shot], portraits: Sequence[Shot] = ()) -> int:
        """Bytes at the peak of `paint`: weights, the largest call's arrays, pictures. Compiles, but runs nothing."""
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.painter.params))
        unet, decoder = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(self.painter.params[part])) for part in ("unet", "autoencoder")
        )
        bank: Any = None
        largest = 0
        for call in self._calls(shots, portraits):
            if call.sharing is not None and call.reads_bank:
                call = dataclasses.replace(call, sharing=dataclasses.replace(call.sharing, bank=bank))
            compiled, _ = self.painter.compiled(*self._arguments(call))
            memory = Memory.of(compiled)
            bank = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), compiled.out_info.bank) or bank
            shape = compiled.out_info.latents
            _, decoding = self.painter.compiled_decoder(jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype))
            kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(compiled.out_info))
            largest = max(largest, memory.total - unet, kept + Memory.of(decoding).total - decoder)
        size = self.options.height * self.options.width * 3
        return weights + largest + len(shots) * size

    def _banked(self, anchors: Sequence[Anchor]) -> bool:
        return bool(anchors) and self.plan is not None and self.plan.strategy == "bank"

    def _calls(self, shots: Sequence[Shot], portraits: Sequence[Shot]) -> list[_Call]:
        if self.plan is None:
            return [_Call(part, None, kept) for part, kept in self._parts(list(enumerate(shots)))]
        if self.plan.strategy == "joint":
            more = 0 if self.plan.window else -len(shots) % self.painter.panels_over  # panels that nobody sees
            sees = np.pad(panels_see(shots), (0, more))
            kept = (*range(len(shots)), *(None,) * more)
            return [_Call((*shots, *[shots[-1]] * more), self._sharing(sees, len(sees), reading=False), kept)]
        anchors = plan_anchors(shots, portraits, self.plan.anchors, self.chosen_anchors)
        made = {anchor.panel for anchor in anchors}
        readers = [(number, shot) for number, shot in enumerate(shots) if number not in made]
        if not anchors:
            return [_Call(part, None, kept) for part, kept in self._parts(readers)]
        calls = [self._write_call(anchors)] if self.plan.strategy == "bank" or not readers else []
        return calls + self._read_calls(anchors, readers)

    def _write_call(self, anchors: Sequence[Anchor]) -> _Call:
        sharing = self._sharing(anchors_see(anchors), len(anchors), reading=False, store=self._banked(anchors))
        return _Call(tuple(anchor.shot for anchor in anchors), sharing, self._kept(anchors))

    @staticmethod
    def _kept(anchors: Sequence[Anchor]) -> tuple[int | None, ...]:
        return tuple(-1 - anchor.character if anchor.panel is None else anchor.panel for anchor in anchors)

    def _read_calls(self, anchors: Sequence[Anchor], readers: Sequence[tuple[int, Shot]]) -> list[_Call]:
        calls = []
        for number, (shots, kept) in enumerate(self._parts(readers)):
            sees = sees_anchors(shots, anchors)
            if self._banked(anchors):
                sharing = self._sharing(sees, len(anchors), reading=True)
                calls.append(_Call(shots, sharing, kept, reads_bank=True))
            else:  # replay: the anchors are computed again, blind to the readers
                sees = np.concatenate([anchors_see(anchors), sees])
                own = self._kept(anchors) if number == 0 else (None,) * len(anchors)
                sharing = self._sharing(sees, len(anchors), reading=False)
                calls.append(_Call((*(anchor.shot for anchor in anchors), *shots), sharing, own + kept))
        return calls

    def _parts(self, numbered: Sequence[tuple[int, Shot]]) -> Iterator[tuple[tuple[Shot, ...], tuple[int | None, ...]]]:
        """Shots and the panels that they are, `at_once` at a time; filled up: equal calls share a compiled program."""
        devices = self.painter.panels_over
        size = min(self.at_once, -(-len(numbered) // devices) * devices)
        for start in range(0, len(numbered), self.at_once):
            kept, shots = zip(*numbered[start : start + self.at_once], strict=True)
            padding = size - len(shots)
            yield shots + shots[-1:] * padding, kept + (None,) * padding

    def _sharing(self, sees: np.ndarray, anchors: int, reading: bool, store: bool = False) -> Sharing:
        assert self.plan is not None
        unet = self.painter.model.config.unet
        grids = unet.sharing_grids(*self.painter.model.config.latent_size(self.options.height, self.options.width))
        draws = Draws.from_seed(self.seed, self.options.steps, unet.sharing_layers, anchors, grids)
        return share_steps(self.plan, draws, sees[None], reading, store)

    def _arguments(self, call: _Call) -> tuple[jax.Array, TextStates, TextStates, PaintOptions, Sharing | None]:
        positive = self.painter.encode([shot.prompt for shot in call.shots], self.options)
        noise = self.painter.noise([shot.seed for shot in call.shots], self.options)
        negative = self.painter.encode_negative(self.negative, self.options)
        return noise[None], jax.tree.map(lambda x: x[None], positive), negative, self.options, call.sharing

    def _run(self, calls: Sequence[_Call], count: int, on_progress: Callable[[int], None]) -> PaintedStory:
        bank: Any = None
        pictures: dict[int, np.ndarray] = {}
        for call in calls:
            if call.sharing is not None and call.reads_bank:
                call = dataclasses.replace(call, sharing=dataclasses.replace(call.sharing, bank=bank))
            done: Denoised = self.painter.paint(*self._arguments(call))
            bank = done.bank or bank
            rows = [row for row, panel in enumerate(call.kept) if panel is not None]
            if not rows:
                continue
            made = self.painter.pictures(done.latents[0][jnp.asarray(rows)])
            pictures.update({call.kept[row]: picture for row, picture in zip(rows, made, strict=True)})  # type: ignore[misc]
            on_progress(len({panel for panel in call.kept if panel is not None and panel >= 0}))
        portraits = {-1 - number: picture for number, picture in pictures.items() if number < 0}
        return PaintedStory(np.stack([pictures[number] for number in range(count)]), portraits)
