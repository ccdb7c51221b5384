"""Samplers of diffusion models: DDIM, Euler and DPM-Solver++, planned on the host as factors of one linear step.

T training steps, S sampling steps, B batch; latents have any shape [B, ...]. Signal and noise are those of
`noise_schedule`, sigma is noise / signal. Grids of timesteps and sigmas are those of diffusers.

    rows, init_sigma = plan(config, steps)

    def denoise(carry, row):
        x, state = carry
        return step(row, state, x, network(scale_input(row, x), row.timestep)), None

    x = init_sigma * noise
    (x, state), _ = jax.lax.scan(denoise, (x, init(x)), rows)
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.inference.noise_schedule import Conversion, NoiseSchedule
from pixelstory_jax.models.sizes import check_choice

SPACINGS = ("leading", "linspace", "trailing")
KARRAS_RHO = 7.0
SMALLEST_ALPHA = 2.0**-24  # stands for a zero signal where sigma must stay finite
FEW_STEPS = 15  # below this, DPM-Solver++ may end with a step of first order

# What a file of diffusers calls the fields of a NoiseSchedule.
SCHEDULE_NAMES = {
    "num_train_timesteps": "train_steps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "beta_schedule": "betas",
    "prediction_type": "prediction",
    "rescale_betas_zero_snr": "zero_terminal_snr",
}
SCHEDULE_DEFAULTS = {"beta_start": 1e-4, "beta_end": 0.02, "betas": "linear"}
CLASSES = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}

# The options of each kind, with the value that diffusers takes where a file does not name them.
OPTIONS: dict[str, dict[str, Any]] = {
    "ddim": {
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "eta": 0.0,
    },
    "euler": {
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "use_karras_sigmas": False,
        "final_sigmas_type": "zero",
    },
    "dpmpp_2m": {
        "timestep_spacing": "linspace",
        "steps_offset": 0,
        "use_karras_sigmas": False,
        "use_lu_lambdas": False,
        "final_sigmas_type": "zero",
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
    },
}

# Further options of the classes in diffusers, with the only value that is implemented.
IMPLEMENTED: dict[str, dict[str, Any]] = {
    "ddim": {"trained_betas": None, "thresholding": False},
    "euler": {
        "trained_betas": None,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "sigma_min": None,
        "sigma_max": None,
    },
    "dpmpp_2m": {
        "trained_betas": None,
        "thresholding": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
}


@dataclass(frozen=True)
class SamplerConfig:
    """A sampler. The defaults are what Stable Diffusion 1.5 and SDXL ship with; names and meaning are diffusers'.

    Attributes:
      kind: "ddim" (arXiv 2010.02502), "euler" (arXiv 2206.00364, algorithm 1) or "dpmpp_2m" (arXiv 2211.01095).
      timestep_spacing: which of the T steps are used (arXiv 2305.08891, table 2): "leading", "linspace", "trailing".
      steps_offset: added to leading steps.
      clip_sample: ddim clips x0 to plus and minus `clip_sample_range`.
      set_alpha_to_one: whether ddim ends at a = 1 rather than at that of training step 0.
      eta: of ddim, 0 (no noise) to 1 (as much as the forward process).
      use_karras_sigmas: sigmas spaced as in arXiv 2206.00364, equation 5 (euler, dpmpp_2m).
      use_lu_lambdas: sigmas spaced evenly in their logarithm (dpmpp_2m).
      final_sigmas_type: "zero", or "sigma_min" for that of training step 0 (euler, dpmpp_2m).
      algorithm_type: "dpmsolver++" or "sde-dpmsolver++", which adds noise. solver_order: 1 or 2.
      solver_type: of second order, "midpoint" or "heun".
      lower_order_final, euler_at_final: end with a step of first order if there are fewer than 15; always. It always
        does where the last sigma is zero.
    """

    kind: str = "ddim"
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule.stable_diffusion)
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = False
    eta: float = 0.0
    use_karras_sigmas: bool = False
    use_lu_lambdas: bool = False
    final_sigmas_type: str = "zero"
    algorithm_type: str = "dpmsolver++"
    solver_order: int = 2
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "kind", tuple(CLASSES))
        check_choice(self, "timestep_spacing", SPACINGS)
        check_choice(self, "final_sigmas_type", ("zero", "sigma_min"))
        check_choice(self, "algorithm_type", ("dpmsolver++", "sde-dpmsolver++"))
        check_choice(self, "solver_type", ("midpoint", "heun"))
        if self.solver_order not in (1, 2):
            raise ValueError(f"solver_order is {self.solver_order}; 1 and 2 are implemented.")
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset is {self.steps_offset}; it must not be negative.")
        if not (0 <= self.eta <= 1 and self.clip_sample_range > 0):
            raise ValueError(
                f"eta {self.eta} must be in [0, 1] and clip_sample_range {self.clip_sample_range} above 0."
            )
        if self.use_karras_sigmas and self.use_lu_lambdas:
            raise ValueError("use_karras_sigmas and use_lu_lambdas exclude each other.")
        for option in fields(self):
            is_other = option.name not in ("kind", "schedule", *OPTIONS[self.kind])
            if is_other and getattr(self, option.name) != option.default:
                raise ValueError(f"{option.name} is no option of {self.kind}; leave it at {option.default!r}.")

    @classmethod
    def from_diffusers(cls, options: Mapping[str, Any], kind: str | None = None) -> SamplerConfig:
        """From the content of a `scheduler_config.json`.

        What the file does not name has the default of its class in diffusers, and what that class does not know is
        passed over, as diffusers does.

        Args:
          kind: read the file as that of another sampler, whatever its `_class_name`.

        Raises:
          ValueError: a class or a value that is not implemented.
        """
        name = options.get("_class_name")
        if kind is None:
            kind = next((kind for kind, known in CLASSES.items() if known == name), None)
            if kind is None:
                raise ValueError(
                    f"The scheduler {name or '(no _class_name)'} is not implemented; read the file with kind='ddim' "
                    f"(or another of {', '.join(CLASSES)}) to sample this checkpoint with DDIMScheduler instead."
                )
        if kind not in CLASSES:
            raise ValueError(f"kind is {kind!r}; known are {', '.join(CLASSES)}.")
        for option, implemented in IMPLEMENTED[kind].items():
            value = _plain(options.get(option, implemented))
            if value != implemented and not (value is None and implemented is False):
                raise ValueError(
                    f"{option} is {reprlib.repr(value)} in the scheduler's config; {kind} is implemented for "
                    f"{implemented!r} only."
                )
        plain = asdict(NoiseSchedule()) | SCHEDULE_DEFAULTS
        schedule = {ours: _value(options, theirs, plain[ours]) for theirs, ours in SCHEDULE_NAMES.items()}
        values = {option: _value(options, option, default) for option, default in OPTIONS[kind].items()}
        return cls(kind, NoiseSchedule(**schedule), **values)

    def to_diffusers(self) -> dict[str, Any]:
        """The content of a `scheduler_config.json`, which `from_diffusers` reads back.

        `eta` is written only where it is not zero: diffusers takes it as an argument of each step.
        """
        schedule = {theirs: getattr(self.schedule, ours) for theirs, ours in SCHEDULE_NAMES.items()}
        options = {name: getattr(self, name) for name in OPTIONS[self.kind] if name != "eta" or self.eta}
        return {"_class_name": CLASSES[self.kind], **schedule, **options}


def _plain(value: Any) -> Any:
    """A number where JSON, which knows no infinity, holds its name."""
    return float(value) if value in ("-inf", "-Infinity") else value


def _value(options: Mapping[str, Any], name: str, default: Any) -> Any:
    """The named option, of the type of its default.

    Raises:
      ValueError: it is of another type.
    """
    value = options.get(name, default)
    if isinstance(default, bool) and value is None:
        return False
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{name} is {value!r} in the scheduler's config; expected is a value like {default!r}.")
    return value


class Row(NamedTuple):
    """One step as numbers, or all of them as arrays [S], float32; see `step`.

    Attributes:
      timestep: for the network. input_scale: factor on x for the network.
      conversion: from x and the output to x0 and epsilon. clip: bound of x0, infinity for none.
      of_x, of_x0, of_epsilon, of_previous, of_noise: factors of the next x; `of_noise` is None for a sampler that
        adds none.
    """

    timestep: Any
    input_scale: Any
    conversion: Conversion
    clip: Any
    of_x: Any
    of_x0: Any
    of_epsilon: Any
    of_previous: Any
    of_noise: Any


class Plan(NamedTuple):
    """All that depends on the number of steps: `rows`, the xs of a scan over steps, and the scale of the first x."""

    rows: Row
    init_sigma: float


class SamplerState(NamedTuple):
    """What one step leaves to the next: its x0 [B, ...], float32, which also serves as a preview."""

    x0: jax.Array


def plan(config: SamplerConfig, steps: int) -> Plan:
    """The plan of a trajectory that starts from `init_sigma` times standard normal noise.

    Raises:
      ValueError: the steps do not fit into the training steps, or start where epsilon says nothing about x0.
    """
    return {"ddim": _plan_ddim, "euler": _plan_euler, "dpmpp_2m": _plan_dpmpp}[config.kind](config, steps)


def scale_input(row: Row, x: jax.Array) -> jax.Array:
    """The network's input for latents x."""
    return (row.input_scale * x).astype(x.dtype)


def init(latents: jax.Array) -> SamplerState:
    """The state before the first step."""
    return SamplerState(jnp.zeros(latents.shape, jnp.promote_types(latents.dtype, jnp.float32)))


def step(
    row: Row, state: SamplerState, x: jax.Array, model_output: jax.Array, noise: jax.Array | None = None
) -> tuple[jax.Array, SamplerState]:
    """The next latents, in the dtype of x, and the next state. Computed in float32.

    Args:
      row: of the plan. x, model_output: [B, ...].
      noise: standard normal [B, ...], for a sampler that adds noise; the others ignore it.

    Raises:
      ValueError: a sampler that adds noise gets none.
    """
    if row.of_noise is not None and noise is None:
        raise ValueError("This sampler adds noise at every step (eta above 0, or sde-dpmsolver++); pass noise.")
    exact = x.astype(state.x0.dtype)
    x0, epsilon = row.conversion(exact, model_output.astype(exact.dtype))
    x0 = jnp.clip(x0, -row.clip, row.clip)
    out = row.of_x * exact + row.of_x0 * x0 + row.of_epsilon * epsilon + row.of_previous * state.x0
    if row.of_noise is not None:
        out = out + row.of_noise * noise
    return out.astype(x.dtype), SamplerState(x0)


def guide(
    unconditional: jax.Array, conditional: jax.Array, scale: float | jax.Array, rescale: float | jax.Array = 0.0
) -> jax.Array:
    """Classifier-free guidance, float32 [B, ...]: u + scale * (c - u).

    `rescale` is the share of a version that has the standard deviation of c (arXiv 2305.08891, section 3.4).
    """
    unconditional, conditional = unconditional.astype(jnp.float32), conditional.astype(jnp.float32)
    guided = unconditional + scale * (conditional - unconditional)
    axes = tuple(range(1, guided.ndim))
    wanted, found = conditional.std(axes, keepdims=True), guided.std(axes, keepdims=True)
    ratio = jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1), 1)
    return guided * (rescale * ratio + (1 - rescale))


def _rows(steps: int, **values: Any) -> Row:
    """Factors as float32 [S]; those that are not named do nothing."""
    neutral = {"input_scale": 1, "clip": np.inf, "of_x": 0, "of_x0": 0, "of_epsilon": 0, "of_previous": 0}
    row = Row(**{**neutral, "of_noise": None, **values})
    return jax.tree.map(lambda value: np.broadcast_to(np.asarray(value, np.float32), steps), row)


def _timesteps(config: SamplerConfig, steps: int) -> np.ndarray:
    """Timesteps [S] in order of use; those of euler can be fractional."""
    total, spacing = config.schedule.train_steps, config.timestep_spacing
    # DPM-Solver++ counts the end of the trajectory as a point of the grid.
    points = steps + 1 if config.kind == "dpmpp_2m" else steps
    if steps < 1:
        raise ValueError(f"There are {steps} sampling steps; at least 1 is needed.")
    if steps > total or (spacing != "trailing" and points > total):
        raise ValueError(f"{steps} sampling steps of {config.kind} do not fit into {total} training steps.")
    if spacing == "linspace":
        even = np.linspace(0, total - 1, points)[::-1]
        grid = even if config.kind == "euler" else even.round()
    elif spacing == "leading":
        grid = np.arange(points, dtype=np.float64)[::-1] * (total // points) + config.steps_offset
    else:
        grid = np.arange(total, 0, -total / steps).round() - 1  # can have one element too many
    if grid[0] >= total:
        raise ValueError(
            f"{steps} sampling steps with steps_offset {config.steps_offset} begin at {grid[0]:.0f}, beyond the "
            f"{total} training steps; take fewer steps."
        )
    return grid[:steps].astype(np.float32)


def _plan_ddim(config: SamplerConfig, steps: int) -> Plan:
    table = config.schedule.alphas_cumprod().astype(np.float64)
    now = _timesteps(config, steps).astype(np.int64)
    after = now - config.schedule.train_steps // steps
    alpha = table[now]
    alpha_after = np.where(after >= 0, table[after], 1.0 if config.set_alpha_to_one else table[0])
    if alpha.min() == 0 and config.schedule.prediction == "epsilon":
        raise ValueError(
            f"At timestep {now[0]} of a schedule with zero terminal SNR there is no signal, so epsilon says nothing "
            "about the picture; use prediction v_prediction or sample."
        )
    # arXiv 2010.02502, equations 12 and 16
    deviation = config.eta * np.sqrt((1 - alpha_after) / (1 - alpha) * (1 - alpha / alpha_after))
    rows = _rows(
        steps,
        timestep=now,
        conversion=Conversion.of(config.schedule.prediction, np.sqrt(alpha), np.sqrt(1 - alpha)),
        clip=config.clip_sample_range if config.clip_sample else np.inf,
        of_x0=np.sqrt(alpha_after),
        of_epsilon=np.sqrt(np.maximum(1 - alpha_after - deviation**2, 0)),
        of_noise=deviation if config.eta else None,
    )
    return Plan(rows, 1.0)


def sigma_grid(config: SamplerConfig, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [S] and sigmas [S + 1], the last being the end of the trajectory, of euler and dpmpp_2m; float32."""
    schedule, is_euler = config.schedule, config.kind == "euler"
    alphas = schedule.alphas_cumprod()
    if schedule.zero_terminal_snr:
        alphas[-1] = SMALLEST_ALPHA
    table, numbers = np.sqrt((1 - alphas) / alphas), np.arange(len(alphas))
    timesteps = _timesteps(config, steps)
    sigmas = np.interp(timesteps, numbers, table)
    if config.use_karras_sigmas or config.use_lu_lambdas:
        # Euler respaces its own range, DPM-Solver++ that of all training steps.
        high, low = (float(sigmas[0]), float(sigmas[-1])) if is_euler else (float(table[-1]), float(table[0]))
        if config.use_karras_sigmas:
            roots = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
            sigmas = np.linspace(*roots, steps) ** KARRAS_RHO
        else:
            sigmas = np.exp(np.linspace(math.log(high), math.log(low), steps))
        timesteps = np.interp(np.log(sigmas), np.log(table), numbers)
        if not is_euler:
            timesteps = np.trunc(timesteps) if schedule.betas == "squaredcos_cap_v2" else timesteps.round()
    last = 0.0 if config.final_sigmas_type == "zero" else table[0]
    return timesteps.astype(np.float32), np.append(sigmas, last).astype(np.float32)


def _plan_euler(config: SamplerConfig, steps: int) -> Plan:
    """x here is x0 + sigma * epsilon; the network's input has unit variance."""
    timesteps, grid = sigma_grid(config, steps)
    sigma = grid.astype(np.float64)
    now, after = sigma[:-1], sigma[1:]
    signal = 1 / np.hypot(now, 1)
    conversion = Conversion.of(config.schedule.prediction, signal, now * signal)
    rows = _rows(
        steps,
        timestep=timesteps,
        input_scale=signal,
        conversion=conversion._replace(
            x0_of_x=conversion.x0_of_x * signal, epsilon_of_x=conversion.epsilon_of_x * signal
        ),
        of_x=1,
        of_epsilon=after - now,
    )
    largest = float(sigma.max())
    return Plan(rows, math.hypot(largest, 1) if config.timestep_spacing == "leading" else largest)


def _plan_dpmpp(config: SamplerConfig, steps: int) -> Plan:
    """arXiv 2211.01095, algorithm 2 and its appendix on the stochastic form; lambda is -log(sigma)."""
    timesteps, grid = sigma_grid(config, steps)
    sigma = grid.astype(np.float64)
    signal = 1 / np.hypot(sigma, 1)
    noise = sigma * signal
    with np.errstate(divide="ignore"):  # the last sigma may be zero; no step of second order ends there
        h = -np.diff(np.log(sigma))
    decay = sigma[1:] / sigma[:-1]  # exp(-h)
    is_stochastic = config.algorithm_type == "sde-dpmsolver++"
    power = 2 if is_stochastic else 1
    gain = signal[1:] * (1 - decay**power)
    curve = h * gain / 2 if config.solver_type == "midpoint" else h * signal[1:] - gain / power

    ends_low = config.euler_at_final or config.final_sigmas_type == "zero"
    ends_low |= config.lower_order_final and steps < FEW_STEPS
    second = np.arange(1, steps - 1 if ends_low else steps) if config.solver_order == 2 else np.arange(0)
    change = np.zeros(steps)
    change[second] = curve[second] / h[second - 1]  # factor of x0 - previous x0

    rows = _rows(
        steps,
        timestep=timesteps,
        conversion=Conversion.of(config.schedule.prediction, signal[:-1], noise[:-1]),
        of_x=noise[1:] / noise[:-1] * (decay if is_stochastic else 1),
        of_x0=gain + change,
        of_previous=-change,
        of_noise=noise[1:] * np.sqrt(1 - decay**2) if is_stochastic else None,
    )
    return Plan(rows, 1.0)
