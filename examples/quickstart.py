"""Train an SAE on the bundled model, measure it, read what its features mean, and steer with one.

Needs no network and no data: the text is Python's own documentation and standard library.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

from mlxterp import InterpretableModel
from mlxterp.sae import SAE, ActivationDataset

SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "pydoc_data", "encodings"}


def python_texts(seed: int = 0) -> list[str]:
    """The reference manual's topics and the standard library's sources, in random order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = (
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(library.rglob("*.py"))
        if not SKIPPED & set(path.relative_to(library).parts)
    )
    texts = [*topics.values(), *sources]
    random.Random(seed).shuffle(texts)
    return texts


def promoted_words(sae: SAE, feature_id: int) -> int:
    """How many of the tokens that a feature promotes begin a word."""
    logits = sae.visualize_feature(feature_id, top_k=5).logits
    return 0 if logits is None else sum(token[:1] == " " for token, _ in logits.top)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face name or a path; default: the bundled model")
    parser.add_argument("--layer", type=int, help="default: the middle of the model")
    parser.add_argument("--tokens", type=int, default=600_000, help="tokens of text to train on")
    parser.add_argument("--save", type=Path, default=Path("sae_quickstart.mlx"))
    arguments = parser.parse_args()
    started = time.perf_counter()

    model = InterpretableModel(arguments.model) if arguments.model else InterpretableModel.demo()
    layer = model.n_layers // 2 - 1 if arguments.layer is None else arguments.layer
    dataset = ActivationDataset.from_texts(
        model,
        python_texts(),
        layer,
        "residual",
        context_length=128,
        max_samples=arguments.tokens,
        verbose=True,
    )
    print(dataset.info(batch_size=1024))

    sae = model.train_sae(
        layer=layer, component="residual", dataset=dataset, save_path=arguments.save
    )
    print(sae)

    fidelity, loss = sae.evaluate()
    dead = (sae.statistics.firing_rates == 0).mean()
    print(
        f"\nOn held-out text\n  {fidelity}\n  {loss}\n  {100 * dead:.1f}% of the features are dead"
    )

    examples = sae.top_examples(n=5)
    clear = examples.clearest(20)
    for feature_id in clear[:5]:
        print(f"\n{sae.visualize_feature(feature_id, top_k=5)}")

    feature_id = max(clear, key=lambda feature_id: promoted_words(sae, feature_id))
    edit = sae.steering_edit(feature_id, strength=float(examples.values[feature_id, 0]))
    print(f"\nSteering with feature {feature_id} ({examples.of(feature_id)[0].token!r})")
    settings = {"max_tokens": 40, "temperature": 0.7, "seed": 1}
    for prompt in ("She opened the door and", "The function returns"):
        print(f"  {prompt!r}")
        print(f"    plain:   {model.generate(prompt, **settings).text!r}")
        print(f"    steered: {model.generate(prompt, edit=edit, **settings).text!r}")
    print(f"\n{time.perf_counter() - started:.0f} s; the SAE is in {arguments.save}")


if __name__ == "__main__":
    main()
