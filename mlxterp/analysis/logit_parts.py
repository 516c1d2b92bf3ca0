"""A logit as a sum over what adds to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mlxterp.notebook import Table, fragment, visible
from mlxterp.sae.visualization.lenses import plot_patching
from mlxterp.sae.visualization.matrices import plot_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["parts", "heads", "features"]
SHOWN = 8  # heads, or features, of a table


@dataclass(frozen=True, eq=False)
class LogitParts:
    """One logit, or the difference of two, at one position of a text, and where it comes from.

        logit = sum of parts      parts: embedding, layers.0.attn_out, layers.0.mlp_out, ..., bias

    `heads[layer, head]` splits the part of an attention, whose `head_rest[layer]` (such as a bias)
    belongs to no head; attention that has no heads that can be seen is not in them. `features` are
    those of a coder that are active, with the `rest` of what it describes, by name: its error, its
    bias and its skip connection. `described` are the sites that the coder writes.

    The final norm has the scale that it had in the pass. Where the head is not `affine` (it caps
    its logits) parts are to first order, and the part `bias` has what is left.
    """

    logit: float
    target: str
    against: str | None
    position: int
    parts: Mapping[str, float]
    heads: Mapping[tuple[int, int], float] = field(default_factory=dict)
    head_rest: Mapping[int, float] = field(default_factory=dict)
    features: Mapping[int, float] = field(default_factory=dict)
    rest: Mapping[str, float] = field(default_factory=dict)
    described: tuple[str, ...] = ()
    affine: bool = True

    @property
    def error(self) -> float:
        """What the parts sum to, less the logit: rounding alone."""
        return sum(self.parts.values()) - self.logit

    def strongest(self, n: int = SHOWN, what: Kind = "parts") -> dict[Any, float]:
        """The `n` parts, heads or features with the largest shares, either way."""
        found = self._kind(what)
        return dict(sorted(found.items(), key=lambda item: -abs(item[1]))[:n])

    def tables(self, n: int = SHOWN) -> list[Table]:
        """All parts in their order, then the `n` strongest heads and features."""
        rows = [*self.parts.items(), ("sum", sum(self.parts.values()))]
        tables = [_table(self._title(), "part", rows)]
        if self.heads:
            heads = self.strongest(n, "heads").items()
            named = [(f"{layer}.{head}", value) for (layer, head), value in heads]
            tables.append(_table("Strongest heads", "head", named))
        if self.described:
            features = [(str(i), x) for i, x in self.strongest(n, "features").items()]
            title = f"Strongest of {len(self.features)} features at {', '.join(self.described)}"
            tables.append(_table(title, "feature", [*features, *self.rest.items()]))
        return tables

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.tables()))

    def _repr_html_(self) -> str:
        tables = self.tables(2 * SHOWN)
        return "".join(fragment("table.html", table=table) for table in tables)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values; heads are named `layer.head`."""
        return {
            "logit": self.logit,
            "target": self.target,
            "against": self.against,
            "position": self.position,
            "parts": dict(self.parts),
            "heads": {f"{layer}.{head}": x for (layer, head), x in self.heads.items()},
            "head_rest": dict(self.head_rest),
            "features": dict(self.features),
            "rest": dict(self.rest),
            "described": [*self.described],
            "affine": self.affine,
        }

    def plot(self, what: Kind = "parts", ax: Axes | None = None) -> Figure:
        """A matplotlib figure: bars of all parts, of the strongest features, or a map of heads.

        Raises `ValueError` where there is nothing of the kind, `ImportError` without matplotlib.
        """
        found = self._kind(what)
        if not found:
            raise ValueError(f"there are no {what} to plot")
        if what == "parts":
            return plot_patching(found, label=self._unit(), row_label="", ax=ax)
        if what == "features":
            strongest = dict(reversed([*self.strongest(2 * SHOWN, what).items()]))
            return plot_patching(strongest, label=self._unit(), row_label="feature", ax=ax)
        layers = sorted({layer for layer, _ in found}, reverse=True)
        values = np.full((len(layers), 1 + max(head for _, head in found)), np.nan)
        for (layer, head), value in found.items():
            values[layers.index(layer), head] = value
        columns = [str(i) for i in range(values.shape[1])]
        names = {"row_label": "layer", "column_label": "head"}
        return plot_matrix(values, columns, [*map(str, layers)], label=self._unit(), ax=ax, **names)

    def _kind(self, what: Kind) -> Mapping[Any, float]:
        if what not in get_args(Kind):
            raise ValueError(f"what must be one of {get_args(Kind)}, not {what!r}")
        return getattr(self, what)

    def _unit(self) -> str:
        return f"share of the {self._name()}"

    def _name(self) -> str:
        name = f"logit of “{visible(self.target)}”"
        return name if self.against is None else f"{name} less that of “{visible(self.against)}”"

    def _title(self) -> str:
        title = f"The {self._name()} at {self.position}: {self.logit:.3f}"
        return title if self.affine else f"{title} (first order; the rest is in the bias)"


def _table(title: str, name: str, rows: list[tuple[str, float]]) -> Table:
    return Table(title, (name, "logit"), tuple((key, f"{value:.3f}") for key, value in rows))
