import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.circuits.behavior.targets import find_target
from tests.sae.circuits.prompts import captured, ids_of, sae_of, two_saes
from tests.sae.features.coders import make


def value(demo, target, edits=None) -> float:
    (found,) = target.measure(mx.array([ids_of(demo)]), edits or {}).tolist()
    return found


def target_of(demo, *args, **options):
    return find_target(demo, two_saes(), ids_of(demo), *args, **options)


def test_logits_are_those_of_the_model(demo):
    out = np.array(demo.run([ids_of(demo)]).output[0], np.float64)
    best = int(out[-1].argmax())
    default = target_of(demo)
    assert default.node.index == best and default.node.position == len(out) - 1
    assert default.layer is None and default.text == f"logit of {demo.token_to_str(best)!r}"
    chances = np.exp(out[-1] - out[-1].max())
    assert default.node.value == pytest.approx(chances[best] / chances.sum(), rel=1e-4)
    assert value(demo, default) == pytest.approx(out[-1, best], rel=1e-5)
    assert value(demo, target_of(demo, 7, position=3)) == pytest.approx(out[3, 7], rel=1e-4)
    pair = target_of(demo, (7, 9), position=-2)
    assert value(demo, pair) == pytest.approx(out[-2, 7] - out[-2, 9], rel=1e-4)
    assert pair.node.value == 0 and pair.node.index == 7 and " − " in pair.node.label
    own = target_of(demo, metric=lambda x: x[0, -1, 7] * 2)
    assert value(demo, own) == pytest.approx(2 * out[-1, 7], rel=1e-4)


def test_tokens_are_known_by_their_text(demo):
    (at,) = demo.encode("return")[1:]
    found = target_of(demo, "return")
    assert found.node.index in (at, demo.to_str_tokens(range(4096)).index("return"))
    assert demo.token_to_str(found.node.index) == "return"
    spaced = demo.to_str_tokens(range(4096)).index(" return")
    assert target_of(demo, " return").node.index == spaced


def test_every_row_of_a_batch_has_its_own_value(demo):
    rows = mx.array([ids_of(demo)] * 2)
    scale = mx.array([1.0, 0.0])[:, None, None]
    edit = {"layers.2.resid_post": lambda x: x * scale}
    for target in (target_of(demo, 7), target_of(demo, feature=(4, 3)),
                   target_of(demo, metric=lambda x: x[0, -1, 7])):  # fmt: skip
        both = target.measure(rows, edit).tolist()
        assert both[0] == pytest.approx(value(demo, target), rel=1e-4, abs=1e-4)
        assert both[1] == pytest.approx(
            value(demo, target, {"layers.2.resid_post": lambda x: x * 0}), rel=1e-4, abs=1e-4
        )
        assert both[0] != pytest.approx(both[1], rel=1e-2)


@pytest.mark.parametrize("feature_id", [0, 25, 39])
def test_a_feature_counts_before_its_activation_function(demo, feature_id):
    for coder in (sae_of(4), make("cross-layer transcoder"), make("skip transcoder")):
        found = find_target(demo, {3: coder}, ids_of(demo), feature=(3, feature_id), position=5)
        x = captured(demo, ids_of(demo), coder.reads.names)[5]
        pre = float(coder.pre_activations(mx.array(x))[feature_id])
        assert value(demo, found) == pytest.approx(pre, rel=1e-3, abs=1e-4)
        assert found.layer == 3 and found.node.key == (
            "feature", ", ".join(coder.writes.names), feature_id, 5,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 7, "feature": (4, 1)}, "Give one of target, feature and metric"),
        ({"position": 99}, r"position must be in \[-\d+, \d+\] in a prompt of \d+ tokens, got 99"),
        ({"target": 4096}, r"target must be the id of a token, in \[0, 4095\], got 4096"),
        ({"target": -1}, "target must be the id of a token"),
        ({"target": 1.5}, "target must be a token, as text or by its id, got 1.5"),
        ({"target": True}, "target must be a token, as text or by its id, got True"),
        ({"target": (1, 2, 3)}, r"target must be a token or a pair of tokens, got \(1, 2, 3\)"),
        ({"target": (5, 5)}, r"target must be a pair of different tokens, got \(5, 5\)"),
        ({"target": ""}, r"target must be one token, got '', which is 0: \[\]"),
        ({"target": "return the"}, r"target must be one token, got 'return the', which is \d: \["),
        ({"feature": 3}, r"feature must be \(layer, feature_id\), got 3"),
        ({"feature": (9, 1)}, r"feature must be of a layer of saes, \[2, 4\], got \(9, 1\)"),
        ({"feature": (4, 40)}, r"feature_id must be in \[0, 39\], got 40"),
    ],
)
def test_a_target_that_there_is_not_is_an_error(demo, options, message):
    with pytest.raises(ValueError, match=message):
        target_of(demo, **options)


@pytest.mark.parametrize(
    ("metric", "message"),
    [(lambda x: x[0, -1], r"array of one number, got shape \(4096,\)"),
     (lambda x: 1.0, "array of one number, got 1.0")],
)  # fmt: skip
def test_a_metric_that_is_no_number_is_an_error(demo, metric, message):
    with pytest.raises(ValueError, match=message):
        value(demo, target_of(demo, metric=metric))
