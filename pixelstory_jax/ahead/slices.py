"""Slices of chips that are not here: their devices for the compiler, their links for the bounds."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from pixelstory_jax.training.chips import Chip, chip_of
from pixelstory_jax.training.errors import ConfigError

# How the compiler calls a chip, and the dimensions of its slices.
KINDS = {"v4": ("v4", 3), "v5e": ("v5e", 2), "v5p": ("v5", 3), "v6e": ("v6e", 2)}
# What the compiler would ask the machine for, and complain about where it is no TPU host.
NOT_ON_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used that another process could hold
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
WRAPS_FROM = {"v4": 4, "v5p": 4, "v5e": 16, "v6e": 16}  # chips along a side from which its ends are connected


class Slice:
    """The devices of one slice, as the compiler sees them.

    Attributes:
      name: as given, for example "v5e:4x4". kind: what stands before the colon. sides: chips along each side.
      devices: in the compiler's order, one for each chip. chip: its data sheet.
    """

    def __init__(self, name: str) -> None:
        """Raises ConfigError: an unknown chip, sides that no slice has, or no compiler for TPUs."""
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
        if match is None or match[1] not in KINDS:
            raise ConfigError(
                f"--topology={name} names no slice; give a chip ({', '.join(KINDS)}) and its sides, as v5e:4x4"
            )
        kind, dimensions = KINDS[match[1]]
        self.name, self.kind = name, match[1]
        self.sides = tuple(int(side) for side in match[2].split("x"))
        if len(self.sides) != dimensions:
            raise ConfigError(f"--topology={name}: a slice of {match[1]} has {dimensions} sides, got {len(self.sides)}")
        options = {"chip_config_name": "megacore"} if self.kind == "v4" else {}  # its two cores as one device
        self.devices = _devices(name, f"{kind}:{match[2]}", **options)
        chip = chip_of(self.devices[0])
        if chip is None:
            raise ConfigError(f"--topology={name}: no data sheet is known of {self.devices[0].device_kind}")
        self.chip: Chip = chip

    def bandwidth(self, group: Sequence[int], ordered: Sequence[Any]) -> float:
        """Bytes a second that a device can receive when the devices `group` (numbers in `ordered`) work together.

        Two links for each side of the slice along which they lie, one where the ends of that side are not connected:
        the device at the end gets everything through one link.
        """
        places = [ordered[number].coords for number in group]
        wraps = WRAPS_FROM[self.kind]
        links = sum(
            2 if side >= wraps else 1
            for axis, side in enumerate(self.sides)
            if len({place[axis] for place in places}) > 1
        )
        return max(links, 1) * self.chip.link_bandwidth


def _devices(name: str, topology: str, **options: str) -> list[Any]:
    for setting, value in NOT_ON_A_TPU.items():
        os.environ.setdefault(setting, value)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Compiling for TPUs needs their compiler, which needs no TPU: pip install libtpu (on Linux)"
        ) from error
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--topology={name}: the compiler knows no such slice ({reason})") from error


def mesh_shape(mesh: jax.sharding.Mesh) -> dict[str, int]:
    return dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
