"""How long weights of full size take to come in and go out, and the memory that this takes.

  python -m experiments.benchmarks.weights --folder=/tmp/weights
  python -m experiments.benchmarks.weights --folder=/tmp/weights --models=sd15

Makes a LLaMA 7B (bfloat16, 13.5 GB) and a Stable Diffusion 1.5 pipeline (float16, 2.1 GB) of random numbers, shard by
shard; imports each, runs one forward pass, exports it, and compares the files with those it began with, byte for byte.
Needs three times their size on the disk, and for the forward pass memory for the model. --folder is left with nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import command_line, transfer
from pixelstory_jax.training.errors import UserError

FOLDER = flags.DEFINE_string("folder", "", "An empty or new folder for everything that is written.")
MODELS = flags.DEFINE_list("models", ["sd15", "llama7b"], "Which to run: sd15, llama7b.")


def main() -> None:
    folder = Path(FOLDER.value or "weights-benchmark")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    known, rows = cases(), []
    unknown = sorted(set(MODELS.value) - set(known))
    if unknown:
        raise UserError(f"--models has {', '.join(unknown)}; known are {', '.join(known)}")
    for name in MODELS.value:
        make, forward, layout = known[name]
        row = run_case(folder, make, forward, layout)
        rows.append((name, row))
        print(f"{name}: {json.dumps(row)}", flush=True)
    shutil.rmtree(folder)
    print(table(rows))


def run_case(
    folder: Path, make: Callable[[Path], None], forward: Callable[[Path], float], layout: str
) -> dict[str, Any]:
    """Seconds and memory of every stage for one model."""
    source, checkpoint, out = folder / "source", folder / "checkpoint", folder / "out"
    begin = time.perf_counter()
    make(source)
    size = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
    row: dict[str, Any] = {"bytes": size, "made_s": round(time.perf_counter() - begin, 1)}
    row |= command("import", "experiments.import_weights", f"--source={source}", f"--out={checkpoint}")
    begin = time.perf_counter()
    row["forward_gb"] = round(forward(checkpoint) / 1e9, 2)
    row["forward_s"] = round(time.perf_counter() - begin, 1)
    row |= command(
        "export", "experiments.export_weights", f"--checkpoint={checkpoint}", f"--format={layout}", f"--out={out}"
    )
    row["equal"] = same_tensors(source, out)
    for path in (source, checkpoint, out):
        shutil.rmtree(path)
    return row


def command(name: str, module: str, *arguments: str) -> dict[str, Any]:
    """Runs one of the commands; its seconds, and the memory that it says it took."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{module} failed: {done.stderr.strip().splitlines()[-1]}")
    said = re.search(r"at most ([\d.]+ \w+) of memory", done.stdout)
    return {f"{name}_s": round(time.perf_counter() - begin, 1), f"{name}_memory": said[1] if said else "unknown"}


def same_tensors(first: Path, second: Path) -> bool:
    """Whether both folders have the same tensors in every part, bit for bit."""
    from pixelstory_jax.interop.tensor_files import open_tensors

    for part in sorted({path.parent.relative_to(first) for path in first.rglob("*.safetensors")}):
        before, after = open_tensors(first / part), open_tensors(second / part)
        if before.keys() != after.keys():
            return False
        for name, tensor in before.items():
            if tensor.dtype != after[name].dtype or tensor.read().tobytes() != after[name].read().tobytes():
                return False
    return True


def random_values(dtype: Any, seed: int) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Arrays of numbers drawn from N(0, 0.02), fast enough for billions of them."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(0, 0.02, 1 << 16).astype(dtype)
    return lambda shape: drawn[rng.integers(0, 1 << 16, shape, dtype=np.uint16)]


def write_random(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any, stem: str = "model") -> None:
    """A folder's tensors, one at a time."""
    from pixelstory_jax.interop.safetensors_files import ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    values = random_values(dtype, len(shapes))
    with ShardWriter(folder, {name: (shape, dtype) for name, shape in shapes.items()}, stem) as writer:
        for name, shape in shapes.items():
            writer.write(name, values(shape))


def make_llama(config: Any) -> Callable[[Path], None]:
    """A folder of LlamaForCausalLM of these sizes."""

    def make(folder: Path) -> None:
        import ml_dtypes

        from pixelstory_jax.interop.llama_folder import llama_settings, llama_shapes, llama_table
        from pixelstory_jax.interop.settings import json_text
        from pixelstory_jax.interop.torch_layout import torch_shapes

        write_random(folder, torch_shapes(llama_table(), llama_shapes(config)), ml_dtypes.bfloat16)
        (folder / "config.json").write_text(json_text(llama_settings(config, dtype="bfloat16")))

    return make


def run_llama(checkpoint: Path) -> float:
    """Logits of a few tokens; bytes of the parameters on the device."""
    import jax

    from pixelstory_jax.models.llama import Llama, LlamaConfig
    from pixelstory_jax.models.sizes import sizes_from_config
    from pixelstory_jax.training.checkpoints import read_config

    config = sizes_from_config(LlamaConfig, read_config(checkpoint.absolute())["model"])
    params = device_params(checkpoint)
    tokens = np.arange(1, 17)[None]

    def run(params: Any, tokens: Any) -> Any:
        return Llama(config).apply({"params": params}, tokens, tokens > 0, method=Llama.whole)

    # On a CPU XLA would turn all layers into float32 before the loop over them, which takes twice the model's size.
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if jax.default_backend() == "cpu" else {}
    logits = jax.jit(run, compiler_options=options)(params, tokens)
    assert np.isfinite(np.asarray(logits)).all()
    return float(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))


def device_params(checkpoint: Path) -> Any:
    """The parameters on the device, read one at a time, large ones first: reading takes memory of its own."""
    import jax

    from pixelstory_jax.interop.checkpoint_folder import open_checkpoint
    from pixelstory_jax.models.paths import unflatten

    params = sorted(open_checkpoint(checkpoint).items(), key=lambda item: item[1].nbytes < 1 << 30)
    return unflatten({path: jax.device_put(np.asarray(value)) for path, value in params})


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """One line per model."""
    names = ("bytes", "import_s", "import_memory", "forward_s", "forward_gb", "export_s", "export_memory", "equal")
    lines = ["| model | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for name, row in rows:
        lines.append(
            f"| {name} | "
            + " | ".join(transfer.size_text(row[n]) if n == "bytes" else str(row[n]) for n in names)
            + " |"
        )
    return "\n".join(lines)


def make_sd15(folder: Path) -> None:
    """A folder of StableDiffusionPipeline, float16, with the small tokenizer."""
    import jax

    from pixelstory_jax.data.clip_tokenizer import small_clip_tokenizer
    from pixelstory_jax.inference.schedulers import SamplerConfig
    from pixelstory_jax.interop.diffusers_folder import PipelineFolder, pipeline_files, pipeline_parts
    from pixelstory_jax.interop.torch_layout import torch_shapes
    from pixelstory_jax.models.paths import flatten
    from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig

    config = StoryDiffusionConfig.sd15()
    shapes = jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0))
    for part in pipeline_parts(config):
        write_random(
            folder / part.folder, torch_shapes(part.table, shapes[part.prefix.rstrip("/")]), np.float16, part.stem
        )
    tokenizers = {"text": small_clip_tokenizer()}
    pipeline = PipelineFolder(config, flatten(shapes), tokenizers, SamplerConfig(), 512, False)
    for name, text in pipeline_files(pipeline).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def run_sd15(checkpoint: Path) -> float:
    """One prediction of the U-Net at 512 x 512 pixels; bytes of the parameters on the device."""
    import jax

    from pixelstory_jax.models.sizes import sizes_from_config
    from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
    from pixelstory_jax.training.checkpoints import read_config

    model = StoryDiffusion(sizes_from_config(StoryDiffusionConfig, read_config(checkpoint.absolute())["model"]))
    params = device_params(checkpoint)
    rng = np.random.default_rng(0)
    latents, text = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 64, 64, 4), (1, 77, 768)))
    predict = jax.jit(lambda p, x, text: model.unet.apply({"params": p}, x, np.float32(500), text))
    assert np.isfinite(np.asarray(jax.tree.leaves(predict(params["unet"], latents, text))[0])).all()
    return float(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))


def cases() -> dict[str, tuple[Callable[[Path], None], Callable[[Path], float], str]]:
    """What makes each model, what runs it, and the format that it is exported in."""
    from pixelstory_jax.models.llama import LlamaConfig

    return {
        "sd15": (make_sd15, run_sd15, "diffusers-sd15"),
        "llama7b": (make_llama(LlamaConfig.llama_7b(vocab=32000)), run_llama, "llama"),
    }


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "", keep_memory=False)
