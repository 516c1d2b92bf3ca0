"""How good a coder is: fidelity, sparsity, and what the language model loses with it spliced in."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dataset import ActivationDataset

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Fidelity:
    """How well a code describes activations, over `n_tokens` tokens.

    `fvu` is the fraction of variance unexplained, `sum |y - y'|^2 / sum |y - mean(y)|^2`, pooled
    over all tokens in float64, NaN where nothing varies; `l0` the mean number of features that are
    not zero; `firing_rates` `[n_features]` the share of tokens on which each feature fires.
    """

    fvu: float
    l0: float
    n_tokens: int
    firing_rates: np.ndarray

    @property
    def dead(self) -> float:
        """The share of features that never fired on these tokens."""
        return float((self.firing_rates == 0).mean())

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the array."""
        return {"fvu": self.fvu, "l0": self.l0, "dead": self.dead, "n_tokens": self.n_tokens}

    def __repr__(self) -> str:
        return (
            f"Fidelity(FVU {self.fvu:.4f}, L0 {self.l0:.1f}, "
            f"{100 * self.dead:.1f}% silent on {self.n_tokens:,} tokens)"
        )


def fidelity(
    coder: SparseCoder, dataset: ActivationDataset, max_tokens: int | None = None
) -> Fidelity:
    """FVU, L0 and firing rates of a coder over a dataset of its sites."""
    columns = dataset.columns
    total = np.zeros(coder.d_out)
    squares = error = 0.0
    firing = np.zeros(coder.n_features)
    n = 0
    for batch in dataset.batches(BATCH_TOKENS):
        if max_tokens is not None and n + len(batch) > max_tokens and n > 0:
            break
        x = columns.take(batch, coder.reads.names).astype(mx.float32)
        y = columns.take(batch, coder.writes.names).astype(mx.float32)
        z = coder.encode(x)
        residual = np.array((y - coder.decode(z)).square().sum(axis=0), dtype=np.float64)
        error += residual.sum()
        values = np.array(y, dtype=np.float64)
        total += values.sum(axis=0)
        squares += np.square(values).sum()
        firing += np.array((z != 0).sum(axis=0))
        n += len(batch)
    variance = squares - np.square(total).sum() / n
    # Below this the difference is rounding: one token, or tokens that are all the same.
    fvu = float(error / variance) if variance > 1e-12 * squares else math.nan
    return Fidelity(fvu, float(firing.sum() / n), n, firing / n)


@dataclass(frozen=True)
class LossRecovered:
    """The language model's loss, in nats per token, as it is, with the coder's output in place of
    the activation, and with the activation's mean in its place.

    `recovered = (ablated - spliced) / (ablated - clean)`; `None` where ablation hardly hurts, since
    the ratio then says nothing.
    """

    clean: float
    spliced: float
    ablated: float
    n_tokens: int

    @property
    def recovered(self) -> float | None:
        gap = self.ablated - self.clean
        return None if gap < 1e-2 else (self.ablated - self.spliced) / gap

    def to_dict(self) -> dict[str, Any]:
        """The figures and the ratio."""
        return {**asdict(self), "recovered": self.recovered}

    def __repr__(self) -> str:
        ratio = self.recovered
        share = "ablation hardly hurts" if ratio is None else f"{100 * ratio:.1f}% recovered"
        return (
            f"LossRecovered({share}: clean {self.clean:.3f}, with the coder {self.spliced:.3f}, "
            f"mean-ablated {self.ablated:.3f} nats per token)"
        )


def loss_recovered(
    coder: SparseCoder, dataset: ActivationDataset, max_tokens: int = 50_000
) -> LossRecovered:
    """What the language model loses when what the coder writes replaces the activation.

    Only positions that count are replaced and only they are scored. Raises `ValueError` for a
    dataset without texts and, for the time being, for a coder that does not write what it reads.
    """
    if dataset.source is None or dataset.corpus is None:
        raise ValueError("Loss recovered needs a dataset made from texts with a language model.")
    if coder.reads != coder.writes or len(coder.writes.names) != 1:
        raise ValueError(
            "Loss recovered is defined here for coders that write the one site they read."
        )
    (site,) = coder.writes.names
    mean = _mean_activation(dataset)
    totals = np.zeros(4)
    for _, rows, counts in dataset.corpus.blocks():
        edits = (
            None,
            _replace(coder, counts),
            _replace(lambda x: mx.broadcast_to(mean, x.shape), counts),
        )
        for i, edit in enumerate(edits):
            logits = dataset.source.run(rows, edit=None if edit is None else {site: edit}).output
            totals[i] += _summed_loss(logits, rows, counts)
        totals[3] += counts[:, 1:].sum().item()
        if totals[3] >= max_tokens:
            break
    if totals[3] == 0:
        raise ValueError("Loss recovered needs at least one token that another one predicts.")
    clean, spliced, ablated = totals[:3] / totals[3]
    return LossRecovered(clean, spliced, ablated, int(totals[3]))


def _mean_activation(dataset: ActivationDataset) -> mx.array:
    total, n = mx.zeros((dataset.columns.width,)), 0
    for batch in dataset.batches(BATCH_TOKENS):
        total += batch.astype(mx.float32).sum(axis=0)
        n += len(batch)
        mx.eval(total)
    return total / n


def _replace(function: Any, counts: mx.array) -> Any:
    def edit(x: mx.array) -> mx.array:
        return mx.where(counts[..., None], function(x).astype(x.dtype), x)

    return edit


def _summed_loss(logits: mx.array, tokens: mx.array, counts: mx.array) -> float:
    """The summed cross-entropy of the next tokens that count."""
    logits = logits[:, :-1].astype(mx.float32)
    targets = tokens[:, 1:]
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = mx.logsumexp(logits, axis=-1) - chosen
    total: Any = mx.where(counts[:, 1:], losses, 0).sum().item()
    return total
