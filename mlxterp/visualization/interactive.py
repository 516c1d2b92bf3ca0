"""Patterns of attention as a page that needs nothing but itself: point, choose, compare."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxterp.attention import Attention
from mlxterp.notebook import render, show, visible
from mlxterp.sae.files import write_text
from mlxterp.trace import Trace
from mlxterp.visualization.patterns import (
    Head,
    Patterns,
    check_tokens,
    get_attention_patterns,
    some_heads,
)

STEPS = 2**16 - 1  # between 0 and 1
LARGEST = 2**26  # bytes of a page
# On white and on black, as red, green and blue.
ACCENTS = {
    "Blues": ("0 90 160", "86 180 233"),
    "Greens": ("0 100 60", "60 200 140"),
    "Greys": ("20 20 20", "240 240 240"),
    "Oranges": ("170 75 0", "255 160 70"),
    "Purples": ("84 39 143", "190 160 240"),
    "Reds": ("165 15 21", "255 120 110"),
}


@dataclass
class InteractiveAttentionConfig:
    """How the page looks: its `title`, the size of the large map in pixels, the name of its
    colours, and whether it shows the chosen token in all layers."""

    title: str = "Attention Patterns"
    heatmap_size: int = 350
    colorscale: str = "Blues"
    show_layer_flow: bool = True


class AttentionPage(str):
    """The HTML of a page, which a notebook shows in a frame of its own."""

    height: int = 900

    def __repr__(self) -> str:
        return f"AttentionPage({len(self.encode()) / 1000:.0f} kB of HTML)"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self)}" sandbox="allow-scripts" title="Attention" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, which replaces one that is there."""
        return write_text(path, str(self))


def interactive_attention(
    attention_patterns: Patterns | Attention,
    tokens: Sequence[str],
    config: InteractiveAttentionConfig | None = None,
    *,
    heads: Iterable[Head] | None = None,
) -> AttentionPage:
    """An HTML page of patterns `{layer: [B, H, S, T]}`, of which the first of the batch is shown.

    One file that asks the network for nothing. Pointing at a cell shows its value; heads and tokens
    are chosen by mouse or arrow keys. `heads` are `(layer, head)`, all where None. Values are
    rounded to 1/65535. Raises `ValueError` for tokens that are not as many as the keys, layers of
    different lengths, weights outside [0, 1], and more of them than a browser would show.
    """
    config = config or InteractiveAttentionConfig()
    if config.colorscale not in ACCENTS:
        raise ValueError(f"colorscale must be one of {', '.join(ACCENTS)}: {config.colorscale!r}")
    if config.heatmap_size < 100:
        raise ValueError(f"heatmap_size must be >= 100, not {config.heatmap_size}")
    patterns = _arrays(attention_patterns)
    shapes = {x.shape[2:] for x in patterns.values()}
    if len(shapes) != 1:
        raise ValueError(f"all layers must have the same queries and keys, not {sorted(shapes)}")
    (shape,) = shapes
    chosen = some_heads(patterns, heads)
    if 8 / 3 * len(chosen) * shape[0] * shape[1] > LARGEST:
        raise ValueError(
            f"{len(chosen)} heads of {shape[0]} x {shape[1]} tokens are more than a page of "
            f"{LARGEST // 2**20} MB can show: name layers, or heads"
        )
    by_layer = {layer: [h for at, h in chosen if at == layer] for layer, _ in chosen}
    content = {
        "tokens": [visible(token) for token in check_tokens(tokens, shape[1])],
        "layers": [_layer(layer, own, patterns[layer][0]) for layer, own in by_layer.items()],
    }
    page = AttentionPage(
        render(
            "attention.html", title=config.title, size=config.heatmap_size, content=content,
            accent=ACCENTS[config.colorscale], flow=config.show_layer_flow,
        )
    )  # fmt: skip
    page.height = config.heatmap_size + 450 + 20 * len(by_layer) * config.show_layer_flow
    return page


def display_interactive_attention(
    attention_patterns: Patterns | Attention,
    tokens: Sequence[str],
    config: InteractiveAttentionConfig | None = None,
) -> None:
    """Show the page below the cell of a notebook that is running; nothing happens elsewhere."""
    show(interactive_attention(attention_patterns, tokens, config))


def save_interactive_attention(
    attention_patterns: Patterns | Attention,
    tokens: Sequence[str],
    filepath: str | Path,
    config: InteractiveAttentionConfig | None = None,
) -> Path:
    """Write the page to a file that any browser opens, and return its path."""
    return interactive_attention(attention_patterns, tokens, config).save(filepath)


def interactive_attention_from_trace(
    trace: Trace | Attention | Patterns,
    tokens: Sequence[str],
    layers: int | Iterable[int] | None = None,
    config: InteractiveAttentionConfig | None = None,
) -> AttentionPage:
    """The page of some layers of a trace, or of what `model.attention` returned."""
    return interactive_attention(get_attention_patterns(trace, layers), tokens, config)


def _arrays(attention_patterns: Any) -> dict[int, np.ndarray]:
    patterns = get_attention_patterns(attention_patterns)
    if not patterns:
        raise ValueError("attention_patterns must have at least one layer")
    for layer, values in patterns.items():
        if values.min() < 0 or values.max() > 1 + 1e-3:
            raise ValueError(
                f"attention must be in [0, 1]; that of layer {layer} is in "
                f"[{values.min():.4g}, {values.max():.4g}]"
            )
    return dict(sorted(patterns.items()))


def _layer(layer: int, heads: list[int], pattern: np.ndarray) -> dict[str, Any]:
    values = np.round(np.clip(pattern[heads], 0, 1) * STEPS).astype("<u2")
    return {
        "layer": int(layer),
        "heads": heads,
        "n_queries": values.shape[1],
        "n_keys": values.shape[2],
        "data": base64.b64encode(values.tobytes()).decode(),
    }
