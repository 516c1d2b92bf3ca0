import io
import sys
from itertools import combinations

import pytest

from mlxterp.sae.circuits.circuit import Circuit, Edge, Node
from mlxterp.sae.circuits.layout import arrange
from tests.sae.circuits.examples import LEVELS, TOKENS, nasty, over_dataset, over_prompt, small

MAKERS = (small, over_dataset, over_prompt, nasty)


def arranged(circuit: Circuit):
    return arrange(circuit.nodes, circuit.edges, circuit.levels, circuit.tokens)


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("make", MAKERS)
def test_no_box_is_on_another_or_outside(make):
    found = arranged(make())
    (width, height), size = found.box, found.size
    for (ax, ay), (bx, by) in combinations(found.places, 2):
        assert abs(ax - bx) >= width - 1e-9 or abs(ay - by) >= height - 1e-9
    for x, y in found.places:
        assert width / 2 <= x <= size[0] - width / 2 and height / 2 <= y <= size[1] - height / 2


def test_edges_go_from_the_right_of_one_box_to_the_left_of_another():
    for circuit in (small(), over_dataset()):
        found = arranged(circuit)
        for edge, curve in zip(circuit.edges, found.curves, strict=True):
            assert len(curve) % 3 == 1
            for end, side, (x, y) in ((edge.source, 1, curve[0]), (edge.target, -1, curve[-1])):
                assert y == found.places[end][1]
                assert x - found.places[end][0] == pytest.approx(side * found.box[0] / 2)


@pytest.mark.parametrize("make", [over_prompt, nasty])
def test_over_a_prompt_edges_go_from_the_top_of_one_box_to_the_bottom_of_another(make):
    circuit = make()
    found = arranged(circuit)
    for edge, curve in zip(circuit.edges, found.curves, strict=True):
        assert len(curve) == 4
        for end, side, (x, y) in ((edge.source, -1, curve[0]), (edge.target, 1, curve[-1])):
            assert y - found.places[end][1] == pytest.approx(side * found.box[1] / 2)
            assert abs(x - found.places[end][0]) < found.box[0] / 2
    assert len({curve[0] for curve in found.curves}) == len(found.curves)
    assert len({curve[-1] for curve in found.curves}) == len(found.curves)


def test_many_boxes_of_one_place_are_in_lines_that_leave_each_other_room():
    nodes = tuple(Node("feature", LEVELS[0], i, 2) for i in range(28)) + (
        Node("feature", LEVELS[0], 99, 3), Node("logit", "", 7, 3),
    )  # fmt: skip
    edges = tuple(Edge(i, 29, 1.0) for i in range(29))
    found = arranged(Circuit(nodes, edges, LEVELS[:1]))
    lines = {y for _, y in found.places[:28]}
    assert len(lines) == 2
    upper, lower = (sorted(x for x, at in found.places[:28] if at == y) for y in sorted(lines))
    assert len(upper) == len(lower) == 14
    step = upper[1] - upper[0]
    assert abs(upper[0] - lower[0]) == pytest.approx(step / 2)
    for a, b in combinations(found.places, 2):
        assert abs(a[0] - b[0]) >= found.box[0] - 1e-9 or abs(a[1] - b[1]) >= found.box[1] - 1e-9


def test_boxes_over_a_prompt_are_as_wide_as_their_texts():
    widths = [arranged(circuit).box[0] for circuit in (
        over_prompt(),
        over_prompt().with_labels({8: {11: "a label that is long enough to be cut off"}}),
    )]  # fmt: skip
    assert widths[0] < widths[1] == 1.35


def test_levels_are_columns_from_left_to_right():
    circuit = small()
    found = arranged(circuit)
    columns = [x for x, _ in found.places]
    assert columns[0] == columns[1] == columns[4] < columns[2] < columns[3]
    assert [heading.text for heading in found.headings] == list(LEVELS)
    assert found.places[4][1] > max(found.places[0][1], found.places[1][1])


def test_edges_past_a_level_go_between_its_boxes():
    circuit = over_dataset()
    found = arranged(circuit)
    width, height = found.box
    past = [
        curve
        for edge, curve in zip(circuit.edges, found.curves, strict=True)
        if edge.target // 12 - edge.source // 12 == 2
    ]
    assert past
    for curve in past:
        (_, y), (_, after) = curve[3], curve[6]
        assert y == after and all(abs(y - place[1]) > height / 2 for place in found.places[12:24])


def test_few_edges_cross_where_none_has_to():
    nodes = tuple(Node("feature", level, i) for level in LEVELS[:2] for i in range(10))
    circuit = Circuit(nodes, tuple(Edge(i, 19 - i, 1.0) for i in range(10)), LEVELS)
    heights = [y for _, y in arranged(circuit).places]
    order = sorted(range(10), key=lambda i: heights[i])
    assert sorted(range(10), key=lambda i: heights[19 - i]) == order


def test_a_prompt_is_below_levels_from_the_bottom_up():
    found = arranged(over_prompt())
    embedding, first, second, error, later, logit = found.places
    assert first[1] == second[1] == error[1] and embedding[1] > first[1] > later[1] > logit[1]
    assert max(first[0], second[0]) < error[0] < later[0] == logit[0]
    assert embedding[0] == pytest.approx((first[0] + second[0] + error[0]) / 3)
    assert [heading.text for heading in found.headings] == ["logits", "L10", "L8", "embeddings"]
    marks = {mark.text: mark for mark in found.marks}
    assert marks["␣France"].x == embedding[0] and marks["␣Paris"].x == logit[0]
    assert all(mark.y > embedding[1] for mark in found.marks)
    positions = [mark.x for mark in found.marks]
    assert positions == sorted(positions)


def test_many_empty_positions_share_a_column():
    circuit = over_prompt()
    assert [mark.text for mark in arranged(circuit).marks] == [
        "The", "␣capital", "␣of", "␣France", "…", "␣Paris",
    ]  # fmt: skip
    assert len(TOKENS) == 9


def test_positions_without_tokens_have_numbers():
    nodes = Node("feature", LEVELS[0], 1, 5), Node("feature", LEVELS[1], 1)
    found = arranged(Circuit(nodes, (Edge(0, 1, 1.0),), LEVELS))
    assert [mark.text for mark in found.marks] == ["…", "5"]
    assert found.places[1][0] > found.places[0][0]


def test_a_figure_names_nodes_levels_and_tokens():
    pytest.importorskip("matplotlib")
    shown = texts(small().visualize({12: {91: "Capital cities"}}))
    assert {"42 French words", "7", "5", "91 Capital cities", "error", *LEVELS} == set(shown)
    shown = texts(over_prompt().visualize())
    assert {"␣France", "11", "20", "Paris (61.0%)", "embeddings", "logits", "␣of"} <= set(shown)


def test_width_is_weight_and_sign_is_seen_without_colour():
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_hex
    from matplotlib.patches import PathPatch

    ax = small().visualize().axes[0]
    lines = [patch for patch in ax.patches if type(patch) is PathPatch]
    widths = [line.get_linewidth() for line in lines]
    assert widths == sorted(widths) and len(set(widths)) == 5  # drawn last is seen best
    colours = [to_hex(line.get_edgecolor()) for line in lines]
    assert colours == ["#0072b2", "#0072b2", "#d55e00", "#0072b2", "#d55e00"]
    dashed = [line.get_linestyle() not in ("-", "solid") for line in lines]
    assert dashed == [False, False, True, False, True]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["raises its target", "lowers it"]


def test_errors_look_different():
    pytest.importorskip("matplotlib")
    from matplotlib.patches import FancyBboxPatch

    ax = small().visualize().axes[0]
    boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    *features, error = boxes
    assert len({box.get_facecolor() for box in features}) == 1
    assert error.get_facecolor() != features[0].get_facecolor()
    assert type(error.get_boxstyle()) is not type(features[0].get_boxstyle())


@pytest.mark.parametrize("make, along", [(small, 0), (over_prompt, 1)])
def test_edges_end_in_a_point_that_looks_where_they_go(make, along):
    pytest.importorskip("matplotlib")
    from matplotlib.patches import PathPatch, Polygon

    ax = make().visualize().axes[0]
    lines = [patch for patch in ax.patches if type(patch) is PathPatch]
    points = [patch for patch in ax.patches if isinstance(patch, Polygon)]
    assert len(lines) == len(points) > 0
    for line, point in zip(lines, points, strict=True):
        tip, *base = point.get_xy()[:3]
        assert tuple(tip) == tuple(line.get_path().vertices[-1])
        back = line.get_path().vertices[-2] - tip
        middle = (base[0] + base[1]) / 2 - tip
        assert middle[1 - along] == pytest.approx(0) and middle[along] * back[along] > 0
        assert abs(base[0] - base[1])[1 - along] > 0.04


def test_only_the_strongest_edges_are_drawn_and_that_is_said():
    pytest.importorskip("matplotlib")
    figure = small().visualize(n=1)
    assert "91" not in texts(figure)
    assert figure.axes[0].get_legend().get_title().get_text() == "2 of 5 edges"
    assert small().visualize().axes[0].get_legend().get_title().get_text() == ""
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        small().visualize(n=0)


@pytest.mark.parametrize("make", MAKERS)
def test_texts_fit_their_boxes(make):
    """What is drawn is measured, with every text that is hard to show; warnings are errors."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patches import FancyBboxPatch

    figure = make().visualize(n=100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ax, renderer = figure.axes[0], canvas.get_renderer()
    boxes = [p.get_window_extent() for p in ax.patches if isinstance(p, FancyBboxPatch)]
    inside = [t.get_window_extent(renderer) for t in ax.texts]
    for box, text in zip(boxes, inside, strict=False):
        assert box.x0 <= text.x0 and text.x1 <= box.x1, text
    for one, other in combinations(inside, 2):
        assert not one.overlaps(other)


def test_dollars_are_no_formulas():
    pytest.importorskip("matplotlib")
    figure = over_prompt().visualize({8: {11: "$\\frac{1", 12: "a $x$"}})
    figure.savefig(io.BytesIO(), format="png")
    assert "11 $\\frac{1" in texts(figure) and "12 a $x$" in texts(figure)


def test_a_figure_of_the_users_own_is_drawn_on_in_its_size():
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(4, 3))
    axes = figure.subplots(1, 2)
    assert over_dataset().visualize(ax=axes[1]) is figure
    assert not axes[0].texts and axes[1].texts[0].get_fontsize() < 4


def test_a_circuit_of_many_tokens_and_an_empty_one_can_be_drawn():
    pytest.importorskip("matplotlib")
    nodes = tuple(Node("feature", LEVELS[i % 2], i, i) for i in range(120))
    edges = tuple(Edge(i, i + 1, 1.0) for i in range(0, 119, 2))
    large = Circuit(nodes, edges, LEVELS).visualize(n=200)
    assert max(large.get_size_inches()) <= 40
    assert Circuit((), (), LEVELS).visualize()._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mlxterp\[plot\]'"):
        small().visualize()
