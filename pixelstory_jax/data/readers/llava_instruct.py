"""LLaVA-Instruct-150k: conversations about pictures of COCO, in words only.

llava_dataset/llava_instruct_150k.json      [{"id", "image", "conversations": [{"from": human or gpt, "value"}, ...]}]
coco/train2017/*.jpg

Source of the rules: `utils/vqa_dataset.py` of PixelLM and LISA.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixelstory_jax.data.annotations import Annotation, AnnotationError, Provenance, Request
from pixelstory_jax.data.images import picture_size
from pixelstory_jax.data.readers.reader import LayoutError, need, picture_path, read_file, read_json

SPLITS = ("train",)
LAYOUT = ("llava_dataset/llava_instruct_150k.json", "coco/train2017/*.jpg")
IMAGE_MARK = "<image>"  # where the picture stands in a question; in our prompts it is always in front


class LlavaInstruct:
    """All turns about a picture are one conversation.

    Raises:
      LayoutError: the list or the folder of pictures is missing, or the list is empty.
    """

    name = "llava_instruct_150k"

    def __init__(self, root: Path, split: str) -> None:
        self.split, self.root = split, root
        path = root / LAYOUT[0]
        # Entries as text: small to keep, and to send to the processes that load.
        self.entries = [json.dumps(entry).encode() for entry in read_json(path, LAYOUT, list)]
        if not self.entries:
            raise LayoutError(f"{path} has no entries.")
        self.pictures = need(root / "coco/train2017", LAYOUT)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Annotation:
        entry = json.loads(self.entries[index])
        try:
            name, requests = entry["image"], read_turns(entry["conversations"])
        except AnnotationError as error:
            raise AnnotationError(f"{LAYOUT[0]}, entry {index}: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise AnnotationError(
                f"{LAYOUT[0]}, entry {index} needs image and conversations of from and value: "
                f"{type(error).__name__} {error}"
            ) from error
        path = picture_path(self.pictures, name)
        return Annotation(
            size=picture_size(path),
            task="dialogue",
            regions=(),
            requests=requests,
            provenance=Provenance(
                self.name, self.split, path.relative_to(self.root).as_posix(), str(entry.get("id", index))
            ),
        )

    def picture(self, index: int) -> bytes:
        entry = json.loads(self.entries[index])
        return read_file(picture_path(self.pictures, entry.get("image") if isinstance(entry, dict) else None))


def read_turns(sentences: Sequence[dict[str, Any]]) -> tuple[Request, ...]:
    """Questions with their answers; an answer before the first question and a question without answer are left out.

    Raises:
      AnnotationError: questions and answers do not take turns, or there are none.
    """
    spoken = [(sentence["from"], _without_mark(sentence["value"])) for sentence in sentences]
    if spoken and spoken[0][0] == "gpt":
        spoken = spoken[1:]
    if any(who != ("human", "gpt")[number % 2] for number, (who, _) in enumerate(spoken)):
        raise AnnotationError(
            f"human and gpt have to take turns, but here speak {', '.join(who for who, _ in spoken)}."
        )
    turns = [(asked, answer) for (_, asked), (_, answer) in zip(spoken[::2], spoken[1::2], strict=False)]
    if not turns:
        raise AnnotationError("no question has an answer.")
    return tuple(Request((asked,), is_sentence=True, answer=(answer,)) for asked, answer in turns)


def _without_mark(text: str) -> str:
    """As the reference has it, white space around a text goes with the mark only."""
    return text.replace(IMAGE_MARK, "").strip() if IMAGE_MARK in text else text
