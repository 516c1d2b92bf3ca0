"""Checkpoints of a run: each a directory `step_00005000`, complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxterp.sae.files import read_arrays, read_json, write_directory

KEPT = 2
RUN_FILE = "run.json"
STATE_FILE = "state.safetensors"


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.glob(f"step_*/{RUN_FILE}"))


def last_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the most steps; `None` where there is none."""
    return next(reversed(_checkpoints(directory)), None)


def save_checkpoint(
    directory: Path, step: int, run: Mapping[str, Any], arrays: Mapping[str, mx.array]
) -> None:
    """Write one checkpoint, then remove all but the last `KEPT`."""
    contents = {RUN_FILE: dict(run), STATE_FILE: dict(arrays)}
    write_directory(directory / f"step_{step:08d}", contents, marker=RUN_FILE)
    for old in _checkpoints(directory)[:-KEPT]:
        shutil.rmtree(old)


def read_checkpoint(
    path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The run's description and its arrays; raises `ValueError` for files that do not fit."""
    keys = ("step", "n_steps", "n_dead", "seconds", "random_state")
    keys += ("config", "training", "validation")
    return read_json(path / RUN_FILE, keys), read_arrays(path / STATE_FILE, shapes)
