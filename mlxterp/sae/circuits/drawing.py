"""A circuit as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxterp.sae.circuits.layout import Layout, Text
from mlxterp.sae.circuits.nodes import Edge, Names, Node
from mlxterp.sae.visualization import drawable, fitting, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RAISES, LOWERS, GREY = "#0072B2", "#D55E00", "#999999"
STYLES = {True: (RAISES, "-", "raises its target"), False: (LOWERS, (0, (4, 1.5)), "lowers it")}
THINNEST, WIDEST = 0.5, 4.5  # points
FONT = 8.0  # points, where an inch of the layout is an inch of the figure
LARGEST = 40.0  # inches of a figure
LEGEND = 0.55


def draw(
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    layout: Layout,
    names: Names,
    note: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A matplotlib figure of nodes as boxes and edges as curves, wider for larger weights.

    Features are in white boxes, errors in grey ones with a dashed outline, embeddings and logits in
    rounded ones. Edges end in a triangle; those that lower their target are dashed.
    """
    if ax is None:
        width, height = layout.size[0], layout.size[1] + LEGEND
        shrink = min(1.0, LARGEST / max(width, height))
        figure = new_figure(max(4.0, width * shrink), max(1.5, height * shrink))
        figure.set_layout_engine("none")
        share = LEGEND * shrink / figure.get_size_inches()[1]
        ax = figure.add_axes((0, share, 1, 1 - share))
    pen = _Pen(ax, layout)
    ax.set_xlim(0, layout.size[0])
    ax.set_ylim(layout.size[1], 0)
    ax.set_aspect("equal")
    ax.axis("off")
    largest = max((abs(edge.weight) for edge in edges), default=0.0) or 1.0
    for edge, curve in sorted(
        zip(edges, layout.curves, strict=True), key=lambda pair: abs(pair[0].weight)
    ):
        pen.edge(curve, edge.weight, abs(edge.weight) / largest)
    for node, place in zip(nodes, layout.places, strict=True):
        pen.node(node, place, layout.box, names.within(node))
    for heading in layout.headings:
        pen.text(heading, weight="bold")
    for mark in layout.marks:
        pen.text(mark)
    for y in layout.rules:
        ax.axhline(y, color="0.9", linewidth=0.5, zorder=0)
    pen.legend(edges, note)
    found: Any = ax.get_figure()
    return found


class _Pen:
    """What draws on an axis in the scale that the layout has there."""

    def __init__(self, ax: Axes, layout: Layout):
        figure: Any = ax.get_figure()
        box = ax.get_position()
        width, height = figure.get_size_inches()
        self.ax = ax
        self.scale = min(box.width * width / layout.size[0], box.height * height / layout.size[1])
        self.font = min(1.25, self.scale) * FONT

    def edge(self, curve: Sequence[tuple[float, float]], weight: float, share: float) -> None:
        from matplotlib.patches import PathPatch, Polygon
        from matplotlib.path import Path

        colour, line, _ = STYLES[weight >= 0]
        width = (THINNEST + (WIDEST - THINNEST) * share) * self.scale
        codes = [Path.MOVETO] + [Path.CURVE4] * (len(curve) - 1)
        style: Any = {"color": colour, "alpha": 0.75, "zorder": 1 + share}
        self.ax.add_patch(
            PathPatch(
                Path(curve, codes), fill=False, linewidth=width, linestyle=line,
                capstyle="butt", **style,
            )
        )  # fmt: skip
        (x, y), before = curve[-1], curve[-2]
        half = 0.025 + 0.03 * share
        back = [2.5 * half * ((b > a) - (b < a)) for a, b in zip((x, y), before, strict=True)]
        beside = (half, 0) if before[0] == x else (0, half)
        corners = [(x, y), *(
            (x + back[0] + sign * beside[0], y + back[1] + sign * beside[1]) for sign in (1, -1)
        )]  # fmt: skip
        self.ax.add_patch(Polygon(corners, linewidth=0, **(style | {"alpha": 1.0})))

    def node(
        self, node: Node, place: tuple[float, float], box: tuple[float, float], text: str
    ) -> None:
        from matplotlib.patches import FancyBboxPatch

        rounded = {"feature": 0.03, "error": 0.0}.get(node.kind, 0.12)
        is_error = node.kind == "error"
        self.ax.add_patch(
            FancyBboxPatch(
                (place[0] - box[0] / 2, place[1] - box[1] / 2), *box,
                boxstyle=f"round,pad=0,rounding_size={rounded}" if rounded else "square,pad=0",
                facecolor="#dddddd" if is_error else "white" if rounded < 0.1 else "#f2f2f2",
                edgecolor="0.45" if is_error else "0.25",
                linestyle="--" if is_error else "-", linewidth=0.8 * self.scale, zorder=3,
            )
        )  # fmt: skip
        self.text(Text(*place, text, box[0] - 0.16), zorder=4, color="0.3" if is_error else "black")

    def text(self, text: Text, **style: Any) -> None:
        shown = fitting(drawable(text.text), text.width * 72 * self.scale / self.font)
        place = {"ha": "center", "va": "center", "fontsize": self.font}
        self.ax.text(text.x, text.y, shown, **place, **plain(), **style)

    def legend(self, edges: Sequence[Edge], note: str) -> None:
        from matplotlib.lines import Line2D

        handles = [
            Line2D(
                [], [], color=colour, linestyle=line, linewidth=min(2, 2 * self.scale), label=label
            )
            for sign, (colour, line, label) in STYLES.items()
            if any((edge.weight >= 0) == sign for edge in edges)
        ]
        legend = self.ax.legend(
            handles=handles, title=drawable(note) or None, loc="upper center",
            bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False, fontsize=self.font,
            title_fontsize=self.font,
        )  # fmt: skip
        legend.get_title().set(**plain())
