"""Circuits as files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mlxterp.sae.circuits.nodes import Edge, Node, NodeKind
from mlxterp.sae.files import read_json, write_json
from mlxterp.version import __version__

FORMAT, FORMAT_VERSION = "circuit", 1


def write_circuit(path: str | Path, values: Mapping[str, Any]) -> Path:
    """Write the values of a circuit to a JSON file that appears complete or not at all."""
    versions = {"format_version": FORMAT_VERSION, "library_version": __version__}
    return write_json(path, {"format": FORMAT, **versions, **values})


def read_circuit(path: str | Path) -> dict[str, Any]:
    """What `write_circuit` wrote; raises `ValueError`, naming the file, for anything else."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be that of a file, got the directory {path}.")
    values = read_json(path, ("format", "format_version", "nodes", "edges", "levels"))
    if values["format"] != FORMAT:
        raise ValueError(f"{path} has format {values['format']!r}; a circuit has {FORMAT!r}.")
    if values["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {values['format_version']!r}; this release of mlxterp "
            f"reads {FORMAT_VERSION}."
        )
    return values


def plain(value: Any) -> Any:
    """The value without arrays and numbers of NumPy, and without tuples."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)


def nodes_of(values: Mapping[str, Any]) -> tuple[Node, ...]:
    """The nodes among the values of a circuit."""
    found = []
    for v in values["nodes"]:
        if v["kind"] not in get_args(NodeKind):
            raise ValueError(f"kind must be one of {list(get_args(NodeKind))}, got {v['kind']!r}.")
        kinds = {"position": int, "influence": float, "label": str, "effect": float}
        found.append(
            Node(
                v["kind"],
                _typed(v["site"], str),
                _typed(v["index"], int),
                value=_number(v.get("value", 0.0)),
                **{name: _optional(v, name, kind) for name, kind in kinds.items()},
            )
        )
    return tuple(found)


def edges_of(values: Mapping[str, Any]) -> tuple[Edge, ...]:
    """The edges among the values of a circuit."""
    kinds = {"share": float, "consistency": float, "n": int, "measured": float}
    return tuple(
        Edge(
            _typed(v["source"], int),
            _typed(v["target"], int),
            _number(v["weight"]),
            **{name: _optional(v, name, kind) for name, kind in kinds.items()},
        )
        for v in values["edges"]
    )


def texts_of(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Strings among the values of a circuit; none where there is no such key."""
    return tuple(_typed(text, str) for text in _typed(values.get(name, []), list))


def _number(value: Any) -> float:
    """A number, for which files hold null where it is not finite."""
    return math.nan if value is None else _typed(value, float)


def _optional(values: Mapping[str, Any], name: str, kind: type) -> Any:
    return None if values.get(name) is None else _typed(values[name], kind)


def _typed(value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
