"""Train an SAE on the bundled model, measure it, read what its features mean, and steer with one.

Needs no network and no data: the text is Python's own documentation and standard library.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset
from mlxterp.sae.steering.sweep import peaked_features
from mlxterp.texts import python_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face name or a path; default: the bundled model")
    parser.add_argument("--layer", type=int, help="default: the middle of the model")
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens of text to train on")
    parser.add_argument("--save", type=Path, default=Path("sae_quickstart.mlx"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    print("loading the model", flush=True)

    model = InterpretableModel(arguments.model) if arguments.model else InterpretableModel.demo()
    layer = model.n_layers // 2 - 1 if arguments.layer is None else arguments.layer
    dataset = ActivationDataset.from_texts(
        model,
        python_texts(),
        layer,
        "residual",
        context_length=128,
        max_samples=arguments.tokens,
        verbose=True,
    )
    print(dataset.info(batch_size=1024))

    sae = model.train_sae(
        layer=layer, component="residual", dataset=dataset, save_path=arguments.save
    )
    print(sae)

    report = sae.evaluate()
    dead = (sae.statistics.firing_rates == 0).mean()
    print(f"\nOn held-out text\n{report}\n{100 * dead:.1f}% of the features are dead")

    data = sae.collect(max_tokens=200_000)
    for feature_id in data.clearest(5):
        print(f"\n{sae.visualize_feature(feature_id, top_k=5)}")

    # What a feature writes is in its logit effects, and not in the tokens on which it fires.
    for feature_id in peaked_features(sae, model, data.firing_rates, n=1):
        print(f"\n{sae.strength_sweep(feature_id, [text[:400] for text in topics.values()][:8])}\n")
        print(sae.compare_generations(feature_id, "The function returns", max_tokens=12))

    print(f"\n{time.perf_counter() - started:.0f} s; the SAE is in {arguments.save}")


if __name__ == "__main__":
    main()
