"""Stretches of text on which a feature is active."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.notebook import fragment
from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.corpus import Corpus
from mlxterp.sae.features.codes import SparseCodes
from mlxterp.sae.features.display import LONGEST_CHARACTER, pieces, shaded, strip
from mlxterp.sae.source import ActivationSource


@dataclass(frozen=True)
class Example:
    """A stretch of text around a position where a feature is active.

    `values` holds the feature's value on each of `tokens`, `ids` their numbers; `peak` is the index
    among them of the position that the example is about, `position` that position in the flattened
    tokens of the corpus and `document` the number of its document. Of several tokens that make up
    one character the first has it as its text, and the others have none.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int
    ids: tuple[int, ...] = ()
    position: int = -1
    document: int = -1

    @property
    def value(self) -> float:
        """The feature's value at the peak."""
        return self.values[self.peak]

    @property
    def token(self) -> str:
        """The text of the token at the peak, or of the character of which it is a part."""
        return self.tokens[self.marked]

    @property
    def marked(self) -> int:
        """The index of the token that has this text."""
        return next((i for i in range(self.peak, -1, -1) if self.tokens[i]), self.peak)

    def parts(self, largest: float) -> list[tuple[str, float, str, bool]]:
        """The text as it is shown: in parts, each with its share of the `largest` value, a title
        and whether it holds the peak."""
        peak = sum(map(bool, self.tokens[: self.marked + 1])) - 1
        return shaded(strip(self.tokens, self.values), largest, peak)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return fragment("example.html", example=self)

    def __repr__(self) -> str:
        marked = (f"«{t}»" if i == self.marked else t for i, t in enumerate(self.tokens))
        return f"{self.value:6.2f}  {''.join(marked)!r}"


@dataclass(frozen=True)
class Interval:
    """Random examples of the activations between two values, and how many there are of these,
    as a share of the tokens on which the feature fires."""

    low: float
    high: float
    share: float
    examples: tuple[Example, ...]

    @property
    def title(self) -> str:
        """The bounds and the share in words."""
        return f"{self.low:.2f} to {self.high:.2f}: {100 * self.share:.1f}% of the activations"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return fragment("example.html", interval=self)

    def __repr__(self) -> str:
        return "\n".join([self.title, *(f"  {example}" for example in self.examples)])


@dataclass(frozen=True, eq=False)
class ExampleReader:
    """Shows positions of a corpus as examples: the text, and a feature's values on it.

    Values are read from the kept `codes`, or computed again where their context was not kept.
    """

    coder: SparseCoder
    source: ActivationSource | None
    corpus: Corpus
    codes: SparseCodes

    def read(
        self, feature_id: int, positions: np.ndarray, before: int, after: int
    ) -> tuple[Example, ...]:
        """An example of each of some positions, with up to so many tokens of the same document
        before and after it."""
        length = self.corpus.context
        values = self._values(feature_id, np.unique(positions // length).tolist())
        return tuple(
            self._example(position, values[position // length], before, after)
            for position in positions.tolist()
        )

    def words(self, positions: np.ndarray) -> list[str]:
        """The tokens at some positions, in lower case, that are words by themselves."""
        tokens, source = self.corpus.tokens.reshape(-1), self._model
        peaks = source.to_str_tokens(tokens[positions].tolist())
        after = source.to_str_tokens(tokens[np.minimum(positions + 1, len(tokens) - 1)].tolist())
        words = (
            peak.strip().lower()
            for peak, following in zip(peaks, after, strict=True)
            if peak[:1].isspace() and not following[:1].isalpha()
        )
        return [word for word in words if word.isalpha() and len(word) > 1]

    @property
    def _model(self) -> ActivationSource:
        if self.source is None:
            raise ValueError(
                "The text of examples needs the language model: call sae.bind(model), or load the "
                "coder with model.load_sae(path)."
            )
        return self.source

    def _example(self, position: int, values: np.ndarray, before: int, after: int) -> Example:
        context, column = divmod(position, self.corpus.context)
        documents = self.corpus.documents(context)
        start = max(0, column - before - LONGEST_CHARACTER)
        near = documents[start : column + after + 1 + LONGEST_CHARACTER]
        own = start + np.flatnonzero(near == documents[column])
        text = pieces(self._model, self.corpus.tokens[context, own].tolist())
        first, end = np.searchsorted(own, [column - before, column + after + 1]).tolist()
        # Of a character at either end all tokens are shown.
        while not text[first] and first > 0:
            first -= 1
        while end < len(own) and not text[end]:
            end += 1
        shown = own[first:end]
        ids = self.corpus.tokens[context, shown].tolist()
        return Example(
            tokens=text[first:end],
            values=tuple(values[shown].tolist()),
            peak=int(np.searchsorted(shown, column)),
            ids=tuple(ids),
            position=position,
            document=int(documents[column]),
        )

    def _values(self, feature_id: int, contexts: list[int]) -> dict[int, np.ndarray]:
        """A feature's values on each token of some contexts."""
        length = self.corpus.context
        kept = {i: self.codes.in_context(feature_id, i, length) for i in contexts}
        found = {i: values for i, values in kept.items() if values is not None}
        missing = [i for i in contexts if i not in found]
        for start in range(0, len(missing), self.corpus.rows_per_forward):
            some = missing[start : start + self.corpus.rows_per_forward]
            found |= dict(zip(some, self._computed(feature_id, some), strict=True))
        return found

    def _computed(self, feature_id: int, contexts: list[int]) -> np.ndarray:
        names = self.coder.reads.names
        tokens = mx.array(self.corpus.tokens[contexts])
        captured = self._model.run(tokens, capture=names, stop=True)
        codes = self.coder.encode({name: captured[name] for name in names})
        return np.array(codes[..., feature_id].astype(mx.float32))
