"""How long circuits between three coders take to find, and whether interventions bear them out.

Three SAEs of the residual stream of the bundled model are trained on a part of the texts, and
circuits are looked for on another. The estimate beforehand stands beside the time that it took,
and the predicted effects of the strongest edges beside what was lost when their sources were taken
out. The circuit of one behaviour, what foresees a token of a held-out text, is timed and checked in
the same way. The load is that of the machine's last minute, of everything that ran on it.

    python benchmarks/circuits.py [--features N] [--tokens N] [--edges N] [--training-tokens N]
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before MLX, which then finds the OpenBLAS that this one loads.
from mlxterp import InterpretableModel  # isort: skip

from mlxterp.sae import SAEConfig
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.circuits.behavior.behavior import find_behavior_circuit
from mlxterp.sae.circuits.dataset.between import circuit_cost, find_feature_circuits
from mlxterp.sae.dataset import ActivationDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import python_texts

LAYERS = (1, 3, 5)
HELD_OUT = 40  # texts
PROMPT = 200  # characters


def memory() -> float:
    """The largest that the process has been, in GB."""
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def timed(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    before, started, cpu = memory(), time.perf_counter(), time.process_time()
    found = function(*args, **options)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(
        f"\n{name}: {seconds:.1f} s ({cpu:.1f} s of all cores together, load "
        f"{os.getloadavg()[0]:.1f}), memory peak {memory():.2f} GB ({before:.2f} GB before)",
        flush=True,
    )
    return found


def trained(
    model: InterpretableModel, texts: list[str], n_features: int, n_tokens: int
) -> dict[int, BaseSAE]:
    saes = {}
    for layer in LAYERS:
        dataset = ActivationDataset.from_texts(
            model, texts, layer, "residual", context_length=128, max_samples=n_tokens
        )
        config = SAEConfig(
            expansion_factor=n_features // dataset.columns.width, k=16, learning_rate=8e-3,
            batch_size=1024, num_epochs=2,
        )  # fmt: skip
        saes[layer] = model.train_sae(
            layer=layer, component="residual", dataset=dataset, config=config, verbose=False
        )
        print(f"layer {layer}: {saes[layer]}", flush=True)
    return saes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=int, default=2048, help="of each SAE")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--edges", type=int, default=50)
    parser.add_argument("--training-tokens", type=int, default=100_000)
    arguments = parser.parse_args()
    model, texts = InterpretableModel.demo(), python_texts()
    held_out, training = texts[:HELD_OUT], texts[HELD_OUT:]
    saes = timed(
        "training", trained, model, training, arguments.features, arguments.training_tokens
    )
    options = {"dataset": held_out, "top_k": arguments.edges, "max_tokens": arguments.tokens}
    print(timed("estimate", circuit_cost, model, saes, **options, verbose=False))
    for method in ("gradient", "integrated_gradients"):
        circuit = timed(
            method, find_feature_circuits, model, saes, **options, method=method, verbose=False
        )
        print(circuit)
        print(timed("interventions", circuit.validate, n=arguments.edges))
    prompt = model.encode(held_out[0][:PROMPT])
    circuit = timed("behavior", find_behavior_circuit, model, saes, prompt, verbose=False)
    print(circuit)
    for of in ("nodes", "edges"):
        print(timed(f"interventions on {of}", circuit.validate, n=arguments.edges, of=of))
    print(timed("minimal", circuit.origin.minimal, 0.8))


if __name__ == "__main__":
    main()
