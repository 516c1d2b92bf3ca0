"""What patching brings back, by layer, component, head and position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.analysis.grid import Axis
from mlxterp.notebook import Table, show, visible
from mlxterp.sae.visualization import MORE, dress, new_axis, plot_matrix, plot_patching

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Place = tuple[int, ...]
WIDEST = 16  # columns of a table
SHOWN = 10
UNIT = "recovered (%)"


@dataclass(frozen=True)
class Entry:
    """One entry of a result: where it is, by axis, and what it recovers in percent."""

    where: Mapping[str, Any]
    label: str
    recovered: float


@dataclass(frozen=True, eq=False)
class PatchingResult(Mapping[Any, Any]):
    """How much of the difference between two runs single activations carry over, in percent.

        recovered = 100 (m(patched) - m(base)) / (m(source) - m(base))

    The `base` run gets activations of the `source` run; m is the metric. A mapping from layers (or
    what else the first of the `axes` has) to what is recovered: a number, or an array by the other
    axes. `recovered` is all of it, `[n_layers, ...]`: NaN where the model has no such place, and
    everywhere where the runs hardly differ, for the `reason` that is given. `spread` is the
    standard error of `recovered` where that is a mean over several runs, `figure` what `plot=True`
    drew.
    """

    title: str
    recovered: np.ndarray
    axes: tuple[Axis, ...]
    metric: str
    source: float
    base: float
    direction: str = "denoising"
    tokens: tuple[str, ...] = ()
    reason: str = ""
    spread: np.ndarray | None = None
    figure: Figure | None = None
    measure: Callable[[Sequence[Place]], np.ndarray] | None = field(default=None, repr=False)

    @property
    def clean(self) -> float:
        """The metric in the clean run."""
        return self.source if self.direction == "denoising" else self.base

    @property
    def corrupted(self) -> float:
        """The metric in the corrupted run."""
        return self.base if self.direction == "denoising" else self.source

    @property
    def effects(self) -> np.ndarray:
        """What patching adds to the metric, in its own unit."""
        return self.recovered / 100 * (self.source - self.base)

    def __getitem__(self, key: Any) -> Any:
        if key not in self.axes[0].entries:
            held = ", ".join(map(str, self.axes[0].entries))
            raise KeyError(f"no {self.axes[0].name} {key!r} in this result, which has {held}")
        found = self.recovered[self.axes[0].entries.index(key)]
        return float(found) if np.ndim(found) == 0 else found

    def __iter__(self) -> Iterator[Any]:
        return iter(self.axes[0].entries)

    def __len__(self) -> int:
        return len(self.axes[0])

    def strongest(self, n: int = SHOWN) -> list[Entry]:
        """The entries that recover most, or do most harm, the strongest first."""
        return [self._entry(place) for place in self._order()[:n]]

    def verify(self, top: int = SHOWN) -> Verification:
        """Patch the strongest entries really, to have what that recovers beside the estimate.

        Raises `ValueError` for a result that was measured in the first place.
        """
        if self.measure is None:
            raise ValueError("verify is for estimates: these values were measured")
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}.")
        places = self._order()[:top]
        measured = self.measure(places) if places else np.zeros(0)
        return Verification(tuple(map(self._entry, places)), measured)

    @property
    def table(self) -> Table:
        """What is recovered, by layer and the last axis, or the strongest where they are many."""
        title = f"{self.title}: {UNIT}\n{self.metric}: {self._values()}"
        if self.reason:
            return Table(f"{title}\nnot known: {self.reason}", ("",), ())
        *rows, last = self.axes
        if not rows or len(last) > WIDEST or len(rows) > 2:
            entries = self.strongest() if rows else [self._entry((i,)) for i in range(len(last))]
            written = ((entry.label, _percent(entry.recovered)) for entry in entries)
            return Table(title, ("strongest" if rows else "", "recovered"), (*written,))
        names = [" ".join(parts) for parts in product(*(axis.labels for axis in rows))]
        cells = self.recovered.reshape(len(names), len(last))
        lines = ((name, *map(_percent, row)) for name, row in zip(names, cells, strict=True))
        header = (" ".join(axis.name for axis in rows), *map(visible, last.labels))
        return Table(title, header, (*lines,))

    def _values(self) -> str:
        return f"{self.clean + 0.0:.4g} clean, {self.corrupted + 0.0:.4g} corrupted"

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, None in the place of NaN."""
        return {
            "title": self.title,
            "recovered": _plain(self.recovered),
            "axes": {axis.name: list(axis.labels) for axis in self.axes},
            "metric": self.metric,
            "clean": self.clean,
            "corrupted": self.corrupted,
            "direction": self.direction,
            "tokens": list(self.tokens),
            "reason": self.reason,
            "spread": None if self.spread is None else _plain(self.spread),
        }

    def plot(
        self,
        ax: Axes | None = None,
        *,
        figsize: tuple[float, float] | None = None,
        cmap: str | None = None,
    ) -> Figure:
        """A bar for each layer, or a heat map by the last axis with a row for each of the others.

        `figsize` in inches and a colour map of matplotlib take the place of the usual ones. Raises
        `ValueError` where nothing is known.
        """
        if self.reason:
            raise ValueError(f"there is nothing to plot: {self.reason}")
        ax = new_axis(*figsize) if ax is None and figsize is not None else ax
        *rows, last = self.axes
        if not rows:
            found = dict(zip(last.labels, self.recovered, strict=True))
            return plot_patching(found, label=UNIT, row_label=last.name, ax=ax)
        names = [" ".join(parts) for parts in product(*(axis.labels for axis in rows))]
        figure = plot_matrix(
            self.recovered.reshape(len(names), len(last))[::-1],
            last.labels,
            names[::-1],
            label=UNIT,
            row_label=", ".join(axis.name for axis in rows),
            column_label=last.name,
            ax=ax,
        )
        if cmap is not None:
            figure.axes[0].images[0].set_cmap(cmap)
        return figure

    def _order(self) -> list[Place]:
        """The places of what is known, the strongest first."""
        sizes = np.abs(self.recovered).ravel()
        order = np.argsort(-np.nan_to_num(sizes), kind="stable").tolist()
        return [
            tuple(map(int, np.unravel_index(i, self.recovered.shape)))
            for i in order
            if not np.isnan(sizes[i])
        ]

    def _entry(self, place: Place) -> Entry:
        axes = list(zip(self.axes, place, strict=True))
        label = ", ".join(_named(axis, i) for axis, i in axes)
        where = {axis.name: axis.entries[i] for axis, i in axes}
        return Entry(where, label, float(self.recovered[place]))


@dataclass(frozen=True, eq=False)
class Verification:
    """Estimates of some patches, `entries`, and what the patches recover really, `measured [n]`."""

    entries: tuple[Entry, ...]
    measured: np.ndarray

    @property
    def estimated(self) -> np.ndarray:
        """What was estimated, `[n]`."""
        return np.array([entry.recovered for entry in self.entries])

    @property
    def correlation(self) -> float:
        """Of estimates and measurements; NaN where there are fewer than two different ones."""
        return correlation(self.estimated, self.measured)

    @property
    def table(self) -> Table:
        """Both, side by side."""
        rows = tuple(
            (entry.label, _percent(entry.recovered), _percent(value))
            for entry, value in zip(self.entries, self.measured.tolist(), strict=True)
        )
        title = f"Estimates patched really: {UNIT}, correlation {self.correlation:.3f}"
        return Table(title, ("", "estimated", "measured"), rows)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "entries": [entry.label for entry in self.entries],
            "estimated": self.estimated.tolist(),
            "measured": self.measured.tolist(),
        }

    def plot(self, ax: Axes | None = None) -> Figure:
        """The measured over the estimated; on the line they are equal."""
        ax = new_axis(4.2, 4.2) if ax is None else ax
        ax.plot(self.estimated, self.measured, "o", color=MORE, markersize=4)
        ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8)
        return dress(ax, "estimated (%)", "measured (%)")


def drawn(
    result: PatchingResult, plot: bool, figsize: tuple[float, float], cmap: str
) -> PatchingResult:
    """The result, if it is to be with a `figure`, which a notebook shows."""
    if not plot or result.reason:
        return result
    figure = result.plot(figsize=figsize, cmap=cmap)
    show(figure)
    return replace(result, figure=figure)


def correlation(estimated: np.ndarray, measured: np.ndarray) -> float:
    """The correlation of what is known of both; NaN where one is constant."""
    known = np.isfinite(estimated) & np.isfinite(measured)
    a, b = (x[known] - x[known].mean() if known.any() else x[known] for x in (estimated, measured))
    size = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / size) if size else float("nan")


def _named(axis: Axis, i: int) -> str:
    text = f"{axis.name} {axis.entries[i]}"
    label = axis.labels[i]
    return text if str(axis.entries[i]) == label else f"{text} '{visible(label)}'"


def _plain(values: np.ndarray) -> list:
    """The values with None in the place of NaN."""
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()


def _percent(value: float) -> str:
    return "" if np.isnan(value) else f"{round(value, 1) + 0.0:.1f}"  # never -0.0
