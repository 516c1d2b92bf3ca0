"""What is patched, one by one: layers, components, heads and positions, and groups of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import index
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxterp.analysis.heads import HeadPlace
from mlxterp.analysis.metrics import texts_of
from mlxterp.analysis.patches import Patch, Spot, Where
from mlxterp.sites import Site, UnknownSiteError

Group = tuple[int, ...]
Numbers = Literal["each"] | Sequence[int | Iterable[int]]
Layers = int | Sequence[int | Iterable[int]]
Components = str | Sequence[str | Iterable[str]]
ATTENTION = ("attn", "self_attn", "attention", "attn_out", "attn_z")


@dataclass(frozen=True)
class Axis:
    """One axis of a table of patches: what each entry is, and how it is called."""

    name: str
    entries: tuple[Any, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True, eq=False)
class Grid:
    """A table of patches; one is None where the model has no such place."""

    axes: tuple[Axis, ...]
    patches: tuple[Patch | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(map(len, self.axes))

    @property
    def wheres(self) -> list[Where]:
        """The sites and heads that are patched anywhere."""
        return [*dict.fromkeys(spot.where for patch in self.patches for spot in patch or ())]

    def filled(self, values: Iterable[float]) -> np.ndarray:
        """One value for each patch that there is, as a table with NaN in the place of others."""
        table = np.full(len(self.patches), np.nan)
        table[[i for i, patch in enumerate(self.patches) if patch is not None]] = [*values]
        return table.reshape(self.shape)


def numbers(name: str, given: Any, count: int) -> list[Group]:
    """Each of `count` numbers, or those given, one or several together; negative ones count from
    the end. Raises `ValueError` for others."""
    if isinstance(given, str):
        if given != "each":
            raise ValueError(f"{name} must be 'each' or a list of numbers, got {given!r}.")
        return [(i,) for i in range(count)]
    groups = []
    for entry in given if isinstance(given, Iterable) else [given]:
        group = tuple(map(index, entry if isinstance(entry, Iterable) else (entry,)))
        for number in group:
            if not -count <= number < count:
                raise ValueError(f"{name} must be in [{-count}, {count - 1}], got {number}.")
        groups.append(tuple(dict.fromkeys(number % count for number in group)))
    if not groups:
        raise ValueError(f"{name} must have at least one entry, got none.")
    return groups


def number_axis(name: str, groups: Sequence[Group], texts: Sequence[str] = ()) -> Axis:
    """The axis of such numbers, which have texts where these are given."""
    entries = tuple(group[0] if len(group) == 1 else group for group in groups)
    named = texts or [str(i) for i in range(1 + max((n for g in groups for n in g), default=0))]
    return Axis(name, entries, tuple(_label(group, named) for group in groups))


def _label(group: Group, named: Sequence[str]) -> str:
    if len(group) > 2 and group == tuple(range(group[0], group[-1] + 1)):
        return f"{named[group[0]]}-{named[group[-1]]}"
    return "+".join(named[number] for number in group) or "none"


def make_grid(
    model: Any,
    tokens: mx.array,
    component: Components,
    layers: Layers | None,
    positions: Numbers | None,
    heads: Numbers | None,
) -> Grid:
    """The patches that are asked for; see `activation_patching`."""
    given = [component] if isinstance(component, str) else [*component]
    components = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in given]
    if not components or not all(components):
        raise ValueError(f"component must be a name or a list of names, got {component!r}.")
    names = list(dict.fromkeys(name for group in components for name in group))
    every = range(model.n_layers)
    groups = [(n,) for n in every] if layers is None else numbers("layers", layers, len(every))
    wanted = sorted({n for group in groups for n in group})
    counts: dict[int, int] = {}
    if heads is None:
        places = _sites(model, names, wanted)
    else:
        if wrong := [name for name in names if name not in ATTENTION]:
            raise ValueError(f"heads are of attention, component='attn', not of {wrong[0]!r}.")
        counts = head_counts(model, tokens, None if layers is None else wanted)
        places = {(n, name): HeadPlace(n, "z") for n in counts for name in names}
    if layers is None:
        groups = [group for group in groups if any((group[0], name) in places for name in names)]
    axes, choices = [number_axis("layer", groups)], [groups, components, [None], [None]]
    if len(components) > 1:
        labels = tuple("+".join(group) for group in components)
        axes.append(Axis("component", labels, labels))
    if heads is not None:
        choices[2] = numbers("heads", heads, max(counts.values()))
        axes.append(number_axis("head", choices[2]))
    if positions is not None:
        choices[3] = numbers("positions", positions, tokens.shape[1])
        ids: Any = tokens[0].tolist()
        axes.append(number_axis("position", choices[3], texts_of(model, ids)))
    patches = []
    for layer_group, name_group, some, at in product(*choices):
        found = [places[n, name] for n in layer_group for name in name_group if (n, name) in places]
        spots = (_spot(where, at, some, counts) for where in found)
        patch = tuple(spot for spot in spots if spot is not None)
        patches.append(patch or None)
    return Grid(tuple(axes), tuple(patches))


def _sites(model: Any, names: Sequence[str], layers: Sequence[int]) -> dict[tuple[int, str], Where]:
    """The sites of components; raises what a single layer would where none has any."""
    places: dict[tuple[int, str], Where] = {}
    missing: UnknownSiteError | None = None
    for layer, name in product(layers, names):
        try:
            site = model.site(f"layers.{layer}.{name}")
        except UnknownSiteError as error:
            missing = missing or error
            continue
        table = model.architecture.table
        if site not in table or table[site].shape[:2] != ("B", "S"):
            shape = list(table[site].shape) if site in table else "one that is not known"
            raise ValueError(f"component {name!r}: {site} has the shape {shape}, not [B, S, ...].")
        places[layer, name] = site
    if missing is not None and not all(any((n, m) in places for n in layers) for m in names):
        raise missing
    return places


def head_counts(model: Any, tokens: mx.array, layers: Sequence[int] | None) -> dict[int, int]:
    """How many heads each layer has; nothing is computed to find them."""
    return {call.layer: call.q.shape[1] for call in model.attention(tokens, layers).calls}


def _spot(
    where: Where, positions: Group | None, heads: Group | None, counts: Mapping[int, int]
) -> Spot | None:
    """None for heads that a layer has not."""
    if heads is None or isinstance(where, Site):
        return Spot(where, positions)
    return Spot(where, positions, heads) if max(heads, default=0) < counts[where.layer] else None
