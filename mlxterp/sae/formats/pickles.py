"""The pickles in files of torch, read by a machine that can build numbers and tensors, no more.

Python's own unpickler calls what a file names. Here nothing is looked up and nothing is called: the
instructions that torch writes for dictionaries, lists, numbers, strings and tensors are carried out
by hand, every other instruction or name is refused, and torch is not needed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from mlxterp.sae.formats.torch_objects import (
    KNOWN,
    STORAGES,
    Name,
    Storage,
    Tensor,
    itemsize,
    refuse,
)

MAX_BYTES = 4 << 20  # that of a state dictionary has some kilobytes
MAX_ENTRIES = 100_000
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
ORDERED_DICT = "collections.OrderedDict"
PLAIN: dict[str, type] = {"torch.device": str, "torch.Size": tuple}  # stay their argument


def read_pickle(data: bytes, storage_size: Callable[[str], int | None]) -> Any:
    """What a pickle of torch holds: dictionaries, lists, tuples, numbers, strings, `Tensor`s.

    `storage_size` says how many bytes the record of a storage has, `None` where there is no such
    record. Raises `ValueError` for every name that is not one of a tensor, a storage, a type or an
    `OrderedDict`, for instructions that torch does not write, and for tensors that are larger than
    their storage.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"its pickle has {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    return _Machine(storage_size).run(_Reader(data))


class _Reader:
    """The bytes of a pickle, one after the other."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if not 0 <= n <= len(self.data) - self.at:
            refuse("it ends in the middle of an instruction")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, form: str) -> str:
        return self.take(self.number(form)).decode("utf-8")

    def whole(self, form: str) -> int:
        return int.from_bytes(self.take(self.number(form)), "little", signed=True)

    def line(self) -> str:
        line = self.take(self.data.find(b"\n", self.at) + 1 - self.at)  # below 0 where none ends
        return line[:-1].decode("utf-8")


class _Machine:
    def __init__(self, storage_size: Callable[[str], int | None]):
        self.storage_size = storage_size
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: _Reader) -> Any:
        while (code := file.take(1)) != STOP:
            if code in VALUES:
                self.stack.append(VALUES[code](file))
            elif code in METHODS:
                METHODS[code](self)
            elif code in MEMO:
                self.remember(code, file)
            elif code in IGNORED:
                file.take(IGNORED[code])
            else:
                refuse(f"the instruction {code!r} is not read")
        return self.pop()

    def remember(self, code: bytes, file: _Reader) -> None:
        form, gets = MEMO[code]
        key = file.number(form) if form else len(self.memo)
        if not gets:
            self.memo[key] = self.top()
        elif key in self.memo:
            self.stack.append(self.memo[key])
        else:
            refuse(f"nothing is remembered as {key}")

    def top(self) -> Any:
        if not self.stack:
            refuse("it takes more than there is")
        return self.stack[-1]

    def pop(self, kind: type = object) -> Any:
        value = self.top()
        if not isinstance(value, kind):
            refuse(f"it does something with a {type(value).__name__} that it cannot do")
        return self.stack.pop()

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        if not self.marks:
            refuse("it takes more than there is")
        values, self.stack = self.stack, self.marks.pop()
        return values

    def make_tuple(self, n: int | None = None) -> None:
        values = self.to_mark() if n is None else [self.pop() for _ in range(n)][::-1]
        self.stack.append(tuple(values))

    def append(self, values: list[Any]) -> None:
        target = self.pop(list)
        target.extend(values)
        self.stack.append(target)

    def set_items(self, values: list[Any]) -> None:
        target = self.pop(dict)
        if len(values) % 2:
            refuse("a dictionary has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, (str, int)):
                refuse(f"a key is a {type(key).__name__}, not a string or a number")
            target[key] = value
        self.stack.append(target)

    def name(self) -> None:
        name, module = self.pop(str), self.pop(str)
        self.stack.append(_known(module, name))

    def persistent(self) -> None:
        """A reference to a storage: its type, its record, a device, how many numbers."""
        match self.pop():
            case ("storage", Name(name), str(key), _, int(n)) if name in STORAGES:
                kind = STORAGES[name]
            case _:
                refuse("it refers to something that is not a storage")
        size = self.storage_size(key)
        if size is None:
            refuse(f"there is no record of the storage {key!r}")
        if n < 0 or n * itemsize(kind) != size:
            refuse(f"the storage {key!r} of {n:,} {kind} has {size:,} bytes")
        self.stack.append(Storage(kind, key, n))

    def reduce(self) -> None:
        arguments, name = self.pop(tuple), self.pop(Name).name
        if name == REBUILD_TENSOR:
            self.stack.append(Tensor.checked(*(*arguments, None, None, None, None)[:4]))
        elif name == REBUILD_PARAMETER and arguments and isinstance(arguments[0], Tensor):
            self.stack.append(arguments[0])
        elif name == ORDERED_DICT and not arguments:
            self.stack.append({})
        elif name in PLAIN and arguments and isinstance(arguments[0], PLAIN[name]):
            self.stack.append(arguments[0])
        else:
            refuse(f"it calls {name} with what does not belong there")

    def build(self) -> None:
        """Attributes of a dictionary (torch notes versions of modules there) are not kept."""
        self.pop()
        self.stack.append(self.pop(dict))


STOP = b"."
IGNORED = {b"\x80": 1, b"\x95": 8}  # the number of the protocol, the length of a frame
# The instructions that torch writes, by their byte: what stands there itself,
VALUES: dict[bytes, Callable[[_Reader], Any]] = {
    b"N": lambda file: None,
    b"\x88": lambda file: True,
    b"\x89": lambda file: False,
    b"}": lambda file: {},
    b"]": lambda file: [],
    b")": lambda file: (),
    b"K": lambda file: file.number("<B"),
    b"M": lambda file: file.number("<H"),
    b"J": lambda file: file.number("<i"),
    b"G": lambda file: file.number(">d"),
    b"\x8a": lambda file: file.whole("<B"),
    b"\x8b": lambda file: file.whole("<i"),
    b"X": lambda file: file.text("<I"),
    b"\x8c": lambda file: file.text("<B"),
    b"\x8d": lambda file: file.text("<Q"),
    b"c": lambda file: _known(file.line(), file.line()),
}
# what is remembered (the form of its number, and whether it is fetched),
MEMO: dict[bytes, tuple[str, bool]] = {
    b"q": ("<B", False), b"r": ("<I", False), b"\x94": ("", False), b"h": ("<B", True),
    b"j": ("<I", True),
}  # fmt: skip
# and what is done with what stands there.
METHODS: dict[bytes, Callable[[_Machine], None]] = {
    b"(": lambda machine: machine.mark(),
    b"t": lambda machine: machine.make_tuple(),
    b"\x85": lambda machine: machine.make_tuple(1),
    b"\x86": lambda machine: machine.make_tuple(2),
    b"\x87": lambda machine: machine.make_tuple(3),
    b"a": lambda machine: machine.append([machine.pop()]),
    b"e": lambda machine: machine.append(machine.to_mark()),
    b"s": lambda machine: machine.set_items([machine.pop(), machine.pop()][::-1]),
    b"u": lambda machine: machine.set_items(machine.to_mark()),
    b"\x93": lambda machine: machine.name(),
    b"Q": lambda machine: machine.persistent(),
    b"R": lambda machine: machine.reduce(),
    b"b": lambda machine: machine.build(),
}
READ = KNOWN | {REBUILD_TENSOR, REBUILD_PARAMETER, ORDERED_DICT, *PLAIN}


def _known(module: str, name: str) -> Name:
    full = f"{module}.{name}"
    if full not in READ:
        refuse(
            f"it names {full[:200]!r}, which could run code and is not read (save the "
            "state_dict() of a module, not the module itself)"
        )
    return Name(full)


def flatten(value: Any) -> dict[str, Any]:
    """`{"encoder.weight": ...}` of nested dictionaries and lists; tuples of numbers stay whole.

    Raises `ValueError` for more than 100,000 entries, as those of a dictionary that holds itself,
    and where two of them would have one name.
    """
    found: dict[str, Any] = {}
    left = [("", value)]
    for _ in range(MAX_ENTRIES):
        if not left:
            return found
        name, value = left.pop()
        if isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            if len(left) + len(value) > MAX_ENTRIES:
                break
            named = [(f"{name}.{key}" if name else str(key), part) for key, part in items]
            left += reversed(named)
        elif name in found:
            refuse(f"two of its entries have the name {name!r}")
        else:
            found[name] = value.name if isinstance(value, Name) else value
    return refuse(f"it has more than {MAX_ENTRIES:,} entries")
