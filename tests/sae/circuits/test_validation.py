import json
import math

import numpy as np
import pytest

from mlxterp.sae.circuits.validation import Validation

PREDICTED = np.array([3.0, -2.0, 1.0, 0.5])


def validation(measured, predicted=PREDICTED, **more) -> Validation:
    predicted, measured = np.array(predicted, float), np.array(measured, float)
    return Validation(predicted, measured, tuple(range(len(measured))), "taken out", **more)


def test_figures_of_predictions_that_are_right_but_for_their_size():
    found = validation(0.5 * PREDICTED)
    assert found.correlation == pytest.approx(1.0)
    assert found.slope == pytest.approx(0.5)
    assert found.same_sign == 1.0


def test_figures_of_predictions_that_are_partly_wrong():
    measured = np.array([2.0, 1.0, 1.0, 0.0])
    found = validation(measured)
    assert found.correlation == pytest.approx(np.corrcoef(PREDICTED, measured)[0, 1])
    assert found.slope == pytest.approx((6 - 2 + 1) / (9 + 4 + 1 + 0.25))
    assert found.same_sign == 0.5


@pytest.mark.parametrize("predicted, measured", [([], []), ([1], [2]), ([1, 1], [1, 2])])
def test_there_is_no_correlation_of_too_little(predicted, measured):
    found = validation(measured, predicted)
    assert math.isnan(found.correlation)
    assert math.isnan(found.slope) == (not predicted)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["correlation"] is None
    repr(found)


def test_effects_that_are_no_numbers_do_not_count():
    found = validation([1.5, -1.0, math.nan, 0.25])
    assert found.correlation == pytest.approx(1.0) and found.slope == pytest.approx(0.5)


def test_edges_without_a_number_are_an_error():
    with pytest.raises(ValueError, match="measured must be one number for each of 2 edges"):
        Validation(np.zeros(2), np.zeros(3), (0, 1), "")


def test_the_table_has_the_largest_predictions_by_name():
    names = ("a → b", "c → d", "<b>e</b> → f", "g → h")
    found = validation(0.5 * PREDICTED, names=names)
    assert repr(found).splitlines() == [
        "4 edges, taken out: correlation 1.000, slope 0.500, 100% of the predicted sign",
        "  edge          predicted  measured",
        "  a → b                +3      +1.5",
        "  c → d                -2        -1",
        "  <b>e</b> → f         +1      +0.5",
        "  g → h              +0.5     +0.25",
    ]
    assert len(found.table(2).rows) == 2
    assert "&lt;b&gt;e" in found._repr_html_() and "<b>e" not in found._repr_html_()
    assert "edge 3" in repr(validation(PREDICTED))


def test_plain_values_hold_everything():
    found = validation(0.5 * PREDICTED, names=("a", "b", "c", "d")).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["predicted"] == PREDICTED.tolist() and found["edges"] == [0, 1, 2, 3]
    assert found["slope"] == pytest.approx(0.5) and found["names"] == ["a", "b", "c", "d"]


def test_a_figure_has_a_point_for_every_edge_and_the_diagonal():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ax = figure.subplots()
    found = validation(0.5 * PREDICTED)
    assert found.plot(ax) is figure
    (points,) = ax.collections
    np.testing.assert_allclose(points.get_offsets(), np.stack([PREDICTED, 0.5 * PREDICTED], 1))
    (diagonal,) = ax.lines
    assert diagonal.get_slope() == 1 and diagonal.get_xy1() == (0, 0)
    assert "correlation 1.000, slope 0.500" in ax.get_title()
    assert found.plot()._repr_png_().startswith(b"\x89PNG")
