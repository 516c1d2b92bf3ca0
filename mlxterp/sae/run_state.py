"""Checkpoints of a run: each a directory `step_00005000`, complete or absent."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxterp.sae.files import (
    CHECKSUMS_FILE,
    read_arrays,
    read_json,
    recover,
    verify,
    write_directory,
)

RUN_FILE = "run.json"
STATE_FILE = "state.safetensors"
FILES = frozenset((RUN_FILE, STATE_FILE, CHECKSUMS_FILE))
KEYS = (
    "step",
    "n_steps",
    "n_dead",
    "ended",
    "seconds",
    "random_state",
    "config",
    "training",
    "validation",
)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _checkpoints(directory: Path) -> list[Path]:
    """Whole and damaged ones by step; nothing that holds other files than a checkpoint does."""
    return sorted(
        path
        for path in directory.glob("step_" + 8 * "[0-9]")
        if path.is_dir() and {file.name for file in path.iterdir()} <= FILES
    )


def last_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the most steps that is not damaged; `None` where there is none.

    Every file is read and compared with its checksum; each damaged checkpoint on the way is named
    in a warning.
    """
    recover(directory)
    for path in reversed(_checkpoints(directory)):
        try:
            verify(path, (STATE_FILE, RUN_FILE))
            return path
        except ValueError as error:
            warnings.warn(f"Checkpoint {path.name} is not used: {error}", stacklevel=2)
    return None


def save_checkpoint(
    directory: Path,
    step: int,
    run: Mapping[str, Any],
    arrays: Mapping[str, mx.array],
    keep: int = 2,
) -> Path:
    """Write one checkpoint, keep the last `keep`, and return its path.

    Checkpoints of later steps are removed: a run that is here only now found them damaged. Raises
    `OSError` where the disk is full; the checkpoints before this one are then untouched.
    """
    recover(directory)
    for later in _checkpoints(directory):
        if later.name > _name(step) or not (later / RUN_FILE).is_file():
            shutil.rmtree(later)
    contents = {STATE_FILE: arrays, RUN_FILE: run}
    path = write_directory(directory / _name(step), contents, marker=RUN_FILE, checksums=True)
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return path


def read_checkpoint(
    path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The run's description and its arrays; raises `ValueError` for files that do not fit."""
    return read_json(path / RUN_FILE, KEYS), read_arrays(path / STATE_FILE, shapes)
