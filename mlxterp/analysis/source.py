"""All that the analyses need to know of a language model."""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from mlxterp.architecture import Architecture
from mlxterp.sae.source import FreezableSource


class Readable(FreezableSource, Protocol):
    """A language model whose activations can be read."""

    architecture: Architecture
    tokenizer: Any

    @property
    def n_layers(self) -> int: ...

    @property
    def d_model(self) -> int: ...

    def tokens(self, inputs: Any) -> tuple[mx.array, mx.array | None]: ...

    def trace(self, inputs: Any, *, capture: Any = None) -> Any: ...
