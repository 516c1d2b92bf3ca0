"""Harvest activations to a disk once, and train two SAEs on them.

    python examples/harvest.py [--model NAME] [--layer N] [--dataset NAME] [--tokens N]

Without options: the bundled model, on Python's reference manual, 100,000 tokens. A second run finds
the activations in the cache and begins to train at once.
"""

import argparse
import logging
from pydoc_data.topics import topics

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset, SAEConfig, SAETrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the Hub or a path; default: the bundled model")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--component", default="residual")
    parser.add_argument("--dataset", help="a name on the Hub, a file or a directory")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--cache", default="cache")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    model = InterpretableModel(options.model) if options.model else InterpretableModel.demo()
    dataset = ActivationDataset.from_texts(
        model,
        options.dataset or list(topics.values()),
        options.layer,
        options.component,
        max_samples=options.tokens,
        cache_dir=options.cache,
        verbose=True,
    )
    print(dataset.info(batch_size=1024))

    width, n_tokens = dataset.columns.width, len(dataset)
    configs = {
        f"k={k}": SAEConfig.recommended(width, n_tokens, k=k, expansion_factor=4, num_epochs=3)
        for k in (8, 32)
    }
    for name, sae in SAETrainer().fit_many(dataset, configs).items():
        last = sae.statistics.validation[-1]
        print(f"{name}: held-out FVU {last['fvu']:.3f}, L0 {last['l0']:.1f}")


if __name__ == "__main__":
    main()
