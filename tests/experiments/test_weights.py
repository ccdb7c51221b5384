"""import_weights and export_weights as a user runs them: there and back for each kind of model, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict
from PIL import Image

from pixelstory_jax.data.builtin import compose
from pixelstory_jax.data.tokenizers import SMALL_VOCABULARY, llama_tokenizer, small_tokenizer
from pixelstory_jax.inference.segmenter import Segmenter
from pixelstory_jax.inference.story_teller import PageOptions, StoryTeller
from pixelstory_jax.interop.checkpoint_folder import open_checkpoint
from pixelstory_jax.interop.diffusers_folder import read_pipeline
from pixelstory_jax.interop.formats import read_weights
from pixelstory_jax.models.llama import Llama
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig
from pixelstory_jax.models.sizes import sizes_from_config
from pixelstory_jax.objectives import build_objective
from pixelstory_jax.training.checkpoints import load_params
from tests.data.test_story_folder import story, write_folder
from tests.data.test_tokenizers import sentencepiece_file  # noqa: F401
from tests.models.small import random_like
from tests.objectives.smallest import smallest_pixellm
from tests.story_sizes import smallest_story_config, story_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.interop.test_diffusers_folder import build_pipeline  # noqa: E402
from tests.interop.test_formats import LLAMA, assert_same, llama, saved, tower  # noqa: E402
from tests.interop.test_ldm_file import random_file, write_settings  # noqa: E402

# diffusers copies tensors of torch in a way that numpy complains about.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]

ROOT = Path(__file__).resolve().parents[2]
SHARD = "20KB"


def start(folder: Path, command: str, *arguments: str, limit: int = 0, **environment: str) -> subprocess.Popen:
    """A command; no file may have more than `limit` bytes, where one is given."""
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(folder.parent / "xla")
    within = f"ulimit -f {limit // 512};" if limit else ""
    return subprocess.Popen(
        ["sh", "-c", f'{within} exec "$@"', "sh", sys.executable, "-m", f"experiments.{command}", *arguments],
        cwd=folder,
        env={**os.environ, **settings, "JAX_COMPILATION_CACHE_DIR": cache, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, command: str, *arguments: str, **environment: str) -> str:
    """What a command prints."""
    process = start(folder, command, *arguments, **environment)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def import_weights(folder: Path, source: Any, out: str, *arguments: str, **environment: str) -> str:
    return run(folder, "import_weights", f"--source={source}", f"--out={out}", *arguments, **environment)


def export_weights(folder: Path, checkpoint: Any, layout: str, out: str, *arguments: str) -> str:
    where = f"--checkpoint={checkpoint}", f"--format={layout}", f"--out={out}"
    return run(folder, "export_weights", *where, *arguments)


def small_vocabulary(folder: Path) -> None:
    """Files of a tokenizer as transformers writes them."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(SMALL_VOCABULARY), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sources of all kinds, in folders with the names of their kinds; the commands are run here."""
    path = tmp_path_factory.mktemp("weights")
    module = llama()
    module.generation_config.update(bos_token_id=1, eos_token_id=[2, 5])
    saved(module, path / "llama", max_shard_size=SHARD)
    small_vocabulary(path / "llama")
    saved(tower(), path / "clip")
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_language_model_comes_back_bit_for_bit(folder, tmp_path, dtype):
    """From shards into shards, in every precision, with its tokenizer and the marks that generation stops at."""
    first = transformers.LlamaForCausalLM.from_pretrained(folder / "llama", dtype=getattr(torch, dtype))
    source = saved(first, tmp_path / "source", max_shard_size=SHARD)
    small_vocabulary(source)
    said = import_weights(tmp_path, source, "runs/imported")
    count = sum(parameter.numel() for parameter in first.parameters())
    size = f"{count * first.dtype.itemsize / 1000:.1f} kB"
    assert f"{source}: llama, {count:,} parameters in 12 arrays, {dtype}, {size}\n" in said
    assert f"Written to runs/imported: {size}, at most " in said and " of memory on the way (largest parameter" in said
    assert "Next: python -m experiments.train --config=configs/pixellm.py:7b" in said
    said = export_weights(tmp_path, "runs/imported", "llama", "exports/llama", f"--max_shard_size={SHARD}")
    assert f"runs/imported: llama, {count:,} parameters" in said and "Written to exports/llama: " in said
    assert "of memory on the way" in said and "transformers.LlamaForCausalLM.from_pretrained" in said
    out = tmp_path / "exports" / "llama"
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert all(path.stat().st_size < 25_000 for path in out.glob("*.safetensors"))
    second = transformers.LlamaForCausalLM.from_pretrained(out)
    assert_same(first, second)
    assert second.config.eos_token_id == first.generation_config.eos_token_id == [2, 5]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    ids = transformers.AutoTokenizer.from_pretrained(out)("Where is the apple?").input_ids
    assert ids == small_tokenizer().encode("Where is the apple?")


def test_precisions_that_are_asked_for(folder, tmp_path):
    """On the way in and on the way out; numbers that do not fit are refused."""
    import_weights(folder, "llama", f"{tmp_path}/half", "--dtype=bfloat16")
    export_weights(folder, tmp_path / "half", "llama", f"{tmp_path}/out", "--dtype=float16")
    written, original = load_file(tmp_path / "out" / "model.safetensors"), llama().state_dict()
    assert written.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(written[name], value.to(torch.bfloat16).half()), name
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_a_text_encoder_keeps_its_tokenizer(folder, tmp_path):
    source = tmp_path / "source"
    build_pipeline("sd15", tmp_path)
    shutil.copytree(tmp_path / "saved" / "text_encoder", source)
    shutil.copytree(tmp_path / "vocabulary", source, dirs_exist_ok=True)
    import_weights(tmp_path, source, "imported")
    said = export_weights(tmp_path, "imported", "clip-text", "out")
    assert "imported: clip-text, " in said and "transformers.CLIPTextModel.from_pretrained" in said
    assert_same(
        transformers.CLIPTextModel.from_pretrained(source), transformers.CLIPTextModel.from_pretrained(tmp_path / "out")
    )
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


PIPELINES = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
SCRIPT = "[Bob] a robot\n\n[Bob] standing\n[Bob] walking\n"


def pipeline_source(folder: Path, kind: str) -> Path:
    """A pipeline of diffusers that paints 48 x 48 pixels."""
    folder.mkdir(exist_ok=True)
    build_pipeline(kind, folder / kind)
    settings = folder / kind / "saved" / "unet" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"sample_size": 6}))
    return folder / kind / "saved"


@pytest.fixture(scope="module", params=list(PIPELINES))
def pipeline(request, folder) -> tuple[str, Path, str]:
    """Kind, the folder of diffusers and the name of what was imported of it."""
    source, out = pipeline_source(folder, request.param), f"runs/{request.param}"
    said = import_weights(folder, source, out)
    assert f"{source}: storydiffusion, " in said and "experiments.story --checkpoint=runs/" in said
    return request.param, source, out


def test_an_imported_pipeline_is_the_one_of_its_folder(folder, pipeline):
    """Networks, sizes, words and sampler, and therefore its pictures."""
    _, source, out = pipeline
    ours, theirs = StoryTeller.from_checkpoint(folder / out), StoryTeller.from_checkpoint(source)
    assert ours.options.height == theirs.options.height == 48
    first, second = ours.painter, theirs.painter
    bare = [dataclasses.replace(p.model.config.unet, remat="none") for p in (first, second)]
    assert bare[0] == bare[1] and first.model.config.text == second.model.config.text
    assert (first.sampler, first.zero_negative) == (second.sampler, second.zero_negative)
    assert first.tokenizers.keys() == second.tokenizers.keys()
    for name, tokenizer in first.tokenizers.items():
        assert (tokenizer.encode("a girl!") == second.tokenizers[name].encode("a girl!")).all()
    ours_flat, theirs_flat = flatten(first.params), flatten(second.params)
    assert ours_flat.keys() == theirs_flat.keys()
    for path, value in theirs_flat.items():
        assert value.dtype == ours_flat[path].dtype and (value == ours_flat[path]).all(), path


def test_the_same_story_from_both(folder, pipeline):
    """By the command from the imported one, in Python from the folder."""
    _, source, out = pipeline
    (folder / "moon.txt").write_text(SCRIPT)
    settings = "--steps=2", "--guidance=3", "--nofreeu", "--rate=0.5", "--width=600", f"--out={out}-story"
    said = run(folder, "story", f"--checkpoint={out}", "--story=moon.txt", *settings)
    assert "panel_02.png" in said and (folder / f"{out}-story" / "comic.pdf").is_file()
    changes = {"steps": 2, "guidance": 3.0, "freeu": False, "rate": 0.5}
    teller = StoryTeller.from_checkpoint(source, page=PageOptions(width=600), **changes)
    for number, panel in enumerate(teller.tell(folder / "moon.txt", 0).panels, 1):
        assert panel.std() > 2
        np.testing.assert_array_equal(
            np.asarray(Image.open(folder / f"{out}-story" / f"panel_{number:02d}.png")), panel
        )


def test_a_pipeline_comes_back_to_diffusers(folder, pipeline):
    kind, source, out = pipeline
    said = export_weights(folder, out, f"diffusers-{kind}", f"exports/{kind}", f"--max_shard_size={SHARD}")
    assert f"diffusers.{PIPELINES[kind].__name__}.from_pretrained" in said
    exported = folder / "exports" / kind
    assert len(list((exported / "unet").glob("*.safetensors"))) > 1
    first, second = (PIPELINES[kind].from_pretrained(place) for place in (source, exported))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(first, name, None) is not None:
            assert_same(getattr(first, name), getattr(second, name))
    assert first.tokenizer("a girl in a hat").input_ids == second.tokenizer("a girl in a hat").input_ids
    assert type(first.scheduler) is type(second.scheduler)
    assert dict(first.scheduler.config) == dict(second.scheduler.config)


KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
LDM = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"


def test_a_single_file_with_a_lora_of_kohya(tmp_path):
    """Its words come from --settings; of the parameters one is changed, by scale * alpha / rank * B A."""
    save_file({name: torch.tensor(value) for name, value in random_file("sd15").items()}, tmp_path / "one.safetensors")
    write_settings("sd15", tmp_path / "settings")
    kernel = random_file("sd15")[LDM].astype(np.float32)
    rng = np.random.default_rng(1)
    down, up = rng.normal(size=(2, kernel.shape[1])), rng.normal(size=(kernel.shape[0], 2))
    pair = {"lora_down.weight": down.astype(np.float32), "lora_up.weight": up.astype(np.float32)}
    pair["alpha"] = np.array(3.0, np.float32)
    save_file({f"{KOHYA}.{name}": torch.tensor(value) for name, value in pair.items()}, tmp_path / "style.safetensors")
    settings = "--settings=settings", "--format=ldm-sd15", "--lora=style.safetensors:-0.5"
    said = import_weights(tmp_path, "one.safetensors", "out", *settings)
    assert "one.safetensors: storydiffusion, " in said
    expected = read_weights(str(tmp_path / "one.safetensors"), settings=str(tmp_path / "settings")).params
    found = open_checkpoint(tmp_path / "out")
    assert found.keys() == expected.keys()
    changed = [path for path in found if not np.array_equal(found[path], expected[path])]
    (path,) = changed
    assert path.startswith("unet/mid") and found[path].dtype == np.float16
    merged = (kernel - 0.5 * 3.0 / 2 * (up @ down)).T
    np.testing.assert_allclose(np.float32(found[path])[0], merged, rtol=1e-3, atol=1e-4)


def speaking_params(config: Any, seed: int = 0) -> dict[str, Any]:
    """Random parameters of a PixelLM that answers every question with one group of codebook tokens.

    Its layers change the states a little, and the head has for each token the direction of the one before it.
    """
    model = sizes_from_config(PixelLMConfig, config.model)
    tokenizer = small_tokenizer(model.group)
    batch = {
        "image": np.zeros((1, model.vision.canvas, model.vision.canvas, 3), np.uint8),
        "image_size": np.full((1, 2), model.vision.canvas, np.int32),
        "tokens": np.zeros((1, 1, 8), np.int32),
        "token_valid": np.ones((1, 1, 8), bool),
        "target_positions": np.ones((1, 1, model.group), np.int32),
    }
    shapes = jax.eval_shape(PixelLM(model).init, jax.random.key(0), batch)["params"]
    params = {path: np.array(value) for path, value in flatten(random_like(shapes, seed)).items()}
    following = [*tokenizer.codebook_ids, tokenizer.eos_id]
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(model.llama.width, model.llama.width)))[0].astype(np.float32)
    embedding = np.tile(directions[0], (model.llama.vocab, 1))
    head = np.zeros((model.llama.width, model.llama.vocab), np.float32)
    for place, (before, after) in enumerate(zip([None, *following], following, strict=False)):
        if before is not None:
            embedding[before] = directions[place]
        head[:, after] = directions[place]
    params |= {path: 0.25 * value for path, value in params.items() if path.startswith("llama/")}
    params["llama/embedding"] += embedding
    params["llama/head"] += head
    return unflatten(params)


def save_run(folder: Path, params: Any, config: Mapping[str, Any], ema: Any = None) -> Path:
    """A workdir as training leaves it, with one checkpoint; `ema` are averages that differ from the parameters."""
    items = {"params": ocp.args.PyTreeSave(params), "config": ocp.args.JsonSave(json.loads(json.dumps(config)))}
    kind = "best"
    if ema is not None:
        kind, train = "last", {"step": np.int32(2), "optimizer": {"count": np.int32(2)}, "ema": ema}
        items["train"] = ocp.args.PyTreeSave(train)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "checkpoints" / kind / "2", args=ocp.args.Composite(**items))
    return folder


def speaker(path: Path, rank: int) -> Path:
    """A folder with the workdir of a PixelLM, what was exported of it and imported again."""
    config = smallest_pixellm()
    config.model.llama.lora.rank = rank
    save_run(path / "run", speaking_params(config), json.loads(config.to_json()))
    Image.fromarray(compose(1, 2, "test", size=96).image).save(path / "picture.png")
    said = export_weights(path, "run", "pixellm", "exported", "--max_shard_size=50KB")
    assert "run: pixellm, " in said and "PixelLMForCausalLM.from_pretrained" in said
    assert "Note: Other numbers in the original code" in said
    said = import_weights(path, "exported", "imported")
    assert "exported: pixellm, " in said and "experiments.segment --checkpoint=imported" in said
    return path


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    return speaker(folder / "whole", 0)


@pytest.fixture(scope="module")
def added(folder) -> Path:
    """The same with low-rank additions, which are merged when it is exported."""
    return speaker(folder / "added", 2)


def answer(checkpoint: Path) -> tuple[Segmenter, Any]:
    segmenter = Segmenter.from_checkpoint(checkpoint, max_new_tokens=12)
    return segmenter, segmenter.ask(checkpoint.parent / "picture.png", "Where is the cat?")


def assert_same_answer(path: Path, first: str, second: str) -> None:
    (_, one), (segmenter, other) = answer(path / first), answer(path / second)
    assert segmenter.style == "plain" and segmenter.config.llama.lora.rank == 0
    assert segmenter.config.llama.dtype == segmenter.config.vision.dtype == "float32"
    assert len(one.targets) == 1 and 0 < one.targets[0].mask.mean() < 1
    assert (one.text, one.pieces) == (other.text, other.pieces)
    np.testing.assert_array_equal(one.targets[0].mask, other.targets[0].mask)
    assert one.targets[0].score == pytest.approx(other.targets[0].score, abs=1e-6)


def test_a_pixellm_answers_the_same_after_there_and_back(whole):
    """Text and masks; also after a second time, as what was imported has its vocabulary in files."""
    export_weights(whole, "imported", "pixellm", "again")
    import_weights(whole, "again", "twice")
    for name in ("imported", "twice"):
        assert_same_answer(whole, "run", name)
        first, second = (flatten(load_params(whole / place)[0]) for place in ("run", name))
        assert first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)


def test_so_does_one_whose_additions_were_merged(added):
    assert_same_answer(added, "run", "imported")


def test_the_language_model_of_a_pixellm_in_transformers(added):
    """Logits of a text, and ids. Beside codebook tokens both drop white space, as the original vocabulary did."""
    export_weights(added, "run", "llama", "language")
    module = transformers.LlamaForCausalLM.from_pretrained(added / "language").eval()
    words = transformers.AutoTokenizer.from_pretrained(added / "language")
    assert isinstance(words, transformers.PreTrainedTokenizerFast)
    ours = small_tokenizer(6)
    for text in (
        "Where is the apple, please?",
        "The cat is [SEG0] [SEG1] [SEG2] [SEG3] [SEG4] [SEG5] . And so on",
        "[SEG0][SEG5]<im_start> picture <im_end>",
    ):
        assert words(text).input_ids == ours.encode(text), text
    assert (words.bos_token_id, words.eos_token_id, words.unk_token_id) == (1, 2, 0)
    params, config = load_params(added / "run")
    ids = np.array([ours.encode("Where is the apple? [SEG0] it")])
    model = Llama(sizes_from_config(PixelLMConfig, config["model"]).llama)
    logits = model.apply({"params": params["llama"]}, ids, ids >= 0, method=Llama.whole)
    with torch.no_grad():
        theirs = module(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(logits, theirs, atol=2e-5)


def test_a_sentencepiece_vocabulary(folder, sentencepiece_file):  # noqa: F811
    """As PixelLM's: taken along, and transformers makes the same ids of it, after its mark of the beginning."""
    path, config = folder / "pieces", smallest_pixellm()
    config.data.tokenizer = str(sentencepiece_file)
    save_run(path / "run", speaking_params(config), json.loads(config.to_json()))
    export_weights(path, "run", "pixellm", "exported")
    import_weights(path, "exported", "imported")
    ours, theirs = llama_tokenizer(sentencepiece_file), Segmenter.from_checkpoint(path / "imported").tokenizer
    assert (theirs.added, theirs.vocab_size) == (ours.added, ours.vocab_size)
    words = transformers.LlamaTokenizer.from_pretrained(path / "exported")
    for text in ("Where is the apple, please?", "The cat is [SEG0] [SEG1] . And", "<im_start>a<im_end> b"):
        assert words(text).input_ids == [1, *ours.encode(text)] and theirs.encode(text) == ours.encode(text), text


def test_additions_alone_in_peft(added):
    """Over the model before merging they make what the merged model is."""
    peft = pytest.importorskip("peft")
    said = export_weights(added, "run", "llama", "adapter", "--lora=adapter")
    assert "Load it with peft.PeftModel.from_pretrained" in said
    export_weights(added, "run", "llama", "merged")
    merged = transformers.LlamaForCausalLM.from_pretrained(added / "merged")
    base = transformers.LlamaForCausalLM(merged.config)
    layers, state = flatten(load_params(added / "run")[0]["llama"]["layers"]), merged.state_dict()
    for name in ("query", "value"):
        for number, kernel in enumerate(layers[f"attention/{name}/kernel"]):
            state[f"model.layers.{number}.self_attn.{name[0]}_proj.weight"] = torch.tensor(kernel.T.copy())
    base.load_state_dict(state)
    ids = torch.tensor([[1, 5, 9, 33, 2, 7]])
    with torch.no_grad():
        without, expected = base(ids).logits, merged(ids).logits
        found = peft.PeftModel.from_pretrained(base, added / "adapter").eval()(ids).logits
    assert (without - expected).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def write_training(folder: Path, source: str) -> str:
    """A config of a training of two steps, as a file; the --config for it."""
    (folder / "training.py").write_text(source)
    return f"--config={folder / 'training.py'}"


PIXELLM_TRAINING = """
from tests.objectives.smallest import smallest_pixellm

def get_config(argument=None):
    config = smallest_pixellm()
    config.allow_random_frozen = False
    config.train.update({"steps": 2, "checkpoint_every": 2, "eval_every": 2, "log_every": 1, "warmup_steps": 0})
    return config
"""


def test_an_imported_pixellm_is_scored(whole):
    """With another config that asks less; the one that it has can be used too."""
    config = write_training(whole, PIXELLM_TRAINING)
    words = "--config.data.tokenizer=imported/tokenizer/tokenizer.json"
    said = run(whole, "evaluate", config, words, "--checkpoint=imported", "--out=scores")
    assert "\nall " in said and (whole / "scores" / "metrics.json").is_file()
    own = load_params(whole / "imported")[1]
    assert own["data"]["length"] + own["eval"]["max_new_tokens"] <= own["model"]["llama"]["max_length"]
    assert own["init_from"] == str(whole / "imported") and Path(own["data"]["tokenizer"]).is_file()
    build_objective(ConfigDict(own))


def trained(folder: Path, config: str, start_from: Any, workdir: str, *overrides: str) -> dict[str, np.ndarray]:
    """Parameters of the last step of a training."""
    output = run(folder, "train", config, f"--config.init_from={start_from}", f"--workdir={workdir}", *overrides)
    assert "Written:" in output
    return flatten(load_params(folder / workdir / "checkpoints" / "last")[0])


def test_training_goes_on_from_an_import_and_from_a_training(whole):
    """At a learning rate of zero the parameters stay what they were at the start."""
    config, still = write_training(whole, PIXELLM_TRAINING), "--config.train.learning_rate=0.0"
    source = flatten(load_params(whole / "imported")[0])
    first = trained(whole, config, "imported", "first", still)
    assert first.keys() == source.keys() and all(np.array_equal(first[path], source[path]) for path in first)
    moved = trained(whole, config, "imported", "moved")
    assert any(not np.array_equal(moved[path], source[path]) for path in moved)
    again = trained(whole, config, "moved/checkpoints/last", "again", still)
    assert all(np.array_equal(again[path], moved[path]) for path in moved)


PARTS_TRAINING = (
    PIXELLM_TRAINING.replace("    return config\n", "")
    + """
    config.model.vision.update({"patch_size": 8, "layers": 11, "heads": 4})
    config.model.llama.update({"layers": 3, "heads": 4, "kv_heads": 2, "mlp_width": 48, "rope_theta": 5000.0})
    config.model.llama.norm_eps = 1e-5
    config.model.feature_layers = (11, 2)
    config.trained.language_model = False
    config.train.learning_rate_multipliers = {"text_projector": 1.0}
    return config
"""
)


def test_training_starts_from_parts(folder, tmp_path):
    """A tower and a language model of transformers, both frozen; the tower is as the sizes of the config want it."""
    config = write_training(tmp_path, PARTS_TRAINING)
    sources = f"clip-vision:{folder / 'clip'},llama:{folder / 'llama'}"
    found = trained(tmp_path, config, sources, "run")
    vision = read_weights(str(folder / "clip")).params
    language = read_weights(str(folder / "llama")).params
    for path, value in found.items():
        if path.startswith("vision/layers/"):
            np.testing.assert_array_equal(value, np.asarray(vision[path.removeprefix("vision/")])[:11], err_msg=path)
        if path.startswith("llama/layers/"):
            np.testing.assert_array_equal(value, np.asarray(language[path.removeprefix("llama/")]), err_msg=path)
    np.testing.assert_array_equal(found["vision/class_embedding"], vision["class_embedding"])
    table = np.asarray(language["embedding"])
    moved = np.abs(found["llama/embedding"][: len(table)] - table)  # embeddings are trained always
    assert found["llama/embedding"].shape == (912, 32) and moved.max() < 0.02


STORY_TRAINING = """
import dataclasses
from configs import as_config
from configs.storydiffusion import get_config as get_story_config
from tests.interop.test_diffusers_folder import CONFIGS

def get_config(argument=None):
    config, sizes = get_story_config("sd15"), CONFIGS["sd15"]
    config.model = as_config(dataclasses.replace(sizes, unet=dataclasses.replace(sizes.unet, lora_rank=2)))
    config.data.update({"folder": "stories", "size": 48, "panels": 2})
    config.eval.update({"steps": 1})
    config.train.update({"steps": 2, "batch_size": 2, "checkpoint_every": 2, "eval_every": 2, "warmup_steps": 0})
    return config
"""


def test_stories_are_trained_from_a_folder_and_from_its_import(tmp_path):
    """Words come from where the weights are; both runs are the same, and a third begins where they ended."""
    source = pipeline_source(tmp_path, "sd15")
    write_folder(tmp_path / "stories", [story(1, 2), story(3, 4)])
    import_weights(tmp_path, source, "imported")
    config = write_training(tmp_path, STORY_TRAINING)
    first = trained(tmp_path, config, source, "first")
    second = trained(tmp_path, config, "imported", "second")
    assert first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)
    third = trained(tmp_path, config, "second/checkpoints/last", "third", "--config.train.learning_rate=0.0")
    assert all(np.array_equal(third[path], second[path]) for path in second)
    assert any(np.any(value) for path, value in third.items() if path.endswith("lora_b"))
    said = export_weights(tmp_path, "third", "diffusers-sd15", "adapter", "--lora=adapter")
    assert "load_lora_weights" in said
    pipeline = PIPELINES["sd15"].from_pretrained(source)
    pipeline.load_lora_weights(tmp_path / "adapter")
    assert pipeline.get_active_adapters()


def test_raw_and_averaged_parameters(folder, tmp_path):
    """As training keeps both; what was exported last is replaced by the next."""
    raw = flatten(story_params())
    averaged = {path: np.asarray(value) + 1 for path, value in raw.items() if path.startswith("unet/")}
    config = json.loads(smallest_story_config().to_json())
    run_folder = save_run(tmp_path / "run", story_params(), config, unflatten(averaged))
    found = {}
    for weights in ("raw", "ema"):
        export_weights(tmp_path, run_folder, "diffusers-sd15", "out", f"--weights={weights}")
        found[weights] = read_pipeline(tmp_path / "out").params
        for path, value in raw.items():
            expected = averaged[path] if weights == "ema" and path in averaged else value
            np.testing.assert_array_equal(np.asarray(found[weights][path]), expected, err_msg=path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class Payload:
    """What runs a command when the pickle module reads it."""

    def __reduce__(self):
        return os.system, ("touch marker",)


def changed_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def truncated(folder: Path) -> None:
    file = folder / "model-00002-of-00007.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def with_tensor_twice(folder: Path) -> None:
    first, second = (folder / f"model-0000{n}-of-00007.safetensors" for n in (1, 2))
    tensors = load_file(first)
    save_file({**load_file(second), **{name: tensors[name] for name in list(tensors)[:1]}}, second)


def misfit(folder: Path) -> None:
    """One tensor is missing, one is there too many, one has another shape."""
    for file in folder.glob("model*"):
        file.unlink()
    tensors = {name: value.contiguous() for name, value in llama().state_dict().items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors |= {"model.extra": torch.zeros(3), "model.norm.weight": torch.zeros(5)}
    save_file(tensors, folder / "model.safetensors")


def malicious(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Payload()}, protocol=2))
        archive.writestr("archive/version", "3")


SPOILT = {
    "truncated": (truncated, "model-00002-of-00007.safetensors: not a whole safetensors file"),
    "absent": (
        lambda folder: (folder / "model-00003-of-00007.safetensors").unlink(),
        "lists model-00003-of-00007.safetensors, which is not there.",
    ),
    "misplaced": (
        lambda folder: changed_index(
            folder, lambda places: places.update({"model.norm.weight": "model-00001-of-00007.safetensors"})
        ),
        "does not describe its shards: model.norm.weight is not in model-00001-of-00007.safetensors.",
    ),
    "unlisted": (
        lambda folder: changed_index(
            folder, lambda places: places.update({"model.more": "model-00001-of-00007.safetensors"})
        ),
        "model.more is not in model-00001-of-00007.safetensors.",
    ),
    "outside": (
        lambda folder: changed_index(folder, lambda places: places.update({"model.norm.weight": "../norm"})),
        "names '../norm', which is not a file beside it.",
    ),
    "twice": (with_tensor_twice, "Two tensors of the name "),
    "misfit": (misfit, "  missing: model.layers.1.mlp.up_proj.weight [48, 32]"),
    "malicious": (malicious, "pytorch_model.bin asks for posix.system when it is opened"),
    "without settings": (lambda folder: (folder / "config.json").unlink(), "is no folder of weights: config.json"),
    "settings": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is not JSON",
    ),
}
CLOSED = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "empty"}  # nothing listens there
SOURCE, RUN = "--source=llama", "--checkpoint=run"
REFUSED: dict[str, tuple[str, list[str], str, dict[str, str]]] = {
    **{name: ("import", [f"--source={name}"], sentence, {}) for name, (_, sentence) in SPOILT.items()},
    "no source": ("import", [], "--source is needed", {}),
    "unknown format": ("import", [SOURCE, "--format=torch"], "'torch' is unknown; known are pixellm, llava,", {}),
    "other format": ("import", [SOURCE, "--format=llava"], "format llama, not llava.", {}),
    "no tensors of a tower": ("import", [SOURCE, "--format=clip-vision"], "The settings of the ", {}),
    "file as a tower": ("import", ["--source=notes.txt", "--format=clip-text"], "notes.txt", {}),
    "no weights": ("import", ["--source=notes.txt"], "notes.txt is no file of weights", {}),
    "nothing there": ("import", ["--source=nowhere"], "There is no file or folder nowhere.", {}),
    "hub without a network": ("import", ["--source=owner/name"], "offline mode is enabled).", {"HF_HOME": "empty"}),
    "hub that does not answer": ("import", ["--source=owner/name"], "nor found in its cache (Connect", {**CLOSED}),
    "part of a hub": ("import", ["--source=owner/name/part"], "nor found in its cache (", {"HF_HOME": "empty"}),
    "hub without its package": (
        "import",
        ["--source=owner/name"],
        "pip install huggingface_hub first.",
        {"PYTHONPATH": f"shim{os.pathsep}{ROOT}"},
    ),
    "precision": ("import", [SOURCE, "--dtype=int8"], "dtype is 'int8'; known are keep, float32,", {}),
    "config of another model": (
        "import",
        ["--source=sd15", "--config=configs/pixellm.py"],
        "--config trains pixellm, but sd15 holds storydiffusion.",
        {},
    ),
    "unknown field": ("import", [SOURCE, "--formt=llama"], "Unknown command line flag 'formt'", {}),
    "LoRA that is not there": ("import", [SOURCE, "--lora=style.safetensors:0.5"], "no file or folder style", {}),
    "LoRA of another model": ("import", [SOURCE, "--lora=lora.safetensors"], "  unused: model.layers.9.self", {}),
    "file as a folder": ("import", [SOURCE, "--out=notes.txt/new"], "notes.txt is no folder.", {}),
    "no place": ("import", [SOURCE, "--out=/proc/new/place"], "/proc/new/place cannot be written (", {}),
    "folder of others": ("import", [SOURCE, "--out=others"], "others exists and is nothing that this command", {}),
    "training": ("import", [SOURCE, "--out=run/checkpoints/best/2"], "is nothing that this command alone has", {}),
    "here": ("import", [SOURCE, "--out=."], "choose another --out.", {}),
    "long name": ("import", [SOURCE, f"--out={'x' * 300}"], "(File name too long).", {}),
    "no checkpoint": ("export", ["--format=llama"], "--checkpoint is needed", {}),
    "no format": ("export", [RUN], "--format is needed", {}),
    "export of nothing": ("export", ["--checkpoint=nowhere", "--format=llama"], "There is no checkpoint at ", {}),
    "export unknown": ("export", [RUN, "--format=torch"], "The format 'torch' is unknown; known are pixellm,", {}),
    "export other": (
        "export",
        [RUN, "--format=llama"],
        "of 'storydiffusion' cannot be written as llama; it can be as clip-text or diffusers-sd15 or ",
        {},
    ),
    "export of two encoders": ("export", [RUN, "--format=diffusers-sdxl"], "diffusers-sd15.", {}),
    "no layout": (
        "export",
        ["--checkpoint=classifier", "--format=llama"],
        "holds a checkpoint of 'panel_classifier', which has no PyTorch layout.",
        {},
    ),
    "no additions": ("export", [RUN, "--format=diffusers-sd15", "--lora=adapter"], "has no low-rank additions", {}),
    "export precision": ("export", [RUN, "--format=diffusers-sd15", "--dtype=int8"], "--dtype is 'int8'", {}),
    "shard size": ("export", [RUN, "--format=diffusers-sd15", "--max_shard_size=big"], "'big' is no size", {}),
    "no raw ones": (
        "export",
        ["--checkpoint=averaged", "--format=diffusers-sd15", "--weights=raw"],
        "holds averaged parameters alone; for raw ones name averaged/checkpoints/last.",
        {},
    ),
    "export over a training": ("export", [RUN, "--format=diffusers-sd15", "--out=run"], "choose another --out.", {}),
    "export over others": ("export", [RUN, "--format=diffusers-sd15", "--out=llama"], "choose another --out.", {}),
    "export over more": ("export", [RUN, "--format=diffusers-sd15", "--out=extended"], "choose another --out.", {}),
    "damaged": ("export", ["--checkpoint=damaged", "--format=diffusers-sd15"], "damaged", {}),
    "words gone": ("export", ["--checkpoint=wordless", "--format=diffusers-sd15"], "gone/tokenizer", {}),
}


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()} | {
        str(path.relative_to(folder)): -1 for path in folder.rglob("*") if path.is_dir()
    }


@pytest.fixture(scope="module")
def refused(folder, tmp_path_factory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """Exit codes and error texts of all that is refused, run two at a time; the folder is as it was."""
    path = tmp_path_factory.mktemp("refused")
    for name, (spoil, _) in SPOILT.items():
        spoil(Path(shutil.copytree(folder / "llama", path / name)))
    shutil.copytree(folder / "llama", path / "llama")
    pipeline_source(path / "made", "sd15").rename(path / "sd15")
    (path / "notes.txt").write_text("notes")
    (path / "others").mkdir()
    (path / "others" / "params").write_text("mine")
    (path / "shim" / "huggingface_hub").mkdir(parents=True)
    (path / "shim" / "huggingface_hub" / "__init__.py").write_text("raise ImportError('not installed')")
    save_file(
        {f"model.layers.9.self_attn.q_proj.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"},
        path / "lora.safetensors",
    )
    config = json.loads(smallest_story_config().to_json())
    save_run(path / "run", story_params(), config)
    (path / "run" / "config.json").write_text("{}")
    export_weights(path, "run", "diffusers-sd15", "extended")
    (path / "extended" / "README.md").write_text("mine")
    save_run(path / "averaged", story_params(), config | {"train": {**config["train"], "ema": 0.9}})
    save_run(path / "classifier", {"x": np.zeros(2)}, config | {"objective": "panel_classifier"})
    save_run(path / "wordless", story_params(), config | {"data": {**config["data"], "tokenizer": "gone"}})
    save_run(path / "damaged", story_params(), config)
    for file in (path / "damaged" / "checkpoints" / "best" / "2" / "params").rglob("d/*"):
        file.write_bytes(b"")

    def call(case: str) -> tuple[int, str]:
        command, arguments, _, environment = REFUSED[case]
        if not any(argument.startswith("--out") for argument in arguments):
            arguments = [*arguments, f"--out=new {case}/deep/down"]
        process = start(path, f"{command}_weights", *arguments, **environment)
        err = process.communicate(timeout=300)[1]
        return process.returncode, err

    before = listing(path)
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(REFUSED, pool.map(call, REFUSED), strict=True))
    assert listing(path) == before
    return path, done


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(refused, case):
    """Exit code 2 and one sentence, with a list below it at most."""
    code, err = refused[1][case]
    assert code == 2, err
    assert err.startswith("Error: ") and REFUSED[case][2] in err, err
    first, *rest = err.splitlines()
    assert all(line.startswith("  ") for line in rest) and (rest or first.endswith((".", "?"))), err


def test_all_that_does_not_fit_is_listed(refused):
    err = refused[1]["misfit"][1]
    for line in (
        "  missing: model.layers.1.mlp.up_proj.weight [48, 32]",
        "  unexpected: model.extra [3]",
        "  mis-shaped: model.norm.weight is [5], expected [32]",
    ):
        assert line in err.splitlines(), err


@pytest.mark.parametrize("command", ["import_weights", "export_weights"])
def test_help_comes_at_once(folder, command):
    """All flags, and jax is not waited for."""
    begin = time.perf_counter()
    process = start(folder, command, "--help", PYTHONPROFILEIMPORTTIME="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and time.perf_counter() - begin < 2
    shown = re.findall(r"^  --(\w+): ", out.partition("\nFlags:\n")[2], re.MULTILINE)
    source = (ROOT / "experiments" / f"{command}.py").read_text()
    defined = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source) + ["config"] * ("define_config_flag" in source)
    assert sorted(shown) == sorted(defined) and len(shown) > 7
    assert "absl.flags" in err and "jax" not in {line.rpartition("|")[2].strip() for line in err.splitlines()}


def test_an_id_of_the_hub_that_the_cache_has(folder, tmp_path):
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    shutil.copytree(folder / "llama", repository / "snapshots" / "0123abc")
    said = import_weights(tmp_path, "owner/name", "out", HF_HOME=str(tmp_path))
    assert "owner/name: llama, " in said
    expected = read_weights(str(folder / "llama")).params
    found = open_checkpoint(tmp_path / "out")
    assert found.keys() == expected.keys() and all(np.array_equal(found[path], expected[path]) for path in found)
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def large(folder) -> Path:
    """A language model that takes long enough to be written."""
    sizes = {**LLAMA, "vocab_size": 30_000, "hidden_size": 256, "num_hidden_layers": 8}
    saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), folder / "large")
    import_weights(folder, "large", "large imported")
    export_weights(folder, "large imported", "llama", "large exported")
    return folder


def killed(folder: Path, out: str, command: str, *arguments: str) -> None:
    """Starts a command and kills it once its temporary folder is there."""
    process = start(folder, command, *arguments, f"--out={out}")
    while not list(folder.glob(f".{out}.*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and list(folder.glob(f".{out}.*"))
    assert not (folder / out).exists()


def test_a_killed_import_is_done_again(large):
    killed(large, "killed", "import_weights", "--source=large")
    import_weights(large, "large", "killed")
    first, second = open_checkpoint(large / "killed"), open_checkpoint(large / "large imported")
    assert first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)
    assert not [path for path in large.iterdir() if path.name.startswith(".")]
    names = [sorted(path.name for path in (large / name).iterdir()) for name in ("killed", "large imported")]
    assert names[0] == names[1]


def test_a_killed_export_is_done_again(large):
    killed(large, "killed export", "export_weights", "--checkpoint=large imported", "--format=llama")
    export_weights(large, "large imported", "llama", "killed export")
    first, second = large / "killed export", large / "large exported"
    assert listing(first) == listing(second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in listing(first))
    assert not [path for path in large.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("command", ["import_weights", "export_weights"])
def test_a_full_disk(large, command):
    source = ["--source=large"] if command.startswith("import") else ["--checkpoint=large imported", "--format=llama"]
    before = listing(large)
    process = start(large, command, *source, "--out=full/out", limit=1 << 20)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 2, err
    why = "the disk is full or the quota is used up"
    assert err == f"Error: full/out cannot be written ({why}); nothing was left behind.\n"
    assert listing(large) == before
