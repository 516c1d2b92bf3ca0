"""Labelled sets made from the text that every Python installation has, by rules that are exact."""

from __future__ import annotations

import io
import keyword
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np

from mlxterp.sae.evals.tasks.labelled import LabelledSet
from mlxterp.texts import python_sources

N_TEXTS = 240
CHARACTERS = 400  # of a text: about what is read of it
MOST = 40_000  # characters of a file that are looked through
N_PACKAGES = 5
STRINGS = {
    getattr(tokenize, name)
    for name in ("STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
    if hasattr(tokenize, name)
}
WORD = re.compile(r"[A-Za-z]+")
WORD_OR_NUMBER = re.compile(r"[A-Za-z]+|\d+")

Span = tuple[int, int, Any]


class Piece(NamedTuple):
    """A stretch of a module's source, with the kind of everything in it by character."""

    text: str
    path: str
    spans: tuple[Span, ...]


def builtin_sets(
    names: Sequence[str] | None = None, n_texts: int = N_TEXTS, seed: int = 0
) -> tuple[LabelledSet, ...]:
    """Labelled sets from the standard library's sources and the reference manual of this Python.

    Of tokens: `keyword` (a keyword, among names), `string` and `comment` (among all code),
    `definition` (a name after `def` or `class`, among names), `kind` (which of these a token is),
    `capital` (a word with a capital, in prose) and `digit` (a number, among words). Of texts:
    `prose` (manual or source) and `package` (of which of the five largest packages a source is).
    All are by rules, and depend on the version of Python; texts of one file are one document.

    Raises `ValueError` for a name that is none of these.
    """
    for name in names or ():
        if name not in MAKERS:
            raise ValueError(f"names must be some of {[*MAKERS]}, got {name!r}.")
    if n_texts < 20:
        raise ValueError(f"n_texts must be >= 20, got {n_texts}.")
    return tuple(MAKERS[name](name, n_texts, seed) for name in (MAKERS if names is None else names))


def _by_kind(classes: Callable[[str], Any], name: str, n_texts: int, seed: int) -> LabelledSet:
    """A set of tokens by what the kind of each is called; None for those that are left out."""
    found = [
        (piece, [(a, b, c) for a, b, kind in piece.spans if (c := classes(kind)) is not None])
        for piece in _pieces(n_texts, seed)
    ]
    return LabelledSet.of(
        name, [p.text for p, _ in found], [spans for _, spans in found], [p.path for p, _ in found]
    )


def _among_names(wanted: str) -> Callable[[str], bool | None]:
    return lambda kind: kind == wanted if kind in ("keyword", "name", "definition") else None


def _among_all(wanted: str) -> Callable[[str], bool | None]:
    return lambda kind: kind == wanted


def _kind(kind: str) -> str:
    return "name" if kind == "definition" else kind


def _of_kind(classes: Callable[[str], Any]) -> Callable[..., LabelledSet]:
    return lambda *given: _by_kind(classes, *given)


def _words(
    pattern: re.Pattern[str], is_wanted: Callable[[str], bool]
) -> Callable[..., LabelledSet]:
    """A set of what a pattern finds in prose."""

    def make(name: str, n_texts: int, seed: int) -> LabelledSet:
        found = _prose(n_texts, seed)
        spans = [
            [(m.start(), m.end(), is_wanted(m.group())) for m in pattern.finditer(text)]
            for text, _ in found
        ]
        return LabelledSet.of(name, [text for text, _ in found], spans, [name for _, name in found])

    return make


def _prose_or_source(name: str, n_texts: int, seed: int) -> LabelledSet:
    half = n_texts // 2
    prose = _prose(half, seed)
    code = [(piece.text, piece.path) for piece in _pieces(half, seed)]
    both = [*prose, *code]
    labels = [*[True] * len(prose), *[False] * len(code)]
    return LabelledSet.of(name, [text for text, _ in both], labels, [of for _, of in both])


def _packages(name: str, n_texts: int, seed: int) -> LabelledSet:
    by_package: dict[str, list[tuple[str, str]]] = {}
    for path, text in python_sources():
        package, _, module = path.partition("/")
        if module and len(text) > CHARACTERS:
            by_package.setdefault(package, []).append((path, text))
    largest = sorted(by_package, key=lambda p: (-len(by_package[p]), p))[:N_PACKAGES]
    rng, texts, labels, groups = np.random.default_rng(seed), [], [], []
    for package in largest:
        for path, text in _drawn(by_package[package], n_texts // len(largest), rng):
            texts.append(_stretch(text, rng))
            labels.append(package)
            groups.append(path)
    return LabelledSet.of(name, texts, labels, groups)


def _prose(n_texts: int, seed: int) -> list[tuple[str, str]]:
    """Stretches of the reference manual, and the topic of each."""
    rng = np.random.default_rng(seed)
    long = [(name, text) for name, text in sorted(topics.items()) if len(text) > 200]
    return [(_stretch(text, rng), f"topic {name}") for name, text in _drawn(long, n_texts, rng)]


@cache
def _pieces(n_texts: int, seed: int) -> tuple[Piece, ...]:
    """Stretches of sources whose tokens are known."""
    rng = np.random.default_rng(seed)
    sources = [(path, text) for path, text in python_sources() if len(text) > CHARACTERS]
    found = []
    for path, text in _drawn(sources, n_texts, rng):
        text = text[:MOST]
        stretch = _stretch(text, rng)
        start = text.index(stretch)
        end = start + len(stretch)
        spans = tuple(
            (max(a, start) - start, min(b, end) - start, kind)
            for a, b, kind in _kinds(text, end)
            if a < end and b > start
        )
        found.append(Piece(stretch, path, spans))
    return tuple(found)


def _drawn(given: list[Any], n: int, rng: np.random.Generator) -> list[Any]:
    """So many of them in random order, some several times only where there are too few."""
    orders = [rng.permutation(len(given)) for _ in range(-(-n // len(given)))]
    return [given[i] for i in np.concatenate(orders)[:n]]


def _stretch(text: str, rng: np.random.Generator) -> str:
    """Whole lines from a random one on, of up to about so many characters."""
    starts = [0, *(m.end() for m in re.finditer("\n", text[:-CHARACTERS]))]
    stretch = text[starts[rng.integers(len(starts))] :][:CHARACTERS]
    return stretch.rstrip() or text[:CHARACTERS]


def _kinds(source: str, end: int) -> Iterator[Span]:
    """What Python takes everything up to some character for."""
    lines = [0]
    for line in io.StringIO(source):
        lines.append(lines[-1] + len(line))
    before = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            (row, column), (last_row, last) = token.start, token.end
            start, stop = lines[row - 1] + column, lines[min(last_row, len(lines)) - 1] + last
            if start >= end:
                return
            if (kind := _kind_of(token, before)) and stop > start:
                yield start, stop, kind
            before = token.string if token.type == tokenize.NAME else ""
    except (tokenize.TokenError, SyntaxError):
        # What was cut off ends within a bracket or a string; everything before it is known.
        return


def _kind_of(token: tokenize.TokenInfo, before: str) -> str:
    if token.type == tokenize.NAME:
        if before in ("def", "class"):
            return "definition"
        return "keyword" if keyword.iskeyword(token.string) else "name"
    if token.type in STRINGS:
        return "string"
    names = {tokenize.COMMENT: "comment", tokenize.OP: "operator", tokenize.NUMBER: "number"}
    return names.get(token.type, "")


MAKERS: dict[str, Callable[[str, int, int], LabelledSet]] = {
    "keyword": _of_kind(_among_names("keyword")),
    "string": _of_kind(_among_all("string")),
    "comment": _of_kind(_among_all("comment")),
    "definition": _of_kind(_among_names("definition")),
    "kind": _of_kind(_kind),
    "capital": _words(WORD, lambda word: word[0].isupper()),
    "digit": _words(WORD_OR_NUMBER, str.isdigit),
    "prose": _prose_or_source,
    "package": _packages,
}
