"""Edits that stand: `with model.editing(...)` is every use of the model with these edits."""

import threading

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.model import InterpretableModel
from mlxterp.sae.model_pair import ModelPair
from tests.tiny_models import build

TOKENS = mx.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
PROMPT = "The old man went down to the sea and"
DOUBLE, MORE = {"layers.1.mlp": lambda x: x * 2}, {"layers.1.mlp": lambda x: x + 1}
BOTH = {"layers.1.mlp": [*DOUBLE.values(), *MORE.values()]}


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"))


def push(x, context):
    """Depends on the absolute position."""
    amount = mx.where(context.positions % 3 == 0, 4.0, -1.0)[None, :, None]
    return x + amount * mx.cos(mx.arange(x.shape[-1]))


def recorder(seen):
    def note(x, context):
        where = None if context.positions is None else context.positions.tolist()
        seen.append((where, context.step, context.phase, context.prompt_end))
        return x

    return note


USES = {
    "run": lambda model, edit: model.run(TOKENS, edit=edit).output,
    "captured": lambda model, edit: model.run(TOKENS, capture="layers.1", edit=edit)["layers.1"],
    "stop": lambda m, edit: m.run(TOKENS, capture="layers.1", stop=True, edit=edit)["layers.1"],
    "trace": lambda model, edit: traced(model, edit),
    "gradients": lambda model, edit: model.gradients(
        TOKENS, "layers.0", lambda y: y.sum(), edit=edit
    ).gradients["layers.0"],
}


def traced(model, edit):
    with model.trace(TOKENS, interventions=edit):
        return model.layers[2].output.save()


@pytest.mark.parametrize("use", USES)
def test_every_use_of_the_model_has_the_edits_and_then_its_own(model, use):
    plain, one, both = (USES[use](model, edit) for edit in (None, DOUBLE, BOTH))
    assert not mx.allclose(plain, one)
    assert not mx.allclose(one, both)
    with model.editing(DOUBLE):
        assert mx.array_equal(USES[use](model, None), one)
        assert mx.array_equal(USES[use](model, MORE), both)
        with model.editing(MORE):
            assert mx.array_equal(USES[use](model, None), both)
        assert mx.array_equal(USES[use](model, None), one)
    assert mx.array_equal(USES[use](model, None), plain)


def test_plain_calls_have_them_too(model):
    plain, one, both = (USES["run"](model, edit) for edit in (None, DOUBLE, BOTH))
    classes = {type(m) for _, m in model.named_modules()}
    with model.editing(DOUBLE):
        assert mx.array_equal(model(TOKENS), one)
        assert mx.array_equal(model.model(TOKENS), one)
        assert mx.array_equal(model.model(inputs=TOKENS), one)
        with model.editing(MORE):
            assert mx.array_equal(model(TOKENS), both)
    assert mx.array_equal(model(TOKENS), plain)
    assert {type(m) for _, m in model.named_modules()} == classes


def test_sites_of_a_module_are_edited_in_the_order_of_the_data(model):
    """A sum set from outside stays what it was set to, whatever a call does with its parts."""
    outer = {"layers.1.resid_mid": mx.ones_like}
    with model.editing(outer):
        done = model.run(
            TOKENS, edit={"layers.1.attn": mx.zeros_like}, capture="layers.1.resid_mid"
        )
    assert mx.allclose(done["layers.1.resid_mid"], mx.array(1.0), atol=1e-5)


def test_a_generation_with_its_cache_is_that_with_the_edits_in_the_call(demo):
    edit = {"layers.2": push}
    expected = demo.generate(PROMPT, max_tokens=8, edit=edit).tokens
    plain = demo.generate(PROMPT, max_tokens=8).tokens
    assert expected != plain
    with demo.editing(edit):
        assert demo.generate(PROMPT, max_tokens=8, prefill_step_size=3).tokens == expected
        ids = demo.encode(PROMPT)
        for _ in range(8):
            ids.append(demo.run(ids).output[0, -1].argmax().item())
        assert ids[-8:] == expected
        own = {"layers.3.mlp": mx.zeros_like}
        together = demo.generate(PROMPT, max_tokens=8, edit=own).tokens
    assert together == demo.generate(PROMPT, max_tokens=8, edit={**edit, **own}).tokens
    assert demo.generate(PROMPT, max_tokens=8).tokens == plain


def test_mlx_lm_itself_generates_with_the_edits_at_absolute_positions(demo):
    from mlx_lm import stream_generate

    expected = demo.generate(PROMPT, max_tokens=8, edit={"layers.2": push}).tokens
    seen = []
    with demo.editing({"layers.2": [push, recorder(seen)]}):
        found = [
            piece.token
            for piece in stream_generate(
                demo.model, demo.tokenizer, demo.encode(PROMPT), max_tokens=8, prefill_step_size=4
            )
        ]
    assert found == expected
    positions = [p for where, *_ in seen for p in where]
    assert positions == list(range(len(positions)))
    assert {end for *_, end in seen} == {None}  # of a prompt in parts nobody knows the end


def test_edits_are_told_the_end_of_the_prompt_where_it_is_known(demo):
    n, seen = len(demo.encode(PROMPT)), []
    with demo.editing({"layers.0": recorder(seen)}):
        demo.run([[1, 2, 3], [4, 5]])
        demo(mx.array([[1, 2, 3]]))
        demo.generate(PROMPT, max_tokens=2, prefill_step_size=4)
    assert seen[:2] == [([0, 1, 2], 0, "prefill", 3)] * 2
    assert {end for *_, end in seen[2:]} == {n}
    assert seen[-1][2] == "decode"


def test_a_stream_keeps_the_edits_of_its_beginning(demo):
    plain = demo.generate(PROMPT, max_tokens=6).tokens
    with demo.editing({"layers.2": push}):
        edited = demo.stream(PROMPT, max_tokens=6)
        first = next(edited).token
    unedited = demo.stream(PROMPT, max_tokens=6)
    assert next(unedited).token == plain[0]
    with demo.editing({"layers.2": push}):
        assert [p.token for p in unedited] == plain[1:]
        expected = demo.generate(PROMPT, max_tokens=6).tokens
    assert [first, *(p.token for p in edited)] == expected != plain


def test_the_head_alone_is_not_edited(demo):
    hidden = mx.random.normal((3, 128), key=mx.random.key(0))
    expected = demo.unembed(hidden)
    with demo.editing({"layers.5": mx.zeros_like, "layers.0": mx.zeros_like}):
        assert mx.array_equal(demo.unembed(hidden), expected)


def test_an_edit_that_runs_the_model_runs_it_plain(model):
    plain = model.run(TOKENS, capture="layers.1")["layers.1"]
    runs = {
        "layers.1": lambda x: (
            model.run(TOKENS, capture="layers.1")["layers.1"] + model(TOKENS)[0, 0, 0]
        )
    }
    with model.editing(runs):
        found = model.run(TOKENS, capture="layers.1")["layers.1"]
    assert mx.allclose(found, plain + model(TOKENS)[0, 0, 0])


def test_exceptions_leave_the_model_as_it_was(model):
    plain = model(TOKENS)

    def fail(x):
        raise RuntimeError("not this one")

    with pytest.raises(RuntimeError, match="not this one"), model.editing({"layers.2": fail}):
        model(TOKENS)
    assert mx.array_equal(model(TOKENS), plain)
    with pytest.raises(KeyError), model.editing(DOUBLE):
        raise KeyError
    assert mx.array_equal(model(TOKENS), plain)
    with model.editing(DOUBLE):
        with pytest.raises(RuntimeError, match="not this one"):
            model.run(TOKENS, edit={"layers.2": fail})
        assert mx.array_equal(model(TOKENS), model.run(TOKENS).output)
        assert not mx.allclose(model(TOKENS), plain)


def test_other_threads_are_not_affected(model):
    plain, found = np.array(model(TOKENS)), []

    def elsewhere():
        found.extend(map(np.array, (model(TOKENS), model.run(TOKENS).output)))

    with model.editing(DOUBLE):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert not np.allclose(model(TOKENS), plain)
    assert len(found) == 2
    assert all(np.array_equal(logits, plain) for logits in found)


def test_blocks_that_close_in_another_order_leave_nothing(model):
    plain = model(TOKENS)
    first, second = model.editing(DOUBLE), model.editing(MORE)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert mx.array_equal(model(TOKENS), plain)


def test_a_function_compiled_in_the_block_has_the_edits(model):
    expected = model.run(TOKENS, edit=DOUBLE).output
    with model.editing(DOUBLE):
        for call in (model, lambda tokens: model.run(tokens).output):
            compiled = mx.compile(call)
            np.testing.assert_allclose(compiled(TOKENS), expected, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(compiled(TOKENS[:1]), expected[:1], rtol=1e-3, atol=1e-4)


def test_two_models_are_edited_at_once_and_two_wrappers_of_one_compose(model):
    other = InterpretableModel(build("gemma2"))
    again = InterpretableModel(model.model)
    alone, expected = other(TOKENS), other.run(TOKENS, edit=MORE).output
    one, both = model.run(TOKENS, edit=DOUBLE).output, model.run(TOKENS, edit=BOTH).output
    with model.editing(DOUBLE), other.editing(MORE):
        assert mx.array_equal(other(TOKENS), expected)
        assert mx.array_equal(model(TOKENS), one)
        assert mx.array_equal(again.run(TOKENS, edit=MORE).output, both)
    assert mx.array_equal(other(TOKENS), alone)


def test_a_site_that_no_model_has_is_an_error_at_once(model):
    with pytest.raises(ValueError, match="no layer 77"), model.editing({"layers.77": mx.abs}):
        pass
    with pytest.raises(TypeError, match="must be given as"), model.editing(mx.abs):
        pass


def test_a_pair_edits_the_models_that_sites_name():
    pair = ModelPair([InterpretableModel(build("llama")), InterpretableModel(build("llama"))])
    base, tuned = pair.models.values()
    plain = base(TOKENS), tuned(TOKENS)
    edited = tuned.run(TOKENS, edit=DOUBLE).output
    with pair.editing({"tuned:layers.1.mlp": lambda x: x * 2}):
        assert mx.array_equal(base(TOKENS), plain[0])
        assert mx.array_equal(tuned(TOKENS), edited)
        captured = pair.run(TOKENS, capture=["base:layers.2", "tuned:layers.2"])
        found = captured.outputs
    assert mx.array_equal(found["base"], plain[0])
    assert mx.array_equal(found["tuned"], edited)
    assert mx.array_equal(tuned(TOKENS), plain[1])
    with pytest.raises(ValueError, match="does not say of which model"), pair.editing(DOUBLE):
        pass


def test_a_pair_differentiates_and_generates_with_one_of_its_models(demo):
    pair = ModelPair([InterpretableModel(build("llama"), demo.tokenizer) for _ in range(2)])
    tuned = pair.models["tuned"]
    found = pair.gradients(
        TOKENS, ["tuned:layers.1"], lambda y: y.sum(), edit={"tuned:layers.0": mx.abs}
    )
    expected = tuned.gradients(TOKENS, ["layers.1"], lambda y: y.sum(), edit={"layers.0": mx.abs})
    assert mx.array_equal(found.gradients["tuned:layers.1"], expected.gradients["layers.1"])
    with pytest.raises(ValueError, match="gradients is of one model"):
        pair.gradients(TOKENS, ["tuned:layers.1", "base:layers.1"], lambda y: y.sum())
    edit = {"layers.1": push}
    done = pair.generate([1, 2, 3], max_tokens=4, edit={"tuned:layers.1": push})
    assert done.tokens == tuned.generate([1, 2, 3], max_tokens=4, edit=edit).tokens
    plain = pair.generate([1, 2, 3], max_tokens=4).tokens
    assert plain == pair.models["base"].generate([1, 2, 3], max_tokens=4).tokens != done.tokens
    with pytest.raises(ValueError, match="generate is of one model"):
        pair.generate([1], edit={"tuned:layers.1": push, "base:layers.1": push})
    assert pair.decode([300, 301]) == demo.decode([300, 301])
