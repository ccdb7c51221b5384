"""Data sheets by the names that devices have, and peaks of slices."""

from __future__ import annotations

import types

import jax
import pytest

from pixelstory_jax.training.chips import CHIPS, chip_count, chip_of, peak_flops


def device(kind, number, coords=None, **more):
    return types.SimpleNamespace(device_kind=kind, id=number, coords=coords, **more)


def test_a_cpu_has_no_published_peak():
    assert chip_of(jax.devices("cpu")[0]) is None and peak_flops(jax.devices("cpu")) is None
    assert peak_flops([device("NVIDIA GeForce RTX 4090", 0)]) is None


def test_two_cores_of_a_chip_are_one_chip():
    cores = [device("TPU v3", number, (number // 2, 0, 0)) for number in range(8)]
    assert chip_count(cores) == 4 and peak_flops(cores) == 4 * 123e12
    slices = [device("TPU v5 lite", n, (n % 4, 0, 0), slice_index=n // 4) for n in range(8)]
    assert chip_count(slices) == 8 and peak_flops(slices) == 8 * 197e12
    assert peak_flops([device("NVIDIA H100 80GB HBM3", n) for n in range(3)]) == 3 * 989e12


def test_every_device_kind_is_one_chip_and_its_memory_holds_what_xla_uses():
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert all(0.9 * c.hbm_bytes < c.hbm_usable_bytes < c.hbm_bytes for c in CHIPS if c.hbm_usable_bytes)


@pytest.mark.parametrize("name, kind", [("v5e:2x2", "TPU v5e"), ("v5p:2x2x1", "TPU v5p"), ("v6e:2x2", "TPU v6e")])
def test_the_names_are_those_of_the_devices_that_the_tpu_compiler_describes(name, kind):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(name, "tpu").devices
    chip = chip_of(devices[0])
    assert chip is not None and chip.name == kind and chip_count(devices) == 4
