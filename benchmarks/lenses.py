"""What the logit lens costs: all layers of a 16-layer model, against one forward pass.

Shapes are those of Llama-3.2-1B (heads of width 64, four queries to a key, MLPs of 4 d_model) at
several widths, with random weights and a vocabulary of 32k (its own is 128k).

    python benchmarks/lenses.py [--widths 512 1024 2048] [--tokens 128] [--vocabulary 32768]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import mlxterp  # isort: skip - before MLX, so that OpenBLAS is found
import mlx.core as mx
from mlx_lm.models import llama

LAYERS = 16


def build(width: int, vocabulary: int) -> mlxterp.InterpretableModel:
    """A llama of 16 layers with random weights and a tied head."""
    heads = width // 64
    args = llama.ModelArgs(
        model_type="llama", hidden_size=width, num_hidden_layers=LAYERS, tie_word_embeddings=True,
        intermediate_size=4 * width, num_attention_heads=heads, num_key_value_heads=heads // 4,
        rms_norm_eps=1e-5, vocab_size=vocabulary, head_dim=64,
    )  # fmt: skip
    mx.random.seed(0)
    model = llama.Model(args)
    mx.eval(model.parameters())
    return mlxterp.InterpretableModel(model)


def seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """The time of each of some calls, after one that does not count."""
    function()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    """Print the ratio for each width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print(
        f"{mx.default_device()}, {LAYERS} layers, {given.tokens} tokens, vocabulary "
        f"{given.vocabulary}, top_k {given.top_k}, median (least) of {given.repeats}"
    )
    for width in given.widths:
        model = build(width, given.vocabulary)
        shape = (1, given.tokens)
        tokens = mx.random.randint(0, given.vocabulary, shape, key=mx.random.key(1))
        print(f"d_model {width:>5}: {measure(model, tokens, given.top_k, given.repeats)}")


def measure(model: mlxterp.InterpretableModel, tokens: mx.array, top_k: int, repeats: int) -> str:
    """The times of a forward pass and of lenses, and their ratios."""
    model.sites()  # the dry run, once for each model
    forward = seconds(lambda: mx.eval(model.model(tokens)), repeats)
    lens = seconds(lambda: model.logit_lens(tokens, top_k=top_k), repeats)
    one = seconds(lambda: model.logit_lens(tokens, top_k=top_k, position=-1), repeats)
    middle = [statistics.median(times) for times in (forward, lens, one)]
    return (
        f"forward {middle[0]:.3f} s ({min(forward):.3f}), lens {middle[1]:.3f} s "
        f"({min(lens):.3f}), ratio {middle[1] / middle[0]:.2f}; at the last position alone "
        f"{middle[2] / middle[0]:.2f}"
    )


if __name__ == "__main__":
    main()
