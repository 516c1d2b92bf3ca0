"""Zip archives that are not trusted: where their members lie, and small reads of known size."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

# What `zipfile` raises for files that are damaged, encrypted or packed in ways that it cannot read.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, OverflowError,
    RuntimeError, struct.error, ValueError,
)  # fmt: skip
ALWAYS_FINE = 64 << 20
MAX_RATIO = 100  # numbers of weights hardly shrink at all
LOCAL_HEADER = struct.Struct("<4s22xHH")


class Archive:
    """The members of a zip file by name, with sizes that are checked against the file's own.

    Raises `ValueError` naming the file for what is no zip file, or a damaged one, where a name is
    there twice, and for a member that lies outside the file or is inflated beyond all reason.
    """

    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGED as error:
            raise ValueError(f"{path} is no zip file, damaged or cut short: {error}.") from None
        try:
            self.members = self._checked()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def _checked(self) -> dict[str, zipfile.ZipInfo]:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if info.filename in members:
                raise ValueError(f"{self.path} holds {info.filename!r} twice.")
            members[info.filename] = info
            stored = info.compress_type == zipfile.ZIP_STORED
            fits = 0 <= info.header_offset <= self.size - info.compress_size
            if not fits or (stored and info.file_size != info.compress_size):
                raise ValueError(f"{self.path}: {info.filename!r} lies outside the file.")
            if info.file_size > max(ALWAYS_FINE, MAX_RATIO * info.compress_size):
                raise ValueError(
                    f"{self.path}: {info.filename!r} would grow from {info.compress_size:,} to "
                    f"{info.file_size:,} bytes."
                )
        return members

    def offset(self, name: str) -> int | None:
        """Where the bytes of a member begin in the file; `None` where they are compressed."""
        info = self.members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            return None
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(LOCAL_HEADER.size)
        if len(header) != LOCAL_HEADER.size:
            raise ValueError(f"{self.path}: {name!r} is cut short.")
        signature, n_name, n_extra = LOCAL_HEADER.unpack(header)
        offset = info.header_offset + LOCAL_HEADER.size + n_name + n_extra
        if signature != b"PK\x03\x04" or offset + info.file_size > self.size:
            raise ValueError(f"{self.path}: {name!r} is damaged or cut short.")
        return offset

    def head(self, name: str, size: int) -> bytes:
        """The first bytes of a member, fewer where it is shorter."""
        return self._read(name, 0, size)

    def read(self, name: str, start: int, size: int) -> bytes:
        """That many bytes of a member; raises `ValueError` where there are fewer."""
        data = self._read(name, start, size)
        if len(data) != size:
            raise ValueError(f"{self.path}: {name!r} is cut short.")
        return data

    def _read(self, name: str, start: int, size: int) -> bytes:
        try:
            with self._zip.open(name) as member:
                if start:
                    member.seek(start)
                return member.read(size)
        except DAMAGED as error:
            raise ValueError(f"{self.path}: {name!r} is damaged: {error}.") from None
