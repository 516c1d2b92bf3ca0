"""What a file of torch is made of: storages, and tensors as views of them; described, not read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

# The types of storages, by the name that torch has for each.
STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_SIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
_OTHER_NAMES = ("double", "float", "half", "long", "int", "short")
KNOWN = {*STORAGES} | {f"torch.{name}" for name in (*STORAGES.values(), *_OTHER_NAMES)}


@dataclass(frozen=True)
class Name:
    """Something of Python that a pickle names; it stays a name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Numbers in a row: their type, the record of the archive that holds them, how many."""

    dtype: str
    key: str
    n: int


@dataclass(frozen=True)
class Tensor:
    """A tensor: a view of a storage. `strides` and `offset` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def checked(cls, storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
        """A tensor; raises `ValueError` where it is none, or larger than its storage."""
        tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
        if not isinstance(storage, Storage) or not tuples:
            refuse("a tensor is made of something else than a storage, a shape and strides")
        numbers = (offset, *shape, *strides)
        whole = all(isinstance(n, int) and 0 <= n < 1 << 63 for n in numbers)
        if not whole or len(shape) != len(strides):
            refuse(f"a tensor has offset {offset}, shape {shape} and strides {strides}")
        n = 1
        for length in shape:
            n *= length
        steps = ((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if n > storage.n or (n and offset + sum(steps) >= storage.n):
            refuse(f"a tensor of shape {shape} is larger than its storage of {storage.n:,} numbers")
        return cls(storage, offset, shape, strides)


def itemsize(dtype: str) -> int:
    """The bytes of one number of a type."""
    return _SIZES.get(dtype, 2)


def refuse(reason: str) -> NoReturn:
    """Raises `ValueError` for a pickle."""
    raise ValueError(f"its pickle is not one of tensors and numbers: {reason}")
