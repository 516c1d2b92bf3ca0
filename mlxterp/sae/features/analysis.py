"""Which features are active in a text, and which of them matter for what the model predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.features.attribution import direct_effects, total_effects
from mlxterp.sae.features.display import pieces, shaded, strip, visible
from mlxterp.sae.features.peaks import FeatureActivation, Peaks, strongest
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import fragment, plot_matrix, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RankBy = Literal["activation", "logit_effect", "attribution"]
TOKENS_PER_PASS = 4096
MEANINGS = {
    "activation": "value",
    "logit_effect": "value x direct effect on the logit",
    "attribution": "value x total effect on the logit",
}


@dataclass(frozen=True)
class TextAnalysis:
    """The features that are active in a text.

    `tokens` are its pieces; where several make up one character the first has it. `by_token` holds,
    for each of them, up to `top_k` pairs `(feature_id, score)`, largest in size first, and nothing
    for special tokens; `top` the features with the largest scores anywhere in the text. A score is
    the feature's value or, by `rank_by`, the value times its effect on the logit of one of the
    `targets`, one for each token (at `position`, by attribution).
    """

    tokens: tuple[str, ...]
    by_token: tuple[tuple[tuple[int, float], ...], ...]
    top: tuple[FeatureActivation, ...]
    rank_by: str = "activation"
    targets: tuple[str, ...] = ()
    position: int | None = None

    def __repr__(self) -> str:
        lines = [f"{'token':<20} {self._title()}"]
        own = self.rank_by == "logit_effect"
        for i, (token, features) in enumerate(zip(self.tokens, self.by_token, strict=True)):
            listed = "  ".join(f"{j} ({self._shown(score)})" for j, score in features[:5])
            target = f"{self.targets[i]!r:<12} " if own and features else ""
            lines.append(f"{token!r:<20} {target}{listed}".rstrip())
        named = [f for f in self.top if f.label is not None]
        return "\n".join(lines + [f"  {f.feature_id:>8}  {visible(f.label or '')}" for f in named])

    def _title(self) -> str:
        if self.rank_by == "attribution":
            after = self.tokens[self.position or 0]
            return f"features (effect on the logit of {self.targets[0]!r} after {after!r})"
        return f"features ({'value' if not self.targets else 'effect on the logit of the target'})"

    def _shown(self, score: float) -> str:
        return f"{score:.2f}" if self.rank_by == "activation" else f"{score:+.2f}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "tokens": list(self.tokens),
            "by_token": [[list(pair) for pair in features] for features in self.by_token],
            "top": [feature.to_dict() for feature in self.top],
            "rank_by": self.rank_by,
            "targets": list(self.targets),
            "position": self.position,
        }

    def plot(self, ax: Axes | None = None) -> Figure:
        """A matplotlib figure of the scores of the top features at every token."""
        none = (0.0,) * len(self.tokens)
        columns = [token for token, *_ in strip(self.tokens, none)]
        scores = [[score for _, score, _ in strip(self.tokens, f.scores)] for f in self.top]
        return plot_matrix(
            np.array(scores),
            columns,
            [f"{f.feature_id}" for f in self.top],
            label=MEANINGS[self.rank_by],
            row_label="feature",
            column_label="token",
            ax=ax,
        )

    def _repr_html_(self) -> str:
        return fragment("text.html", **self._shades())

    def _shades(self) -> dict[str, Any]:
        """What the template shows."""
        best = [features[0][1] if features else 0.0 for features in self.by_token]
        titles = [", ".join(f"{i} ({self._shown(x)})" for i, x in f) for f in self.by_token]
        largest = max((abs(f.score) for f in self.top), default=0.0)
        return {
            "analysis": self,
            "title": visible(self._title()),
            "text": shaded(strip(self.tokens, best, titles), largest),
            "rows": [(f, shaded(strip(self.tokens, f.scores), largest)) for f in self.top],
        }


@dataclass(frozen=True)
class TextAnalyses(Sequence[TextAnalysis]):
    """The features that are active in several texts, `analyses[i]` being those of one.

    `top` are the features with the largest scores in any of them, `shared` those that have a score
    in most of them.
    """

    texts: tuple[TextAnalysis, ...]
    top: tuple[FeatureActivation, ...]
    shared: tuple[FeatureActivation, ...]

    @overload
    def __getitem__(self, index: int) -> TextAnalysis: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TextAnalysis, ...]: ...
    def __getitem__(self, index: int | slice) -> TextAnalysis | tuple[TextAnalysis, ...]:
        return self.texts[index]

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        lines = [f"{len(self)} texts", "largest in any"]
        lines += [f"  text {f.text}, {f!r}" for f in self.top]
        lines += ["in most texts"]
        lines += [
            f"  {f.n_texts} of {len(self)}, largest in text {f.text}: {f!r}" for f in self.shared
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "texts": [analysis.to_dict() for analysis in self.texts],
            "top": [feature.to_dict() for feature in self.top],
            "shared": [feature.to_dict() for feature in self.shared],
        }

    def _repr_html_(self) -> str:
        bodies = [render("text.html", **analysis._shades()) for analysis in self.texts]
        return fragment("texts.html", analyses=self, bodies=bodies)


def encode_text(
    coder: SparseCoder, source: ActivationSource, text: str | Sequence[str]
) -> mx.array | list[mx.array]:
    """The codes `[n_tokens, n_features]` of a text, or a list of those; 0 at special tokens.

    Raises `ValueError` for an empty text, or what is none.
    """
    codes = [*_codes(coder, source, _rows(source, text))]
    return codes[0] if isinstance(text, str) else codes


@overload
def analyze_text(
    coder: SparseCoder,
    source: ActivationSource,
    text: str,
    top_k: int = ...,
    *,
    rank_by: RankBy = ...,
    target: str | int | None = ...,
    position: int = ...,
    site: str | None = ...,
    labels: Mapping[int, str] | None = ...,
) -> TextAnalysis: ...
@overload
def analyze_text(
    coder: SparseCoder,
    source: ActivationSource,
    text: Sequence[str],
    top_k: int = ...,
    *,
    rank_by: RankBy = ...,
    target: str | int | None = ...,
    position: int = ...,
    site: str | None = ...,
    labels: Mapping[int, str] | None = ...,
) -> TextAnalyses: ...
def analyze_text(
    coder: SparseCoder,
    source: ActivationSource,
    text: str | Sequence[str],
    top_k: int = 10,
    *,
    rank_by: RankBy = "activation",
    target: str | int | None = None,
    position: int = -1,
    site: str | None = None,
    labels: Mapping[int, str] | None = None,
) -> TextAnalysis | TextAnalyses:
    """Which features are active where in a text, or in several; the `top_k` of each token and of
    all, by the size of

        activation    z[t, i]
        logit_effect  z[t, i] * d m[t] / d z[t, i], past the layers between (`direct_effects`)
        attribution   z[t, i] * d m[position] / d z[t, i], through the model (`total_effects`)

    where `m` is the logit of the `target`, less the mean of all logits: a token's text or id, by
    default what the model predicts. Of a coder that writes several sites the effects of all are
    summed, or only that of one `site` counts. `labels` are shown beside the features.

    Raises `ValueError` for an empty text, and for a target or position that there is none of.
    """
    if rank_by not in get_args(RankBy):
        raise ValueError(f"rank_by must be one of {get_args(RankBy)}, got {rank_by!r}.")
    if top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}.")
    given = {"target": target, "site": site}
    unused = [name for name, value in given.items() if value is not None]
    if rank_by == "activation" and unused:
        raise ValueError(f"{unused[0]} is for rank_by='logit_effect' or 'attribution'.")
    rows, analyses, peaks = _rows(source, text), [], []
    for n, (ids, codes) in enumerate(zip(rows, _codes(coder, source, rows), strict=True)):
        values = scores = np.array(codes.astype(mx.float32))
        targets: tuple[str, ...] = ()
        if rank_by != "activation":
            effects, chosen = (
                direct_effects(coder, source, ids, target, site)
                if rank_by == "logit_effect"
                else total_effects(coder, source, ids, target, position, site)
            )
            scores = values * np.array(effects)
            names = dict(zip(set(chosen), source.to_str_tokens([*set(chosen)]), strict=True))
            targets = tuple(names[i] for i in chosen)
        tokens = pieces(source, ids)
        peaks.append(Peaks.of(scores, values, tokens, n))
        top = peaks[-1].largest(top_k, labels or {}, scores)
        by_token = tuple(strongest(row, top_k) for row in scores)
        at = position % len(ids) if rank_by == "attribution" else None
        analyses.append(TextAnalysis(tokens, by_token, top, rank_by, targets, at))
    if isinstance(text, str):
        return analyses[0]
    together = Peaks.joined(peaks)
    top = together.largest(top_k, labels or {})
    return TextAnalyses(tuple(analyses), top, together.most_common(top_k, labels or {}))


def find_top_features(
    coder: SparseCoder,
    source: ActivationSource,
    text: str | Sequence[str],
    top_k: int = 10,
    **options: Any,
) -> list[FeatureActivation]:
    """The features with the largest scores anywhere in a text, or in several; see
    `analyze_text`."""
    return list(analyze_text(coder, source, text, top_k, **options).top)


def _rows(source: ActivationSource, text: str | Sequence[str]) -> list[list[int]]:
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("text must be a text or at least one, got none.")
    for given in texts:
        if not isinstance(given, str):
            raise ValueError(f"text must be a text or several, got {type(given).__name__}.")
        if not given:
            raise ValueError("text must not be empty.")
    return [[*ids] for ids in source.encode_batch(texts)]


def _codes(
    coder: SparseCoder, source: ActivationSource, rows: Sequence[list[int]]
) -> Iterator[mx.array]:
    """The codes of each row, encoded some at a time."""
    names, special = coder.reads.names, source.special_token_ids
    for batch in _batches(rows):
        captured = source.run(batch, capture=names, stop=True)
        for i, ids in enumerate(batch):
            counts = mx.array([token not in special for token in ids])
            codes = coder.encode({name: captured[name][i, : len(ids)] for name in names})
            yield mx.where(counts[:, None], codes, 0)


def _batches(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for row in rows:
        if batch and max(map(len, [*batch, row])) * (len(batch) + 1) > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(row)
    yield batch
