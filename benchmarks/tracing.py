"""What a trace costs: Python time beside a plain forward pass, and peak memory.

    python benchmarks/tracing.py

Python time is the time to build the graph of a 16-layer model; nothing is evaluated. The variants
take turns, and the medians of many rounds are compared, so that other work on the machine hits all.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import mlxterp

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten  # isort: skip
from mlx_lm.models import llama  # isort: skip

ROUNDS = 300


def build(layers: int, width: int, vocab: int) -> mlxterp.InterpretableModel:
    """A random llama."""
    arguments = llama.ModelArgs(
        model_type="llama", hidden_size=width, num_hidden_layers=layers,
        intermediate_size=4 * width, num_attention_heads=width // 16, rms_norm_eps=1e-5,
        vocab_size=vocab,
    )  # fmt: skip
    model = llama.Model(arguments)
    mx.eval(model.parameters())
    return mlxterp.InterpretableModel(model)


def python_times(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of thread CPU time by variant."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant()
    gc.disable()
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            start = time.thread_time()
            variant()
            times[name].append(time.thread_time() - start)
    gc.enable()
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def peak_bytes(variant: Callable[[], object]) -> int:
    """Peak memory of MLX above what is there before."""
    variant()
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    variant()
    return mx.get_peak_memory() - before


def measure_time() -> None:
    model = build(layers=16, width=64, vocab=512)
    tokens = mx.array([[1, 2, 3, 4, 5, 6, 7, 8]])

    def trace(**kwargs: object) -> None:
        with model.trace(tokens, **kwargs):
            pass

    rows = python_times({
        "plain forward": lambda: model.model(tokens),
        "run, capture one site": lambda: model.run(tokens, capture="layers.8.mlp"),
        "run, edit one site": lambda: model.run(tokens, edit={"layers.8": lambda x: x}),
        "run, capture layer 8 and stop": lambda: model.run(tokens, capture="layers.8", stop=True),
        "trace, capture one site": lambda: trace(capture="layers.8.mlp"),
        "trace, everything": trace,
    })  # fmt: skip
    print("Python time, 16 layers (median of", ROUNDS, "rounds)")
    for name, value in rows.items():
        print(f"  {name:32s} {value:7.3f} ms  {value / rows['plain forward'] - 1:+7.1%}")


def measure_memory() -> None:
    model = build(layers=8, width=512, vocab=8192)
    tokens = mx.random.randint(0, 8192, (4, 128), key=mx.random.key(0))

    def evaluate(**kwargs: object) -> None:
        done = model.run(tokens, **kwargs)
        mx.eval(done.output, list(done.values()))

    def everything() -> None:
        with model.trace(tokens) as trace:
            mx.eval(trace.output)

    plain = peak_bytes(lambda: mx.eval(model.model(tokens)))
    rows = {
        "plain forward": plain,
        "run, capture all block outputs": peak_bytes(lambda: evaluate(capture="layers.*")),
        "trace, everything": peak_bytes(everything),
    }
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    print("Peak memory, 8 layers of width 512, 4 x 128 tokens: without and with the weights")
    for name, value in rows.items():
        whole = (value + weights) / (plain + weights)
        print(f"  {name:32s} {value / 1e6:7.1f} MB  {value / plain:6.2f}x  {whole:6.2f}x")


if __name__ == "__main__":
    measure_time()
    measure_memory()
