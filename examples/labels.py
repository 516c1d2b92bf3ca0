"""Label all features, score the labels on text that made none of them, and look some up.

    python examples/labels.py [--model NAME] [--layer N] [--labeler NAME]

Without options: the bundled model, and labels from tables of tokens, which need no language model.
`--labeler` names one that mlx-lm can load, such as mlx-community/Qwen3-4B-4bit.
"""

import argparse
from pydoc_data.topics import topics

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the Hub or a path; default: the bundled model")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--labeler", help="a language model; default: tables of tokens")
    parser.add_argument("--features", type=int, default=100, help="how many the labeler gets")
    options = parser.parse_args()

    model = InterpretableModel(options.model) if options.model else InterpretableModel.demo()
    texts = list(topics.values())
    dataset = ActivationDataset.from_texts(
        model, texts, options.layer, "residual", max_samples=options.tokens
    )
    sae = model.train_sae(layer=options.layer, component="residual", dataset=dataset)
    data = sae.collect(verbose=False)
    labels = sae.auto_label_features()
    if options.labeler:
        labels = sae.auto_label_features(options.labeler, max_features=options.features)
    print(labels)

    sae.labels.set(data.clearest(1)[0], "the clearest one")  # a label of one's own goes first
    print(sae.visualize_feature(data.clearest(1)[0], top_k=3))
    print(f"\n{sae.analyze_text('The class statement defines a new type.', top_k=3)}")
    print(f"\nsaved with its labels at {sae.save('sae_labelled.mlx')}")


if __name__ == "__main__":
    main()
