"""All that `mlxterp.sae` needs to know of a language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import mlx.core as mx
import numpy as np


class ActivationSource(Protocol):
    """A language model whose activations can be captured and edited."""

    name: str

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    @property
    def context_length(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...

    def to_str_tokens(self, input: Any) -> list[str]: ...

    def decode(self, tokens: Any) -> str: ...

    def site(self, layer: Any, component: str | None = None) -> Any: ...

    def sites(self) -> Iterable[Any]: ...

    def width(self, site: Any) -> int: ...

    def run(
        self, tokens: Any, *, capture: Any = (), edit: Any = None, stop: bool = False
    ) -> Any: ...

    def gradients(self, tokens: Any, sites: Any, metric: Any, *, edit: Any = None) -> Any: ...

    def unembed(self, hidden: mx.array) -> mx.array: ...

    def generate(self, prompt: Any, **kwargs: Any) -> Any: ...

    def editing(self, edits: Any) -> Any: ...


class FreezableSource(ActivationSource, Protocol):
    """A language model whose attention patterns can be read and, with the scales of its norms,
    held."""

    def frozen(self, at: Any = None) -> AbstractContextManager[None]: ...

    def attention(self, tokens: Any, layers: Any = None, *, edit: Any = None) -> Any: ...


def find_site(source: ActivationSource, layer: Any, component: str | None = None) -> Any:
    """The site of a layer and component, `mlp` where none is given, or of a whole name."""
    if component is None and isinstance(layer, (int, np.integer)):
        component = "mlp"
    return source.site(layer, component)
