"""Something to look at: tables as text and HTML, runs and numbers as figures."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Reports = Sequence[Mapping[str, Any]]

PANELS = {
    "loss": "training loss",
    "fvu": "FVU (variance not explained)",
    "l0": "L0 (active features per token)",
    "dead": "dead features",
}
TRAINING = {"color": "#0072B2", "linewidth": 1.0, "label": "training"}
HELD_OUT = {
    "color": "#D55E00", "linewidth": 1.0, "linestyle": "--", "marker": "o", "markersize": 3.5,
    "label": "held out",
}  # fmt: skip
# Of Okabe and Ito, who chose them for all kinds of colour vision; grey comes last.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
BINS = 41  # an odd number, so that one half lies within a bin


@dataclass(frozen=True)
class Table:
    """A title, and rows of as many cells as the header has names; the first cell names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
        return "\n".join(
            [
                self.title,
                *(
                    f"  {line[0]:<{first}}"
                    + "".join(f"  {c:>{w}}" for c, w in zip(line[1:], widths, strict=True)).rstrip()
                    for line in lines
                ),
            ]
        )

    def _repr_html_(self) -> str:
        return render("table.html", table=self)


def render(template: str, **values: Any) -> str:
    from jinja2 import Environment

    text = resources.files("mlxterp.sae").joinpath("templates", template).read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(**values)


def plot_training(
    training: Reports, validation: Reports = (), axes: Sequence[Axes] | None = None
) -> Figure:
    """Loss, FVU, L0 and the share of dead features over tokens, one panel each.

    `training` and `validation` are reports as callbacks receive them; keys that a report lacks, and
    values that are not finite, leave gaps. Without four `axes` to draw on a figure is made; it is
    not registered anywhere, so it is shown by a notebook or written by its `savefig`. Raises
    `ImportError` where matplotlib is missing.
    """
    panels = _new_axes() if axes is None else list(axes)
    if len(panels) != len(PANELS):
        raise ValueError(f"axes must be {len(PANELS)}, got {len(panels)}.")
    for ax, key in zip(panels, PANELS, strict=True):
        _draw(ax, training, validation, key)
    if _points(validation, "fvu")[0]:
        panels[1].legend(frameon=False, fontsize=9, loc="upper right")
    figure: Any = panels[0].get_figure()
    return figure


def plot_shares(
    shares: np.ndarray, kinds: np.ndarray, order: Sequence[str], label: str, ax: Axes | None = None
) -> Figure:
    """A histogram of one number in [0, 1] for every feature, coloured by the feature's kind.

    `order` lists the kinds `[n_features]` that are drawn, from the bottom of the stack; `label`
    says what the number is. Features without a number are left out.
    """
    ax = new_axis() if ax is None else ax
    known = np.isfinite(shares)
    counts = Counter(kinds[known].tolist())
    shown = [kind for kind in order if counts[kind]]
    colours = {kind: COLOURS[min(i, len(COLOURS) - 1)] for i, kind in enumerate(order)}
    if shown:
        ax.hist(
            [shares[known & (kinds == kind)] for kind in shown],
            bins=np.linspace(0, 1, BINS + 1).tolist(),
            stacked=True,
            color=[colours[kind] for kind in shown],
            label=[f"{kind} ({counts[kind]:,})" for kind in shown],
        )
        ax.legend(frameon=False, fontsize=9)
    ax.set_xlim(0, 1)
    ax.set_xlabel(label, fontsize=9)
    ax.set_ylabel("features", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
    figure: Any = ax.get_figure()
    return figure


def plot_matrix(
    values: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str] = (),
    *,
    label: str,
    row_label: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A matrix as a heat map with named columns and, where given, named rows.

    Small ones have their values written into the cells; what is NaN stays white.
    """
    ax = new_axis() if ax is None else ax
    values = values if len(values) else np.full((1, len(columns)), np.nan)
    known = values[np.isfinite(values)]
    low, high = float(known.min(initial=0.0)), float(known.max(initial=1e-9))
    image = ax.imshow(
        values, vmin=low, vmax=high, cmap="viridis", aspect="auto", interpolation="nearest"
    )
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=9)
    if rows:
        ax.set_yticks(range(len(rows)), rows, fontsize=9)
    ax.set_ylabel(row_label, fontsize=9)
    if rows and values.size <= 150:
        for (i, j), value in np.ndenumerate(values):
            if math.isfinite(value):
                colour = "black" if value > (low + 2 * high) / 3 else "white"
                ax.text(j, i, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=8)
    figure: Any = ax.get_figure()
    bar = figure.colorbar(image, ax=ax)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=9)
    return figure


def new_axis() -> Axes:
    axis: Any = new_figure(6.4, 4.2).subplots()
    return axis


def _new_axes() -> list[Axes]:
    figure = new_figure(8.4, 5.0)
    panels = list(chain(*figure.subplots(2, 2, sharex=True)))
    figure.align_ylabels(panels)
    return panels


def new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is missing: pip install 'mlxterp[plot]'") from error

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            # Notebooks learn to show figures from pyplot only, which has global state.
            self.savefig(file := io.BytesIO(), format="png", dpi=120)
            return file.getvalue()

    return Shown(figsize=(width, height), layout="constrained")


def _points(reports: Reports, key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the reports that hold both; NaN, a gap, for other values."""
    held = [(r["tokens"], r[key]) for r in reports if {"tokens", key} <= r.keys()]
    values = [math.nan if value is None else float(value) for _, value in held]
    return [tokens for tokens, _ in held], [v if math.isfinite(v) else math.nan for v in values]


def _draw(ax: Axes, training: Reports, validation: Reports, key: str) -> None:
    drawn: list[float] = []
    for reports, style in ((training, TRAINING), (validation, HELD_OUT)):
        tokens, values = _points(reports, key)
        # Dead features are counted while training: both kinds of report hold the same share.
        if tokens and not (key == "dead" and reports is validation):
            ax.plot(tokens, values, clip_on=False, **style)
            drawn += [value for value in values if not math.isnan(value)]
    _scale(ax, key, drawn)
    ax.set_ylabel(PANELS[key], fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
    place = ax.get_subplotspec()
    if place is None or place.is_last_row():
        ax.set_xlabel("tokens", fontsize=9)


def _scale(ax: Axes, key: str, drawn: list[float]) -> None:
    """From zero, or logarithmic where loss and FVU span more than a factor of ten."""
    from matplotlib.ticker import EngFormatter, LogLocator

    top, bottom = max(drawn, default=1.0), min(drawn, default=1.0)
    if key in ("loss", "fvu") and bottom > 0 and top >= 10 * bottom:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(LogLocator(subs=()))
        ax.yaxis.set_major_formatter("{x:g}")
    else:
        # A few dead features among thousands shall look like a few.
        ax.locator_params(axis="y", nbins=5)
        ax.set_ylim(0, max(1.1 * top, 0.05) if key == "dead" else 1.1 * top or 1.0)
    if key == "dead":
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
