"""Pickles read without running anything: a small machine that knows containers, numbers, text and a list of names.

The pickle module of Python imports and calls what a file asks for. Here `pickletools` only decodes instructions, and
the machine below carries out those that build plain values. A name of the outside world is never imported: it is looked
up in a table that the caller gives, and only a `Constructor` of that table is ever called. Memory and time stay in
proportion to the bytes read: nothing that is remembered can be copied again and again.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

# Bytes of one pickle. Tables of tensors take some 150 bytes per tensor; built values take up to 80 times their bytes.
LIMIT = 1 << 25


class PickleError(ValueError):
    """What is not read; the message is a sentence that lacks its subject, the file, and the full stop."""


class DamagedPickle(PickleError):
    """Bytes that are no whole pickle."""


@dataclass(frozen=True)
class Constructor:
    """A function that stands for a name; the machine may call it with the arguments of the file."""

    build: Callable[..., Any]


def load_pickle(
    file: BinaryIO,
    allowed: Mapping[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    limit: int = LIMIT,
) -> Any:
    """The value of the pickle at the position of `file`, which afterwards stands behind it.

    Sets become lists, and attributes of an OrderedDict are dropped: nobody looks into either.

    Args:
      allowed: "module name" -> what stands for that name; each is inert, or a `Constructor`.
      persistent: from a persistent id to its value; without it there may be none.
      limit: bytes that are read at most.

    Raises:
      DamagedPickle: no whole pickle.
      PickleError: it asks for a name that is not allowed, or for anything else than plain values.
    """
    machine = _Machine(allowed or {}, persistent)
    try:
        for instruction, argument, _ in pickletools.genops(_Bounded(file, limit)):  # type: ignore[arg-type]
            machine.step(instruction.name, argument)
        return machine.stack[-1]
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise DamagedPickle("is truncated or damaged: its list of tensors cannot be read") from error


class _Bounded:
    """A file of which no more than `left` bytes can be read, so that a length in it cannot fill the memory."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self.file, self.left = file, left

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("a pickle larger than it may be")
        self.left -= count
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline(self.left)
        self.left -= len(line)
        return line


class _Machine:
    """The stack and the memory of a pickle while it is read."""

    def __init__(self, allowed: Mapping[str, Any], persistent: Callable[[Any], Any] | None) -> None:
        self.allowed, self.persistent = allowed, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memory: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carries out one instruction, known by its name in `pickletools`."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)
        elif name == "INST":
            raise _refusal(argument)
        else:
            raise PickleError(f"uses the instruction {name} of pickles, which no file of tensors needs; it is refused")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def above_mark(self) -> list[Any]:
        """Takes everything above the last mark, and the mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def drop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.drop_mark()

    def drop_mark(self) -> None:
        self.above_mark()

    def put(self, slot: int) -> None:
        self.memory[slot] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        self.push(tuple(self.stack.pop() for _ in range(count))[::-1])

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("items for what is no list")
        target.extend(items)

    def update(self, items: list[Any]) -> None:
        """Names and values, in turn, into the table on top of the stack."""
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise ValueError("entries for what is no table")
        _fill(target, zip(items[::2], items[1::2], strict=True))

    def dictionary(self) -> None:
        items = self.above_mark()
        self.push({})
        self.update(items)

    def find(self, name: str) -> None:
        if name not in self.allowed:
            raise _refusal(name)
        self.push(self.allowed[name])

    def find_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name that is no text")
        self.find(f"{module} {name}")

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Constructor or type(arguments) is not tuple:
            raise PickleError("calls something that is no function, so it is refused")
        self.push(function.build(*arguments))

    def set_attributes(self) -> None:
        """A state dict carries its `_metadata` so; nothing else has attributes here."""
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            raise PickleError("sets attributes of something that is no state dict, so it is refused")

    def resolve(self, identity: Any) -> None:
        if self.persistent is None:
            raise ValueError("a reference where none may be")
        self.push(self.persistent(identity))


def _fill(table: dict[Any, Any], entries: Iterable[tuple[Any, Any]]) -> None:
    for name, value in entries:
        if not _is_name(name):
            raise PickleError("names an entry by something else than text or numbers, so it is refused")
        if name in table:
            raise PickleError(f"holds two entries of the name {shown(name)}")
        table[name] = value


def _ordered(entries: Any = None) -> OrderedDict[Any, Any]:
    """An OrderedDict, from Python 2 with a list of its entries."""
    table: OrderedDict[Any, Any] = OrderedDict()
    if entries is not None:
        if type(entries) is not list:
            raise ValueError("no list of entries")
        _fill(table, ((name, value) for name, value in entries))
        entries.clear()  # so that one list, remembered, does not fill many tables
    return table


def _set(items: Any) -> list[Any]:
    if type(items) is not list:
        raise ValueError("no list of items")
    return items


def _is_name(name: Any) -> bool:
    """Whether a name is safe and quick to hash: nested tuples can overflow the stack of C, huge numbers take long."""
    return type(name) in (str, bytes, float, bool, type(None)) or (type(name) is int and name.bit_length() <= 64)


def _refusal(name: str) -> PickleError:
    dotted = shown(name.replace(" ", ".", 1))
    return PickleError(f"asks for {dotted} when it is opened; only tensors are read, so it is refused")


def shown(name: Any, length: int = 100) -> str:
    """A name of an untrusted file, fit for one line of a message."""
    text = name if isinstance(name, str) else f"<{type(name).__name__}>"
    text = text if len(text) <= length else text[:length] + "…"
    return text if text.isprintable() else ascii(text)


CONTAINERS: dict[str, Constructor] = {
    "collections OrderedDict": Constructor(_ordered),
    "builtins set": Constructor(_set),
    "__builtin__ set": Constructor(_set),
}
_VALUES = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "BINBYTES8",
        "SHORT_BINBYTES",
        "BYTEARRAY8",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
    ]
)
_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.drop(),
    "POP_MARK": lambda machine, _: machine.drop_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.above_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": lambda machine, _: machine.push(machine.above_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.above_mark()),
    "DICT": lambda machine, _: machine.dictionary(),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.above_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.above_mark()),
    "SETITEM": lambda machine, _: machine.update([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.above_mark()),
    "PUT": lambda machine, slot: machine.put(slot),
    "BINPUT": lambda machine, slot: machine.put(slot),
    "LONG_BINPUT": lambda machine, slot: machine.put(slot),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memory)),
    "GET": lambda machine, slot: machine.push(machine.memory[slot]),
    "BINGET": lambda machine, slot: machine.push(machine.memory[slot]),
    "LONG_BINGET": lambda machine, slot: machine.push(machine.memory[slot]),
    "GLOBAL": lambda machine, name: machine.find(name),
    "STACK_GLOBAL": lambda machine, _: machine.find_on_stack(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.set_attributes(),
    "PERSID": lambda machine, identity: machine.resolve(identity),
    "BINPERSID": lambda machine, _: machine.resolve(machine.stack.pop()),
}
