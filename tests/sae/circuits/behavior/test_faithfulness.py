import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.circuits.behavior.behavior import find_behavior_circuit
from tests.sae.circuits.prompts import OTHER, TEXT, captured, directions, ids_of, logits, sae_of
from tests.sae.features.coders import make

TOKEN = 65


def behavior_of(demo, coders=None, **options):
    coders = coders or {2: make("sae"), 4: sae_of(4)}
    options = {"target": TOKEN, "n_nodes": 5, "verbose": False} | options
    return find_behavior_circuit(demo, coders, TEXT, **options).origin


@pytest.fixture(scope="module")
def behavior(demo):
    return behavior_of(demo)


def everything(behavior):
    """The circuit of all features that fire, those without effect as well."""
    places = [
        (layer, *node)
        for layer, state in behavior.prompt.states.items()
        for node in np.argwhere(np.array(state.found.codes)).tolist()
    ]
    circuit = behavior.circuit([*behavior.ranking[:1]])
    nodes = (*(behavior._node(place) for place in places), circuit.nodes[-1])
    return replace(circuit, nodes=nodes, edges=())


def nothing(behavior):
    circuit = behavior.circuit([*behavior.ranking[:1]])
    return replace(circuit, nodes=circuit.nodes[-1:], edges=())


def test_the_value_is_that_of_the_plain_model(demo, behavior):
    plain = demo.run([ids_of(demo)]).output[0, -1, TOKEN]
    assert behavior.restoration.value == float(plain.astype(mx.float32))


@pytest.mark.parametrize("options", [{}, {"corrupted": OTHER}, {"mean_of": [OTHER, "import os"]}])
def test_all_features_restore_all_and_none_nothing(demo, options):
    behavior = behavior_of(demo, **options)
    whole, none = everything(behavior), nothing(behavior)
    # Under a mean, features that do not fire have to be kept as well.
    every = {
        (layer, position, i)
        for layer, state in behavior.prompt.states.items()
        for position, i in np.ndindex(*state.found.codes.shape)
    }
    assert behavior.restoration.share(every, "kept") == 1
    assert behavior.restoration.share(every, "kept", complement=True) == 0
    assert behavior.faithfulness(none) == 0 and behavior.completeness(none) == 1
    if not options:
        assert behavior.faithfulness(whole) == pytest.approx(1, abs=0.02)


def test_faithfulness_is_that_of_a_run_with_the_circuits_features_alone(demo):
    coder = make("sae")
    behavior = behavior_of(demo, {2: coder})
    circuit = behavior.circuit([p for p in behavior.ranking[:12] if p[2] >= 0])
    ids = ids_of(demo)
    x = captured(demo, ids, coder.reads.names)
    z = np.array(coder.encode(mx.array(x)))
    z[0] = 0
    keep = np.zeros(z.shape, bool)
    for node in circuit.nodes[:-1]:
        keep[node.position, node.index] = True

    def value(kept: np.ndarray, errors: bool = True) -> float:
        written = x - np.where(kept, 0, z) @ directions(coder)
        if not errors:
            lost = x - z @ directions(coder) - np.array(coder.b_dec)
            lost[0] = 0
            written = written - lost
        edit = {coder.writes.names[0]: lambda _: mx.array(written[None].astype(np.float32))}
        return logits(demo, ids, edit)[TOKEN]

    plain = logits(demo, ids)[TOKEN]
    none, all_of_it = np.zeros(z.shape, bool), np.ones(z.shape, bool)
    for errors in ("kept", "removed"):
        kept = errors == "kept"
        rise = plain - value(none, kept)
        faithful = (value(keep, kept) - value(none, kept)) / rise
        complete = (value(all_of_it & ~keep, kept) - value(none, kept)) / rise
        assert behavior.faithfulness(circuit, errors) == pytest.approx(faithful, rel=0.02, abs=1e-3)
        assert behavior.completeness(circuit, errors) == pytest.approx(complete, rel=0.02, abs=1e-3)
    assert circuit.facts["faithfulness"] == behavior.faithfulness(circuit)
    assert circuit.facts["completeness"] == behavior.completeness(circuit)


def test_errors_may_be_nodes(demo):
    behavior = behavior_of(demo, {2: make("sae")}, errors="nodes", corrupted=OTHER)
    places = [place for place in behavior.ranking if place[2] < 0]
    assert places
    ranked = behavior.circuit([*behavior.ranking])
    assert ranked.facts["errors"] == "nodes"
    assert ranked.facts["faithfulness"] == pytest.approx(1, abs=0.02)
    features = behavior.circuit([p for p in behavior.ranking if p[2] >= 0])
    assert features.facts["faithfulness"] != pytest.approx(1, abs=0.02)
    assert behavior.faithfulness(features, "kept") == pytest.approx(1, abs=0.02)
    small = behavior.minimal(0.9)
    assert small.facts["faithfulness"] >= 0.9
    assert small.facts["explained"] == pytest.approx(
        sum(n.effect for n in small.nodes[:-1]) / behavior.flows[2].rise
    )


@pytest.mark.parametrize("by", ["size", "effect"])
@pytest.mark.parametrize("wanted", [0.5, 0.9])
def test_a_minimal_circuit_has_what_it_claims_and_one_node_less_has_not(behavior, by, wanted):
    found = behavior.minimal(wanted, by=by)
    assert found.facts["faithfulness"] >= wanted
    assert len(found.nodes) - 1 == found.facts["n_nodes"]
    assert 2 <= found.facts["n_runs"] <= 2 + math.ceil(math.log2(len(behavior.ranking)))
    less = replace(found, nodes=found.nodes[:-2] + found.nodes[-1:], edges=())
    assert behavior.faithfulness(less) < wanted
    if by == "effect":
        sign = np.sign(behavior.restoration.whole("kept"))
        effects = [sign * node.effect for node in found.nodes[:-1]]
        assert effects == sorted(effects, reverse=True)
    else:
        order = [behavior.shares[p] for p in behavior.ranking if p[2] >= 0]
        shares = [node.influence for node in found.nodes[:-1]]
        assert shares == order[: len(shares)]


@pytest.mark.parametrize("options", [{}, {"factor": 0.5}])
def test_validation_of_nodes_is_what_edits_of_the_model_do(demo, behavior, options):
    circuit = behavior.circuit([*behavior.ranking[:20]])
    found = behavior.validate(circuit, n=5, **options)
    factor = options.get("factor", 0.0)
    assert found.method == ("taken out" if not options else "multiplied by 0.5")
    plain = logits(demo, ids_of(demo))[TOKEN]
    for number, predicted, measured in zip(
        found.nodes, found.predicted, found.measured, strict=True
    ):
        node = circuit.nodes[number]
        assert predicted == pytest.approx((1 - factor) * node.effect)
        coder = behavior.prompt.states[int(node.site[7])].coder
        x = captured(demo, ids_of(demo), coder.reads.names)
        x[node.position] -= (1 - factor) * node.value * np.array(coder.direction(node.index))
        edit = {node.site: lambda _, x=x: mx.array(x[None])}
        lost = plain - logits(demo, ids_of(demo), edit)[TOKEN]
        assert measured == pytest.approx(lost, rel=1e-2, abs=2e-3)
    sizes = np.abs(found.predicted)
    assert len(sizes) == 5 and (np.diff(sizes) <= 1e-9).all()
    shown = circuit.validate(n=5, **options)
    assert shown.names == tuple(row[0] for row in shown.table().rows)
    assert repr(shown).startswith("5 nodes, ")


def test_validation_of_edges_counts_those_of_features_alone(behavior):
    circuit = behavior.circuit([*behavior.ranking[:30]])
    found = behavior.validate(circuit, n=8, of="edges")
    assert len(found.edges) == 8 and not found.nodes
    for i, predicted in zip(found.edges, found.predicted, strict=True):
        assert predicted == pytest.approx(circuit.edges[i].weight)
        assert circuit.nodes[circuit.edges[i].source].kind == "feature"
    assert (found.measured != 0).all()


def test_what_does_not_depend_on_features_has_no_faithfulness(demo):
    behavior = behavior_of(demo, metric=lambda x: mx.array(3.0) + 0 * x[0, -1, 0], target=None)
    circuit = behavior.circuit([])
    assert math.isnan(circuit.facts["faithfulness"]) and math.isnan(circuit.facts["explained"])
    assert circuit.facts["gap"] == 0 and not behavior.ranking
    with pytest.raises(ValueError, match="nan, or less"):
        behavior.minimal()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, c: b.faithfulness(c, "some"), r"errors must be one of \['kept', 'nodes', 'remo"),
        (lambda b, c: b.minimal(by="age"), r"by must be one of \['size', 'effect'\], got 'age'"),
        (lambda b, c: b.minimal(7.0), r"and errors have together, \d\.\d+, or less, got 7"),
        (lambda b, c: b.minimal(0), "faithfulness must be > 0, got 0"),
        (lambda b, c: b.validate(c, of="all"), r"of must be one of \['nodes', 'edges'\], got 'a"),
        (lambda b, c: b.validate(c, n=0), "n must be >= 1, got 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_an_error(behavior, call, message):
    with pytest.raises(ValueError, match=message):
        call(behavior, behavior.circuit([*behavior.ranking[:5]]))


def test_a_circuit_of_something_else_is_an_error(demo, behavior):
    other = behavior_of(demo, {3: sae_of(3)})
    with pytest.raises(ValueError, match="circuit must be one of logit of .* here, it has Node"):
        behavior.faithfulness(other.circuit([*other.ranking[:3]]))
