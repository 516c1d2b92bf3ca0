"""The activations of many prompts, by name and by position."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.analysis.source import Readable
from mlxterp.sites import Site, SiteTable
from mlxterp.tracing import Captured


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
