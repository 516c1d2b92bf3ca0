"""Whether steering with a feature does what its logit effects say, beside directions at random.

For SAEs of the residual stream of some layers of the bundled model. The rule that chooses features
looks at weights and firing rates alone: of those that fire on 0.1 to 5 % of held-out tokens the ten
whose effect on one token's logit stands out most. The targets are a feature's five top logit
tokens, the strengths are in units of its largest value. Beside it stand four random directions and
the difference between the mean activations of texts where the feature is strongest and of others
where it does not fire, all of the same norm.

    python benchmarks/steering.py [--layers 3,4,5] [--tokens N] [--features N] [--targets N]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

# Before MLX, which then finds the OpenBLAS that this one loads.
from mlxterp import InterpretableModel  # isort: skip
import numpy as np

from mlxterp.sae import ActivationDataset
from mlxterp.sae.features.collection import collect
from mlxterp.sae.steering.report import SteeringReport
from mlxterp.sae.steering.sweep import peaked_features, strength_sweep

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import python_texts

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCORED_TEXTS, SCORED_CHARACTERS = 24, 400
COLUMNS = (
    f"{'layer':>5}  {'feature':>7}  {'monotone':>8}  {'slope':>6}  {'effect':>6}  {'random':>13}  "
    f"{'largest':>7}  {'difference':>10}  {'specific':>8}  {'KL':>5}  {'random':>6}  top tokens"
)


def line(layer: int, feature_id: int, report: SteeringReport) -> str:
    """What the table says of one feature; effects and divergences are those at strength 1."""
    random = np.array([r.effects[-1] for r in report.random])
    kl = np.mean([r.kl[-1] for r in report.random])
    steered, other = report.steered, report.difference
    return (
        f"{layer:>5}  {feature_id:>7}  {'yes' if report.is_monotone else 'no':>8}  "
        f"{report.slope:>6.2f}  {steered.effects[-1]:>+6.2f}  "
        f"{random.mean():>+5.2f} ± {random.std():>5.2f}  {random.max():>+7.2f}  "
        f"{other.effects[-1] if other else np.nan:>+10.2f}  {steered.specificity[-1]:>8.2f}  "
        f"{steered.kl[-1]:>5.2f}  {kl:>6.2f}  {'  '.join(map(repr, report.targets))}"
    )


def summary(layer: int, reports: list[SteeringReport]) -> str:
    effects = np.array([r.steered.effects[-1] for r in reports])
    random = np.array([[x.effects[-1] for x in r.random] for r in reports])
    others = np.array([r.difference.effects[-1] for r in reports if r.difference])
    rising = np.mean([_rises(x.effects) for r in reports for x in r.random])
    exact = all(r.steered.perplexities[0] == r.perplexity for r in reports)
    return (
        f"layer {layer}: monotone {sum(r.is_monotone for r in reports)} of {len(reports)}, "
        f"above all random ones {(effects > random.max(axis=1)).sum()} of {len(reports)}; "
        f"median effect {np.median(effects):+.2f} nats, random {np.median(random):+.2f}, "
        f"difference of means {np.median(others):+.2f}; "
        f"random ones monotone {rising:.0%}; "
        f"perplexity at strength 0 {'is' if exact else 'IS NOT'} the plain one exactly"
    )


def _rises(effects: np.ndarray) -> bool:
    return bool((np.diff(effects) > 0).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default="3,4,5")
    parser.add_argument("--tokens", type=int, default=200_000, help="to train each SAE on")
    parser.add_argument("--features", type=int, default=10, help="to steer with, of each SAE")
    parser.add_argument("--targets", type=int, default=5, help="top logit tokens of each feature")
    arguments = parser.parse_args()

    model = InterpretableModel.demo()
    texts = python_texts()
    held_out, training = texts[:60], texts[60:]
    scored = [text[1000:][:SCORED_CHARACTERS] for text in texts[60 - SCORED_TEXTS : 60]]
    scored = [text for text in scored if text]
    print(COLUMNS)
    totals = []
    for layer in map(int, arguments.layers.split(",")):
        started = time.perf_counter()
        sae = model.train_sae(
            layer=layer, component="residual", verbose=False,
            dataset=ActivationDataset.from_texts(
                model, training, layer, "residual", context_length=128,
                max_samples=arguments.tokens,
            ),
        )  # fmt: skip
        data = collect(
            sae,
            ActivationDataset.from_texts(
                model, held_out[: 60 - SCORED_TEXTS], layer, "residual", context_length=128,
                max_samples=100_000,
            ),
        )  # fmt: skip
        reports = []
        for feature_id in peaked_features(sae, model, data.firing_rates, arguments.features):
            silent = data.silent(feature_id, 20)
            reports.append(
                strength_sweep(
                    sae, model, feature_id, scored, STRENGTHS, maxima=data.maxima,
                    n_targets=arguments.targets,
                    positive=[e.ids for e in data.examples(feature_id, 20)],
                    negative=[data.example(feature_id, int(p)).ids for p in silent],
                )
            )  # fmt: skip
            print(line(layer, feature_id, reports[-1]), flush=True)
        totals.append(summary(layer, reports))
        print(f"{totals[-1]} ({time.perf_counter() - started:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
