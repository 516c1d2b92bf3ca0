from dataclasses import replace

import numpy as np
import pytest

from mlxterp.sae import SAEConfig, SAETrainer
from mlxterp.sae.circuits.between import find_feature_circuits

QUICK = {"n_steps": 3, "n_tokens": 4, "max_tokens": 1500, "verbose": False}


def trained(model, texts, layer: int, component: str = "residual"):
    config = SAEConfig(expansion_factor=2, k=8, learning_rate=3e-3, num_epochs=2)
    return SAETrainer.train(
        model=model, layer=layer, component=component, dataset=texts, config=config, verbose=False
    )


@pytest.fixture(scope="module")
def saes(model, texts):
    return {layer: trained(model, texts[:12], layer) for layer in (1, 3, 5)}


@pytest.fixture(scope="module")
def circuit(model, saes, texts):
    return find_feature_circuits(model, saes, dataset=texts[:8], top_k=20, **QUICK)


def test_the_strongest_edges_connect_neighbouring_layers(circuit, saes):
    assert circuit.levels == tuple(f"layers.{layer}.resid_post" for layer in saes)
    edges = [edge for edge in circuit.edges if circuit.nodes[edge.source].kind == "feature"]
    assert len(edges) == 20
    sizes = [abs(edge.weight) for edge in edges]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    for edge in edges:
        levels = [circuit.levels.index(circuit.nodes[i].site) for i in (edge.source, edge.target)]
        assert levels[1] == levels[0] + 1  # nothing gets past a coder of the whole stream
        assert 0 < edge.share <= 1 and 0.5 <= edge.consistency <= 1 and 1 <= edge.n <= 4


def test_errors_are_shown_for_every_target(circuit):
    targets = {edge.target for edge in circuit.edges}
    of_errors = [e for e in circuit.edges if circuit.nodes[e.source].kind == "error"]
    assert {edge.target for edge in of_errors} == targets and len(of_errors) == len(targets)


def test_all_features_explain_what_they_add(circuit):
    assert 0 < circuit.facts["explained"] < 1.2
    assert circuit.facts["all_features"] == pytest.approx(1, abs=0.1)


def test_predicted_effects_are_those_of_interventions(circuit):
    found = circuit.validate(n=20)
    assert found.correlation > 0.9 and len(found.edges) == 20
    half = circuit.validate(n=20, factor=0.5)
    np.testing.assert_allclose(half.predicted, found.predicted / 2)
    assert half.correlation > 0.9


def test_ablation_measures_what_it_lists(model, saes, texts):
    two = {layer: saes[layer] for layer in (1, 3)}
    found = find_feature_circuits(
        model, two, dataset=texts[:8], top_k=8, method="ablation", **QUICK
    )
    edges = [edge for edge in found.edges if found.nodes[edge.source].kind == "feature"]
    assert [edge.measured for edge in edges] == [edge.weight for edge in edges]
    np.testing.assert_allclose(found.validate().measured, found.validate().predicted, rtol=1e-4)


def test_named_targets_are_the_only_ones(model, saes, texts):
    data = saes[3].collect(texts[:8], verbose=False)
    wanted = np.argsort(-data.firing_counts)[:2].tolist()
    found = find_feature_circuits(
        model, saes, 1, 3, dataset=texts[:8], target_features={3: wanted}, method="gradient",
        **QUICK,
    )  # fmt: skip
    targets = {found.nodes[edge.target].index for edge in found.edges}
    assert targets <= set(wanted) and found.levels[-1] == "layers.3.resid_post"
    with pytest.raises(ValueError, match=r"feature_id must be in \[0, 255\], got 999"):
        find_feature_circuits(
            model, saes, 1, 3, dataset=texts[:8], target_features={3: [999]}, **QUICK
        )


def test_effects_pass_by_coders_of_a_part_of_the_stream(model, texts):
    saes = {layer: trained(model, texts[:6], layer, "mlp") for layer in (1, 2, 3)}
    found = find_feature_circuits(model, saes, dataset=texts[:6], top_k=200, **QUICK)
    steps = {
        found.levels.index(found.nodes[edge.target].site)
        - found.levels.index(found.nodes[edge.source].site)
        for edge in found.edges
    }
    assert steps == {1, 2}
    assert found.validate(n=50).correlation > 0.9


def test_a_model_may_be_left_out_by_coders_that_know_it(saes, texts):
    found = find_feature_circuits(saes=saes, dataset=texts[:4], source_layer=3, top_k=3, **QUICK)
    assert len(found.levels) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_layer": 2}, r"source_layer must be a layer that saes holds, \[1, 3, 5\], got 2"),
        ({"target_layer": 9}, "target_layer must be a layer that saes holds"),
        ({"source_layer": 5, "target_layer": 1}, "source_layer must be before target_layer"),
        ({"method": "magic"}, "method must be one of"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"dataset": None}, "dataset must be texts"),
        ({"dataset": []}, "empty"),
    ],
)
def test_what_does_not_fit_is_an_error(model, saes, texts, change, message):
    with pytest.raises(ValueError, match=message):
        find_feature_circuits(**({"model": model, "saes": saes, "dataset": texts[:4]} | change))


def test_coders_that_do_not_fit_are_an_error(model, saes, texts):
    with pytest.raises(ValueError, match=r"two layers or more, got \[1\]"):
        find_feature_circuits(model, {1: saes[1]}, dataset=texts[:4])
    with pytest.raises(ValueError, match="reads .*layers.1.* does not compute"):
        find_feature_circuits(model, {1: saes[3], 3: saes[1]}, dataset=texts[:4])
    stranger = trained(model, texts[:4], 3)
    stranger.metadata = replace(
        stranger.metadata, model=stranger.metadata.model | {"fingerprint": "x"}
    )
    with pytest.raises(ValueError, match="layer 3 does not fit the model: .*other weights"):
        find_feature_circuits(model, {1: saes[1], 3: stranger}, dataset=texts[:4])
