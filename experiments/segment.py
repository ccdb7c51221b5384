"""Ask a trained PixelLM about a picture: prints the answer and writes its masks.

  python -m experiments.segment --checkpoint=runs/pixellm --image=photo.jpg --question="What here could you eat?"
  python -m experiments.segment --checkpoint=runs/pixellm --image=photo.jpg

--question can be given several times: each is a turn of one conversation. Without it, questions are read from the
terminal until an empty line. Written into --out: overlay.png (masks with a legend), one PNG mask per target and
answer.json (text, phrases, scores, boxes, COCO run lengths and polygons).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import flags

from experiments import command_line
from pixelstory_jax.training.errors import UserError

CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Folder of a training run, or one of its checkpoints.")
IMAGE = flags.DEFINE_string("image", "", "Picture file: PNG, JPEG, WebP, ...")
QUESTION = flags.DEFINE_multi_string("question", [], "What to ask; repeat it for several turns.")
OUT = flags.DEFINE_string("out", "", "Output folder; answers/NAME-OF-THE-PICTURE if not given.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 96, "Longest answer in tokens.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the likeliest answer; more: drawn, the higher the freer.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "With --temperature: only the likeliest tokens that reach this probability.")
SEED = flags.DEFINE_integer("seed", 0, "With --temperature: the same seed draws the same answers.")


def main() -> None:
    for flag, example in ((CHECKPOINT, "runs/pixellm"), (IMAGE, "photo.jpg")):
        if not flag.value:
            raise UserError(f"--{flag.name} is needed, as --{flag.name}={example} (see --help)")

    # Imported late, so that --help and wrong flags do not wait for jax.
    from pixelstory_jax.data.images import ImageError, open_image
    from pixelstory_jax.inference.overlay import Exchange
    from pixelstory_jax.inference.saving import save_answers
    from pixelstory_jax.inference.segmenter import Segmenter
    from pixelstory_jax.training.compilation_cache import set_compilation_cache

    try:
        image = open_image(IMAGE.value)
    except ImageError as error:
        raise UserError(str(error)) from error
    set_compilation_cache()
    sampling = {"temperature": TEMPERATURE.value, "top_p": TOP_P.value, "seed": SEED.value}
    segmenter = command_line.explain(lambda: Segmenter.from_checkpoint(CHECKPOINT.value, MAX_TOKENS.value, **sampling))
    out = Path(OUT.value) if OUT.value else Path("answers") / Path(IMAGE.value).stem
    details = {"image": str(IMAGE.value), "checkpoint": str(CHECKPOINT.value)}
    chat, exchanges = segmenter.chat(image), []
    for question in QUESTION.value or questions_from_terminal():
        try:
            exchange = Exchange(question, chat.ask(question))
        except ValueError as error:
            if QUESTION.value:
                raise UserError(str(error)) from error
            print(error, flush=True)
            continue
        exchanges.append(exchange)
        if QUESTION.value:
            print(f"> {question}")
        print(coloured(exchange, sys.stdout.isatty() and "NO_COLOR" not in os.environ), flush=True)
        if QUESTION.value and len(exchanges) < len(QUESTION.value):
            continue
        try:
            files = save_answers(out, image, exchanges, details)
        except OSError as error:
            raise UserError(f"The answer cannot be written to {out}: {error.strerror or error}") from error
        print(f"Written: {', '.join(str(path) for path in files)}", flush=True)


def questions_from_terminal():
    """Lines until an empty one or the end of the input."""
    while True:
        try:
            line = input("Question (empty to end): " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            return
        yield line


def coloured(exchange, with_colours: bool) -> str:
    """The answer as a line, phrases in the colours of their masks, and a line per target."""
    from pixelstory_jax.inference.answers import phrase_spans
    from pixelstory_jax.inference.overlay import colour_of

    def paint(text: str, number: int | None) -> str:
        if number is None or not with_colours:
            return text
        red, green, blue = colour_of(number)
        return f"\033[1;38;2;{red};{green};{blue}m{text}\033[0m"

    answer = exchange.answer
    lines = ["".join(paint(text, number) for text, number in phrase_spans(answer.pieces)) or "(no words)"]
    for number, target in enumerate(answer.targets):
        share = target.mask.mean()
        where = f"{share:.1%} of the picture, box {list(target.box)}" if share else "an empty mask"
        label = paint(f"[{number + 1}] {target.phrase or 'it'}", number)
        lines.append(f"  {label}: score {target.score:.2f}, {where}")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
