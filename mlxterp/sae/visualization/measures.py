"""Numbers of features and of coders: shares, firing rates, and what sparsity costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.visualization.fonts import names, plain
from mlxterp.sae.visualization.style import COLOURS, FONT, MARKERS, dress, logarithmic, new_axis
from mlxterp.sae.visualization.training import scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 41  # an odd number, so that one half lies within a bin
RATE_BINS = 40
LOSSES = (
    ("clean", "as it is", COLOURS[0], "o"),
    ("spliced", "with the coder", COLOURS[2], "D"),
    ("ablated", "mean-ablated", COLOURS[5], "s"),
)


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
        ax.legend()
    ax.set_xlim(0, 1)
    return dress(ax, label, "features")


def plot_density(rates: np.ndarray | Mapping[str, np.ndarray], ax: Axes | None = None) -> Figure:
    """How many features fire on which share of the tokens: a histogram on a logarithmic axis.

    `rates` `[n_features]` are the shares of one coder, or of several by name. Features that never
    fire are counted in the title, or the legend. Raises `ValueError` for a number outside [0, 1].
    """
    several = dict(rates) if isinstance(rates, Mapping) else {"": rates}
    found = {name: np.asarray(given, np.float64).reshape(-1) for name, given in several.items()}
    for name, given in found.items():
        if not ((given >= 0) & (given <= 1)).all():
            raise ValueError(f"rates{f' of {name!r}' * bool(name)} must be in [0, 1].")
    ax = new_axis() if ax is None else ax
    above = np.concatenate([*found.values(), np.zeros(0)])
    least = math.floor(math.log10(above[above > 0].min(initial=0.1)))
    bins = np.logspace(least, 0, RATE_BINS + 1)
    bins[0], bins[-1] = 10.0**least * (1 - 1e-9), 1.0
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    silent = {n: f"{(r == 0).sum():,} of {len(r):,} never fire" for n, r in found.items()}
    for (name, given), colour in zip(found.items(), COLOURS * len(found), strict=False):
        style: dict[str, Any] = {"color": colour}
        if len(found) > 1:
            style |= {"histtype": "step", "linewidth": 1.4, "label": f"{name} ({silent[name]})"}
        ax.hist(given, bins=bins.tolist(), **style)
    if len(found) > 1:
        ax.legend()
    ax.set_xlim(10.0**least, 1)
    title = next(iter(silent.values())) if len(found) == 1 else ""
    return dress(ax, "share of the tokens on which a feature fires", "features", title)


def plot_frontier(measured: Mapping[str, Any], ax: Axes | None = None) -> Figure:
    """FVU over L0: what sparsity costs, a line for each name; nearer to the corner is better.

    Each name has one measurement or several, such as of coders of other sparsity. A measurement is
    what has an `fvu` and an `l0` (`Fidelity`), a coder, which has them from its training (on
    held-out data, where there were any), or a pair `(l0, fvu)`. Raises `ValueError` for none, and
    for what is neither.
    """
    curves = {name: sorted(_points(name, given)) for name, given in measured.items()}
    if not curves:
        raise ValueError("measured must have at least one name with measurements, got none.")
    ax = new_axis() if ax is None else ax
    for i, (name, points) in enumerate(curves.items()):
        l0, fvu = zip(*points, strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        ax.plot(l0, fvu, color=colour, marker=marker, markersize=5, linewidth=1.2, label=name)
    every = [point for points in curves.values() for point in points]
    smallest, largest = (pick(l0 for l0, _ in every) for pick in (min, max))
    if smallest > 0 and largest >= 4 * smallest:
        logarithmic(ax)
    else:
        ax.set_xlim(0, 1.1 * largest or 1.0)
    scale(ax, [fvu for _, fvu in every])
    if len(curves) > 1 or "" not in curves:
        ax.legend(fontsize=FONT)
    return dress(ax, "L0 (active features per token)", "FVU (variance not explained)")


def plot_losses(found: Mapping[str, Any], ax: Axes | None = None) -> Figure:
    """A line for each name, from the loss of the model as it is to that with its activation
    replaced by the mean, and where the loss with the coder's output lies between them.

    Each has `clean`, `spliced` and `ablated`, in nats per token, as `LossRecovered` has.
    """
    ax = new_axis(6.4, 1.3 + 0.28 * len(found)) if ax is None else ax
    for i, losses in enumerate(found.values()):
        ax.plot([losses.clean, losses.ablated], [i, i], color="0.75", linewidth=1.5, zorder=1)
    places = range(len(found))
    for key, name, colour, marker in LOSSES:
        values = [getattr(losses, key) for losses in found.values()]
        ax.scatter(values, places, s=36, color=colour, marker=marker, label=name, zorder=2)
    ax.set_yticks(places, names(found), **plain())
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(LOSSES))
    return dress(ax, "loss (nats per token)")


def _points(name: str, given: Any) -> list[tuple[float, float]]:
    single = _point(given)
    several = [single] if single is not None else [_point(x) for x in _listed(given)]
    points = [(l0, fvu) for l0, fvu in filter(None, several) if math.isfinite(l0 + fvu)]
    if not points or None in several:
        raise ValueError(
            f"{name!r} must have measurements: what has an fvu and an l0, coders that were "
            f"trained, or finite pairs (l0, fvu); got {given!r:.80}."
        )
    return points


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]


def _point(given: Any) -> tuple[float, float] | None:
    """L0 and FVU of one measurement; None where it is none."""
    if hasattr(given, "fvu") and hasattr(given, "l0"):
        return float(given.l0), float(given.fvu)
    if (statistics := getattr(given, "statistics", None)) is not None:
        reports = statistics.validation or statistics.training
        return (float(reports[-1]["l0"]), float(reports[-1]["fvu"])) if reports else None
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(map(_is_number, given)):
        return float(given[0]), float(given[1])
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
