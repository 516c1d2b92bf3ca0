"""What features do to the model's prediction in one text, to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlxterp.sae.coder import SparseCoder, check_sized
from mlxterp.sae.features.logit_effects import last_residual, writes_stream, written
from mlxterp.sae.kernels import joined
from mlxterp.sae.source import ActivationSource


def total_effects(
    coder: SparseCoder,
    source: ActivationSource,
    ids: Sequence[int],
    target: str | int | None = None,
    position: int = -1,
    site: str | None = None,
) -> tuple[mx.array, list[int]]:
    """The derivative `[n_tokens, n_features]` of one logit by the value of every feature at every
    token, and the token whose logit it is, once for each token.

        d m / d z[t, i] = sum over sites of W_dec[i, site] . d m / d x_site[t]
        m = logit[position, target] - mean over the vocabulary of logit[position]

    through all that the real model does, attention from later tokens too. The mean is taken off
    because softmax does not see what all logits have in common. The target is by default the token
    that the model predicts there.
    """
    check_sized(coder, "An attribution")
    if not -len(ids) <= position < len(ids):
        raise ValueError(f"position must be in [{-len(ids)}, {len(ids) - 1}], got {position}.")
    model, names = written(coder, source, site)
    tokens = mx.array([list(ids)])
    chosen = _targets(model, model.run(tokens).output[:, position], target)[0]

    def metric(logits: mx.array) -> mx.array:
        return _centred(logits[0, position : position + 1 or None], mx.array([chosen])).sum()

    found = model.gradients(tokens, list(names.values()), metric).gradients
    slopes = {name: found[inner][0] for name, inner in names.items()}
    return _by_feature(coder, slopes), [chosen] * len(ids)


def direct_effects(
    coder: SparseCoder,
    source: ActivationSource,
    ids: Sequence[int],
    target: str | int | None = None,
    site: str | None = None,
) -> tuple[mx.array, list[int]]:
    """As `total_effects`, but of each token on the logit at the same token, and past the layers
    between: as if its row were added to the last residual stream `h[t]`.

        d m[t] / d z[t, i] = (sum over sites of W_dec[i, site]) . d m[t] / d h[t]

    Without a target it is for each token the one that the model predicts there. Raises `ValueError`
    where the rows do not have the width of the stream.
    """
    check_sized(coder, "An attribution")
    if not writes_stream(coder, source, site):
        raise ValueError(
            f"This coder writes {coder.writes}, and a direct effect needs rows that can be read as "
            "the residual stream of one model: name one of several sites with site=..., or use "
            "rank_by='attribution', which goes through the model."
        )
    model, names = written(coder, source, site)
    h = last_residual(model, ids)
    targets = _targets(model, model.unembed(h), target)
    slope: Any = mx.grad(lambda h: _centred(model.unembed(h), mx.array(targets)).sum())(h)
    return _by_feature(coder, {name: slope for name in names}), targets


def token_id(model: ActivationSource, target: str | int, vocabulary: int | None = None) -> int:
    """The id of a target; raises `ValueError` for a text that is not one token, or another id."""
    if not isinstance(target, str):
        if vocabulary is not None and not 0 <= target < vocabulary:
            raise ValueError(f"target must be in [0, {vocabulary - 1}], got {target}.")
        return int(target)
    ids = [] if not target else model.encode_batch([target])[0]
    ids = [i for i in ids if i not in model.special_token_ids]
    if len(ids) != 1:
        parts = model.to_str_tokens(ids) if ids else []
        raise ValueError(f"target must be one token, and {target!r} is {len(ids)}: {parts}.")
    return int(ids[0])


def _targets(model: ActivationSource, logits: mx.array, target: str | int | None) -> list[int]:
    """One for each row of the logits `[n, vocabulary]`."""
    if target is not None:
        return [token_id(model, target, logits.shape[-1])] * len(logits)
    predicted: list[int] = mx.argmax(logits, axis=-1).tolist()  # pyright: ignore
    return predicted


def _centred(logits: mx.array, targets: mx.array) -> mx.array:
    """The logit of each row's target less the mean of the row, `[n]`."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - logits.mean(axis=-1)


def _by_feature(coder: SparseCoder, slopes: Mapping[str, mx.array]) -> mx.array:
    """Derivatives `[n, width]` by the activation at some write sites as ones by the values of
    features, `[n, n_features]`."""
    n = len(next(iter(slopes.values())))
    sites = zip(coder.writes.names, coder.writes.widths, strict=True)
    parts = [slopes[name] if name in slopes else mx.zeros((n, width)) for name, width in sites]
    gradient = mx.concatenate([part.astype(mx.float32) for part in parts], axis=-1)
    rows = zip(coder.blocks, coder.decoder_blocks(), strict=True)
    return joined([gradient[:, b.writes] @ W.T.astype(mx.float32) for b, W in rows], axis=-1)
