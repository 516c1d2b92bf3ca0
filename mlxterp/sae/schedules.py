"""What changes over a run on purpose: learning rate, sparsity, number of active features."""

from __future__ import annotations

import math

from mlxterp.sae.config import SAEConfig

K_STAGES = 8


def _warmup(wanted: int, n_steps: int) -> int:
    return min(wanted, n_steps // 10)


def learning_rate(step: int, n_steps: int, config: SAEConfig) -> float:
    """The rate at a 0-based step: linear warm-up, then the schedule of the config."""
    warmup = _warmup(config.warmup_steps, n_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_schedule == "cosine":
        done = (step - warmup) / max(1, n_steps - warmup)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if config.lr_schedule == "linear":
        return config.learning_rate * min(1.0, (n_steps - step) / max(1, n_steps // 5))
    return config.learning_rate


def sparsity_share(step: int, n_steps: int, config: SAEConfig) -> float:
    """The share of the sparsity coefficient at a 0-based step: rises linearly to 1."""
    return min(1.0, (step + 1) / max(1, _warmup(config.sparsity_warmup_steps, n_steps)))


def active_features(step: int, n_steps: int, d_in: int, n_features: int, config: SAEConfig) -> int:
    """`k` at a 0-based step: from `d_in` down to the config's in stages of a constant ratio.

    Stages, because every other `k` is another compiled step. The last one lies after
    `k_anneal_steps`.
    """
    first, last_step = min(d_in, n_features), min(config.k_anneal_steps, n_steps // 2)
    if step >= last_step or first <= config.k:
        return config.k
    stage = step * K_STAGES // last_step
    return round(first * (config.k / first) ** (stage / K_STAGES))
