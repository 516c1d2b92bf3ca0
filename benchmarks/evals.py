"""How long the evaluation of one SAE takes, and how much memory.

    python benchmarks/evals.py [--tokens N] [--features N]

An SAE of the bundled model after its third block, trained for a moment, is evaluated on documents
that it was not trained on: fidelity and sparsity on `--tokens`, the loss with three ablations on
50,000. Wall and processor time are those of each part; memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

# Before MLX, which then finds the OpenBLAS that this one loads.
from mlxterp import InterpretableModel  # isort: skip

from mlxterp.sae import ActivationDataset, SAEConfig, SAETrainer
from mlxterp.sae.evals.evaluating import evaluate
from mlxterp.sae.evals.measuring import measure
from mlxterp.texts import python_texts

WIDTH, CHARACTERS, TRAINING = 128, 8000, 20_000


def timed(name: str, function: Callable[[], Any]) -> Any:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{name:<34} {wall:6.1f} s, {cpu:6.1f} s of the processor", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=2048)
    arguments = parser.parse_args()
    model = InterpretableModel.demo()
    texts = [text[:CHARACTERS] for text in python_texts()]
    place: Any = {"layer": 2, "component": "residual"}
    config = SAEConfig(
        expansion_factor=arguments.features // WIDTH, k=16, num_epochs=1, learning_rate=4e-3,
        batch_size=1024,
    )  # fmt: skip
    training = ActivationDataset.from_texts(model, texts[::2], **place, max_samples=TRAINING)
    sae = SAETrainer(config).fit(training)
    data = ActivationDataset.from_texts(
        model, texts[1::2], **place, max_samples=arguments.tokens + 256
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timed("fidelity and sparsity", lambda: measure([sae], data, arguments.tokens, 0))
    report = timed("whole report", lambda: evaluate([sae], data, max_tokens=arguments.tokens)[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    print(f"peak memory {peak * unit / 1e9:.2f} GB, {before * unit / 1e9:.2f} GB before")
    print(report)


if __name__ == "__main__":
    main()
