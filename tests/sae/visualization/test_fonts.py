import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlxterp.sae.visualization import drawable, fitting, width, write
from mlxterp.sae.visualization.fonts import MISSING


def test_what_no_font_has_is_a_box():
    assert drawable("a\U0010ffffb").count("\\u10ffff") == 1  # not a character at all
    assert drawable("x\U00013000") == "x" + MISSING  # a hieroglyph
    assert drawable("e\u0301\u200d\ufe0f") == "e\u0301"
    assert drawable("שלום $x$ → ⏎") == "שלום $x$ → ⏎"


def test_widths_are_those_that_are_drawn():
    figure = Figure(figsize=(8, 2), dpi=100)
    for text in ("mlxterp", "iiii", "WWW", "a b c", "→⏎"):
        drawn = figure.text(0, 0, text, fontsize=20)
        pixels = drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width
        assert width(text) * 20 / 72 * 100 == pytest.approx(pixels, rel=0.12)


def test_a_text_is_cut_to_what_fits():
    long = "a feature of words"
    assert fitting(long, width(long)) == long
    cut = fitting(long, width(long) - 0.1)
    assert cut.endswith("…") and long.startswith(cut[:-1]) and width(cut) <= width(long)
    assert fitting(long, 0.1) == "…"


def test_lines_of_a_label_stay_lines():
    text = Figure().text(0, 0, "")
    write(text, "at b\n(the $rest)\t", fontsize=7)
    assert text.get_text() == "at b\n(the $rest)⇥"
    assert text.get_fontsize() == 7 and not text.get_parse_math()


def test_fonts_are_those_of_the_users_settings():
    with matplotlib.rc_context({"font.family": ["monospace"]}):
        assert width("iii") == pytest.approx(width("WWW"))
    assert width("iii") < width("WWW")
