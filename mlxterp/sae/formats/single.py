"""What the formats of SAEs and transcoders have in common: few arrays, and one or two sites."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import Columns
from mlxterp.sae.files import read_json
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.tensors import open_tensors
from mlxterp.sae.metadata import Metadata

ROWS = 4096  # that are multiplied in double precision at a time


def names_in(path: Path) -> frozenset[str]:
    """The names in a file of arrays; none where there is no such file or it cannot be read."""
    try:
        with open_tensors(path) as file:
            return frozenset([*file.names, *file.values])
    except (OSError, ValueError):
        return frozenset()


def json_or_nothing(path: Path) -> dict[str, Any]:
    """A JSON object from a file, an empty one where there is none that can be read."""
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}


def in_path(pattern: str, path: Path) -> re.Match[str] | None:
    """Where a pattern occurs in the whole path, which often says what the file does not."""
    return re.search(pattern, path.absolute().as_posix())


def transposed(array: mx.array) -> mx.array:
    """`array.T`, row after row in memory."""
    array = mx.contiguous(array.T)
    mx.eval(array)
    return array


def centred(W_enc: mx.array, b_enc: mx.array, subtracted: mx.array) -> mx.array:
    """`b_enc` `[n_features]` of a coder that takes `subtracted` `[d_in]` from its input.

        W_enc @ (x - subtracted) + b_enc = W_enc @ x + (b_enc - W_enc @ subtracted)

    In double precision, as a large bias would leave only few digits of the difference.
    """
    W, bias = np.array(W_enc, copy=False), np.array(subtracted, dtype=np.float64)
    parts = [W[i : i + ROWS].astype(np.float64) @ bias for i in range(0, len(W), ROWS)]
    found = np.array(b_enc, dtype=np.float64) - np.concatenate(parts)
    with np.errstate(over="ignore"):  # an infinity is found, and named, in `build`
        return mx.array(found.astype(np.float32))


def no_site(path: Path, example: str = "layers.8.resid_post") -> ValueError:
    """The error for a file that does not say which site it is of."""
    return ValueError(
        f"{path} does not say which site it is of: give site={example!r}, or another."
    )


def two_sites(site: str) -> tuple[str, str]:
    """The two sites of a transcoder, of `layers.8.mlp_in -> layers.8.mlp_out`."""
    reads, arrow, writes = (part.strip() for part in site.partition("->"))
    if not (reads and arrow and writes):
        raise ValueError(
            "site must name both sites of a transcoder, such as "
            f"'layers.8.mlp_in -> layers.8.mlp_out', got {site!r}."
        )
    return reads, writes


def parts_between(
    reads: str,
    writes: str,
    activation_function: str,
    arrays: Mapping[str, mx.array],
    *,
    source: Mapping[str, Any],
    model: Any = None,
    options: Mapping[str, Any] | None = None,
    token_norm: str = "none",
) -> Parts:
    """An SAE, or a transcoder where it writes another site than it reads.

    `model` is the name of the language model, or what else a file says in its place.
    """
    d_in, d_out = arrays["W_enc"].shape[1], arrays["W_dec"].shape[1]
    return Parts(
        kind="sae" if reads == writes else "transcoder",
        reads=Columns((reads,), (d_in,)),
        writes=Columns((writes,), (d_out,)),
        activation_function=activation_function,
        arrays=arrays,
        options=options or {},
        token_norm=token_norm,
        metadata=Metadata(model=named_model(model), source=plain(source)),
    )


def named_model(name: Any) -> dict[str, Any]:
    """What is known of a language model by its name, nothing where it has none."""
    return {"name": name} if name and isinstance(name, str) else {}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON knows them, without those that are not known."""
    return json.loads(json.dumps({k: v for k, v in values.items() if v is not None}, default=str))
