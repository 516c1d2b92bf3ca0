"""How good a coder is: fidelity, sparsity, and what the language model loses with it spliced in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.model_pair import owner
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.steering.edits import Edit, splice
from mlxterp.sae.visualization import Table, plot_density, plot_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCH_TOKENS = 4096
BATCH_ENTRIES = 1 << 28  # of a dense code


@dataclass(frozen=True)
class Fidelity:
    """How well a code describes activations, over `n_tokens` tokens.

    `fvu` is the fraction of variance unexplained, `sum |y - y'|^2 / sum |y - mean(y)|^2`, pooled
    over all tokens and columns in float64, NaN where nothing varies; of a coder that writes several
    sites it is the mean of theirs, `fvu_by_site`, which does not depend on how large the
    activations of each are. `l0` is the mean number of features that are not zero, `firing_rates`
    `[n_features]` the share of tokens on which each feature fires.
    """

    fvu: float
    l0: float
    n_tokens: int
    firing_rates: np.ndarray
    fvu_by_site: Mapping[str, float] = field(default_factory=dict)

    @property
    def dead(self) -> float:
        """The share of features that never fired on these tokens."""
        return float((self.firing_rates == 0).mean())

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the array; those of each site where there are several."""
        figures = {"fvu": self.fvu, "l0": self.l0, "dead": self.dead, "n_tokens": self.n_tokens}
        several = len(self.fvu_by_site) > 1
        return figures | ({"fvu_by_site": dict(self.fvu_by_site)} if several else {})

    @property
    def table(self) -> Table:
        """The figures, and the FVU of each site where there are several."""
        figures = {"FVU": f"{self.fvu:.4f}", "L0": f"{self.l0:.1f}", "silent": f"{self.dead:.1%}"}
        rows = [*figures.items()]
        if len(self.fvu_by_site) > 1:
            rows += [(f"FVU of {site}", f"{fvu:.4f}") for site, fvu in self.fvu_by_site.items()]
        return Table(f"Fidelity on {self.n_tokens:,} tokens", ("", ""), tuple(rows))

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of how many features fire on which share of the tokens."""
        return plot_density(self.firing_rates, ax)

    def __repr__(self) -> str:
        whole = (
            f"Fidelity(FVU {self.fvu:.4f}, L0 {self.l0:.1f}, "
            f"{100 * self.dead:.1f}% silent on {self.n_tokens:,} tokens)"
        )
        sites = [f"  {site}: FVU {fvu:.4f}" for site, fvu in self.fvu_by_site.items()]
        return "\n".join([whole, *(sites if len(sites) > 1 else [])])


def fidelity(
    coder: SparseCoder, dataset: ActivationDataset, max_tokens: int | None = None
) -> Fidelity:
    """FVU, L0 and firing rates of a coder over a dataset of its sites."""
    columns = dataset.columns
    total, squares, error = np.zeros((3, coder.d_out))
    firing = np.zeros(coder.n_features)
    n = 0
    for batch in dataset.batches(max(1, min(BATCH_TOKENS, BATCH_ENTRIES // coder.n_features))):
        if max_tokens is not None and n + len(batch) > max_tokens and n > 0:
            break
        x = columns.take(batch, coder.reads.names).astype(mx.float32)
        y = columns.take(batch, coder.writes.names).astype(mx.float32)
        z = coder.encode(x)
        residual = y - coder.decode(z)
        if coder.has_skip:
            residual -= x @ coder.W_skip.T
        error += np.array(residual.square().sum(axis=0), dtype=np.float64)
        values = np.array(y, dtype=np.float64)
        total += values.sum(axis=0)
        squares += np.square(values).sum(axis=0)
        firing += np.array((z != 0).sum(axis=0))
        n += len(batch)
    variance = squares - np.square(total) / n
    sites = {
        name: _fraction(error[part], variance[part], squares[part])
        for name, part in coder.writes.slices.items()
    }
    known = [fvu for fvu in sites.values() if not math.isnan(fvu)]
    fvu = float(np.mean(known)) if known else math.nan
    return Fidelity(fvu, float(firing.sum() / n), n, firing / n, sites)


def _fraction(error: np.ndarray, variance: np.ndarray, squares: np.ndarray) -> float:
    # Below this the difference is rounding: one token, or tokens that are all the same.
    varies = variance.sum() > 1e-12 * squares.sum()
    return float(error.sum() / variance.sum()) if varies else math.nan


@dataclass(frozen=True)
class LossRecovered:
    """The language model's loss, in nats per token, as it is, with the coder's output in place of
    the activation, and with the activation's mean in its place.

    `recovered = (ablated - spliced) / (ablated - clean)`; `None` where ablation hardly hurts, since
    the ratio then says nothing. Of a coder that writes several sites these are the figures with all
    of them replaced together, and `by_site` holds those with each replaced alone.
    """

    clean: float
    spliced: float
    ablated: float
    n_tokens: int
    by_site: Mapping[str, LossRecovered] = field(default_factory=dict)

    @property
    def recovered(self) -> float | None:
        gap = self.ablated - self.clean
        return None if gap < 1e-2 else (self.ablated - self.spliced) / gap

    def to_dict(self) -> dict[str, Any]:
        """The figures and the ratio; those of each site where there are several."""
        figures = {
            "clean": self.clean,
            "spliced": self.spliced,
            "ablated": self.ablated,
            "n_tokens": self.n_tokens,
            "recovered": self.recovered,
        }
        sites = {site: alone.to_dict() for site, alone in self.by_site.items()}
        return figures | ({"by_site": sites} if sites else {})

    @property
    def table(self) -> Table:
        """The losses and what is recovered, with all sites replaced and with each alone."""
        several = {"all sites" if self.by_site else "": self, **self.by_site}
        rows = tuple(
            (
                name,
                *(f"{loss:.3f}" for loss in (found.clean, found.spliced, found.ablated)),
                "-" if found.recovered is None else f"{found.recovered:.1%}",
            )
            for name, found in several.items()
        )
        title = f"Loss in nats per token, over {self.n_tokens:,} tokens"
        header = ("", "clean", "with the coder", "mean-ablated", "recovered")
        return Table(title, header, rows)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the losses as bars, with all sites replaced and each alone."""
        return plot_losses({"all sites" if self.by_site else "": self, **self.by_site}, ax)

    def __repr__(self) -> str:
        lines = [f"  {site}: {alone._figures()}" for site, alone in self.by_site.items()]
        return "\n".join([f"LossRecovered({self._figures()})", *lines])

    def _figures(self) -> str:
        ratio = self.recovered
        share = "ablation hardly hurts" if ratio is None else f"{100 * ratio:.1f}% recovered"
        return (
            f"{share}: clean {self.clean:.3f}, with the coder {self.spliced:.3f}, "
            f"mean-ablated {self.ablated:.3f} nats per token"
        )


def loss_recovered(
    coder: SparseCoder, dataset: ActivationDataset, max_tokens: int = 50_000
) -> LossRecovered:
    """What the language model loses when what the coder writes replaces the activations.

    Only positions that count are replaced and only they are scored. A site is replaced by what the
    coder makes of a clean pass; all sites of a cross-layer transcoder together by what it makes of
    the already replaced stream, see `steering.splice`. Of a coder of two models a site's loss is
    that of its own model, and the figures of all sites are the mean over the models.

    Takes three passes, and two more for each site where there are several. Raises `ValueError` for
    a dataset without texts.
    """
    if dataset.source is None or dataset.corpus is None:
        raise ValueError("Loss recovered needs a dataset made from texts with a language model.")
    replacing = _Replacing(coder, dataset.source, _mean_activation(dataset, coder.writes))
    sites = coder.writes.names
    figures = [sites, *((name,) for name in sites if len(sites) > 1)]
    totals, n = np.zeros((len(figures), 3)), 0
    for _, rows, counts in dataset.corpus.blocks():
        totals += replacing.losses(figures, rows, counts)
        n += int(np.array(counts)[:, 1:].sum())
        if n >= max_tokens:
            break
    if n == 0:
        raise ValueError("Loss recovered needs at least one token that another one predicts.")
    clean, spliced, ablated = (totals / n).T.tolist()
    together, *alone = (
        LossRecovered(*losses, n_tokens=n) for losses in zip(clean, spliced, ablated, strict=True)
    )
    return replace(
        together, by_site={name: x for (name,), x in zip(figures[1:], alone, strict=True)}
    )


def _mean_activation(dataset: ActivationDataset, columns: Columns) -> dict[str, mx.array]:
    """The mean activation `[width]` of each of the sites."""
    total, n = mx.zeros((columns.width,)), 0
    for batch in dataset.batches(BATCH_TOKENS):
        batch = dataset.columns.take(batch, columns.names)
        total += batch.astype(mx.float32).sum(axis=0)
        n += len(batch)
        mx.eval(total)
    return {name: total[part] / n for name, part in columns.slices.items()}


class _Replacing:
    """The losses of a language model, or of several, with sites of a coder replaced."""

    def __init__(self, coder: SparseCoder, source: ActivationSource, means: Mapping[str, mx.array]):
        self._coder = coder
        self._means = means
        self._models: dict[int, ActivationSource] = {}
        self._own: dict[int, dict[str, Any]] = {}
        for name in dict.fromkeys((*coder.reads.names, *coder.writes.names)):
            model, site = owner(source, name)
            self._models[id(model)] = model
            self._own.setdefault(id(model), {})[name] = site

    def losses(
        self, figures: list[tuple[str, ...]], rows: mx.array, counts: mx.array
    ) -> np.ndarray:
        """The losses `[n_figures, 3]`, summed over the tokens that count, with the sites of each
        figure as they are, as the coder writes them, and as their means."""
        clean, captured = {}, {}
        for key, own in self._own.items():
            done = self._models[key].run(rows, capture=list(own.values()))
            captured |= {name: done[site] for name, site in own.items()}
            clean[key] = done.output
        clean = {key: _summed_loss(logits, rows, counts) for key, logits in clean.items()}
        written = self._coder(captured)
        columns = self._coder.writes.slices
        found = []
        for sites in figures:
            keys = [key for key, own in self._own.items() if set(own) & set(sites)]
            ablated = {name: _constant(self._means[name]) for name in sites}
            if len(sites) > 1 and len(self._coder.blocks) > 1:
                spliced = splice(self._coder)
            else:
                spliced = {name: _constant(written[..., columns[name]]) for name in sites}
            edited = (
                np.mean([self._edited_loss(key, edits, rows, counts) for key in keys])
                for edits in (spliced, ablated)
            )
            found.append([np.mean([clean[key] for key in keys]), *edited])
        return np.array(found)

    def _edited_loss(
        self, key: int, edits: Mapping[str, Edit], rows: mx.array, counts: mx.array
    ) -> float:
        own = {
            site: _where(counts, edits[name]) if name in self._means else edits[name]
            for name, site in self._own[key].items()
            if name in edits
        }
        return _summed_loss(self._models[key].run(rows, edit=own).output, rows, counts)


def _constant(value: mx.array) -> Edit:
    return lambda x: mx.broadcast_to(value, x.shape)


def _where(counts: mx.array, function: Callable[[mx.array], mx.array]) -> Edit:
    return lambda x: mx.where(counts[..., None], function(x).astype(x.dtype), x)


def _summed_loss(logits: mx.array, tokens: mx.array, counts: mx.array) -> float:
    """The summed cross-entropy of the next tokens that count."""
    logits = logits[:, :-1].astype(mx.float32)
    targets = tokens[:, 1:]
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = mx.logsumexp(logits, axis=-1) - chosen
    total: Any = mx.where(counts[:, 1:], losses, 0).sum().item()
    return total
