import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.circuits.dataset.pathway import Pathway
from mlxterp.sae.coder import SparseCoder
from tests.sae.features.coders import KINDS, make, of_sites

EPS = 0.02
LATER = ("layers.4.resid_post",)
TEXT = "def add(a, b):\n    return a + b\n\nThe function returns"


def tokens_of(model, n: int = 2) -> np.ndarray:
    ids = model.encode(TEXT)
    return np.array([ids, ids[:1] + ids[:0:-1]][:n])


def pathway(model, kind: str = "sae", between=()) -> Pathway:
    return Pathway(model, make(kind), of_sites(LATER, LATER), between)


def value_with(path: Pathway, clean, feature: int, factor: float, target, held=()) -> float:
    """A later feature's value where an earlier one is multiplied, by edits of the model alone."""
    context, position, wanted = target
    coder, model = path.earlier, path.source
    more = (
        (factor - 1)
        * clean.codes[context, :, feature][:, None]
        * np.array(coder.direction(feature))
    )
    edit = {
        name: lambda x, name=name, part=part: (
            clean.activations[name][context : context + 1] + mx.array(more[:, part])
        )
        for name, part in coder.writes.slices.items()
    }
    edit |= {name: lambda x, name=name: clean.activations[name][context : context + 1]
             for name in held}  # fmt: skip
    captured = model.run(clean.tokens[context : context + 1], capture=LATER, edit=edit, stop=True)
    x = np.array(captured[LATER[0]][0, position], np.float64)
    return float(x @ np.array(path.later.W_enc[wanted], np.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_effects_by_gradients_are_finite_differences_of_the_model(demo, kind):
    path = pathway(demo, kind)
    clean = path.clean(tokens_of(demo))
    targets = [(0, 12, 3), (1, 9, 7), (0, 14, 21), (0, 12, 30)]
    found = path.attribute(clean, *map(np.array, zip(*targets, strict=True)))
    checked = 0
    for target, one in zip(targets, found, strict=True):
        for i in np.argsort(-np.abs(one.effects))[:3]:
            feature = int(one.features[i])
            ends = [value_with(path, clean, feature, 1 + s * EPS, target) for s in (1, -1)]
            measured = (ends[0] - ends[1]) / (2 * EPS)
            assert one.effects[i] == pytest.approx(measured, rel=0.02, abs=0.02)
            checked += abs(measured) > 0.05
    assert checked > 5


@pytest.mark.parametrize("kind", ["sae", "crosscoder", "cross-layer transcoder"])
def test_integrated_effects_add_up_to_what_all_features_do(demo, kind):
    path = pathway(demo, kind)
    clean = path.clean(tokens_of(demo))
    targets = np.array([0, 1]), np.array([12, 12]), np.array([3, 8])
    gaps = {}
    for n_steps in (0, 2, 64):
        found = path.attribute(clean, *targets, n_steps)
        gaps[n_steps] = sum(abs(one.effects.sum() - one.rise) for one in found)
    rise = sum(abs(one.rise) for one in found)
    assert rise > 0.1
    assert gaps[64] < 0.02 * rise < gaps[0]


def test_the_rise_is_what_is_lost_when_all_features_are_taken_out(demo):
    path = pathway(demo)
    clean = path.clean(tokens_of(demo))
    (one,) = path.attribute(clean, np.array([0]), np.array([12]), np.array([3]))
    z = path.earlier.encode(clean.activations["layers.2.resid_post"])
    z = z * (mx.arange(z.shape[1]) > 0)[:, None]  # the first token is special
    left = {"layers.2.resid_post": lambda x: x - z[:1] @ path.earlier.W_dec}
    values = []
    for edit in ({}, left):
        x = demo.run(clean.tokens[:1], capture=LATER, edit=edit, stop=True)[LATER[0]]
        values.append(float(x[0, 12] @ path.later.W_enc[3]))
    assert one.rise == pytest.approx(values[0] - values[1], rel=1e-3)


def test_features_at_special_tokens_have_no_effect(demo):
    clean = pathway(demo).clean(tokens_of(demo))
    assert not clean.codes[:, 0].any() and clean.codes[:, 1:].any(axis=-1).all()


def test_nothing_gets_past_a_coder_between(demo):
    between = of_sites(("layers.3.mlp_in",), ("layers.3.mlp_out",))
    target = (0, 12, 3)
    arrays = [np.array([number]) for number in target]
    plain, past = pathway(demo), pathway(demo, between=[between])
    clean = past.clean(tokens_of(demo))
    (one,), (whole,) = past.attribute(clean, *arrays), plain.attribute(clean, *arrays)
    assert not np.allclose(one.effects, whole.effects, rtol=0.05)
    i = int(np.argmax(np.abs(one.effects)))
    ends = [
        value_with(past, clean, int(one.features[i]), 1 + s * EPS, target, ("layers.3.mlp_out",))
        for s in (1, -1)
    ]
    assert one.effects[i] == pytest.approx((ends[0] - ends[1]) / (2 * EPS), rel=0.02)


def test_what_is_lost_is_that_of_an_intervention(demo):
    path = pathway(demo)
    clean = path.clean(tokens_of(demo))
    active = [int(np.abs(codes[1:10]).sum(axis=0).argmax()) for codes in clean.codes]
    lost = path.losses(clean, np.array([12, 12]), np.array([3, 8]), np.array(active), 0.25)
    for context, (feature, wanted) in enumerate(zip(active, (3, 8), strict=True)):
        target = context, 12, wanted
        values = [value_with(path, clean, feature, factor, target) for factor in (1, 0.25)]
        assert lost[context] == pytest.approx(values[0] - values[1], rel=1e-2, abs=1e-3)
    assert np.abs(lost).max() > 0.05


def test_many_targets_of_one_context_are_kept_apart(demo):
    path = pathway(demo)
    clean = path.clean(tokens_of(demo))
    n = 40  # more than are differentiated at once
    positions = 1 + np.arange(n) % 14
    together = path.attribute(clean, np.arange(n) % 2, positions, np.arange(n))
    for i in (0, 17, 39):
        (alone,) = path.attribute(clean, *(np.array([x]) for x in (i % 2, positions[i], i)))
        np.testing.assert_allclose(together[i].effects, alone.effects, rtol=1e-4, atol=1e-5)


def test_encoder_rows_of_several_blocks_stand_at_their_columns(demo):
    later = make("cross-layer transcoder")
    rows = np.array(Pathway(demo, make("sae"), later).encoders(np.array([0, 39])))
    assert rows.shape == (2, 256)
    assert not rows[0, 128:].any() and not rows[1, :128].any()
    x = mx.random.normal((3, 256))
    pre = np.array(later.pre_activations(x))[:, [0, 39]]
    np.testing.assert_allclose(
        np.array(x) @ rows.T + np.array(later.b_enc)[[0, 39]], pre, rtol=1e-4, atol=1e-5
    )
    assert isinstance(later, SparseCoder)
