"""What happens to an attention score where what it is made of is changed in the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlxterp.sae.circuits.attention.score_pairs import QKAttribution
from mlxterp.sae.circuits.attention.score_sources import AttentionScore
from mlxterp.sae.circuits.given import check_choice, check_counts
from mlxterp.sae.circuits.validation import Validation


@dataclass(frozen=True, eq=False)
class ScoreChanges:
    """What happens to a score where its sources are changed; the sources of its query and of its
    key have the numbers `of_query [n]` and `of_key [m]` in the model."""

    score: AttentionScore
    of_query: np.ndarray
    of_key: np.ndarray

    def validate(
        self, found: QKAttribution, *, what: Literal["sources", "pairs"] = "pairs", n: int = 10,
        factor: float = -1.0, frozen: bool = True,
    ) -> Validation:  # fmt: skip
        """What happens to the contrast where sources write `factor` times themselves more: -1 takes
        them out, 1 doubles them.

        The `n` strongest "sources" of the query and as many of the key are changed one by one. The
        prediction is `factor (q_s . k + q . k_s) + factor^2 q_s . k_s`. For "pairs" the effect of
        both sources is compared with the sum of those of each alone: what is more is due to the
        pair, `factor^2 (q_i . k_j + q_j . k_i)`. Biases, and pairs of a source with itself, cannot
        be changed so. `frozen` holds attention patterns, norm scales and MLPs, where all of this
        is exact; without it the whole model answers.
        """
        check_choice("what", what, ("sources", "pairs"))
        check_counts(n=n)
        how = f"{'taken out' if factor == -1 else f'{factor:+g} times more'}"
        how += ", rest held" if frozen else ", whole model"
        known, gains = self._names(found), self.score.replacement.gains
        if what == "sources":
            sets = self._sources(found, n)
            predicted = [self._predicted(found, numbers, factor) for numbers in sets]
            measured = gains(self.score.contrast, sets, factor, frozen)[:, 0]
            numbers = tuple(number for (number,) in sets)
            names = tuple(known[number] for number in numbers)
            return Validation(np.array(predicted), measured, (), how, names, numbers)
        pairs = self._pairs(found, n)
        sets = [s for a, b in pairs for s in ((a,), (b,), (a, b))]
        names = tuple(f"{known[a]} × {known[b]}" for a, b in pairs)
        signs = np.array([-1.0, -1.0, 1.0])
        predicted = [self._predicted(found, numbers, factor) for numbers in sets]
        measured = gains(self.score.contrast, sets, factor, frozen)[:, 0]
        return Validation(
            np.reshape(predicted, (-1, 3)) @ signs, measured.reshape(-1, 3) @ signs,
            tuple(range(len(pairs))), how, names,
        )  # fmt: skip

    def _sources(self, found: QKAttribution, n: int) -> list[tuple[int]]:
        """The numbers of the strongest sources of either side."""
        sides = (found.query_effects, self.of_query), (found.key_effects, self.of_key)
        chosen = [
            of[np.argsort(-np.abs(effects[:-1]), kind="stable")[:n]].tolist()
            for effects, of in sides
        ]
        return [(number,) for number in dict.fromkeys(chosen[0] + chosen[1])]

    def _pairs(self, found: QKAttribution, n: int) -> list[tuple[int, int]]:
        """The numbers of the sources of the strongest pairs of two."""
        strongest = found.strongest(3 * n)
        pairs = [(self.of_query[i], self.of_key[j]) for i, j in strongest if min(i, j) >= 0]
        once = dict.fromkeys((int(min(p)), int(max(p))) for p in pairs if p[0] != p[1])
        if not once:
            raise ValueError("No strong pair is one of two sources: validate(what='sources').")
        return [*once][:n]

    def _predicted(self, found: QKAttribution, numbers: tuple[int, ...], factor: float) -> float:
        """The change of the contrast where some sources have more."""
        Q, K, wide = found.Q, found.K, np.float64
        dq = factor * Q[:, :-1][:, np.isin(self.of_query, numbers)].sum(axis=1, dtype=wide)
        dk = factor * K[:, :-1][:, np.isin(self.of_key, numbers)].sum(axis=1, dtype=wide)
        return float(dq @ K.sum(axis=1, dtype=wide) + Q.sum(axis=1, dtype=wide) @ dk + dq @ dk)

    def _names(self, found: QKAttribution) -> dict[int, str]:
        """What sources are called, by their numbers."""
        numbers = [*self.of_query.tolist(), *self.of_key.tolist()]
        nodes = found.queries + found.keys
        return {number: found.name(node) for number, node in zip(numbers, nodes, strict=True)}
