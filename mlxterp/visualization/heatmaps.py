"""Patterns of attention as figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mlxterp.attention import Attention
from mlxterp.sae.visualization.fonts import names, plain, write
from mlxterp.sae.visualization.style import FONT, SMALL, dress, new_axis, new_figure
from mlxterp.trace import Trace
from mlxterp.visualization.interactive import (
    AttentionPage,
    InteractiveAttentionConfig,
    interactive_attention,
)
from mlxterp.visualization.patterns import (
    Head,
    Patterns,
    as_array,
    check_tokens,
    get_attention_patterns,
    some_heads,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BACKENDS = ("auto", "matplotlib")
INCH = 100  # pixels
LARGEST_GRID = 16  # heads, where none are named
TILE = 2.5  # inches
NAMED = 24  # tokens with names beside a small map


@dataclass
class AttentionVisualizationConfig:
    """How patterns are drawn: matplotlib's `colorscale`, sizes in pixels, heads in a row.

    `mask_upper_tri` leaves out keys after the query. `hover_info` is of the interactive view,
    which always has it.
    """

    colorscale: str = "Blues"
    mask_upper_tri: bool = True
    show_colorbar: bool = True
    figure_width: int = 800
    figure_height: int = 600
    heads_per_row: int = 4
    hover_info: bool = True
    backend: str = "auto"


def attention_heatmap(
    attention: Any,
    tokens: Sequence[str],
    head_idx: int = 0,
    title: str | None = None,
    config: AttentionVisualizationConfig | None = None,
    backend: str = "auto",
    *,
    ax: Axes | None = None,
) -> Figure:
    """A heat map of one pattern, queries down and keys across.

    `attention` is `[B, H, S, T]`, of which the first of the batch is shown, `[H, S, T]` or
    `[S, T]`. The colours begin at 0 and end at the largest value. Raises `ValueError` for other
    shapes, a head that there is not, and tokens that are not as many as the keys.
    """
    config = _checked(config, backend)
    pattern = as_array(attention)
    if pattern.ndim > 4:
        raise ValueError(f"attention must have 2, 3 or 4 axes, not {pattern.ndim}")
    if pattern.ndim > 2:
        pattern = pattern[0] if pattern.ndim == 4 else pattern
        if not -len(pattern) <= head_idx < len(pattern):
            raise ValueError(f"head_idx must be in [0, {len(pattern) - 1}], not {head_idx}")
        pattern = pattern[head_idx]
    tokens = check_tokens(tokens, pattern.shape[1])
    if ax is None:
        ax = new_axis(config.figure_width / INCH, config.figure_height / INCH)
    image = _draw(ax, pattern, config, float(pattern.max()))
    figure = dress(ax, "key", "query", title or "")
    _name(ax, tokens, pattern.shape[0])
    if config.show_colorbar:
        _bar(figure, image, ax)
    return figure


def attention_from_trace(
    trace: Trace | Attention | Patterns,
    tokens: Sequence[str],
    layers: int | Iterable[int] | None = None,
    heads: Iterable[Head] | None = None,
    mode: Literal["grid", "single", "interactive"] | str = "grid",
    head_notation: Literal["LH", "dot"] | str = "LH",
    config: AttentionVisualizationConfig | None = None,
) -> Figure | AttentionPage:
    """The patterns of a trace: a "grid" of heads, a "single" one, or the "interactive" page.

    `heads` are `(layer, head)`; where none are named a grid has the first 16 of the `layers` and
    says so, and a single map has the first. Titles are `L0H1` or, with "dot", `0.1`. All maps of a
    grid have the same colours, from 0 to 1. Raises `ValueError` for what there is not.
    """
    config = _checked(config)
    for name, value, allowed in (
        ("mode", mode, ("grid", "single", "interactive")),
        ("head_notation", head_notation, ("LH", "dot")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    heads = None if heads is None else list(heads)
    if heads and layers is None:
        layers = sorted({layer for layer, _ in heads})
    patterns = get_attention_patterns(trace, layers)
    if mode == "interactive":
        shown = None if heads is None else some_heads(patterns, heads)
        page = InteractiveAttentionConfig(colorscale=config.colorscale)
        return interactive_attention(patterns, tokens, page, heads=shown)
    every = some_heads(patterns, heads)
    if mode == "single":
        layer, head = every[0]
        title = _title(layer, head, head_notation)
        return attention_heatmap(patterns[layer], tokens, head, title, config)
    chosen = every if heads is not None else every[:LARGEST_GRID]
    figure = _grid(patterns, tokens, chosen, head_notation, config)
    if len(chosen) < len(every):
        figure.suptitle(f"The first {len(chosen)} of {len(every)} heads", fontsize=FONT)
    return figure


def _grid(
    patterns: Patterns,
    tokens: Sequence[str],
    heads: Sequence[Head],
    notation: str,
    config: AttentionVisualizationConfig,
) -> Figure:
    n_columns = min(max(1, config.heads_per_row), len(heads))
    n_rows = -(-len(heads) // n_columns)
    figure = new_figure(TILE * n_columns + 1.2, TILE * n_rows + 0.6)
    axes: Any = figure.subplots(n_rows, n_columns, squeeze=False)
    image: Any = None
    for i, ax in enumerate(axes.flat):
        if i >= len(heads):
            ax.set_axis_off()
            continue
        layer, head = heads[i]
        pattern = patterns[layer][0, head]
        image = _draw(ax, pattern, config, 1.0)
        dress(ax, title=_title(layer, head, notation))
        named = check_tokens(tokens, pattern.shape[1])
        last = i + n_columns >= len(heads)
        _name(ax, named, pattern.shape[0], x=last, y=i % n_columns == 0, most=NAMED)
    if config.show_colorbar:
        _bar(figure, image, axes)
    return figure


def _draw(ax: Axes, pattern: np.ndarray, config: AttentionVisualizationConfig, high: float) -> Any:
    from matplotlib import colormaps

    n_queries, n_keys = pattern.shape
    hidden = np.zeros(pattern.shape, bool)
    if config.mask_upper_tri:
        hidden = ~np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool)
    colours = colormaps[config.colorscale].with_extremes(bad=(0, 0, 0, 0))
    return ax.imshow(
        np.ma.array(pattern, mask=hidden), cmap=colours, vmin=0, vmax=high or 1.0,
        interpolation="nearest", aspect="equal",
    )  # fmt: skip


def _name(
    ax: Axes,
    tokens: Sequence[str],
    n_queries: int,
    x: bool = True,
    y: bool = True,
    most: int = 80,
) -> None:
    """Tokens beside a map, or positions where there are too many to be read."""
    size = FONT if most > NAMED and len(tokens) <= 40 else SMALL - 2 * (most <= NAMED)
    if len(tokens) > most:
        ax.tick_params(labelbottom=x, labelleft=y, labelsize=SMALL)
        return
    ax.tick_params(length=0)
    style: Any = {"fontsize": size, **plain()}
    shown = names(tokens, 8.0 if most <= NAMED else 14.0)
    turned: Any = {"rotation": 90}
    ax.set_xticks(range(len(tokens)), shown if x else [""] * len(tokens), **turned, **style)
    own = shown[len(tokens) - n_queries :]
    ax.set_yticks(range(n_queries), own if y else [""] * n_queries, **style)


def _bar(figure: Figure, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes)
    write(bar.ax.yaxis.label, "attention", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)


def _title(layer: int, head: int, notation: str) -> str:
    return f"L{layer}H{head}" if notation == "LH" else f"{layer}.{head}"


def _checked(
    config: AttentionVisualizationConfig | None, backend: str = "auto"
) -> AttentionVisualizationConfig:
    config = config or AttentionVisualizationConfig()
    for name in (backend, config.backend):
        if name not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(BACKENDS)}, not {name!r}; what can be hovered "
                "over is interactive_attention"
            )
    return config
