"""How results look in a notebook: text without surprises, tables, and HTML by templates."""

from __future__ import annotations

import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

GLYPHS = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
NUMBER = re.compile(r"[-+−]?[\d.,]*(e[-+]?\d+)?\s?%?|[-+]?(nan|inf)")
LONG = 40  # rows of a table that are shown at once


@dataclass(frozen=True)
class Table:
    """A title, and rows of as many cells as the header has names; the first cell names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Whether each column has nothing but numbers, and gaps."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        return tuple(all(map(NUMBER.fullmatch, column)) for column in columns)

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
        return "\n".join(
            [
                self.title,
                *(
                    f"  {line[0]:<{first}}"
                    + "".join(f"  {c:>{w}}" for c, w in zip(line[1:], widths, strict=True)).rstrip()
                    for line in lines
                ),
            ]
        )

    def _repr_html_(self) -> str:
        return fragment("table.html", table=self)


def fragment(template: str, **values: Any) -> str:
    """A filled template with the style that all of them share, which reaches nothing else."""
    return render("frame.html", style=_file("style.css"), body=render(template, **values))


def render(template: str, **values: Any) -> str:
    """A filled template; values are escaped, and `visible` and `long` can be used in it."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Any:
    from jinja2 import Environment, FunctionLoader

    made = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(_file)
    )
    made.globals.update(visible=visible, long=LONG)
    return made


@cache
def _file(name: str) -> str:
    return resources.files("mlxterp").joinpath("sae", "templates", name).read_text("utf-8")


def visible(text: str) -> str:
    """The text with a sign in the place of each character that would not be seen, or that would
    change how what follows it is seen, such as the direction of writing."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in GLYPHS:
        return GLYPHS[character]
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    # Joiners hold emoji and letters of many scripts together; other marks of format stay hidden.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character if character in "\u200c\u200d" else f"\\u{ord(character):04x}"
    return character


def show(result: Any) -> None:
    """Display a figure or table below the cell of a notebook that is running; nothing elsewhere."""
    if "IPython" in sys.modules:
        from IPython import get_ipython
        from IPython.display import display

        if get_ipython() is not None:
            display(result)
