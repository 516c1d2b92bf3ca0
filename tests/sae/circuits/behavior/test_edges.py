import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.circuits.behavior.edges import Between, Edges
from mlxterp.sae.circuits.behavior.flows import Way, find_flow
from tests.sae.circuits.prompts import (
    captured,
    ids_of,
    logit_of,
    logits,
    prompt_of,
    replaced,
    sae_of,
)
from tests.sae.features.coders import make

EPS, TOKEN = 0.02, 65


def active(state, n: int = 3) -> list[tuple[int, int]]:
    """Some features that fire, at several positions."""
    codes = np.array(state.found.codes)
    return [(position, int(codes[position].argmax())) for position in range(2, 2 + n)]


def reads_with(demo, prompt, earlier, later, node, factor: float, held=None) -> np.ndarray:
    """What the later coder reads where an earlier feature, or error, is multiplied."""
    position, i = node
    written = np.array(earlier.found.written, np.float64)
    more = (
        np.array(earlier.found.errors[position])
        if i < 0
        else float(earlier.found.codes[position, i]) * np.array(earlier.coder.direction(i))
    )
    written[position] += (factor - 1) * more
    edit = replaced(earlier.coder, written) | (held or {})
    return captured(demo, prompt.tokens, later.reads.names, edit).astype(np.float64)


def values_of(coder, x: np.ndarray, targets) -> np.ndarray:
    """The pre-activations of features at positions."""
    pre = np.array(coder.pre_activations(mx.array(x.astype(np.float32))), np.float64)
    return np.array([pre[node] for node in targets])


@pytest.mark.parametrize("kind", ["sae", "transcoder", "cross-layer transcoder"])
def test_effects_by_gradients_are_finite_differences(demo, kind):
    later = sae_of(4)
    prompt = prompt_of(demo, {2: make(kind), 4: later})
    earlier = prompt.states[2]
    sources, targets = [*active(earlier), (6, -1)], [(12, 3), (9, 7), (7, 21), (3, 3)]
    path = Between(prompt, earlier, later, [])
    found = path.effects(sources, targets, False, 0)
    assert found.shape == (4, 4)
    for i, node in enumerate(sources):
        ends = [
            values_of(later, reads_with(demo, prompt, earlier, later, node, 1 + s * EPS), targets)
            for s in (1, -1)
        ]
        np.testing.assert_allclose(found[i], (ends[0] - ends[1]) / (2 * EPS), rtol=0.05, atol=0.02)
    assert np.abs(found).max() > 0.2
    assert not found[2, 3]  # a later position does nothing to an earlier one


def test_effects_of_a_way_add_up_to_what_all_features_do(demo):
    later = sae_of(4)
    prompt = prompt_of(demo, {2: make("sae"), 4: later})
    earlier = prompt.states[2]
    every = [tuple(node) for node in np.argwhere(np.array(earlier.found.codes)).tolist()]
    targets = [(12, 3), (9, 7)]
    path = Between(prompt, earlier, later, [])
    x = captured(demo, prompt.tokens, later.reads.names)
    written = np.array(earlier.found.written - earlier.difference())
    less = captured(demo, prompt.tokens, later.reads.names, replaced(earlier.coder, written))
    rise = values_of(later, x, targets) - values_of(later, less, targets)
    found = path.effects(every, targets, False, 40).sum(axis=0)
    np.testing.assert_allclose(found, rise, rtol=0.02, atol=0.01)
    assert np.abs(rise).min() > 0.1


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_what_is_lost_is_that_of_an_edit_of_the_model(demo, factor):
    later = sae_of(4)
    prompt = prompt_of(demo, {2: make("sae"), 4: later})
    earlier = prompt.states[2]
    sources, targets = [*active(earlier), (6, -1)], [(12, 3), (9, 7), (7, 21)]
    found = Between(prompt, earlier, later, []).losses(sources, targets, factor)
    plain = values_of(later, captured(demo, prompt.tokens, later.reads.names), targets)
    for i, node in enumerate(sources):
        x = reads_with(demo, prompt, earlier, later, node, factor)
        np.testing.assert_allclose(
            found[i], plain - values_of(later, x, targets), rtol=1e-2, atol=2e-3
        )
    assert np.abs(found).max() > 0.2


def mlp_coders() -> dict:
    return {layer: sae_of(layer, "mlp_out") for layer in (1, 2, 3)}


def edges_of(demo, coders, way: Way, n: int = 6):
    prompt, target = prompt_of(demo, coders), logit_of(demo, coders, TOKEN)
    flows = {layer: find_flow(prompt, state, target, way) for layer, state in prompt.states.items()}
    places = [(layer, *node) for layer, flow in flows.items() for node in flow.nodes()[:n]]
    found = Edges(prompt, target, flows, way).among(places)
    return prompt, flows, places, {(a, b): weight for a, b, weight in found}


def test_nothing_gets_past_a_coder_of_the_whole_stream(demo):
    _, flows, _, found = edges_of(demo, {0: sae_of(0), 2: make("sae"), 4: sae_of(4)}, Way(0))
    assert {(a[0], b[0] if b else None) for a, b in found} == {(0, 2), (2, 4), (4, None)}
    assert not any(b is not None and b[2] < 0 for _, b in found)  # none to errors
    assert any(a[2] < 0 for a, _ in found)
    for (a, b), weight in found.items():
        if b is None:
            assert weight == pytest.approx(flows[4].of(*a[1:]))


def test_edges_pass_by_coders_of_a_part_of_the_stream(demo):
    _, _, _, found = edges_of(demo, mlp_coders(), Way(0))
    layers = {(a[0], b[0] if b else None) for a, b in found}
    assert layers == {(1, 2), (1, 3), (2, 3), (1, None), (2, None), (3, None)}


@pytest.mark.parametrize("way", [Way(0), Way(exact=True)])
def test_coders_between_are_held(demo, way):
    """Of what goes straight from layer 1 to the logit, with what later coders write held."""
    prompt, _, places, found = edges_of(demo, mlp_coders(), way)
    states, held = prompt.states, {}
    for layer in (2, 3):
        held |= replaced(states[layer].coder, np.array(states[layer].found.written))
    for place in [p for p in places if p[0] == 1 and p[2] >= 0][:4]:
        _, position, i = place
        more = float(states[1].found.codes[position, i]) * np.array(states[1].coder.direction(i))

        def value(factor: float, position=position, more=more) -> float:
            written = np.array(states[1].found.written, np.float64)
            written[position] += (factor - 1) * more
            edit = replaced(states[1].coder, written) | held
            return logits(demo, ids_of(demo), edit)[TOKEN]

        wanted = value(1) - value(0) if way.exact else (value(1 + EPS) - value(1 - EPS)) / (2 * EPS)
        assert found.get((place, None), 0.0) == pytest.approx(wanted, rel=0.05, abs=5e-3)


def test_coders_between_are_held_on_the_way_to_a_feature_too(demo):
    prompt, flows, _, found = edges_of(demo, mlp_coders(), Way(0), n=20)
    first, between, later = (prompt.states[layer] for layer in (1, 2, 3))
    held = replaced(between.coder, np.array(between.found.written))
    edges = [(a, b) for a, b in found if a[0] == 1 and a[2] >= 0 and b and b[0] == 3]
    strongest = sorted(edges, key=lambda ends: -abs(found[ends]))[:4]
    for a, b in strongest:
        ends = [
            values_of(
                later.coder,
                reads_with(demo, prompt, first, later.coder, a[1:], 1 + sign * EPS, held),
                [b[1:]],
            )[0]
            for sign in (1, -1)
        ]
        wanted = (ends[0] - ends[1]) / (2 * EPS) * flows[3].slopes[b[1:]]
        assert found[a, b] == pytest.approx(wanted, rel=0.05, abs=1e-3)
    assert abs(found[strongest[0]]) > 0.02


def test_the_weight_is_the_effect_times_the_slope_of_the_target(demo):
    coders = {2: make("sae"), 4: sae_of(4)}
    prompt, flows, _, found = edges_of(demo, coders, Way(0))
    path = Between(prompt, prompt.states[2], coders[4], [])
    checked = 0
    for (a, b), weight in found.items():
        if b is not None:
            effect = path.effects([a[1:]], [b[1:]], False, 0)[0, 0]
            assert weight == pytest.approx(effect * flows[4].slopes[b[1:]], rel=1e-3, abs=1e-5)
            checked += 1
    assert checked > 5
