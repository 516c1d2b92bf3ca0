"""Train a crosscoder of three layers, and see which features they share.

    python examples/crosscoder.py [--model NAME] [--layers N N N] [--tokens N]

Without options: the bundled model, on Python's reference manual, 30,000 tokens; needs no network.
"""

import argparse
from pydoc_data.topics import topics

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset, CrosscoderConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the Hub or a path; default: the bundled model")
    parser.add_argument("--layers", type=int, nargs="+", default=(1, 3, 5))
    parser.add_argument("--tokens", type=int, default=30_000)
    options = parser.parse_args()

    model = InterpretableModel(options.model) if options.model else InterpretableModel.demo()
    texts = list(topics.values())
    config = CrosscoderConfig.recommended(
        model.d_model, options.tokens, expansion_factor=8, num_epochs=4
    )

    sites = [f"layers.{layer}.resid_post" for layer in options.layers]
    dataset = ActivationDataset.from_texts(model, texts, sites, max_samples=options.tokens)
    crosscoder = model.train_crosscoder(sites=sites, dataset=dataset, config=config)
    print(f"\n{crosscoder}\n{crosscoder.evaluate()}\n")
    print(crosscoder.sharing())
    print(crosscoder.component_interactions())
    shared = crosscoder.shared_features(top=5)
    print(f"\n{shared}\n")
    print(crosscoder.visualize_feature(int(shared.feature_ids[0]), top_k=4))


if __name__ == "__main__":
    main()
