"""Text as it can be shown: tokens that hold part of a character, control characters, directions."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from mlxterp.sae.source import ActivationSource

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 8  # tokens; one of UTF-8 has up to 4 bytes, and its first may end another token
GLYPHS = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}


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


def visible(text: str) -> str:
    """The text with a sign in the place of each character that would not be seen, or that would
    change how what follows it is seen, such as the direction of writing."""
    return "".join(_visible(character) for character in text)


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


def _visible(character: str) -> str:
    if character in GLYPHS:
        return GLYPHS[character]
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    # Joiners hold emoji and letters of many scripts together; other marks of format stay hidden.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character if character in "\u200c\u200d" else f"\\u{ord(character):04x}"
    return character
