"""Runs of a model in which some activations are those of another run, many in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxterp.analysis.heads import HeadEdit, HeadPlace, tapped
from mlxterp.analysis.metrics import Metric
from mlxterp.hooks import standing
from mlxterp.sae.memory import device_memory
from mlxterp.sites import Site

Where = Site | HeadPlace
Edits = Mapping[Site, Callable[[mx.array], mx.array]]
Taps = Mapping[HeadPlace, HeadEdit]
TOKENS_PER_PASS, ON_GPU = 4096, 16384
SHARE_OF_MEMORY = 0.25
ALIVE = 6  # of the widest activations of a layer at once, in a pass without derivatives


class Spot(NamedTuple):
    """What is replaced: a site, or heads of a layer, at some positions or (None) at all."""

    where: Where
    positions: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


Patch = tuple[Spot, ...]  # replaced together


@dataclass(frozen=True, eq=False)
class Recorded:
    """Activations of a run over one row of tokens: `[1, S, ...]` of a site or `[1, H, S, d]` of
    heads, each time that the pass goes through them."""

    values: Mapping[Where, tuple[mx.array, ...]]
    length: int

    def aligned(self, length: int, at_end: bool) -> Recorded:
        """The same for a run of another length, zeros where there is nothing."""
        if length == self.length:
            return self
        values = {
            where: tuple(_resized(x, 2 if isinstance(where, HeadPlace) else 1, length, at_end)
                         for x in arrays)
            for where, arrays in self.values.items()
        }  # fmt: skip
        return Recorded(values, length)


def record(model: Any, tokens: mx.array, wheres: Iterable[Where]) -> Recorded:
    """What a run over `tokens [1, S]` has at some sites and heads; heads of a layer in which no
    attention is seen are left out."""
    wheres = list(dict.fromkeys(wheres))
    places = [where for where in wheres if isinstance(where, HeadPlace)]
    sites = [where for where in wheres if isinstance(where, Site)]
    seen: dict[Where, list[mx.array]] = {site: [] for site in sites}
    with tapped(model.architecture, capture=places) as held:
        model.run(tokens, edit={site: _keeping(seen[site]) for site in sites})
    values = {where: tuple(arrays) for where, arrays in {**seen, **held}.items()}
    mx.eval(list(values.values()))
    return Recorded(values, tokens.shape[1])


@dataclass(frozen=True, eq=False)
class Reader:
    """What is measured of runs over the `tokens [1, S]`: a metric of the logits at a position.

    With `noise`, `{site: [n, S, ...]}`, there are n runs of each kind, and it is added in them.
    """

    model: Any
    tokens: mx.array
    metric: Metric
    position: int = -1
    noise: Mapping[Site, mx.array] = field(default_factory=dict)
    batch_rows: int | None = None

    @property
    def n_samples(self) -> int:
        """How many runs of each kind there are."""
        return next((len(x) for x in self.noise.values()), 1)

    def read(
        self, edits: Edits, taps: Taps, n_rows: int, samples: Sequence[int] | None = None
    ) -> mx.array:
        """The metric in each row of a batch, `[n_rows]`; `samples` says which noise each has."""
        tokens = mx.broadcast_to(self.tokens, (n_rows, self.tokens.shape[1]))
        which = mx.array([0] * n_rows if samples is None else [*samples])
        added = {site: _adding(x[which]) for site, x in self.noise.items()}
        both = {
            site: [f for f in (added.get(site), edits.get(site)) if f]
            for site in {**added, **edits}
        }
        return self.metric.measure(
            logits(self.model, tokens, both, taps, None if self.metric.whole else self.position)
        )

    def plain(self) -> np.ndarray:
        """The metric in the runs as they are, `[n_samples]`."""
        return np.concatenate(
            [np.array(self.read({}, {}, 1, [sample])) for sample in range(self.n_samples)]
        )

    def rows_per_pass(self, differentiated: bool = False) -> int:
        """How many rows there are in one pass, by what is given or what the memory allows."""
        if self.batch_rows is not None:
            return self.batch_rows
        length = self.tokens.shape[1]
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        usual = (TOKENS_PER_PASS if on_cpu else ON_GPU) // length
        memory = device_memory()
        if memory is None:
            return max(1, usual)
        row = _bytes_per_token(self.model, differentiated) * length
        return max(1, min(usual, int(SHARE_OF_MEMORY * memory.free / row)))

    def measure(self, patches: Sequence[Patch], source: Recorded, known: np.ndarray) -> np.ndarray:
        """The metric with each patch by itself, `[n, n_samples]`; `known [S]` are the positions at
        which the source has activations."""
        rows = [(patch, sample) for patch in patches for sample in range(self.n_samples)]
        found = [np.zeros(0)]
        for start in range(0, len(rows), size := self.rows_per_pass()):
            some = rows[start : start + size]
            edits, taps = replacing([patch for patch, _ in some], source, known)
            values = self.read(edits, taps, len(some), [sample for _, sample in some])
            found.append(np.array(values, np.float64))
        return np.concatenate(found).reshape(-1, self.n_samples)


def logits(model: Any, tokens: mx.array, edits: Any, taps: Taps, position: int | None) -> mx.array:
    """The logits `[B, vocab]` at a position, or at all, `[B, S, vocab]`, of an edited run.

    Those of a single position are computed from the last stream alone where there is one stream and
    nothing that stands changes what comes after it.
    """
    last = Site(model.n_layers - 1, "resid_post")
    architecture = model.architecture
    with tapped(architecture, taps):
        if position is None or not _ends_in_stream(model, last):
            out = model.run(tokens, edit=edits).output
            return out if position is None else out[:, position]
        done = model.run(tokens, capture=last, edit=edits, stop=True)
    return model.unembed(done[last][:, position])


def replacing(
    patches: Sequence[Patch], source: Recorded, known: np.ndarray
) -> tuple[dict[Site, Callable[[mx.array], mx.array]], dict[HeadPlace, HeadEdit]]:
    """Edits that put the source's activations where the patch of each row of a batch says."""
    by_place: dict[Where, list[tuple[int, Spot]]] = {}
    for row, patch in enumerate(patches):
        for spot in patch:
            by_place.setdefault(spot.where, []).append((row, spot))
    functions: dict[Where, HeadEdit] = {}
    for where, spots in by_place.items():
        values = source.values[where]
        if isinstance(where, HeadPlace):
            mask = _head_mask(spots, len(patches), known, values[0].shape[1])
        else:
            mask = _mask(spots, len(patches), known)
        functions[where] = _putting(mask, values)
    return sorted_out(functions)


def _mask(spots: Sequence[tuple[int, Spot]], n_rows: int, known: np.ndarray) -> np.ndarray:
    """Where each row is replaced, `[B, S]`."""
    mask = np.zeros((n_rows, len(known)), bool)
    for row, spot in spots:
        mask[row, slice(None) if spot.positions is None else list(spot.positions)] = True
    return mask & known


def _head_mask(
    spots: Sequence[tuple[int, Spot]], n_rows: int, known: np.ndarray, n_heads: int
) -> np.ndarray:
    """Where each row is replaced, `[B, H, S]`."""
    mask = np.zeros((n_rows, n_heads, len(known)), bool)
    for row, spot in spots:
        positions = range(len(known)) if spot.positions is None else spot.positions
        heads = range(n_heads) if spot.heads is None else spot.heads
        mask[row][np.ix_(heads, positions)] = True
    return mask & known


def sorted_out(
    functions: Mapping[Where, HeadEdit],
) -> tuple[dict[Site, Callable[[mx.array], mx.array]], dict[HeadPlace, HeadEdit]]:
    """Edits of sites and those of heads, for one pass, told how often it was there before."""
    edits = {w: _counting(f) for w, f in functions.items() if isinstance(w, Site)}
    return edits, {w: f for w, f in functions.items() if isinstance(w, HeadPlace)}


def _counting(function: HeadEdit) -> Callable[[mx.array], mx.array]:
    calls = count()
    return lambda x: function(x, next(calls))


def _keeping(values: list[mx.array]) -> Callable[[mx.array], mx.array]:
    def edit(x: mx.array) -> mx.array:
        values.append(x)
        return x

    return edit


def _putting(mask: np.ndarray, values: Sequence[mx.array]) -> HeadEdit:
    here = mx.array(mask).reshape(*mask.shape, *(1,) * (values[0].ndim - mask.ndim))
    return lambda x, call: mx.where(here, values[call].astype(x.dtype), x)


def _adding(noise: mx.array) -> Callable[[mx.array], mx.array]:
    return lambda x: x + noise.astype(x.dtype)


def _resized(x: mx.array, axis: int, length: int, at_end: bool) -> mx.array:
    """`x` cut or filled with zeros to a length along an axis; what is kept is at the end or not."""
    size = x.shape[axis]
    kept = mx.arange(max(0, size - length), size) if at_end else mx.arange(min(size, length))
    pad = [(0, 0)] * x.ndim
    missing = max(0, length - size)
    pad[axis] = (missing, 0) if at_end else (0, missing)
    return mx.pad(mx.take(x, kept, axis=axis), pad)


def _ends_in_stream(model: Any, last: Site) -> bool:
    """Whether logits are a function of one last stream, which nothing that stands changes."""
    architecture = model.architecture
    shape = architecture.table[last].shape if last in architecture.table else ()
    stands = standing(architecture) is not None or standing(architecture.model) is not None
    return len(shape) == 3 and shape[:2] == ("B", "S") and not stands


def _bytes_per_token(model: Any, differentiated: bool) -> int:
    """About what a pass holds for a token: all that layers compute where there are derivatives."""
    sizes = list(_widths(model))
    kept = sum(sizes) if differentiated else ALIVE * max(sizes)
    return 4 * (kept + (model.vocab_size or 0))


def _widths(model: Any) -> Iterator[int]:
    for info in model.architecture.table.values():
        yield math.prod(n for n in info.shape if isinstance(n, int))
