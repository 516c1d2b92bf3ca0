"""What it takes to find a circuit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CircuitCost:
    """How many derivatives of a context there are: those of the `fast` pass, and at most those of
    the `close` look at its best targets; and an estimate of the `seconds` that all take. Where
    features fire is known by now: `n_tokens` were encoded."""

    n_tokens: int
    fast: int
    close: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        return (
            f"At most about {_duration(self.seconds)}: {self.fast:,} derivatives of a context in "
            f"the fast pass and {self.close:,} at a closer look, over {self.n_tokens:,} tokens"
        )


@dataclass(frozen=True)
class GraphCost:
    """What an attribution graph takes: the derivatives of at most `n_targets` of the `n_features`
    that fire by all `n_sources`, in `n_passes` backward passes; the `bytes` that hold them, and an
    estimate of the `seconds`."""

    n_features: int
    n_sources: int
    n_targets: int
    n_passes: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        return (
            f"At most about {_duration(self.seconds)} and {self.bytes / 2**20:,.0f} MiB: "
            f"{self.n_passes:,} backward passes for {self.n_targets:,} of the "
            f"{self.n_features:,} features that fire, and effects of {self.n_sources:,} sources"
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
