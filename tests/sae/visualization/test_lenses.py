import numpy as np
import pytest

from mlxterp.sae.visualization import plot_logit_lens, plot_patching

LENS = {
    layer: [
        [(7, 10.0 * layer + position, f"{layer}{position}"), (8, 0.0, "no")]
        for position in range(3)
    ]
    for layer in range(2)
}


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_likeliest_token_of_each_layer_is_written_on_its_score():
    ax, bar = plot_logit_lens(LENS, ["a", " b", "\n"]).axes
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), [[10, 11, 12], [0, 1, 2]])
    written = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert written == {
        (0, 0): "10",
        (1, 0): "11",
        (2, 0): "12",
        (0, 1): "00",
        (1, 1): "01",
        (2, 1): "02",
    }
    assert labels(ax.xaxis) == ["a", " b", "⏎"] and labels(ax.yaxis) == ["1", "0"]
    assert (ax.get_ylabel(), bar.get_ylabel()) == ("layer", "logit of the likeliest token")
    assert labels(plot_logit_lens(LENS).axes[0].xaxis) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("lens", "tokens", "message"),
    [
        ({}, (), "at least one layer"),
        (LENS | {2: LENS[0][:2]}, (), r"3 positions .* \[2\]|2 positions .* \[1, 0\]"),
        (LENS | {1: [[], [], []]}, (), r"with a prediction; \[1\]"),
        (LENS, ["a"], "tokens must be 3"),
    ],
)
def test_a_lens_must_have_the_same_positions_at_every_layer(lens, tokens, message):
    with pytest.raises(ValueError, match=message):
        plot_logit_lens(lens, tokens)


def test_patching_of_layers_is_drawn_as_bars_upwards():
    (ax,) = plot_patching({0: 5.0, 1: -20.0, 2: 100}).axes
    assert [bar.get_width() for bar in ax.patches] == [5, -20, 100]
    assert labels(ax.yaxis) == ["0", "1", "2"] and ax.get_ylim()[0] < ax.get_ylim()[1]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("recovered (%)", "layer")
    up, down, _ = (bar.get_facecolor() for bar in ax.patches)
    assert up != down


def test_patching_of_positions_is_drawn_as_a_map():
    found = {0: [1.0, 2.0], 1: np.array([-3.0, 4.0])}
    ax, bar = plot_patching(found, ["x", "y"], "logit difference", "head").axes
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), [[-3, 4], [1, 2]])
    assert labels(ax.xaxis) == ["x", "y"] and labels(ax.yaxis) == ["1", "0"]
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel()) == (
        "token",
        "head",
        "logit difference",
    )
    assert plot_patching(found).axes[0].get_xlabel() == "position"


@pytest.mark.parametrize(
    ("found", "tokens", "message"),
    [
        ({}, (), "at least one layer"),
        ({0: 1.0, 1: [1.0]}, (), "one number, or as many as the others"),
        ({0: [1.0], 1: [1.0, 2.0]}, (), "one number, or as many"),
        ({0: [[1.0]]}, (), "one number, or as many"),
        ({0: [1.0, 2.0]}, ["a"], "tokens must be 2"),
    ],
)
def test_patching_must_have_one_shape(found, tokens, message):
    with pytest.raises(ValueError, match=message):
        plot_patching(found, tokens)
