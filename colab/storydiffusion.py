# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#     toc_visible: true
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # StoryDiffusion: a script in, a comic out
#
# [StoryDiffusion](https://arxiv.org/abs/2405.01434) draws the panels of a story so that a character stays the same: while
# they are denoised, panels see tokens of each other in the self-attention of the U-Net. This notebook trains the tiny
# variant on stories about six characters that ship with the package, compares panels with sharing off and on, tells a
# story from a script, and draws one of its panels again.
#
# **On Colab**: choose *File → Open notebook → GitHub*, enter the address of this repository and pick
# `colab/storydiffusion.ipynb`. The runtime type is a TPU; a GPU or a CPU will do as well. Training takes a few minutes on
# an accelerator and about 25 minutes on two CPU cores.

# %% [markdown]
# ## 1. Install
#
# Nothing is done where the package is there already. In a copy of the repository it is installed from that copy; on
# Colab from the address that you enter here.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # @param {type:"string", placeholder:"https://github.com/OWNER/REPOSITORY"}

if importlib.util.find_spec("pixelstory_jax") is None:
    here = next((folder for folder in (Path.cwd(), Path.cwd().parent) if (folder / "pixelstory_jax").is_dir()), None)
    if here is None and not REPOSITORY:
        raise SystemExit("Enter the address of the repository above (REPOSITORY), then run this cell again.")
    package = ["-e", f"{here}[notebook]"] if here else [f"pixelstory-jax[notebook] @ git+{REPOSITORY}"]
    on_tpu = any(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *package, *(["jax[tpu]"] if on_tpu else [])], check=True
    )
    if here:
        sys.path.insert(0, str(here))  # an editable installation is seen by new processes only

# %%
import jax

print(f"jax {jax.__version__}")
jax.devices()

# %% [markdown]
# ## 2. What to train
#
# `STEPS` is the length of the training (0 for that of the config), `STORIES` the number of stories that are scored at
# the end. `CHANGES` are other fields of the config, as `--config.FIELD=VALUE` on the command line: for example
# `{"train.learning_rate": 1e-3, "eval.steps": 30}`. Set `WORKDIR` to a folder on a mounted drive to keep what is written;
# a run that was interrupted goes on where it stopped when the cells are run again.

# %% tags=["parameters"]
import json

STEPS = int(os.environ.get("PIXELSTORY_STEPS", "0"))  # 0: as the config says
STORIES = int(os.environ.get("PIXELSTORY_STORIES", "200"))
CHANGES = json.loads(os.environ.get("PIXELSTORY_CHANGES", "{}"))
WORKDIR = os.environ.get("PIXELSTORY_WORKDIR", "runs/storydiffusion-notebook")

# %%
from configs.storydiffusion import get_config

config = get_config("tiny")
config.train.steps = STEPS or config.train.steps
config.eval.stories = STORIES
config.eval.sweep_stories = min(config.eval.sweep_stories, STORIES)
config.update_from_flattened_dict(CHANGES)
print(config.model.unet.to_dict())

# %% [markdown]
# A story of the training data: one character, other poses and places in each panel. More than half of the stories do not
# say who it is, so that a panel has to look at the others to know.

# %%
import numpy as np
from PIL import Image

from pixelstory_jax.data import build_source
from pixelstory_jax.data.clip_tokenizer import small_clip_tokenizer

source = build_source(config, "train")
example = getattr(source, "source", source)[3]  # the pictures, not the latents that they become
for number, tokens in enumerate(example["tokens"], start=1):
    print(f"{number}. {small_clip_tokenizer().decode(tokens)}")
strip = Image.fromarray(np.concatenate(list(example["images"]), axis=1))
strip.resize((2 * strip.width, 2 * strip.height))

# %% [markdown]
# ## 3. Train
#
# The same as `python -m experiments.train --config=configs/storydiffusion.py` on the command line. The first step waits
# for the compiler.

# %%
from pixelstory_jax.objectives import build_objective
from pixelstory_jax.training.loop import train

result = train(config, build_objective(config), source, WORKDIR)

# %% [markdown]
# The loss, and the error of the prediction in stories whose panels saw each other and in those whose panels did not.

# %%
from pixelstory_jax.training.metrics import read_metrics

lines = read_metrics(WORKDIR, "train")
try:
    import matplotlib.pyplot as plt
except ImportError:  # pip install matplotlib
    for line in lines[:: max(1, len(lines) // 20)]:
        print(f"step {line['step']:5d}  error {line['error']:7.3f}  {'#' * min(100, round(60 * line['error']))}")
else:
    figure, axes = plt.subplots(figsize=(8, 4))
    for term in ("loss", "error_alone", "error_shared"):
        shown = [line for line in lines if line[term]]  # 0: there was no such story in the batch
        axes.plot([line["step"] for line in shown], [line[term] for line in shown], label=term)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend()
    plt.show()

# %% [markdown]
# ## 4. Sharing off and on
#
# The prompts say pose and place but not who it is. *Same character* is the share of pairs of panels within a story in
# which a classifier sees the same character: with sharing off every panel picks its own, with sharing on they should
# agree. *Pose* and *place* are the shares of panels that show what the prompt says.

# %%
evaluation = result.scores  # of the parameters with the best score, which are used from here on
print((evaluation / "table.txt").read_text())

# %% [markdown]
# The same stories from the same noise, on the left with sharing off, on the right with sharing on.

# %%
from IPython.display import display

for page in sorted(evaluation.glob("*.png")):
    display(Image.open(page))

# %% [markdown]
# ## 5. Tell a story
#
# First the characters, one a line; after an empty line the panels, one a line. `[Name]` stands for the description of a
# character and `[NC]` for nobody; what is in double quotes is said, what stands behind the `#` is the caption. Change it as
# you like: the tiny model was trained on a robot, a zombie, a scout, a red-haired girl, a girl in green and a man in orange.

# %%
from pixelstory_jax.data.story_script import StoryScript

SCRIPT = """\
title: The Robot and the Moon
seed: 7

[Bolt] a robot
[Ruby] a red-haired girl

[Bolt] standing on a beach "Where is everybody?" #A robot woke up by the sea.
[Bolt] walking in a forest #He walked to where the trees are tall.
[Ruby] jumping on a farm "Hello, robot!" "Over here!" #Beyond the trees, somebody was jumping.
[Bolt] and [Ruby] walking in the mountains "Where are we going?" "Up!" #Two walk better than one.
[NC] an empty hill at night #Night came, and with it the moon.
[Ruby] climbing on a hill at night "I can almost touch it." #
[Bolt] jumping on the moon "So can I!" #A robot jumps very high.
[Bolt] and [Ruby] standing on the moon #And from up there, they could see everybody.
"""

# %% [markdown]
# The panels in which a character is alone are drawn first; the other panels read what these have stored in a bank. What it
# will take is known before anything is drawn.

# %%
from pixelstory_jax.inference.story_teller import StoryTeller

teller = StoryTeller.from_checkpoint(WORKDIR)
script = StoryScript.from_text(SCRIPT)
seed = script.seed or 0
print(f"{len(script.panels)} panels, {teller.memory(script, seed) / 1e6:,.0f} MB at the peak")
story = teller.tell(script, seed)
for page in story.pages:
    display(page)

# %% [markdown]
# Panels, pages, a PDF and `story.json`, from which the same pictures come again, bit for bit:
# `python -m experiments.story --checkpoint=WORKDIR --again=FOLDER`.

# %%
for path in story.save(Path(WORKDIR) / "story"):
    print(path)

# %% [markdown]
# ## 6. Draw one panel again
#
# From another seed, with the same character: it looks at the same panels as before, and no other panel changes. Choose
# with the eye and save the story when you like it.

# %%
PANEL = 4  # @param {type:"integer"}
SEED = 1  # @param {type:"integer"}

panels = list(story.panels)
panels[PANEL - 1] = teller.redraw(script, seed, PANEL - 1, SEED)
redrawn = {int(number): old for number, old in story.manifest["redrawn"].items()} | {PANEL - 1: SEED}
before = Image.fromarray(np.concatenate([story.panels[PANEL - 1], panels[PANEL - 1]], axis=1))
display(before.resize((3 * before.width, 3 * before.height)))
story = teller.finish(script, seed, panels, story.portraits, redrawn)
display(story.page)

# %%
saved = story.save(Path(WORKDIR) / "story", changed=[PANEL - 1])
print(f"{saved[PANEL - 1]} and {saved[-1]}")
