"""The tokens that features make more and less likely."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder, check_feature
from mlxterp.sae.model_pair import owner
from mlxterp.sae.source import ActivationSource


@dataclass(frozen=True)
class LogitEffects:
    """The tokens that a feature's decoder row makes most and least likely, with their logits."""

    top: tuple[tuple[str, float], ...]
    bottom: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def logit_effects(
    coder: SparseCoder,
    source: ActivationSource,
    feature_id: int,
    top_k: int = 10,
    site: str | None = None,
) -> LogitEffects:
    """The tokens that a feature's decoder row promotes and suppresses most.

    The row is read by the model's own final norm and head as if it were the residual stream; of a
    coder that writes several sites of one model the sum of the rows is, or that of one `site`.
    Raises `ValueError` where it does not have the width of the stream, and for a coder that writes
    several models where no site is named.
    """
    row = coder.direction(check_feature(coder, feature_id))
    writes = coder.writes if site is None else coder.writes.only(site)
    owners = [owner(source, name)[0] for name in writes.names]
    if len(set(writes.widths)) > 1 or any(model is not owners[0] for model in owners):
        raise ValueError(f"This coder writes {writes}: name one of its sites with site=...")
    row = mx.stack([coder.writes.take(row, (name,)) for name in writes.names]).sum(axis=0)
    logits = np.array(owners[0].unembed(row[None])[0].astype(mx.float32))
    order = np.argsort(logits)
    named = [
        tuple((source.to_str_tokens([int(i)])[0], float(logits[i])) for i in ids)
        for ids in (order[::-1][:top_k], order[:top_k])
    ]
    return LogitEffects(*named)
