"""One file of activations: a safetensors file whose tensors are chunks of rows.

The header is written last, into room left for it, so that no more than a chunk is held in memory.
Reading takes NumPy alone and may be done by any thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxterp.sae.files import sync

UNFINISHED = ".unfinished"
DTYPES = {
    "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "I8": np.int8, "I32": np.int32,
    "I64": np.int64,
}  # fmt: skip  # NumPy has no bfloat16: its bits

Rows = dict[str, np.ndarray]


class DamagedShard(ValueError):
    """A file of activations that is missing, cut short or changed; `path` says which."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} {reason}")
        self.path = path


@dataclass(frozen=True)
class Part:
    """One of the things that are kept of every row: its safetensors type, and entries per row."""

    dtype: str
    width: int = 0
    """0: a single value."""

    @property
    def itemsize(self) -> int:
        """Bytes of a row."""
        return np.dtype(DTYPES[self.dtype]).itemsize * max(1, self.width)

    def shape(self, n_rows: int) -> tuple[int, ...]:
        """The shape of so many rows."""
        return (n_rows, self.width) if self.width else (n_rows,)

    def empty(self, n_rows: int) -> np.ndarray:
        """Room for so many rows."""
        return np.empty(self.shape(n_rows), DTYPES[self.dtype])


Parts = Mapping[str, Part]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that are read together: where in a file each part of them begins."""

    path: Path
    n_rows: int
    offsets: dict[str, int]
    checksum: int | None = None

    def read(self, parts: Parts, into: Rows | None = None, check: bool = False) -> Rows:
        """The named parts, in arrays of their own or those given.

        With `check` all parts that the file has are to be named. Raises `DamagedShard`.
        """
        rows = into
        if rows is None:
            rows = {name: part.empty(self.n_rows) for name, part in parts.items()}
        checksum = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                for name in parts:
                    data = _bytes(rows[name])
                    file.seek(self.offsets[name])
                    n_read = _read_fully(file, data)
                    if n_read < len(data):
                        raise DamagedShard(self.path, "is cut short.")
                    checksum = zlib.crc32(data, checksum) if check else checksum
        except FileNotFoundError:
            raise DamagedShard(self.path, "is missing.") from None
        except OSError as error:
            raise DamagedShard(self.path, f"cannot be read: {error}.") from None
        if check and checksum != self.checksum:
            raise DamagedShard(self.path, "is damaged: a checksum is wrong.")
        return rows


def _bytes(array: np.ndarray) -> memoryview:
    buffer: Any = array
    return memoryview(buffer).cast("B") if array.size else memoryview(b"")


def _read_fully(file: Any, data: memoryview) -> int:
    done = 0
    while done < len(data) and (n := file.readinto(data[done:])):
        done += n
    return done


class ShardWriter:
    """Writes a shard, which appears complete with `finish` or not at all.

    `parts` are those of every row, `chunk_rows` the rows of a chunk, `most_rows` those that the
    file may hold at most.
    """

    def __init__(self, path: Path, parts: Parts, chunk_rows: int, most_rows: int):
        self.path, self.parts, self.chunk_rows = path, parts, chunk_rows
        self._held: list[Rows] = []
        self._n_held = 0
        self._tensors: dict[str, Any] = {}
        self._checksums: list[int] = []
        self._written = 0
        n_chunks = -(-most_rows // chunk_rows)
        names = sum(len(name) + 150 for name in parts)
        self._room = 1024 + n_chunks * (names + 12)
        self._file = open(_unfinished(path), "wb")  # noqa: SIM115 - open until `finish`
        self._file.seek(8 + self._room)

    def add(self, rows: Rows) -> None:
        """Append rows, of all parts."""
        n = len(next(iter(rows.values())))
        self._held.append(rows)
        self._n_held += n
        with self._or_nothing():
            while self._n_held >= self.chunk_rows:
                self._write(self.chunk_rows)

    @contextlib.contextmanager
    def _or_nothing(self) -> Iterator[None]:
        # After an error the file is closed, so that it cannot be finished with a part missing.
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def _write(self, n_rows: int) -> None:
        """Write the first so many of the rows that are held."""
        joined = self._held[0]
        if len(self._held) > 1:
            joined = {n: np.concatenate([rows[n] for rows in self._held]) for n in self.parts}
        self._n_held -= n_rows
        left = {name: array[n_rows:] for name, array in joined.items()}
        if self._n_held < self.chunk_rows:  # a view would keep the whole array until the next rows
            left = {name: array.copy() for name, array in left.items()}
        self._held = [left] if self._n_held else []
        checksum, number = 0, len(self._checksums)
        for name, part in self.parts.items():
            data = _bytes(np.ascontiguousarray(joined[name][:n_rows]))
            self._file.write(data)
            checksum = zlib.crc32(data, checksum)
            self._tensors[key(number, name)] = {
                "dtype": part.dtype,
                "shape": part.shape(n_rows),
                "data_offsets": [self._written, self._written + len(data)],
            }
            self._written += len(data)
        self._checksums.append(checksum)

    def abort(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):  # of what could not be written
            self._file.close()
        _unfinished(self.path).unlink(missing_ok=True)

    def finish(self, metadata: Mapping[str, int]) -> None:
        """Write what is left, and some numbers about the shard, and put the file in its place."""
        with self._or_nothing():
            self._finish(metadata)

    def _finish(self, metadata: Mapping[str, int]) -> None:
        if self._n_held:
            self._write(self._n_held)
        noted = {**metadata, "checksums": self._checksums}
        texts = {name: json.dumps(value) for name, value in noted.items()}
        header = json.dumps({"__metadata__": texts, **self._tensors}).encode()
        if len(header) > self._room:
            raise ValueError(f"{self.path} holds more rows than it was made for.")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.close()
        sync(_unfinished(self.path))
        os.replace(_unfinished(self.path), self.path)
        sync(self.path.parent)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


def key(number: int, part: str) -> str:
    """The name of a chunk's tensor."""
    return f"{number:06d}/{part}"


def read_shard(path: Path, parts: Parts) -> tuple[list[Chunk], dict[str, Any]]:
    """The chunks of a shard, and what else was noted in it; raises `DamagedShard`.

    What is in the chunks is not looked at, but the file must have the size that it should.
    """
    header, start, size = read_header(path)
    try:
        texts = header.pop("__metadata__")
        metadata = {name: json.loads(text) for name, text in texts.items()}
        chunks = []
        for number, checksum in enumerate(metadata.pop("checksums")):
            tensors = {name: header.pop(key(number, name)) for name in parts}
            (n_rows,) = {tensor["shape"][0] for tensor in tensors.values()}
            for name, tensor in tensors.items():
                expected = parts[name].dtype, list(parts[name].shape(n_rows))
                if (tensor["dtype"], tensor["shape"]) != expected:
                    raise DamagedShard(path, f"has a tensor that is not {expected}: {tensor}.")
            offsets = {name: start + t["data_offsets"][0] for name, t in tensors.items()}
            chunks.append(Chunk(path, n_rows, offsets, checksum))
        end = max((chunk.offsets[n] + chunk.n_rows * parts[n].itemsize
                   for chunk in chunks[-1:] for n in parts), default=start)  # fmt: skip
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DamagedShard):
            raise
        raise DamagedShard(path, f"has a damaged header: {error!r}.") from None
    if size != end:
        raise DamagedShard(path, f"is cut short: it has {size:,} bytes, not {end:,}.")
    return chunks, metadata


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where its data begin, and the size of the file.

    Raises `DamagedShard`.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > size - 8:
                raise DamagedShard(path, f"is cut short or no safetensors file: {size:,} bytes.")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise DamagedShard(path, "is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedShard(path, f"has a damaged header: {error}.") from None
    if not isinstance(header, dict):
        raise DamagedShard(path, "has a damaged header.")
    return header, 8 + length, size
