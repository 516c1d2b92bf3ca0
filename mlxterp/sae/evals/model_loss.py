"""What the language model's predictions lose with a coder in place, beside three ablations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlxterp.sae.evals.loss import LossRecovered
from mlxterp.sae.evals.noise import Score
from mlxterp.sae.visualization import Table, plot_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Ablation:
    """The loss with sites ablated, in nats per token, its divergence from the model as it is, and
    the shares of both that the coder recovers: 0 for the ablation itself, 1 for a perfect coder."""

    loss: Score
    kl: Score
    recovered: Score
    kl_recovered: Score

    def to_dict(self) -> dict[str, Any]:
        """The scores."""
        return {name: getattr(self, name).to_dict() for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class ModelLoss:
    """The language model's loss in nats per token, and KL(clean || replaced), over `n_tokens`.

        difference = spliced - clean
        recovered = (ablated - spliced) / (ablated - clean)
        KL recovered = (KL ablated - KL spliced) / KL ablated

    `ablations` are by `zero`, by the `mean` activation, and to `resample` it from other tokens. A
    share is no number, but a reason, where the ablation costs less than 0.01 nats or two standard
    errors, or the model does no better than a uniform guess. Of a coder that writes several sites
    these are the figures with all of them replaced together, `by_site` with each alone.
    """

    clean: Score
    spliced: Score
    difference: Score
    kl: Score
    ablations: Mapping[str, Ablation]
    n_tokens: int
    by_site: Mapping[str, ModelLoss] = field(default_factory=dict)

    @property
    def recovered(self) -> Score:
        """The share of what ablation by the mean costs that the coder recovers."""
        return self.ablations["mean"].recovered

    @property
    def ablated(self) -> Score:
        """The loss with the mean activation in place."""
        return self.ablations["mean"].loss

    @property
    def plain(self) -> LossRecovered:
        """The losses without their spreads, ablated by the mean."""
        losses = map(float, (self.clean, self.spliced, self.ablated))
        return LossRecovered(*losses, n_tokens=self.n_tokens)

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """Names, values and spreads of a table; the control is ablation by the mean."""
        ablated = self.ablations["mean"]
        gap = float(ablated.loss) - float(self.clean)
        rows = [
            ("loss of the model (nats)", *self.clean.cells()),
            ("loss with the coder", *self.spliced.cells()[:2], f"{ablated.loss:.4f}"),
            ("difference", *self.difference.cells()[:2], f"{gap:.4f}"),
            ("KL from the model (nats)", *self.kl.cells()[:2], f"{ablated.kl:.4f}"),
        ]
        for name, key in (("loss recovered", "recovered"), ("KL recovered", "kl_recovered")):
            for how, ablation in self.ablations.items():
                rows.append((f"{name} ({how})", *getattr(ablation, key).cells()))
        for site, alone in self.by_site.items():
            rows.append((f"recovered at {site} (mean)", *alone.recovered.cells()))
        return rows

    @property
    def table(self) -> Table:
        """The figures."""
        title = f"Loss over {self.n_tokens:,} tokens"
        return Table(title, ("", "value", "±", "mean-ablated"), tuple(self.rows))

    @property
    def reasons(self) -> dict[str, str]:
        """Why shares have no value, by their names in the table."""
        shares = (("loss recovered", "recovered"), ("KL recovered", "kl_recovered"))
        found = {
            f"{name} ({how})": getattr(ablation, key).reason
            for name, key in shares
            for how, ablation in self.ablations.items()
        }
        sites = self.by_site.items()
        found |= {f"recovered at {site} (mean)": alone.recovered.reason for site, alone in sites}
        return {name: reason for name, reason in found.items() if reason}

    def to_dict(self) -> dict[str, Any]:
        """The figures, and those of each site."""
        names = ("clean", "spliced", "difference", "kl")
        found: dict[str, Any] = {name: getattr(self, name).to_dict() for name in names}
        found |= {"ablations": {how: found.to_dict() for how, found in self.ablations.items()}}
        found |= {"n_tokens": self.n_tokens}
        sites = {site: alone.to_dict() for site, alone in self.by_site.items()}
        return found | ({"by_site": sites} if sites else {})

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the losses, with all sites replaced and each alone."""
        every = {"all sites" if self.by_site else "": self, **self.by_site}
        return plot_losses({name: loss.plain for name, loss in every.items()}, ax)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()
