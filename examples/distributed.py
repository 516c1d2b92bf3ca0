"""Train one SAE on several processes:

    mlx.launch -n 2 --backend ring -- python examples/distributed.py --parallel data

The data are made up: sums of a few known directions each. Alone, as `python
examples/distributed.py`, it trains the same SAE in one process.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from mlxterp.sae import Callback, ProgressBar, SAEConfig, SAETrainer

import mlx.core as mx  # isort: skip  (after mlxterp)


def activations(n_tokens: int, width: int, n_directions: int, active: int = 8) -> np.ndarray:
    """`[n_tokens, width]`, the same in every process because the seed is."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(n_directions, width)) / width**0.5
    chosen = rng.integers(n_directions, size=(n_tokens, active))
    strength = rng.uniform(0.5, 1.5, size=(n_tokens, active, 1))
    return (strength * directions[chosen]).sum(axis=1).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one SAE on several processes.")
    parser.add_argument("--parallel", choices=["data", "features"], default="data")
    parser.add_argument("--activation", default="topk", help="topk, batch_topk, jumprelu, ...")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--save", type=Path, default=Path("sae_distributed.mlx"))
    arguments = parser.parse_args()
    group = mx.distributed.init()

    config = SAEConfig(
        expansion_factor=8,
        activation_function=arguments.activation,
        k=8,
        learning_rate=3e-3,
        batch_size=512,  # of all processes together
        num_epochs=4,
        warmup_steps=10,
    )
    callbacks: list[Callback] = [ProgressBar()]  # only the first process has callbacks
    trainer = SAETrainer(config, callbacks=callbacks, parallel=arguments.parallel)
    started = time.perf_counter()
    sae = trainer.fit(activations(arguments.tokens, arguments.width, 4 * arguments.width))

    if group.rank() == 0:  # every process has the whole SAE; one of them saves it
        last = sae.statistics.validation[-1]
        print(f"{group.size()} processes, {time.perf_counter() - started:.1f} s")
        print(f"held-out FVU {last['fvu']:.5f}, L0 {last['l0']:.2f}")
        sae.save(arguments.save)


if __name__ == "__main__":
    main()
