"""Directories written whole or not at all, and files that are checked before they are believed."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

Contents = Mapping[str, Any]


def write_directory(path: str | Path, contents: Contents, marker: str) -> Path:
    """Write `{file name: arrays or JSON value}` as a directory that appears complete or not at all.

    Arrays go to safetensors, everything else to JSON. An older directory is replaced if it holds a
    file named `marker`; raises `ValueError` where something else is in the way.
    """
    path = Path(path)
    check_replaceable(path, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for name, content in contents.items():
            if name.endswith(".safetensors"):
                mx.save_safetensors(str(new / name), dict(content))
            else:
                text = json.dumps(_standard(content), indent=1, allow_nan=False)
                (new / name).write_text(text + "\n", encoding="utf-8")
        new.chmod(0o755)
        _replace(path, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return path


def check_replaceable(path: Path, marker: str) -> None:
    """Raises `ValueError` where something is at `path` that `write_directory` will not replace."""
    if path.exists() and not (path / marker).is_file() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and holds no {marker}; it is not overwritten.")


def _standard(content: Any) -> Any:
    """Numbers that JSON does not know, NaN and infinities, as null."""
    if isinstance(content, Mapping):
        return {key: _standard(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_standard(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _replace(path: Path, new: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    kept = path.rename(old / path.name)
    try:
        new.rename(path)
    except BaseException:
        kept.rename(path)
        old.rmdir()
        raise
    shutil.rmtree(old)


def read_json(path: Path, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object from a file; raises `ValueError` naming the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, not {type(content).__name__}.")
    for key in required:
        if key not in content:
            raise ValueError(f"{path} has no key {key!r}.")
    return content


def read_arrays(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, mx.array]:
    """The named arrays of a safetensors file.

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
                if header.get_dtype() not in ("F32", "F16", "BF16"):
                    raise ValueError(f"{path}: {key!r} has type {header.get_dtype()}.")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}.") from None
    loaded: Any = mx.load(str(path))
    arrays = {key: loaded[key] for key in shapes}
    mx.eval(arrays)
    return arrays
