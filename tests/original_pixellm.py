"""Runs the original PixelLM code, unmodified, on a model that this package exported, and compares what both answer.

  python -m tests.original_pixellm --repository=PixelLM --python=old/bin/python --tokenizer=tokenizer.model

Not a test of the suite: it needs a clone of the original repository (MaverickRen/PixelLM), a Python in which it runs
(pip install torch transformers==4.31.0 accelerate==0.21.0 "numpy<2" sentencepiece opencv-python-headless scipy; its
imports of torchvision are replaced here, and calls that want a GPU do nothing) and a SentencePiece file of 32,000
pieces (LLaMA's, or data/tokenizer.model.v1 of the package mistral-common). The model has random weights, the structure
of PixelLM-7B and a small width. Printed: whether the prompt's and the answer's tokens are equal, and how far the masks
are apart. Exits with 1 where a token or a mask pixel differs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import command_line
from pixelstory_jax.training.errors import UserError

REPOSITORY = flags.DEFINE_string("repository", "", "Clone of the original repository.")
PYTHON = flags.DEFINE_string("python", "", "Python that has what the original code needs.")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "SentencePiece file of 32,000 pieces.")

QUESTION = "What can you eat here?"
NEW_TOKENS = 12
CODEBOOK = range(32003, 32009)
RUNNER = r"""
import builtins, importlib.machinery, os, sys, types
import numpy as np, torch
from PIL import Image

repository, export, photo, out, question, new_tokens = sys.argv[1:]
os.chdir(repository)
sys.path.insert(0, repository)
same = lambda self, *args, **kwargs: self
torch.Tensor.cuda = torch.nn.Module.cuda = same
move = torch.nn.Module.to
torch.nn.Module.to = lambda self, *args, **kwargs: move(
    self, *args, **{name: value for name, value in kwargs.items() if not (name == "device" and isinstance(value, int))}
)
names = ("torchvision", "torchvision.ops", "torchvision.ops.boxes", "torchvision.transforms",
         "torchvision.transforms.functional")
for name in names:
    module = sys.modules[name] = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.batched_nms = module.box_area = None
    module.to_pil_image = Image.fromarray
    module.resize = lambda image, size, **kwargs: image.resize((size[1], size[0]), Image.BILINEAR)
import model.PixelLM as original

evaluate = original.PixelLMForCausalLM.evaluate
def recorded(self, *args, **kwargs):
    result = evaluate(self, *args, **{**kwargs, "max_new_tokens": int(new_tokens)})
    np.savez(out, ids=result[0][0].numpy(), masks=result[1][0].float().numpy())
    sys.exit(0)
original.PixelLMForCausalLM.evaluate = recorded
answers = iter([question, photo])
builtins.input = lambda prompt="": next(answers)
import chat
chat.main([f"--version={export}", f"--vision-tower={export}/clip_vision_tower", "--precision=fp32",
           "--seg_token_num=3", "--image_feature_scale_num=2", "--pad_train_clip_images", "--resize_vision_tower",
           "--preprocessor_config=configs/preprocessor_448.json", "--resize_vision_tower_size=448",
           "--vision_tower_for_mask", "--separate_mm_projector", f"--vis_save_path={os.path.dirname(out)}"])
"""


def main() -> None:
    for flag in (REPOSITORY, PYTHON, TOKENIZER):
        if not flag.value or not Path(flag.value).exists():
            raise UserError(f"--{flag.name} must name something that exists (see --help)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, Path(TOKENIZER.value))
        export = [sys.executable, "-m", "experiments.export_weights", f"--checkpoint={folder / 'checkpoint'}"]
        subprocess.run([*export, "--format=pixellm", f"--out={folder / 'export'}"], check=True)
        repository = str(Path(REPOSITORY.value).absolute())
        arguments = [repository, folder / "export", folder / "photo.png", folder / "theirs.npz", QUESTION, NEW_TOKENS]
        subprocess.run([PYTHON.value, "-c", RUNNER, *map(str, arguments)], check=True)
        compare(folder)


def make_checkpoint(folder: Path, tokenizer: Path) -> None:
    """A model with random weights that often says codebook tokens, and a picture."""
    from PIL import Image

    from configs import as_config
    from pixelstory_jax.interop.checkpoint_folder import write_config, write_params
    from pixelstory_jax.interop.pixellm_folder import pixellm_shapes
    from pixelstory_jax.models.paths import flatten

    config, rng = small_config(), np.random.default_rng(0)
    words = folder / "words"
    words.mkdir()
    shutil.copyfile(tokenizer, words / "tokenizer.model")
    added = {"<im_patch>": 32000, "<im_start>": 32001, "<im_end>": 32002}
    added |= {f"[SEG{number}]": id_ for number, id_ in enumerate(CODEBOOK)}
    (words / "added_tokens.json").write_text(json.dumps(added))
    params = {
        path: rng.normal(path.endswith("norm/scale"), 0.15 if "kernel" in path else 0.5, leaf.shape).astype(np.float32)
        for path, leaf in flatten(pixellm_shapes(config)).items()
    }
    others = np.ones(config.llama.vocab, bool)
    others[CODEBOOK] = False
    params["llama/head"][:, others] = 0
    params["llama/head"][:, CODEBOOK[3:]] = -params["llama/head"][:, CODEBOOK[:3]]  # so that one of them is positive
    (folder / "checkpoint").mkdir()
    write_params(folder / "checkpoint", params)
    saved = command_line.load_config("configs/pixellm.py:7b")[1].to_dict()
    saved["model"] = as_config(config).to_dict()
    saved["data"]["tokenizer"] = str(words / "tokenizer.model")
    write_config(folder / "checkpoint", saved)
    pixels = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.BILINEAR).save(folder / "photo.png")


def small_config() -> Any:
    """PixelLM-7B with narrow networks; what the original code has built in is as published."""
    from pixelstory_jax.models.clip_vision import ClipVisionConfig
    from pixelstory_jax.models.llama import LlamaConfig
    from pixelstory_jax.models.pixellm import PixelLMConfig

    published = PixelLMConfig.pixellm_7b(mode="faithful")
    return dataclasses.replace(
        published,
        vision=ClipVisionConfig(width=64, heads=4, mlp_width=128),
        llama=LlamaConfig(vocab=32009, width=96, layers=3, heads=4, kv_heads=4, mlp_width=160),
        decoder=dataclasses.replace(published.decoder, dtype="float32"),
    )


def compare(folder: Path) -> None:
    """Our answer from the same checkpoint against theirs from the export."""
    import jax.numpy as jnp

    from pixelstory_jax.data.conversations import Turn
    from pixelstory_jax.data.images import fit_canvas, open_image
    from pixelstory_jax.data.tokenizers import IMAGE_TOKEN
    from pixelstory_jax.inference.generate import generate
    from pixelstory_jax.inference.restore import restored_rows
    from pixelstory_jax.inference.segmenter import Segmenter
    from pixelstory_jax.models.pixellm import PixelLM, normalise_pixels

    segmenter = Segmenter.from_checkpoint(folder / "checkpoint", NEW_TOKENS)
    model, variables = PixelLM(segmenter.config), {"params": segmenter.params}
    picture = open_image(folder / "photo.png")
    canvas, size = fit_canvas(picture, segmenter.config.vision.canvas)
    sizes = jnp.asarray([size])
    pixels = normalise_pixels(jnp.asarray(canvas)[None], sizes)
    features: Any = model.apply(variables, pixels, sizes, method=PixelLM.encode_image)
    prompt = np.asarray(segmenter._encode([Turn(QUESTION)]))[None, None]
    answer = generate(
        model,
        segmenter.params,
        features,
        prompt,
        np.ones(prompt.shape, bool),
        max_new_tokens=NEW_TOKENS,
        stop_ids=(segmenter.tokenizer.eos_id,),
    )
    length = int(answer.length[0])
    ours = np.asarray(answer.tokens)[0, :length]
    with np.load(folder / "theirs.npz") as saved:
        ids, masks = saved["ids"][0], saved["masks"]
    words = [id_ for id_ in ids[:-length] if id_ != IMAGE_TOKEN] == [id_ for id_ in prompt[0, 0] if id_ != IMAGE_TOKEN]
    tokens = bool((ids[-length:] == ours).all())
    print(f"prompt equal: {words}; answer equal: {tokens}, {ours.tolist()}")
    chosen = [number for number, id_ in enumerate(ours) if id_ in CODEBOOK]
    if len(chosen) % len(CODEBOOK) or not chosen:
        raise UserError(f"The answer has {len(chosen)} codebook tokens, of which no masks can be made")
    states = np.asarray(answer.states)[0][chosen].reshape(1, -1, len(CODEBOOK), answer.states.shape[-1])
    decoded: Any = model.apply(variables, features, jnp.asarray(states), method=PixelLM.decode_masks)
    pixels_apart = 0
    for number, logits in enumerate(np.asarray(decoded.logits)[0]):
        rows = restored_rows(logits, segmenter.config.vision.canvas, picture.shape[:2])
        mask = np.concatenate([part for _, part in rows])
        apart = int(((mask > 0) != (masks[number] > 0)).sum())
        pixels_apart += apart
        largest, error = np.abs(masks[number]).max(), np.abs(mask - masks[number]).max()
        print(f"mask {number}: largest error {error:.2g} of {largest:.3g}, {apart} of {mask.size} pixels differ")
    sys.exit(0 if words and tokens and not pixels_apart else 1)


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
