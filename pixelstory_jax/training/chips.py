"""What a chip can do by its data sheet: the denominators of utilisation (docs/training.md) and of rooflines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
      name: what people call it. device_kinds: `jax.Device.device_kind` of the devices that it shows up as.
      flops: bf16 operations a second at most, dense; a multiplication and an addition are two.
      hbm_bytes: memory. hbm_usable_bytes: the part of it that XLA leaves to a program, None where that is a setting.
      hbm_bandwidth: bytes a second between memory and chip.
      link_bandwidth: bytes a second through one link to another chip, in one direction. links: how many there are.
    """

    name: str
    device_kinds: tuple[str, ...]
    flops: float
    hbm_bytes: float
    hbm_usable_bytes: float | None
    hbm_bandwidth: float
    link_bandwidth: float
    links: int


# TPU: cloud.google.com/tpu/docs/ v2, v3, v4, v5e, v5p, v6e and tpu7x for operations and memory (that of v5p in round
# numbers). Links: v2 and v3 from "A domain-specific supercomputer for training deep neural networks" (2020), the others
# from "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus), a tenth below what Google's pages state. Usable
# memory: what XLA's compiler reports as available when a program does not fit (libtpu 0.0.52), of all cores together.
# NVIDIA: data sheets of the SXM modules; a link of NVLink 3 or 4 carries 25 GB/s in each direction.
CHIPS = (
    Chip("TPU v2", ("TPU v2",), 45e12, 16 * GIB, 2 * 7.48 * GIB, 700e9, 6.2e10, 4),
    Chip("TPU v3", ("TPU v3",), 123e12, 32 * GIB, 2 * 15.48 * GIB, 900e9, 8.2e10, 4),
    Chip("TPU v4", ("TPU v4",), 275e12, 32 * GIB, 2 * 15.25 * GIB, 1228e9, 4.5e10, 6),
    Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 15.75 * GIB, 819e9, 4.5e10, 4),
    Chip("TPU v5p", ("TPU v5", "TPU v5p"), 459e12, 96 * GIB, 95.73 * GIB, 2765e9, 9e10, 6),
    Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 31.24 * GIB, 1640e9, 9e10, 4),
    Chip("TPU7x", ("TPU7x",), 2307e12, 192 * GIB, 2 * 94.74 * GIB, 7380e9, 9e10, 6),
    Chip("A100 40 GB", ("NVIDIA A100-SXM4-40GB",), 312e12, 40e9, None, 1555e9, 2.5e10, 12),
    Chip("A100 80 GB", ("NVIDIA A100-SXM4-80GB",), 312e12, 80e9, None, 2039e9, 2.5e10, 12),
    Chip("H100", ("NVIDIA H100 80GB HBM3",), 989e12, 80e9, None, 3350e9, 2.5e10, 18),
)


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that `device` is (a part of); None where no data sheet is known, as for a CPU."""
    return next((chip for chip in CHIPS if device.device_kind in chip.device_kinds), None)


def chip_count(devices: Sequence[jax.Device]) -> int:
    """Chips behind `devices`: a TPU v2, v3 or 7x chip, with two cores, is two devices."""
    return len({_place(device) for device in devices})


def _place(device: jax.Device) -> tuple[object, ...]:
    coords = getattr(device, "coords", None)
    return (device.id,) if coords is None else (getattr(device, "slice_index", 0), *coords)


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """bf16 operations a second of all of `devices` together; None where their chip is unknown."""
    chip = chip_of(devices[0])
    return None if chip is None else chip.flops * chip_count(devices)
