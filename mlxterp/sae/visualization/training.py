"""The curves of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from mlxterp.sae.visualization.style import FONT, LESS, MORE, dress, new_figure

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
TRAINING = {"color": MORE, "linewidth": 1.0, "label": "training"}
HELD_OUT = {
    "color": LESS, "linewidth": 1.0, "linestyle": "--", "marker": "o", "markersize": 3.5,
    "label": "held out",
}  # fmt: skip


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
        panels[1].legend(frameon=False, fontsize=FONT, loc="upper right")
    figure: Any = panels[0].get_figure()
    return figure


def _new_axes() -> list[Axes]:
    figure = new_figure(8.4, 5.0)
    panels = list(chain(*figure.subplots(2, 2, sharex=True)))
    figure.align_ylabels(panels)
    return panels


def _points(reports: Reports, key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the reports that hold both; NaN, a gap, for other values."""
    held = [(r["tokens"], r[key]) for r in reports if {"tokens", key} <= r.keys()]
    values = [math.nan if value is None else float(value) for _, value in held]
    return [tokens for tokens, _ in held], [v if math.isfinite(v) else math.nan for v in values]


def _draw(ax: Axes, training: Reports, validation: Reports, key: str) -> None:
    from matplotlib.ticker import EngFormatter

    drawn: list[float] = []
    for reports, style in ((training, TRAINING), (validation, HELD_OUT)):
        tokens, values = _points(reports, key)
        # Dead features are counted while training: both kinds of report hold the same share.
        if tokens and not (key == "dead" and reports is validation):
            ax.plot(tokens, values, clip_on=False, **style)
            drawn += [value for value in values if not math.isnan(value)]
    if key == "dead":
        # A few dead features among thousands shall look like a few.
        ax.set_ylim(0, max(1.1 * max(drawn, default=1.0), 0.05))
        ax.locator_params(axis="y", nbins=5)
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    else:
        scale(ax, drawn, logarithmic=key in ("loss", "fvu"))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    place = ax.get_subplotspec()
    dress(ax, "tokens" if place is None or place.is_last_row() else "", PANELS[key])


def scale(ax: Axes, drawn: Sequence[float], logarithmic: bool = True) -> None:
    """The y axis from zero or, where that may be, logarithmic for a span of more than a factor of
    ten."""
    from matplotlib.ticker import LogLocator

    top, bottom = max(drawn, default=1.0), min(drawn, default=1.0)
    if logarithmic and bottom > 0 and top >= 10 * bottom:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(LogLocator(subs=()))
        ax.yaxis.set_major_formatter("{x:g}")
    else:
        ax.locator_params(axis="y", nbins=5)
        ax.set_ylim(0, 1.1 * top or 1.0)
