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
# # PixelLM: ask about a picture, get words and masks
#
# [PixelLM](https://arxiv.org/abs/2312.02228) is a language model that looks at a picture and answers in text, with a mask
# for each thing that it names. This notebook trains the tiny variant on real pictures that ship with the package, shows how
# the loss falls, scores generated answers, and asks questions about pictures of yours.
#
# **On Colab**: choose *File → Open notebook → GitHub*, enter the address of this repository and pick
# `colab/pixellm.ipynb`. The runtime type is a TPU; a GPU or a CPU will do as well. Training takes a few minutes on an
# accelerator and about 20 minutes on two CPU cores.

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
# `STEPS` is the length of the training (0 for that of the config), `EXAMPLES` the number of questions of each kind in the final score. Set
# `WORKDIR` to a folder on a mounted drive to keep what is written; a run that was interrupted goes on where it stopped
# when the cells are run again.

# %% tags=["parameters"]
STEPS = int(os.environ.get("PIXELSTORY_STEPS", "0"))  # 0: as the config says
EXAMPLES = int(os.environ.get("PIXELSTORY_EXAMPLES", "50"))
WORKDIR = os.environ.get("PIXELSTORY_WORKDIR", "runs/pixellm-notebook")

# %%
from configs.pixellm import get_config

config = get_config("tiny")
config.train.steps = STEPS or config.train.steps
config.eval.examples = EXAMPLES
config.eval.splits = ("test", "unseen")  # new scenes, and scenes with names that were never trained
print(config.model.to_dict())

# %% [markdown]
# A picture of the training data with its questions. Numbers in an answer stand for masks: each becomes a group of
# codebook tokens whose hidden states the pixel decoder turns into a mask.

# %%
from PIL import Image

from pixelstory_jax.data.sources import build_scenes
from pixelstory_jax.inference.overlay import overlay_masks

scene, conversations = build_scenes(config, "train", seed=config.seed)[5]
for conversation in conversations:
    for turn in conversation:
        print(f"{turn.text}\n    {turn.answer}")
Image.fromarray(overlay_masks(scene.image, list(scene.masks))).resize((432, 432))

# %% [markdown]
# ## 3. Train
#
# The same as `python -m experiments.train --config=configs/pixellm.py` on the command line. The first step waits for the
# compiler.

# %%
from pixelstory_jax.data import build_source
from pixelstory_jax.objectives import build_objective
from pixelstory_jax.training.loop import train

objective = build_objective(config)
result = train(config, objective, build_source(config, "train"), WORKDIR)

# %% [markdown]
# The loss and its terms: the next token (`language`), the masks (`bce`, `dice`), and the extra weight of pixels that two
# masks of one answer claim (`refinement`).

# %%
from pixelstory_jax.training.metrics import read_metrics

lines = read_metrics(WORKDIR, "train")
try:
    import matplotlib.pyplot as plt
except ImportError:  # pip install matplotlib
    for line in lines[:: max(1, len(lines) // 20)]:
        print(f"step {line['step']:5d}  loss {line['loss']:7.3f}  {'#' * min(100, round(8 * line['loss']))}")
else:
    figure, axes = plt.subplots(figsize=(8, 4))
    for term in ("loss", "language", "bce", "dice", "refinement"):
        axes.plot([line["step"] for line in lines], [line[term] for line in lines], label=term)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend()
    plt.show()

# %% [markdown]
# ## 4. The scores
#
# All from *generated* answers. gIoU is the mean intersection over union of the masks, matched one to one; *named* is the
# share of answers with the right set of things; *rejected* the share of absent things that the answer denies.

# %%
evaluation = result.scores  # of the parameters with the best score, which are used from here on
print((evaluation / "table.txt").read_text())

# %% [markdown]
# The evaluation sheet: picture, true masks, predicted masks, question and answer, each phrase in the colour of its mask.

# %%
from IPython.display import display

for page in sorted(evaluation.glob("*.png")):
    display(Image.open(page))

# %% [markdown]
# ## 5. Ask
#
# First about a scene that the model has not seen. `chat` remembers earlier turns.

# %%
from pixelstory_jax.data.builtin import compose
from pixelstory_jax.inference.overlay import Exchange, draw_answers
from pixelstory_jax.inference.segmenter import Segmenter

segmenter = Segmenter.from_checkpoint(WORKDIR)
picture = compose(seed=7, index=3, split="test", size=288).image


def ask(picture, *questions):
    """Asks one after the other, shows the masks, and gives the answers back."""
    chat = segmenter.chat(picture)
    exchanges = [Exchange(question, chat.ask(question)) for question in questions]
    display(Image.fromarray(draw_answers(chat.image, exchanges)))
    return [exchange.answer for exchange in exchanges]


answers = ask(picture, "Find all the animals in this image.", "What could you eat here?")

# %% [markdown]
# An answer has its text, and for each target the phrase that names it, a mask of the size of the picture and a score.

# %%
for answer in answers:
    print(answer.text)
    for target in answer.targets:
        print(f"    {target.phrase}: mask {target.mask.shape}, score {target.score:.2f}, box {target.box}")

# %% [markdown]
# Then about a picture of your own: put its path here. On Colab, use the folder symbol on the left to upload it, or run
# `from google.colab import files; PICTURE = next(iter(files.upload()))`. The tiny model knows about 160 names and
# has seen composed pictures only, so do not expect much of it on photos; `configs/pixellm.py:7b` is the paper's model.

# %%
PICTURE = ""  # @param {type:"string"}
QUESTION = "What can you see in this picture? Please show it."  # @param {type:"string"}

if PICTURE:
    ask(PICTURE, QUESTION)
else:
    print("Enter the path of a picture to ask about it.")
