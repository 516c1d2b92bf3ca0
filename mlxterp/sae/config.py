"""Every setting of a training run: one name, one meaning, defaults written once."""

from __future__ import annotations

import math
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any, Literal

RECOMMENDED_TRAINING_TOKENS = 4_000_000

LearningRateSchedule = Literal["constant", "linear", "cosine"]


def _check(holds: bool, field: str, allowed: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{field} must be {allowed}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Settings of a coder and of its training; frozen, checked when made.

    `SAEConfig()` holds the documented defaults. The recipe that `config=None` stands for is chosen
    by `SAEConfig.recommended` from the width of the site and the amount of data.
    """

    expansion_factor: float = 16
    """Features per input dimension: `n_features = round(expansion_factor * d_in)`."""
    k: int = 100
    """Features that may be active on one token."""
    learning_rate: float = 1e-4
    """Peak learning rate of Adam."""
    batch_size: int = 256
    """Tokens per step."""
    num_epochs: int = 10
    """Passes over the training tokens."""
    lambda_sparse: float = 0.0
    """Coefficient of an L1 penalty on the code, added to the loss."""
    normalize_activations: bool = True
    """Train on activations that are centred and scaled to a mean squared norm equal to their width;
    the saved coder has this folded into its arrays and works on raw activations."""
    tied_weights: bool = False
    """Use the decoder's rows as the encoder's rows."""
    dead_neuron_threshold: float = 1e-6
    """Firing rate, as a fraction of the tokens in the window, below which a feature is dead."""
    dead_window: int | None = None
    """Tokens over which firing is counted; `None`: a twentieth of the run, 10 million at most."""
    auxiliary_coefficient: float = 1 / 32
    """Weight of the auxiliary loss by which dead features learn the residual (arXiv 2406.04093)."""
    resample_dead_every: int = 10_000
    """Steps between resamplings of features that are still dead; 0: never."""
    warmup_steps: int = 1000
    """Steps of linear warm-up, at most a tenth of the run."""
    lr_schedule: LearningRateSchedule = "linear"
    """After warm-up: `constant`; `linear` (constant, then down to zero over the last fifth of the
    run); `cosine` (down to zero over the whole run)."""
    gradient_clip: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    checkpoint_every: int = 5000
    """Steps between checkpoints, where the trainer has a directory for them; 0: only at the end."""
    validation_split: float = 0.05
    """Share of the data held out, by document, and never trained on."""
    log_every: int = 100
    """Steps between two readings of the metrics."""
    seed: int = 42
    """Seed of the initial values, of the order of the data and of resampling."""
    normalize_input: InitVar[bool | None] = None
    """Another spelling of `normalize_activations`."""

    def __post_init__(self, normalize_input: bool | None) -> None:
        if normalize_input is not None:
            object.__setattr__(self, "normalize_activations", normalize_input)
        for field in ("expansion_factor", "learning_rate"):
            _check(getattr(self, field) > 0, field, "above 0", getattr(self, field))
        for field in ("k", "batch_size", "num_epochs", "log_every"):
            value = getattr(self, field)
            _check(isinstance(value, int) and value >= 1, field, "a whole number >= 1", value)
        for field in (
            "lambda_sparse",
            "auxiliary_coefficient",
            "resample_dead_every",
            "warmup_steps",
            "gradient_clip",
            "checkpoint_every",
        ):
            _check(getattr(self, field) >= 0, field, ">= 0", getattr(self, field))
        _check(
            0 <= self.validation_split < 1, "validation_split", "in [0, 1)", self.validation_split
        )
        rate = self.dead_neuron_threshold
        _check(0 <= rate < 1, "dead_neuron_threshold", "in [0, 1)", rate)
        schedules = ("constant", "linear", "cosine")
        _check(
            self.lr_schedule in schedules, "lr_schedule", f"one of {schedules}", self.lr_schedule
        )
        if self.dead_window is not None:
            _check(self.dead_window >= 1, "dead_window", "None or >= 1", self.dead_window)

    def n_features(self, d_in: int) -> int:
        """The number of features for inputs of width `d_in`.

        Raises `ValueError` where `k` exceeds it.
        """
        n = round(self.expansion_factor * d_in)
        if self.k > n:
            raise ValueError(
                f"k must be at most the number of features, {n} "
                f"(expansion_factor {self.expansion_factor} x width {d_in}), got {self.k}."
            )
        return n

    @classmethod
    def recommended(cls, d_in: int, n_tokens: int) -> SAEConfig:
        """The recipe for a site of width `d_in` and `n_tokens` tokens of data.

        From the sweeps in `benchmarks/RESULTS.md`, measured at width 128: the number of passes, the
        batch size, and a learning rate that falls with the square root of the number of features
        (as in arXiv 2406.04093) and of small batches.
        """
        factor = cls.expansion_factor
        batch_size = 256 if n_tokens < 100_000 else 1024 if n_tokens < 5_000_000 else 4096
        rate = 4e-3 * math.sqrt(2048 / (factor * d_in)) * math.sqrt(min(1.0, batch_size / 1024))
        return cls(
            k=min(max(d_in // 8, min(8, d_in)), 64),
            learning_rate=float(f"{min(rate, 8e-3):.2g}"),
            batch_size=batch_size,
            num_epochs=min(40, max(1, round(RECOMMENDED_TRAINING_TOKENS / max(1, n_tokens)))),
            resample_dead_every=0,
            warmup_steps=100,
        )

    def replace(self, **changes: Any) -> SAEConfig:
        """A copy with other values for some fields."""
        return SAEConfig.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAEConfig:
        """The inverse of `to_dict`; raises `ValueError` for a name that is not a field."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"Unknown settings {unknown}; known are {sorted(known)}.")
        return cls(**values)
