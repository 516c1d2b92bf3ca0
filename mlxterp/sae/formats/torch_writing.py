"""Files of `torch.save` without torch: a zip file of a pickle and of the numbers of each tensor."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

# Instructions of a pickle; those of torch are of its protocol 2.
START, STOP, MARK = b"\x80\x02", b".", b"("
TUPLE, EMPTY_TUPLE, REDUCE = b"t", b")", b"R"
SET_ITEMS, PERSISTENT, FALSE = b"u", b"Q", b"\x89"
STORAGES = {"float32": "FloatStorage", "int32": "IntStorage", "int64": "LongStorage"}
ROOT = "archive"


def torch_file(arrays: Mapping[str, np.ndarray]) -> bytes:
    """What `torch.save` writes for an `OrderedDict` of tensors.

    Raises `ValueError` for arrays that are not of float32, int32 or int64.
    """
    arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    for name, array in arrays.items():
        if array.dtype.name not in STORAGES:
            raise ValueError(f"{name!r} must be of {', '.join(STORAGES)}, got {array.dtype}.")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (
            ("data.pkl", _pickle(arrays)),
            ("byteorder", b"little"),
            *((f"data/{i}", _little(array)) for i, array in enumerate(arrays.values())),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"{ROOT}/{name}"), content)
    return file.getvalue()


def _little(array: np.ndarray) -> Any:
    """The bytes of an array without a copy, the lowest of a number first."""
    row = array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1)
    return row.view(np.uint8).data


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    items = b"".join(_text(name) + _tensor(i, a) for i, (name, a) in enumerate(arrays.items()))
    return START + _ordered_dict() + MARK + items + SET_ITEMS + STOP


def _tensor(key: int, array: np.ndarray) -> bytes:
    """The call of torch that makes a tensor of a storage, an offset, a shape and strides."""
    storage = _tuple(
        _text("storage"), _name("torch", STORAGES[array.dtype.name]), _text(str(key)),
        _text("cpu"), _number(array.size),
    )  # fmt: skip
    strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
    arguments = _tuple(
        storage + PERSISTENT, _number(0), _tuple(*map(_number, array.shape)),
        _tuple(*map(_number, strides)), FALSE, _ordered_dict(),
    )  # fmt: skip
    return _name("torch._utils", "_rebuild_tensor_v2") + arguments + REDUCE


def _ordered_dict() -> bytes:
    return _name("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    """A whole number of up to eight bytes."""
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(*parts: bytes) -> bytes:
    return MARK + b"".join(parts) + TUPLE
