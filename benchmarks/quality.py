"""How well coders reconstruct at a given sparsity: ours and other libraries', on the same data.

    python benchmarks/quality.py [--part ours|peers] [--k 8,16,32] [--device cuda] [--out FILE]

Text and activations are the demonstration's: the bundled model after its third block. Everyone
trains on the same cached tokens, as many times, with as many features, and is measured by the same
code on raw activations of held-out documents. We train with our recipe; a peer with its own, and
again with its learning rate changed, since its default is meant for runs hundreds of times as long.
Needs what `peers.py` does; without it `--part ours` still runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import mlxterp

import mlx.core as mx  # isort: skip

from mlxterp.sae import ActivationDataset, SAEConfig
from mlxterp.sae.evals.loss import loss_recovered
from mlxterp.sae.sae import SAE
from mlxterp.sae.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))
import peers
from quickstart import python_texts

OURS = ("topk", "abs_topk", "batch_topk", "jumprelu", "relu", "gated", "matryoshka")
RATES = {"sparsify": (0.1, 0.3, 1.0)}  # of its default optimiser, whose steps have a fixed size
OTHER_RATES = (1.0, 3.0, 10.0)
EVALUATION_TOKENS = 2048


class Data(NamedTuple):
    """`training`, `held_out` `[n, d]`; `documents` are the held-out ones, for the model's loss."""

    training: np.ndarray
    held_out: np.ndarray
    documents: ActivationDataset


class Result(NamedTuple):
    """A coder, how it was made and how good it is."""

    library: str
    architecture: str
    asked: float
    rate_factor: float
    l0: float
    fvu: float
    dead: float
    recovered: float | None
    seconds: float
    settings: dict[str, Any]

    def __str__(self) -> str:
        recovered = "-" if self.recovered is None else f"{self.recovered:.2%}"
        name = f"{self.library} {self.architecture}"
        return (
            f"{name:34s}{self.asked:8g}{self.rate_factor:6g}{self.l0:8.1f}{self.fvu:9.4f}"
            f"{self.dead:9.2%}{recovered:>11s}{self.seconds:8.0f}"
        )


HEADER = "".join(
    f"{name:>{width}s}"
    for name, width in (
        ("", 34), ("asked", 8), ("rate", 6), ("L0", 8), ("FVU", 9), ("silent", 9),
        ("recovered", 11), ("s", 8),
    )
)  # fmt: skip


class Spliced:
    """A coder of NumPy arrays in the place of one of ours in the language model."""

    def __init__(self, encode: Callable, decode: Callable, dataset: ActivationDataset):
        self.encode, self.decode = encode, decode
        self.reads = self.writes = dataset.columns

    def __call__(self, x: mx.array) -> mx.array:
        rows = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        return mx.array(self.decode(self.encode(rows)).reshape(x.shape))


def cached(tokens: int) -> Data:
    """Activations of `tokens` tokens to train on and a tenth as many held out, by document."""
    dataset = ActivationDataset.from_texts(
        mlxterp.InterpretableModel.demo(), python_texts(), 2, "residual", context_length=128,
        max_samples=int(tokens * 1.1), shuffle=False,
    )  # fmt: skip
    training, held_out = dataset.split(0.09, seed=0)
    return Data(_array(training)[:tokens], _array(held_out), held_out)


def _array(dataset: ActivationDataset) -> np.ndarray:
    parts = [np.array(batch, np.float32) for batch in dataset.batches(65_536)]
    return np.concatenate(parts)


def measured(
    encode: Callable, decode: Callable, data: Data, loss_tokens: int
) -> tuple[float, float, float, float | None]:
    """L0, FVU, share of features that never fire, and loss recovered, on the held-out tokens."""
    error, active, fired = 0.0, 0.0, np.zeros(0, bool)
    for start in range(0, len(data.held_out), EVALUATION_TOKENS):
        x = data.held_out[start : start + EVALUATION_TOKENS]
        z = encode(x)
        error += np.square(x.astype(np.float64) - decode(z)).sum()
        active += np.count_nonzero(z)
        fired = (z != 0).any(axis=0) | (fired if len(fired) else False)
    y = data.held_out.astype(np.float64)
    fvu = error / np.square(y - y.mean(axis=0)).sum()
    recovered = None
    if loss_tokens:
        spliced: Any = Spliced(encode, decode, data.documents)
        recovered = loss_recovered(spliced, data.documents, loss_tokens).recovered
    return active / len(y), fvu, 1 - fired.mean(), recovered


def config_of(name: str, k: float, data: Data, features: int, passes: int) -> SAEConfig:
    """Our recipe for this much data, with an activation function and its sparsity."""
    n, d = data.training.shape
    sparsity: dict[str, Any] = {"k": int(k)}
    if name in ("jumprelu", "relu", "gated"):
        sparsity["target_l0"] = float(k)
    if name == "matryoshka":
        prefixes = peers.matryoshka_prefixes(features)[:-1]
        name, sparsity["matryoshka_prefixes"] = "batch_topk", [p / features for p in prefixes]
    return SAEConfig.recommended(
        d, n, activation_function=name, expansion_factor=features / d, num_epochs=passes, **sparsity
    )


def train_ours(
    name: str, k: float, data: Data, arguments: argparse.Namespace, factor: float, seed: int
) -> Result:
    config = config_of(name, k, data, arguments.features, arguments.passes)
    config = config.replace(learning_rate=config.learning_rate * factor, seed=seed)
    # Named after the site, so that the result can be spliced into the model.
    (site,) = data.documents.columns.names
    dataset = ActivationDataset.from_activations(data.training, site=site)
    columns = dataset.columns
    sae = SAE(
        columns, columns, arguments.features, activation_function=config.activation_function,
        k=config.k,
    )  # fmt: skip
    started = time.perf_counter()
    Trainer(config).fit(sae, dataset)
    seconds = time.perf_counter() - started

    def encode(x: np.ndarray) -> np.ndarray:
        return np.array(sae.encode(mx.array(x)))

    def decode(z: np.ndarray) -> np.ndarray:
        return np.array(sae.decode(mx.array(z)))

    found = measured(encode, decode, data, arguments.loss_tokens)
    return Result("mlxterp", name, k, factor, *found, seconds, config.to_dict())


def train_peer(
    library: str, architecture: str, asked: float, data: Data, arguments: argparse.Namespace,
    factor: float, seed: int, **overrides: Any,
) -> Result:  # fmt: skip
    steered = (library, architecture) in peers.STEERED
    started = time.perf_counter()
    trained = peers.train(
        library, architecture, data.training, arguments.features,
        n_tokens=arguments.passes * len(data.training), device=arguments.device,
        rate_factor=factor, seed=seed, **{"k" if steered else "coefficient": asked}, **overrides,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    found = measured(trained.encode, trained.decode, data, arguments.loss_tokens)
    name = " ".join([architecture, *(str(value) for value in overrides.values())])
    return Result(library, name, asked, factor, *found, seconds, trained.settings)


def runs(arguments: argparse.Namespace, data: Data) -> Iterator[Callable[[], Result]]:
    """Everything that is asked for, not yet run."""
    if arguments.part != "peers":
        for name in OURS:
            if not _wanted(arguments, "mlxterp", name):
                continue
            for k in arguments.k:
                for f, seed in itertools.product(arguments.rates or (1.0,), arguments.seeds):
                    yield lambda n=name, k=k, f=f, s=seed: train_ours(n, k, data, arguments, f, s)
    if arguments.part == "ours":
        return
    for library, names in peers.LIBRARIES.items():
        variants = [{"optimizer": "adam"}, {}] if library == "sparsify" else [{}]
        for name in names:
            if not _wanted(arguments, library, name):
                continue
            key = library, name
            for asked in arguments.k if key in peers.STEERED else peers.COEFFICIENTS[key]:
                for more in variants:
                    usual = OTHER_RATES if more else RATES.get(library, OTHER_RATES)
                    for f, seed in itertools.product(arguments.rates or usual, arguments.seeds):
                        yield lambda key=key, a=asked, f=f, m=more, s=seed: train_peer(
                            *key, a, data, arguments, f, s, **m
                        )


def _wanted(arguments: argparse.Namespace, library: str, name: str) -> bool:
    return not arguments.only or library in arguments.only or f"{library}.{name}" in arguments.only


def best(results: list[Result]) -> list[Result]:
    """Those that no other of their kind beats at the same sparsity, within 2 %, or a higher one."""

    def beaten(one: Result) -> bool:
        return any(
            other[:2] == one[:2] and other.l0 <= 1.02 * one.l0 and other.fvu < one.fvu
            for other in results
        )

    kept = [one for one in results if not beaten(one)]
    return sorted(kept, key=lambda one: (one.library, one.architecture, one.l0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("ours", "peers"), help="default: both")
    parser.add_argument("--only", nargs="+", default=[], help="mlxterp.topk, saelens, ...")
    parser.add_argument("--tokens", type=int, default=600_000, help="tokens to train on")
    parser.add_argument("--passes", type=int, default=5, help="how many times each is trained on")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--k", type=_numbers, default=[8, 16, 32], metavar="8,16,32")
    parser.add_argument("--rates", type=_numbers, help="factors of every learning rate")
    parser.add_argument("--seeds", type=_numbers, default=[0], metavar="0,1,2")
    parser.add_argument("--loss-tokens", type=int, default=20_000, help="0: no loss recovered")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--out", type=Path, help="a file of JSON lines to append to")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu if arguments.device == "cpu" else mx.gpu)
    if arguments.part != "ours" and arguments.device == "cpu":
        import torch

        torch.set_num_threads(arguments.threads)
    data = cached(arguments.tokens)
    print(
        f"{len(data.training):,} tokens, {arguments.passes} times; {len(data.held_out):,} held "
        f"out; {arguments.features} features; 'rate' is a factor of the recipe's learning rate"
    )
    print(HEADER)
    results = []
    for run in runs(arguments, data):
        result = run()
        results.append(result)
        print(result, flush=True)
        if arguments.out is not None:
            shared = {"tokens": len(data.training), "passes": arguments.passes}
            line = {**result._asdict(), **shared, "features": arguments.features}
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=float) + "\n")
    print(f"\nNot beaten by another run of the same kind\n{HEADER}")
    print("\n".join(map(str, best(results))))


def _numbers(text: str) -> list[float]:
    return [float(part) if "." in part else int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
