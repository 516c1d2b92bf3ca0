"""Read activations of many prompts, and what a hidden state predicts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxterp.architecture import Architecture
from mlxterp.sites import Site, SiteTable
from mlxterp.tracing import Captured


class Readable(Protocol):
    """What reading activations needs of a model."""

    architecture: Architecture

    @property
    def n_layers(self) -> int: ...

    def site(self, layer: Any, component: str | None = None) -> Site: ...

    def run(self, tokens: Any, *, capture: Any = (), stop: bool = False) -> Captured: ...

    def trace(self, inputs: Any, *, capture: Any = None) -> Any: ...


@dataclass
class ActivationCache:
    """Activations by name; a name may have or lack a leading `model.`."""

    activations: dict[str, mx.array] = field(default_factory=dict)
    metadata: dict[str, Any] | None = None

    def get(self, name: str) -> mx.array | None:
        """The activation called `name`, or None."""
        key = self._find(name)
        return None if key is None else self.activations[key]

    def keys(self) -> list[str]:
        """The names in call order."""
        return list(self.activations)

    def __getitem__(self, name: str) -> mx.array:
        key = self._find(name)
        if key is None:
            near = ", ".join(difflib.get_close_matches(name, self.keys(), n=4)) or "nothing like it"
            raise KeyError(f"no activation {name!r} in the cache; the nearest existing: {near}")
        return self.activations[key]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} activations)"

    def _repr_html_(self) -> str:
        sites = {Site.from_string(name): array for name, array in self.activations.items()}
        return SiteTable.of_arrays(f"{len(self)} activations", sites)._repr_html_()

    def _find(self, name: str) -> str | None:
        if name in self.activations:
            return name
        short = _short(name)
        return next((key for key in self.activations if _short(key) == short), None)


def _short(name: str) -> str:
    while name.startswith("model."):
        name = name.removeprefix("model.")
    return name


def collect_activations(
    model: Readable,
    inputs: Any,
    layers: Sequence[str] | None = None,
    normalize_keys: bool = True,
) -> ActivationCache:
    """All activations `[B, S, ...]` of one pass, or those of the sites spelt in `layers`.

    Names start at `layers.`, or with `normalize_keys=False` at the root, `model.`. Raises
    `ValueError` for an unknown name.
    """
    with model.trace(inputs, capture=layers) as trace:
        found = {
            _short(name) if normalize_keys else name: array
            for name, array in trace.activations.items()
            if name != "__model_output__"
        }
    return ActivationCache(found, {"input_shape": tuple(trace.tokens.shape)})


def get_activations(
    model: Readable,
    prompts: Any,
    layers: Sequence[int] | None = None,
    positions: int | Sequence[int] = -1,
) -> dict[str, mx.array]:
    """What the blocks return at some positions of each prompt: `{"layer_3": [B, d_model]}`.

    Several positions give `[B, P, d_model]`. Negative ones count from the last real token of each
    prompt. Raises `ValueError` for a layer or position that does not exist.
    """
    chosen = range(model.n_layers) if layers is None else _listed("layers", layers)
    wanted = [index(position) for position in _listed("positions", positions)]
    sites = {f"layer_{layer}": model.site(layer, "resid_post") for layer in chosen}
    done = model.run(prompts, capture=tuple(sites.values()), stop=True)
    picked = {name: _at(done, site, wanted) for name, site in sites.items()}
    mx.eval(picked)
    return picked


def batch_get_activations(
    model: Readable,
    prompts: Sequence[str],
    layers: Sequence[int] | None = None,
    positions: int | Sequence[int] = -1,
    batch_size: int = 8,
) -> dict[str, mx.array]:
    """`get_activations` of many prompts, `batch_size` of them at a time."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if isinstance(prompts, str):
        prompts = [prompts]
    if len(prompts) == 0:
        raise ValueError("prompts must have at least one text: the list is empty")
    parts = [
        get_activations(model, prompts[i : i + batch_size], layers, positions)
        for i in range(0, len(prompts), batch_size)
    ]
    return {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}


def _listed(name: str, value: Any) -> list:
    """`value` as a list, where it is one number or name too."""
    single = isinstance(value, str) or not isinstance(value, Iterable)
    if not (items := [value] if single else list(value)):
        raise ValueError(f"{name} must have at least one entry: the list is empty")
    return items


def _at(done: Captured, site: Site, positions: list[int]) -> mx.array:
    """The activation `[B, P, d]` at `positions` of each row, or `[B, d]` at a single one."""
    array = done[site]
    mask = mx.ones(array.shape[:2]) if done.mask is None else done.mask
    lengths: list[int] = np.array(mask.sum(axis=-1), dtype=int).tolist()
    shortest = min(lengths)
    for position in positions:
        if not -shortest <= position < shortest:
            raise ValueError(
                f"positions must be {-shortest} to {shortest - 1}, because the shortest prompt has "
                f"{shortest} tokens: {position}"
            )
    where = mx.array([[p % length for p in positions] for length in lengths])
    picked = mx.take_along_axis(array, where[..., None], axis=1)
    return picked[:, 0] if len(positions) == 1 else picked


def get_token_predictions(
    model: Readable,
    hidden_state: mx.array,
    top_k: int = 10,
    return_scores: bool = False,
    embedding_layer: nn.Module | None = None,
    lm_head: nn.Module | None = None,
) -> list:
    """The `top_k` ids (or `(id, score)`) of a hidden state `[d_model]`, the likeliest first.

    A batch `[B, d_model]` gives a list of lists. The state goes straight into the head: apply the
    final norm before, or use `InterpretableModel.unembed`, which does. Raises `ValueError` for
    another shape or a `top_k` out of range.
    """
    if hidden_state.ndim not in (1, 2):
        raise ValueError(
            f"hidden_state must be [d_model] or [B, d_model], not {hidden_state.shape}"
        )
    logits = _project(model, hidden_state, embedding_layer, lm_head)
    if not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k must be 1 to {logits.shape[-1]}, not {top_k}")
    best = mx.argsort(-logits, axis=-1)[..., :top_k]
    scores = mx.take_along_axis(logits, best, axis=-1).astype(mx.float32)
    rows, values = np.atleast_2d(best).tolist(), np.atleast_2d(scores).tolist()
    if return_scores:
        rows = [list(zip(ids, row, strict=True)) for ids, row in zip(rows, values, strict=True)]
    return rows if hidden_state.ndim == 2 else rows[0]


def _project(
    model: Readable,
    hidden: mx.array,
    embedding: nn.Module | None,
    head: nn.Module | None,
) -> mx.array:
    if head is None and embedding is None:
        head = model.architecture.head
    if head is not None:
        project: Any = head  # nn.Module itself declares no call
        return project(hidden)
    tied: Any = model.architecture.embedding if embedding is None else embedding
    if tied is None:
        raise ValueError(
            "this model has no head that could be found: give lm_head or embedding_layer"
        )
    return tied.as_linear(hidden)
