"""Find a feature by what it writes, steer with it, and measure the effect beside random directions.

    python examples/steering.py [--model NAME] [--layer N] [--token TEXT] [--prompt TEXT]

Without options: the bundled model, on Python's reference manual; a feature that promotes " None".
"""

import argparse
from pydoc_data.topics import topics

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset
from mlxterp.sae.steering.sweep import peaked_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the Hub or a path; default: the bundled model")
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--token", default=" None", help="what the feature shall write")
    parser.add_argument("--prompt", default="The function returns")
    options = parser.parse_args()

    model = InterpretableModel(options.model) if options.model else InterpretableModel.demo()
    texts = list(topics.values())
    dataset = ActivationDataset.from_texts(
        model, texts, options.layer, "residual", max_samples=options.tokens
    )
    sae = model.train_sae(layer=options.layer, component="residual", dataset=dataset)
    data = sae.collect(verbose=False)

    (feature,) = peaked_features(sae, model, data.firing_rates, n=1, token=options.token)
    print(sae.visualize_feature(feature, top_k=4))
    print(f"\n{sae.compare_generations(feature, options.prompt, max_tokens=12)}")

    held_out = [text[:300] for text in texts[-8:]]
    report = sae.strength_sweep(feature, held_out, targets=[options.token])
    print(f"\n{report}\nrises with every step: {report.is_monotone}")

    # The coder spliced in, with this feature taken out and its error kept.
    without = sae.splice(features={feature: 0}, keep_error=True)
    print(f"\nwithout it: {model.generate(options.prompt, max_tokens=12, edit=without).text!r}")


if __name__ == "__main__":
    main()
