"""Directories that survive a crash whole, and files that are checked before they are believed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

Contents = Mapping[str, Any]

CHECKSUMS_FILE = "checksums.json"
SCRATCH = ".unfinished"


def write_directory(
    path: str | Path, contents: Contents, marker: str, checksums: bool = False
) -> Path:
    """Write `{file name: arrays or JSON value}` as a directory that appears complete or not at all.
    A name may be that of a file in a directory of it.

    Arrays go to safetensors, bytes as they are, everything else to JSON; all of it has reached the
    disk when this returns. With `checksums` one more file notes the CRC-32 of each, for `verify`.
    An older directory is replaced if it holds a file named `marker`. Raises `ValueError` where
    something else is in the way, and `OSError` naming the bytes needed and free where writing
    fails; what was at `path` is then still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path.parent, path.name)
    check_replaceable(path, marker)
    try:
        with _scratch(path) as scratch:
            _write_files(scratch / "new", contents, checksums)
            _publish(scratch, path)
    except OSError as error:
        needed, free = _size(contents), shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno or errno.EIO,
            f"{path} could not be written ({error.strerror or error}): it needs {needed:,} bytes, "
            f"{free:,} are free",
        ) from error
    return path


def check_replaceable(path: Path, marker: str) -> None:
    """Raises `ValueError` where something is at `path` that `write_directory` will not replace."""
    if path.exists() and not (path / marker).is_file() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and holds no {marker}; it is not overwritten.")


def recover(directory: Path, name: str | None = None) -> None:
    """Clear up after processes that were killed in `write_directory`.

    What they left unfinished is removed; a directory that they had moved aside, to replace it,
    comes back. Of one `name` or of all; work of living processes is left alone.
    """
    for scratch in directory.glob(f".*{SCRATCH}"):
        original = scratch.name[1 : -len(SCRATCH)].rpartition(".")[0]
        if name in (None, original):
            with contextlib.suppress(OSError), _locked(scratch) as mine:
                if mine:
                    _clear(scratch, directory / original)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether this process has the lock, which ends with the block or with the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except OSError:  # another process has it, or the file system knows no locks
            mine = False
        yield mine
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A locked directory to work in, beside `path`; `old` in it goes back there on failure."""
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    scratch = made.with_name(made.name + SCRATCH)
    try:
        with _locked(made):
            made.rename(scratch)  # only now, as `recover` removes what is not locked
            yield scratch
    finally:
        _clear(scratch, path)
        shutil.rmtree(made, ignore_errors=True)


def _clear(scratch: Path, path: Path) -> None:
    old = scratch / "old"
    if os.path.lexists(old) and not path.exists():
        old.rename(path)
    shutil.rmtree(scratch, ignore_errors=True)


class _CheckedFile(io.BufferedWriter):
    """A new file that counts the CRC-32 of what is written to it."""

    checksum = 0

    def write(self, data: Any) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return super().write(data)


def _write_files(directory: Path, contents: Contents, checksums: bool) -> None:
    directory.mkdir()
    for parent in {(directory / name).parent for name in contents} - {directory}:
        parent.mkdir()
    found = {name: write_file(directory / name, content) for name, content in contents.items()}
    if checksums:
        write_file(directory / CHECKSUMS_FILE, found)
    sync(directory)


def write_file(path: Path, content: Any) -> int:
    """Write arrays, bytes or a JSON value to a new file, synced; its CRC-32."""
    with _CheckedFile(io.FileIO(path, "xb")) as file:
        if path.suffix == ".safetensors":
            # Through a file of our own: where the disk is full, that raises an `OSError`.
            writable: Any = file
            mx.save_safetensors(writable, dict(content))
        else:
            file.write(content if isinstance(content, bytes) else _to_json(content))
    sync(path)
    return file.checksum


def write_text(path: str | Path, text: str) -> Path:
    """Write a text to a file, replacing it whole, and return its path; raises `ValueError` where
    there is a directory."""
    return _replaced(path, text.encode())


def write_json(path: str | Path, value: Any) -> Path:
    """Write a JSON value to a file, as `write_text` does."""
    return _replaced(path, _to_json(value))


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write bytes to a file, as `write_text` does."""
    return _replaced(path, content)


def _replaced(path: str | Path, content: bytes) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be that of a file, got the directory {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_bytes(content)
    sync(scratch)
    os.replace(scratch, path)
    sync(path.parent)
    return path


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        full = getattr(fcntl, "F_FULLFSYNC", None)
        if full is not None:  # macOS, where fsync trusts the cache of the drive
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, full)
                return
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of networks know no sync of directories.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _publish(scratch: Path, path: Path) -> None:
    """Move `new` to `path`, and what is there to `old`, from where `_clear` brings it back."""
    if path.exists():
        path.rename(scratch / "old")
    (scratch / "new").rename(path)
    sync(path.parent)


def _size(contents: Contents) -> int:
    """The bytes that the files take, but for the headers of safetensors."""
    return sum(
        sum(array.nbytes for array in content.values())
        if name.endswith(".safetensors")
        else len(content if isinstance(content, bytes) else _to_json(content))
        for name, content in contents.items()
    )


def _to_json(content: Any) -> bytes:
    return (json.dumps(_standard(content), indent=1, allow_nan=False) + "\n").encode()


def _standard(content: Any) -> Any:
    """Numbers that JSON does not know, NaN and infinities, as null."""
    if isinstance(content, Mapping):
        return {key: _standard(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_standard(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def verify(directory: Path, required: tuple[str, ...]) -> None:
    """Compare all files with their checksums; raises `ValueError` naming one that is damaged."""
    for name, expected in read_json(directory / CHECKSUMS_FILE, required).items():
        path, found = directory / name, 0
        try:
            with path.open("rb") as file:
                while data := file.read(1 << 22):
                    found = zlib.crc32(data, found)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing.") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}.") from None
        if found != expected:
            raise ValueError(f"{path} is damaged: its checksum is {found}, not {expected}.")


def read_json(path: Path, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object from a file; raises `ValueError` naming the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, not {type(content).__name__}.")
    check_keys(path, content, required)
    return content


def check_keys(path: Path, content: Mapping[str, Any], required: tuple[str, ...]) -> None:
    """Raises `ValueError` for a key that a file does not have."""
    for key in required:
        if key not in content:
            raise ValueError(f"{path} has no key {key!r}.")


def read_arrays(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    types: tuple[str, ...] = ("F32", "F16", "BF16"),
) -> dict[str, mx.array]:
    """The named arrays of a safetensors file, of one of the given types.

    Names, shapes and types are checked in the header before any memory is taken; raises
    `ValueError` naming the file and the key.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            for key, shape in shapes.items():
                if key not in file.keys():  # noqa: SIM118 - the object is not a mapping
                    raise ValueError(f"{path} has no key {key!r}; it holds {sorted(file.keys())}.")
                header = file.get_slice(key)
                found = tuple(header.get_shape())
                if found != shape:
                    raise ValueError(f"{path}: {key!r} must have shape {shape}, got {found}.")
                if header.get_dtype() not in types:
                    raise ValueError(f"{path}: {key!r} has type {header.get_dtype()}.")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}.") from None
    loaded: Any = mx.load(str(path))
    arrays = {key: loaded[key] for key in shapes}
    mx.eval(arrays)
    return arrays
