"""Texts and numbers as a page can show them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from mlxterp.sae.features.display import visible
from mlxterp.sae.labels.labels import SCORES, FeatureLabels, Label

DIGITS = 4


class Strings:
    """Texts by number, each of them held once, as they are shown."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of a text, a new one where it has none yet."""
        return self._numbers.setdefault(text, len(self._numbers))

    def numbers(self, texts: Iterable[str]) -> np.ndarray:
        """The number of each text."""
        return np.array([self.number(text) for text in texts], np.int32)

    @property
    def shown(self) -> list[str]:
        """All texts by number, without characters that are not seen or change what follows."""
        return [visible(text) for text in self._numbers]


def short(value: Any) -> float | None:
    """A number to a few digits; None where it is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def shorts(values: Iterable[Any]) -> list[float | None]:
    """Each number to a few digits, zero as a short `0`."""
    return [short(value) if value else 0 for value in values]


def finite(value: Any) -> Any:
    """Plain values in which None stands for numbers that are not finite; JSON has none of these."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def label_entry(labels: FeatureLabels, feature_id: int) -> dict[str, Any] | None:
    """The label that counts for a feature, with its scores, and the others that it has."""
    if feature_id not in labels:
        return None
    counts = labels[feature_id]
    others = [label for label in labels.of(feature_id) if label.source != counts.source]
    return {
        **_named(counts),
        "scores": {
            name: short(score.balanced_accuracy)
            for name in SCORES
            if (score := getattr(counts, name)) is not None
        },
        "others": [_named(label) for label in others],
    }


def _named(label: Label) -> dict[str, str]:
    return {"text": visible(label.text), "source": visible(label.source)}
