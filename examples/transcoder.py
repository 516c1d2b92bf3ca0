"""Train transcoders over two MLPs, put them in the MLPs' place, and follow a feature to the next.

    python examples/transcoder.py [--model NAME] [--layers N N] [--tokens N] [--skip]

Without options: the bundled model, on Python's reference manual, 60,000 tokens; needs no network.
"""

import argparse
from pydoc_data.topics import topics

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset, TranscoderConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the Hub or a path; default: the bundled model")
    parser.add_argument("--layers", type=int, nargs=2, default=(0, 2))
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--skip", action="store_true", help="with a skip connection")
    options = parser.parse_args()

    model = InterpretableModel(options.model) if options.model else InterpretableModel.demo()
    sites = [f"layers.{i}.{name}" for i in options.layers for name in ("mlp_in", "mlp_out")]
    dataset = ActivationDataset.from_texts(
        model, list(topics.values()), sites, max_samples=options.tokens, verbose=True
    )
    config = TranscoderConfig.recommended(
        model.d_model, len(dataset), num_epochs=4, skip=options.skip
    )
    earlier, later = (
        model.train_transcoder(
            from_layer=layer,
            from_component="mlp_in",
            to_component="mlp_out",
            dataset=dataset,
            config=config,
        )
        for layer in options.layers
    )
    for transcoder in (earlier, later):
        print(f"\n{transcoder.evaluate()}")

    prompt = "The function returns"
    print(f"\nAfter {prompt!r}, by the model, and with a transcoder in place of an MLP:")
    for edit in (None, earlier.splice(), later.splice()):
        print(f"  {model.generate(prompt, max_tokens=12, edit=edit).text!r}")

    weights = earlier.weights_to(later)
    print(f"\n{weights}")
    strongest = weights.strongest(1)[0]
    print(f"\n{earlier.input_side(strongest.earlier)}")
    for transcoder, feature in ((earlier, strongest.earlier), (later, strongest.later)):
        print(f"\n{transcoder.to_site}\n{transcoder.visualize_feature(feature, top_k=4)}")


if __name__ == "__main__":
    main()
