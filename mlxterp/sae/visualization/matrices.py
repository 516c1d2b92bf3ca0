"""Numbers by row and column as a heat map, whatever the rows and columns are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.visualization.fonts import names, plain, write
from mlxterp.sae.visualization.style import FONT, SMALL, dress, ink, new_axis, shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGEST_WRITTEN = 150  # cells that have their values written into them
LARGEST_NAMED = 600  # cells that have words
WIDEST = 24.0  # inches
WORD = 7.0  # the width of a word in a cell, in sizes of its font


def plot_matrix(
    values: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str] = (),
    *,
    label: str,
    row_label: str = "",
    column_label: str = "",
    words: Sequence[Sequence[str]] | None = None,
    cmap: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A matrix as a heat map with named columns and, where given, named rows.

    White is 0, unless one of matplotlib's maps is named as `cmap`; what is NaN is grey. Small ones
    have their values written into the cells, but those that are next to 0, or the `words`
    `[n_rows][n_columns]` that are given. `label` says what the values are. Without an `ax` the
    figure is as large as the names need.
    """
    values = np.asarray(values, np.float64).reshape(-1, len(columns))
    values = values if len(values) else np.full((1, len(columns)), np.nan)
    ax = _axis(values.shape, bool(rows), words is not None) if ax is None else ax
    known = values[np.isfinite(values)]
    colours, scale = shades(known.min(initial=0.0), known.max(initial=1e-9), cmap)
    image = ax.imshow(
        np.ma.masked_invalid(values), norm=scale, cmap=colours, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    figure = dress(ax, column_label, row_label)
    ax.spines[["left", "bottom"]].set_visible(False)
    upright = max(map(len, columns), default=0) <= 3 and len(columns) <= 24
    turned: Any = {"rotation": 0} if upright else {"rotation": 40, "ha": "right"}
    _name(ax.xaxis, columns, rotation_mode="anchor", **turned)
    if rows:
        _name(ax.yaxis, rows)
    if words is not None and values.size <= LARGEST_NAMED:
        _fill(ax, image, values, [names(row, WORD) for row in words])
    elif words is None and rows and values.size <= LARGEST_WRITTEN:
        least = 0.005 * np.abs(known).max(initial=0.0)
        written = [[_figure(x) if abs(x) >= least else "" for x in row] for row in values]
        _fill(ax, image, values, written)
    bar = figure.colorbar(image, ax=ax)
    write(bar.ax.yaxis.label, label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    return figure


def _axis(shape: tuple[int, int], named: bool, worded: bool) -> Axes:
    rows, columns = shape
    width, height = (0.75, 0.26) if worded else (0.34, 0.24)
    return new_axis(
        min(WIDEST, max(6.4, 1.8 + width * columns)),
        min(WIDEST, max(4.2 if not named or rows > 8 else 2.8, 1.2 + height * rows * named)),
    )


def _name(axis: Any, contents: Sequence[str], **style: Any) -> None:
    size = FONT if len(contents) <= 40 else SMALL
    axis.set_ticks(range(len(contents)), names(contents), fontsize=size, **plain(), **style)


def _fill(ax: Axes, image: Any, values: np.ndarray, cells: Sequence[Sequence[str]]) -> None:
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if np.isfinite(values[i, j]):
                style: Any = {"color": ink(image.to_rgba(values[i, j])), "fontsize": SMALL}
                ax.text(j, i, cell, ha="center", va="center", **style, **plain())


def _figure(value: float) -> str:
    return f"{value:.0f}" if 100 <= abs(value) < 1e5 else f"{value:.2g}"
