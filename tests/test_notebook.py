import re

import pytest

from mlxterp.notebook import LONG, Table, fragment, render, visible
from tests.pages import NASTY, Page, checked

TABLE = Table(
    "Two\nlines", ("name", "share", "words"), (("a", "12.5 %", "one"), ("<b>", "-", "2 cats"))
)


def test_a_table_is_text_and_html():
    assert repr(TABLE).splitlines() == [
        "Two",
        "lines",
        "  name   share   words",
        "  a     12.5 %     one",
        "  <b>        -  2 cats",
    ]
    page = checked(TABLE._repr_html_())
    assert page.cells == [[*TABLE.header], *map(list, TABLE.rows)]
    assert "Two" in page.text and "lines" in page.text


def test_columns_of_words_stand_at_the_left_and_numbers_at_the_right():
    assert TABLE.numeric == (False, True, False)
    cells = [attributes for tag, attributes in checked(TABLE._repr_html_()).tags if tag == "td"]
    assert [cell.get("class") for cell in cells] == [None, None, "words"] * 2
    numbers = ("1,024", "", "1.2e-05", "+0.1", "-", "nan")
    assert Table("", ("x",), tuple((x,) for x in numbers)).numeric == (True,)
    assert not Table("", ("", "x"), (("a", "1.2.x"),)).numeric[1]
    assert Table("", ("", "x"), ()).numeric == (True, True)


@pytest.mark.parametrize("n", [LONG, LONG + 3])
def test_the_end_of_a_long_table_is_folded(n):
    page = checked(Table("t", ("i",), tuple((str(i),) for i in range(n)))._repr_html_())
    assert [row for row in page.cells[1:]] == [[str(i)] for i in range(n)]
    assert (f"{n - LONG} more" in page.text) == (n > LONG) == ("details" in dict(page.tags))


def test_whatever_a_table_holds_is_shown_as_text():
    page = checked(Table(NASTY, ("", NASTY), ((NASTY, NASTY),))._repr_html_())
    shown = visible(NASTY)
    assert page.cells == [["", shown], [shown, shown]]
    assert "<script>alert(1)</script>" in page.text and "␇␛[0m⏎⇥\\ud83d" in shown


def test_values_of_a_template_are_escaped_and_a_fragment_has_its_style():
    facts = [("<i>", "<b>")]
    body = render("facts.html", title="<u>", facts=facts, more={"x": facts, "empty": []})
    assert "&lt;i&gt;" in body and "&lt;b&gt;" in body and "&lt;u&gt;" in body
    assert body.count("<details>") == 1 and "<style>" not in body
    page = checked(fragment("facts.html", title="t", facts=facts))
    assert page.tags[0] == ("div", {"class": "mlxterp"}) and ".mlxterp table" in page.style


def test_the_style_knows_dark_and_light_themes():
    style = Page(TABLE._repr_html_()).style
    for theme in ("prefers-color-scheme: dark", '[data-jp-theme-light="false"]', ".vscode-dark"):
        assert theme in style
    found = r"--more: ([\d ]+); --less: ([\d ]+); --marked: (#\w+); --paper: (#\w+)"
    palettes = re.findall(found, style)
    light, dark = palettes[0], palettes[1]
    assert palettes == [light, dark, light, dark]
    for more, less, *grounds in palettes:
        ink, paper = (
            [int(2 * c, 16) for c in (g[1:] if len(g) == 4 else g[1::2])] for g in grounds
        )
        for colour in (more, less):
            own = [int(c) for c in colour.split()]
            for share in (0.4, 0.7, 1.0):
                mixed = [share * c + (1 - share) * p for c, p in zip(own, paper, strict=True)]
                assert contrast(mixed, ink) > 4.5


def contrast(one, other):
    """The contrast of two colours by WCAG 2."""

    def luminance(colour):
        linear = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
            for c in (part / 255 for part in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)
