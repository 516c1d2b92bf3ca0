"""The engine: swapped classes, nesting, threads, generators, copies."""

import copy
import pickle
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxterp.hooks import Hooks
from mlxterp.model import InterpretableModel
from tests.tiny_models import build

TOKENS = mx.array([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"))


def watched(module, change):
    hooks = Hooks()
    hooks.add_after(module, change)
    return hooks


def test_only_the_hooked_module_changes_class_and_only_while_open(model):
    block, other = model.model.layers[0], model.model.layers[1]
    original = type(block)
    with watched(block, lambda x: x):
        assert type(block) is not original
        assert isinstance(block, original)
        assert type(block).__name__ == original.__name__
        assert type(other) is original
    assert type(block) is original


def test_hooks_that_open_twice_close_with_the_last(model):
    block = model.model.layers[0]
    original = type(block)
    first, second = watched(block, lambda x: x), watched(block, lambda x: x)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert type(block) is not original
    second.__exit__()
    assert type(block) is original


def test_before_hooks_see_and_change_arguments():
    layer = nn.Linear(3, 3)
    x = mx.ones((2, 3))
    hooks = Hooks()
    hooks.add_before(layer, lambda args, kwargs: ((args[0] * 2,), kwargs))
    hooks.add_before(layer, lambda args, kwargs: ((args[0] + 1,), kwargs))
    expected = layer(x * 2 + 1)
    with hooks:
        assert mx.array_equal(layer(x), expected)


def test_nested_edits_compose_and_the_outer_stays(model):
    plain = model(TOKENS)
    with watched(model.model.layers[0], lambda x: x * 2):
        outer = model(TOKENS)
        both = model.run(TOKENS, edit={"layers.1": lambda x: x + 1}).output
        assert mx.array_equal(model(TOKENS), outer)
    alone = model.run(TOKENS, edit={"layers.1": lambda x: x + 1}).output
    together = model.run(
        TOKENS, edit={"layers.0": lambda x: x * 2, "layers.1": lambda x: x + 1}
    ).output
    assert mx.array_equal(both, together)
    assert not mx.allclose(both, alone)
    assert not mx.allclose(outer, plain)
    assert mx.array_equal(model(TOKENS), plain)


def test_the_dry_run_is_blind_to_hooks_that_are_open():
    inner = InterpretableModel(build("llama"))
    with watched(inner.model.layers[0], lambda x: x[..., :1]):
        shape = inner.sites()[inner.site(0, "resid_post")].shape
    assert shape == ("B", "S", 32)


def test_exceptions_restore_the_class_and_name_the_site(model):
    block = model.model.layers[1]
    original = type(block)

    def fail(x):
        raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError) as caught:
        model.run(TOKENS, edit={"layers.1": fail})
    assert caught.value.__notes__ == ["while editing layers.1.resid_post (prefill, step 0)"]
    assert type(block) is original
    with pytest.raises(KeyError, match="mine"), model.trace(TOKENS):
        raise KeyError("mine")
    assert type(block) is original


def test_threads_mix_edits_traces_and_plain_passes(model):
    plain = model(TOKENS)
    zeroed = model.run(TOKENS, edit={"layers.1": mx.zeros_like}).output
    mx.eval(plain, zeroed)
    errors = []

    def work(kind):
        try:
            for _ in range(40):
                if kind == 0:
                    got = model.run(TOKENS, edit={"layers.1": mx.zeros_like}).output
                    ok = mx.array_equal(got, zeroed).item()
                elif kind == 1:
                    with model.trace(TOKENS) as trace:
                        kept = model.layers[2].output.save()
                    ok = mx.array_equal(trace.output, plain).item() and kept.shape == (1, 4, 32)
                else:
                    ok = mx.array_equal(model(TOKENS), plain).item()
                if not ok:
                    errors.append(kind)
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=work, args=(i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all("_original_class" not in vars(type(m)) for _, m in model.named_modules())


def test_a_plain_pass_in_another_thread_does_not_see_an_open_edit(model):
    plain = model(TOKENS)
    mx.eval(plain)
    seen = []
    with watched(model.model.layers[1], mx.zeros_like):
        thread = threading.Thread(
            target=lambda: seen.append(mx.array_equal(model(TOKENS), plain).item())
        )
        thread.start()
        thread.join()
        assert not mx.allclose(model(TOKENS), plain)
    assert seen == [True]


def test_parameters_and_gradients_work_while_every_module_is_hooked(model):
    def loss(module):
        return module(TOKENS).square().sum()

    names = [name for name, _ in tree_flatten(model.parameters())]
    expected = nn.value_and_grad(model.model, loss)(model.model)[1]
    hooks = Hooks()
    for _, module in model.named_modules():
        hooks.add_after(module, lambda x: x)
    with hooks:
        assert [name for name, _ in tree_flatten(model.parameters())] == names
        found = nn.value_and_grad(model.model, loss)(model.model)[1]
    for (_, a), (_, b) in zip(tree_flatten(expected), tree_flatten(found), strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_made_while_hooked_are_of_the_model_itself(duplicate):
    layer = nn.Linear(3, 3)
    with watched(layer, mx.zeros_like):
        twin = duplicate(layer)
        assert type(twin) is nn.Linear
        assert not mx.array_equal(twin(mx.ones((1, 3))), mx.zeros((1, 3)))
    assert mx.array_equal(twin.weight, layer.weight)
    assert twin is not layer


def test_functions_of_mlx_are_replaced_while_hooks_are_open_in_this_context():
    x = mx.array([[3.0, 4.0]])
    original, plain = mx.fast.rms_norm, mx.fast.rms_norm(x, None, 0.0)
    double, more, found = Hooks(), Hooks(), []
    double.add_around("rms_norm", lambda function, *args: function(*args) * 2)
    more.add_around("rms_norm", lambda function, *args: function(*args) + 1)
    with double:
        with more:
            assert mx.array_equal(mx.fast.rms_norm(x, None, 0.0), plain * 2 + 1)
        assert mx.array_equal(nn.RMSNorm(2, eps=1e-12)(x), plain * 2)
        thread = threading.Thread(
            target=lambda: found.append(mx.fast.rms_norm(x, None, 0.0).tolist())
        )
        thread.start()
        thread.join()
    assert found == [plain.tolist()]
    assert mx.fast.rms_norm is original
    with pytest.raises(ValueError, match="function must be one of rms_norm.*'tanh'"):
        Hooks().add_around("tanh", print)


def test_a_module_is_called_around_also_where_it_fails():
    layer, seen = nn.Linear(3, 3), []

    def around(function, *args):
        try:
            return function(*args) * 2
        finally:
            seen.append(len(args))

    hooks = Hooks()
    hooks.add_around(layer, around)
    expected = layer(mx.ones((1, 3))) * 2
    with hooks:
        assert mx.array_equal(layer(mx.ones((1, 3))), expected)
        with pytest.raises(ValueError):
            layer(mx.ones((1, 4)))
    assert seen == [1, 1]
