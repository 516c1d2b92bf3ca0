"""The built-in edits."""

import itertools

import mlx.core as mx
import pytest

from mlxterp import interventions as iv
from mlxterp.sites import Site
from mlxterp.tracing import EditContext

X = mx.arange(24, dtype=mx.float32).reshape(1, 4, 6) - 7


def test_values():
    assert mx.array_equal(iv.zero_out(X), X * 0)
    assert mx.array_equal(iv.scale(0.5)(X), X / 2)
    assert mx.array_equal(iv.add_vector(mx.arange(6))(X), X + mx.arange(6))
    assert mx.array_equal(iv.clamp(-2, 3)(X), mx.clip(X, -2, 3))
    assert iv.clamp(min_val=0)(X).min() == 0
    assert iv.clamp(max_val=0)(X).max() == 0


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_dtype_and_shape_are_kept(dtype):
    x = X.astype(dtype)
    full = mx.ones((6,), dtype=mx.float32)
    for edit in (iv.zero_out, iv.scale(1.5), iv.add_vector(full), iv.replace_with(1.0),
                 iv.replace_with(full), iv.clamp(-1.0, 1.0), iv.noise(0.3)):  # fmt: skip
        assert (edit(x).dtype, edit(x).shape) == (dtype, x.shape)


def test_replace_with():
    assert mx.all(iv.replace_with(2.5)(X) == 2.5)
    assert mx.array_equal(iv.replace_with(X * 2)(X), X * 2)
    assert mx.array_equal(iv.replace_with(X[0, 0])(X), mx.broadcast_to(X[0, 0], X.shape))
    short, long = X[:, :2] + 100, mx.concatenate([X + 100, X + 200], axis=1)
    end = iv.replace_with(short)(X)
    assert mx.array_equal(end[:, :2], X[:, :2])
    assert mx.array_equal(end[:, 2:], short)
    start = iv.replace_with(short, align="start")(X)
    assert mx.array_equal(start[:, :2], short)
    assert mx.array_equal(start[:, 2:], X[:, 2:])
    assert mx.array_equal(iv.replace_with(long)(X), X + 200)
    assert mx.array_equal(iv.replace_with(long, align="start")(X), X + 100)
    with pytest.raises(ValueError, match="needs 4 positions: the value has 2"):
        iv.replace_with(short, align="strict")(X)
    with pytest.raises(ValueError, match="align must be 'end', 'start' or 'strict', not 'middle'"):
        iv.replace_with(1.0, align="middle")


def test_noise_follows_its_seed_and_the_step():
    mx.random.seed(0)
    first = iv.noise(0.1, seed=3)(X)
    assert mx.array_equal(iv.noise(0.1, seed=3)(X), first)
    assert not mx.array_equal(iv.noise(0.1, seed=4)(X), first)
    later = iv.noise(0.1, seed=3)(X, EditContext(Site(0, "mlp"), mx.arange(4), step=1))
    assert not mx.array_equal(later, first)
    big = iv.noise(0.5)(mx.zeros((100, 100)))
    assert abs(big.std().item() - 0.5) < 0.02
    with pytest.raises(ValueError, match="std must be at least 0, not -1"):
        iv.noise(-1)


def test_clamp_needs_a_bound():
    with pytest.raises(ValueError, match="clamp needs min_val, max_val or both"):
        iv.clamp()


def test_composition_goes_left_to_right():
    both = iv.compose().add(iv.scale(2.0)).add(iv.clamp(max_val=3)).build()
    assert mx.array_equal(both(X), mx.minimum(X * 2, 3))
    assert iv.compose is iv.InterventionComposer
    assert mx.array_equal(iv.compose().build()(X), X)
    with pytest.raises(TypeError, match="must be a function, not int"):
        iv.compose().add(3)


def test_a_composition_passes_the_context_on():
    context = EditContext(Site(2, "mlp"), mx.arange(4))
    composed = iv.compose().add(iv.scale(2.0)).add(lambda x, context: x + context.layer).build()
    assert iv.takes_context(composed)
    assert mx.array_equal(composed(X, context), X * 2 + 2)


def test_built_later_functions_do_not_join_a_built_composition():
    composer = iv.compose().add(iv.scale(2.0))
    built = composer.build()
    composer.add(iv.zero_out)
    assert mx.array_equal(built(X), X * 2)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x, False),
        (lambda x, context: x, True),
        (lambda x, where: x, True),
        (lambda x, factor=2: x, False),
        (lambda x, context=None: x, True),
        (lambda x, *rest, **more: x, False),
        (mx.tanh, False),
        (iv.zero_out, False),
    ],
)
def test_which_functions_take_the_context(function, expected):
    assert iv.takes_context(function) is expected


def test_a_strict_replacement_of_one_position_is_not_broadcast():
    assert mx.array_equal(iv.replace_with(X[:, :1])(X), mx.broadcast_to(X[:, :1], X.shape))
    with pytest.raises(ValueError, match="needs 4 positions: the value has 1"):
        iv.replace_with(X[:, :1], align="strict")(X)


def test_noise_is_another_at_every_site_and_position():
    add = iv.noise(1.0, seed=3)
    contexts = [
        EditContext(Site(0, "mlp"), mx.arange(4)),
        EditContext(Site(1, "mlp"), mx.arange(4)),
        EditContext(Site(0, "mlp"), mx.arange(4, 8)),
        EditContext(Site(0, "mlp"), None, step=2),
    ]
    drawn = [add(X, context) for context in contexts]
    assert mx.array_equal(add(X, contexts[0]), drawn[0])
    assert not any(mx.allclose(a, b) for a, b in itertools.combinations(drawn, 2))
