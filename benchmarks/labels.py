"""Labels from tables of tokens: their held-out scores, those of the labels of other features, and
those on the same model with random weights; and how long a large coder takes.

    python benchmarks/labels.py [--sae PATH] [--tokens N] [--features N --large-tokens N]
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

from mlxterp import InterpretableModel
from mlxterp.sae import SAE, ActivationDataset, SAEConfig
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.features.collection import collect
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.labels.scores import Mean
from mlxterp.sae.labels.token_labels import KINDS, token_labels

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import mlx.core as mx  # isort: skip

from quickstart import python_texts

LAYER, CONTEXT = 2, 128
L0 = 32  # of the large coder


def random_copy(model: InterpretableModel) -> InterpretableModel:
    """The same architecture and tokenizer with the weights that it has before training."""
    mx.random.seed(0)
    return InterpretableModel(type(model.model)(model.model.args), tokenizer=model.tokenizer)


def texts_of(model: InterpretableModel, n_tokens: int, seed: int) -> ActivationDataset:
    return ActivationDataset.from_texts(
        model, python_texts(seed), LAYER, "residual", context_length=CONTEXT, max_samples=n_tokens
    )


def trained(model: InterpretableModel, n_tokens: int) -> BaseSAE:
    return model.train_sae(
        layer=LAYER,
        component="residual",
        dataset=texts_of(model, n_tokens, 0),
        config=SAEConfig(
            expansion_factor=8, k=16, learning_rate=8e-3, batch_size=1024, num_epochs=2
        ),
        verbose=False,
    )


def report(name: str, data: FeatureData) -> None:
    print(f"\n{name}: {data}")
    for kinds in (*((kind,) for kind in KINDS), KINDS):
        started = time.perf_counter()
        labels = token_labels(data, kinds=kinds)
        seconds = time.perf_counter() - started
        scored = [label for label in labels.values() if label.tokens and label.control]
        columns = {
            figure: [Mean.of([getattr(getattr(x, kind), figure) for x in scored])
                     for kind in ("tokens", "control")]
            for figure in ("balanced_accuracy", "f1", "precision")
        }  # fmt: skip
        shown = "  ".join(
            f"{figure.replace('_', ' ')} {a.value:.3f} [{a.low:.3f}, {a.high:.3f}] / {b.value:.3f}"
            for figure, (a, b) in columns.items()
        )
        print(f"  {'best of all' if len(kinds) > 1 else kinds[0]:12s} {shown}  {seconds:.1f} s")


def large(model: InterpretableModel, n_features: int, n_tokens: int) -> FeatureData:
    """Features that are directions drawn at random, of which about 32 are active on a token."""
    dataset = texts_of(model, n_tokens, 1)
    columns = dataset.columns
    sae = SAE(columns, columns, n_features, "batch_topk", L0)
    x = next(iter(dataset.batches(2048)))
    sae.W_enc = mx.random.normal((n_features, columns.width))
    sae.W_enc /= mx.linalg.norm(sae.W_enc, axis=1, keepdims=True)
    sae.b_enc = -(sae.W_enc @ x.mean(axis=0))
    pre = sae.pre_activations(x[:512]).reshape(-1)
    sae.activation_function.threshold = mx.sort(pre)[-L0 * 512]
    return collect(sae, dataset, max_kept=2 * L0 * n_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sae", type=Path, help="a saved SAE of the bundled model's layer 2")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--features", type=int, default=32_768)
    parser.add_argument("--large-tokens", type=int, default=200_000)
    arguments = parser.parse_args()
    model = InterpretableModel.demo()
    print("Means over the features with their 95 % intervals, and / those of another one's label")
    if arguments.sae:
        sae = model.load_sae(arguments.sae)
        report("the saved SAE", collect(sae, texts_of(model, arguments.tokens, 1)))
    for name, source in (("trained model", model), ("random weights", random_copy(model))):
        sae = trained(source, arguments.tokens)
        report(f"SAE of the {name}", collect(sae, texts_of(source, arguments.tokens, 1)))
    if arguments.features:
        data = large(model, arguments.features, arguments.large_tokens)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        started = time.perf_counter()
        labels = token_labels(data)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        l0 = np.diff(data.codes.starts).mean()
        print(
            f"\n{len(labels):,} of {data.n_features:,} features labelled, on "
            f"{data.codes.n_tokens:,} tokens with L0 {l0:.1f}: {seconds:.0f} s; peak memory "
            f"{peak:.2f} GB, {before:.2f} GB before"
        )


if __name__ == "__main__":
    main()
