"""Which heads are worth a closer look: those that look at what no rule of position explains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.given import freezable, place, token_ids
from mlxterp.sae.circuits.nodes import Names, cut
from mlxterp.sae.features.display import pieces
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import Table, plot_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 10
WIDEST = 24  # narrow characters of a token in a table


@dataclass(frozen=True)
class HeadScore:
    """A number of one head; at one query also the `key` that it is about, the `attention` that
    this gets there, and how much is `usual`."""

    layer: int
    head: int
    score: float
    key: int | None = None
    attention: float | None = None
    usual: float | None = None


@dataclass(frozen=True, eq=False)
class HeadScores:
    """A number of every head of a model, `what` it is of; the heads of the largest come first."""

    what: str
    heads: tuple[HeadScore, ...]
    tokens: tuple[str, ...] = ()

    def __getitem__(self, place: tuple[int, int]) -> HeadScore:
        """That of a layer and head; raises `ValueError` where there is none."""
        for head in self.heads:
            if (head.layer, head.head) == tuple(place):
                return head
        layers = sorted({head.layer for head in self.heads})
        raise ValueError(f"There is no head {place}; layers with attention are {layers}.")

    def strongest(self, n: int = SHOWN) -> tuple[HeadScore, ...]:
        """The `n` heads of the largest scores."""
        return self.heads[:n]

    def table(self, n: int = SHOWN) -> Table:
        """The `n` heads of the largest scores."""
        if any(head.key is None for head in self.heads):
            rows = [(_name(head), f"{head.score:.3f}") for head in self.heads[:n]]
            return Table(self.what, ("head", "score"), tuple(rows))
        names = Names((), self.tokens)
        rows = []
        for head in self.heads[:n]:
            token = f"{head.key} “{cut(names.token(head.key or 0), WIDEST)}”"
            figures = (head.attention or 0.0, head.usual or 0.0, head.score)
            rows.append((_name(head), token, *(f"{x:.3f}" for x in figures)))
        return Table(self.what, ("head", "key", "attention", "usual", "more"), tuple(rows))

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table(2 * SHOWN)._repr_html_()

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib heat map, layers over heads. Raises `ImportError` where matplotlib is
        missing."""
        layers = sorted({head.layer for head in self.heads})
        values = np.full((len(layers), 1 + max(head.head for head in self.heads)), np.nan)
        for head in self.heads:
            values[layers.index(head.layer), head.head] = head.score
        columns = [str(i) for i in range(values.shape[1])]
        names = {"row_label": "layer", "column_label": "head"}
        return plot_matrix(values, columns, [*map(str, layers)], label=self.what, ax=ax, **names)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        heads = [asdict(head) for head in self.heads]
        return {"what": self.what, "tokens": [*self.tokens], "heads": heads}


def prefix_matching(
    model: ActivationSource, tokens: str | Sequence[int] | Sequence[Sequence[int]]
) -> HeadScores:
    """How much heads look at what came after an earlier occurrence of the present token.

        score = mean over queries t of the attention to all keys s < t with token[s - 1] = token[t]

    Queries whose token has occurred before count. `tokens` are a text, ids, or several rows of
    ids, of which the best are random and repeat themselves (`testbeds.repetitions`): in text heads
    may do this for other reasons. Induction heads are near 1. Raises `ValueError` where nothing
    repeats itself.

    Reference: Olsson et al. 2022, arXiv 2209.11895.
    """
    return _means(model, tokens, "prefix matching", _after_the_same)


def previous_token(
    model: ActivationSource, tokens: str | Sequence[int] | Sequence[Sequence[int]]
) -> HeadScores:
    """How much heads look at the token before, as a mean over all queries but the first.

    For `tokens` see `prefix_matching`. Raises `ValueError` where there is one token only.
    """
    return _means(model, tokens, "attention to the token before", _one_before)


def unusual_attention(
    model: ActivationSource,
    prompt: str | Sequence[int],
    query: int = -1,
    key: int | None = None,
) -> HeadScores:
    """Which heads look from a query at a key that they would not look at by rule.

        score = attention - usual

    `usual` is what other queries give to the same key, or to the one at the same distance, on the
    mean: the larger of the two. So heads that rest at the first token, or that always look at the
    token before, come last. `key=None` takes for each head the key with the largest score.

    Raises `ValueError` for an empty prompt, positions that there are not, and a key after the
    query.
    """
    source = freezable(model)
    ids = token_ids(source, prompt)
    query = place("query", query, len(ids))
    if key is not None and (key := place("key", key, len(ids))) > query:
        raise ValueError(f"key must not come after the query at {query}, got {key}.")
    found = []
    for layer, pattern in _patterns(source, ids):
        usual = _usual(pattern, query)
        more = pattern[:, query, : query + 1] - usual
        keys = more.argmax(axis=1) if key is None else np.full(len(pattern), key)
        for head, at in enumerate(keys.tolist()):
            figures = float(pattern[head, query, at]), float(usual[head, at])
            found.append(HeadScore(layer, head, float(more[head, at]), at, *figures))
    tokens = pieces(source, ids)
    what = f"Attention from {query} “{cut(Names((), tokens).token(query), WIDEST)}”"
    return HeadScores(what, _sorted(found), tokens)


def _usual(pattern: np.ndarray, query: int) -> np.ndarray:
    """What other queries of a pattern `[H, S, S]` give to each key that a query sees, or to that
    at the same distance, `[H, query + 1]`."""
    n = pattern.shape[1]
    usual = np.zeros((len(pattern), query + 1), np.float32)
    for key in range(query + 1):
        others = [i for i in range(key, n) if i != query]
        alike = [i for i in range(query - key, n) if i != query]
        for queries, keys in ((others, [key] * len(others)),
                              (alike, [i - query + key for i in alike])):  # fmt: skip
            if queries:
                usual[:, key] = np.maximum(usual[:, key], pattern[:, queries, keys].mean(axis=1))
    return usual


def _means(
    model: ActivationSource, tokens: Any, what: str, wanted: Callable[[np.ndarray], np.ndarray]
) -> HeadScores:
    """The mean attention to the keys that are wanted `[S, S]`, over queries that have some."""
    source = freezable(model)
    one = isinstance(tokens, str) or np.ndim(tokens[0] if len(tokens) else 0) == 0
    rows = [token_ids(source, row) for row in ([tokens] if one else tokens)]
    totals: dict[tuple[int, int], float] = {}
    count = 0
    for ids in rows:
        keys = wanted(np.array(ids))
        count += int((n := keys.any(axis=1)).sum())
        for layer, pattern in _patterns(source, ids) if n.any() else ():
            for head, total in enumerate((pattern * keys).sum(axis=(1, 2)).tolist()):
                totals[layer, head] = totals.get((layer, head), 0.0) + total
    if not count:
        raise ValueError(
            f"tokens must have some that {what} is about; these have none: {tokens!r}."
        )
    scores = [HeadScore(*where, total / count) for where, total in totals.items()]
    return HeadScores(what, _sorted(scores))


def _patterns(source: Any, ids: Sequence[int]) -> Iterable[tuple[int, np.ndarray]]:
    """The patterns `[H, S, S]` of layers that have attention."""
    attention = source.attention(mx.array([[*ids]]))
    return [(call.layer, np.array(call.pattern[0])) for call in attention.calls]


def _after_the_same(ids: np.ndarray) -> np.ndarray:
    before = np.concatenate([[-1], ids[:-1]])
    return np.tril(ids[:, None] == before[None], -1)


def _one_before(ids: np.ndarray) -> np.ndarray:
    return np.eye(len(ids), k=-1, dtype=bool)


def _sorted(heads: Iterable[HeadScore]) -> tuple[HeadScore, ...]:
    return tuple(sorted(heads, key=lambda head: (-head.score, head.layer, head.head)))


def _name(head: HeadScore) -> str:
    return f"{head.layer}.{head.head}"
