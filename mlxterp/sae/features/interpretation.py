"""What a code means: its strongest features, with what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.features.display import visible
from mlxterp.sae.features.logit_effects import logit_effects, writes_stream
from mlxterp.sae.features.peaks import strongest
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import Table

PROMOTED = 5


@dataclass(frozen=True)
class InterpretedFeature:
    """A feature's value in a code, its label, and the tokens that the feature makes most likely."""

    feature_id: int
    value: float
    label: str | None = None
    promotes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        label = "" if self.label is None else f"  {visible(self.label)}"
        raises = "" if not self.promotes else "  raises " + " ".join(map(repr, self.promotes))
        return f"feature {self.feature_id}: {self.value:+.3f}{label}{raises}"


@dataclass(frozen=True)
class Interpretation(Sequence[tuple[InterpretedFeature, ...]]):
    """The strongest features of each row of a code, largest in size first."""

    rows: tuple[tuple[InterpretedFeature, ...], ...]

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        if len(self) == 1:
            return "\n".join(map(repr, self.rows[0])) or "no feature is active"
        lines = []
        for i, row in enumerate(self.rows):
            lines += [f"row {i}" + ("" if row else ": no feature is active")]
            lines += [f"  {feature!r}" for feature in row]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {"rows": [[asdict(feature) for feature in row] for row in self.rows]}

    def _repr_html_(self) -> str:
        cells = tuple(
            (
                f"{i}: feature {f.feature_id}" if len(self) > 1 else f"feature {f.feature_id}",
                f"{f.value:+.3f}",
                visible(f.label or ""),
                "  ".join(map(visible, f.promotes)),
            )
            for i, row in enumerate(self.rows)
            for f in row
        )
        return Table("Strongest features", ("", "value", "label", "raises"), cells)._repr_html_()


def interpret_features(
    coder: SparseCoder,
    source: ActivationSource | None,
    codes: mx.array | Sequence[mx.array],
    top_k: int = 5,
    labels: Mapping[int, str] | None = None,
) -> Interpretation:
    """The `top_k` strongest features of a code `[..., n_features]`, or of several, by size.

    A code may be what `encode_text` returns, or any sum or difference of such. With a `source`,
    where the coder writes the residual stream, the tokens that a feature promotes are named as in
    `logit_effects`. Raises `ValueError` for another width.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}.")
    several: Any = codes if isinstance(codes, (list, tuple)) else [codes]
    parts = [mx.array(part) for part in several]
    for part in parts:
        if part.ndim == 0 or part.shape[-1] != coder.n_features:
            raise ValueError(
                f"The code must have shape [..., {coder.n_features}], got {tuple(part.shape)}."
            )
    rows = [np.array(part.astype(mx.float32)).reshape(-1, coder.n_features) for part in parts]
    found = [strongest(row, top_k) for part in rows for row in part]
    shown = sorted({i for row in found for i, _ in row})
    promoted: dict[int, tuple[str, ...]] = {}
    if shown and source is not None and writes_stream(coder, source):
        effects = logit_effects(coder, source, shown, PROMOTED)
        promoted = {i: tuple(token for token, _ in effect.top) for i, effect in effects.items()}
    labels = labels or {}
    return Interpretation(
        tuple(
            tuple(InterpretedFeature(i, x, labels.get(i), promoted.get(i, ())) for i, x in row)
            for row in found
        )
    )
