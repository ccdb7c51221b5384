"""Reads what a compiled program does on one device: products, memory traffic and collectives, loops counted in full.

XLA's own cost analysis counts the body of a loop once, and says nothing of collectives. Its text says both, with the
number of times that a loop runs in the condition of the loop.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "token": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
HBM = 0  # memory space; on-chip memories have higher numbers
# Instructions that move nothing: they rename, or what they call is counted itself.
FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota")
    + ("after-all", "partition-id")
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction: element type, shape, memory space."""

    kind: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        bits = BITS.get(self.kind) or int((re.search(r"\d+", self.kind) or ["8"])[0])
        return math.prod(self.shape) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `arrays` of its result, `operands` by name, the rest of the line as `attributes`."""

    name: str
    operation: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, *roles: str) -> list[str]:
        """Names of the computations that it calls as `calls`, `body`, `condition`, ..."""
        found = re.findall(r"(\w+)=\{?((?:%[\w.\-]+(?:, )?)+)\}?", self.attributes)
        return [name[1:] for role, names in found if role in roles for name in names.split(", ") if name]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind along some axes of the mesh, as one device sees it in one run of the program.

    operation: of `COLLECTIVES`. axes: mesh axes, joined by "+". shape: the largest array, as text. count: times run.
    bytes: of the whole (gathered, reduced or sent) array, over all times. traffic: bytes that a device receives.
    physical: one group of devices, by number. source: where the program asks for it.
    """

    operation: str
    axes: str
    shape: str
    count: float
    bytes: float
    traffic: float
    group: tuple[int, ...]
    source: str


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one device in one run. flops: products and convolutions. hbm_bytes: read from and written to memory."""

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]


def costs(text: str, mesh_shape: dict[str, int]) -> Costs:
    """The costs of a compiled program, from its text (`compiled.as_text()`) and the mesh that it was compiled for."""
    program = _Program(text)
    return Costs(program.flops(), program.hbm_bytes(), tuple(program.collectives(mesh_shape)))


class _Program:
    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
            if header:
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif re.match(r"\s+(ROOT )?%[\w.\-]+ = ", line):
                current.append(_instruction(line))
        self.times: dict[str, float] = collections.defaultdict(float)  # of computations, fused ones too
        self.fused: set[str] = set()
        self._visit(self.entry, 1.0)

    def _visit(self, name: str, times: float) -> None:
        self.times[name] += times
        for instruction in self.computations[name]:
            if instruction.operation == "while":
                body, condition = instruction.called("body"), instruction.called("condition")
                self._visit(body[0], times * self.trips(condition[0]))
                continue
            for called in instruction.called("calls", "to_apply", "branch_computations", "called_computations"):
                if instruction.operation not in ("call", "conditional"):
                    self.fused.add(called)
                self._visit(called, times)

    def trips(self, condition: str) -> int:
        """How often a loop runs: the bound that its condition compares the counter with."""
        bounds = [
            int(match[1])
            for instruction in self._with_fused(condition)
            if instruction.operation == "constant" and instruction.arrays[0].kind in ("s32", "u32", "s64")
            for match in [re.match(r"\((\d+)\)", instruction.attributes)]
            if match
        ]
        return max(bounds, default=1)

    def _with_fused(self, name: str) -> Iterator[Instruction]:
        for instruction in self.computations[name]:
            yield instruction
            for called in instruction.called("calls"):
                yield from self._with_fused(called)

    def flops(self) -> float:
        total = 0.0
        for name, times in self.times.items():
            arrays = {one.name: one.arrays for one in self.computations[name]}
            for one in self.computations[name]:
                if one.operation in ("dot", "convolution"):
                    total += times * _product_flops(one, arrays[one.operands[0]][0], arrays[one.operands[1]][0])
                elif one.operation == "custom-call":
                    total += times * _kernel_flops(one)
        return total

    def hbm_bytes(self) -> float:
        """Reads and writes of memory. A kernel's operands count once, however often it reads them."""
        total = 0.0
        for name, times in self.times.items():
            if name in self.fused:
                continue
            arrays = {one.name: one.arrays for one in self.computations[name]}
            total += times * sum(self._traffic(one, arrays) for one in self.computations[name])
        return total

    def _traffic(self, one: Instruction, arrays: dict[str, tuple[Array, ...]]) -> float:
        if one.operation in FREE or one.operation.endswith("-done"):
            return 0.0
        reads = [sum(a.bytes for a in arrays.get(operand, ()) if a.space == HBM) for operand in one.operands]
        writes = sum(a.bytes for a in one.arrays if a.space == HBM)
        if one.operation.endswith("-start"):  # (operand, result, ...): the operand's place is not written
            moved = max((a.bytes for a in one.arrays[1:2]), default=0.0)
            in_memory = sum(a.space == HBM for a in one.arrays[:2])
            return moved * in_memory
        if one.operation == "fusion":
            return self._fusion_traffic(one, reads)
        if one.operation in ("dynamic-slice", "slice", "gather"):
            return writes + min(reads[0], sum(a.bytes for a in one.arrays))
        if one.operation == "dynamic-update-slice":
            return 2 * reads[1]
        return sum(reads) + writes

    def _fusion_traffic(self, one: Instruction, reads: list[float]) -> float:
        """Parameters that are only cut into count as their pieces; a result that is written in place, as its update.

        A collective that runs beside the fusion's own work passes its arrays through; they count where it starts.
        """
        inner = self.computations[one.called("calls")[0]]
        by_name = {instruction.name: instruction for instruction in inner}
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in inner:
            for operand in instruction.operands:
                users[operand].append(instruction)
        starts = any("AsyncCollectiveStart" in instruction.attributes for instruction in inner)

        def read(name: str) -> float:
            """Bytes of the parameter or alias of it that are read; infinite for all of them."""
            total = 0.0
            for user in users[name]:
                if user.operation == "bitcast":
                    total += read(user.name)
                elif user.operation in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                    total += user.arrays[0].bytes
                elif user.operation == "dynamic-update-slice" and user.operands[0] == name:
                    continue
                elif user.operation == "tuple" or _carries(user):
                    total += math.inf if starts and user.operation in COLLECTIVES else 0.0
                else:
                    return math.inf
            return total

        def written(array: Array, result: Instruction) -> float:
            while result.operation == "bitcast":
                result = by_name[result.operands[0]]
            if result.operation == "parameter" or (
                _carries(result) and not (starts and result.operation in COLLECTIVES)
            ):
                return 0.0
            if result.operation == "dynamic-update-slice":
                return by_name[result.operands[1]].arrays[0].bytes
            return array.bytes

        parameters = {_number(instruction): instruction.name for instruction in inner if _number(instruction) >= 0}
        root = next(instruction for instruction in inner if instruction.is_root)
        results = [by_name[name] for name in root.operands] if root.operation == "tuple" else [root]
        if _carries(root) and starts:  # its results begin with the operand and the result of the collective
            results = [by_name[parameters[0]], by_name[root.operands[0]]]
        return sum(min(size, read(parameters[place])) for place, size in enumerate(reads)) + sum(
            written(array, result) for array, result in zip(one.arrays, results, strict=False) if array.space == HBM
        )

    def collectives(self, mesh_shape: dict[str, int]) -> list[Collective]:
        """One entry per channel.

        A collective that runs beside other work is written once more in every fusion that it overlaps with, which may
        lie in another loop; only where it is started counts.
        """
        found: dict[str, list[Collective]] = collections.defaultdict(list)
        started: dict[str, list[Collective]] = collections.defaultdict(list)
        devices = math.prod(mesh_shape.values())
        for name, times in self.times.items():
            starts = any("AsyncCollectiveStart" in one.attributes for one in self.computations[name])
            for one in self.computations[name]:
                operation = one.operation.removesuffix("-start")
                if operation not in COLLECTIVES:
                    continue
                if operation == "all-reduce" and name.startswith("all-reduce-scatter"):
                    operation = "reduce-scatter"  # how a TPU's compiler writes it: a sum, then a cut, in one fusion
                groups = _groups(one.attributes, devices)
                channel = re.search(r"channel_id=(\d+)", one.attributes)
                key = channel[1] if channel else one.name
                collective = _collective(operation, one, times, groups, mesh_shape)
                found[key].append(collective)
                if starts:
                    started[key].append(collective)
        each = [_sum(started.get(key, entries)) for key, entries in found.items()]
        return sorted((one for one in each if one.traffic > 0), key=lambda one: -one.traffic)


def _sum(entries: list[Collective]) -> Collective:
    def total(field: str) -> float:
        return sum(getattr(entry, field) for entry in entries)

    return dataclasses.replace(entries[0], count=total("count"), bytes=total("bytes"), traffic=total("traffic"))


def _carries(one: Instruction) -> bool:
    """Whether it is a collective, or what starts or ends one that runs beside other work."""
    return one.operation.removesuffix("-start") in COLLECTIVES or "AsyncCollective" in one.attributes


def _number(one: Instruction) -> int:
    """Of a parameter; -1 for anything else."""
    match = re.match(r"\((\d+)\)", one.attributes) if one.operation == "parameter" else None
    return int(match[1]) if match else -1


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    is_root = left.startswith("ROOT ")
    end = _end_of_type(right)
    operation, _, rest = right[end:].strip().partition("(")
    inside, attributes = _split_operands(rest)
    operands = tuple(name[1:] for name in re.findall(r"%[\w.\-]+", inside))
    arrays = tuple(
        Array(
            kind,
            tuple(int(size) for size in shape.split(",") if size),
            int((re.search(r"S\((\d+)\)", layout) or "00")[1]),
        )
        for kind, shape, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", right[:end])
    )
    if operation in ("constant", "parameter"):
        attributes = f"({inside}){attributes}"
    return Instruction(left.removeprefix("ROOT ").lstrip("%"), operation, arrays, operands, attributes, is_root)


def _end_of_type(text: str) -> int:
    if not text.startswith("("):
        return text.index(" ")
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position + 1
    raise ValueError(f"A type without end: {text[:80]}")


def _split_operands(text: str) -> tuple[str, str]:
    depth = 1
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:position], text[position + 1 :]
    return text, ""


def _product_flops(one: Instruction, left: Array, right: Array) -> float:
    out = math.prod(one.arrays[0].shape)
    if one.operation == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        return 2.0 * out * math.prod(left.shape[int(axis)] for axis in contracted[1].split(",")) if contracted else 0.0
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None:
        return 0.0
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    settings = dict(part.split("=") for part in window[1].split(" ")) if window else {}
    channels = right.shape[labels[2].index("i")]
    features = out // _spatial(one.arrays[0].shape, labels[3])
    pairs = 1
    spatial = [letter for letter in labels[1] if letter.isdigit()]
    for axis in sorted(spatial):
        number = sorted(spatial).index(axis)

        def setting(name: str, default: str, number: int = number) -> str:
            return settings[name].split("x")[number] if name in settings else default

        low, _, _high = setting("pad", "0_0").partition("_")
        pairs *= _window_pairs(
            left.shape[labels[1].index(axis)],
            int(setting("size", "1")),
            one.arrays[0].shape[labels[3].index(axis)],
            int(setting("stride", "1")),
            int(low),
            int(setting("lhs_dilate", "1")),
            int(setting("rhs_dilate", "1")),
        )
    return 2.0 * features * channels * pairs


def _spatial(shape: tuple[int, ...], labels: str) -> int:
    return math.prod(size for size, letter in zip(shape, labels, strict=True) if letter.isdigit())


@functools.lru_cache
def _window_pairs(size: int, kernel: int, out: int, stride: int, low: int, spread: int, dilation: int) -> int:
    """Along one axis, pairs of an output and a kernel element that meet a true element of the input.

    A TPU's compiler writes batches of products as such windows, of which most of the pairs lie in the padding.
    """
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - low
    return int(np.count_nonzero((place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)))


def _kernel_flops(one: Instruction) -> float:
    """Of JAX's splash attention: two products of scores forward, five backward where one kernel gives all gradients.

    Otherwise four for those of keys and values and three for that of the queries. All pairs count, masked or not.
    """
    kernel = re.match(r"splash_mha_(fwd|dkv|dq)", one.name)
    operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", one.attributes)
    if kernel is None or operands is None:
        return 0.0
    shapes = [
        [int(size) for size in shape.split(",")]
        for kind, shape in re.findall(r"(\w+)\[([\d,]+)\]", operands[1])
        if kind in ("bf16", "f32") and shape.count(",") >= 2
    ]
    query, key = shapes[0], shapes[1]  # [..., heads, T, H] and [..., heads, S, H]
    fused = any(len(array.shape) > len(query) for array in one.arrays)  # a gradient of the queries for each key block
    products = {"fwd": 2, "dkv": 5 if fused else 4, "dq": 3}[kernel[1]]
    return 2.0 * products * math.prod(query) * key[-2]


def _groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """The groups of devices among which a collective works; pairs (from, to) for a permutation."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    if pairs:
        return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    by_mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if by_mesh:
        axes = re.findall(r"'(\w+)'=(\d+)", by_mesh[1])
        chosen = re.findall(r"'(\w+)'", by_mesh[2])
        names = [name for name, _ in axes]
        numbers = np.arange(devices).reshape([int(size) for _, size in axes])
        front = [position for position, name in enumerate(names) if name not in chosen]
        back = [names.index(name) for name in chosen]
        width = math.prod(numbers.shape[axis] for axis in back)
        return [tuple(row) for row in numbers.transpose(front + back).reshape(-1, width).tolist()]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, source = ([int(n) for n in iota[k].split(",")] for k in (1, 2))
        numbers = np.arange(math.prod(source)).reshape(source)
        if iota[3]:
            numbers = numbers.transpose([int(axis) for axis in iota[3].split(",")])
        return [tuple(row) for row in numbers.reshape(shape[0], -1).tolist()]
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes)
    if listed:
        return [tuple(int(n) for n in row.split(",")) for row in re.findall(r"\{([\d,]+)\}", listed[1])]
    return [tuple(range(devices))]


def _collective(
    operation: str, one: Instruction, times: float, groups: list[tuple[int, ...]], mesh_shape: dict[str, int]
) -> Collective:
    started = one.operation.endswith("-start") and len(one.arrays) > 1
    results = one.arrays[1:2] if started else one.arrays
    size, group = sum(array.bytes for array in results), groups[0]
    members = len(group)
    if operation == "reduce-scatter" and one.operation.startswith("reduce-scatter"):
        size *= members  # of what is reduced, not of what is left
    share = 1.0 if operation == "collective-permute" else (members - 1) / members
    passes = 2 if operation == "all-reduce" else 1
    largest = max(results, key=lambda array: array.bytes)
    source = re.search(r'op_name="([^"]*)"', one.attributes)
    return Collective(
        operation,
        _axes(groups, mesh_shape),
        f"{largest.kind}[{','.join(map(str, largest.shape))}]",
        times,
        times * size,
        times * size * share * passes,
        group,
        source[1] if source else "",
    )


def _axes(groups: list[tuple[int, ...]], mesh_shape: dict[str, int]) -> str:
    """Mesh axes along which the devices of the groups differ."""
    sizes = tuple(mesh_shape.values())
    differing: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(group, sizes))
        differing |= {axis for axis in range(len(sizes)) if len(set(places[axis])) > 1}
    return "+".join(name for axis, name in enumerate(mesh_shape) if axis in differing)
