"""What kinds of heads there are by what they attend to, and lists of heads with scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.notebook import Table
from mlxterp.sae.visualization.matrices import plot_matrix
from mlxterp.visualization.patterns import as_array
from mlxterp.visualization.scores import (
    current_token_score,
    duplicate_token_score,
    first_token_score,
    induction_score,
    previous_token_score,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 20
UNKNOWN = "unknown"


@dataclass
class HeadScore:
    """The score of a head, and the type that it makes it."""

    layer: int
    head: int
    score: float
    head_type: str | None = None


class HeadScores(list[HeadScore]):
    """Heads whose score is above a threshold, the highest first; a list of `HeadScore`.

    `every[layer, head]` has the scores of those below as well, `what` says what they are.
    """

    def __init__(self, what: str, every: dict[tuple[int, int], float], threshold: float) -> None:
        self.what = what
        self.every = every
        self.threshold = threshold
        above = [HeadScore(*place, x, what) for place, x in every.items() if x > threshold]
        super().__init__(sorted(above, key=lambda found: (-found.score, found.layer, found.head)))

    def table(self) -> Table:
        """The heads and their scores."""
        title = f"{self.what}: {len(self)} of {len(self.every)} heads above {self.threshold:g}"
        rows = [(f"{found.layer}.{found.head}", f"{found.score:.3f}") for found in self[:SHOWN]]
        return Table(title, ("head", "score"), tuple(rows))

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def plot(self, ax: Axes | None = None) -> Figure:
        """A heat map of all scores, layers over heads. Raises `ImportError` where matplotlib is
        missing."""
        layers = sorted({layer for layer, _ in self.every}, reverse=True)
        values = np.full((len(layers), 1 + max(head for _, head in self.every)), np.nan)
        for (layer, head), score in self.every.items():
            values[layers.index(layer), head] = score
        columns = [str(i) for i in range(values.shape[1])]
        names = {"row_label": "layer", "column_label": "head"}
        rows = [*map(str, layers)]
        return plot_matrix(values, columns, rows, label=f"{self.what} score", ax=ax, **names)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values; heads of `every` are named `layer.head`."""
        return {
            "what": self.what,
            "threshold": self.threshold,
            "heads": [asdict(found) for found in self],
            "every": {f"{layer}.{head}": score for (layer, head), score in self.every.items()},
        }


@dataclass
class AttentionPatternDetector:
    """Names heads by what they attend to: those types whose score is above its threshold."""

    induction_threshold: float = 0.4
    previous_token_threshold: float = 0.5
    first_token_threshold: float = 0.3
    current_token_threshold: float = 0.3
    duplicate_token_threshold: float = 0.3

    def analyze_head(
        self,
        attention_pattern: Any,
        seq_len_for_induction: int | None = None,
        tokens: Sequence[Any] | None = None,
    ) -> dict[str, Any]:
        """The scores of a head by type, of its pattern `[S, T]`; arrays for `[..., S, T]`.

        There is one for induction where the period of a repeated text is given, and one for
        duplicate tokens where `tokens` are, of which one must occur twice.
        """
        pattern = as_array(attention_pattern)
        scores: dict[str, Any] = {
            "previous_token": previous_token_score(pattern),
            "first_token": first_token_score(pattern),
            "current_token": current_token_score(pattern),
        }
        if seq_len_for_induction is not None:
            scores["induction"] = induction_score(pattern, seq_len_for_induction)
        if tokens is not None:
            scores["duplicate_token"] = duplicate_token_score(pattern, tokens)
        return scores

    def classify_head(
        self,
        attention_pattern: Any,
        seq_len_for_induction: int | None = None,
        tokens: Sequence[Any] | None = None,
    ) -> list[str]:
        """The types of a head of pattern `[S, T]`, or "unknown" alone."""
        pattern = as_array(attention_pattern, 2)
        return self.types(self.analyze_head(pattern, seq_len_for_induction, tokens))

    def types(self, scores: dict[str, float]) -> list[str]:
        """The types whose score is above its threshold, or "unknown" alone."""
        found = [name for name, x in scores.items() if x > getattr(self, f"{name}_threshold")]
        return found or [UNKNOWN]


class HeadTypes(dict[str, list[tuple[int, int]]]):
    """The heads of each type, `{type: [(layer, head), ...]}`, some of which are of several.

    `scores[type][layer, head]` has the numbers that decided, `thresholds[type]` what they had to
    be above.
    """

    def __init__(
        self, scores: dict[str, dict[tuple[int, int], float]], thresholds: dict[str, float]
    ) -> None:
        self.scores = scores
        self.thresholds = thresholds
        found = {
            name: [place for place, score in of_type.items() if score > thresholds[name]]
            for name, of_type in scores.items()
        }
        known = {place for places in found.values() for place in places}
        every = dict.fromkeys(place for of_type in scores.values() for place in of_type)
        super().__init__(found, unknown=[place for place in every if place not in known])

    def table(self) -> Table:
        """The heads of each type."""
        rows = [(name, str(len(heads)), _named(heads)) for name, heads in self.items()]
        return Table("Types of heads", ("type", "heads", "layer.head"), tuple(rows))

    def __repr__(self) -> str:
        title, *lines = ("Types of heads", *((name, _named(heads)) for name, heads in self.items()))
        widest = max(len(name) for name, _ in lines)
        return "\n".join(
            [title, *(f"  {name:<{widest}}  {heads}".rstrip() for name, heads in lines)]
        )

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def plot(self, ax: Axes | None = None) -> Figure:
        """A heat map of all scores, types by head. Raises `ImportError` where matplotlib is
        missing."""
        places = list(dict.fromkeys(p for of_type in self.scores.values() for p in of_type))
        values = [[of_type.get(p, np.nan) for p in places] for of_type in self.scores.values()]
        heads = [f"{layer}.{head}" for layer, head in places]
        rows = [*self.scores]
        return plot_matrix(np.array(values), heads, rows, label="score", column_label="head", ax=ax)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values; heads are named `layer.head` in the scores."""
        scores = {
            name: {f"{layer}.{head}": score for (layer, head), score in of_type.items()}
            for name, of_type in self.scores.items()
        }
        heads = {name: [list(place) for place in places] for name, places in self.items()}
        return {"heads": heads, "scores": scores, "thresholds": dict(self.thresholds)}


def _named(heads: Iterable[tuple[int, int]]) -> str:
    names = [f"{layer}.{head}" for layer, head in heads]
    return " ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
