"""Which library a file is of, and what it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from mlxterp.sae.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    goodfire,
    hook_z,
    llama_scope,
    llamascopium,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)
from mlxterp.sae.formats.parts import Parts


class Format(Protocol):
    """What a module that reads a format has."""

    @property
    def NAME(self) -> str:
        """As users write it."""
        ...

    def recognise(self, path: Path) -> bool:
        """Whether a file or directory looks like one of this format; never raises."""
        ...

    def read(self, path: Path, site: str | None = None) -> Parts:
        """What it holds; `site` is given where the file does not say it. Raises `ValueError`."""
        ...


# In order: the first that recognises a path reads it.
FORMATS: tuple[Format, ...] = (
    saelens, sparsify, dictionary_learning, gemma_scope, llama_scope, openai, qwen_scope, goodfire,
    hook_z, circuit_tracer, llamascopium,
)  # fmt: skip


def known_formats() -> list[str]:
    """The names of the formats that are read."""
    return sorted(module.NAME for module in FORMATS)


def recognised(path: Path) -> Format | None:
    """The format of a file or directory, `None` where it is like none of those known."""
    return next((module for module in FORMATS if module.recognise(path)), None)


def read_foreign(path: Path, site: str | None = None, format: str | None = None) -> Parts:
    """What a file or directory of another library holds.

    Raises `ValueError`, naming the formats that are known, for one that looks like none of them or
    a `format` that is not among them, and for everything that is wrong in a file.
    """
    known = known_formats()
    if format is not None:
        if format not in known:
            raise ValueError(f"format must be one of {known}, got {format!r}.")
        found = next(module for module in FORMATS if format == module.NAME)
    else:
        found = recognised(path)
        if found is None:
            raise ValueError(
                f"{path} is no saved coder of mlxterp and looks like none of the formats "
                f"{known}; name one with format=... if it is of one all the same."
            )
    try:
        parts = found.read(path, site)
    except (ValueError, OverflowError) as error:  # of a number that is no size of anything
        named = str(path) in str(error)
        raise ValueError(str(error) if named else f"{path}: {error}") from None
    source = {**parts.metadata.source, "format": found.NAME}
    return replace(parts, metadata=replace(parts.metadata, source=source))
