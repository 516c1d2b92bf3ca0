"""How much memory the training of given coders takes, and with which settings less."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlxterp.sae.coder import Block, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.memory import (
    SAMPLED,
    SAMPLED_FOR_MEDIAN,
    SAMPLED_FOR_SKIP,
    MemoryEstimate,
    estimate,
    together,
)

SAMPLE_TOKENS = 65_536


@dataclass(frozen=True)
class Training:
    """Coders that take turns on the same data: what the memory of their training depends on."""

    coders: tuple[tuple[SparseCoder, SAEConfig], ...]
    batch_size: int
    width: int
    """The number of columns of the data, those of all sites."""
    training_tokens: int
    validation_tokens: int
    dataset_bytes: int

    def needed(
        self,
        batch_size: int | None = None,
        expansion_factor: float = math.inf,
        n_sites: int | None = None,
    ) -> MemoryEstimate:
        """What it takes, or would take with no more than this."""
        limits = batch_size or self.batch_size, expansion_factor, n_sites
        return together([self._of(coder, config, *limits) for coder, config in self.coders])

    def smaller(self, limit: float) -> dict[str, MemoryEstimate]:
        """The largest batch, expansion factor and number of sites with each of which, by itself,
        the training takes no more than `limit` bytes, with what it then takes."""
        found = {}
        for name, values in self._choices().items():
            tried = ((value, self.needed(**{name: value})) for value in values)
            for value, needed in tried:
                if needed.total <= limit:
                    text = f"{value} sites" if name == "n_sites" else f"{name} {value:g}"
                    found[text] = needed
                    break
        return found

    def _choices(self) -> dict[str, Iterator[Any]]:
        """Smaller values of each setting, the largest first."""
        largest = max(_factor(coder, coder.n_features) for coder, _ in self.coders)
        factors = [*range(math.ceil(largest) - 1, 3, -1), 3.5, 3, 2.5, 2, 1.5, 1, 0.75, 0.5, 0.25]
        choices: dict[str, Iterator[Any]] = {
            "batch_size": (2**i for i in range(20, 4, -1) if 2**i < self.batch_size),
            "expansion_factor": (x for x in factors if x < largest and self._can_have(x)),
        }
        if len(self.coders) == 1 and _can_lose_sites(self.coders[0][0]):
            choices["n_sites"] = iter(range(len(self.coders[0][0].writes.names) - 1, 1, -1))
        return choices

    def _can_have(self, factor: float) -> bool:
        """Whether so many features are enough for all that shall be active."""
        return all(
            max(config.k, config.wanted_l0) * len(coder.blocks) <= _n_features(coder, factor)
            for coder, config in self.coders
        )

    def _of(
        self,
        coder: SparseCoder,
        config: SAEConfig,
        batch_size: int,
        factor: float,
        n_sites: int | None,
    ) -> MemoryEstimate:
        factor = min(factor, _factor(coder, coder.n_features))
        n_features = _n_features(coder, factor)
        d_in, d_out, width = coder.d_in, coder.d_out, self.width
        matrices = _matrices(coder, n_features)
        if n_sites is not None:
            d_in = d_out = width = sum(sorted(coder.writes.widths)[-n_sites:])
            matrices = [n_features * width] * 2
        sampled = SAMPLED_FOR_MEDIAN if config.bias_init == "geometric_median" else SAMPLED
        if config.skip and config.skip_init == "least_squares":
            sampled = SAMPLED_FOR_SKIP
        return estimate(
            d_in=d_in,
            d_out=d_out,
            n_features=n_features,
            batch_size=batch_size,
            k=coder.k,
            activation_function=config.activation_function,
            tied=config.tied_weights,
            precision=config.precision,
            dataset_bytes=self.dataset_bytes,
            training_tokens=self.training_tokens,
            validation_tokens=self.validation_tokens,
            matrices=matrices,
            n_blocks=len(coder.blocks),
            n_sites=n_sites or len(coder.writes.names),
            regressed=coder.reads != coder.writes,
            sample_bytes=4 * min(self.training_tokens, SAMPLE_TOKENS) * width,
            sampled=sampled,
            expansion_factor=factor,
        )


def _can_lose_sites(coder: SparseCoder) -> bool:
    return coder.reads == coder.writes and len(coder.writes.names) > 2


def _dimensions(coder: SparseCoder) -> float:
    """The number of features of an expansion factor of 1."""
    return len(coder.blocks) * coder.d_in / len(coder.reads.names)


def _factor(coder: SparseCoder, n_features: int) -> float:
    return n_features / _dimensions(coder)


def _n_features(coder: SparseCoder, factor: float) -> int:
    return len(coder.blocks) * round(factor * _dimensions(coder) / len(coder.blocks))


def _matrices(coder: SparseCoder, n_features: int) -> list[int]:
    """The entries of each matrix if the coder had so many features."""

    def size(block: Block, columns: slice) -> int:
        n = block.features.stop - block.features.start
        return n * (columns.stop - columns.start)

    blocks = coder.make_blocks(n_features)
    skip = [coder.d_in * coder.d_out] if coder.has_skip else []
    encoder, decoder = (
        sum(size(b, columns) for b, columns in both)
        for both in ([(b, b.reads) for b in blocks], [(b, b.writes) for b in blocks])
    )
    return [encoder, decoder, *skip]
