"""Round trips: a torch module with random weights, read, written as a checkpoint, exported, loaded by torch again."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from pixelstory_jax.inference.continuation import continue_tokens  # noqa: E402
from pixelstory_jax.interop.checkpoint_folder import open_checkpoint, write_config, write_params  # noqa: E402
from pixelstory_jax.interop.exports import Source, plan_export, write_export  # noqa: E402
from pixelstory_jax.interop.formats import detect_format, read_weights  # noqa: E402
from pixelstory_jax.interop.llama_folder import llama_config  # noqa: E402
from pixelstory_jax.interop.llava_folder import llava_config  # noqa: E402
from pixelstory_jax.interop.start_weights import pixellm_start  # noqa: E402
from pixelstory_jax.interop.tables import pixellm as pixellm_table  # noqa: E402
from pixelstory_jax.interop.tensors import WeightsError  # noqa: E402
from pixelstory_jax.interop.torch_layout import torch_shapes  # noqa: E402
from pixelstory_jax.interop.weights import cast_params, copy_files  # noqa: E402
from pixelstory_jax.models.clip_vision import ClipVision, resize_position_table  # noqa: E402
from pixelstory_jax.models.llama import Llama  # noqa: E402
from pixelstory_jax.models.llava import Llava  # noqa: E402
from pixelstory_jax.models.paths import unflatten  # noqa: E402
from pixelstory_jax.models.pixellm import IMAGE_TOKEN, PixelLMConfig  # noqa: E402
from pixelstory_jax.training.checkpoints import load_params  # noqa: E402

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}


def randomised(module):
    """The module with every parameter random, none at a default of zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module.eval()


def llama(tied=False):
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)))


def tower():
    return randomised(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)))


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(**LLAMA),
        image_token_index=60,
    )
    return randomised(transformers.LlavaForConditionalGeneration(config))


def saved(module, folder, dtype=None, **options):
    (module if dtype is None else module.to(dtype)).save_pretrained(folder, **options)
    return folder


def through_checkpoint(weights, folder):
    """What export reads after import: the parameters from an Orbax checkpoint."""
    folder.mkdir()
    write_params(folder, weights.params)
    copy_files(weights.files, folder / "tokenizer")
    write_config(folder, {"objective": weights.kind, "model": dataclasses.asdict(weights.config), "data": weights.data})
    params = open_checkpoint(folder)
    assert params.keys() == weights.params.keys()
    loaded, config = load_params(folder)
    assert jax.tree.structure(loaded) == jax.tree.structure(unflatten(dict.fromkeys(params, 0)))
    return Source(weights.kind, weights.config, config, params, out=str(folder.parent / "out"))


def exported(source, layout, folder, dtype="keep", max_shard_size=10**9):
    folder.mkdir()
    write_export(folder, plan_export(layout, dataclasses.replace(source, dtype=dtype)), dtype, max_shard_size)
    return folder


def round_trip(source, layout, tmp_path, **options):
    weights = read_weights(str(source))
    return exported(through_checkpoint(weights, tmp_path / "checkpoint"), layout, tmp_path / "out", **options)


def assert_same(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


def nested(weights):
    return unflatten({path: jnp.asarray(np.asarray(value)) for path, value in weights.params.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_llama(tmp_path, dtype, tied):
    first = llama(tied).to(dtype)
    saved(first, tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    out = round_trip(tmp_path / "hf", "llama", tmp_path, max_shard_size=20_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    second = transformers.LlamaForCausalLM.from_pretrained(out)
    assert second.dtype == dtype and second.config.tie_word_embeddings == tied
    assert_same(first, second)
    first.load_state_dict(second.state_dict(), strict=True)


def test_llama_outputs_and_tokens(tmp_path):
    module = llama()
    weights = read_weights(str(saved(module, tmp_path / "hf")))
    ids = np.array([[1, 5, 9, 33, 2, 7]])
    ours = Llama(weights.config).apply({"params": nested(weights)}, ids, ids > 0, method=Llama.whole)
    with torch.no_grad():
        theirs = module(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    out = exported(through_checkpoint(weights, tmp_path / "checkpoint"), "llama", tmp_path / "out")
    again = transformers.LlamaForCausalLM.from_pretrained(out)
    answer = again.generate(torch.from_numpy(ids), max_new_tokens=20, do_sample=False, eos_token_id=None)
    said = continue_tokens(weights.config, nested(weights), ids, ids > 0, 20, ())
    np.testing.assert_array_equal(said.tokens, answer[:, ids.shape[1] :].numpy())


def test_clip_vision(tmp_path):
    first = tower()
    out = round_trip(saved(first, tmp_path / "hf"), "clip-vision", tmp_path)
    second = transformers.CLIPVisionModel.from_pretrained(out)
    assert_same(first, second)
    weights = read_weights(str(tmp_path / "hf"))
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = ClipVision(weights.config)
    states = model.apply({"params": nested(weights)}, pixels, None, (11, 12))
    with torch.no_grad():
        hidden = second(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, (hidden[11], hidden[12]), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


def test_whole_clip_gives_its_halves(tmp_path):
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 40, "max_position_embeddings": 12, "bos_token_id": 38, "eos_token_id": 39}
    config = transformers.CLIPConfig(vision_config=TOWER, text_config=text, projection_dim=16)
    whole = randomised(transformers.CLIPModel(config))
    folder = saved(whole, tmp_path / "hf")
    vision, words = read_weights(str(folder)), read_weights(str(folder), "clip-text")
    assert (vision.kind, words.kind) == ("clip-vision", "clip-text")
    expected = {name: value.numpy() for name, value in whole.state_dict().items()}
    table = next(value for name, value in expected.items() if name.endswith("vision_model.embeddings.class_embedding"))
    np.testing.assert_array_equal(np.asarray(vision.params["class_embedding"]), table)
    out = exported(through_checkpoint(words, tmp_path / "checkpoint"), "clip-text", tmp_path / "out")
    alone = transformers.CLIPTextModel.from_pretrained(out).state_dict()
    for name, value in alone.items():
        assert torch.equal(value, torch.from_numpy(expected[f"text_model.{name.removeprefix('text_model.')}"])), name


@pytest.mark.slow
def test_llava_of_transformers(tmp_path):
    first = llava()
    weights = read_weights(str(saved(first, tmp_path / "hf")))
    source = through_checkpoint(weights, tmp_path / "checkpoint")
    second = transformers.LlavaForConditionalGeneration.from_pretrained(
        exported(source, "llava-hf", tmp_path / "out", max_shard_size=50_000)
    )
    assert_same(first, second)
    language = transformers.LlamaForCausalLM.from_pretrained(exported(source, "llama", tmp_path / "llama"))
    assert torch.equal(language.lm_head.weight, first.lm_head.weight)
    patches, words = weights.config.vision.grid**2, [1, 5, 9]
    ids = np.array([[*words, *[60] * patches, 7, 8]])
    pixels = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    torch_pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = second(input_ids=torch.from_numpy(ids), pixel_values=torch_pixels).logits.numpy()
        answer = second.generate(
            input_ids=torch.from_numpy(ids),
            pixel_values=torch_pixels,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=63,
        )[0, ids.shape[1] :].numpy()
    model, params = Llava(weights.config), {"params": nested(weights)}
    apply = jax.jit(model.apply)
    row = np.where(ids == 60, IMAGE_TOKEN, ids)
    np.testing.assert_allclose(apply(params, row, row != 0, pixels), theirs, atol=2e-5)
    for token in answer:
        logits = apply(params, row, row != 0, pixels)
        assert int(logits[0, -1].argmax()) == token
        row = np.append(row, [[token]], axis=1)


def original_llava(folder, module, projector):
    """The same weights in the layout of the original code, its tower in a folder beside."""
    tensors = {}
    for name, value in module.state_dict().items():
        name = name.replace("model.language_model.", "model.")
        if name.startswith("model.multi_modal_projector."):
            name = name.replace("multi_modal_projector.linear_1", "mm_projector.0").replace(
                "multi_modal_projector.linear_2", "mm_projector.2"
            )
            name = name.replace("mm_projector.0", "mm_projector") if projector == "linear" else name
        if "vision_tower" not in name and not (projector == "linear" and "mm_projector.2" in name):
            tensors[name] = value.clone()
    folder.mkdir()
    settings = {**LLAMA, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    settings |= {"mm_vision_tower": str(folder.parent / "clip"), "mm_vision_select_layer": -2, "mm_hidden_size": 32}
    settings |= {"mm_projector_type": projector} if projector != "linear" else {}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
    vision.load_state_dict(module.model.vision_tower.state_dict())
    saved(vision, folder.parent / "clip")
    return tensors


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_original_llava(tmp_path, projector):
    tensors = original_llava(tmp_path / "original", llava(), projector)
    out = round_trip(tmp_path / "original", "llava", tmp_path)
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)
    settings = json.loads((out / "config.json").read_text())
    assert settings["mm_projector_type"] == projector and settings["mm_vision_select_layer"] == -2
    assert_same(
        transformers.CLIPVisionModel.from_pretrained(settings["mm_vision_tower"]),
        transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip"),
    )
    again = read_weights(str(out))
    assert again.config == read_weights(str(tmp_path / "original")).config
    if projector == "linear":
        with pytest.raises(WeightsError, match="has no projector 'linear'"):
            exported(through_checkpoint(again, tmp_path / "c2"), "llava-hf", tmp_path / "out2")


def released_pixellm(folder):
    """A folder as PixelLM is released: bfloat16 but for the decoder's parts, the tower in a folder of its own."""
    saved(tower(), folder.parent / "clip")
    folder.mkdir()
    settings = {**LLAMA, "architectures": ["PixelLMForCausalLM"], "model_type": "llava", "vision_tower": "../clip"}
    settings |= {"mm_hidden_size": 32, "out_dim": 256, "resize_vision_tower_size": 48, "image_feature_scale_num": 2}
    (folder / "config.json").write_text(json.dumps(settings))
    added = {"<im_start>": 58, "<im_end>": 59, **{f"[SEG{n}]": 60 + n for n in range(4)}}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    config = pixellm_config()
    generator = torch.Generator().manual_seed(1)
    float32 = ("model.text_hidden_fcs", "model.image_feature_neck", "model.prompt_encoder", "model.mask_decoder")
    shapes = {
        name: shape
        for name, shape in torch_shapes(pixellm_table(), pixellm_shapes_of(config)).items()
        if "vision_tower" not in name
    }
    tensors = {
        name: torch.randn(shape, generator=generator).to(torch.float32 if name.startswith(float32) else torch.bfloat16)
        for name, shape in shapes.items()
    }
    leftovers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    leftovers["model.visual_model.image_encoder.pos_embed"] = torch.ones(1, 4, 4, 8)
    torch.save({**tensors, **leftovers}, folder / "pytorch_model.bin")
    return tensors


def pixellm_config():
    from pixelstory_jax.interop.clip_vision_folder import clip_vision_config
    from pixelstory_jax.interop.pixellm_folder import pixellm_config as build

    settings = {**LLAMA, "mm_hidden_size": 32, "out_dim": 256, "resize_vision_tower_size": 48}
    assert clip_vision_config(TOWER).layers == 12
    return build(settings, 2, TOWER)


def pixellm_shapes_of(config):
    from pixelstory_jax.interop.pixellm_folder import pixellm_shapes

    return pixellm_shapes(config)


def test_released_pixellm(tmp_path):
    tensors = released_pixellm(tmp_path / "released")
    weights = read_weights(str(tmp_path / "released"))
    config = weights.config
    assert (config.mode, config.feature_layers, config.codebook_tokens, config.vision.canvas) == (
        "faithful",
        (11, 2),
        2,
        48,
    )
    assert config.vision.layers == 11 and not config.vision.has_final_norm
    own = np.asarray(transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip").state_dict()[POSITIONS])
    resized = resize_position_table(own, 6, faithful=True)
    np.testing.assert_array_equal(np.asarray(weights.params["vision/position_embedding"]), resized)
    out = exported(
        through_checkpoint(weights, tmp_path / "checkpoint"), "pixellm", tmp_path / "out", max_shard_size=10**6
    )
    written = {}
    for file in out.glob("model-*.safetensors"):
        written |= load_file(file)
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        assert value.dtype == written[name].dtype and torch.equal(value, written[name]), name
    settings = json.loads((out / "config.json").read_text())
    needed = {"out_dim": 256, "train_mask_decoder": True, "mm_vision_select_layer": -2, "torch_dtype": "bfloat16"}
    assert needed.items() <= settings.items()
    assert "clip" in settings["vision_tower"]  # how the original code knows a CLIP
    assert "seg_token_num" not in settings  # what is here is kept from the constructor, which then takes 1
    # The tower of the export has a last layer again, so that states -2 and -11 are the same ones.
    clip = transformers.CLIPVisionModel.from_pretrained(settings["vision_tower"])
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    hidden = clip(pixels, output_hidden_states=True).hidden_states
    states = ClipVision(config.vision).apply(
        {"params": nested(weights)["vision"]}, pixels.permute(0, 2, 3, 1).numpy(), None, config.feature_layers
    )
    for ours, theirs in zip(states, (hidden[-2], hidden[-11]), strict=True):
        np.testing.assert_allclose(np.float32(ours), theirs.detach().numpy(), atol=5e-5)
    again = read_weights(str(out))
    assert again.config == config
    for path, value in weights.params.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(again.params[path]), err_msg=path)


POSITIONS = "embeddings.position_embedding.weight"


@pytest.mark.slow
def test_learned_fusion_weights_survive_in_a_file_of_their_own(tmp_path):
    released_pixellm(tmp_path / "released")
    weights = read_weights(str(tmp_path / "released"))
    config = dataclasses.replace(weights.config, mode="paper")
    rng = np.random.default_rng(0)
    fusion = {"token_weights": (2, 2), "scale_weights": (2,)}
    from pixelstory_jax.interop.tensors import LazyArray

    values = {name: rng.random(shape).astype(np.float32) for name, shape in fusion.items()}
    extra = {name: LazyArray.whole(shape, np.float32, lambda name=name: values[name]) for name, shape in fusion.items()}
    paper = dataclasses.replace(weights, config=config, params={**weights.params, **extra})
    source = through_checkpoint(paper, tmp_path / "checkpoint")
    plan = plan_export("pixellm", source)
    assert any("learned fusion weights" in note for note in plan.notes)
    again = read_weights(str(exported(source, "pixellm", tmp_path / "out")))
    for name in fusion:
        np.testing.assert_array_equal(np.asarray(again.params[name]), np.asarray(paper.params[name]))
    (tmp_path / "out" / "pixelstory_jax.safetensors").unlink()
    with pytest.raises(WeightsError, match="lacks scale_weights, token_weights"):
        read_weights(str(tmp_path / "out"))


def test_dtypes(tmp_path):
    weights = read_weights(str(saved(llama(), tmp_path / "hf")))
    half = cast_params(weights.params, "bfloat16")
    assert {str(np.asarray(value).dtype) for value in half.values()} == {"bfloat16"}
    source = through_checkpoint(weights, tmp_path / "checkpoint")
    out = exported(source, "llama", tmp_path / "out", dtype="float16")
    written = load_file(out / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.float16}
    assert torch.equal(
        written["model.norm.weight"], load_file(tmp_path / "hf/model.safetensors")["model.norm.weight"].half()
    )
    with pytest.raises(WeightsError, match="dtype is 'int8'"):
        cast_params(weights.params, "int8")


def test_parts_fit_a_pixellm(tmp_path):
    """A tower, a language model with fewer tokens and a LLaVA become the start of a model of other sizes."""
    original_llava(tmp_path / "llava", llava(), "mlp2x_gelu")
    saved(llama(), tmp_path / "llama")
    released_pixellm_config = pixellm_config()
    model = dataclasses.replace(
        released_pixellm_config, llama=dataclasses.replace(released_pixellm_config.llama, vocab=70), mode="paper"
    )
    start = pixellm_start(f"{tmp_path / 'clip'}, {tmp_path / 'llama'}", model)
    assert start["vision/layers/mlp/up/kernel"].shape == (11, 32, 64)
    assert start["vision/position_embedding"].shape == (37, 32)
    assert "vision/final_norm/scale" not in start
    table = np.asarray(start["llama/embedding"])
    np.testing.assert_array_equal(table[:64], np.asarray(read_weights(str(tmp_path / "llama")).params["embedding"]))
    assert table.shape == (70, 32) and 0.01 < table[64:].std() < 0.03
    assert np.asarray(start["llama/head"]).shape == (32, 70)
    whole = pixellm_start(f"clip-vision:{tmp_path / 'clip'},llava:{tmp_path / 'llava'}", model)
    assert set(whole) == set(start)  # the projector has another shape and is left out
    with pytest.raises(WeightsError, match="There is no file or folder"):
        pixellm_start(str(tmp_path / "nowhere"), model)


def test_formats_are_told_apart(tmp_path):
    folder = saved(llama(), tmp_path / "hf")
    assert detect_format(folder) == "llama"
    with pytest.raises(WeightsError, match="format llama, not llava"):
        read_weights(str(folder), "llava")
    with pytest.raises(WeightsError, match="'torch' is unknown"):
        read_weights(str(folder), "torch")
    settings = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"model_type": "bert"}, "a model of type 'bert'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_type='llama3'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_size": None}, "lack hidden_size"),
        ({"head_dim": 5}, "head_dim=5"),
    ):
        (folder / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(WeightsError, match=words):
            read_weights(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match="is no folder of weights"):
        read_weights(str(folder))


def test_wrong_kinds_are_refused(tmp_path):
    source = through_checkpoint(read_weights(str(saved(llama(), tmp_path / "hf"))), tmp_path / "checkpoint")
    with pytest.raises(WeightsError, match="'llama' cannot be written as pixellm; it can be as llama"):
        plan_export("pixellm", source)
    with pytest.raises(WeightsError, match="'onnx' is unknown"):
        plan_export("onnx", source)
    assert PixelLMConfig.tiny().mode == "paper"


def test_checkpoint_of_the_original_training(tmp_path):
    """`pytorch_model.bin`: a prefix before all names, low-rank additions apart, the tower inside."""
    torch.manual_seed(0)
    released = released_pixellm(tmp_path / "released")
    raw = {f"base_model.model.{name}": value for name, value in released.items()}
    rank, width = 8, LLAMA["hidden_size"]
    key = "base_model.model.model.layers.1.self_attn.q_proj"
    raw[f"{key}.base_layer.weight"] = raw.pop(f"{key}.weight")
    down, up = torch.randn(rank, width), torch.randn(width, rank)
    raw |= {f"{key}.lora_A.default.weight": down, f"{key}.lora_B.default.weight": up}
    config = transformers.CLIPVisionConfig(
        **{**TOWER, "hidden_size": 32, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096}
        | {"image_size": 448, "patch_size": 14}
    )
    clip = randomised(transformers.CLIPVisionModel(config))
    prefix = "base_model.model.model.vision_tower.vision_tower.vision_model."
    raw |= {prefix + name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    tokens = 6 - 4  # three codebook tokens at each of two scales here, two in the folder above
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown = torch.cat([raw[f"base_model.model.{name}"], torch.zeros(tokens, width, dtype=torch.bfloat16)])
        raw[f"base_model.model.{name}"] = grown
    torch.save(raw, tmp_path / "pytorch_model.bin")
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text(json.dumps({**LLAMA, "model_type": "llava"}))
    with pytest.raises(WeightsError, match="give the folder of the LLaVA under it"):
        read_weights(str(tmp_path / "pytorch_model.bin"))
    weights = read_weights(str(tmp_path / "pytorch_model.bin"), settings=str(tmp_path / "llava"))
    assert weights.config.llama.vocab == 66 and weights.config.codebook_tokens == 3
    assert weights.params["vision/position_embedding"].shape == (1025, 32)
    merged = np.asarray(weights.params["llama/layers/attention/query/kernel"], np.float32)[1].T
    base = released["model.layers.1.self_attn.q_proj.weight"].float()
    expected = (base + 2 * up @ down).to(torch.bfloat16).float()
    np.testing.assert_allclose(merged, expected.numpy(), rtol=1e-2, atol=1e-2)


def test_layers_of_several_precisions_lose_nothing(tmp_path):
    folder = saved(llama(), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    first, second = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
    tensors[first] = tensors[first].half()
    tensors[second] = tensors[second] * 1e7
    save_file(tensors, folder / "model.safetensors")
    weights = read_weights(str(folder))
    stack = np.asarray(weights.params["layers/mlp/up/kernel"])
    assert stack.dtype == np.float32 and np.isfinite(stack).all()
    np.testing.assert_array_equal(stack[0], tensors[first].float().numpy().T)
    np.testing.assert_array_equal(stack[1], tensors[second].numpy().T)
    with pytest.raises(WeightsError, match=r"has numbers up to .*, which float16 cannot hold"):
        np.asarray(cast_params(weights.params, "float16")["layers/mlp/up/kernel"])


def test_whole_numbers_and_quantised_weights_are_refused(tmp_path):
    folder = saved(llama(), tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=f"not a floating-point tensor: {name} is int8"):
        read_weights(str(folder))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(WeightsError, match=r"hf: The weights are quantised \(gptq\)"):
        read_weights(str(folder))


def test_settings_of_released_files(tmp_path):
    """Nulls, no scaling under a name, and sections that name only what is not transformers' default."""
    settings = {**LLAMA, "attention_bias": None, "pretraining_tp": 2, "rope_scaling": {"type": "linear", "factor": 1.0}}
    assert llama_config(settings).kv_heads == 2
    for scaling in ({"rope_type": "llama3", "factor": 8.0}, {"type": "linear", "factor": 2.0}):
        with pytest.raises(WeightsError, match="scales rotary positions"):
            llama_config({**settings, "rope_scaling": scaling})
    with pytest.raises(WeightsError, match="have hidden_size='32'; whole numbers are needed"):
        llama_config({**settings, "hidden_size": "32"})
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064}
    vision = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16}
    vision |= {"num_hidden_layers": 24, "patch_size": 14}
    config = llava_config({"text_config": text, "vision_config": vision, "image_token_index": 32000})
    assert (config.llama.width, config.llama.layers, config.llama.mlp_width) == (4096, 32, 11008)
    assert config.vision == dataclasses.replace(config.vision, canvas=336, width=1024, layers=24)


def test_marks_and_ways_of_asking_come_back(tmp_path):
    """Ends of text that are named in config.json alone, and what an original LLaVA says of its prompts."""
    folder = saved(llama(), tmp_path / "hf")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "bos_token_id": 40, "eos_token_id": [41, 42]}))
    (folder / "generation_config.json").unlink()
    out = round_trip(folder, "llama", tmp_path)
    for name in ("config.json", "generation_config.json"):
        written = json.loads((out / name).read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (40, [41, 42]), name
    original_llava(tmp_path / "original", llava(), "linear")
    asked = {"mm_use_im_start_end": True, "image_aspect_ratio": "square"}
    old = json.loads((tmp_path / "original" / "config.json").read_text())
    (tmp_path / "original" / "config.json").write_text(json.dumps({**old, **asked}))
    weights = read_weights(str(tmp_path / "original"))
    source = through_checkpoint(weights, tmp_path / "llava")
    source = dataclasses.replace(source, config={**source.config, **weights.settings})
    written = json.loads((exported(source, "llava", tmp_path / "llava_out") / "config.json").read_text())
    assert asked.items() <= written.items()


def test_start_weights_that_compute_something_else(tmp_path):
    saved(llama(), tmp_path / "llama")
    saved(tower(), tmp_path / "clip")
    model = dataclasses.replace(pixellm_config(), mode="paper")
    pixellm_start(f"clip-vision: {tmp_path / 'clip'} , {tmp_path / 'llama'}", model)
    for part, changes in (
        ("llama", {"rope_theta": 1e4, "norm_eps": 1e-6}),
        ("llama", {"heads": 8, "kv_heads": 4}),
        ("vision", {"heads": 2}),
        ("vision", {"activation": "gelu"}),
    ):
        other = dataclasses.replace(model, **{part: dataclasses.replace(getattr(model, part), **changes)})
        with pytest.raises(
            WeightsError, match=f"made for another model; set --config.model.{part}.{next(iter(changes))}"
        ):
            pixellm_start(f"{tmp_path / 'clip'},{tmp_path / 'llama'}", other)
    small = dataclasses.replace(model, llama=dataclasses.replace(model.llama, vocab=63))
    with pytest.raises(WeightsError, match="has 64 tokens; set --config.model.llama.vocab to that or more"):
        pixellm_start(str(tmp_path / "llama"), small)


@pytest.mark.slow
def test_a_tower_of_another_model(tmp_path):
    released_pixellm(tmp_path / "released")
    weights = read_weights(str(tmp_path / "released"))
    out = exported(through_checkpoint(weights, tmp_path / "checkpoint"), "pixellm", tmp_path / "out")
    other = transformers.CLIPVisionConfig(**{**TOWER, "num_attention_heads": 8, "patch_size": 4})
    saved(transformers.CLIPVisionModel(other), tmp_path / "other")
    with pytest.raises(WeightsError, match="another tower than that of .*: it has patch_size 4, not 8, heads 8, not 4"):
        read_weights(str(out), vision=str(tmp_path / "other"))
