"""What layers predict, and what patching them brings back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.visualization.fonts import names, plain
from mlxterp.sae.visualization.matrices import plot_matrix
from mlxterp.sae.visualization.style import LESS, MORE, dress, new_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Prediction = tuple[int, float, str]


def plot_logit_lens(
    lens: Mapping[int, Sequence[Sequence[Prediction]]],
    tokens: Sequence[str] = (),
    label: str = "logit of the likeliest token",
    ax: Axes | None = None,
    cmap: str | None = None,
) -> Figure:
    """The likeliest token of each layer at each position, the last layer on top.

    `lens[layer][position]` are the predictions `(id, score, text)`, the likeliest first, of which
    the first is shown; `tokens` are those that the model read there. `label` says what the scores
    are, `cmap` names one of matplotlib's colour maps. Raises `ValueError` where layers differ in
    their positions, or from the tokens.
    """
    layers = sorted(lens, reverse=True)
    if not layers:
        raise ValueError("lens must have at least one layer, got none.")
    n = len(lens[layers[0]])
    wrong = [layer for layer in layers if len(lens[layer]) != n or not all(lens[layer])]
    if wrong:
        raise ValueError(f"Each layer must have {n} positions with a prediction; {wrong} have not.")
    columns = _columns(tokens, n)
    best = [[position[0] for position in lens[layer]] for layer in layers]
    return plot_matrix(
        np.array([[score for _, score, _ in row] for row in best]),
        columns,
        [str(layer) for layer in layers],
        label=label,
        row_label="layer",
        column_label="token",
        words=[[text for *_, text in row] for row in best],
        cmap=cmap,
        ax=ax,
    )


def plot_patching(
    recovery: Mapping[Any, float | Sequence[float] | np.ndarray],
    tokens: Sequence[str] = (),
    label: str = "recovered (%)",
    row_label: str = "layer",
    ax: Axes | None = None,
) -> Figure:
    """What patching brings back: a bar for each layer or, by layer and position, a heat map.

    `recovery[layer]` is one number, or one for each position (or head), in the unit that `label`
    says. `tokens` name the positions. Layers go upwards. Raises `ValueError` where they differ in
    their positions, or from the tokens.
    """
    if not recovery:
        raise ValueError("recovery must have at least one layer, got none.")
    layers = [str(layer) for layer in recovery]
    shapes = {np.shape(values) for values in recovery.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) > 1:
        raise ValueError(
            f"Each layer must have one number, or as many as the others, got shapes {[*shapes]}."
        )
    values = np.array([*recovery.values()], np.float64)
    if values.ndim == 1:
        return _bars(values, layers, label, row_label, ax)
    return plot_matrix(
        values[::-1],
        _columns(tokens, values.shape[1]),
        layers[::-1],
        label=label,
        row_label=row_label,
        column_label="token" if tokens else "position",
        ax=ax,
    )


def _columns(tokens: Sequence[str], n: int) -> list[str]:
    if tokens and len(tokens) != n:
        raise ValueError(f"tokens must be {n}, one for each position, got {len(tokens)}.")
    return [*tokens] or [str(i) for i in range(n)]


def _bars(
    values: np.ndarray, layers: Sequence[str], label: str, row_label: str, ax: Axes | None
) -> Figure:
    ax = new_axis(5.2, min(24.0, max(2.0, 0.9 + 0.24 * len(layers)))) if ax is None else ax
    ax.barh(range(len(layers)), values, color=[MORE if x >= 0 else LESS for x in values.tolist()])
    ax.set_yticks(range(len(layers)), names(layers), **plain())
    ax.axvline(0, color="0.3", linewidth=0.8)
    return dress(ax, label, row_label)
