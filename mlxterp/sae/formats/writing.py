"""Coders as files of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mlxterp.sae.formats import circuit_tracer, dictionary_learning, saelens, sparsify
from mlxterp.sae.formats.parts import Parts


class WritableFormat(Protocol):
    """What a module that writes a format has."""

    @property
    def NAME(self) -> str:
        """As users write it."""
        ...

    def write(self, parts: Parts, path: Path) -> Path:
        """Write a coder; raises `ValueError` for what the format cannot express."""
        ...


FORMATS: tuple[WritableFormat, ...] = (saelens, sparsify, dictionary_learning, circuit_tracer)


def writable_formats() -> list[str]:
    """The names of the formats that are written."""
    return sorted(module.NAME for module in FORMATS)


def write_foreign(parts: Parts, format: str, path: str | Path) -> Path:
    """Write a coder as a file of another library, and return its path.

    Raises `ValueError` for an unknown format, and for what the format cannot express.
    """
    known = writable_formats()
    if format not in known:
        raise ValueError(f"format must be one of {known}, got {format!r}.")
    return next(module for module in FORMATS if format == module.NAME).write(parts, Path(path))
