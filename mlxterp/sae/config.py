"""Every setting of a training run: one name, one meaning, defaults written once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

RECOMMENDED_TRAINING_TOKENS = 3_000_000

LearningRateSchedule = Literal["constant", "linear", "cosine"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
            self._check(field, "a number above 0", lambda x: _is_number(x) and x > 0)
        for field in ("lambda_sparse", "auxiliary_coefficient", "gradient_clip"):
            self._check(field, "a number >= 0", lambda x: _is_number(x) and x >= 0)
        for field in ("validation_split", "dead_neuron_threshold"):
            self._check(field, "in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1)
        for field in ("k", "batch_size", "num_epochs", "log_every"):
            self._check(field, "a whole number >= 1", lambda x: _is_whole(x) and x >= 1)
        for field in ("resample_dead_every", "warmup_steps", "checkpoint_every", "seed"):
            self._check(field, "a whole number >= 0", lambda x: _is_whole(x) and x >= 0)
        allowed = "None or a whole number >= 1"
        self._check("dead_window", allowed, lambda x: x is None or (_is_whole(x) and x >= 1))
        schedules = get_args(LearningRateSchedule)
        self._check("lr_schedule", f"one of {schedules}", lambda x: x in schedules)

    def _check(self, field: str, allowed: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, field)
        if not holds(value):
            raise ValueError(f"{field} must be {allowed}, got {value!r}.")

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
        num_epochs = min(20, max(1, round(RECOMMENDED_TRAINING_TOKENS / max(1, n_tokens))))
        n_steps = num_epochs * n_tokens // batch_size
        return cls(
            k=min(max(d_in // 8, min(8, d_in)), 64),
            learning_rate=float(f"{min(rate, 8e-3):.2g}"),
            batch_size=batch_size,
            num_epochs=num_epochs,
            resample_dead_every=0,
            warmup_steps=min(100, n_steps // 20),
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with other values for some fields."""
        return type(self).from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; raises `ValueError` for a name that is not a field."""
        known = {field.name for field in fields(cls)} | {"normalize_input"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"Unknown settings {unknown}; known are {sorted(known)}.")
        return cls(**values)
