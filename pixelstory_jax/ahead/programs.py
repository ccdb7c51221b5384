"""What is compiled ahead of time: a training step, an answer, a story; with shapes in place of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from pixelstory_jax.models.consistent_attention import see_each_other
from pixelstory_jax.models.llama import LoraConfig
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig
from pixelstory_jax.models.sizes import sizes_from_config
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.objectives.flops import training_flops
from pixelstory_jax.objectives.objective import Objective
from pixelstory_jax.training import sharding
from pixelstory_jax.training.errors import ConfigError
from pixelstory_jax.training.optimizer import build_optimizer
from pixelstory_jax.training.options import TrainOptions
from pixelstory_jax.training.state import build_step, make_state, split_trained, state_shardings


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments, on a mesh.

    Attributes:
      what: in words. function, arguments: what is lowered. mesh: lies on these devices.
      parts: name -> bytes on the fullest device, of the arguments.
      model_flops: operations that the model needs, on all devices, in one run; None where they are not counted.
      unit, units: what one run makes how many of, for rates.
      replicated: (path, bytes) of arguments above `LARGE` that every device holds whole.
    """

    what: str
    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    parts: dict[str, float]
    model_flops: float | None
    unit: str
    units: int
    replicated: tuple[tuple[str, float], ...]


LARGE = 64 << 20


def training_program(config: ConfigDict, mesh: Mesh, cached: bool = False) -> Program:
    """The whole step of `experiments.train`: loss, gradients, optimizer.

    Args:
      config: as the command's. Neither its data nor its starting weights are needed: only shapes are.
      cached: stories as experiments.cache_stories leaves them, latents and text states.
    """
    objective = abstract_objective(config, cached)
    options = TrainOptions.from_config(config.train)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = build_optimizer(options, split_trained(params, objective.trainable)[0])
    seed = int(config.get("seed", 0))
    shapes = jax.eval_shape(lambda: make_state(objective, optimizer, options.ema, seed))
    shardings = state_shardings(shapes, objective.sharding_rules, mesh)
    state = jax.tree.map(_placed, shapes, shardings)
    rows = sharding.batch_sharding(mesh, options.batch_size)
    batch = {name: _placed(leaf, rows) for name, leaf in objective.batch_spec.items()}
    step = jax.jit(build_step(objective, optimizer, options, seed), donate_argnums=0, out_shardings=(shardings, None))
    parts = {"parameters": state.params, "optimizer": (state.opt_state, state.ema), "batch": batch}
    return Program(
        f"training step of {config.name} ({_trained(config)}), {options.batch_size} examples, {options.optimizer}",
        step,
        (state, batch),
        mesh,
        {name: _device_bytes(tree) for name, tree in parts.items()},
        training_flops(objective) * options.batch_size,
        "example",
        options.batch_size,
        _replicated({**flatten(state.params), **_optimizer_paths(state.opt_state)}),
    )


def _trained(config: ConfigDict) -> str:
    """What of the large network is trained: "LoRA" or "full"."""
    whole = config.trained.language_model if config.objective == "pixellm" else config.trained.unet == "full"
    return "full" if whole else "LoRA"


def answer_program(config: ConfigDict, mesh: Mesh, batch_size: int) -> Program:
    """Pictures and questions to tokens: tower, prefill and `eval.max_new_tokens` cached steps, weights in bfloat16."""
    from pixelstory_jax.inference.generate import _generate
    from pixelstory_jax.objectives.pixellm import SHARDING_RULES

    if config.objective != "pixellm":
        raise ConfigError(f"--objective=generate answers questions, which the objective {config.objective} does not")
    sizes = sizes_from_config(PixelLMConfig, config.model)
    sizes = dataclasses.replace(sizes, llama=dataclasses.replace(sizes.llama, lora=LoraConfig()))
    model, new_tokens = PixelLM(sizes), config.eval.max_new_tokens
    picture = _picture_batch(sizes, 1, config.data)
    params = _bfloat16_params(lambda: model.init(jax.random.key(0), picture)["params"], SHARDING_RULES, mesh)
    rows = sharding.batch_sharding(mesh, batch_size)
    canvas = sizes.vision.canvas
    pixels = jax.ShapeDtypeStruct((batch_size, canvas, canvas, 3), jnp.float32, sharding=rows)
    image_size = jax.ShapeDtypeStruct((batch_size, 2), jnp.int32, sharding=rows)
    tokens = jax.ShapeDtypeStruct((batch_size, 1, config.data.length), jnp.int32, sharding=rows)
    valid = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_, sharding=rows)

    def answer(params: Any, pixels: Any, image_size: Any, tokens: Any, valid: Any, rng: Any) -> Any:
        features = model.apply({"params": params}, pixels, image_size, method=PixelLM.encode_image)
        return _generate(
            model,
            params,
            features,
            tokens,
            valid,
            rng,
            jnp.float32(0),
            jnp.float32(1),
            max_new_tokens=new_tokens,
            stop_ids=(2,),
            sampled=False,
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    cache = sizes.llama.layers * 2 * sizes.llama.kv_heads * sizes.llama.head_width * 2  # bytes a token
    return Program(
        f"{batch_size} questions of {config.data.length} tokens to {config.name}, {new_tokens} new tokens each",
        jax.jit(answer),
        (params, pixels, image_size, tokens, valid, key),
        mesh,
        {
            "parameters": _device_bytes(params),
            "cache (in temporaries)": cache * (config.data.length + new_tokens) * batch_size / _ways(mesh),
        },
        None,
        "answer",
        batch_size,
        _replicated(flatten(params)),
    )


def story_program(config: ConfigDict, mesh: Mesh, panels: int) -> Program:
    """The denoising of one story whose panels all see each other, `eval.steps` steps, both halves of guidance.

    Weights are bfloat16 and whole on every chip. Text encoders and decoder are not in it.

    Args:
      mesh: as of `inference.painter.story_mesh`: halves of guidance over `data`, panels over `fsdp`.

    Raises:
      ConfigError: the panels do not divide over `fsdp`, or the halves not over `data`.
    """
    from pixelstory_jax.inference import schedulers
    from pixelstory_jax.inference.diffusion import TextStates, denoise
    from pixelstory_jax.inference.noise_schedule import NoiseSchedule
    from pixelstory_jax.inference.sharing import Draws, SharingPlan, share_steps

    if config.objective != "storydiffusion":
        raise ConfigError(f"--objective=sample draws stories, which the objective {config.objective} does not")
    if 2 % mesh.shape["data"] or panels % mesh.shape["fsdp"]:
        raise ConfigError(
            f"A story has its two halves of guidance over data and its panels over fsdp: {panels} panels do not divide "
            f"over a mesh of data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}; set --mesh or --batch"
        )
    sizes = sizes_from_config(StoryDiffusionConfig, config.model)
    sizes = dataclasses.replace(sizes, unet=dataclasses.replace(sizes.unet, lora_rank=0))
    model, steps, side = StoryDiffusion(sizes), config.eval.steps, config.data.size
    params = _bfloat16_params(lambda: model.init(jax.random.key(0))["unet"], (), mesh)
    rows, _ = schedulers.plan(
        schedulers.SamplerConfig(schedule=NoiseSchedule(**config.schedule), **config.sampler), steps
    )
    height, width = sizes.latent_size(side, side)
    grids = sizes.unet.sharing_grids(height, width)
    draws = Draws.from_seed(0, steps, sizes.unet.sharing_layers, panels, grids)
    plan = SharingPlan("joint", window=0, rate=config.eval.rate)
    sharing = share_steps(plan, draws, np.asarray(see_each_other(panels)), reading=False)

    by_panel = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = sharding.replicated(mesh)

    def of_panels(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, panels, *shape), jnp.float32, sharding=by_panel)

    context: Any = of_panels(sizes.text.length, sizes.unet.context_width)
    pooled: Any = of_panels(sizes.unet.pooled_width) if sizes.unet.pooled_width else None
    text = TextStates(context, pooled, None if pooled is None else of_panels(6))  # type: ignore[arg-type]

    def run(params: Any, noise: Any, positive: Any, negative: Any, sharing: Any) -> Any:
        return denoise(
            model.unet,
            params,
            rows,
            noise,
            positive,
            negative,
            config.eval.guidance,
            sharing,
            guide_sharing=config.eval.guide_sharing,
        ).latents

    sharing = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), sharing)
    noise = of_panels(height, width, sizes.unet.in_channels)
    return Program(
        f"story of {panels} panels of {side} x {side} pixels by {config.name}, {steps} steps, rate {config.eval.rate}",
        jax.jit(run, out_shardings=by_panel),
        (params, noise, text, text, sharing),
        mesh,
        {"parameters": _device_bytes(params)},
        None,
        "panel",
        panels,
        (),
    )


def abstract_objective(config: ConfigDict, cached: bool = False) -> Objective:
    """The objective of a config, without its data, tokenizer and weights, of which it takes the shapes alone."""
    from pixelstory_jax.objectives import build_objective

    config = config.copy_and_resolve_references().unlock()
    if config.objective == "storydiffusion":
        return _abstract_stories(config, cached)
    if cached:
        raise ConfigError("--cached is for the objective storydiffusion")
    if config.objective == "pixellm":
        config.allow_random_frozen = True
        config.data.name, config.data.folder = "builtin", ""
        config.init_from = config.init_from if config.init_from == "builtin" else ""
        if config.data.tokenizer != "small" and not Path(config.data.tokenizer).exists():
            config.data.tokenizer = "small"
    return build_objective(config)


def _abstract_stories(config: ConfigDict, cached: bool) -> Objective:
    from pixelstory_jax.inference.noise_schedule import NoiseSchedule
    from pixelstory_jax.objectives.storydiffusion import DiffusionLoss, StoryDiffusionObjective

    sizes = sizes_from_config(StoryDiffusionConfig, config.model)
    stories, panels, side = config.train.batch_size, config.data.panels, config.data.size
    encoders = {"text": sizes.text, **({"text_2": sizes.text_2} if sizes.text_2 else {})}
    if cached:
        height, width = sizes.latent_size(side, side)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "latents": ((height, width, sizes.unet.in_channels), np.float32),
            "context": ((sizes.text.length, sizes.unet.context_width), np.float32),
        }
        if sizes.unet.pooled_width:
            shapes["pooled"] = ((sizes.unet.pooled_width,), np.float32)
        empty = {name: np.zeros(shape, kind) for name, (shape, kind) in shapes.items() if name != "latents"}
    else:
        names = {"text": "tokens", "text_2": "tokens_2"}
        shapes = {names[name]: ((encoder.length,), np.int32) for name, encoder in encoders.items()}
        shapes["images"] = ((side, side, 3), np.uint8)
        empty = {name: np.zeros(encoder.length, np.int32) for name, encoder in encoders.items()}

    def evaluate(params: Any, step: int) -> Any:
        raise NotImplementedError("An objective of shapes alone cannot be evaluated.")

    return StoryDiffusionObjective(
        sizes,
        NoiseSchedule(**config.schedule),
        DiffusionLoss(**config.loss),
        {name: jax.ShapeDtypeStruct((stories, panels, *shape), kind) for name, (shape, kind) in shapes.items()},
        empty,
        side,
        config.trained.text,
        config.trained.unet,
        evaluate,
        zero_empty=config.zero_negative,
    )


def _picture_batch(sizes: PixelLMConfig, batch_size: int, data: Any) -> dict[str, jax.Array]:
    canvas, length = sizes.vision.canvas, data.length
    return {
        "image": jnp.zeros((batch_size, canvas, canvas, 3), jnp.uint8),
        "image_size": jnp.zeros((batch_size, 2), jnp.int32),
        "tokens": jnp.zeros((batch_size, 1, length), jnp.int32),
        "token_valid": jnp.zeros((batch_size, 1, length), bool),
        "target_positions": jnp.zeros((batch_size, 1, sizes.group), jnp.int32),
    }


def _bfloat16_params(init: Callable[[], Any], rules: sharding.Rules, mesh: Mesh) -> Any:
    shapes = jax.eval_shape(init)
    flat = {
        path: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.bfloat16,
            sharding=NamedSharding(mesh, sharding.partition(path, leaf.shape, rules, mesh)),
        )
        for path, leaf in flatten(shapes).items()
    }
    return unflatten(flat)


def _placed(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _device_bytes(tree: Any) -> float:
    """Bytes that one device holds of a tree of placed shapes."""
    return float(sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree)))


def _shard_bytes(leaf: Any) -> float:
    itemsize = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.dtype(leaf.dtype).itemsize
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return float(np.prod(shape, dtype=np.float64)) * itemsize


def _replicated(leaves: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    whole = [(path, _shard_bytes(leaf)) for path, leaf in leaves.items() if leaf.sharding.is_fully_replicated]
    return tuple(sorted(((path, size) for path, size in whole if size > LARGE), key=lambda pair: -pair[1]))


def _optimizer_paths(state: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {f"optimizer{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}


def _ways(mesh: Mesh) -> int:
    return int(mesh.shape["data"] * mesh.shape["fsdp"])
