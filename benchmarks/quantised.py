"""What quantising a language model does to its activations, and to an SAE that is trained on them.

The bundled model as it is, with 8 and with 4 bits per weight; one SAE for each, measured on the
held-out activations of all three.

    python benchmarks/quantised.py [--tokens N] [--passes N] [--models full,4-bit] [--loss-tokens N]

MLX's CPU back-end is slow with quantised weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

# Before MLX, which then finds the OpenBLAS that this one loads.
from mlxterp import InterpretableModel  # isort: skip
from mlx import nn

from mlxterp.sae import ActivationDataset, SAEConfig, SAETrainer
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.evals.loss import loss_recovered

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import python_texts

LAYER, COMPONENT = 2, "residual"
BITS = {"full": None, "8-bit": 8, "4-bit": 4}
GROUP_SIZE = 64  # weights that share a scale and a bias
HELD_OUT = 0.1


def quantised(bits: int | None) -> InterpretableModel:
    """The bundled model, with so many bits per weight of its embedding and linear layers."""
    model = InterpretableModel.demo()
    if bits is None:
        return model
    nn.quantize(model.model, group_size=GROUP_SIZE, bits=bits)
    return InterpretableModel(model.model, model.tokenizer)


def harvested(
    model: InterpretableModel, n_tokens: int
) -> tuple[ActivationDataset, ActivationDataset]:
    """Training and held-out activations, of the same tokens for every model."""
    dataset = ActivationDataset.from_texts(
        model, python_texts(), LAYER, COMPONENT, context_length=128,
        max_samples=round(n_tokens / (1 - HELD_OUT)),
    )  # fmt: skip
    return dataset.split(HELD_OUT)


def distance(moved: ActivationDataset, full: ActivationDataset) -> float:
    """`sum |x' - x|^2 / sum |x - mean(x)|^2`, in the units of FVU."""
    # One seed gives one order, so that rows belong to the same token.
    error = variance = 0.0
    mean = sum(batch.sum(axis=0) for batch in full.batches(4096)) / len(full)
    for x, y in zip(full.batches(4096), moved.batches(4096), strict=True):
        error += (y - x).square().sum().item()
        variance += (x - mean).square().sum().item()
    return error / variance


def columns(words: Iterable[str], width: int = 10) -> str:
    return "  ".join(f"{word:>{width}s}" for word in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--models", default=",".join(BITS))
    parser.add_argument("--loss-tokens", type=int, default=20_000)
    arguments = parser.parse_args()
    models = {name: quantised(BITS[name]) for name in arguments.models.split(",")}
    data = {name: harvested(model, arguments.tokens) for name, model in models.items()}
    training, full = data["full"]
    config = SAEConfig.recommended(
        training.columns.width, len(training), num_epochs=arguments.passes, expansion_factor=8,
        k=16, validation_split=0,
    )  # fmt: skip
    print(
        f"{len(training):,} tokens to train on, {arguments.passes} passes; {len(full):,} held out; "
        f"{training.columns.names[0]}, {config.n_features(training.columns.width):,} features\n"
        f"{'':8s} {'moved':>10s}  {'held-out FVU on the activations of':^34s} {'':14s} "
        f"{'loss of the model in nats':^34s}\n"
        f"{'SAE of':8s} {'from full':>10s}  {columns(models)}    {columns(('L0', 'dead'), 5)}  "
        f"{columns(('clean', 'spliced', 'recovered'))}  seconds"
    )
    for name, (training, held_out) in data.items():
        moved = distance(held_out, full)
        started = time.perf_counter()
        sae = SAETrainer(config).fit(training)
        seconds = time.perf_counter() - started
        found = {other: fidelity(sae, data[other][1]) for other in models}
        loss = loss_recovered(sae, held_out, arguments.loss_tokens)
        l0 = f"{found[name].l0:.1f}"
        dead = f"{100 * sae.statistics.training[-1]['dead']:.1f}%"
        recovered = "" if loss.recovered is None else f"{100 * loss.recovered:.1f}%"
        losses = f"{loss.clean:.3f}", f"{loss.spliced:.3f}", recovered
        print(
            f"{name:8s} {moved:10.6f}  {columns(f'{one.fvu:.4f}' for one in found.values())}    "
            f"{columns((l0, dead), 5)}  {columns(losses)}  {seconds:7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
