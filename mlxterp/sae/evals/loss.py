"""What the language model loses with what a coder writes in place of its activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.evals.fidelity import BATCH_TOKENS
from mlxterp.sae.evals.replacing import Donors, Replacement, Replacing, blocks
from mlxterp.sae.visualization import Table, plot_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    sites = coder.writes.names
    parts = [sites, *((name,) for name in sites if len(sites) > 1)]
    replacements = [
        Replacement(names, *how)
        for names in parts
        for how in ((None, None), (0, None), (None, "mean"))
    ]
    donors = Donors(_mean_activation(dataset, coder.writes), {})
    replacing = Replacing([coder], dataset.source, donors)
    totals, n = np.zeros(len(replacements)), 0
    for _, tokens, counts in blocks(dataset.source, dataset.corpus)[1]:
        predicted = np.array(counts)[:, 1:]
        found = replacing.outcomes(replacements, tokens, counts, with_kl=False)
        totals += [outcome.loss[predicted].sum() for outcome in found]
        n += int(predicted.sum())
        if n >= max_tokens:
            break
    if n == 0:
        raise ValueError("Loss recovered needs at least one token that another one predicts.")
    together, *alone = (
        LossRecovered(*losses, n_tokens=n) for losses in (totals / n).reshape(-1, 3).tolist()
    )
    return replace(together, by_site={name: x for (name,), x in zip(parts[1:], alone, strict=True)})


def _mean_activation(dataset: ActivationDataset, columns: Columns) -> dict[str, mx.array]:
    """The mean activation `[width]` of each of the sites."""
    total, n = mx.zeros((columns.width,)), 0
    for batch in dataset.batches(BATCH_TOKENS):
        batch = dataset.columns.take(batch, columns.names)
        total += batch.astype(mx.float32).sum(axis=0)
        n += len(batch)
        mx.eval(total)
    return {name: total[part] / n for name, part in columns.slices.items()}
