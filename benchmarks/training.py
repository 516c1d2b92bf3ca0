"""How fast a training step is, beside the steps of other libraries and the limits of the machine.

    python benchmarks/training.py [--device cuda] [--shapes 1024,512,8192,32 ...] [--threads 1]
    python benchmarks/training.py --end-to-end      what training costs beside harvesting
    python benchmarks/training.py --memory          peak of a step, growth over many

The variants take turns, one step each, and the medians of the rounds are compared, so that other
work on the machine hits all; beside the wall time stands the process's CPU time. Needs what
`peers.py` does; without it `--variants mlxterp` still runs.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from peers import Shape, steps

SHAPES = (
    Shape(1024, 512, 8192, 32),
    Shape(1024, 1024, 16384, 32),
    Shape(256, 1024, 16384, 32),
    Shape(512, 2048, 32768, 100),
    Shape(2048, 1024, 32768, 64),
    Shape(2048, 2048, 32768, 100),
    Shape(256, 1024, 65536, 32),
)
BASELINES = ("SAELens", "SAELens sparse", "sparsify")
TINY = Shape(64, 16, 64, 4)


class Ours:
    """Our training step as a run makes it: decoder norm, firing counts and clipping included."""

    def __init__(self, shape: Shape, activations: np.ndarray, precision: str = "float32"):
        from mlxterp.sae import ActivationDataset, SAEConfig
        from mlxterp.sae.run import Plan, Run
        from mlxterp.sae.sae import SAE

        config = SAEConfig(
            k=shape.k, batch_size=shape.batch, expansion_factor=shape.features / shape.d,
            precision=precision, learning_rate=1e-4, log_every=10**9, resample_dead_every=0,
            checkpoint_every=0, dead_window=10**12,
        )  # fmt: skip
        dataset = ActivationDataset.from_activations(activations)
        columns = dataset.columns
        coder = SAE(columns, columns, shape.features, k=shape.k)
        plan = Plan(shape.batch, steps_per_epoch=10**7, n_epochs=1, seed=0)
        self.batch = next(dataset.batches(shape.batch))
        self.run = Run(config, coder, dataset, None, plan, self.batch)

    def step(self) -> None:
        """One step, done when this returns."""
        import mlx.core as mx

        self.run.advance(self.batch)
        mx.eval(self.run.state)


def variants(shape: Shape, device: str, wanted: list[str]) -> dict[str, Callable[[], None]]:
    """Steps by name; of the peers' only if a wanted name is not ours."""
    activations = np.random.default_rng(0).normal(size=(shape.batch, shape.d)).astype(np.float32)
    made = {"mlxterp": Ours(shape, activations).step}
    if device == "cuda":
        made["mlxterp bf16"] = Ours(shape, activations, "bfloat16").step
    if not wanted or any(not name.startswith("mlxterp") for name in wanted):
        made |= _synchronised(steps(shape, activations, device), device)
    return {name: step for name, step in made.items() if not wanted or name in wanted}


def _synchronised(given: dict[str, Callable], device: str) -> dict[str, Callable[[], None]]:
    if device == "cpu":
        return given
    import torch

    def complete(step: Callable[[], None]) -> Callable[[], None]:
        def synchronised() -> None:
            step()
            torch.cuda.synchronize()

        return synchronised

    return {name: complete(step) for name, step in given.items()}


def medians(given: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall and CPU milliseconds of each, taking turns after two rounds of warm-up."""
    wall: dict[str, list[float]] = {name: [] for name in given}
    cpu: dict[str, list[float]] = {name: [] for name in given}
    gc.collect()
    gc.disable()
    for i in range(rounds + 2):
        for name, step in given.items():
            started, used = time.perf_counter(), time.process_time()
            step()
            if i >= 2:
                wall[name].append(1000 * (time.perf_counter() - started))
                cpu[name].append(1000 * (time.process_time() - used))
    gc.enable()
    return {n: (statistics.median(wall[n]), statistics.median(cpu[n])) for n in given}


def peak_bytes(step: Callable[[], None], ours: bool, device: str) -> int | None:
    """What a step takes beyond what is there before it; unknown for PyTorch on the CPU."""
    if ours:
        import mlx.core as mx

        step()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        step()
        return mx.get_peak_memory() - before
    if device == "cpu":
        return None
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def rates() -> dict[str, float]:
    """FLOP/s of a large product in both types and bytes per second of a copy, by MLX."""
    import mlx.core as mx

    def seconds(function: Callable[[], Any]) -> float:
        measured = []
        for _ in range(8):
            started = time.perf_counter()
            mx.eval(function())
            measured.append(time.perf_counter() - started)
        return statistics.median(measured[3:])

    n, found = 8192, {}
    for name, dtype in (("float32", mx.float32), ("bfloat16", mx.bfloat16)):
        a, b = (mx.random.normal((n, n), key=mx.random.key(i)).astype(dtype) for i in (0, 1))
        mx.eval(a, b)
        found[name] = 2 * n**3 / seconds(lambda a=a, b=b: a @ b)
    large = mx.zeros((1 << 28,))
    mx.eval(large)
    found["bandwidth"] = 2 * large.nbytes / seconds(lambda: large + 1.0)
    return found


def shortest(shape: Shape, flops: float, bandwidth: float, n_bytes: int) -> float:
    """Milliseconds that a sparse step must take: one product, the pre-activations read once, two
    passes over the active rows, 24 bytes per parameter for Adam."""
    batch, d, features, k = shape
    product = 2 * batch * d * features / flops
    moved = n_bytes * (batch * features + 2 * batch * k * d) + 24 * 2 * d * features
    return 1000 * (product + moved / bandwidth)


def baseline(times: dict[str, tuple[float, float]], name: str) -> float | None:
    """The fastest of a library's precisions, without the rescaling that is SAELens' default."""
    sparse = name.endswith("sparse")
    names = [
        n for n in times
        if n.startswith(name.removesuffix(" sparse"))
        and n.endswith(", sparse") == sparse
        and not n.endswith(("rescaling", "no renorm"))
    ]  # fmt: skip
    return min((times[n][0] for n in names), default=None)


def compare(shapes: list[Shape], device: str, rounds: int, wanted: list[str]) -> None:
    measured = rates() if device == "cuda" else {}
    for name, rate in measured.items():
        print(f"{name}: {rate / 1e12:.3g} T{'B' if name == 'bandwidth' else 'FLOP'}/s")
    for shape in shapes:
        given = variants(shape, device, wanted)
        times = medians(given, rounds)
        print(
            f"\nbatch {shape.batch}, d {shape.d}, {shape.features} features, k {shape.k}: "
            f"medians of {rounds} rounds; times as fast as {', '.join(BASELINES)}\n"
            f"  {'':26s}{'ms':>9s} {'cpu ms':>9s} {'samples/s':>10s} "
            f"{'SAELens':>8s} {'sparse':>7s} {'sparsify':>8s} {'peak MiB':>9s} {'roofline':>8s}"
        )
        for name, (wall, cpu) in times.items():
            compared = [baseline(times, other) for other in BASELINES]
            ratios = ["-" if other is None else f"{other / wall:.2f}" for other in compared]
            ours = name.startswith("mlxterp")
            peak = peak_bytes(given[name], ours, device)
            share = "-"
            if measured:
                bf16 = "bf16" in name or name.startswith("sparsify")
                flops = measured["bfloat16" if bf16 else "float32"]
                least = shortest(shape, flops, measured["bandwidth"], 2 if bf16 else 4)
                share = f"{least / wall:.0%}"
            print(
                f"  {name:26s}{wall:9.2f} {cpu:9.2f} {1000 * shape.batch / wall:10.0f} "
                f"{ratios[0]:>8s} {ratios[1]:>7s} {ratios[2]:>8s} "
                f"{'-' if peak is None else f'{peak / 2**20:.0f}':>9s} {share:>8s}",
                flush=True,
            )
        _forget(given, device)


def _forget(given: dict[str, Any], device: str) -> None:
    import mlx.core as mx

    given.clear()
    gc.collect()
    mx.clear_cache()
    if device == "cuda" and "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()


def llama(device: str) -> Any:
    """A random Llama-3.2-1B in bfloat16; on the CPU two of its layers, few tokens, float32."""
    import mlx.core as mx
    from mlx_lm.models import llama as module

    from mlxterp import InterpretableModel

    small = device == "cpu"
    model = module.Model(module.ModelArgs(
        model_type="llama", hidden_size=2048, num_hidden_layers=2 if small else 16,
        intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        vocab_size=1024 if small else 128256, rms_norm_eps=1e-5, rope_theta=500000.0,
        max_position_embeddings=131072, tie_word_embeddings=True,
    ))  # fmt: skip
    model.set_dtype(mx.float32 if small else mx.bfloat16)
    mx.eval(model.parameters())
    return InterpretableModel(model)


def end_to_end(device: str, n_tokens: int | None, precision: str) -> None:
    """Tokens per second of harvesting alone, and of harvesting and training."""
    import mlx.core as mx

    from mlxterp.sae import ActivationDataset, SAEConfig
    from mlxterp.sae.callbacks import Callback
    from mlxterp.sae.coder import Columns
    from mlxterp.sae.corpus import Corpus
    from mlxterp.sae.sae import SAE
    from mlxterp.sae.trainer import Trainer

    model = llama(device)
    small = device == "cpu"
    layer, context, batch = (1, 128, 256) if small else (9, 1024, 2048)
    n_tokens = n_tokens or (8192 if small else 1 << 20)
    vocabulary = 1024 if small else 128256
    ids = np.random.default_rng(0).integers(0, vocabulary, n_tokens).astype(np.int32)
    corpus = Corpus.pack(ids.reshape(-1, context), context, None, frozenset())
    columns = Columns((f"layers.{layer}.resid_post",), (2048,))
    # A buffer smaller than the data, so that harvesting and training alternate as in a long run.
    buffer = n_tokens // 8 * 4 * columns.width
    dataset = ActivationDataset(columns, source=model, corpus=corpus, buffer_bytes=buffer)
    # Everything that a long run does, but no warm-up for this short one to be warned about.
    config = SAEConfig(
        k=100, batch_size=batch, num_epochs=1, warmup_steps=0, resample_dead_every=0,
        precision=precision, dead_window=10**9, log_every=100,
    )  # fmt: skip

    def harvest() -> None:
        for part in dataset.batches(batch):
            mx.eval(part)

    class Clock(Callback):
        """Times the middle half: before it kernels are compiled, after it the buffer runs dry."""

        def on_step_end(self, step: int) -> None:
            quarter = n_tokens // batch // 4
            if step == quarter:
                self.started = time.perf_counter()
            elif step == 3 * quarter:
                self.rate = 2 * quarter * batch / (time.perf_counter() - self.started)

    if small:
        print("CPU: 2 of 16 layers, 1,024 of 128,256 tokens, float32; not the goal's shape")
    mx.eval(next(dataset.batches(batch)))
    started = time.perf_counter()
    harvest()
    alone, clock = time.perf_counter() - started, Clock()
    coder = SAE(columns, columns, config.n_features(columns.width), k=config.k)
    Trainer(config, callbacks=[clock]).fit(coder, dataset)
    print(
        f"residual after {layer + 1} layers of width 2048, context {context}, {n_tokens:,} tokens; "
        f"SAE {config.n_features(2048)} features, k {config.k}, batch {batch}, {precision}\n"
        f"  harvest only      {n_tokens / alone:10.0f} tokens/s\n"
        f"  harvest and train {clock.rate:10.0f} tokens/s, "
        f"{clock.rate * alone / n_tokens:.0%} of it"
    )


def memory(device: str) -> None:
    """The peak of a step at a large shape, and growth over 10,000 tiny ones."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    shape = Shape(512 if device == "cpu" else 2048, 2048, 32768, 100)
    ours = Ours(shape, np.random.default_rng(0).normal(size=(shape.batch, shape.d)))
    ours.step()
    state = {name: a.nbytes for name, a in tree_flatten(ours.run.state)}
    params = sum(size for name, size in state.items() if name.startswith("params"))
    mx.reset_peak_memory()
    ours.step()
    peak, whole = mx.get_peak_memory(), sum(state.values())
    print(
        f"batch {shape.batch}, d {shape.d}, {shape.features} features, k {shape.k}: "
        f"peak {peak / 2**20:.0f} MiB; beyond parameters {(peak - params) / 2**20:.0f}, "
        f"beyond parameters and optimiser {(peak - whole) / 2**20:.0f}"
    )
    del ours
    gc.collect()
    mx.clear_cache()
    tiny = Ours(TINY, np.random.default_rng(0).normal(size=(TINY.batch, TINY.d)))
    print("  steps  active KiB  cache KiB  process MiB")
    for i in range(10_001):
        if i in (100, 1000, 2000, 5000, 10_000):
            kib = mx.get_active_memory() / 2**10, mx.get_cache_memory() / 2**10
            print(f"  {i:5d} {kib[0]:11.0f} {kib[1]:10.0f} {resident_mib():12.1f}", flush=True)
        tiny.step()


def resident_mib() -> float:
    """Memory of the process; where the system does not tell, the most it ever was."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def prepare(device: str, threads: int) -> None:
    """Both frameworks on the device, with equal numbers of threads."""
    if device == "cpu":
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)  # read when mlxterp loads OpenBLAS
    import mlxterp  # noqa: F401  before mlx.core
    import mlx.core as mx  # isort: skip

    mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)
    try:
        import torch
    except ImportError:
        return
    if device == "cpu":
        torch.set_num_threads(threads)


def shape(text: str) -> Shape:
    return Shape(*map(int, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="B,d,F,k")
    parser.add_argument("--variants", nargs="+", default=[], help="names; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--tokens", type=int, help="of --end-to-end")
    parser.add_argument("--precision", default="float32", help="of --end-to-end")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    prepare(arguments.device, arguments.threads)
    if arguments.end_to_end:
        end_to_end(arguments.device, arguments.tokens, arguments.precision)
    elif arguments.memory:
        memory(arguments.device)
    else:
        compare(arguments.shapes, arguments.device, arguments.rounds, arguments.variants)


if __name__ == "__main__":
    main()
