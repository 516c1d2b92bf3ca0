"""What it costs to compare all features of a coder: their neighbours, families, and partners.

    python benchmarks/similarity.py [--features N [N ...]] [--width N] [--short]

Decoder rows are in families of eight, whose members have a cosine of about .5. The second coder has
the same features in another order: one half with some noise (a cosine of .9), the other half
redrawn. Every figure comes from a process of its own, whose peak of memory is printed beside that
from before the call.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from mlxterp.sae import SAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.similarity.clusters import find_clusters
from mlxterp.sae.similarity.matching import match
from mlxterp.sae.similarity.nearest import nearest_all

import mlx.core as mx  # isort: skip

SIZES, SHORT = (2_048, 32_768), (1_024,)
FAMILY, WITHIN, AGAIN = 8, 0.5, 0.9


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def sae_of(rows: np.ndarray) -> SAE:
    """An SAE with those rows in both matrices."""
    columns = Columns(("x",), (rows.shape[1],))
    sae = SAE(columns, columns, len(rows), "topk", 16)
    sae.W_enc = sae.W_dec = mx.array(rows.astype(np.float32))
    mx.eval(sae.parameters())
    return sae


def pair(n_features: int, width: int) -> tuple[SAE, SAE]:
    """A coder with families of features, and another one that shares one half of them."""
    rng = np.random.default_rng(0)

    def drawn(n: int) -> np.ndarray:
        return unit(rng.standard_normal((n, width)))

    centres = np.repeat(drawn(-(-n_features // FAMILY)), FAMILY, axis=0)[:n_features]
    rows = WITHIN**0.5 * centres + (1 - WITHIN) ** 0.5 * drawn(n_features)
    again = AGAIN * rows + (1 - AGAIN**2) ** 0.5 * drawn(n_features)
    again[::2] = drawn(len(again[::2]))
    return sae_of(rows), sae_of(again[rng.permutation(n_features)])


TASKS: dict[str, Callable[[SAE, SAE], object]] = {
    "nearest_all": lambda sae, _: nearest_all(sae),
    "match": match,
    "find_clusters": lambda sae, _: find_clusters(sae),
}


def measured(task: str, n_features: int, width: int) -> tuple[float, float, float, str]:
    """Seconds, GB at the peak and before, and the result's first lines."""
    coders = pair(n_features, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    started = time.perf_counter()
    found = TASKS[task](*coders)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    shown = "" if task == "nearest_all" else "\n".join(repr(found).splitlines()[:6])
    return seconds, peak, before, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, nargs="+", default=SIZES)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--short", action="store_true", help="seconds, with 1,024 features")
    arguments = parser.parse_args()
    for n_features in SHORT if arguments.short else arguments.features:
        for task in TASKS:
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                job = alone.submit(measured, task, n_features, arguments.width)
                seconds, peak, before, shown = job.result()
            print(
                f"{task:14s} {n_features:>7,} x {arguments.width}: {seconds:6.1f} s, peak memory "
                f"{peak:.2f} GB, {before:.2f} GB before",
                flush=True,
            )
            print("".join(f"    {line}\n" for line in shown.splitlines()), end="", flush=True)


if __name__ == "__main__":
    main()
