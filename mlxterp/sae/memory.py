"""How much memory a training run will take, said before it starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import mlx.core as mx

from mlxterp.sae.kernels import GATHERED_BYTES

GIB = 1 << 30
MEMINFO = Path("/proc/meminfo")
VALIDATION_TOKENS = 4096
FITTED_TOKENS = 4096

# Arrays of one kind that are alive at the peak of a step, from measurements: MLX computes ahead,
# and frees an array only when the last operation that reads it has run.
UPDATED, UPDATED_ON_GPU = 2.5, 3.0  # largest matrices, in the gradient and in Adam's update
REVIVED, NORMS = 2.0, 1.5  # more of them: to revive dead features, and for norms at several sites
DENSE, DENSE_ON_GPU = 2.3, 4.0  # arrays [batch, n_features]
DENSE_ALL = {"relu": 6.5, "jumprelu": 11.0, "gated": 13.5}  # those of codes that are not selected
WEIGHTED = 1.1  # more of them, where features are selected by their value and these norms
GATHERED, BLOCKS = 1.1, 13  # rows of each active (token, feature) pair; blocks of them at once
STARTED, REGRESSED = 1.9, 2.0  # arrays [sample, n_features] when initial values are found
STARTED_ROWS = 1.5  # and [sample, d_in + d_out]
VALIDATED, VALIDATED_RELU = 3.5, 2.0  # arrays [batch, n_features] on held-out data
VALIDATED_BLOCKS, VALIDATED_ROWS = 3.0, 2.5  # more of them in blocks; and [batch, d_in + d_out]
BATCHES = 4.0  # arrays [batch, d]
# Copies of the sample when it is measured, and for settings that need more.
SAMPLED, SAMPLED_FOR_MEDIAN, SAMPLED_FOR_SKIP = 3.0, 5.0, 6.0


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that the device has, and that can still be taken."""

    total: int
    free: int


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run takes at its peak, in bytes, by what it is for."""

    parameters: int
    optimizer_state: int
    gradients: int
    parameter_update: int
    code: int
    """Pre-activations and code of a batch."""
    gathered_rows: int
    """Rows of the decoder for the active (token, feature) pairs of a batch; not on GPUs."""
    batch: int
    """Activations of a batch, and what is made of them."""
    start: int
    """What finding the initial values takes beyond what a step does."""
    validation: int
    """What measuring on held-out data takes beyond both."""
    trained_coder: int
    dataset: int
    batch_size: int
    expansion_factor: float

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by what they are for, the largest first."""
        settings = ("batch_size", "expansion_factor")
        names = [field.name for field in fields(self) if field.name not in settings]
        found = {name.replace("_", " "): getattr(self, name) for name in names}
        return dict(sorted(found.items(), key=lambda part: -part[1]))

    @property
    def total(self) -> int:
        """The bytes of all parts together."""
        return sum(self.parts.values())

    def __repr__(self) -> str:
        rows = {"MemoryEstimate": self.total, **self.parts}
        return "\n".join(
            f"{name if i == 0 else '  ' + name:<20} {_readable(n):>10}"
            for i, (name, n) in enumerate(rows.items())
        )


def estimate(
    *,
    d_in: int,
    d_out: int,
    n_features: int,
    batch_size: int,
    k: int | None,
    activation_function: str = "jumprelu",
    tied: bool = False,
    precision: str = "float32",
    dataset_bytes: int = 0,
    training_tokens: int = FITTED_TOKENS,
    validation_tokens: int = VALIDATION_TOKENS,
    on_gpu: bool | None = None,
    matrices: Sequence[int] | None = None,
    n_blocks: int = 1,
    n_sites: int = 1,
    regressed: bool = False,
    sample_bytes: int = 0,
    sampled: float = SAMPLED,
    expansion_factor: float | None = None,
) -> MemoryEstimate:
    """What a run takes at its peak, from its sizes.

    `k` is the number of active features of a block, `None` for activation functions that do not
    select, whose code and gradients are dense; `activation_function` says which of those.
    `matrices` are the numbers of entries of encoder, decoder and any others, by default those of a
    full encoder and decoder. The coder has `n_blocks` and writes `n_sites`; `regressed` says that
    it writes other sites than it reads, and so starts from a decoder found by regression.

    `training_tokens` and `validation_tokens` are trained on and held out, `dataset_bytes` those of
    the data that are not in memory yet but will be. The data are measured on a sample of
    `sample_bytes`, which takes `sampled` times as much at once.

    The numbers of arrays alive at once are measured on the CPU, and mostly right within a quarter;
    those of a GPU are counted from the formulas.
    """
    on_gpu = mx.default_device() != mx.Device(mx.cpu) if on_gpu is None else on_gpu
    encoder, decoder, *others = matrices or (d_in * n_features, d_out * n_features)
    trained = [decoder, *others] if tied else [encoder, decoder, *others]
    parameters = 4 * (sum(trained) + n_features + d_out)
    folded = 4 * (encoder + decoder + sum(others) + n_features + d_out)
    item = 2 if precision == "bfloat16" else 4
    code = item * batch_size * n_features
    width = max(d_in, d_out)
    row = max(d_in, decoder * n_blocks // n_features)  # of a pair of each block, side by side
    dense = DENSE_ALL.get(activation_function, DENSE_ALL["jumprelu"])
    weighted = n_sites > 1 and n_blocks == 1

    def gathered(n_tokens: int) -> float:
        if k is None or on_gpu:
            return 0.0
        return min(item * GATHERED * n_tokens * k * row, BLOCKS * GATHERED_BYTES)

    updated = UPDATED_ON_GPU if on_gpu else UPDATED + REVIVED * (n_blocks == 1)
    selected = (DENSE_ON_GPU if on_gpu else DENSE) + WEIGHTED * weighted
    step = {
        "gradients": parameters,
        "parameter_update": 4 * (updated + NORMS * weighted) * max(trained),
        "code": code * (dense if k is None else selected),
        "gathered_rows": gathered(batch_size),
        "batch": 4 * BATCHES * batch_size * width,
    }
    # None of the three is there at the same time as another; the moments come with the first step.
    stepping = sum(step.values())
    n_fitted = min(training_tokens, FITTED_TOKENS)
    n_validated = min(validation_tokens, VALIDATION_TOKENS)
    simple = k is None and activation_function == "relu"
    started = STARTED + REGRESSED * regressed + WEIGHTED * (weighted and not simple)
    starting = 4 * n_fitted * (started * n_features + STARTED_ROWS * (d_in + d_out))
    starting += gathered(n_fitted) + sample_bytes
    starting = max(starting, sampled * sample_bytes) - 2 * parameters - folded
    validated = (VALIDATED_RELU if simple else VALIDATED) + VALIDATED_BLOCKS * (n_blocks > 1)
    validation = 4 * n_validated * (validated * n_features + VALIDATED_ROWS * (d_in + d_out))
    return MemoryEstimate(
        parameters=parameters,
        optimizer_state=2 * parameters,
        start=max(0, round(starting - stepping)),
        validation=max(0, round(validation - max(starting, stepping))),
        trained_coder=folded,
        dataset=dataset_bytes,
        batch_size=batch_size,
        expansion_factor=expansion_factor or n_features / d_in,
        **{name: round(n) for name, n in step.items()},
    )


def together(estimates: Sequence[MemoryEstimate]) -> MemoryEstimate:
    """What several coders take that take turns on the same data."""
    kept = ("parameters", "optimizer_state", "trained_coder")
    sums = {name: sum(getattr(one, name) for one in estimates) for name in kept}
    return replace(max(estimates, key=lambda one: one.total), **sums)


def device_memory() -> DeviceMemory | None:
    """The memory of the device that MLX computes on; `None` where it is not known."""
    device = mx.default_device()
    if device == mx.Device(mx.cpu):
        return _main_memory()
    info = {name: n for name, n in mx.device_info(device).items() if isinstance(n, int)}
    total = info.get("total_memory", info.get("memory_size"))
    if not total:
        return None
    if "free_memory" in info:
        # Of CUDA; what MLX has taken and keeps for later is free to the run.
        return DeviceMemory(total, info["free_memory"] + mx.get_cache_memory())
    usable = info.get("max_recommended_working_set_size", total)
    return DeviceMemory(total, max(0, usable - mx.get_active_memory()))


def _main_memory() -> DeviceMemory | None:
    try:
        lines = [line.split() for line in MEMINFO.read_text().splitlines()]
        found = {words[0]: int(words[1]) * 1024 for words in lines if len(words) == 3}
        return DeviceMemory(found["MemTotal:"], found["MemAvailable:"])
    except (OSError, KeyError, ValueError):
        return None


def check(
    needed: MemoryEstimate,
    memory: DeviceMemory | None = None,
    smaller: Callable[[float], Mapping[str, MemoryEstimate]] | None = None,
) -> None:
    """Compare with the memory of the device, or the one given.

    Raises `MemoryError` where the run needs more than there is in all, and warns where it needs
    more than nine tenths of what is free; both say what to change. `smaller` tells which settings
    take no more than a number of bytes.
    """
    memory = memory or device_memory()
    if memory is None or needed.total <= 0.9 * memory.free:
        return
    largest = ", ".join(f"{name} {_readable(n)}" for name, n in [*needed.parts.items()][:3])
    message = (
        f"Training needs about {_readable(needed.total)}; {_readable(memory.free)} of "
        f"{_readable(memory.total)} are free. Largest: {largest}. "
        + _advice(needed, smaller(0.9 * memory.free) if smaller else {})
    )
    if needed.total > memory.total:
        raise MemoryError(message)
    warnings.warn(message, stacklevel=2)


def _advice(needed: MemoryEstimate, smaller: Mapping[str, MemoryEstimate]) -> str:
    buffer = f"buffer_bytes ({needed.dataset:,} in use)"
    if smaller:
        *others, last = [f"{name} ({_readable(one.total)})" for name, one in smaller.items()]
        settings = f"{', '.join(others)} or {last}" if others else last
        also = f" A lower {buffer} may fit as well." if needed.dataset else ""
        return f"What fits is at most {settings}.{also}"
    settings = [
        f"batch_size (now {needed.batch_size})",
        f"expansion_factor ({needed.expansion_factor:g})",
    ]
    if needed.dataset:
        return f"Lower {', '.join(settings)}, or {buffer}."
    return f"Lower {' or '.join(settings)}."


def _readable(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / 2**20:.0f} MiB"
