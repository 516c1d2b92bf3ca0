"""Train a crosscoder of three layers, and one of a model and a changed copy; see what is shared.

    python examples/crosscoder.py [--model NAME] [--tuned NAME] [--layers N N N] [--tokens N]

Without options: the bundled model and a copy in which one MLP has noise in its weights, on Python's
reference manual, 30,000 tokens; needs no network. With --tuned: a model fine-tuned from --model.
"""

import argparse
import copy
from pydoc_data.topics import topics

import numpy as np

from mlxterp import InterpretableModel
from mlxterp.sae import (
    ActivationDataset,
    CrosscoderConfig,
    CrosscoderTrainer,
    ModelPair,
    ProgressBar,
)


def shaken(model: InterpretableModel, layer: int) -> InterpretableModel:
    """A copy of the bundled model with noise in what an MLP writes."""
    other = InterpretableModel(copy.deepcopy(model.model), model.tokenizer)
    projection = other.model.layers[layer].mlp.down_proj
    weight = np.array(projection.weight)
    noise = np.random.default_rng(0).normal(size=weight.shape)
    projection.weight += (weight.std() * noise).astype(weight.dtype)
    return other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the Hub or a path; default: the bundled model")
    parser.add_argument("--tuned", help="another model with the same tokenizer")
    parser.add_argument("--layers", type=int, nargs="+", default=(1, 3, 5))
    parser.add_argument("--tokens", type=int, default=30_000)
    options = parser.parse_args()
    if options.model and not options.tuned:
        parser.error("--model needs --tuned")

    model = InterpretableModel(options.model) if options.model else InterpretableModel.demo()
    middle = options.layers[len(options.layers) // 2]
    tuned = InterpretableModel(options.tuned) if options.tuned else shaken(model, middle)
    texts = list(topics.values())
    config = CrosscoderConfig.recommended(
        model.d_model, options.tokens, expansion_factor=8, num_epochs=4
    )

    sites = [f"layers.{layer}.resid_post" for layer in options.layers]
    dataset = ActivationDataset.from_texts(model, texts, sites, max_samples=options.tokens)
    crosscoder = model.train_crosscoder(sites=sites, dataset=dataset, config=config)
    print(f"\n{crosscoder}\n{crosscoder.evaluate()[0]}\n")
    print(crosscoder.sharing())
    print(crosscoder.component_interactions())
    shared = crosscoder.shared_features(top=5)
    print(f"\n{shared}\n")
    print(crosscoder.visualize_feature(int(shared.feature_ids[0]), top_k=4))

    pair = ModelPair([model, tuned])
    both = pair.sites_of(middle, "mlp")
    dataset = ActivationDataset.from_texts(pair, texts, both, max_samples=options.tokens)
    crosscoder = CrosscoderTrainer(config, callbacks=[ProgressBar()]).fit(dataset)
    print(f"\n{crosscoder}\n{crosscoder.evaluate()[0]}\n")
    print(crosscoder.diff())
    cosines = crosscoder.decoder_cosines()[:, 0, 1]
    print(f"\nMedian cosine of the rows in the two models: {np.nanmedian(cosines):.2f}; the least:")
    print(crosscoder.visualize_feature(int(np.nanargmin(cosines)), top_k=4))


if __name__ == "__main__":
    main()
