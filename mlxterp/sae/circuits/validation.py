"""Effects as they were predicted beside those of actual interventions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.visualization import TRAINING, Table, new_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 10


@dataclass(frozen=True, eq=False)
class Validation:
    """The predicted and the measured effect of each of some edges, `[n]`, and what was done.

    `edges` are the numbers of the edges in the circuit, and `names` what they are called, where
    that is known. Where the effects are those of nodes on what the whole circuit is about, `nodes`
    are their numbers and there are no edges.
    """

    predicted: np.ndarray
    measured: np.ndarray
    edges: tuple[int, ...]
    method: str
    names: tuple[str, ...] = ()
    nodes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("predicted", "measured"):
            shape = np.shape(getattr(self, name))
            if shape != (len(self),):
                raise ValueError(
                    f"{name} must be one number for each of {self._counted}, got {shape}."
                )

    def __len__(self) -> int:
        return len(self.edges) + len(self.nodes)

    @property
    def _counted(self) -> str:
        return f"{len(self)} {'nodes' if self.nodes else 'edges'}"

    @property
    def correlation(self) -> float:
        """Pearson's correlation; nan for fewer than two edges, or where all are alike."""
        predicted, measured = self._finite()
        if len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
            return math.nan
        return float(np.corrcoef(predicted, measured)[0, 1])

    @property
    def slope(self) -> float:
        """What the predictions have to be multiplied by to be nearest to what was measured (least
        squares through the origin): 1 where they are of the right size, nan without any."""
        predicted, measured = self._finite()
        squares = float(predicted @ predicted)
        return float(predicted @ measured) / squares if squares else math.nan

    @property
    def same_sign(self) -> float:
        """The share of the edges whose measured effect has the sign that was predicted."""
        predicted, measured = self._finite()
        same = np.sign(predicted) == np.sign(measured)
        return float(same.mean()) if len(same) else math.nan

    def _finite(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.array([self.predicted, self.measured], np.float64)
        known = np.isfinite(pairs).all(axis=0)
        return pairs[0, known], pairs[1, known]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        figures = {name: getattr(self, name) for name in ("correlation", "slope", "same_sign")}
        return {
            "method": self.method,
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},
            "edges": list(self.edges),
            "nodes": list(self.nodes),
            "names": list(self.names),
            "predicted": np.asarray(self.predicted).tolist(),
            "measured": np.asarray(self.measured).tolist(),
        }

    def table(self, n: int = SHOWN) -> Table:
        """The `n` edges of which most was predicted, with what was measured."""
        title = (
            f"{self._counted}, {self.method}: correlation {self.correlation:.3f}, "
            f"slope {self.slope:.3f}, {self.same_sign:.0%} of the predicted sign"
        )
        largest = np.argsort(-np.abs(self.predicted), kind="stable")[:n].tolist()
        names = self.names or tuple(
            f"{what} {i}" for what, ids in (("edge", self.edges), ("node", self.nodes)) for i in ids
        )
        rows = tuple(
            (names[i], f"{self.predicted[i]:+.4g}", f"{self.measured[i]:+.4g}") for i in largest
        )
        return Table(title, ("node" if self.nodes else "edge", "predicted", "measured"), rows)

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of measured over predicted effects; on the diagonal they are equal.
        Raises `ImportError` where matplotlib is missing."""
        ax = new_axis() if ax is None else ax
        ax.axline((0, 0), slope=1, color="#999999", linewidth=1, label="equal")
        ax.scatter(
            self.predicted,
            self.measured,
            s=18,
            color=TRAINING["color"],
            alpha=0.7,
            linewidths=0,
            label=self._counted,
        )
        ax.set_title(
            f"{self.method}: correlation {self.correlation:.3f}, slope {self.slope:.3f}",
            fontsize=9,
        )
        ax.set_xlabel("predicted effect", fontsize=9)
        ax.set_ylabel("measured effect", fontsize=9)
        ax.legend(frameon=False, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        figure: Any = ax.get_figure()
        return figure
