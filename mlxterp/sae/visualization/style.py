"""What all figures have in common: colours, sizes and axes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxterp.sae.visualization.fonts import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito, who chose them for all kinds of colour vision; grey comes last.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
MORE, LESS = "#0072B2", "#D55E00"
MARKERS = "osD^vPX"
FONT, SMALL = 9, 8  # points
# From white at 0, so that what is not there is not seen.
UPWARDS = ("#ffffff", "#9ecae8", MORE, "#00263e")
DOWNWARDS = ("#5c2800", LESS, "#f7bd94", "#ffffff")
UNKNOWN = "#dddddd"


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that is registered nowhere: nothing keeps it but its user."""
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


def new_axis(width: float = 6.4, height: float = 4.2) -> Axes:
    """The one axis of a new figure."""
    axis: Any = new_figure(width, height).subplots()
    return axis


def dress(ax: Axes, x: str = "", y: str = "", title: str = "") -> Figure:
    """Labels, sizes of type and two spines, as all figures have them; the figure of the axis."""
    for label, text, size in (
        (ax.xaxis.label, x, FONT),
        (ax.yaxis.label, y, FONT),
        (ax.title, title, FONT),
    ):
        write(label, text, fontsize=size)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=FONT)
    if (legend := ax.get_legend()) is not None:
        legend.set_frame_on(False)
        for text in legend.get_texts():
            write(text, text.get_text(), fontsize=FONT)
    figure: Any = ax.get_figure()
    return figure


def logarithmic(ax: Axes) -> None:
    """A logarithmic x axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")


def shades(low: float, high: float, cmap: str | None = None) -> tuple[Any, Any]:
    """A colour map and its scale for values from `low` to `high`: white is 0, blue above it, and
    vermilion below; or matplotlib's map of that name. What is not a number is grey."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    if cmap is not None:
        size = max(-low, high)
        scale = Normalize(-size, size) if low < 0 else Normalize(0, high or 1.0)
        return colormaps[cmap].with_extremes(bad=UNKNOWN), scale
    if low < 0:
        size = max(-low, high)
        colours, scale = (*DOWNWARDS, *UPWARDS[1:]), Normalize(-size, size)
    else:
        colours, scale = UPWARDS, Normalize(0, high or 1.0)
    return LinearSegmentedColormap.from_list("mlxterp", colours).with_extremes(bad=UNKNOWN), scale


def ink(colour: Sequence[float]) -> str:
    """Black or white, whichever can be read on a colour `(r, g, b, ...)` in [0, 1]."""
    linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.18 else "white"
