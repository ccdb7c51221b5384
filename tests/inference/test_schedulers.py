"""Noise schedules and samplers: numbers of diffusers, whole trajectories beside it, and what must hold for each."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.inference.noise_schedule import (
    BETAS,
    PREDICTIONS,
    NoiseSchedule,
    add_noise,
    snr,
    training_target,
    velocity,
    x0_and_epsilon,
)
from pixelstory_jax.inference.schedulers import (
    CLASSES,
    IMPLEMENTED,
    OPTIONS,
    SCHEDULE_NAMES,
    SPACINGS,
    SamplerConfig,
    guide,
    init,
    plan,
    scale_input,
    sigma_grid,
    step,
)

# diffusers copies tensors of torch in a way that numpy complains about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 6, 10, 4)  # not square
KINDS = tuple(CLASSES)
SDXL = {  # scheduler_config.json of SDXL
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(x, t):
    """A bounded function of the latents and the time, for arrays of either framework."""
    library = jnp if isinstance(x, jax.Array) else torch_or_skip()
    return 0.8 * library.tanh(x) + 0.3 * library.sin(3 * x + t / 100)


def torch_or_skip():
    return pytest.importorskip("torch")


def label(config: SamplerConfig) -> str:
    """The options in which it differs from the default of its kind."""
    options, usual = config.to_diffusers(), SamplerConfig(config.kind).to_diffusers()
    changes = [f"{name}={value}" for name, value in options.items() if usual.get(name) != value]
    return " ".join([config.kind, *changes])


def row_of(rows, number: int):
    return jax.tree.map(lambda values: values[number], rows)


@functools.cache
def their_class(kind: str):
    return getattr(pytest.importorskip("diffusers"), CLASSES[kind])


def theirs(config: SamplerConfig):
    """The scheduler of diffusers with the same options."""
    options = config.to_diffusers()
    return their_class(config.kind)(**{k: v for k, v in options.items() if k not in ("_class_name", "eta")})


@jax.jit
def our_trajectory(rows, x, noises=None):
    """x after every step [S, ...]. The same compiled function serves every sampler."""

    def one(carry, xs):
        row, noise = xs
        x, state = carry
        x, state = step(row, state, x, network(scale_input(row, x), row.timestep), noise)
        return (x, state), x

    return jax.lax.scan(one, (x, init(x)), (rows, noises))[1]


def their_trajectory(config: SamplerConfig, steps: int, noise: np.ndarray, noises=None):
    torch = torch_or_skip()
    scheduler = theirs(config)
    scheduler.set_timesteps(steps)
    if config.kind != "ddim":
        scheduler.set_begin_index(0)
    x = torch.tensor(noise) * scheduler.init_noise_sigma
    trajectory = []
    for number, t in enumerate(scheduler.timesteps):
        extra = {} if noises is None else {"variance_noise": torch.tensor(noises[number])}
        extra |= {"eta": config.eta} if config.kind == "ddim" else {}
        output = network(scheduler.scale_model_input(x, t), torch.tensor(float(t)))
        x = scheduler.step(output, t, x, return_dict=False, **extra)[0]
        trajectory.append(x.numpy())
    return scheduler, np.stack(trajectory)


def assert_same_trajectory(config: SamplerConfig, steps: int, with_noise: bool = False) -> None:
    """Every step to 1e-5 of the largest latent so far: rounding of a large start stays in what follows."""
    noise = normal(0)
    noises = normal(1, (steps, *SHAPE)) if with_noise else None
    scheduler, expected = their_trajectory(config, steps, noise, noises)
    rows, init_sigma = plan(config, steps)
    tolerance = 1e-5 if config.schedule.zero_terminal_snr else 1e-6  # see `test_rescaled_tables`
    np.testing.assert_allclose(rows.timestep, scheduler.timesteps.numpy(), rtol=tolerance, atol=1e-6)
    np.testing.assert_allclose(init_sigma, float(scheduler.init_noise_sigma), rtol=tolerance)
    if config.kind != "ddim":
        np.testing.assert_allclose(sigma_grid(config, steps)[1], scheduler.sigmas.numpy(), rtol=tolerance)
    found = np.asarray(our_trajectory(rows, jnp.asarray(noise * np.float32(init_sigma)), noises))
    sizes = np.abs(np.concatenate([noise[None] * init_sigma, expected])).max((1, 2, 3, 4))
    errors = np.abs(found - expected).max((1, 2, 3, 4)) / np.maximum.accumulate(sizes)[1:]
    assert errors.max() <= 1e-5, f"step {errors.argmax()} of {steps}: {errors.max():.1e}"


# Noise schedules


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("train_steps", [1000, 37])
def test_tables_equal_those_of_diffusers(betas, train_steps):
    schedule = NoiseSchedule(train_steps, betas=betas)
    table = schedule.alphas_cumprod()
    assert table.dtype == np.float32
    expected = theirs(SamplerConfig(schedule=schedule)).alphas_cumprod.numpy()
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("train_steps", [1000, 37])
def test_rescaled_tables(betas, train_steps):
    """To 1e-6 of the signal: torch's roots with MKL are not always the nearest float32, which the rest magnifies."""
    schedule = NoiseSchedule(train_steps, betas=betas, zero_terminal_snr=True)
    expected = theirs(SamplerConfig(schedule=schedule)).alphas_cumprod.numpy()
    table = schedule.alphas_cumprod()
    np.testing.assert_allclose(np.sqrt(table), np.sqrt(expected), atol=1e-6)
    assert table[-1] == expected[-1] == 0


def test_published_numbers():
    table = NoiseSchedule.stable_diffusion().alphas_cumprod()
    np.testing.assert_allclose(table[[0, 1, 981, 999]], [0.99915, 0.9982960, 0.0057755, 0.0046601], atol=5e-8)
    sigma = np.sqrt((1 - table) / table)
    np.testing.assert_allclose(sigma[[999, 981, 0]], [14.614641, 13.120411, 0.0291672], rtol=1e-6, atol=1e-6)
    linear = NoiseSchedule(betas="linear").alphas_cumprod()
    np.testing.assert_allclose(linear[999], 0.0015790, atol=5e-8)
    rescaled = NoiseSchedule(zero_terminal_snr=True).alphas_cumprod()
    assert rescaled[-1] == 0
    np.testing.assert_allclose(rescaled[0], table[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "first", "second", "last"), [(50, 981, 961, 1), (35, 953, 925, 1), (25, 961, 921, 1)]
)
def test_published_timesteps(steps, first, second, last):
    for kind in ("ddim", "euler"):
        timesteps = plan(SamplerConfig(kind), steps).rows.timestep
        assert len(timesteps) == steps
        assert (timesteps[0], timesteps[1], timesteps[-1]) == (first, second, last)
    grid = np.arange(steps + 1)[::-1][:-1] * (1000 // (steps + 1)) + 1
    np.testing.assert_array_equal(plan(SamplerConfig("dpmpp_2m"), steps).rows.timestep, grid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_steps": 1}, "train_steps is 1"),
        ({"beta_start": 0.1}, "must rise between 0 and 1"),
        ({"betas": "cosine"}, "known are scaled_linear"),
        ({"prediction": "noise"}, "known are epsilon"),
    ],
)
def test_schedules_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**changes)


def test_noising_and_velocity():
    torch = torch_or_skip()
    scheduler = theirs(SamplerConfig())
    table = NoiseSchedule().alphas_cumprod()
    x0, noise, t = normal(0), normal(1), np.array([13, 870])
    arguments = torch.tensor(x0), torch.tensor(noise), torch.tensor(t)
    np.testing.assert_allclose(add_noise(table, x0, noise, t), scheduler.add_noise(*arguments), atol=1e-6)
    np.testing.assert_allclose(velocity(table, x0, noise, t), scheduler.get_velocity(*arguments), atol=1e-6)
    np.testing.assert_allclose(snr(table, t), table[t] / (1 - table[t]), rtol=1e-6)


def test_a_step_per_row_or_per_panel():
    table = NoiseSchedule().alphas_cumprod()
    x0, noise = normal(0, (2, 3, 4, 5, 4)), normal(1, (2, 3, 4, 5, 4))
    per_row, per_panel = np.array([5, 900]), np.array([[5, 10, 400], [900, 1, 999]])
    noisy = jax.jit(functools.partial(add_noise, table))
    rows, panels = noisy(x0, noise, per_row), noisy(x0, noise, per_panel)
    for story, panel in itertools.product(range(2), range(3)):
        one = x0[story, panel][None], noise[story, panel][None]
        np.testing.assert_allclose(rows[story, panel], noisy(*one, per_row[story, None])[0], atol=1e-6)
        np.testing.assert_allclose(panels[story, panel], noisy(*one, per_panel[story, panel, None])[0], atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_outputs_say_what_was_mixed(prediction):
    """Both parts come back from the perfect output; of a weak part float32 keeps only what the mixture holds."""
    table = NoiseSchedule().alphas_cumprod()
    x0, noise, t = normal(0), normal(1), np.array([80, 700])
    output = training_target(prediction, table, x0, noise, t)
    found = x0_and_epsilon(prediction, table, add_noise(table, x0, noise, t), output, t)
    np.testing.assert_allclose(found[0], x0, atol=5e-6)
    np.testing.assert_allclose(found[1], noise, atol=5e-6)


# Trajectories beside diffusers

CASES = [
    (kind, spacing, prediction, karras, rescaled)
    for kind, spacing, prediction, karras, rescaled in itertools.product(
        KINDS, SPACINGS, PREDICTIONS, (False, True), (False, True)
    )
    if not (kind == "ddim" and karras)
]


@pytest.mark.parametrize(("kind", "spacing", "prediction", "karras", "rescaled"), CASES)
def test_trajectories(kind, spacing, prediction, karras, rescaled):
    schedule = NoiseSchedule(prediction=prediction, zero_terminal_snr=rescaled)
    config = SamplerConfig(kind, schedule, spacing, use_karras_sigmas=karras)
    for steps in (1, 2, 7, 16, 50):
        if kind == "ddim" and rescaled and prediction == "epsilon" and plan_reaches_the_end(config, steps):
            with pytest.raises(ValueError, match="use prediction v_prediction or sample"):
                plan(config, steps)
        else:
            assert_same_trajectory(config, steps)


def plan_reaches_the_end(config: SamplerConfig, steps: int) -> bool:
    scheduler = theirs(config)
    scheduler.set_timesteps(steps)
    return int(scheduler.timesteps[0]) == config.schedule.train_steps - 1


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig("ddim", clip_sample=True, clip_sample_range=0.7, set_alpha_to_one=True, steps_offset=0),
        SamplerConfig("ddim", NoiseSchedule(betas="squaredcos_cap_v2"), "trailing"),
        SamplerConfig("ddim", NoiseSchedule(train_steps=200, betas="linear"), "linspace"),
        SamplerConfig("euler", final_sigmas_type="sigma_min"),
        SamplerConfig("euler", NoiseSchedule(betas="squaredcos_cap_v2"), use_karras_sigmas=True),
        SamplerConfig("euler", NoiseSchedule(train_steps=200, betas="linear"), "trailing"),
        SamplerConfig("dpmpp_2m", solver_order=1),
        SamplerConfig("dpmpp_2m", solver_type="heun"),
        SamplerConfig("dpmpp_2m", solver_type="heun", use_karras_sigmas=True),
        SamplerConfig("dpmpp_2m", solver_type="heun", final_sigmas_type="sigma_min"),
        SamplerConfig("dpmpp_2m", use_karras_sigmas=True, final_sigmas_type="sigma_min"),
        SamplerConfig("dpmpp_2m", final_sigmas_type="sigma_min"),
        SamplerConfig("dpmpp_2m", final_sigmas_type="sigma_min", lower_order_final=False),
        SamplerConfig("dpmpp_2m", final_sigmas_type="sigma_min", euler_at_final=True),
        SamplerConfig("dpmpp_2m", use_lu_lambdas=True),
        SamplerConfig("dpmpp_2m", NoiseSchedule(betas="squaredcos_cap_v2"), use_karras_sigmas=True),
        SamplerConfig("dpmpp_2m", NoiseSchedule(train_steps=200, betas="linear"), "linspace", steps_offset=0),
    ],
    ids=label,
)
def test_options(config):
    for steps in (7, 16):
        assert_same_trajectory(config, steps)


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig("ddim", eta=0.4),
        SamplerConfig("ddim", NoiseSchedule(prediction="v_prediction", zero_terminal_snr=True), "trailing", eta=0.7),
        SamplerConfig("dpmpp_2m", algorithm_type="sde-dpmsolver++"),
        SamplerConfig("dpmpp_2m", algorithm_type="sde-dpmsolver++", solver_type="heun", use_karras_sigmas=True),
    ],
    ids=label,
)
def test_samplers_that_add_noise(config):
    for steps in (7, 16):
        assert_same_trajectory(config, steps, with_noise=True)
    rows, x = plan(config, 7).rows, jnp.zeros(SHAPE)
    row = row_of(rows, 0)
    with pytest.raises(ValueError, match="pass noise"):
        step(row, init(x), x, x)


# What must hold for each


STRAIGHT = [  # steps of ddim whose end is where the next one begins
    (kind, spacing) for kind, spacing in itertools.product(KINDS, SPACINGS) if (kind, spacing) != ("ddim", "linspace")
]


@pytest.mark.parametrize(("kind", "spacing"), STRAIGHT)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_gives_the_clean_latents(kind, spacing, prediction):
    """Outputs that are the training target at each step (the exact noise, for epsilon) lead to x0."""
    schedule = NoiseSchedule(prediction=prediction)
    config = SamplerConfig(kind, schedule, spacing, set_alpha_to_one=kind == "ddim")
    rows, _ = plan(config, 10)
    if kind == "ddim":
        alphas = schedule.alphas_cumprod()[rows.timestep.astype(int)]
    else:  # steps between the training steps have noise levels of their own
        alphas = 1 / (1 + sigma_grid(config, 10)[1][:-1] ** 2)
    x0, noise = normal(0), normal(1)
    x = add_noise(alphas, x0, noise, np.zeros(2, int)) / rows.input_scale[0]
    state = init(x)
    for number in range(10):
        row, level = row_of(rows, number), np.full(2, number)
        np.testing.assert_allclose(scale_input(row, x), add_noise(alphas, x0, noise, level), atol=2e-5)
        x, state = step(row, state, x, training_target(prediction, alphas, x0, noise, level))
        np.testing.assert_allclose(state.x0, x0, atol=1e-4)  # what float32 keeps of x0 where noise is 14 times as large
    np.testing.assert_allclose(x, x0, atol=2e-5)


def test_full_noise_and_no_last_move_are_finite():
    """Here diffusers takes the root of a negative rounding error, or divides zero by zero."""
    v_prediction = NoiseSchedule(prediction="v_prediction", zero_terminal_snr=True)
    rows, _ = plan(SamplerConfig("ddim", v_prediction, "trailing", eta=1.0), 16)
    assert all(np.isfinite(values).all() for values in (*rows.conversion, rows.of_x0, rows.of_epsilon, rows.of_noise))
    assert rows.of_epsilon[0] < 1e-6 and rows.of_x0[0] ** 2 + rows.of_noise[0] ** 2 == pytest.approx(1)
    config = SamplerConfig("dpmpp_2m", solver_type="heun", use_karras_sigmas=True, final_sigmas_type="sigma_min")
    last = row_of(plan(config, 16).rows, 15)
    assert (last.of_x, last.of_x0, last.of_previous) == pytest.approx((1, 0, 0), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scan_equals_a_loop(kind):
    rows, init_sigma = plan(SamplerConfig(kind), 12)
    x = jnp.asarray(normal(0) * np.float32(init_sigma))
    scanned = our_trajectory(rows, x)
    state = init(x)
    for number, expected in enumerate(scanned):
        row = row_of(rows, number)
        x, state = step(row, state, x, network(scale_input(row, x), row.timestep))
        np.testing.assert_allclose(x, expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_latents_keep_their_dtype(kind, dtype):
    rows, _ = plan(SamplerConfig(kind), 3)
    x = jnp.asarray(normal(0), dtype)
    row = row_of(rows, 0)
    assert scale_input(row, x).dtype == dtype
    for output_dtype in (jnp.bfloat16, jnp.float32):
        after, state = step(row, init(x), x, x.astype(output_dtype))
        assert (after.dtype, state.x0.dtype) == (dtype, jnp.float32)
    assert our_trajectory(rows, x).dtype == dtype


def test_the_preview_is_clipped():
    rows, _ = plan(SamplerConfig(clip_sample=True, clip_sample_range=0.5), 3)
    row = row_of(rows, 0)
    _, state = step(row, init(normal(0)), jnp.asarray(normal(0)), jnp.asarray(normal(1)))
    assert float(jnp.abs(state.x0).max()) == 0.5


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_steps(kind, spacing):
    """Timesteps fall, stay in the schedule, and are as many as asked for (diffusers has 62 for 61 trailing ones)."""
    config = SamplerConfig(kind, timestep_spacing=spacing, steps_offset=0)
    for steps in (*range(1, 64), 103, 499, 999):
        timesteps = plan(config, steps).rows.timestep
        assert timesteps.shape == (steps,)
        assert timesteps[0] < 1000 and timesteps[-1] >= 0
        assert (np.diff(timesteps) < 0).all()


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        (SamplerConfig(), 0, "at least 1 is needed"),
        (SamplerConfig(), 1001, "do not fit into 1000"),
        (SamplerConfig("dpmpp_2m"), 1000, "do not fit into 1000"),
        (SamplerConfig(), 1000, "begin at 1000, beyond"),
        (SamplerConfig("euler", timestep_spacing="trailing"), 1001, "do not fit into 1000"),
    ],
)
def test_steps_that_do_not_fit(config, steps, message):
    with pytest.raises(ValueError, match=message):
        plan(config, steps)


# Files of diffusers


@pytest.mark.parametrize(
    "config",
    [
        *(SamplerConfig(kind) for kind in KINDS),
        SamplerConfig("ddim", NoiseSchedule(500, 0.001, 0.02, "linear", "v_prediction", True), "trailing", eta=0.5),
        SamplerConfig("ddim", clip_sample=True, clip_sample_range=2.0, set_alpha_to_one=True, steps_offset=0),
        SamplerConfig("euler", use_karras_sigmas=True, final_sigmas_type="sigma_min"),
        SamplerConfig("dpmpp_2m", use_lu_lambdas=True, solver_order=1, solver_type="heun", lower_order_final=False),
    ],
    ids=label,
)
def test_there_and_back(config):
    assert SamplerConfig.from_diffusers(config.to_diffusers()) == config


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig("ddim", NoiseSchedule(500, 0.001, 0.02, "linear", "v_prediction", True), "trailing"),
        SamplerConfig("ddim", clip_sample=True, clip_sample_range=2.0, set_alpha_to_one=True, steps_offset=0),
        SamplerConfig("euler", use_karras_sigmas=True, final_sigmas_type="sigma_min"),
        SamplerConfig("dpmpp_2m", algorithm_type="sde-dpmsolver++", timestep_spacing="trailing"),
        SamplerConfig("dpmpp_2m", use_lu_lambdas=True, solver_order=1, solver_type="heun", lower_order_final=False),
    ],
    ids=label,
)
def test_files_through_diffusers(config, tmp_path):
    """Its class knows every option of a file of ours, and writes a file that reads as the same sampler."""
    options = config.to_diffusers()
    (tmp_path / "scheduler_config.json").write_text(json.dumps(options))
    theirs, unused = their_class(config.kind).from_pretrained(tmp_path, return_unused_kwargs=True)
    del options["_class_name"]
    assert unused.keys() <= {"_class_name"}
    assert {name: theirs.config[name] for name in options} == options
    theirs.save_pretrained(tmp_path)
    assert SamplerConfig.from_diffusers(json.loads((tmp_path / "scheduler_config.json").read_text())) == config


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_diffusers(kind):
    """A file that diffusers wrote reads as the config that made it, and no option of the class is overlooked."""
    config = SamplerConfig(kind, timestep_spacing="trailing")
    assert SamplerConfig.from_diffusers(dict(theirs(config).config), kind) == config
    assert SamplerConfig.from_diffusers({"_class_name": CLASSES[kind]}) == SamplerConfig.from_diffusers(
        dict(their_class(kind)().config), kind
    )
    ours = {*SCHEDULE_NAMES, *OPTIONS[kind], *IMPLEMENTED[kind]} - {"eta"}
    without_effect = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}
    known = inspect.signature(their_class(kind).__init__).parameters.keys() - {"self"}
    assert ours - known == set()
    assert known - ours <= without_effect


def test_released_files():
    assert SamplerConfig.from_diffusers(SDXL) == SamplerConfig("euler")
    assert SamplerConfig.from_diffusers(SDXL, kind="ddim") == SamplerConfig("ddim")
    assert SamplerConfig.from_diffusers(SDXL, kind="dpmpp_2m") == SamplerConfig("dpmpp_2m")
    pndm = {**SDXL, "_class_name": "PNDMScheduler"}  # as Stable Diffusion 1.5 ships with
    with pytest.raises(ValueError, match="PNDMScheduler is not implemented; read the file with kind='ddim'"):
        SamplerConfig.from_diffusers(pndm)
    assert SamplerConfig.from_diffusers(pndm, kind="ddim") == SamplerConfig("ddim")
    animatediff = {**SDXL, "beta_schedule": "linear", "timestep_spacing": "linspace"}
    assert SamplerConfig.from_diffusers(animatediff, "ddim") == SamplerConfig(
        "ddim", NoiseSchedule(betas="linear"), "linspace"
    )


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("ddim", {"thresholding": True}, "thresholding is True"),
        ("ddim", {"trained_betas": [0.1] * 1000}, "trained_betas is"),
        ("ddim", {"steps_offset": "1"}, "steps_offset is '1'"),
        ("ddim", {"prediction_type": "flow"}, "prediction is 'flow'; known are"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type is 'log_linear'"),
        ("euler", {"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ("euler", {"sigma_min": 0.002}, "sigma_min is 0.002"),
        ("euler", {"use_beta_sigmas": True}, "use_beta_sigmas is True"),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver"}, "known are dpmsolver"),
        ("dpmpp_2m", {"solver_order": 3}, "solver_order is 3"),
        ("dpmpp_2m", {"lambda_min_clipped": -5.1}, "lambda_min_clipped is -5.1"),
        ("dpmpp_2m", {"use_lu_lambdas": True, "use_karras_sigmas": True}, "exclude each other"),
    ],
)
def test_options_that_are_not_implemented(kind, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        SamplerConfig.from_diffusers({**SDXL, "_class_name": CLASSES[kind], **changes})
    assert len(str(caught.value)) < 200


def test_kinds_that_are_not_known():
    with pytest.raises(ValueError, match="kind is 'lcm'; known are ddim"):
        SamplerConfig.from_diffusers(SDXL, kind="lcm")
    with pytest.raises(ValueError, match="no _class_name"):
        SamplerConfig.from_diffusers({})


def test_options_of_other_kinds():
    with pytest.raises(ValueError, match="use_karras_sigmas is no option of ddim; leave it at False"):
        SamplerConfig("ddim", use_karras_sigmas=True)
    with pytest.raises(ValueError, match="eta is no option of euler"):
        dataclasses.replace(SamplerConfig("euler"), eta=0.5)
    absent = {"_class_name": CLASSES["euler"], "use_karras_sigmas": None, "use_beta_sigmas": None}
    assert not SamplerConfig.from_diffusers(absent).use_karras_sigmas
    written = {"_class_name": CLASSES["dpmpp_2m"], "lambda_min_clipped": "-inf"}
    assert SamplerConfig.from_diffusers(written).kind == "dpmpp_2m"


# Guidance


def test_guidance():
    unconditional, conditional = normal(0), normal(1)
    plain = unconditional + 5 * (conditional - unconditional)
    np.testing.assert_allclose(guide(unconditional, conditional, 5.0), plain, atol=1e-5)
    wanted, found = (x.std((1, 2, 3), ddof=1, keepdims=True) for x in (conditional, plain))
    rescaled = plain * wanted / found
    partly = jax.jit(guide)(unconditional, conditional, 5.0, 0.7)
    np.testing.assert_allclose(partly, 0.7 * rescaled + 0.3 * plain, atol=1e-5)


def test_guidance_of_nothing():
    """Constant outputs have no deviation to rescale by."""
    ones = jnp.ones(SHAPE, jnp.bfloat16)
    guided = guide(ones, ones, 5.0, 0.7)
    assert guided.dtype == jnp.float32
    np.testing.assert_array_equal(guided, np.ones(SHAPE))


def test_bfloat16_halves_are_guided_in_float32():
    unconditional, conditional = (jnp.asarray(normal(seed), jnp.bfloat16) for seed in (0, 1))
    exact = guide(unconditional.astype(jnp.float32), conditional.astype(jnp.float32), 7.5, 0.5)
    np.testing.assert_array_equal(guide(unconditional, conditional, 7.5, 0.5), exact)
