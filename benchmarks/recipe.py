"""What `SAEConfig.recommended` rests on: held-out FVU over each setting, around a middle point.

Text is the demonstration's; activations are those of the bundled model's middle layer. Every run is
measured on the same held-out documents.

    python benchmarks/recipe.py [--tokens N] [--sweeps learning_rate,batch_size,...]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset, SAEConfig
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.sae import SAE
from mlxterp.sae.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import python_texts

MIDDLE = {"tokens": 600_000, "passes": 4, "expansion_factor": 16, "k": 16, "batch_size": 1024,
          "learning_rate": 4e-3}  # fmt: skip
SWEEPS = {
    "learning_rate": [
        {"learning_rate": rate, "expansion_factor": factor}
        for factor in (4, 16, 64)
        for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
    ],
    "batch_size": [
        {"batch_size": size, "learning_rate": rate}
        for size in (256, 512, 1024, 2048, 4096)
        for rate in (2e-3, 4e-3, 8e-3)
    ],
    "little_data": [
        {"tokens": n, "passes": passes, "expansion_factor": factor, "batch_size": 256}
        for n in (10_000, 50_000)
        for passes in (10, 40)
        for factor in (2, 4, 8, 16)
    ],
    "passes": [
        {"tokens": n, "passes": passes}
        for n in (100_000, 300_000, 1_000_000)
        for passes in (1, 2, 4, 8, 16)
    ],
    "k_and_features": [
        {"k": k, "expansion_factor": factor}
        for factor in (4, 8, 16, 32)
        for k in (4, 8, 16, 32, 64)
    ],
    "long": [
        {"tokens": 1_000_000, "passes": 16, "learning_rate": rate}
        for rate in (5e-4, 1e-3, 2e-3, 4e-3)
    ],
    "warmup": [{"warmup_steps": n} for n in (0, 50, 200, 1000)],
    "auxiliary": [
        {"auxiliary_coefficient": c, "learning_rate": rate}
        for c in (0.0, 1 / 32)
        for rate in (4e-3, 1.6e-2)
    ],
}


def run(training, held_out, **settings) -> tuple[float, float, float, float]:
    """Held-out FVU, training FVU, dead share and seconds of one run."""
    settings = {**MIDDLE, **settings}
    n, passes = settings.pop("tokens"), settings.pop("passes")
    data = ActivationDataset.from_activations(training[:n])
    config = SAEConfig(num_epochs=passes, resample_dead_every=0, **settings)
    columns = data.columns
    sae = SAE(columns, columns, config.n_features(columns.width), k=config.k)
    started = time.perf_counter()
    result = Trainer(config).fit(sae, data)
    seconds = time.perf_counter() - started
    last = result.training[-1]
    return fidelity(sae, held_out).fvu, last["fvu"], last["dead"], seconds


def together(dataset: ActivationDataset) -> np.ndarray:
    return np.concatenate([np.array(batch) for batch in dataset.batches(65_536)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--sweeps", default=",".join(SWEEPS))
    arguments = parser.parse_args()
    model = InterpretableModel.demo()
    dataset = ActivationDataset.from_texts(
        model, python_texts(), 2, "residual", context_length=128,
        max_samples=int(arguments.tokens * 1.1), shuffle=False,
    )  # fmt: skip
    training, held_out = dataset.split(0.09, seed=0)
    array = together(training)
    held_out = ActivationDataset.from_activations(together(held_out))
    print(f"{len(array):,} tokens to train on, {len(held_out):,} held out; middle point {MIDDLE}")
    for name in arguments.sweeps.split(","):
        print(f"\n{name}")
        for settings in SWEEPS[name]:
            fvu, training_fvu, dead, seconds = run(array, held_out, **settings)
            shown = "  ".join(f"{key}={value:g}" for key, value in settings.items())
            print(
                f"  {shown:60s} held-out FVU {fvu:.4f}  training FVU {training_fvu:.4f}  "
                f"dead {100 * dead:5.2f}%  {seconds:5.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
