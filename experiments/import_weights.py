"""Read released PyTorch weights into a checkpoint of this package.

  python -m experiments.import_weights --source=PixelLM-7B --vision=clip-vit-large-patch14-336 --out=runs/pixellm-7b
  python -m experiments.import_weights --source=stable-diffusion-xl-base-1.0 --out=runs/sdxl
  python -m experiments.import_weights --source=juggernaut.safetensors --settings=stable-diffusion-xl-base-1.0 \\
      --lora=style.safetensors:0.8 --out=runs/juggernaut

The result is read by train (as --config.init_from=OUT), export_weights and, if it is a whole model, by evaluate,
segment and story. Formats, found out where --format is not given and checked where it is: pixellm, llava (original or
of transformers), clip-vision, clip-text, llama, gguf, diffusers-sd15, diffusers-sdxl, ldm-sd15, ldm-sdxl;
docs/weights.md tells what each is. --config takes the config of a training, whose other settings the checkpoint then
has.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import command_line, transfer
from pixelstory_jax.training.errors import UserError

if TYPE_CHECKING:
    from pixelstory_jax.interop.tensors import LazyParams
    from pixelstory_jax.interop.weights import Weights

FORMAT = flags.DEFINE_string("format", "auto", "Layout of the source, as listed above.")
SOURCE = flags.DEFINE_string("source", "", "File, folder, or id on the Hugging Face hub.")
OUT = flags.DEFINE_string("out", "", "Folder of the new checkpoint; an earlier import in it is replaced.")
VISION = flags.DEFINE_string("vision", "", "PixelLM and original LLaVA: folder or hub id of their CLIP tower.")
SETTINGS = flags.DEFINE_string("settings", "", "Single files: a folder with what they lack, tokenizers and settings.")
LORA = flags.DEFINE_multi_string("lora", [], "File or folder of a LoRA to merge, as FILE or FILE:SCALE; repeatable.")
DTYPE = flags.DEFINE_string("dtype", "keep", "keep (that of the source), float32, bfloat16 or float16.")
CONFIG = command_line.define_config_flag()

CONFIGS = {"pixellm": "configs/pixellm.py:7b", "storydiffusion": "configs/storydiffusion.py:sdxl"}
NEXT = {
    "pixellm": 'experiments.segment --checkpoint={out} --image=photo.jpg --question="What can you eat here?"',
    "storydiffusion": "experiments.story --checkpoint={out} --story=examples/moon.txt",
    "llava": "experiments.train --config=configs/pixellm.py:7b --config.init_from={out}",
    "llama": "experiments.train --config=configs/pixellm.py:7b --config.init_from=CLIP,{out}",
    "clip-vision": "experiments.train --config=configs/pixellm.py:7b --config.init_from={out},LLAMA",
    "clip-text": "experiments.train --config=configs/storydiffusion.py:sd15 --config.init_from=SD15,{out}",
}


def main() -> None:
    for flag, example in ((SOURCE, "vicuna-7b"), (OUT, "runs/imported")):
        if not flag.value:
            raise UserError(f"--{flag.name} is needed, as --{flag.name}={example} (see --help)")
    out = transfer.free_folder(OUT.value, transfer.is_import)

    # Imported late, so that --help and wrong flags do not wait for jax.
    from pixelstory_jax.interop.checkpoint_folder import write_config, write_params
    from pixelstory_jax.interop.formats import read_weights
    from pixelstory_jax.interop.weights import cast_params, copy_files
    from pixelstory_jax.training.host_memory import PeakMemory

    with PeakMemory() as peak:
        weights = command_line.explain(
            lambda: read_weights(SOURCE.value, FORMAT.value, VISION.value or None, SETTINGS.value or None)
        )
        params = command_line.explain(lambda: cast_params(with_loras(weights), DTYPE.value))
        check_used(weights)
        total, largest = transfer.total_and_largest(params)
        print(f"{SOURCE.value}: {weights.kind}, {transfer.describe(params)}", flush=True)
        for note in weights.notes:
            print(f"Note: {note}", flush=True)
        config = command_line.explain(lambda: checkpoint_config(weights))
        with transfer.writing(OUT.value), transfer.output_folder(out) as folder:
            with transfer.byte_progress("import", total) as report:
                write_params(folder, params, report)
            copy_files(weights.files, folder / "tokenizer")
            write_config(folder, config)
    print(
        f"Written to {OUT.value}: {transfer.size_text(total)}{transfer.peak_text(peak)} (largest parameter: "
        f"{transfer.size_text(largest)})"
    )
    print(f"Next: python -m {NEXT[weights.kind].format(out=OUT.value)}")


def check_used(weights: Weights) -> None:
    """Refuses flags that say nothing to this kind of source."""
    takers = ((VISION, ("pixellm", "llava")), (SETTINGS, ("pixellm", "storydiffusion")))
    for flag, kinds in takers:
        if flag.value and weights.kind not in kinds:
            raise UserError(f"--{flag.name} is for {' and '.join(kinds)}; {SOURCE.value} holds {weights.kind} weights")
    if CONFIG.value is not None and weights.kind not in CONFIGS:
        raise UserError(f"--config is for {' and '.join(CONFIGS)}; {SOURCE.value} holds {weights.kind} weights")


def with_loras(weights: Weights) -> LazyParams:
    """The parameters with every --lora merged."""
    from pixelstory_jax.interop.merging import merge_file

    params = weights.params
    for argument in LORA.value:
        source, scale = split_scale(argument)
        params = merge_file(weights.kind, weights.config, params, source, scale)
    return params


def split_scale(argument: str) -> tuple[str, float]:
    """("style.safetensors", 0.8) of "style.safetensors:0.8"; 1 where no number follows the last colon."""
    source, colon, scale = argument.rpartition(":")
    with contextlib.suppress(ValueError):
        if source and math.isfinite(float(scale)):
            return source, float(scale)
    return argument, 1.0


def checkpoint_config(weights: Weights) -> dict[str, Any]:
    """The config that the checkpoint has: that of --config or of the paper's training, with the sizes of the source."""
    from configs import as_config
    from pixelstory_jax.training.checkpoints import HERE

    model = as_config(weights.config).to_dict()
    if weights.kind not in CONFIGS:
        own = {"name": weights.kind, "objective": weights.kind, "model": model, "data": dict(weights.data)}
        return {**own, **weights.settings}
    config = CONFIG.value or command_line.load_config(default_config(weights))[1]
    fields = ("dtype", "remat") if CONFIG.value else ("remat",)
    if config.objective != weights.kind:
        raise UserError(f"--config trains {config.objective}, but {SOURCE.value} holds {weights.kind}")
    plain = config.to_dict()
    plain["model"] = with_fields(model, plain["model"], fields)
    plain["data"] = {**plain["data"], **weights.data}
    return {**plain, "init_from": HERE, **weights.settings}


def default_config(weights: Weights) -> str:
    """The file and variant that fit the source best."""
    if weights.kind == "storydiffusion" and weights.config.text_2 is None:
        return "configs/storydiffusion.py:sd15"
    if weights.kind == "pixellm" and weights.config.llama.max_length < 1024:  # the paper's questions and answers
        return "configs/pixellm.py:tiny"
    return CONFIGS[weights.kind]


def with_fields(model: Mapping[str, Any], trained: Mapping[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """Sizes of the source, with those fields as the config has them that are no size (what is computed in, remat)."""
    merged = dict(model)
    for name, value in model.items():
        other = trained.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            merged[name] = with_fields(value, other, fields)
        elif name in fields and other is not None:
            merged[name] = other
    return merged


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "", keep_memory=False)
