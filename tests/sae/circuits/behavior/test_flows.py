import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.circuits.behavior.flows import STEPS, Way, find_flow, losses, midpoints
from tests.sae.circuits.prompts import (
    ONE_PASS,
    OTHER,
    directions,
    ids_of,
    logit_of,
    logits,
    prompt_of,
    replaced,
)
from tests.sae.features.coders import make

TOKEN, EPS = 65, 0.02
GRADIENT = Way(0)


def flow_of(demo, kind: str = "sae", way: Way | None = None, **options):
    coders = {2: make(kind)}
    prompt = prompt_of(demo, coders, **options)
    state, target = prompt.states[2], logit_of(demo, coders, TOKEN)
    return prompt, state, target, find_flow(prompt, state, target, way or Way())


def value_with(demo, state, position: int, feature: int, factor: float) -> float:
    """The logit where a feature at a position is multiplied, by an edit of the model alone."""
    written = np.array(state.found.written, np.float64)
    z = float(state.found.codes[position, feature])
    row = np.array(state.coder.direction(feature), np.float64)
    written[position] += (factor - 1) * z * row
    return logits(demo, ids_of(demo), replaced(state.coder, written))[TOKEN]


def strongest(flow, n: int = 6) -> list[tuple[int, int]]:
    return [node for node in flow.nodes() if node[1] >= 0][:n]


@pytest.mark.parametrize("kind", ONE_PASS)
def test_gradients_are_finite_differences_of_the_model(demo, kind):
    _, state, _, flow = flow_of(demo, kind, GRADIENT)
    checked = strongest(flow)
    for position, feature in checked:
        ends = [value_with(demo, state, position, feature, 1 + s * EPS) for s in (1, -1)]
        measured = (ends[0] - ends[1]) / (2 * EPS)
        assert flow.of(position, feature) == pytest.approx(measured, rel=0.05, abs=0.02)
        z = float(state.found.codes[position, feature])
        assert flow.slopes[position, feature] * z == pytest.approx(flow.of(position, feature))
    assert len(checked) == 6 and flow.n_steps == 0
    position = int(np.abs(flow.errors).argmax())
    written, values = np.array(state.found.written, np.float64), []
    for sign in (1, -1):
        moved = written.copy()
        moved[position] += sign * EPS * np.array(state.found.errors[position])
        values.append(logits(demo, ids_of(demo), replaced(state.coder, moved))[TOKEN])
    measured = (values[0] - values[1]) / (2 * EPS)
    assert flow.errors[position] == pytest.approx(measured, rel=0.05, abs=0.02)


@pytest.mark.parametrize("kind", ONE_PASS)
@pytest.mark.parametrize("corrupted", [None, OTHER])
def test_integrated_gradients_add_up_to_the_rise(demo, kind, corrupted):
    _, state, _, flow = flow_of(demo, kind, corrupted=corrupted)
    z = np.array(state.found.codes - state.codes)
    less = replaced(state.coder, np.array(state.found.written) - z @ directions(state.coder))
    plain = logits(demo, ids_of(demo))[TOKEN]
    rise = plain - logits(demo, ids_of(demo), less)[TOKEN]
    assert flow.rise == pytest.approx(rise, rel=1e-2, abs=1e-3) and abs(rise) > 0.05
    assert flow.total(with_errors=False) == pytest.approx(rise, rel=0.015)
    assert flow.gap(False) <= 0.01 and flow.n_steps in STEPS
    gap = abs(flow.features.sum() - flow.rise) / abs(flow.rise)
    assert flow.gap(False) == pytest.approx(gap, rel=1e-3, abs=1e-6)


def test_errors_go_the_way_with_the_features_where_they_are_asked_to(demo):
    prompt, state, target, flow = flow_of(demo, way=Way(errors=True), corrupted=OTHER)
    other = prompt.measured(
        target, state.edits(state.found.written - state.difference(with_errors=True))
    )
    end = replaced(state.coder, np.array(state.found.written - state.difference(True)))
    assert float(other[0]) == pytest.approx(logits(demo, ids_of(demo), end)[TOKEN], rel=1e-3)
    rise = float(prompt.measured(target, {})[0] - other[0])
    assert flow.rise == pytest.approx(rise, rel=1e-4)
    assert flow.total(with_errors=True) == pytest.approx(rise, rel=0.015)
    assert abs(flow.errors.sum()) > 0.1 * abs(rise)


def test_what_was_measured_is_what_an_edit_of_the_model_does(demo):
    prompt, state, target, flow = flow_of(demo, way=Way(exact=True))
    plain = logits(demo, ids_of(demo))[TOKEN]
    nodes = strongest(flow)
    for position, feature in nodes:
        lost = plain - value_with(demo, state, position, feature, 0)
        assert flow.of(position, feature) == pytest.approx(lost, rel=1e-2, abs=2e-3)
    half = losses(prompt, state, target, nodes, factor=0.5)
    for (position, feature), found in zip(nodes, half.tolist(), strict=True):
        lost = plain - value_with(demo, state, position, feature, 0.5)
        assert found == pytest.approx(lost, rel=1e-2, abs=2e-3)


def test_an_error_is_measured_like_a_feature(demo):
    prompt, state, target, flow = flow_of(demo, way=Way(exact=True))
    position = int(np.abs(flow.errors).argmax())
    written = np.array(state.found.written)
    written[position] -= np.array(state.found.errors[position])
    lost = logits(demo, ids_of(demo))[TOKEN]
    lost -= logits(demo, ids_of(demo), replaced(state.coder, written))[TOKEN]
    assert flow.of(position, -1) == pytest.approx(lost, rel=1e-2, abs=2e-3)
    assert losses(prompt, state, target, [(position, -1)]) == pytest.approx([lost], rel=1e-2)


def test_other_sites_may_be_held_meanwhile(demo):
    prompt, state, target, _ = flow_of(demo, way=GRADIENT)
    everything = {"layers.5.resid_post": lambda x: mx.zeros_like(x)}
    found = losses(prompt, state, target, [(5, int(state.found.codes[5].argmax()))], 0, everything)
    np.testing.assert_allclose(found, 0, atol=1e-5)


def test_there_is_no_effect_at_special_tokens_or_of_silent_features(demo):
    _, state, _, flow = flow_of(demo)
    assert not flow.features[0].any() and flow.errors[0] == 0
    assert not flow.features[np.array(state.found.codes) == 0].any()
    nodes = flow.nodes()
    sizes = [abs(flow.of(*node)) for node in nodes]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    n = np.count_nonzero(flow.features) + np.count_nonzero(flow.errors)
    assert len(set(nodes)) == len(nodes) == n


def test_midpoints_and_what_ways_are_called():
    np.testing.assert_allclose(midpoints(4), [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(midpoints(0), [1.0])
    assert set(np.round(midpoints(9), 9)) <= set(np.round(midpoints(27), 9))
    ways = (Way(), Way(4), Way(0), Way(exact=True))
    assert [way.method for way in ways] == [
        "integrated_gradients", "integrated_gradients", "gradient", "ablation",
    ]  # fmt: skip
    assert [way.tries() for way in ways] == [STEPS, (4,), (0,), STEPS]
