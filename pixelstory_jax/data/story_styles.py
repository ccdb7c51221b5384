"""Styles of pictures: words that are put around every prompt of a story, and words that the pictures are kept from.

The names are those of the StoryDiffusion app; the wording is ours.
"""

from __future__ import annotations

import dataclasses

PLACEHOLDER = "{prompt}"
NO_STYLE = "(No style)"


@dataclasses.dataclass(frozen=True)
class Style:
    """positive: text that contains {prompt}; negative: what the pictures must not show, may be empty.

    Raises:
      ValueError: {prompt} is missing in `positive`.
    """

    name: str
    positive: str
    negative: str = ""

    def __post_init__(self) -> None:
        if PLACEHOLDER not in self.positive:
            raise ValueError(f"The style {self.name!r} lacks {PLACEHOLDER}, the place of a panel's own words.")


STYLES = {
    style.name: style
    for style in (
        Style(NO_STYLE, "{prompt}"),
        Style(
            "Japanese Anime",
            "anime drawing of {prompt}, clean ink lines, cel shading, bright colours, painted background",
            "photograph, 3d render, blurry, deformed hands, watermark, dull colours",
        ),
        Style(
            "Digital/Oil Painting",
            "{prompt}, digital oil painting, visible brush strokes, rich colours, soft light, fine detail",
            "photograph, flat colours, line drawing, blurry, deformed, watermark",
        ),
        Style(
            "Pixar/Disney Character",
            "{prompt}, frame of a computer-animated family film, round friendly shapes, large eyes, warm light",
            "photograph, sketch, grim, ugly, deformed, noisy, watermark",
        ),
        Style(
            "Photographic",
            "photograph of {prompt}, 35mm lens, natural light, shallow depth of field, sharp focus",
            "drawing, painting, cartoon, render, blurry, deformed, watermark",
        ),
        Style(
            "Comic book",
            "comic book panel of {prompt}, bold black outlines, flat bright colours, halftone shading",
            "photograph, 3d render, blurry, deformed, watermark",
        ),
        Style(
            "Line art",
            "line drawing of {prompt}, thin black ink on white paper, no shading, minimal",
            "photograph, colour, shading, 3d render, blurry, deformed, watermark",
        ),
        Style(
            "Black and White Film Noir",
            "{prompt}, black and white film noir still, hard light, deep shadows, rain and smoke, 1940s",
            "colour, cartoon, cheerful, flat light, blurry, deformed, watermark",
        ),
        Style(
            "Isometric Rooms",
            "{prompt}, isometric view of a small room, cut-away walls, tiny tidy objects, soft clay look",
            "photograph, perspective distortion, text, blurry, deformed, watermark",
        ),
    )
}
"""By name."""


def find_style(name: str) -> Style:
    """The style of a name, in any case, brackets left out or not. Raises ValueError that lists the known names."""
    wanted = _plain(name)
    for style in STYLES.values():
        if _plain(style.name) == wanted:
            return style
    raise ValueError(f"there is no style {name!r}; known are {', '.join(STYLES)}")


def apply_style(style: Style, prompt: str, negative: str = "") -> tuple[str, str]:
    """(positive, negative) texts of a panel: its prompt in the style, the style's negative before the story's."""
    return style.positive.replace(PLACEHOLDER, prompt.strip()), f"{style.negative} {negative.strip()}".strip()


def _plain(name: str) -> str:
    return " ".join(name.casefold().strip("() ").split())
