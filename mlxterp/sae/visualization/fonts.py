"""Text in figures: fonts that have the characters, and what is shown where none has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from mlxterp.notebook import visible

if TYPE_CHECKING:
    from matplotlib.text import Text

# Where the usual font lacks a character, the first of these that is installed and has it.
MORE_FONTS = (
    "Arial Unicode MS", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans",
    "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei", "Noto Emoji", "Segoe UI Symbol",
)  # fmt: skip
MISSING, SPACE = "□", "␣"
WIDEST = 14.0  # of a name, in sizes of its font
SHAPELESS = "\u200c\u200d\ufe0e\ufe0f"  # what joins characters, or chooses how they are drawn


def write(text: Text, content: str, **style: Any) -> None:
    """Let a text of a figure show what it is given, whatever that is, line by line."""
    text.set(**plain(), text="\n".join(map(drawable, content.split("\n"))), **style)


def plain() -> dict[str, Any]:
    """The style of text that is shown as it is: its fonts, and no formulas between dollar signs."""
    return {"family": list(_fonts()[0]), "parse_math": False}


def drawable(content: str) -> str:
    """A text as `visible` shows it, with a box for each character that no font has, of which
    matplotlib would warn."""
    _, known = _fonts()
    return "".join(_drawable(character, known) for character in visible(content))


def width(content: str) -> float:
    """How wide a text is that is `drawable`, as a share of the size of its font."""
    _, known = _fonts()
    return sum(_width(character, known) for character in content)


def fitting(content: str, widest: float) -> str:
    """A text that is `drawable`, or its beginning, in no more than a `width`."""
    if width(content) <= widest:
        return content
    room, kept = widest - width("…"), 0
    while (room := room - width(content[kept])) >= 0:
        kept += 1
    return content[:kept].rstrip() + "…"


def names(contents: Iterable[str], widest: float = WIDEST) -> list[str]:
    """Names of rows, columns or bars: drawable, and short enough to leave room for these. One of
    spaces alone has signs for them."""
    marked = (c.replace(" ", SPACE) if c.isspace() else c for c in contents)
    return [fitting(drawable(content), widest) for content in marked]


@contextmanager
def written_in(family: str | None) -> Iterator[None]:
    """Draw with a family of fonts, where one is named, before those of the user's settings."""
    from matplotlib import rc_context, rcParams

    families = [] if family is None else [family]
    with rc_context({"font.family": [*families, *rcParams["font.family"]]}):
        yield


def _drawable(character: str, known: Sequence[Any]) -> str:
    if character in SHAPELESS:
        return ""
    return character if any(font.get_char_index(ord(character)) for font in known) else MISSING


@lru_cache(maxsize=4096)
def _width(character: str, known: Sequence[Any]) -> float:
    font = next((f for f in known if f.get_char_index(ord(character))), known[0])
    font.set_size(100, 72)
    return font.load_char(ord(character)).linearHoriAdvance / 65536 / 100


def _fonts() -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """The families to draw with, those of the user's settings first, and their fonts."""
    from matplotlib import rcParams

    return _installed(tuple(rcParams["font.family"]))


@cache
def _installed(usual: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    from matplotlib import font_manager

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    families = (*usual, *(name for name in MORE_FONTS if name in installed))
    # As a list, since a single name would be read as a pattern.
    paths = (font_manager.findfont(font_manager.FontProperties(family=[f])) for f in families)
    return families, tuple(font_manager.get_font(path) for path in paths)
