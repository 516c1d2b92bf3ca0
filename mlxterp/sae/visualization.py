"""Features as something to look at: text in a terminal, HTML in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from mlxterp.sae.analysis import Example, FeatureExamples, LogitEffects, logit_effects
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.harvest import ActivationSource


@dataclass(frozen=True)
class FeatureView:
    """One feature: where it fires, on what, and which tokens it makes more and less likely.

    `firing_rate` is its share of the tokens at the end of training, `None` where it is not known;
    `logits` is `None` for a coder that does not write the residual stream's width.
    """

    feature_id: int
    firing_rate: float | None
    examples: tuple[Example, ...]
    logits: LogitEffects | None

    def __repr__(self) -> str:
        rate = "" if self.firing_rate is None else f", on {100 * self.firing_rate:.2f}% of tokens"
        lines = [f"Feature {self.feature_id}{rate}"]
        if self.logits is not None:
            lines.append("  raises  " + "  ".join(repr(token) for token, _ in self.logits.top[:8]))
            lines.append(
                "  lowers  " + "  ".join(repr(token) for token, _ in self.logits.bottom[:8])
            )
        if not self.examples:
            lines.append("  not active on any of these tokens")
        return "\n".join([*lines, *(f"  {example}" for example in self.examples)])

    def _repr_html_(self) -> str:
        from jinja2 import Environment

        template = (
            resources.files("mlxterp.sae").joinpath("templates/feature.html").read_text("utf-8")
        )
        largest = max((max(example.values) for example in self.examples), default=1.0)
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(template).render(view=self, largest=largest)


def view_feature(
    coder: SparseCoder,
    source: ActivationSource,
    examples: FeatureExamples,
    feature_id: int,
    firing_rate: float | None = None,
) -> FeatureView:
    """Gather what `FeatureView` shows."""
    shown = examples.of(feature_id)
    logits = logit_effects(coder, source, feature_id) if _writes_stream(coder, source) else None
    return FeatureView(feature_id, firing_rate, shown, logits)


def _writes_stream(coder: SparseCoder, source: ActivationSource) -> bool:
    return coder.d_out == getattr(source, "d_model", None)
