"""All tasks of the benchmark on SAEs of the bundled model, beside an SAE of the same model with
random weights, and which of their differences are more than noise.

    python benchmarks/tasks.py [--part synthetic|models] [--tokens N] [--saes DIRECTORY]

`synthetic`: how much of known features is recovered, by SAEs of three seeds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import get_args

from mlxterp import InterpretableModel
from mlxterp.sae import SAE, ActivationDataset, SAEConfig
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.config import SAEConfig as Config
from mlxterp.sae.evals.tasks.benchmarks import Benchmarks
from mlxterp.sae.evals.tasks.ground_truth import recovery
from mlxterp.sae.evals.tasks.synthetic import Kind, SyntheticFeatures
from mlxterp.sae.sae import SAETrainer
from mlxterp.texts import python_texts

import mlx.core as mx  # isort: skip

LAYER, CONTEXT = 3, 128
TRAINED, RANDOM = "trained model", "model with random weights"


def random_copy(model: InterpretableModel) -> InterpretableModel:
    """The same architecture and tokenizer with the weights that it has before training."""
    mx.random.seed(0)
    return InterpretableModel(type(model.model)(model.model.args), tokenizer=model.tokenizer)


def config(seed: int) -> Config:
    return SAEConfig(
        expansion_factor=16, k=16, learning_rate=4e-3, batch_size=1024, num_epochs=1, seed=seed
    )


def sae_of(model: InterpretableModel, n_tokens: int, path: Path, seed: int = 0) -> BaseSAE:
    if path.exists():
        return model.load_sae(str(path))
    started = time.perf_counter()
    dataset = ActivationDataset.from_texts(
        model, python_texts(), LAYER, "residual", context_length=CONTEXT, max_samples=n_tokens
    )
    sae = model.train_sae(
        layer=LAYER, component="residual", dataset=dataset, save_path=str(path),
        config=config(seed), verbose=False,
    )  # fmt: skip
    print(f"{path.name} trained in {time.perf_counter() - started:.0f} s")
    return sae


def measured(sae: BaseSAE, model: InterpretableModel, others: list[BaseSAE]) -> Benchmarks:
    started = time.perf_counter()
    texts = python_texts(1)[:120]
    sae.collect(texts, model=model, max_tokens=100_000, verbose=False)
    tasks = ["probing", "absorption", "perturbation", "autointerp", *["stability"] * bool(others)]
    found = sae.benchmark(tasks, model=model, others=others)
    print(f"\nin {time.perf_counter() - started:.0f} s: {found}")
    for task in ("probing", "absorption"):
        if task in found.results:
            print(f"\n{found[task]}")
    return found


def synthetic(kind: Kind) -> None:
    """Recovery by SAEs of three seeds, whose spread is that of training."""
    features = SyntheticFeatures.make(kind, 64, 32, 2.0)
    activations = features.draw(200_000, 99).activations
    saes: list[SAE] = [
        SAETrainer(
            SAEConfig(expansion_factor=2, k=2, learning_rate=3e-3, batch_size=512, num_epochs=2,
                      seed=seed)
        ).fit(activations)
        for seed in range(3)
    ]  # fmt: skip
    print(f"\n{features}\n{recovery(saes, features)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["synthetic", "models"])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--saes", type=Path, default=Path("tasks_saes"))
    arguments = parser.parse_args()
    if arguments.part != "models":
        for kind in get_args(Kind):
            synthetic(kind)
    if arguments.part == "synthetic":
        return
    arguments.saes.mkdir(exist_ok=True)
    model = InterpretableModel.demo()
    random = random_copy(model)
    one, two = (
        sae_of(model, arguments.tokens, arguments.saes / f"seed_{seed}.mlx", seed)
        for seed in (0, 1)
    )
    of_random = sae_of(random, arguments.tokens, arguments.saes / "random_model.mlx")
    found = {TRAINED: measured(one, model, [two]), RANDOM: measured(of_random, random, [])}
    other = measured(two, model, [one])
    print(f"\n{TRAINED} less {RANDOM}\n{found[TRAINED].minus(found[RANDOM])}")
    print(f"\nseed 0 less seed 1\n{found[TRAINED].minus(other)}")


if __name__ == "__main__":
    main()
