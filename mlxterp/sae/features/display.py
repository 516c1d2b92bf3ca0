"""Text as it can be shown: tokens that hold part of a character, control characters, directions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlxterp.notebook import visible
from mlxterp.sae.source import ActivationSource

__all__ = ["INCOMPLETE", "LONGEST_CHARACTER", "pieces", "shaded", "strip", "visible"]

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 8  # tokens; one of UTF-8 has up to 4 bytes, and its first may end another token


def pieces(source: ActivationSource, ids: Iterable[int]) -> tuple[str, ...]:
    """The text of each token; of several tokens that make up a character together the first has
    it, and the others have none."""
    ids = list(ids)
    alone = source.to_str_tokens(ids) if ids else []
    found, start = list(alone), 0
    while start < len(ids):
        end = start + 1
        if INCOMPLETE in alone[start]:
            end, whole = _character(source, ids, start)
            found[start:end] = [whole] + [""] * (end - start - 1)
        start = end
    return tuple(found)


def _character(source: ActivationSource, ids: list[int], start: int) -> tuple[int, str]:
    """Where the tokens from `start` that are whole together end, and their text."""
    for end in range(start + 2, min(len(ids), start + LONGEST_CHARACTER) + 1):
        text = source.decode(ids[start:end])
        if INCOMPLETE not in text:
            return end, text
    return start + 1, source.to_str_tokens([ids[start]])[0]


def strip(
    tokens: Sequence[str], scores: Sequence[float], titles: Sequence[str] | None = None
) -> list[tuple[str, float, str]]:
    """A text in parts: as it is shown, the score of the part, and a title. Tokens that make up a
    character together are one part."""
    titles = [f"{score:.3f}" for score in scores] if titles is None else titles
    parts: list[tuple[str, float, str]] = []
    for token, score, title in zip(tokens, scores, titles, strict=True):
        if token or not parts:
            parts.append((visible(token), score, title))
        else:
            shown, largest, before = parts[-1]
            parts[-1] = (shown, max(largest, score, key=abs), f"{before}; {title}")
    return parts


def shaded(
    parts: Iterable[tuple[str, float, str]], largest: float, peak: int = -1
) -> list[tuple[str, float, str, bool]]:
    """Parts of a text with their scores as shares of the largest, in [-1, 1], and whether each is
    the one that is marked."""
    size = abs(largest) or 1.0
    return [
        (text, min(1.0, max(-1.0, score / size)), title, i == peak)
        for i, (text, score, title) in enumerate(parts)
    ]
