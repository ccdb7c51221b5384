"""Write a checkpoint as a folder that PyTorch programs load with `from_pretrained`.

  python -m experiments.export_weights --checkpoint=runs/pixellm --format=pixellm --out=exports/pixellm
  python -m experiments.export_weights --checkpoint=runs/sdxl --format=diffusers-sdxl --dtype=float16 --out=exports/sdxl
  python -m experiments.export_weights --checkpoint=runs/sdxl --format=diffusers-sdxl --lora=adapter --out=exports/lora

Formats: pixellm, llava (of the original code), llava-hf (of transformers), llama, clip-vision, clip-text,
diffusers-sd15, diffusers-sdxl. Written are safetensors (in shards, with their index, where they are large), settings,
tokenizers and, for a pipeline, its scheduler. Low-rank additions that were trained are merged, or written alone for
peft and diffusers (--lora=adapter).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import command_line, transfer
from pixelstory_jax.training.errors import UserError

if TYPE_CHECKING:
    from pixelstory_jax.interop.exports import Source

CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Folder of a training run or an import, or one checkpoint.")
FORMAT = flags.DEFINE_string("format", "", "Layout to write, as listed above.")
OUT = flags.DEFINE_string("out", "", "Output folder; an earlier export, to which nothing was added, is replaced.")
MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "Size of a file of tensors, as 5GB, 500MB or 2GiB.")
DTYPE = flags.DEFINE_string("dtype", "keep", "keep (that of the checkpoint), float32, bfloat16 or float16.")
LORA = flags.DEFINE_enum("lora", "merged", ["merged", "adapter"], "Trained low-rank additions: merged, or alone.")
WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "raw"], "Averaged parameters where there are any, or raw ones.")
VISION = flags.DEFINE_string(
    "vision_tower", "", "PixelLM, LLaVA: what config.json calls the CLIP tower; OUT/clip_vision_tower if not given."
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    "",
    "Where the tokenizer is now, if the place that the checkpoint names is gone: a file, or the folder of a pipeline.",
)


def main() -> None:
    for flag, example in ((CHECKPOINT, "runs/pixellm"), (FORMAT, "pixellm"), (OUT, "exports/pixellm")):
        if not flag.value:
            raise UserError(f"--{flag.name} is needed, as --{flag.name}={example} (see --help)")
    out = transfer.free_folder(OUT.value, transfer.is_export)

    from pixelstory_jax.interop.exports import plan_export, write_export
    from pixelstory_jax.interop.merging import adapter_export
    from pixelstory_jax.interop.safetensors_files import parse_size
    from pixelstory_jax.interop.weights import DTYPES
    from pixelstory_jax.training.host_memory import PeakMemory

    if DTYPE.value not in ("keep", *DTYPES):
        raise UserError(f"--dtype is {DTYPE.value!r}; known are keep, {', '.join(DTYPES)}")
    shard_size = command_line.explain(lambda: parse_size(MAX_SHARD_SIZE.value))
    with PeakMemory() as peak:
        source = command_line.explain(open_source)
        plan = adapter_export if LORA.value == "adapter" else plan_export
        export = command_line.explain(lambda: plan(FORMAT.value, source))
        total, _ = transfer.total_and_largest(export.params)
        print(f"{CHECKPOINT.value}: {source.kind}, {transfer.describe(export.params)}", flush=True)
        for note in export.notes:
            print(f"Note: {note}", flush=True)
        with transfer.writing(OUT.value), transfer.output_folder(out) as folder:
            with transfer.byte_progress("export", total) as report:
                write_export(folder, export, DTYPE.value, shard_size, report)
            transfer.write_record(folder, FORMAT.value)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    written = sum(path.stat().st_size for path in files)
    shards = max(path.stat().st_size for path in files)
    print(
        f"Written to {OUT.value}: {transfer.size_text(written)} in {len(files)} files (largest "
        f"{transfer.size_text(shards)}){transfer.peak_text(peak)}"
    )
    print(f"Load it with {(LOADERS if LORA.value == 'merged' else ADAPTER_LOADERS)[FORMAT.value]}")


LOADERS = {
    "pixellm": "PixelLMForCausalLM.from_pretrained of the original code (chat.py --version=OUT "
    "--vision-tower=OUT/clip_vision_tower)",
    "llava": "LlavaLlamaForCausalLM.from_pretrained of the original code",
    "llava-hf": "transformers.LlavaForConditionalGeneration.from_pretrained",
    "llama": "transformers.LlamaForCausalLM.from_pretrained",
    "clip-vision": "transformers.CLIPVisionModel.from_pretrained",
    "clip-text": "transformers.CLIPTextModel.from_pretrained",
    "diffusers-sd15": "diffusers.StableDiffusionPipeline.from_pretrained",
    "diffusers-sdxl": "diffusers.StableDiffusionXLPipeline.from_pretrained",
}
ADAPTER_LOADERS = {
    "pixellm": "peft.PeftModel.from_pretrained",
    "llama": "peft.PeftModel.from_pretrained",
    "diffusers-sd15": "load_lora_weights of the pipeline of diffusers",
    "diffusers-sdxl": "load_lora_weights of the pipeline of diffusers",
}


def open_source() -> Source:
    """The checkpoint, with its low-rank additions merged unless they are to be written alone."""
    from ml_collections import ConfigDict

    from pixelstory_jax.interop.checkpoint_folder import open_checkpoint
    from pixelstory_jax.interop.exports import Source
    from pixelstory_jax.interop.merging import merged_model
    from pixelstory_jax.training.checkpoints import find_checkpoint, read_config

    folder = find_checkpoint(CHECKPOINT.value)
    config: dict[str, Any] = read_config(folder)
    if TOKENIZER.value:
        config["data"] = {**config.get("data", {}), "tokenizer": TOKENIZER.value}
    raw = WEIGHTS.value == "raw"
    if raw and not (folder / "train").is_dir() and ConfigDict(config).get("train", {}).get("ema"):
        raise UserError(
            f"{folder} holds averaged parameters alone; for raw ones name {CHECKPOINT.value}/checkpoints/last"
        )
    params = open_checkpoint(folder, averages=not raw)
    kind = str(config.get("objective"))
    model = model_sizes(kind, config)
    if LORA.value == "merged":
        model, params = merged_model(model, params)
    return Source(kind, model, config, params, DTYPE.value, VISION.value or None, OUT.value)


def model_sizes(kind: str, config: dict[str, Any]) -> Any:
    """The sizes of a checkpoint's model."""
    from pixelstory_jax.interop.weights import MODELS
    from pixelstory_jax.models.sizes import sizes_from_config

    if kind not in MODELS:
        raise UserError(f"{CHECKPOINT.value} holds a checkpoint of {kind!r}, which has no PyTorch layout")
    return sizes_from_config(MODELS[kind], config["model"])


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "", keep_memory=False)
