"""One form for every data set: what is annotated in a picture, and what may be asked about it.

Readers (`data/readers/`) turn the files of a data set into `Annotation`s, `prepare_data` packs these into shards,
`data/asking.py` draws questions from them. H, W are height and width of the picture, M counts the regions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelstory_jax.data.builtin.questions import Conversation
from pixelstory_jax.data.masks import coco_polygons, decode_rle, encode_rle, mask_box


@dataclass(frozen=True, eq=False)
class ClassMask:
    """The pixels of one value in a map of class numbers [H, W], which all masks of a picture share: only those that are
    asked for become arrays."""

    labels: np.ndarray
    value: int


StoredMask = np.ndarray | ClassMask | Mapping[str, Any] | Sequence[Sequence[float] | Mapping[str, Any]]
"""bool [H, W], a class of a map, COCO run lengths {"size", "counts"} of either kind, or a list of parts that are
united: COCO polygons (flat lists) or run lengths."""

TASKS = ("names", "questions", "reasoning", "dialogue")


class AnnotationError(ValueError):
    """An annotation that cannot be used; one sentence that names the data set's file or id and what is wrong."""


@dataclass(frozen=True)
class Region:
    """Something with a mask.

    Attributes:
      mask: as the data set stores it, see `StoredMask`; () for the empty mask.
      name: what it is called, as "traffic light"; rephrased: what it is called in this picture, as "the light on the
        left", or "".
      id: of the data set, as text: ids above 2^31 and ids that are no numbers occur.
    """

    mask: StoredMask
    name: str = ""
    rephrased: str = ""
    id: str = ""


@dataclass(frozen=True)
class Request:
    """Something that may be asked about a picture.

    Attributes:
      words: what is asked for; one of several equal ways of saying it.
      targets: numbers of the regions that answer it, in the order of the answer; none where it is not in the picture.
      is_sentence: a whole question or wish ("What could you sit on?"), not a name or an expression ("the left chair").
      answer: text and numbers of regions (an int stands behind the phrase that names its region), where the data set
        has an answer, else None. Its ints are `targets`.
      explanation: why, in words, where the data set says so.
      id: of the data set, as text.
    """

    words: tuple[str, ...]
    targets: tuple[int, ...] = ()
    is_sentence: bool = False
    answer: tuple[str | int, ...] | None = None
    explanation: str = ""
    id: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where an annotation is from: name and split of the data set, path of the picture inside its folder, its id."""

    dataset: str
    split: str
    picture: str
    id: str = ""


@dataclass(frozen=True)
class Annotation:
    """All that a data set says about one picture.

    Attributes:
      size: (H, W) of the picture, to which the masks belong.
      task: how questions are drawn, one of `TASKS`. "names": several requests share a question; "questions": each
        request is a question; "reasoning": as that, with explanations; "dialogue": all requests are the turns of one
        conversation.
      ignored: pixels that count neither as object nor as background (crowds, unlabelled or ambiguous areas).
    """

    size: tuple[int, int]
    task: str
    regions: tuple[Region, ...]
    requests: tuple[Request, ...]
    provenance: Provenance
    ignored: StoredMask | None = None

    def mask(self, number: int) -> np.ndarray:
        """bool [H, W] of a region.

        Raises:
          AnnotationError: it is damaged, or of another size than the picture.
        """
        return self._decode(self.regions[number].mask, self.regions[number].id)

    def ignored_mask(self) -> np.ndarray | None:
        """bool [H, W], or None where nothing is ignored; errors as `mask`."""
        return None if self.ignored is None else self._decode(self.ignored, "the ignored area")

    def check_size(self, image: np.ndarray) -> None:
        """Raises AnnotationError where `image`, uint8 [H, W, 3], has another size than the annotation says."""
        if image.shape[:2] != self.size:
            raise AnnotationError(
                f"{self.provenance.dataset}: {self.provenance.picture} is {image.shape[0]} x {image.shape[1]} pixels, "
                f"its annotation is for {self.size[0]} x {self.size[1]} (height x width)"
            )

    def _decode(self, mask: StoredMask, name: str) -> np.ndarray:
        where = f"{self.provenance.dataset}, {self.provenance.picture}, mask {name}".rstrip(" ,")
        try:
            decoded = decode_mask(mask, self.size)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise AnnotationError(f"{where} cannot be decoded: {error}") from error
        if decoded.shape != self.size:
            raise AnnotationError(
                f"{where} is {decoded.shape[0]} x {decoded.shape[1]} pixels, its picture {self.size[0]} x "
                f"{self.size[1]} (height x width)"
            )
        return decoded


@dataclass(frozen=True)
class Example:
    """A picture with questions drawn about it.

    Attributes:
      image: uint8 [H, W, 3].
      masks: bool [M, H, W]; the ints of the answers number them.
      conversations: what is asked and answered.
      ignored: bool [H, W] or None, see `Annotation`.
    """

    image: np.ndarray
    masks: np.ndarray
    conversations: tuple[Conversation, ...]
    provenance: Provenance
    ignored: np.ndarray | None = None

    @property
    def boxes(self) -> np.ndarray:
        """float32 [M, 4]: x, y, width, height in pixels, zeros for an empty mask."""
        return np.array([mask_box(mask) for mask in self.masks], np.float32).reshape(-1, 4)


def decode_mask(mask: StoredMask, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] of a stored mask; polygons are cut at the border, parts united.

    Raises:
      ValueError, TypeError, KeyError: it is no such thing.
    """
    if isinstance(mask, np.ndarray):
        return mask.astype(bool)
    if isinstance(mask, ClassMask):
        return mask.labels == mask.value
    if isinstance(mask, Mapping):
        if list(mask["size"]) != list(size):  # before decoding: a few letters can claim to be a huge mask
            raise ValueError(f"its run lengths are for {mask['size']} pixels, the picture has {list(size)}")
        return decode_rle(dict(mask))
    runs = [part for part in mask if isinstance(part, Mapping)]
    polygons = [part for part in mask if not isinstance(part, Mapping)]
    return np.logical_or.reduce([coco_polygons(polygons, size), *(decode_mask(part, size) for part in runs)])


def to_json(annotation: Annotation) -> str:
    """One line that `from_json` reads; masks in arrays and maps become run lengths."""

    def storable(mask: StoredMask | None) -> Any:
        if isinstance(mask, np.ndarray):
            return encode_rle(mask)
        if isinstance(mask, ClassMask):
            return encode_rle(mask.labels == mask.value)
        if isinstance(mask, Mapping):
            counts = mask["counts"]
            return {**mask, "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
        return mask if mask is None else [storable(part) if isinstance(part, Mapping) else part for part in mask]

    regions = [dataclasses.replace(region, mask=storable(region.mask)) for region in annotation.regions]
    plain = dataclasses.replace(annotation, regions=tuple(regions), ignored=storable(annotation.ignored))
    return json.dumps(dataclasses.asdict(plain), ensure_ascii=False, separators=(",", ":"))


def from_json(line: str | bytes) -> Annotation:
    """The annotation that `to_json` wrote.

    Raises:
      AnnotationError: it is not one.
    """
    try:
        fields = json.loads(line)
        return Annotation(
            size=(int(fields["size"][0]), int(fields["size"][1])),
            task=fields["task"],
            regions=tuple(Region(**region) for region in fields["regions"]),
            requests=tuple(_request(request) for request in fields["requests"]),
            provenance=Provenance(**fields["provenance"]),
            ignored=fields["ignored"],
        )
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise AnnotationError(f"This is not a packed annotation: {error}") from error


def _request(fields: dict[str, Any]) -> Request:
    answer = fields.pop("answer")
    fields |= {name: tuple(fields[name]) for name in ("words", "targets")}
    return Request(**fields, answer=None if answer is None else tuple(answer))
