"""What our code gives for each kind of fixture: name of the fixture -> function from a `Fixture` to its outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.golden_cases import (
    clip_text,
    clip_tokenizer,
    clip_tower,
    consistent_attention,
    llava_prep,
    losses,
    match_eval,
    pipeline,
    pixel_decoder,
    pixellm_full,
    schedulers,
    unet,
    vae,
)
from tests.golden_cases.fixture import Fixture

CASES: dict[str, Callable[[Fixture], dict[str, np.ndarray]]] = {
    "clip_text": clip_text.outputs,
    "clip_text_projection": clip_text.outputs,
    "clip_tower": clip_tower.outputs,
    "consistent_attention_index": consistent_attention.gathered,
    "consistent_attention_mask": consistent_attention.masked,
    "llava_prep": llava_prep.outputs,
    "losses": losses.outputs,
    "mask_rules": consistent_attention.rules,
    "match_eval": match_eval.outputs,
    "pixel_decoder": pixel_decoder.outputs,
    "pixellm_full": pixellm_full.outputs,
    "schedulers": schedulers.outputs,
    "sd15_unet": unet.outputs,
    "sd15_unet_consistent_mask": unet.consistent,
    "sdxl_unet": unet.outputs,
    "sdxl_unet_consistent_index": unet.consistent,
    "sdxl_unet_consistent_mask": unet.consistent,
    "sdxl_pipeline": pipeline.plain,
    "story_index": pipeline.story,
    "story_mask": pipeline.story,
    "tokenizer": clip_tokenizer.outputs,
    "vae": vae.outputs,
}
