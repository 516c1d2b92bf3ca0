"""One feature, at a glance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.coder import SparseCoder, check_feature
from mlxterp.sae.features.card import draw_card
from mlxterp.sae.features.data import CoActive, FeatureData
from mlxterp.sae.features.display import visible
from mlxterp.sae.features.examples import Example, Interval
from mlxterp.sae.features.logit_effects import LogitEffects, logit_effects, writes_stream
from mlxterp.sae.similarity.nearest import Neighbour, nearest
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import MORE, dress, fragment, logarithmic, new_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, eq=False)
class FeatureView:
    """What is known of a feature: where it fires and how strongly, and what it does.

    `firing_rate` is the share of tokens on which it fires, `mean` and `maximum` are its values
    there; `histogram` counts the values between `bin_edges`. `examples` are its strongest,
    `intervals` random ones of each strength, `random` any. `logits` are the tokens that it makes
    more and less likely, `None` for a coder that does not write the residual stream's width;
    `similar` features whose decoder rows point the same way, with the cosine; `co_active` features
    that fire on the same tokens.
    """

    feature_id: int
    label: str | None
    firing_rate: float
    mean: float
    maximum: float
    histogram: np.ndarray
    bin_edges: np.ndarray
    examples: tuple[Example, ...]
    intervals: tuple[Interval, ...]
    random: tuple[Example, ...]
    logits: LogitEffects | None
    similar: tuple[Neighbour, ...]
    co_active: tuple[CoActive, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "feature_id": self.feature_id,
            "label": self.label,
            "firing_rate": self.firing_rate,
            "mean": self.mean,
            "maximum": self.maximum,
            "histogram": self.histogram.tolist(),
            "bin_edges": self.bin_edges.tolist(),
            "examples": [example.to_dict() for example in self.examples],
            "intervals": [interval.to_dict() for interval in self.intervals],
            "random": [example.to_dict() for example in self.random],
            "logits": None if self.logits is None else self.logits.to_dict(),
            "similar": [list(pair) for pair in self.similar],
            "co_active": [vars(other) for other in self.co_active],
        }

    def __repr__(self) -> str:
        label = "" if self.label is None else f": {visible(self.label)}"
        lines = [f"Feature {self.feature_id}{label}"]
        if not self.examples:
            return "\n".join([*lines, *self._effects(), "  not active on any of these tokens"])
        lines.append(
            f"  on {100 * self.firing_rate:.2f}% of tokens, mean {self.mean:.2f}, "
            f"maximum {self.maximum:.2f}  {self._bars()}"
        )
        lines += [*self._effects(), *(f"  {example}" for example in self.examples)]
        similar = "  ".join(f"{i} ({cosine:.2f})" for i, cosine in self.similar[:5])
        together = "  ".join(
            f"{other.feature_id} ({other.score:.2f})" for other in self.co_active[:5]
        )
        lines += [f"  similar features (cosine)   {similar}"] if similar else []
        lines += [f"  fire together (Jaccard)     {together}"] if together else []
        return "\n".join(lines)

    def _effects(self) -> list[str]:
        if self.logits is None:
            return []
        return [
            f"  {name}  " + "  ".join(repr(token) for token, _ in tokens[:8])
            for name, tokens in (("raises", self.logits.top), ("lowers", self.logits.bottom))
        ]

    def _bars(self) -> str:
        """The histogram in one line, from the smallest value that occurs to the largest."""
        counts = self._occurring()[0]
        heights = np.ceil((len(BARS) - 1) * counts / counts.max()).astype(int)
        return "".join(BARS[height] for height in heights)

    def _occurring(self) -> tuple[np.ndarray, np.ndarray]:
        at = np.flatnonzero(self.histogram)
        used = slice(at[0], at[-1] + 1) if len(at) else slice(0, 1)
        return self.histogram[used], self.bin_edges[used.start : used.stop + 1]

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the histogram of the feature's values where it fires."""
        ax = new_axis() if ax is None else ax
        counts, edges = self._occurring()
        ax.stairs(counts, edges, fill=True, color=MORE)
        logarithmic(ax)
        return dress(ax, f"value of feature {self.feature_id}", "tokens")

    def card(self, n: int = 8) -> Figure:
        """A matplotlib figure of one page: histogram, tokens that the feature makes more and less
        likely, its `n` strongest examples, one of each strength, and some at random."""
        facts = [
            f"fires on {100 * self.firing_rate:.3g} % of tokens, mean {self.mean:.2f}, "
            f"maximum {self.maximum:.2f}"
        ]
        for name, pairs in (
            ("similar features (cosine)", [*self.similar]),
            ("fire together (Jaccard)", [(o.feature_id, o.score) for o in self.co_active]),
        ):
            listed = "  ".join(f"{i} ({score:.2f})" for i, score in pairs[:8])
            facts += [f"{name}  {listed}"] * bool(listed)
        panels: list[Any] = [self.plot]
        if self.logits is not None:
            panels.append(partial(self.logits.plot, n=5))
        sections = [("strongest", self.examples[:n])]
        sections += [(interval.title, interval.examples[:1]) for interval in self.intervals]
        sections += [("any of them, at random", self.random)]
        label = "" if self.label is None else f": {self.label}"
        title = f"Feature {self.feature_id}{label}"
        return draw_card(title, facts, panels, sections, self.maximum)

    def _repr_html_(self) -> str:
        counts, edges = self._occurring()
        tallest = max(1, int(counts.max()))
        bars = [
            (int(n), low, high, 100 * n / tallest)
            for n, low, high in zip(counts.tolist(), edges, edges[1:], strict=False)
        ]
        return fragment("feature.html", view=self, bars=bars)


def view_feature(
    coder: SparseCoder,
    source: ActivationSource,
    data: FeatureData,
    feature_id: int,
    top_k: int = 10,
    label: str | None = None,
) -> FeatureView:
    """Gather what `FeatureView` shows, with up to `top_k` examples and neighbours."""
    feature_id = check_feature(coder, feature_id)
    return FeatureView(
        feature_id=feature_id,
        label=label,
        firing_rate=float(data.firing_rates[feature_id]),
        mean=float(data.means[feature_id]),
        maximum=float(data.maxima[feature_id]),
        histogram=data.histogram[feature_id],
        bin_edges=data.bin_edges,
        examples=data.examples(feature_id, top_k),
        intervals=data.intervals(feature_id, 5, 2),
        random=data.examples(feature_id, 3, "random"),
        logits=logit_effects(coder, source, feature_id) if writes_stream(coder, source) else None,
        similar=nearest(coder, feature_id, top_k=top_k).found,
        co_active=data.co_active(feature_id, top_k),
    )
