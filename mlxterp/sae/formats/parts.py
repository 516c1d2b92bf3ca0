"""A coder out of a file of another library, or on its way into one, in our arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.metadata import Metadata

# Our names of the sites, in files that we write for other libraries: their own say less.
SITES = "mlxterp_sites"


@dataclass(frozen=True)
class Parts:
    """What a coder consists of; `checkpoint.build` makes one of it.

    `kind` is that of `config.json` (`sae`, `transcoder`, `crosscoder`, `cross_layer_transcoder`),
    `arrays` are those of `SparseCoder.array_files` in our orientation and in float32: `W_enc`,
    `b_enc`, `W_dec`, `b_dec`, `W_skip` where there is a skip connection, and those of the
    activation function, such as `threshold [n_features]`. A bias that is subtracted from the input,
    norms and scales are folded into them.

    `token_norm` is how every token is normalised before it is encoded, and its reconstruction
    scaled back; see `SparseCoder`. `firing_rates` `[n_features]` is empty where it is not known.
    """

    kind: str
    reads: Columns
    writes: Columns
    activation_function: str
    arrays: Mapping[str, mx.array]
    options: Mapping[str, Any] = field(default_factory=dict)
    token_norm: str = "none"
    metadata: Metadata = field(default_factory=Metadata)
    firing_rates: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, coder: SparseCoder, kind: str, metadata: Metadata, rates: np.ndarray) -> Parts:
        """What a coder consists of, on its way into a file of another library."""
        arrays: dict[str, mx.array] = {}
        for found in coder.array_files().values():
            arrays |= found
        return cls(
            kind, coder.reads, coder.writes, coder.activation_name, arrays,
            coder.activation_function.options, coder.token_norm, metadata, rates,
        )  # fmt: skip

    @property
    def n_features(self) -> int:
        """The number of features."""
        return self.arrays["b_enc"].shape[0]
