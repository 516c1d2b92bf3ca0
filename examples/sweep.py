"""A researcher's training: a config, a sweep over sparsity from one pass, validation, resume.

    python examples/sweep.py [--model NAME] [--layer N] [--tokens N] [--k N N N] [--run DIRECTORY]

Without options: the bundled model, on Python's reference manual, 60,000 tokens. Stop it with Ctrl-C
and start it again: it goes on where it was, to the same result.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset, ProgressBar, SAEConfig, SAETrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the Hub or a path; default: the bundled model")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--component", default="residual")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--run", type=Path, default=Path("sweep"), help="checkpoints and logs")
    options = parser.parse_args()

    model = InterpretableModel(options.model) if options.model else InterpretableModel.demo()
    dataset = ActivationDataset.from_texts(
        model,
        list(topics.values()),
        options.layer,
        options.component,
        max_samples=options.tokens,
        verbose=True,
    )
    print(dataset.info())

    # Every setting that is not named has its documented default.
    base = SAEConfig(
        expansion_factor=8,
        learning_rate=4e-3,
        batch_size=512,
        num_epochs=4,
        warmup_steps=50,
        checkpoint_every=50,
        validation_split=0.1,
        seed=0,
    )
    configs = {f"k={k}": base.replace(k=k) for k in options.k}
    configs |= {f"batch_topk k={options.k[0]}": base.replace(
        k=options.k[0], activation_function="batch_topk"
    )}  # fmt: skip
    shown = {next(iter(configs)): [ProgressBar()]}  # all of them keep step
    saes = SAETrainer(checkpoint_dir=options.run).fit_many(
        dataset, configs, resume=True, callbacks=shown
    )

    for name, sae in saes.items():
        last = sae.statistics.validation[-1]
        dead = (sae.statistics.firing_rates == 0).mean()
        print(f"{name}: held-out FVU {last['fvu']:.3f}, L0 {last['l0']:.1f}, dead {dead:.1%}")
        sae.save(options.run / f"{name.replace(' ', '_')}.mlx")


if __name__ == "__main__":
    main()
