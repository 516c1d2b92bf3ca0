"""Arrays in files of other libraries, `.safetensors`, `.npz` and `.pt`, none of them trusted.

Opening reads names, types and shapes. All of it is checked against the size of the file before any
memory is taken, no code out of a file is run, and one copy is made of what is read.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from mlxterp.sae.formats.archives import Archive
from mlxterp.sae.formats.pickles import MAX_BYTES, flatten, read_pickle
from mlxterp.sae.formats.torch_objects import Tensor

SAFETENSORS_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
TYPES = {name: np.dtype(name) for name in SAFETENSORS_TYPES.values() if name != "bfloat16"}
TYPES["bfloat16"] = np.dtype("uint16")  # its bits; NumPy has no such type
NPY_TYPES = {kind.str[1:]: name for name, kind in TYPES.items() if name != "bfloat16"}
# As NumPy has always written it; evaluating it as Python would be the other way.
NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?)([a-zA-Z]\d{1,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}L?,? ?)*)\),? *\}\s*"
)
AT_ONCE = 1 << 22  # numbers that are looked at for NaN at a time


@dataclass(frozen=True)
class Stored:
    """Where an array lies: its type, shape and first byte; `strides` count elements, and none mean
    rows one after the other. `member` is that of a zip file that has to be inflated."""

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None
    order: Literal["<", ">"] = "<"
    member: str | None = None

    @property
    def n(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class TensorFile:
    """The arrays of a file, and the plain values beside them: `with open_tensors(path) as file`."""

    def __init__(
        self,
        path: Path,
        arrays: dict[str, Stored],
        values: dict[str, Any] | None = None,
        archive: Archive | None = None,
    ):
        self.path = path
        self._arrays, self._values, self._archive = arrays, values or {}, archive
        self._bytes: np.ndarray | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bytes = None
        if self._archive is not None:
            self._archive.close()

    @property
    def names(self) -> list[str]:
        """The names of the arrays, in the order of the file."""
        return list(self._arrays)

    @property
    def values(self) -> dict[str, Any]:
        """The numbers, strings and tuples that a `.pt` file holds beside tensors."""
        return dict(self._values)

    def has(self, name: str) -> bool:
        """Whether there is an array or a value of that name."""
        return name in self._arrays or name in self._values

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array; raises `ValueError` where there is none of the name."""
        return self._stored(name).shape

    def dtype(self, name: str) -> str:
        """The type of an array in the file, such as `bfloat16`."""
        return self._stored(name).dtype

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> mx.array:
        """An array in float32, of the shape if one is asked for.

        Raises `ValueError` naming file and key where it is missing, has another shape or a type
        that is not read, and where it holds NaN or an infinity.
        """
        stored = self._stored(name)
        if shape is not None and stored.shape != tuple(shape):
            raise ValueError(
                f"{self.path}: {name!r} must have shape {tuple(shape)}, got {stored.shape}."
            )
        return self._as_float(name, self._view(name, stored))

    def read_part(self, name: str, index: Any) -> mx.array:
        """`array[index]` in float32, for integers and slices; only this part takes memory."""
        view = self._view(name, self._stored(name))
        try:
            part = view[index]
        except IndexError as error:
            raise ValueError(f"{self.path}: {name!r}: {error}.") from None
        return self._as_float(name, np.asarray(part))

    def value(self, name: str) -> Any:
        """A plain value, or the one number of an array as a Python number, exactly."""
        if name in self._values:
            return self._values[name]
        stored = self._stored(name)
        if stored.n != 1:
            raise ValueError(f"{self.path}: {name!r} must be one number, got shape {stored.shape}.")
        if stored.dtype == "bfloat16":
            return self.read(name).item()
        value = self._view(name, stored).item()
        if not math.isfinite(value):
            raise ValueError(f"{self.path}: {name!r} is {value}.")
        return value

    def _stored(self, name: str) -> Stored:
        if name not in self._arrays:
            raise ValueError(f"{self.path} has no key {name!r}; it holds {listed(self._arrays)}.")
        return self._arrays[name]

    def _view(self, name: str, stored: Stored) -> np.ndarray:
        """The array in the file itself, or in memory where it has to be inflated."""
        if stored.dtype not in TYPES:
            raise ValueError(f"{self.path}: {name!r} has type {stored.dtype}, which is not read.")
        kind = TYPES[stored.dtype].newbyteorder(stored.order)
        if stored.n == 0:
            return np.zeros(stored.shape, kind)
        if stored.member is not None:
            assert self._archive is not None
            data = self._archive.read(stored.member, stored.offset, stored.n * kind.itemsize)
            row = np.frombuffer(data, kind)
        else:
            if self._bytes is None:
                self._bytes = np.asarray(np.memmap(self.path, np.uint8, mode="r"))
            span = stored.n
            if stored.strides is not None:
                span = 1 + sum(
                    (n - 1) * s for n, s in zip(stored.shape, stored.strides, strict=True)
                )
            end = stored.offset + span * kind.itemsize
            if end > len(self._bytes):
                raise ValueError(f"{self.path}: {name!r} is cut short.")
            row = self._bytes[stored.offset : end].view(kind)
        if stored.strides is None:
            return row.reshape(stored.shape)
        strides = [n * kind.itemsize for n in stored.strides]
        return np.lib.stride_tricks.as_strided(row, stored.shape, strides, writeable=False)

    def _as_float(self, name: str, view: np.ndarray) -> mx.array:
        if self._arrays[name].dtype == "bfloat16":
            bits = mx.array(view.astype(np.uint16, copy=False))
            array = bits.view(mx.bfloat16).astype(mx.float32)
        else:
            with np.errstate(over="ignore"):  # found below, with its name
                array = mx.array(view.astype(np.float32, copy=False))
        mx.eval(array)
        check_finite(array, f"{self.path}: {name!r}")
        return array


def check_finite(array: mx.array, name: str) -> None:
    """Raises `ValueError` where an array holds NaN or an infinity."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, AT_ONCE):
        if not mx.isfinite(flat[start : start + AT_ONCE]).all().item():
            raise ValueError(f"{name} holds numbers that are not finite.")


def open_tensors(path: str | Path) -> TensorFile:
    """The arrays of a `.safetensors`, `.npz`, `.pt` or `.pth` file, of which nothing is read yet.

    Raises `FileNotFoundError` where there is none, and `ValueError` naming the file for one that is
    damaged or cut short, is no file of tensors, or would run code.
    """
    path = Path(path)
    if path.suffix not in OPENERS:
        raise ValueError(f"A file of arrays ends in {', '.join(OPENERS)}, got {path}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return OPENERS[path.suffix](path)


def _open_safetensors(path: Path) -> TensorFile:
    try:
        with safe_open(str(path), framework="numpy"):  # checks all of the header
            pass
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, struct.error, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}.") from None
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        kind, first = str(entry["dtype"]), entry["data_offsets"][0]
        kind = SAFETENSORS_TYPES.get(kind, kind)
        arrays[name] = Stored(kind, tuple(entry["shape"]), 8 + size + first)
    return TensorFile(path, arrays)


def _open_npz(path: Path) -> TensorFile:
    archive = Archive(path)
    try:
        arrays = {
            member.removesuffix(".npy"): _npy(archive, member)
            for member in archive.members
            if member.endswith(".npy")
        }
    except BaseException:
        archive.close()
        raise
    return TensorFile(path, arrays, archive=archive)


def _npy(archive: Archive, member: str) -> Stored:
    where = f"{archive.path}: {member!r}"
    head = archive.head(member, 12)
    version, long = head[6:8], head[6:7] != b"\x01"
    if head[:6] != b"\x93NUMPY" or version not in (b"\x01\0", b"\x02\0", b"\x03\0"):
        raise ValueError(f"{where} is no array of NumPy.")
    if len(head) < 12:
        raise ValueError(f"{where} is cut short.")
    start = 12 if long else 10
    end = start + int.from_bytes(head[8:start], "little")
    if end > 10_000:
        raise ValueError(f"{where} has a header of {end:,} bytes.")
    found = NPY_HEADER.fullmatch(archive.read(member, start, end - start))
    if found is None:  # of objects or of records; only an error where somebody asks for it
        return Stored("of objects or records", ())
    order, letter, fortran, sizes = (part.decode() for part in found.groups())
    shape = tuple(int(n.strip(" L")) for n in sizes.split(",") if n.strip())
    kind = NPY_TYPES.get(letter, letter)
    size = archive.members[member].file_size
    if kind in TYPES and end + math.prod(shape) * TYPES[kind].itemsize != size:
        raise ValueError(f"{where} of shape {shape} and type {kind} has {size:,} bytes.")
    strides = None
    if fortran == "True":
        strides = tuple(math.prod(shape[:i]) for i in range(len(shape)))
    offset = archive.offset(member)
    order = ">" if order == ">" else "<"
    if offset is None:
        return Stored(kind, shape, end, strides, order, member)
    return Stored(kind, shape, offset + end, strides, order)


def _open_torch(path: Path) -> TensorFile:
    with path.open("rb") as file:
        if file.read(2) == b"\x80\x02":
            raise ValueError(
                f"{path} is in the format of torch before 1.6, which is not read. Save it again "
                "with torch: torch.save(torch.load(path, weights_only=True), path)."
            )
    with Archive(path) as archive:
        pickles = [name for name in archive.members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise ValueError(f"{path} is no file of torch.save: it has {len(pickles)} data.pkl.")
        prefix = pickles[0].removesuffix("data.pkl")
        order = _byte_order(archive, prefix)

        def storage_size(key: str) -> int | None:
            record = archive.members.get(f"{prefix}data/{key}")
            return None if record is None else record.file_size

        size = archive.members[pickles[0]].file_size
        try:
            if size > MAX_BYTES:
                raise ValueError(f"its pickle has {size:,} bytes; at most {MAX_BYTES:,} are read")
            content = read_pickle(archive.read(pickles[0], 0, size), storage_size)
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, not a dictionary")
            entries = flatten(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}.") from None
        tensors = {name: part for name, part in entries.items() if isinstance(part, Tensor)}
        values = {name: part for name, part in entries.items() if name not in tensors}
        arrays = {
            name: _of_storage(archive, prefix, tensor, order) for name, tensor in tensors.items()
        }
    return TensorFile(path, arrays, values)


def _byte_order(archive: Archive, prefix: str) -> Literal["<", ">"]:
    name = f"{prefix}byteorder"
    return ">" if name in archive.members and archive.head(name, 8) == b"big" else "<"


def _of_storage(archive: Archive, prefix: str, tensor: Tensor, order: Literal["<", ">"]) -> Stored:
    storage = tensor.storage
    offset = archive.offset(f"{prefix}data/{storage.key}")
    if offset is None:
        raise ValueError(f"{archive.path}: the storage {storage.key!r} is compressed.")
    first = offset + tensor.offset * TYPES[storage.dtype].itemsize
    return Stored(storage.dtype, tensor.shape, first, tensor.strides, order)


OPENERS = {
    ".safetensors": _open_safetensors, ".npz": _open_npz, ".pt": _open_torch, ".pth": _open_torch,
}  # fmt: skip


def listed(names: Any) -> str:
    """Up to twenty names, for messages."""
    names = sorted(names)
    return str(names) if len(names) <= 20 else f"{names[:20]} and {len(names) - 20} more"
