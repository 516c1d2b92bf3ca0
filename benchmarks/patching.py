"""What patches in one pass save, and how well and how fast derivatives foretell them.

On the bundled model, over pairs of prompts that differ in one token and what it goes on with: the
time of all patches of a kind in batches and one by one, that of attribution patching, and the
correlation of its estimates with the patches. Times are of the processor, all cores together, and
the least of a few; the load is that of the machine's last minute, of everything that ran on it.

    python benchmarks/patching.py [--repeats N] [--length N]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

# Before MLX, which then finds the OpenBLAS that this one loads.
from mlxterp import InterpretableModel  # isort: skip

import numpy as np

from mlxterp.analysis.patching_result import PatchingResult, correlation

PAIRS = (
    ("for name in names:\n    print(", "for value in values:\n    print(", "name", "value"),
    ("if value is None:\n    value =", "if name is None:\n    name =", " value", " name"),
    ("x = [1, 2, 3", "x = (1, 2, 3", "]\n", ")\n"),
    ("a = {name", "a = [name", "}", "]\n"),
    ("print('hello", 'print("hello', "',", '",'),
    ("def get(self, name):\n    return self.get(", "def get(self, value):\n    return self.get(",
     "name", "value"),
    ("import json\n\ndata = json.load(file)\nprint(",
     "import json\n\ntext = json.load(file)\nprint(", "data", "text"),
    ("foo(name=name, value=", "foo(name=name, size=", "value", "size"),
    ("return len(names)\n\nfor name in names:\n    print(",
     "return len(value)\n\nfor name in names:\n    print(", "name", "value"),
    ("def area(size, width):\n    return size *", "def area(size, height):\n    return size *",
     " width", " height"),
)  # fmt: skip
KINDS = {
    "mlp": {"component": "mlp"},
    "attn": {"component": "attn"},
    "heads": {"component": "attn", "heads": "each"},
    "stream": {"component": "output"},
}
METRICS = ("logit_diff", "probability", "kl", "l2")
ESTIMATES: dict[str, int | None] = {"gradient": None, "8 steps": 8}


def timed(repeats: int, function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the least processor time that it took, of all cores."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        found = function()
        seconds.append(time.process_time() - started)
    return found, min(seconds)


def speed(model: InterpretableModel, repeats: int, length: int) -> None:
    """Times of all patches of a kind, of a short prompt and of a longer one."""
    clean, corrupted, *answers = PAIRS[0]
    filler = "    total += value\n" * max(0, length // 6)
    for before in ("", filler):
        texts = (before + clean, before + corrupted)
        print(f"\n{len(model.encode(texts[0]))} tokens, load {os.getloadavg()[0]:.1f}")
        print(
            f"  {'':<8}{'patches':>8}{'one by one':>12}{'batched':>10}{'ratio':>7}{'gradient':>10}"
        )
        for name, kind in KINDS.items():
            given = {**kind, "positions": "each", "metric": "logit_diff", "answers": answers}
            real = partial(model.activation_patching, *texts, **given)
            found, batched = timed(repeats, real)
            _, single = timed(1, partial(real, batch_rows=1))
            _, gradient = timed(repeats, partial(model.attribution_patching, *texts, **given))
            print(
                f"  {name:<8}{found.recovered.size:>8}{single:>10.2f} s{batched:>8.2f} s"
                f"{single / batched:>7.1f}{gradient:>8.2f} s",
                flush=True,
            )


def agreement(model: InterpretableModel) -> None:
    """Correlations of estimates and patches of single positions, over all pairs."""
    print("\ncorrelation with real patching, over the pairs: lowest, median, above 0.9")
    print(f"  {'':<12}{'':<8}" + "".join(f"{name:>24}" for name in ESTIMATES))
    for metric in METRICS:
        for name, kind in KINDS.items():
            cells = []
            for steps in ESTIMATES.values():
                values = [correlated(model, pair, metric, kind, steps) for pair in PAIRS]
                above = f"{sum(value > 0.9 for value in values)}/{len(values)}"
                cells.append(f"{min(values):>10.3f}{np.median(values):>7.3f}{above:>7}")
            print(f"  {metric:<12}{name:<8}" + "".join(cells), flush=True)


def correlated(
    model: InterpretableModel, pair: tuple[str, ...], metric: str, kind: dict, steps: int | None
) -> float:
    """Of the estimates and the patches of one pair."""
    clean, corrupted, *answers = pair
    given: dict[str, Any] = {**kind, "positions": "each", "metric": metric}
    if metric in ("logit_diff", "probability"):
        given["answers"] = answers if metric == "logit_diff" else answers[0]
    real: PatchingResult = model.activation_patching(clean, corrupted, **given)
    found = model.attribution_patching(clean, corrupted, **given, steps=steps)
    return correlation(found.recovered, real.recovered)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--length", type=int, default=40, help="tokens of the longer prompt")
    options = parser.parse_args()
    model = InterpretableModel.demo()
    speed(model, options.repeats, options.length)
    agreement(model)


if __name__ == "__main__":
    main()
