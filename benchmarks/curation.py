"""Whether an SAE that is trained on curated text beats one trained on as much random text.

    python benchmarks/curation.py [--tokens N] [--passes N] [--seeds 0,1,2] [--pools clean,polluted]

The bundled model after its third block. For each seed some random documents are held out and a pool
of four times `--tokens` is read from the others; each metric of `curate` and a random choice take
`--tokens` out of it in pieces of a context, and "cleaned" takes random ones after `deduplicate` has
removed what it removes. The same recipe is trained on each and measured on the held-out documents.
In the polluted pool 30 % of the documents are duplicates (half of them exact, half with a few words
changed), every document has a footer that is always the same, and some are tables of numbers; what
is held out is clean.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Before MLX, which then finds the OpenBLAS that this one loads.
from mlxterp import InterpretableModel  # isort: skip

from mlxterp.sae import ActivationDataset, SAEConfig, SAETrainer
from mlxterp.sae.coder import Columns
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.curation import CurationReport, _cut, _joined, _random, curate
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.harvest import harvest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import python_texts

CONTEXT, POOL = 128, 4
CHARACTERS = 4000  # of each document, so that there are many
METRICS = ("activation_variance", "kmeans", "loss")
FOOTER = """

This page is part of the collected documentation and was generated automatically, do not edit it.
All rights reserved; see the file named LICENSE at the top of this archive for the full conditions.
If you find a mistake in this text then please report it to the list of the maintainers by mail.
"""


class Remembering:
    """A model that does not compute the same activations twice; metrics share their pool."""

    def __init__(self, model: InterpretableModel):
        self._model, self._found = model, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(self, tokens: Any, *, stop: bool = False, **options: Any) -> Any:
        if not stop:
            return self._model.run(tokens, **options)
        key = np.array(tokens).tobytes()
        if key not in self._found:
            self._found[key] = self._model.run(tokens, stop=True, **options)
        return self._found[key]


def polluted(texts: list[str], rng: random.Random) -> list[str]:
    """As many documents, of which 30 % are duplicates and 5 % tables, and all have a footer."""
    n = len(texts)
    own = texts[: round(0.65 * n)]
    copies = [
        text if i % 2 else nudged(text, rng)
        for i, text in enumerate(rng.choices(own, k=round(0.3 * n)))
    ]
    sizes = [len(text) // 2 for text in texts[: n - len(own) - len(copies)]]
    tables = [" ".join(f"{rng.random():.6f}" for _ in range(size // 9)) for size in sizes]
    mixed = [text + FOOTER for text in own + copies + tables]
    rng.shuffle(mixed)
    return mixed


def nudged(text: str, rng: random.Random) -> str:
    """The text with one word in a hundred changed."""
    words = text.split(" ")
    for i in rng.sample(range(len(words)), len(words) // 100):
        words[i] = "item"
    return " ".join(words)


def activations(model: InterpretableModel, corpus: Corpus, columns: Columns) -> ActivationDataset:
    chunks = harvest(model, corpus, columns, np.arange(len(corpus)))
    found = np.concatenate([np.array(chunk.activations) for chunk in chunks])
    return ActivationDataset.from_activations(found, site=columns.names[0])


def random_pieces(
    model: InterpretableModel,
    texts: list[str],
    tokens: int,
    clean: bool,
    columns: Columns,
    seed: int,
) -> Corpus:
    """As many tokens at random out of the same pool, in pieces like those of `curate`."""
    if clean:
        whole, _ = curate(
            model, prefix(model, texts, POOL * tokens), columns, context=CONTEXT, max_tokens=None
        )
    else:
        whole = Corpus.from_documents(model, texts, CONTEXT, POOL * tokens)
    pieces = _cut(whole.bodies(), CONTEXT - (whole.bos_id is not None))
    chosen = _random(pieces.sizes, tokens, np.random.default_rng(seed))
    excess = int(pieces.sizes[chosen].sum()) - tokens
    return _joined(pieces, chosen, excess, whole)


def prefix(model: InterpretableModel, texts: list[str], tokens: int) -> list[str]:
    """The first texts that have so many tokens."""
    ends = np.cumsum([len(ids) for ids in model.encode_batch(texts)])
    return texts[: 1 + int(np.searchsorted(ends, tokens))]


def measured(
    training: ActivationDataset, held_out: ActivationDataset, passes: int, seed: int
) -> tuple[float, float]:
    config = SAEConfig.recommended(
        training.columns.width, len(training), num_epochs=passes, expansion_factor=8,
        activation_function="topk", k=16, validation_split=0, seed=seed,
    )  # fmt: skip
    found = fidelity(SAETrainer(config).fit(training), held_out)
    return found.fvu, found.l0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens to train on")
    parser.add_argument("--held-out", type=int, default=30_000, help="tokens to measure on")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pools", default="clean,polluted")
    arguments = parser.parse_args()
    model = InterpretableModel.demo()
    site = str(model.site(2, "residual"))
    columns = Columns((site,), (model.width(site),))
    print(
        f"{arguments.tokens:,} of {POOL * arguments.tokens:,} tokens to train on, "
        f"{arguments.passes} passes; {site}, TopK 16 of {8 * columns.width:,} features",
        flush=True,
    )
    for kind in arguments.pools.split(","):
        started, results, reports = time.perf_counter(), {}, {}
        for seed in map(int, arguments.seeds.split(",")):
            for name, found, report in compared(model, columns, kind, seed, arguments):
                results.setdefault(name, []).append(found)
                reports[name] = report
        show(kind, results, reports)
        print(f"{time.perf_counter() - started:.0f} s\n", flush=True)


def compared(
    model: InterpretableModel, columns: Columns, kind: str, seed: int, arguments: argparse.Namespace
) -> Iterator[tuple[str, tuple[float, float], CurationReport | None]]:
    """Held-out FVU and L0 of every choice."""
    model = Remembering(model)
    texts = [text[:CHARACTERS] for text in python_texts(seed)]
    apart = len(prefix(model, texts, arguments.held_out))
    held_out = Corpus.from_documents(model, texts[:apart], CONTEXT, arguments.held_out)
    test, texts = activations(model, held_out, columns), texts[apart:]
    if kind == "polluted":
        texts = prefix(model, texts, 2 * POOL * arguments.tokens)
        texts = polluted(texts, random.Random(seed))
    for name in ("random", "cleaned", *METRICS):
        report = None
        if name in METRICS:
            corpus, report = curate(
                model, texts, columns, context=CONTEXT, max_tokens=arguments.tokens,
                diversity_metric=name, pool=POOL, seed=seed,
            )  # fmt: skip
        else:
            corpus = random_pieces(model, texts, arguments.tokens, name == "cleaned", columns, seed)
        training = activations(model, corpus, columns)
        yield name, measured(training, test, arguments.passes, seed), report


def show(
    kind: str,
    results: dict[str, list[tuple[float, float]]],
    reports: dict[str, CurationReport | None],
) -> None:
    base = np.array(results["random"])[:, 0]
    print(f"\n{kind} pool\n{'':22s}{'held-out FVU':>20s}{'L0':>8s}{'change to random':>22s}")
    for name, found in results.items():
        fvu, l0 = np.array(found).T
        change = 100 * (fvu / base - 1)
        print(
            f"{name:22s}{fvu.mean():12.4f} ± {fvu.std():.4f}{l0.mean():8.1f}"
            f"{change.mean():+13.1f} ± {change.std():.1f} %"
        )
    for name, report in reports.items():
        if report is not None:
            print(f"\n{name}, last seed: {report}")


if __name__ == "__main__":
    main()
