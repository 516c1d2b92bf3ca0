"""What a lens on the layers of a model shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxterp.analysis.readout import Head
from mlxterp.notebook import Table, visible
from mlxterp.sae.circuits.behavior.targets import token_id
from mlxterp.sae.visualization.fonts import written_in
from mlxterp.sae.visualization.lenses import plot_logit_lens
from mlxterp.sae.visualization.style import new_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Prediction = tuple[int, float, str]
COLUMNS, WIDE_COLUMNS = 8, 15  # of a table as text, and as HTML
WIDEST = 12  # characters of a token in a table


class LogitLens(dict[int, list[list[Prediction]]]):
    """What the head makes of the residual stream after each layer, on one text.

        lens[layer][position] = [(id, logit, text), ...]      the likeliest token first

    Layers are those that were asked for, ascending; `positions` are the places of the lists in the
    text, whose `tokens` (ids) and `texts` are those read there. `figure` is what `plot=True` drew.
    Whatever else is asked of it is computed then, from the streams that it holds.
    """

    def __init__(
        self,
        predictions: Mapping[int, list[list[Prediction]]],
        *,
        name: str,
        positions: Sequence[int],
        tokens: Sequence[int],
        texts: Sequence[str],
        streams: Mapping[int, mx.array],
        last: mx.array,
        head: Head,
    ) -> None:
        super().__init__(predictions)
        self.name = name
        self.positions = tuple(positions)
        self.tokens = tuple(tokens)
        self.texts = tuple(texts)
        self.figure: Figure | None = None
        self._streams = dict(streams)
        self._last = last
        self._head = head

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read."""
        return tuple(self)

    def logits(self, layer: int) -> mx.array:
        """The logits `[n_positions, vocab]` of a layer, in float32."""
        return mx.concatenate([*self._head.parts(self._stream(layer))])

    def log_probabilities(self, layer: int) -> mx.array:
        """Their log-probabilities `[n_positions, vocab]`, in nats."""
        return _normalised(self.logits(layer))

    def rank(self, token: int | str) -> np.ndarray:
        """The rank of a token at each layer and position, `[n_layers, n_positions]`: 1 where no
        other token has a larger logit. A text must be one token."""
        chosen = self._token(token)
        return self._measured(
            lambda logits: 1 + (logits > logits[:, chosen, None]).sum(axis=-1)
        ).astype(np.int64)

    def probability(self, token: int | str) -> np.ndarray:
        """The probability of a token at each layer and position, `[n_layers, n_positions]`."""
        chosen = self._token(token)
        return self._measured(lambda logits: mx.exp(_normalised(logits)[:, chosen]))

    @cached_property
    def entropy(self) -> np.ndarray:
        """The entropy of the predictions at each layer and position, `[n_layers, n_positions]`, in
        nats."""
        return self._measured(lambda logits: -_expected(_normalised(logits), _normalised(logits)))

    @cached_property
    def kl(self) -> np.ndarray:
        """How far they are from what the model predicts in the end, `[n_layers, n_positions]`:

        KL(model || layer) = sum_v p_model[v] (log p_model[v] - log p_layer[v])      in nats
        """
        found = np.empty((len(self), len(self.positions)), np.float32)
        own = Head(self._head.model)
        for some in self._parts():
            wanted = _normalised(own(self._last[some]))
            mx.eval(wanted)
            for i, layer in enumerate(self):
                got = _normalised(self._head(self._streams[layer][some]))
                found[i, some] = np.array(_expected(wanted, wanted - got))
        return found

    def table(self, n_columns: int = COLUMNS) -> Table:
        """The likeliest token after each layer at the last `n_columns` positions; at a single
        position the likeliest tokens, one after the other."""
        kept = range(max(0, len(self.positions) - n_columns), len(self.positions))
        single = len(self.positions) == 1
        title = f"{self.name.capitalize()}: the likeliest token after each layer"
        if single:
            title += f", at {self.positions[0]} {self.texts[0]!r}"
            rows = [[text for *_, text in self[layer][0][:n_columns]] for layer in self]
            header = [f"{i}." for i in range(1, len(rows[0]) + 1)]
        else:
            rows = [[self[layer][i][0][2] for i in kept] for layer in self]
            header = [self.texts[i] for i in kept]
        lines = ((str(layer), *map(_cell, row)) for layer, row in zip(self, rows, strict=True))
        return Table(title, ("layer", *map(_cell, header)), tuple(lines))

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table(WIDE_COLUMNS)._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """The predictions and the tokens they are made at, as plain values."""
        return {
            "name": self.name,
            "positions": [*self.positions],
            "tokens": [*self.tokens],
            "texts": [*self.texts],
            "layers": {
                layer: [
                    [{"id": i, "logit": logit, "text": text} for i, logit, text in position]
                    for position in found
                ]
                for layer, found in self.items()
            },
        }

    def plot(
        self,
        max_display_tokens: int = WIDE_COLUMNS,
        figsize: tuple[float, float] | None = None,
        cmap: str | None = None,
        font_family: str | None = None,
    ) -> Figure:
        """A matplotlib heat map of the likeliest tokens, the last layer on top, at the last
        `max_display_tokens` positions. Raises `ImportError` where matplotlib is missing."""
        if max_display_tokens < 1:
            raise ValueError(f"max_display_tokens must be at least 1, not {max_display_tokens}")
        ax = None if figsize is None else new_axis(*figsize)
        shown = {layer: found[-max_display_tokens:] for layer, found in self.items()}
        texts = self.texts[-max_display_tokens:]
        with written_in(font_family):
            return plot_logit_lens(shown, texts, cmap=cmap, ax=ax)

    def _stream(self, layer: int) -> mx.array:
        if layer not in self._streams:
            raise KeyError(f"layer {layer} is not held; held: {', '.join(map(str, self))}")
        return self._streams[layer]

    def _token(self, token: int | str) -> int:
        return token_id(self._head.model, token, self._head.vocabulary, "token")

    def _parts(self) -> Iterator[slice]:
        step = max(1, self._head.rows_at_once // 4)  # there are several arrays of the size
        for start in range(0, len(self.positions), step):
            yield slice(start, min(start + step, len(self.positions)))

    def _measured(self, measure: Callable[[mx.array], mx.array]) -> np.ndarray:
        """`measure(logits [n, vocab]) -> [n]` at each layer and position."""
        found = np.empty((len(self), len(self.positions)), np.float32)
        for some in self._parts():
            for i, layer in enumerate(self):
                found[i, some] = np.array(measure(self._head(self._streams[layer][some])))
        return found


def _normalised(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _expected(log_p: mx.array, values: mx.array) -> mx.array:
    """The mean of `values [n, vocab]` over a distribution, past what has no probability."""
    p = mx.exp(log_p)
    return mx.where(p > 0, p * values, 0).sum(axis=-1)


def _cell(text: str) -> str:
    text = visible(text)
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
