import math
import sys

import pytest
from matplotlib.figure import Figure

from mlxterp.sae.visualization import plot_training

TRAINING = [
    {"step": s, "tokens": 1000 * s, "loss": 1 / s, "fvu": 2 / s, "l0": 8.0, "dead": 0.01 * s}
    for s in range(1, 41)
]
VALIDATION = [{"step": s, "tokens": 1000 * s, "fvu": 0.1, "l0": 9.0, "dead": 0.2} for s in (20, 40)]


def lines(ax) -> dict[str, list[tuple[float, float]]]:
    """The curves of a panel, without gaps, by their label."""
    return {
        line.get_label(): [(x, y) for x, y in zip(*line.get_data(), strict=True) if y == y]
        for line in ax.get_lines()
    }


def test_four_panels_show_training_and_held_out_figures_over_tokens():
    figure = plot_training(TRAINING, VALIDATION)
    loss, fvu, l0, dead = figure.axes
    assert lines(loss) == {"training": [(1000 * s, 1 / s) for s in range(1, 41)]}
    assert lines(fvu)["held out"] == [(20_000, 0.1), (40_000, 0.1)]
    assert lines(l0)["held out"] == [(20_000, 9.0), (40_000, 9.0)]
    assert lines(dead) == {"training": [(1000 * s, 0.01 * s) for s in range(1, 41)]}
    words = [ax.get_ylabel() for ax in figure.axes]
    for word, text in zip(("loss", "FVU", "L0", "dead"), words, strict=True):
        assert word in text
    assert [ax.get_xlabel() for ax in figure.axes] == ["", "", "tokens", "tokens"]
    assert [text.get_text() for text in fvu.get_legend().get_texts()] == ["training", "held out"]


def test_curves_can_be_told_apart_without_colour():
    training, held_out = plot_training(TRAINING, VALIDATION).axes[1].get_lines()
    assert training.get_linestyle() != held_out.get_linestyle()
    assert training.get_marker() != held_out.get_marker()


def test_only_loss_and_fvu_of_a_large_span_are_logarithmic():
    assert [ax.get_yscale() for ax in plot_training(TRAINING).axes] == [
        "log", "log", "linear", "linear",
    ]  # fmt: skip
    short = plot_training(TRAINING[5:10]).axes
    assert [ax.get_yscale() for ax in short] == ["linear"] * 4
    assert all(ax.get_ylim()[0] == 0 for ax in short)


def test_a_few_dead_features_look_few():
    *_, dead = plot_training([{"tokens": 1, "dead": 0.001}, {"tokens": 2, "dead": 0.002}]).axes
    assert dead.get_ylim() == (0, 0.05)


@pytest.mark.parametrize(
    "training, validation",
    [([], []), ([], VALIDATION), (TRAINING, []), (TRAINING[:1], []), ([{"step": 1}], [{}])],
)
def test_any_reports_can_be_drawn(training, validation):
    figure = plot_training(training, validation)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert (figure.axes[1].get_legend() is None) == (validation in ([], [{}]))


def test_missing_keys_and_values_that_are_not_finite_leave_gaps():
    odd = [
        {"tokens": 1, "fvu": 0.5}, {"tokens": 2, "fvu": math.nan}, {"tokens": 3, "fvu": None},
        {"tokens": 4, "fvu": math.inf}, {"tokens": 5}, {"fvu": 0.1}, {"tokens": 7, "fvu": 0.25},
    ]  # fmt: skip
    loss, fvu, *_ = plot_training(odd).axes
    assert lines(loss) == {} and lines(fvu) == {"training": [(1, 0.5), (7, 0.25)]}
    assert len(fvu.get_lines()[0].get_xdata()) == 5
    assert math.isfinite(fvu.get_ylim()[1])


def test_a_figure_of_the_users_own_is_drawn_on():
    own = Figure()
    axes = own.subplots(1, 4)
    assert plot_training(TRAINING, VALIDATION, axes) is own
    assert [len(ax.get_lines()) for ax in axes] == [1, 2, 2, 1]
    with pytest.raises(ValueError, match="axes must be 4, got 3"):
        plot_training(TRAINING, axes=axes[:3])


def test_drawing_leaves_no_figure_open():
    plot_training(TRAINING, VALIDATION)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mlxterp\[plot\]'"):
        plot_training(TRAINING)
