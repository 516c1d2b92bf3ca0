"""A page about one feature: figures, and text with every token shaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlxterp.sae.features.examples import Example
from mlxterp.sae.visualization import LESS, MORE, drawable, fitting, new_figure, plain, width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE, MARGIN, TOP = 8.27, 0.35, 2.3  # inches: the width of A4, its margins, the figures on top
LINE = 15.0  # points
FONT, HEADING = 8.0, 9.0
DRAWN = 7.7  # of FONT, since letters are wider where they are fitted to few pixels
VALUE = 34.0  # points that the values take before the text
INCH = 72

Section = tuple[str, Sequence[Example]]


def draw_card(
    title: str,
    facts: Sequence[str],
    panels: Sequence[Callable[[Axes], Any]],
    sections: Sequence[Section],
    largest: float,
) -> Figure:
    """A figure of the width of a page: a title, lines of facts, panels that are drawn side by side,
    and sections of examples, one line each, shaded by their shares of the `largest` value."""
    sections = [(name, examples) for name, examples in sections if examples]
    n_lines = sum(1.4 + len(examples) for _, examples in sections)
    top = (len(facts) + 1) * LINE / INCH
    middle = TOP if panels else 0.0
    height = 2 * MARGIN + top + middle + n_lines * LINE / INCH
    figure = new_figure(PAGE, height)
    figure.set_layout_engine("none")
    page = _Page(figure.add_axes((0, 0, 1, 1)), PAGE * INCH, height * INCH)
    y = MARGIN * INCH + LINE / 2
    page.line(title, y, size=11, weight="bold")
    for fact in facts:
        page.line(fact, y := y + LINE, color="0.3", size=FONT)
    share = (PAGE - 2 * MARGIN) / max(1, len(panels))
    for i, panel in enumerate(panels):
        left, room = MARGIN + i * share + 0.75, share - 0.95
        bottom = height - MARGIN - top - middle + 0.55
        panel(figure.add_axes((left / PAGE, bottom / height, room / PAGE, (TOP - 0.75) / height)))
    y += middle * INCH
    for name, examples in sections:
        page.line(name, y := y + 1.4 * LINE, size=HEADING, weight="bold")
        for example in examples:
            page.example(example, y := y + LINE, largest)
    return figure


class _Page:
    """An axis as large as the figure, in points from its upper left corner."""

    def __init__(self, ax: Axes, width: float, height: float):
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.axis("off")
        self.ax = ax
        self.left, self.right = MARGIN * INCH, width - MARGIN * INCH

    def line(self, content: str, y: float, size: float, **style: Any) -> None:
        # Bold type is wider than what is measured.
        shown = fitting(drawable(content), 0.9 * (self.right - self.left) / size)
        self.ax.text(self.left, y, shown, va="center", fontsize=size, **plain(), **style)

    def example(self, example: Example, y: float, largest: float) -> None:
        """The value, and as much of the text around the peak as the line has room for."""
        x = self.left + VALUE
        self.ax.text(x - 8, y, f"{example.value:.2f}", ha="right", va="center", fontsize=FONT)
        for text, share, peak in _around(_drawn(example, largest), (self.right - x) / FONT):
            length = width(text) * FONT
            box: Any = {"facecolor": MORE if share > 0 else LESS, "alpha": 0.65 * abs(share)}
            if share:
                self._box(x, y, length, linewidth=0, **box)
            if peak:
                self._box(x, y, length, fill=False, linewidth=0.7, edgecolor="0.2")
            start = x + width(text[: len(text) - len(text.lstrip())]) * FONT
            self.ax.text(start, y, text.lstrip(), va="center", fontsize=DRAWN, **plain())
            x += length

    def _box(self, x: float, y: float, length: float, **style: Any) -> None:
        from matplotlib.patches import Rectangle

        self.ax.add_patch(Rectangle((x, y - 0.4 * LINE), length, 0.8 * LINE, **style))


Part = tuple[str, float, bool]


def _drawn(example: Example, largest: float) -> list[Part]:
    parts = example.parts(largest)
    return [(drawable(text), share, peak) for text, share, _, peak in parts]


def _around(parts: Sequence[Part], room: float) -> list[Part]:
    """Whole parts on both sides of the peak, more before it, as far as there is room."""
    peak = next(i for i, part in enumerate(parts) if part[2])
    first, end = peak, peak + 1
    parts = [(fitting(text, room), share, is_peak) for text, share, is_peak in parts]
    left = room - width(parts[peak][0])
    while True:
        before = width(parts[first - 1][0]) if first > 0 else room + 1
        after = width(parts[end][0]) if end < len(parts) else room + 1
        # Two tokens before the peak for each one after it.
        take_before = before <= left and (peak - first <= 2 * (end - peak - 1) or after > left)
        if take_before:
            first, left = first - 1, left - before
        elif after <= left:
            end, left = end + 1, left - after
        else:
            return list(parts[first:end])
