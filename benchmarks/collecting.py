"""What it costs to collect statistics, examples and co-activations of all features at once.

    python benchmarks/collecting.py [--features N] [--tokens N] [--rounds N] [--function NAME]

Text is the demonstration's, the coder has random directions and an L0 of about 32. One pass that
collects takes turns with one that does nothing but encode the same activations, and the ratio of
their times is printed, with the peak of the process's memory, which is measured in the first pass
that collects.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from mlxterp import InterpretableModel
from mlxterp.sae import SAE, ActivationDataset
from mlxterp.sae.features.collection import BATCH_ENTRIES, collect
from mlxterp.sae.harvest import harvest

import mlx.core as mx  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import python_texts

L0 = 32


def random_sae(dataset: ActivationDataset, n_features: int, function: str) -> SAE:
    """An SAE of random directions, which fire where they are strongest."""
    columns = dataset.columns
    sae = SAE(columns, columns, n_features, function, L0)
    contexts = np.linspace(0, len(dataset.corpus) - 1, 32).astype(int)
    (found,) = harvest(dataset.source, dataset.corpus, columns, contexts)
    x = found.activations.astype(mx.float32)
    W_enc = mx.random.normal((n_features, columns.width), key=mx.random.key(0))
    sae.W_enc = W_enc / mx.linalg.norm(W_enc, axis=1, keepdims=True)
    sae.b_enc = -(sae.W_enc @ x.mean(axis=0))
    some = sae.pre_activations(x[:: len(x) // 64]).reshape(-1)
    threshold = mx.sort(some)[-L0 * (len(some) // n_features)]
    if function == "batch_topk":
        sae.activation_function.threshold = threshold
    elif function == "relu":
        sae.b_enc = sae.b_enc - threshold
    mx.eval(sae.parameters())
    return sae


def encode_alone(sae: SAE, dataset: ActivationDataset) -> float:
    """Seconds to encode all activations, in the batches of `collect`."""
    started, size = time.perf_counter(), BATCH_ENTRIES // sae.n_features
    for found in harvest(dataset.source, dataset.corpus, sae.reads, np.arange(len(dataset.corpus))):
        for start in range(0, len(found.computed), size):
            mx.eval(sae.encode(found.computed[start : start + size]))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=32_768)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--function", default="batch_topk", help="topk, batch_topk or relu")
    arguments = parser.parse_args()
    model = InterpretableModel.demo()
    dataset = ActivationDataset.from_texts(
        model, python_texts(), 2, "residual", context_length=128, max_samples=arguments.tokens
    )
    sae = random_sae(dataset, arguments.features, arguments.function)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ratios = []
    for i in range(arguments.rounds):
        started = time.perf_counter()
        data = collect(sae, dataset)
        collecting = time.perf_counter() - started
        if i == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(data)
            print(f"L0 {data.firing_counts.sum() / data.n_tokens:.1f}")
            print(f"peak memory {peak:.0f} MiB, {before:.0f} MiB before")
        del data
        alone = encode_alone(sae, dataset)
        ratios.append(alone / collecting)
        print(
            f"encoding {alone:.1f} s, collecting {collecting:.1f} s: "
            f"{100 * ratios[-1]:.0f}% of the speed",
            flush=True,
        )
    print(f"median {100 * statistics.median(ratios):.0f}%")


if __name__ == "__main__":
    main()
