"""One report on a coder: fidelity, sparsity, and what the language model loses with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.evals.model_loss import ModelLoss
from mlxterp.sae.evals.origin import EvaluationData
from mlxterp.sae.evals.reconstruction import Reconstruction
from mlxterp.sae.evals.schemas import Parts, Schema, in_schema
from mlxterp.sae.evals.sparsity import Sparsity
from mlxterp.sae.files import write_text
from mlxterp.sae.visualization import Table, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good a coder is: `fidelity`, `sparsity` and, of data with texts, `loss`.

    Every score has its spread, one standard error over documents that are drawn again with
    replacement, and the control that is there for it; one that would mean nothing has a reason in
    place of a value. `draws` are the scores of the documents that were drawn, `[n_draws]`, which
    `compare` needs.
    """

    fidelity: Reconstruction
    sparsity: Sparsity
    loss: ModelLoss | None
    data: EvaluationData
    coder: SparseCoder
    draws: Mapping[str, np.ndarray] = field(repr=False)

    @property
    def fvu(self) -> float:
        """The fraction of variance unexplained; NaN where there is none."""
        return float(self.fidelity.fvu)

    @property
    def l0(self) -> float:
        """The mean number of features that fire on a token."""
        return float(self.sparsity.l0)

    @property
    def summary(self) -> str:
        """The most important numbers in one line."""
        control = self.fidelity.fvu.cells(".3f")[2]
        beside = "" if control == "-" else f" ({self.fidelity.control} {control})"
        line = (
            f"FVU {self.fidelity.fvu:.3f}{beside}, L0 {self.l0:.1f}, "
            f"{self.sparsity.dead:.1%} silent on {self.data.n_tokens:,} tokens"
        )
        if self.loss is None:
            return line
        line += f"; loss {self.loss.difference:+.3f} nats, "
        recovered = self.loss.recovered
        return line + ("no share recovered" if recovered.reason else f"{recovered:.1%} recovered")

    @property
    def reasons(self) -> dict[str, str]:
        """Why scores have no value, by their names in the table."""
        found = {} if self.loss is None else self.loss.reasons
        explained = self.fidelity.explained_variance
        return ({"explained variance": explained.reason} if explained.reason else {}) | found

    @property
    def table(self) -> Table:
        """All scores."""
        rows = [*self.fidelity.rows, *self.sparsity.rows, *(self.loss.rows if self.loss else [])]
        return Table(self._title(), ("", "value", "±", "control"), tuple(rows))

    def _title(self) -> str:
        data = self.data
        of = ""
        if data.n_documents is not None:
            of = f" of {data.n_documents:,} documents, special ones not counted"
        lines = [
            f"{data.coder['name']} on {data.n_tokens:,} tokens{of}",
            f"±: one standard error over {data.clusters}",
        ]
        controls = [f"{self.fidelity.control} (fidelity)"] if self.fidelity.control else []
        controls += ["the mean activation in place (loss)"] if self.loss else []
        return "\n".join([*lines, *(["control: " + ", ".join(controls)] if controls else [])])

    @property
    def _by_reason(self) -> dict[str, str]:
        """The names of the scores that have no value, by the reason."""
        found: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            found.setdefault(reason, []).append(name)
        return {reason: ", ".join(names) for reason, names in found.items()}

    def _notes(self) -> Table:
        rows = tuple((names, reason) for reason, names in self._by_reason.items())
        return Table("Scores that would mean nothing", ("", "why there is no value"), rows)

    def __repr__(self) -> str:
        if not self.reasons:
            return repr(self.table)
        notes = [f"  {names}: no value, for {x}" for x, names in self._by_reason.items()]
        return "\n".join([repr(self.table), *notes])

    def _repr_html_(self) -> str:
        notes = self._notes()._repr_html_() if self.reasons else ""
        return self.table._repr_html_() + notes

    def to_dict(self) -> dict[str, Any]:
        """All scores with spreads, controls and reasons, as plain values."""
        return {
            "data": self.data.to_dict(),
            "fidelity": self.fidelity.to_dict(),
            "sparsity": self.sparsity.to_dict(),
            "loss": None if self.loss is None else self.loss.to_dict(),
        }

    def to_json(self, path: str | Path | None = None, schema: Schema = "mlxterp") -> str:
        """The report as JSON text, which is also written to a `path`: as `to_dict` has it, or in
        the shape of SAELens's (`"saelens"`) or SAEBench's (`"saebench"`) reports.

        Raises `ValueError` for another schema.
        """
        if schema == "mlxterp":
            value = self.to_dict()
        else:
            parts = Parts(self.fidelity, self.sparsity, self.loss, self.data, self.coder)
            value = in_schema(parts, schema, self.to_dict())
        text = json.dumps(value, indent=2, allow_nan=False)
        if path is not None:
            write_text(path, text)
        return text

    def plot(self) -> Figure:
        """A matplotlib figure: definitions of explained variance, firing rates and losses."""
        figure = new_figure(10.5 if self.loss is None else 15.0, 3.6)
        axes = figure.subplots(1, 2 if self.loss is None else 3)
        self.fidelity.plot(axes[0])
        if self.loss is not None:
            self.loss.plot(axes[2])
        return self.sparsity.plot(axes[1])
