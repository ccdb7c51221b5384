"""The same batches by a PyTorch data loader, in the manner of PixelLM's `utils/refer_seg_dataset.py` and `dataset.py`.

Pillow takes the place of OpenCV. What the reference makes and does not use, the picture for SAM, is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco

from experiments.benchmarks.data_rows import Item, compared
from experiments.benchmarks.row import Side
from pixelstory_jax.data.builtin.questions import Conversation
from pixelstory_jax.data.conversations import IGNORE, STYLES, answer_text
from pixelstory_jax.data.examples import turns_of
from pixelstory_jax.data.images import fit_mask, fitted_size
from pixelstory_jax.data.tokenizers import IMAGE_END, IMAGE_START, IMAGE_TOKEN, Tokenizer, small_tokenizer

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1) * 255
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1) * 255
SLOTS = 16


def torch_pipeline(root: Path, items: Sequence[Item], canvas: int, batch: int) -> Side:
    """Batches of `items` in order, again and again."""
    torch.set_num_threads(1)  # as in the worker processes of a loader
    tokenizer = small_tokenizer()
    loader = torch.utils.data.DataLoader(
        _Pictures(root, items, canvas), batch, collate_fn=lambda examples: _collate(examples, tokenizer)
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def run() -> Any:
        made = next(batches)
        return compared(
            lambda: _colours(made["images"]), lambda: np.stack([_slots(masks, canvas) for masks in made["masks"]])
        )

    return Side(run)


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, root: Path, items: Sequence[Item], canvas: int) -> None:
        self.root, self.items, self.canvas = root, items, canvas

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, tuple[Conversation, ...]]:
        file, polygons, conversations = self.items[index]
        image = Image.open(self.root / file).convert("RGB")
        size = image.height, image.width
        height, width = fitted_size(size, self.canvas)
        resized = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        pixels = torch.from_numpy(resized).permute(2, 0, 1).contiguous()
        pixels = (pixels - MEAN) / DEVIATION
        pixels = torch.nn.functional.pad(pixels, (0, self.canvas - width, 0, self.canvas - height))
        masks = np.stack([_mask(parts, size) for parts in polygons])
        return pixels, torch.from_numpy(masks), conversations


def _mask(polygons: Any, size: tuple[int, int]) -> np.ndarray:
    runs = coco.frPyObjects(polygons, *size)
    return np.sum(coco.decode(runs), axis=2).astype(np.uint8)


def _collate(examples: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Pixels float32 [B, 3, C, C], masks float32 [K, H, W] of each, ids and labels of all conversations."""
    images, masks, asked = zip(*examples, strict=True)
    prompts = [_prompt(conversation, tokenizer) for conversations in asked for conversation in conversations]
    ids = [torch.tensor(_ids(prompt, tokenizer)) for prompt in prompts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_id)
    labels = padded.clone()
    for prompt, target in zip(prompts, labels, strict=True):
        position = 1
        target[0] = IGNORE
        for turn in prompt.split("</s>"):
            if turn:
                instruction = turn.split(" ASSISTANT: ")[0] + " ASSISTANT: "
                target[position : position + len(_ids(instruction, tokenizer)) - 2] = IGNORE
                position += len(_ids(turn, tokenizer))
        target[position:] = IGNORE
    return {
        "images": torch.stack(images),
        "masks": [mask.float() for mask in masks],
        "ids": padded,
        "labels": labels,
        "valid": padded.ne(tokenizer.pad_id),
    }


def _prompt(conversation: Conversation, tokenizer: Tokenizer) -> str:
    text = f"{STYLES['llava_v1'].first}{IMAGE_START}<image>{IMAGE_END}\n"
    for turn in turns_of(conversation):
        text += f"{turn.question} ASSISTANT: {answer_text(turn.answer or (), tokenizer)}</s>"
    return text


def _ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    parts = [tokenizer.encode(part) for part in prompt.split("<image>")]
    ids = [tokenizer.bos_id, *parts[0]]
    for part in parts[1:]:
        ids += [IMAGE_TOKEN, *part]
    return ids


def _colours(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [B, C, C, 3] of normalised pixels whose padding is zero."""
    colours = torch.where(pixels == 0, torch.zeros(()), pixels * DEVIATION + MEAN)
    return colours.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _slots(masks: torch.Tensor, canvas: int) -> np.ndarray:
    """uint8 [S, C, C] of masks [K, H, W]."""
    slots = np.zeros((SLOTS, canvas, canvas), np.uint8)
    slots[: len(masks)] = [fit_mask(mask.numpy() > 0, canvas) for mask in masks]
    return slots
