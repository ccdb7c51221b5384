"""Turn a script into panels and a comic page with a trained StoryDiffusion.

  python -m experiments.story --checkpoint=runs/storydiffusion --story=examples/moon.txt
  python -m experiments.story --checkpoint=runs/storydiffusion --again=stories/moon              (the same pictures)
  python -m experiments.story --checkpoint=runs/storydiffusion --again=stories/moon --redraw=3 --seed=5   (one panel)

Written into --out: one PNG per panel, the comic as PNG pages and as PDF, and story.json, from which the same pictures
come again. Scripts are text (characters as `[Bob] a robot`, panels as `[Bob] on a beach #caption`) or YAML projects.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from pixelstory_jax.training.errors import UserError

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Folder of a training run, one of its checkpoints, or a pipeline folder of diffusers."
)
STORY = flags.DEFINE_string("story", "", "Script: a text file, or a .yaml project.")
AGAIN = flags.DEFINE_string("again", "", "Folder of a told story (or its story.json): the same pictures once more.")
REDRAW = flags.DEFINE_integer("redraw", 0, "With --again: only this panel, counted from 1, from --seed.")
OUT = flags.DEFINE_string("out", "", "Output folder; stories/NAME-OF-THE-SCRIPT or, with --again, that folder.")
SEED = flags.DEFINE_integer(
    "seed", None, "Of the story (else that of the script), or of the panel that is drawn again.", lower_bound=0
)
SHARING = flags.DEFINE_enum("sharing", "bank", ["bank", "replay", "joint", "off"], "How panels share their character.")
ANCHORS = flags.DEFINE_integer("anchors", 2, "With bank and replay: panels of a character that the others look at.")
WINDOW = flags.DEFINE_integer("window", 4, "With joint: panels that see each other.")
RATE = flags.DEFINE_multi_float(
    "rate", None, "Share of the tokens that panels show to each other; repeated: per grid, coarsest first. As --steps."
)
SAMPLING = flags.DEFINE_enum(
    "sampling", "gathered", ["gathered", "bernoulli", "mask"], "How tokens are sampled; the apps: mask, bernoulli."
)
SCHEDULE = flags.DEFINE_enum(
    "schedule", "always", ["always", "app", "low_vram"], "When layers share: always, or by the gates of a released app."
)
FREEU = flags.DEFINE_bool("freeu", None, "Re-weighting of skips as in the released apps; as --steps.")
STEPS = flags.DEFINE_integer("steps", None, "Denoising steps; those of the checkpoint's evaluation if not given.")
GUIDANCE = flags.DEFINE_float("guidance", None, "How closely prompts are followed; as --steps.")
LAYOUT = flags.DEFINE_enum("layout", "grid", ["grid", "four", "classic", "strip"], "Arrangement of the comic page.")
WIDTH = flags.DEFINE_integer("width", 1400, "Width of a page in pixels.")
FONT = flags.DEFINE_multi_string("font", [], "Font file that is tried before the shipped ones; can be repeated.")


OF_A_NEW_STORY = (
    *("sharing", "anchors", "window", "rate", "sampling", "schedule", "steps", "guidance", "freeu"),
    *("layout", "width", "font"),
)


def main() -> None:
    if not CHECKPOINT.value:
        raise UserError("--checkpoint is needed, as --checkpoint=runs/storydiffusion (see --help)")
    if bool(STORY.value) == bool(AGAIN.value):
        raise UserError("Give either --story=SCRIPT or --again=FOLDER of a told story (see --help)")
    if REDRAW.value and not AGAIN.value:
        raise UserError("--redraw needs --again=FOLDER of a told story")

    given = [f"--{name}" for name in OF_A_NEW_STORY if flags.FLAGS[name].present]
    if AGAIN.value and given:
        raise UserError(f"--again takes its settings from story.json; {', '.join(given)} need a new story (--story)")

    from pixelstory_jax.training.compilation_cache import set_compilation_cache

    set_compilation_cache()
    command_line.explain(again if AGAIN.value else tell)


def tell() -> None:
    """A new story."""
    from tqdm import tqdm

    from pixelstory_jax.data.story_script import read_script
    from pixelstory_jax.inference.story_teller import PageOptions, StoryTeller

    script = read_script(Path(STORY.value))
    changes: dict[str, Any] = {"steps": STEPS.value, "guidance": GUIDANCE.value, "freeu": FREEU.value}
    if SHARING.value == "off":
        changes["plan"] = None
    else:
        rates = RATE.value and (RATE.value[0] if len(RATE.value) == 1 else tuple(RATE.value))
        changes |= {"strategy": SHARING.value, "anchors": ANCHORS.value, "window": WINDOW.value, "rate": rates}
        changes |= {"sampling": SAMPLING.value, "schedule": SCHEDULE.value}
    teller = StoryTeller.from_checkpoint(
        CHECKPOINT.value,
        page=PageOptions(LAYOUT.value, WIDTH.value, tuple(FONT.value)),
        **{name: value for name, value in changes.items() if value is not None or name == "plan"},
    )
    seed = (script.seed or 0) if SEED.value is None else SEED.value
    teller.check_pages(script, seed)
    print(f"{len(script.panels)} panels, seed {seed}, sharing: {SHARING.value}", flush=True)
    print(
        f"Memory at the peak: {teller.memory(script, seed) / 1e6:,.0f} MB (arrays of the compiled programs)", flush=True
    )
    with tqdm(total=len(script.panels), unit="panel", desc="Painting") as bar:
        story = teller.tell(script, seed, on_progress=bar.update)
    report(story.save(OUT.value or Path("stories") / Path(STORY.value).stem))


def again() -> None:
    """A told story once more, as a whole or one panel of it."""
    from pixelstory_jax.inference.story_teller import (
        StoryTeller,
        page_from_manifest,
        plan_from_manifest,
        read_manifest,
        read_panels,
        script_from_manifest,
    )

    manifest = read_manifest(AGAIN.value)
    script = script_from_manifest(manifest)
    plan, page = plan_from_manifest(manifest), page_from_manifest(manifest)
    teller = StoryTeller.from_checkpoint(CHECKPOINT.value, plan=plan, page=page, **manifest["sampling"])
    teller.check_model(manifest)
    redrawn = {int(number): seed for number, seed in manifest["redrawn"].items()}
    folder = Path(AGAIN.value) if Path(AGAIN.value).is_dir() else Path(AGAIN.value).parent
    out = Path(OUT.value) if OUT.value else folder
    elsewhere = out.resolve() != folder.resolve()
    if not REDRAW.value:
        story = teller.tell(script, manifest["seed"], redrawn)
        same = story.manifest["panels_sha256"] == manifest["panels_sha256"]
        if not same and not elsewhere:
            raise UserError(
                "The pictures differ from those of the story (other versions or another device, see story.json), which "
                "were left as they are; --out=FOLDER writes the new ones"
            )
        print("The same pictures, bit for bit." if same else "The pictures differ: other versions or another device.")
        report(story.save(out))
        return
    number = REDRAW.value - 1
    if not 0 <= number < len(script.panels):
        raise UserError(f"--redraw={REDRAW.value}: the story has the panels 1 to {len(script.panels)}")
    if SEED.value is None:
        raise UserError("--redraw needs --seed, from which the panel is drawn")
    panels = read_panels(folder, manifest)
    panels[number] = teller.redraw(script, manifest["seed"], number, SEED.value)
    redrawn[number] = SEED.value
    story = teller.finish(script, manifest["seed"], panels, {}, redrawn)
    paths = story.save(out, None if elsewhere else [number])
    if elsewhere:
        portraits = sorted(folder.glob("portrait_*.png"))
        paths += [Path(shutil.copy(path, out)) for path in portraits]
    report(paths)


def report(paths: list[Path]) -> None:
    print("Written: " + ", ".join(map(str, paths)))


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
