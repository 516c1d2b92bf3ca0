"""Activations on disk: memory, reading, training from them, and what 8 bits cost.

    python benchmarks/datasets.py memory --tokens 1000000,10000000 --dir DIR
    python benchmarks/datasets.py reading --dir DIR      # of what `memory` left there
    python benchmarks/datasets.py training --dir DIR
    python benchmarks/datasets.py precision --dir DIR

`memory` harvests from a stand-in for a language model whose activations are rows of a table, and
goes once through the result, each size in a process of its own. `reading` compares a shuffled pass
with reading the same files from beginning to end, both from a disk whose cache was dropped, taking
turns. `training` compares the same steps on batches from disk and from memory, taking turns.
`precision` trains on the bundled model's activations as they are kept in each format.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import mlxterp

import mlx.core as mx  # isort: skip

from mlxterp.sae import ActivationDataset, SAEConfig
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.sae import SAE, SAETrainer
from mlxterp.sae.store import INDEX_FILE

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import python_texts

SITE, WIDTH, VOCABULARY, CONTEXT = "layers.0.mlp", 2048, 1024, 512
BATCH = 4096


class Table:
    """A stand-in for a language model: activations are rows of a table, one for each token id."""

    name, fingerprint, context_length, n_layers = "table", "table", CONTEXT, 1
    special_token_ids: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.table = mx.random.normal((VOCABULARY, WIDTH), key=mx.random.key(0))

    def site(self, layer, component=None) -> str:
        return SITE

    def width(self, site) -> int:
        return WIDTH

    def run(self, tokens, *, capture=(), edit=None, stop=False) -> dict[str, mx.array]:
        return {SITE: self.table[tokens]}


def token_ids(n: int) -> Iterator[np.ndarray]:
    """Documents of random lengths with `n` tokens in all."""
    rng, left = np.random.default_rng(0), n
    while left:
        length = min(left, int(rng.integers(100, 4000)))
        yield rng.integers(0, VOCABULARY, length, dtype=np.int32)
        left -= length


def peak_mib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def harvest(n: int, directory: Path) -> None:
    """Harvest `n` tokens, go through them once, and say how long it took and what it needed."""
    started = time.perf_counter()
    dataset = ActivationDataset.from_texts(
        Table(), token_ids(n), SITE, context_length=CONTEXT, cache_dir=directory / str(n)
    )
    harvested, peak = time.perf_counter() - started, peak_mib()
    started = time.perf_counter()
    seen = sum(len(batch) for batch in dataset.batches(BATCH))
    read = time.perf_counter() - started
    print(
        f"{n:12,d} tokens, {2 * n * WIDTH / 1e9:5.1f} GB: harvest {harvested:6.1f} s, peak "
        f"{peak:6.0f} MiB; a pass {read:6.1f} s, peak {peak_mib():6.0f} MiB"
        f"{'' if seen == n else ' WRONG'}",
        flush=True,
    )


def memory(sizes: list[int], directory: Path) -> None:
    for n in sizes:
        command = [sys.executable, "-W", "ignore", __file__, "harvest", "--tokens", str(n)]
        subprocess.run([*command, "--dir", str(directory)], check=True)


def drop_cache(files: list[Path]) -> None:
    """Make the system forget what it keeps of some files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def reading(directory: Path, rounds: int) -> None:
    """Sequential reading against a shuffled pass, over the largest set of activations."""
    places = [index.parent for index in directory.glob(f"**/{INDEX_FILE}")]
    path = max(places, key=lambda place: sum(f.stat().st_size for f in place.iterdir()))
    files = sorted(path.glob("0*.safetensors"))
    n_bytes = sum(file.stat().st_size for file in files)
    rates: dict[str, list[float]] = {"from beginning to end": [], "shuffled batches": []}
    for _ in range(rounds):
        drop_cache(files)
        started, buffer = time.perf_counter(), bytearray(8 << 20)
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
        rates["from beginning to end"].append(n_bytes / 1e9 / (time.perf_counter() - started))
        drop_cache(files)
        dataset = ActivationDataset.open(path)
        started = time.perf_counter()
        for batch in dataset.batches(BATCH):
            mx.eval(batch)
        rates["shuffled batches"].append(n_bytes / 1e9 / (time.perf_counter() - started))
    first, second = (statistics.median(found) for found in rates.values())
    print(f"{n_bytes / 1e9:.1f} GB, {rounds} rounds, GB/s: {dict(rates)}")
    print(f"medians {first:.2f} and {second:.2f} GB/s: {second / first:.0%}")


def training(directory: Path, rounds: int) -> None:
    """Steps of the same coder on batches from disk and from memory."""
    n, d = 400_000, 512
    rng = np.random.default_rng(0)
    (directory / "arrays").mkdir(parents=True, exist_ok=True)
    for i in range(4):
        rows = rng.normal(size=(n // 4, d)).astype(np.float32)
        np.save(directory / "arrays" / f"{i}.npy", rows)
    config = SAEConfig(
        k=32, expansion_factor=4, batch_size=1024, num_epochs=1, validation_split=0.0,
        learning_rate=1e-3, resample_dead_every=0,
    )  # fmt: skip
    seconds: dict[str, list[float]] = {"disk": [], "memory": []}
    for _ in range(rounds):
        for name, buffer_bytes in (("disk", 200 << 20), ("memory", 2 << 30)):
            data = ActivationDataset.from_activations(directory / "arrays")
            data.buffer_bytes = buffer_bytes
            if name == "memory":
                next(data.batches(1024))  # reads everything
            started = time.perf_counter()
            SAETrainer(config).fit(data)
            seconds[name].append(time.perf_counter() - started)
    disk, kept = (statistics.median(found) for found in seconds.values())
    print(
        f"{n:,} tokens of width {d}, {4 * d} features: {n / disk:,.0f} tokens/s from disk, "
        f"{n / kept:,.0f} from memory: {kept / disk:.0%}"
    )


def precision(directory: Path) -> None:
    """FVU on held-out float32 activations of coders trained on each format."""
    model, texts = mlxterp.InterpretableModel.demo(), list(python_texts())
    texts, held_out = texts[: 9 * len(texts) // 10], texts[9 * len(texts) // 10 :]
    common = {"context_length": 128, "max_samples": 200_000}
    validation = ActivationDataset.from_texts(model, held_out, 2, "residual", context_length=128)
    exact = None
    for name in ("float32", "bfloat16", "int8"):
        data = ActivationDataset.from_texts(
            model, texts, 2, "residual", cache_dir=directory / "precision", precision=name, **common
        )
        array = np.concatenate(
            [np.array(batch.astype(mx.float32)) for batch in unshuffled(data).batches(65_536)]
        ).astype(np.float64)
        exact = array if exact is None else exact
        moved = np.square(array - exact).sum() / np.square(exact - exact.mean(axis=0)).sum()
        config = SAEConfig.recommended(128, len(data), num_epochs=5, expansion_factor=8)
        sae: SAE = SAETrainer(config.replace(validation_split=0.0)).fit(data)
        found = fidelity(sae, validation, max_tokens=30_000)
        row = data._store.layout.row_bytes if data._store else 0
        print(f"{name:10s}{row:5d} bytes a token; moved {moved:.2e}; held-out {found}", flush=True)


def unshuffled(data: ActivationDataset) -> ActivationDataset:
    same = data._like()
    same.shuffle = False
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("memory", "harvest", "reading", "training", "precision"))
    parser.add_argument("--tokens", default="1000000,10000000")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes = [int(n) for n in arguments.tokens.split(",")]
    if arguments.part == "memory":
        memory(sizes, arguments.dir)
    elif arguments.part == "harvest":
        harvest(sizes[0], arguments.dir)
    elif arguments.part == "precision":
        precision(arguments.dir)
    else:
        {"reading": reading, "training": training}[arguments.part](arguments.dir, arguments.rounds)


if __name__ == "__main__":
    main()
