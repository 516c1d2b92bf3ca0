"""What fine-tuning changed: a crosscoder of a model and a changed copy, and what each feature is.

    python examples/diffing.py [--model NAME --tuned NAME] [--layer N] [--tokens N]

Without options: the bundled model and a copy in which one MLP has noise in its weights, on Python's
reference manual, 30,000 tokens; needs no network.
"""

import argparse
import copy
from pydoc_data.topics import topics

import numpy as np

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset, CrosscoderConfig, CrosscoderTrainer, ModelPair


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
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=30_000)
    options = parser.parse_args()
    if bool(options.model) != bool(options.tuned):
        parser.error("--model and --tuned go together")

    model = InterpretableModel(options.model) if options.model else InterpretableModel.demo()
    tuned = InterpretableModel(options.tuned) if options.tuned else shaken(model, options.layer)
    pair = ModelPair([model, tuned])
    dataset = ActivationDataset.from_texts(
        pair, list(topics.values()), pair.sites_of(options.layer, "mlp"),
        max_samples=options.tokens,
    )  # fmt: skip
    config = CrosscoderConfig.recommended(
        model.d_model, options.tokens, expansion_factor=8, num_epochs=4
    )
    crosscoder = CrosscoderTrainer(config).fit(dataset)
    print(f"\n{crosscoder}\n{crosscoder.evaluate()}\n")
    print(crosscoder.diff())
    cosines = crosscoder.decoder_cosines()[:, 0, 1]
    print(f"\nMedian cosine of the rows in the two models: {np.nanmedian(cosines):.2f}; the least:")
    print(crosscoder.visualize_feature(int(np.nanargmin(cosines)), top_k=4))


if __name__ == "__main__":
    main()
