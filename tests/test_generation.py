"""Generation with edits and captures through the key-value cache."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.hooks import Hooks
from mlxterp.model import InterpretableModel
from tests.pages import checked
from tests.tiny_models import build

PROMPT = "The old man went down to the sea and"
N = 12


@pytest.fixture(scope="module")
def demo():
    return InterpretableModel.demo()


def steer(x, context):
    """Pushes by an amount that depends on the absolute position."""
    push = mx.where(context.positions % 3 == 0, 4.0, -1.0)[None, :, None]
    return x + push * mx.cos(mx.arange(x.shape[-1]))


def greedy(model, ids, count, **kwargs):
    """What a generation must give, recomputed from the start at every step, without a cache."""
    ids = list(ids)
    for _ in range(count):
        ids.append(model.run(ids, **kwargs).output[0, -1].argmax().item())
    return ids


def test_a_plain_generation_is_the_greedy_one(demo):
    done = demo.generate(PROMPT, max_tokens=N)
    ids = demo.encode(PROMPT)
    assert done.prompt_tokens == ids
    assert ids + done.tokens == greedy(demo, ids, N)
    assert done.text == str(done) == demo.decode(done.tokens).lstrip()


def test_a_generation_shows_its_text_and_what_it_captured(demo):
    done = demo.generate(PROMPT, max_tokens=3, capture="layers.2")
    n = len(done.prompt_tokens)
    assert repr(done) == f"Generation({done.text!r}, 3 tokens after {n})"
    page = checked(done._repr_html_())
    assert done.text in page.text and f"[1, {n + 3}, 128]" in page.text


@pytest.mark.parametrize("prefill", [2048, 3])
@pytest.mark.parametrize(
    "site", ["layers.2", "layers.3.mlp", "layers.3.resid_mid", "layers.4.resid_pre"]
)
def test_a_steered_generation_equals_its_recomputation(demo, site, prefill):
    done = demo.generate(PROMPT, max_tokens=N, edit={site: steer}, prefill_step_size=prefill)
    expected = greedy(demo, done.prompt_tokens, N, edit={site: steer})
    assert done.prompt_tokens + done.tokens == expected
    assert done.tokens != demo.generate(PROMPT, max_tokens=N).tokens


@pytest.mark.parametrize("prefill", [2048, 3])
def test_captures_cover_the_prompt_and_every_token(demo, prefill):
    sites = ["layers.2", "layers.3.resid_mid", "layers.1.self_attn.rope"]
    done = demo.generate(PROMPT, max_tokens=N, capture=sites, edit={"layers.1": steer},
                         prefill_step_size=prefill)  # fmt: skip
    ids = done.prompt_tokens + done.tokens
    assert done.captured.tokens.tolist() == [ids]
    full = demo.run(ids, capture=sites, edit={"layers.1": steer})
    for site in sites:
        assert done.captured[site].shape == full[site].shape
        np.testing.assert_allclose(done.captured[site], full[site], rtol=1e-3, atol=2e-4)


def test_edits_are_told_where_they_are(demo):
    seen = []

    def note(x, context):
        seen.append((context.positions.tolist(), context.step, context.phase))
        return x

    length = len(demo.encode(PROMPT))
    demo.generate(PROMPT, max_tokens=3, edit={"layers.0": note}, prefill_step_size=4)
    positions = [p for where, _, _ in seen for p in where]
    assert positions == list(range(len(positions)))
    assert len(positions) >= length + 2
    for where, step, phase in seen:
        assert phase == ("prefill" if where[0] < length else "decode")
        assert step == max(0, where[0] - length + 1)


def test_positions_go_on_after_a_cached_prefix(demo):
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(demo.model)
    ids = demo.encode(PROMPT)
    demo.run(ids[:4], cache=cache, edit={"layers.2": steer})
    done = demo.generate(ids[4:], max_tokens=5, edit={"layers.2": steer}, prompt_cache=cache)
    assert ids[4:] == done.prompt_tokens
    assert ids + done.tokens == greedy(demo, ids, 5, edit={"layers.2": steer})


def test_streaming_yields_the_pieces_of_the_text(demo):
    whole = demo.generate(PROMPT, max_tokens=N)
    pieces = demo.stream(PROMPT, max_tokens=N, capture="layers.0")
    texts, tokens = zip(*((piece.text, piece.token) for piece in pieces), strict=True)
    assert "".join(texts) == whole.text
    assert list(tokens) == whole.tokens
    assert pieces.result().captured["layers.0"].shape[1] == len(whole.prompt_tokens) + N
    again = demo.generate(PROMPT, max_tokens=N, stream=True)
    assert "".join(piece.text for piece in again) == whole.text


def test_between_pieces_the_model_is_as_it_was(demo):
    classes = {type(m) for _, m in demo.named_modules()}
    logits = demo(mx.array([[1, 2]]))
    pieces = demo.stream(PROMPT, max_tokens=4, edit={"layers.1": mx.zeros_like})
    next(pieces)
    assert {type(m) for _, m in demo.named_modules()} == classes
    assert mx.array_equal(demo(mx.array([[1, 2]])), logits)


def test_a_stream_that_is_closed_has_what_it_had(demo):
    pieces = demo.stream(PROMPT, max_tokens=8)
    first = next(pieces)
    pieces.close()
    assert next(pieces, None) is None and pieces.result().text == first.text
    assert demo.generate(PROMPT, max_tokens=1).text == first.text


def test_a_stream_resumed_inside_a_trace_and_another_stream(demo):
    expected = demo.generate(PROMPT, max_tokens=6, edit={"layers.2": steer}).tokens
    plain = demo.generate(PROMPT, max_tokens=6).tokens
    steered = demo.stream(PROMPT, max_tokens=6, edit={"layers.2": steer})
    other = demo.stream(PROMPT, max_tokens=6)
    found = [next(steered).token, next(steered).token]
    unsteered = [next(other).token]
    with demo.trace("another text") as trace:
        found += [piece.token for piece in steered]
        assert demo.layers[0].output.shape[1] == len(demo.encode("another text"))
    unsteered += [piece.token for piece in other]
    assert found == expected
    assert unsteered == plain
    assert mx.array_equal(trace.output, demo.run("another text").output)


def test_a_stream_inside_open_hooks_composes_with_them(demo):
    hooks = Hooks()
    hooks.add_after(demo.model.layers[1], lambda x: x * 0)
    with hooks:
        outer = demo.generate(PROMPT, max_tokens=4).tokens
    assert outer == demo.generate(PROMPT, max_tokens=4, edit={"layers.1": mx.zeros_like}).tokens


def test_sampling_depends_on_the_seed_alone(demo):
    def sample(seed, **kwargs):
        return demo.generate(PROMPT, max_tokens=N, temperature=1.0, seed=seed, **kwargs).tokens

    mx.random.seed(1)
    first = sample(0)
    mx.random.seed(2)
    assert sample(0) == first
    assert sample(3) != first
    greedy_tokens = demo.generate(PROMPT, max_tokens=N).tokens
    assert sample(5, top_k=1) == greedy_tokens
    assert sample(5, top_p=1e-6) == greedy_tokens
    assert sample(5, min_p=1.0) == greedy_tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "at least one token"),
        ({"prompt": ["two", "prompts"]}, "one prompt, not 2"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, not -1"),
        ({"edit": {"layers.77": mx.zeros_like}}, "no layer 77"),
        ({"prompt": [5000]}, "token ids must be 0 to 4095"),
        ({"capture": "layers.0.nothing"}, "no site"),
    ],
)
def test_bad_arguments_are_errors(demo, arguments, message):
    with pytest.raises(ValueError, match=message):
        demo.generate(**{"prompt": PROMPT, "max_tokens": 3, **arguments})


def test_without_a_tokenizer_it_says_what_to_do(demo):
    with pytest.raises(ValueError, match="no tokenizer, which generate needs.*: give one"):
        InterpretableModel(demo.model).generate([1, 2, 3])


def test_half_precision_and_state_space_models_generate():
    model = InterpretableModel(build("mamba"), tokenizer=InterpretableModel.demo().tokenizer)
    done = model.generate(
        [1, 2, 3, 4, 5], max_tokens=4, edit={"layers.1": steer}, capture="layers.1"
    )
    expected = greedy(model, [1, 2, 3, 4, 5], 4, edit={"layers.1": steer})
    assert [1, 2, 3, 4, 5, *done.tokens] == expected
    full = model.run(expected, capture="layers.1", edit={"layers.1": steer})
    np.testing.assert_allclose(done.captured["layers.1"], full["layers.1"], rtol=1e-3, atol=1e-4)


def test_a_stream_that_has_not_begun_has_an_empty_result(demo):
    result = demo.stream(PROMPT, capture="layers.1").result()
    assert (result.text, result.tokens, len(result.captured)) == ("", [], 0)


def test_a_cache_that_does_not_count_serves_where_nobody_asks_for_positions(demo):
    from mlx_lm.models.cache import make_prompt_cache

    model = InterpretableModel(build("mamba"), demo.tokenizer)
    cache = make_prompt_cache(model.model)
    assert len(model.generate([5, 6, 7], max_tokens=2, prompt_cache=cache).prompt_tokens) == 3
    with pytest.raises(ValueError, match="prompt_cache does not tell how many tokens it holds"):
        model.generate([5], prompt_cache=cache, capture="layers.0")
