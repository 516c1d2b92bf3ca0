"""What holds for every figure: it shows any text as it is, and changes nothing elsewhere."""

import io
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from mlxterp.sae.evals.fidelity import Fidelity
from mlxterp.sae.evals.loss import LossRecovered
from mlxterp.sae.features.connections import Connection, InputInvariantWeights
from mlxterp.sae.features.logit_effects import LogitEffects
from mlxterp.sae.sharing import Sharing
from mlxterp.sae.similarity.map import FeatureMap
from mlxterp.sae.visualization import (
    plot_density,
    plot_frontier,
    plot_logit_lens,
    plot_losses,
    plot_matrix,
    plot_patching,
    plot_shares,
    plot_training,
)

NASTY = "$x_{$\u202e\x07\ud83d<b>"  # short enough for a name
RATES = np.array([0, 0.001, 0.02, 0.02, 0.5, 1.0])
SHARES, KINDS = np.array([0.1, 0.5, np.nan, 1.0]), np.array([NASTY, "b", "b", NASTY])
LOSS = LossRecovered(2.0, 2.2, 4.0, 10)
MATRIX = np.array([[0.0, 1.0], [np.nan, -2.0]])
POINTS = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 1.0]])

FIGURES = {
    "density": lambda ax: plot_density(RATES, ax),
    "densities": lambda ax: plot_density({NASTY: RATES, "b": RATES[:3]}, ax),
    "frontier": lambda ax: plot_frontier({NASTY: [(8, 0.4), (64, 0.1)], "b": [(1, 0.5)]}, ax),
    "logit lens": lambda ax: plot_logit_lens({0: [[(1, 2.0, NASTY)]]}, [NASTY], NASTY, ax),
    "losses": lambda ax: plot_losses({NASTY: LOSS, "b": LOSS}, ax),
    "matrix": lambda ax: plot_matrix(MATRIX, [NASTY, "b"], [NASTY, "c"], label=NASTY, ax=ax),
    "patching": lambda ax: plot_patching({NASTY: 20.0, 1: -5.0}, ax=ax),
    "patching by token": lambda ax: plot_patching({0: [1, 2], 1: [3, 4]}, [NASTY, "b"], ax=ax),
    "shares": lambda ax: plot_shares(SHARES, KINDS, (NASTY, "b"), NASTY, ax),
    "fidelity": Fidelity(0.1, 8.0, 10, RATES).plot,
    "loss recovered": LossRecovered(2.0, 2.2, 4.0, 10, {NASTY: LOSS, "b": LOSS}).plot,
    "logit effects": LogitEffects(((NASTY, 2.0),), (("b", -1.0),)).plot,
    "connections": lambda ax: InputInvariantWeights(2, 2, 0.5, (Connection(0, 1, -2.0),)).plot(
        axes=ax
    ),
    "sharing": Sharing((NASTY, "b"), np.array(["shared", f"only {NASTY}"]), np.eye(2)).plot,
    "map": lambda ax: FeatureMap(POINTS, "pca", "decoder", (0.5, 0.2)).plot(
        np.array([NASTY, "b", "-1"]), NASTY, ax
    ),
    "map by number": lambda ax: FeatureMap(POINTS, "pca", "decoder", None).plot(
        np.array([0.1, 0.2, 0.3]), NASTY, ax
    ),
}


def texts(figure) -> str:
    """All that is written in a figure."""
    found = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    return "\n".join(filter(None, found))


@pytest.fixture
def unchanged():
    """Nothing global may change: settings, and the figures that pyplot knows."""
    before = dict(matplotlib.rcParams)
    pyplot = "matplotlib.pyplot" in sys.modules
    yield
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
    assert not pyplot or sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_made_that_nobody_else_holds(draw, unchanged):
    figure = draw(None)
    assert isinstance(figure, Figure) and figure.canvas.manager is None
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(io.BytesIO(), format="svg")


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_an_axis_of_the_users_own_is_drawn_on(draw, unchanged):
    own = Figure(layout="constrained")
    left, right = own.subplots(1, 2)
    assert draw(right) is own
    assert right.has_data() and not left.has_data() and not left.get_title()
    own.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("name", [n for n in FIGURES if n not in ("density", "fidelity")])
def test_text_is_drawn_as_it_is(name):
    figure = FIGURES[name](None)
    figure.draw_without_rendering()
    written = texts(figure)
    assert not {"\x07", "\x1b", "\u202e", "\ud83d"} & set(written)
    for text in figure.findobj(matplotlib.text.Text):
        if "$" in text.get_text():
            assert not text.get_parse_math()
    if name != "connections":
        assert "$x_{$" in written


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_figures_look_alike(draw):
    figure = draw(None)
    axes = figure.axes[0]
    assert axes.get_xlabel() or axes.get_ylabel() or axes.get_xticklabels()
    for label in (axes.xaxis.label, axes.yaxis.label):
        assert label.get_fontsize() == 9
    assert not axes.spines["top"].get_visible() and not axes.spines["right"].get_visible()


@pytest.mark.parametrize(
    "call",
    [*FIGURES.values(), lambda ax: plot_training([])],
    ids=[*FIGURES, "training"],
)
def test_without_matplotlib_the_extra_is_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mlxterp\[plot\]'"):
        call(None)
