"""What quantising a language model does to its activations, and to an SAE that is trained on them.

The bundled model as it is, with 8 and with 4 bits per weight; one SAE for each, measured on the
held-out activations of all three.

    python benchmarks/quantised.py [--tokens N] [--passes N]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import mlx.nn as nn

from mlxterp import InterpretableModel
from mlxterp.sae import SAE, ActivationDataset, SAEConfig, SAETrainer
from mlxterp.sae.evals import fidelity, loss_recovered

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import python_texts

LAYER, COMPONENT = 2, "residual"
BITS = {"full": None, "8-bit": 8, "4-bit": 4}
GROUP_SIZE = 64  # weights that share a scale and a bias
HELD_OUT = 0.1
LOSS_TOKENS = 20_000


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--passes", type=int, default=4)
    arguments = parser.parse_args()
    models = {name: quantised(bits) for name, bits in BITS.items()}
    data = {name: harvested(model, arguments.tokens) for name, model in models.items()}
    training, full = data["full"]
    config = SAEConfig.recommended(training.columns.width, len(training)).replace(
        num_epochs=arguments.passes, expansion_factor=8, k=16, validation_split=0
    )
    print(
        f"{len(training):,} tokens to train on, {arguments.passes} passes; {len(full):,} held out; "
        f"{training.columns.names[0]}\n"
        f"                moved      held-out FVU on activations of                 "
        f"training     loss: clean, spliced,\n"
        f"SAE of      from full  {'  '.join(f'{name:>9s}' for name in models)}     L0    dead  "
        f"  seconds     recovered"
    )
    saes: dict[str, SAE] = {}
    for name, (training, held_out) in data.items():
        moved = distance(held_out, full)
        started = time.perf_counter()
        saes[name] = sae = SAETrainer(config).fit(training)
        seconds = time.perf_counter() - started
        found = {other: fidelity(sae, data[other][1]) for other in models}
        loss = loss_recovered(sae, held_out, LOSS_TOKENS)
        fvus = "  ".join(f"{one.fvu:9.4f}" for one in found.values())
        dead = sae.statistics.training[-1]["dead"]
        print(
            f"{name:8s}  {moved:11.6f}  {fvus}  {found[name].l0:5.1f}  {100 * dead:5.1f}%  "
            f"{seconds:9.1f}     {loss}",
            flush=True,
        )


if __name__ == "__main__":
    main()
