import numpy as np
import pytest
from matplotlib.colors import to_rgb

from mlxterp.sae.visualization import plot_matrix
from mlxterp.sae.visualization.style import ink, shades

COLUMNS, ROWS = ["a", "b", "c"], ["x", "y"]


def drawn(values, **options):
    figure = plot_matrix(np.array(values), COLUMNS, ROWS, label="share", **options)
    figure.draw_without_rendering()
    ax, bar = figure.axes
    return ax, bar, ax.get_images()[0]


def test_a_matrix_is_drawn_with_its_names_and_values():
    ax, bar, image = drawn([[0, 1, 2], [3, 4.25, np.nan]], row_label="row", column_label="column")
    np.testing.assert_array_equal(image.get_array().filled(np.nan), [[0, 1, 2], [3, 4.25, np.nan]])
    assert [t.get_text() for t in ax.get_xticklabels()] == COLUMNS
    assert [t.get_text() for t in ax.get_yticklabels()] == ROWS
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel()) == ("column", "row", "share")
    written = {tuple(t.get_position()): t.get_text() for t in ax.texts}
    assert written == {(0, 0): "", (1, 0): "1", (2, 0): "2", (0, 1): "3", (1, 1): "4.2"}


def test_white_is_nothing_blue_more_and_vermilion_less():
    *_, image = drawn([[0, 1, 2], [-4, 0, np.nan]])
    assert (image.norm.vmin, image.norm.vmax) == (-4, 4)
    colours = image.to_rgba(image.get_array())[..., :3]
    np.testing.assert_allclose(colours[0, 0], 1, atol=0.02)
    red, _, blue = colours[0, 2]
    assert blue > red
    red, _, blue = colours[1, 0]
    assert red > blue
    np.testing.assert_allclose(colours[1, 2], to_rgb("#dddddd"), atol=0.01)


def test_values_without_negative_ones_use_the_whole_scale():
    *_, image = drawn([[0, 1, 2], [3, 4, 5]])
    assert (image.norm.vmin, image.norm.vmax) == (0, 5)


def test_darker_is_more_in_shades_of_grey_too():
    colours, _ = shades(0, 1)
    grey = colours(np.linspace(0, 1, 50))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(grey) < 0).all()
    colours, _ = shades(-1, 1)
    grey = colours(np.linspace(0, 1, 101))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(grey[:51]) > 0).all() and (np.diff(grey[51:]) < 0).all()


def test_what_is_written_can_be_read_on_its_colour():
    ax, _, image = drawn([[0.1, 1, 2], [3, 4, 5]])
    for text in ax.texts:
        x, y = text.get_position()
        colour = image.to_rgba(image.get_array())[y, x]
        assert text.get_color() == ink(colour)
    assert (ink((1, 1, 1)), ink((0, 0, 0))) == ("black", "white")
    assert ink(to_rgb("#0072B2")) == "white" and ink(to_rgb("#E69F00")) == "black"


def test_words_take_the_place_of_values_and_are_cut():
    ax, *_ = drawn([[1, 2, 3], [4, 5, np.nan]], words=[["$a", "\n", "x" * 40], ["d", "e", "f"]])
    texts = [text.get_text() for text in ax.texts]
    assert texts[:2] == ["$a", "⏎"] and texts[2].endswith("…") and len(texts[2]) < 20
    assert texts[3:] == ["d", "e"]


@pytest.mark.parametrize("n", [5, 60])
def test_a_figure_is_as_large_as_its_names_need(n):
    names = [f"token{i}" for i in range(n)]
    figure = plot_matrix(np.zeros((n, n)), names, names, label="")
    width, height = figure.get_size_inches()
    assert (width, height) == ((6.4, 2.8) if n == 5 else (pytest.approx(22.2), pytest.approx(15.6)))
    assert not figure.axes[0].texts or n == 5


def test_a_matrix_without_rows_can_be_drawn():
    figure = plot_matrix(np.array([]), COLUMNS, label="x")
    assert figure._repr_png_() and figure.axes[0].get_images()[0].get_array().mask.all()
