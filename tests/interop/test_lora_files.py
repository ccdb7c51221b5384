"""Low-rank additions of files and of our own, against plain arithmetic and against peft and diffusers."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from pixelstory_jax.interop.clip_text_table import CLIP_TEXT, clip_text_settings
from pixelstory_jax.interop.lora_files import merge_lora, open_lora, story_tables
from pixelstory_jax.interop.lora_params import diffusers_tensors, merge_own, peft_settings, peft_tensors
from pixelstory_jax.interop.safetensors_files import write_safetensors
from pixelstory_jax.interop.tables import LLAMA
from pixelstory_jax.interop.tensors import FileTensor, LazyArray, WeightsError
from pixelstory_jax.interop.torch_layout import to_torch_tensors
from pixelstory_jax.interop.unet_table import unet_table
from pixelstory_jax.models.autoencoder import AutoencoderConfig
from pixelstory_jax.models.clip_text import ClipTextConfig
from pixelstory_jax.models.llama import Llama, LlamaConfig, LoraConfig
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.models.unet import UNet, UNetConfig
from tests.models.small import random_like
from tests.models.test_unet import unet_inputs, unet_settings

TEXT = ClipTextConfig(vocab=20, length=6, width=8, layers=2, heads=2, mlp_width=12, eos_id=19)
CONFIG = StoryDiffusionConfig(
    UNetConfig(
        channels=(8, 16, 24),
        depths=(0, 1, 2),
        heads=(2, 4, 3),
        context_width=20,
        linear_projection=False,
        pooled_width=6,
        time_id_width=8,
        groups=4,
    ),
    AutoencoderConfig(block_channels=(4, 8), layers_per_block=1, groups=2),
    TEXT,
    dataclasses.replace(TEXT, width=12, activation="gelu", projection=6),
    text_layer=-2,
)
# The same modules in the names of diffusers and of the original layout, linear maps and convolutions of all kinds.
UNET_MODULES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.resnets.0.conv1": "input_blocks.4.0.in_layers.2",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj": "middle_block.1.transformer_blocks.1.ff.net.0.proj",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.resnets.0.time_emb_proj": "output_blocks.0.0.emb_layers.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.attentions.2.proj_in": "output_blocks.5.1.proj_in",
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0": (
        "output_blocks.5.1.transformer_blocks.0.attn2.to_out.0"
    ),
    "conv_out": "out.2",
}
TEXT_MODULES = ("text_model.encoder.layers.1.mlp.fc1", "text_model.encoder.layers.0.self_attn.out_proj")
SCALE = 0.7


@functools.cache
def story_params() -> dict[str, np.ndarray]:
    return flatten(random_like(jax.eval_shape(StoryDiffusion(CONFIG).init, jax.random.key(0))))


def part(params: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {path.removeprefix(prefix): value for path, value in params.items() if path.startswith(prefix)}


def torch_state(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """U-Net and text encoders in torch, under the names of a pipeline."""
    tables = {"unet": unet_table(CONFIG.unet), "text": CLIP_TEXT, "text_2": CLIP_TEXT}
    names = {"unet": "unet", "text": "text_encoder", "text_2": "text_encoder_2"}
    return {
        f"{names[name]}.{key}": value
        for name, table in tables.items()
        for key, value in to_torch_tensors(table, unflatten(part(params, f"{name}/"))).items()
    }


@dataclasses.dataclass(frozen=True)
class Pair:
    down: np.ndarray
    up: np.ndarray
    alpha: float

    def product(self) -> np.ndarray:
        return np.einsum("or...,r...->o...", self.up.reshape(self.up.shape[:2]), self.down)


@functools.cache
def pairs(with_text: bool = True) -> dict[str, Pair]:
    """Random additions by module, of ranks 2 and 3."""
    rng, state, found = np.random.default_rng(5), torch_state(story_params()), {}
    modules = [f"unet.{name}" for name in UNET_MODULES]
    if with_text:
        modules += [f"{encoder}.{name}" for encoder in ("text_encoder", "text_encoder_2") for name in TEXT_MODULES]
        modules.append("text_encoder_2.text_projection")
    for number, module in enumerate(modules):
        out, *rest = state[f"{module}.weight"].shape
        rank = 2 + number % 2
        draw = [rng.standard_normal(shape).astype(np.float32) for shape in ((rank, *rest), (out, rank))]
        found[module] = Pair(draw[0], draw[1].reshape(out, rank, *(1 for _ in rest[1:])), 1.0 + number)
    return found


def expected_state(additions: dict[str, Pair], scale: float, own_alpha: bool) -> dict[str, np.ndarray]:
    """Plain arithmetic."""
    state = dict(torch_state(story_params()))
    for module, pair in additions.items():
        factor = scale * (pair.alpha / len(pair.down) if own_alpha else 1.0)
        state[f"{module}.weight"] = state[f"{module}.weight"] + factor * pair.product()
    return state


def kohya(additions: dict[str, Pair], original: bool) -> dict[str, np.ndarray]:
    starts = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tensors = {}
    for module, pair in additions.items():
        network, _, name = module.partition(".")
        if network == "unet" and original:
            name = UNET_MODULES[name]
        key = f"{starts[network]}_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up}
        tensors[f"{key}.alpha"] = np.float32(pair.alpha)
    return tensors


def dotted(additions: dict[str, Pair], down: str, up: str) -> dict[str, np.ndarray]:
    tensors = {f"{module}.{down}.weight": pair.down for module, pair in additions.items()}
    return tensors | {f"{module}.{up}.weight": pair.up for module, pair in additions.items()}


FORMS = {
    "kohya": (kohya(pairs(), original=False), True),
    "kohya, original names": (kohya(pairs(), original=True), True),
    "peft": (dotted(pairs(), "lora_A", "lora_B"), False),
    "peft, with the adapter's name": (dotted(pairs(), "lora_A.default", "lora_B.default"), False),
    "older diffusers": (dotted(pairs(), "lora.down", "lora.up"), False),
    "text names without prefix": (
        {key.replace("text_model.", ""): value for key, value in dotted(pairs(), "lora_A", "lora_B").items()},
        False,
    ),
}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        value = np.asarray(value)
        np.testing.assert_allclose(found[key], value, atol=tolerance * np.abs(value).max(), rtol=0, err_msg=key)


@pytest.mark.parametrize("form", FORMS)
def test_merging_is_plain_arithmetic_in_every_naming(form):
    tensors, own_alpha = FORMS[form]
    params = story_params()
    merged = merge_lora(params, story_tables(CONFIG), tensors, SCALE)
    assert merged.keys() == params.keys()
    state = torch_state({path: np.asarray(value) for path, value in merged.items()})
    assert_close(state, expected_state(pairs(), SCALE, own_alpha))
    touched = [path for path, value in merged.items() if isinstance(value, LazyArray)]
    assert len(touched) == len(pairs()) and all(merged[path] is params[path] for path in params.keys() - set(touched))
    assert_close(torch_state(params), expected_state({}, SCALE, True), 0)  # the arrays given are left alone


def test_networks_of_one_part_and_their_names():
    """Stable Diffusion 1.5 has one text encoder, `lora_te_`; a network alone has the names that its table has."""
    module, pair = "text_encoder." + TEXT_MODULES[0], pairs()["text_encoder." + TEXT_MODULES[0]]
    key = f"lora_te_{TEXT_MODULES[0].replace('.', '_')}"
    tensors = {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up}
    expected = expected_state({module: pair}, 1.0, False)
    for found in (
        merge_lora(story_params(), story_tables(CONFIG), tensors),
        merge_lora(story_params(), {"text/": CLIP_TEXT}, dotted({TEXT_MODULES[0]: pair}, "lora_A", "lora_B")),
    ):
        assert_close(torch_state({path: np.asarray(value) for path, value in found.items()}), expected)


def test_layers_are_read_when_they_are_asked_for():
    """In the dtype of the parameters; nothing of the file before, and of a stack only what touches the layers."""
    kernel = np.arange(2 * 3 * 4).reshape(2, 3, 4).astype(ml_dtypes.bfloat16)
    reads: list[str] = []

    def tensor(name: str, shape: tuple[int, ...]) -> Any:
        return FileTensor(shape, np.dtype(np.float16), lambda: reads.append(name) or np.ones(shape, np.float16))

    name = "model.layers.1.self_attn.q_proj.lora_"
    tensors = {f"{name}A.weight": tensor("A", (1, 3)), f"{name}B.weight": tensor("B", (4, 1))}
    params = {"layers/attention/query/kernel": LazyArray(kernel.shape, kernel.dtype, lambda index: kernel[index])}
    merged = merge_lora(params, {"": LLAMA}, tensors, 2.0)["layers/attention/query/kernel"]
    np.testing.assert_array_equal(merged[0:1], kernel[0:1])
    assert not reads and merged.dtype == kernel.dtype
    np.testing.assert_array_equal(merged[1:2, :, 1:3], (kernel[1:2, :, 1:3] + 2).astype(kernel.dtype))
    assert reads == ["A", "B"] and np.asarray(merged).dtype == kernel.dtype


def test_settings_of_peft(tmp_path):
    """Ranks and alphas of single modules, rank-stabilised; as a folder, and as diffusers writes them into a file."""
    additions = pairs(with_text=False)
    module = "down_blocks.1.resnets.0.conv1"
    ranks = {name: len(pair.down) for name, pair in additions.items()}
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 5,
        "rank_pattern": {f"^{name.removeprefix('unet.')}": 3 for name, rank in ranks.items() if rank == 3},
        "alpha_pattern": {"resnets.0.conv1": 7.0},
        "use_rslora": True,
    }
    expected = torch_state(story_params())
    for name, pair in additions.items():
        alpha = 7.0 if name == f"unet.{module}" else 5.0
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + alpha / np.sqrt(ranks[name]) * pair.product()
    tensors = dotted(additions, "lora_A", "lora_B")
    folder, file = tmp_path / "adapter", tmp_path / "pytorch_lora_weights.safetensors"
    folder.mkdir()
    bare = {key.replace("unet.", "base_model.model.", 1): value for key, value in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", bare)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    metadata = {f"unet.{name}": value for name, value in settings.items()}
    write_safetensors(file, tensors, {"lora_adapter_metadata": json.dumps(metadata)})
    for source in (folder, folder / "adapter_model.safetensors", file, tmp_path):
        opened, found = open_lora(source)
        merged = merge_lora(story_params(), story_tables(CONFIG), opened, settings=found)
        assert_close(torch_state({path: np.asarray(value) for path, value in merged.items()}), expected)
    write_safetensors(file, tensors, {"ss_network_dim": "2"})
    assert open_lora(file)[1] is None
    write_safetensors(file, tensors, {"lora_adapter_metadata": "{"})
    with pytest.raises(WeightsError, match="its lora_adapter_metadata is not JSON"):
        open_lora(file)


def test_all_that_does_not_fit_is_listed_at_once():
    rows, key = np.zeros((2, 24)), "unet.mid_block.attentions.0.transformer_blocks.1.attn1"
    tensors = {
        f"{key}.to_q.lora_A.weight": rows,
        f"{key}.to_k.lora_A.weight": rows[:, :3],
        f"{key}.to_k.lora_B.weight": rows.T,
        f"{key}.to_k.alpha": np.zeros(2),
        f"{key}.to_v.lora_A.weight": rows,
        f"{key}.to_v.lora_B.weight": rows.T,
        f"{key}.to_v.lora_B.other.weight": rows.T,
        f"lora_{key.replace('.', '_')}_to_v.lora_down.weight": rows,
        f"lora_{key.replace('.', '_')}_to_v.lora_up.weight": rows.T,
        "unet.attn9.lora_A.weight": rows,
        "unet.conv_norm_out.alpha": np.ones(()),
        "something": rows,
        "unet.conv_norm_out.lora_A.weight": rows,
        "encoder.layers.0.mlp.fc1.lora_A.weight": rows,
    }
    with pytest.raises(WeightsError) as caught:
        merge_lora(story_params(), story_tables(CONFIG), tensors)
    first, *lines = str(caught.value).splitlines()
    assert first == "These tensors of the LoRA do not fit:"
    assert sorted(lines) == sorted(
        [
            f"  half of a pair: {key}.to_q.lora_A.weight",
            f"  mis-shaped: {key}.to_k.lora_A.weight is [2, 3], expected [2, 24]",
            f"  mis-shaped: {key}.to_k.alpha is [2], expected one number",
            f"  twice: {key}.to_v.lora_B.weight and {key}.to_v.lora_B.other.weight",
            f"  twice: lora_{key.replace('.', '_')}_to_v, under another name",
            "  unused: unet.attn9.lora_A.weight [2, 24]",
            "  unused: unet.conv_norm_out.alpha []",
            "  unused: something [2, 24]",
            "  unused: unet.conv_norm_out.lora_A.weight [2, 24]",
            "  ambiguous: encoder.layers.0.mlp.fc1 may be text/layers/mlp/up/kernel or text_2/layers/mlp/up/kernel",
        ]
    )


def test_rank_that_the_settings_do_not_have():
    tensors = dotted({"unet.conv_in": pairs()["unet.conv_in"]}, "lora_A", "lora_B")
    with pytest.raises(WeightsError, match=r"conv_in.lora_A.weight is \[2, 4, 3, 3\], expected \[4, 4, 3, 3\]"):
        merge_lora(story_params(), story_tables(CONFIG), tensors, settings={"r": 4, "lora_alpha": 4})


@pytest.mark.parametrize(
    ("key", "words"),
    {
        "lora_unet_conv_in.lora_mid.weight": "is of a LoCon with a middle part; only plain low-rank",
        "lora_unet_conv_in.hada_w1_a": "is of a LoHa; only",
        "lora_unet_conv_in.lokr_w1": "is of a LoKr; only",
        "lora_unet_conv_in.dora_scale": "is of a DoRA; only",
        "unet.conv_in.lora_magnitude_vector.weight": "is of a DoRA; only",
        "unet.conv_in.lora_B.bias": "is an addition to a bias; only",
        "lora_unet_conv_in.diff_b": "is an addition to a bias; only",
        "lora_unet_conv_in.diff": "is the difference of a whole tensor; only",
        "base_model.model.model.embed_tokens.lora_embedding_A": "is an addition to an embedding; only",
    }.items(),
)
def test_other_additions_are_refused(key, words):
    with pytest.raises(WeightsError, match=f"^{key} {words}"):
        merge_lora(story_params(), story_tables(CONFIG), {key: np.zeros((2, 2))})


def test_settings_that_are_refused():
    for settings, words in (
        ({"peft_type": "IA3"}, "The LoRA has peft_type='IA3'; 'LORA' is what can be read"),
        ({"use_dora": True}, "The LoRA has use_dora=True; False or None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changes the base weights"),
    ):
        with pytest.raises(WeightsError, match=words):
            merge_lora(story_params(), story_tables(CONFIG), {}, settings=settings)


LLAMA_CONFIG = LlamaConfig(
    vocab=50, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, lora=LoraConfig(2, 5.0, targets=("query", "down"))
)
TOKENS = np.random.default_rng(3).integers(0, 50, (2, 7)).astype(np.int32)


@functools.cache
def llama_params() -> dict[str, np.ndarray]:
    """With low-rank additions, nowhere zero."""
    valid = np.ones(TOKENS.shape, bool)
    model = Llama(LLAMA_CONFIG)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS, valid, method=Llama.whole))["params"]
    return flatten(random_like(shapes))


def llama_logits(config: LlamaConfig, params: dict[str, Any]) -> np.ndarray:
    variables = {"params": unflatten({path: np.asarray(value) for path, value in params.items()})}
    return np.asarray(Llama(config).apply(variables, TOKENS, np.ones(TOKENS.shape, bool), method=Llama.whole))


@functools.cache
def unet_params(config: UNetConfig) -> dict[str, np.ndarray]:
    inputs = unet_inputs(config, (8, 8), 1)
    return flatten(random_like(jax.eval_shape(lambda: UNet(config).init(jax.random.key(0), **inputs))["params"]))


def test_own_additions_are_merged():
    """Stacked ones; the network without them computes the same."""
    params = llama_params()
    merged = merge_own(params, LLAMA_CONFIG.lora.alpha)
    assert merged.keys() == {path for path in params if "lora" not in path}
    bare = dataclasses.replace(LLAMA_CONFIG, lora=LoraConfig())
    expected = llama_logits(LLAMA_CONFIG, params)
    assert np.abs(expected - llama_logits(bare, {path: params[path] for path in merged})).max() > 0.1
    np.testing.assert_allclose(llama_logits(bare, merged), expected, atol=2e-5)
    down = "layers/mlp/down/"
    whole = params[f"{down}kernel"] + 2.5 * params[f"{down}lora_a"] @ params[f"{down}lora_b"]
    np.testing.assert_allclose(merged[f"{down}kernel"][1:, 3:5, ::2], whole[1:, 3:5, ::2], atol=1e-6)
    flat = {"map/kernel": np.ones((3, 4), np.float16), "map/lora_a": np.ones((3, 2)), "map/lora_b": np.ones((2, 4))}
    single = merge_own(flat, 4.0)["map/kernel"]
    assert single.dtype == np.float16 and np.all(np.asarray(single) == 5) and np.all(flat["map/kernel"] == 1)


def test_own_additions_that_lack_a_part():
    with pytest.raises(WeightsError) as caught:
        merge_own({"a/lora_a": np.ones((3, 2)), "a/kernel": np.ones((3, 4)), "b/lora_b": np.ones((2, 4))}, 1.0)
    assert str(caught.value).splitlines()[1:] == ["  a/lora_b", "  b/lora_a", "  b/kernel"]


def test_an_adapter_of_ours_is_read_back(tmp_path):
    """Written and merged again, it is what merging our own additions gives; names of other modules are not used."""
    params = llama_params()
    settings = peft_settings(LLAMA, params, 5.0, 0.05, "some/llama", "CAUSAL_LM")
    assert settings["target_modules"] == ["down_proj", "q_proj"] and (settings["r"], settings["lora_alpha"]) == (2, 5.0)
    write_safetensors(tmp_path / "adapter_model.safetensors", peft_tensors(LLAMA, params))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    tensors, read = open_lora(tmp_path)
    assert sorted(tensors)[0] == "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" and read == settings
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (2, 24)
    base = {path: value for path, value in params.items() if "lora" not in path}
    again, own = merge_lora(base, {"": LLAMA}, tensors, settings=read), merge_own(params, 5.0)
    assert_close(again, own)
    unet = unet_params(dataclasses.replace(CONFIG.unet, lora_rank=2))
    table = unet_table(CONFIG.unet)
    assert peft_settings(table, unet, 1.0)["target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    some = {path: value for path, value in unet.items() if "lora" not in path or "mid/attention" in path}
    names = peft_settings(table, some, 1.0)["target_modules"]
    assert len(names) == 16 and names[0] == "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"


def test_what_cannot_be_written():
    with pytest.raises(WeightsError, match="These parameters have no low-rank additions"):
        peft_tensors(LLAMA, {"head": np.ones((3, 4))})
    with pytest.raises(WeightsError, match="names no linear map for the low-rank additions of other"):
        peft_tensors(LLAMA, {"other/lora_a": np.ones((3, 2))})
    with pytest.raises(WeightsError, match=r"of one rank are needed; these have \[1, 2\]"):
        peft_settings(LLAMA, {"a/lora_a": np.ones((3, 2)), "b/lora_a": np.ones((3, 1))}, 1.0)


# Against peft and diffusers; the tests above need neither.


def torch_llama():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")

    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    base = {path: value for path, value in llama_params().items() if "lora" not in path}
    tensors = to_torch_tensors(LLAMA, unflatten(base))
    model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()})
    return model, base


def numpy_state(model: Any) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy().copy() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("stabilised", [False, True])
def test_merging_as_peft(stabilised, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, base = torch_llama()
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj", "gate_proj", "lm_head"],
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 9},
        use_rslora=stabilised,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = {key: value for key, value in numpy_state(theirs).items() if "lora_" in key}
    tensors, settings = open_lora(tmp_path)
    expected = numpy_state(theirs.merge_and_unload())
    for given in (tensors, adapter):  # the second with the name of the adapter in its keys
        merged = merge_lora(base, {"": LLAMA}, given, settings=settings)
        assert_close(to_torch_tensors(LLAMA, unflatten({k: np.asarray(v) for k, v in merged.items()})), expected)


def test_peft_reads_our_adapter(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch = pytest.importorskip("torch")

    model, _ = torch_llama()
    write_safetensors(tmp_path / "adapter_model.safetensors", peft_tensors(LLAMA, llama_params()))
    settings = peft_settings(LLAMA, llama_params(), LLAMA_CONFIG.lora.alpha, 0.05, None, "CAUSAL_LM")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path))
    logits = theirs(torch.from_numpy(TOKENS.astype(np.int64))).logits.detach().numpy()
    np.testing.assert_allclose(llama_logits(LLAMA_CONFIG, llama_params()), logits, atol=2e-5 * np.abs(logits).max())


def torch_networks() -> dict[str, Any]:
    """diffusers' U-Net and transformers' first text encoder of `CONFIG`, with our random parameters."""
    import diffusers

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    parts = {
        "unet": diffusers.UNet2DConditionModel(**unet_settings(CONFIG.unet)),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip_text_settings(CONFIG.text))),
    }
    for name, network in parts.items():
        state = part(torch_state(story_params()), f"{name}.")
        if not any(key.startswith("text_model.") for key in network.state_dict()):
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
        network.eval().load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    return parts


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", ["kohya", "kohya, original names", "peft"])
def test_merging_as_diffusers(form):
    """Loaded into U-Net and text encoder and fused, names and alphas by diffusers' own conversion of them.

    That loses the alphas of attentions where modules differ in theirs, and does not know kohya's add_embedding.
    """
    pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as Loader
    from peft.tuners.tuners_utils import BaseTunerLayer

    known = {name: pair for name, pair in pairs().items() if "add_embedding" not in name and "encoder_2" not in name}
    additions = {name: dataclasses.replace(pair, alpha=1.5) for name, pair in known.items()}
    tensors = {
        "kohya": kohya(additions, original=False),
        "kohya, original names": kohya(additions, original=True),
        "peft": dotted(additions, "lora_A", "lora_B"),
    }[form]
    networks = torch_networks()
    given = {key: torch.tensor(value) for key, value in tensors.items()}
    state, alphas = Loader.lora_state_dict(given, unet_config=networks["unet"].config)
    Loader.load_lora_into_unet(state, alphas, networks["unet"])
    Loader.load_lora_into_text_encoder(state, alphas, networks["text_encoder"], "text_encoder")
    merged = merge_lora(story_params(), story_tables(CONFIG), tensors)
    ours = torch_state({path: np.asarray(value) for path, value in merged.items()})
    for name, network in networks.items():
        for module in network.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        found = {key.replace(".base_layer", ""): x for key, x in numpy_state(network).items() if ".lora_" not in key}
        flat = {key.removeprefix("text_model."): value for key, value in found.items()}
        expected = part(ours, f"{name}.")
        assert_close({key.removeprefix("text_model."): value for key, value in expected.items()}, flat)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_diffusers_reads_our_additions(tmp_path):
    """At the scale of our network."""
    pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")

    config = dataclasses.replace(CONFIG.unet, lora_rank=2, lora_alpha=3.0)
    params = {**unet_params(config), **part(story_params(), "unet/")}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    write_safetensors(file, diffusers_tensors(unet_table(config), params, config.lora_alpha))
    unet = torch_networks()["unet"]
    unet.load_lora_adapter(str(tmp_path), prefix="unet", weight_name=file.name)
    inputs = unet_inputs(config, (8, 8), 2)
    theirs = unet(
        torch.tensor(inputs["latents"]).permute(0, 3, 1, 2),
        torch.tensor(inputs["timesteps"]),
        torch.tensor(inputs["context"]),
        added_cond_kwargs={
            "text_embeds": torch.tensor(inputs["added"]["pooled"]),
            "time_ids": torch.tensor(inputs["added"]["time_ids"]),
        },
    ).sample.permute(0, 2, 3, 1)
    ours, _ = jax.jit(UNet(config).apply)({"params": unflatten(params)}, **inputs)
    expected = theirs.detach().numpy()
    np.testing.assert_allclose(np.asarray(ours), expected, atol=2e-5 * np.abs(expected).max())
