"""Train two SAEs, measure both on the same held-out text, and say which differences are real.

    python examples/evaluation.py [--model NAME] [--layer N] [--tokens N] [--json FILE]

Without options: the bundled model, on Python's reference manual, 60,000 tokens.
"""

import argparse
from pydoc_data.topics import topics

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset, ProgressBar, SAEConfig, SAETrainer, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the Hub or a path; default: the bundled model")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--unseen", type=int, default=20, help="documents to measure on")
    parser.add_argument("--json", help="where to write the report of the first in SAELens' form")
    options = parser.parse_args()

    model = InterpretableModel(options.model) if options.model else InterpretableModel.demo()
    texts = list(topics.values())
    unseen = [text[:2000] for text in texts[-options.unseen :]]
    dataset = ActivationDataset.from_texts(
        model,
        texts[: -options.unseen],
        options.layer,
        "residual",
        max_samples=options.tokens,
        verbose=True,
    )
    width, n_tokens = dataset.columns.width, len(dataset)
    configs = {
        name: SAEConfig.recommended(
            width, n_tokens, activation_function=name, k=16, expansion_factor=8, num_epochs=3
        )
        for name in ("topk", "batch_topk")
    }
    shown = {"topk": [ProgressBar()]}
    saes = SAETrainer().fit_many(dataset, configs, callbacks=shown)

    report = saes["topk"].evaluate(model, unseen)
    print(f"\n{report}\n")
    if options.json:
        print(report.to_json(options.json, schema="saelens"))
    print(compare(list(saes.values()), model, unseen))


if __name__ == "__main__":
    main()
