"""Which features make which others fire, over texts and on one prompt, and whether that is true.

Runs on the bundled model in about a minute; `--model` takes another one.
"""

from __future__ import annotations

import argparse

from mlxterp import InterpretableModel
from mlxterp.sae import SAEConfig, find_behavior_circuit, find_feature_circuits
from mlxterp.texts import python_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face name or a path; default: the bundled model")
    parser.add_argument("--layers", type=int, nargs="+", help="default: three, spread evenly")
    parser.add_argument("--prompt", default="The value of the expression (a + b")
    parser.add_argument("--documents", type=int, default=60, help="to train on")
    parser.add_argument("--n-tokens", type=int, default=8, help="on which a feature is explained")
    arguments = parser.parse_args()

    model = InterpretableModel(arguments.model) if arguments.model else InterpretableModel.demo()
    layers = arguments.layers or [i * model.n_layers // 6 for i in (1, 3, 5)]
    texts = [text[:3000] for text in python_texts()]
    n = arguments.documents
    config = SAEConfig(expansion_factor=4, k=16, learning_rate=8e-3, batch_size=1024, num_epochs=3)
    saes = {
        layer: model.train_sae(
            layer=layer, component="residual", dataset=texts[:n], config=config, verbose=False
        )
        for layer in layers
    }
    for sae in saes.values():
        sae.collect(verbose=False)
        sae.auto_label_features(verbose=False)
    labels = {layer: sae.labels for layer, sae in saes.items()}

    circuit = find_feature_circuits(
        model=model,
        saes=saes,
        dataset=texts[n : n + 20],
        top_k=20,
        n_tokens=arguments.n_tokens,
        max_tokens=3000,
    )
    print(circuit.with_labels(labels), circuit.validate(n=20), sep="\n\n")
    print(circuit.with_labels(labels).save_html("circuit.html"))

    behavior = find_behavior_circuit(model, saes, arguments.prompt, verbose=False)
    small = behavior.origin.minimal(0.8).with_labels(labels)
    print(f"\n{small.node_table(10)}\n\n{behavior.validate(n=20, of='edges')}")
    print(small.save_html("behavior.html"))


if __name__ == "__main__":
    main()
