"""Wordings of questions and answers: those that released PixelLM and LISA weights were trained on, and our own.

{c} a name or a list of names, {s} a sentence, [SEG] the place of the masks. The released ones have to be kept to
the letter, "asegment" included. Source: `utils/utils.py` of PixelLM and LISA.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_SHORT = (
    "Can you segment the {c} in this image?",
    "Please segment the {c} in this image.",
    "What is {c} in this image? Please respond with segmentation mask.",
    "What is {c} in this image? Please output segmentation mask.",
)
_LONG = (
    "{s} Please respond with segmentation mask.",
    "{s} Please output segmentation mask.",
)
EXPLANATORY = (
    "Please output segmentation mask and explain why.",
    "Please output segmentation mask and explain the reason.",
    "Please output segmentation mask and give some explanation.",
)
ANSWERS = (
    "It is [SEG].",
    "Sure, [SEG].",
    "Sure, it is [SEG].",
    "Sure, the segmentation result is [SEG].",
    "[SEG].",
)
SINGLE_ANSWERS = ("{c} is [SEG].", "The segmentation result of {c} is [SEG].", "[SEG].")
MUSE_SINGLE_ANSWERS = SINGLE_ANSWERS[:1]
MUSE_MULTI_ANSWERS = (
    "{c} are [SEG], separately.",
    "{c} are [SEG].",
    "Sure, {c} are [SEG], separately.",
    "Sure, {c} are [SEG].",
    "the segmentation result of {c} are [SEG].",
    "the segmentation result of {c} are [SEG], separately.",
    "Sure, the segmentation result of {c} are [SEG].",
    "Sure, the segmentation result of {c} are [SEG], separately.",
)
MULTI_ANSWERS = (*MUSE_MULTI_ANSWERS, "Sure, they are [SEG].", "They are [SEG].", "[SEG].")

# What `--use_expand_question_list` adds, which is part of the released training command.
_MORE_LONG = (
    "{s} Provide the segmentation mask.",
    "{s} Output the segmentation mask.",
    "{s} Please show the segmentation mask.",
    "{s} I'd appreciate segmentation masks.",
    "{s} Please highlight the segmentation mask.",
)
_MORE_SHORT = (
    "Could you identify the {c} in this picture?",
    "Are you able to delineate the {c} in the image?",
    "Can you pinpoint the {c} in this photo?",
    "Is it possible for you to highlight the {c} in this image?",
    "Can you discern the {c} in the given picture?",
    "Can you provide me with asegment of the {c}?",
    "Please perform image segmentation to isolate the {c} in this image.",
    "Help me segment the {c}.",
    "Would you be willing to segment the {c}?",
    "Can you identify {c} in this picture? Please provide a segmentation mask.",
    "Could you point out {c} in this image and show it with a segmentation mask?",
    "In this image, where is {c}? I'd appreciate a segmentation mask.",
    "Please highlight {c} in this image using a segmentation mask.",
    "In the picture provided, can you show where {c} is with a segmentation mask?",
)

SHORT_QUESTIONS = (*_SHORT, *_MORE_SHORT, *_MORE_SHORT)
"""Questions for names. The additions count twice: two data sets of the reference extend one list."""
LONG_QUESTIONS = (*_LONG, *_MORE_LONG)
"""Requests for masks behind a sentence."""

# Our own wordings. A name may come with an article or not ("the left chair", "chair"), so they suit both.
VARIED_QUESTIONS = (
    "Segment {c}.",
    "Please segment {c} in this picture.",
    "Show me {c}.",
    "Find {c}.",
    "Mark {c} in the picture.",
    "Point out {c}, please.",
    "I am looking for {c}.",
    "Where can I see {c}?",
    "Can you outline {c} for me?",
    "Which pixels belong to {c}?",
)
VARIED_ANSWERS = (
    ("", "Here is ", "Sure, here is ", "I see ", "This is "),
    ("", "Here are ", "Sure, here are ", "I see ", "These are "),
)


def absent(names: Sequence[str]) -> str:
    """The answer where nothing that was asked for is in the picture; the released data never asks so."""
    bare = [re.sub(r"^(?:the|an?) ", "", name, flags=re.IGNORECASE) for name in names]
    return f"There is no {' or '.join(bare)} in this image."
