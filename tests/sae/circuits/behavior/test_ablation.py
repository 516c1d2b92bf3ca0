import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.circuits.behavior.ablation import Kept, special
from tests.sae.circuits.prompts import (
    ONE_PASS,
    OTHER,
    TEXT,
    all_kept,
    captured,
    directions,
    ids_of,
    logits,
    prompt_of,
    replaced,
    sae_of,
    two_saes,
)
from tests.sae.features.coders import KINDS, make

N = 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_features_bias_skip_and_error(demo, kind):
    coder = make(kind)
    if coder.has_skip:
        coder.W_skip = mx.random.normal(coder.W_skip.shape, key=mx.random.key(5)) / 8
    found = prompt_of(demo, {1: coder}).states[1].found
    x = captured(demo, ids_of(demo), coder.reads.names)
    z = np.array(coder.encode(mx.array(x)))
    z[0] = 0  # the token that begins a text
    np.testing.assert_allclose(found.codes, z, atol=N)
    skip = x @ np.array(coder.W_skip).T if coder.has_skip else 0
    written = captured(demo, ids_of(demo), coder.writes.names)
    expected = written - z @ directions(coder) - np.array(coder.b_dec) - skip
    np.testing.assert_allclose(found.errors, expected, atol=1e-3)
    np.testing.assert_array_equal(found.written, written)


@pytest.mark.parametrize("kind", ONE_PASS)
def test_where_all_is_kept_nothing_changes_by_a_bit(demo, kind):
    prompt = prompt_of(demo, {1: make(kind), 5: sae_of(5)})
    kept = demo.run([ids_of(demo)], edit=prompt.keeping(all_kept(prompt))).output
    assert mx.array_equal(kept, demo.run([ids_of(demo)]).output)


def test_without_features_errors_are_left(demo):
    coder = make("sae")
    prompt = prompt_of(demo, {2: coder})
    x, z = captured(demo, ids_of(demo), coder.reads.names), prompt.states[2].found.codes
    edit = replaced(coder, x - np.array(z) @ directions(coder))
    found = logits(demo, ids_of(demo), prompt.keeping(all_kept(prompt, features=False)))
    np.testing.assert_allclose(found, logits(demo, ids_of(demo), edit), atol=1e-3)


def test_without_errors_what_the_coder_makes_of_it_is_left(demo):
    coder = make("sae")
    prompt = prompt_of(demo, {2: coder})
    x = captured(demo, ids_of(demo), coder.reads.names)
    y = np.array(coder(mx.array(x)))
    y[0] = x[0]  # special tokens are left as they are
    found = logits(demo, ids_of(demo), prompt.keeping(all_kept(prompt, errors=False)))
    np.testing.assert_allclose(found, logits(demo, ids_of(demo), replaced(coder, y)), atol=1e-3)


def test_later_features_have_the_value_that_they_have_in_this_run(demo):
    coders = two_saes()
    prompt, rng = prompt_of(demo, coders), np.random.default_rng(0)
    kept = {
        layer: Kept(rng.random(own.features.shape) < 0.5, own.errors)
        for layer, own in all_kept(prompt).items()
    }
    edit, ids = {}, ids_of(demo)
    for layer, coder in coders.items():
        plain = captured(demo, ids, coder.reads.names)
        x = captured(demo, ids, coder.reads.names, edit)
        z, old = (np.array(coder.encode(mx.array(values))) for values in (x, plain))
        z[0] = old[0] = 0
        new = np.where(kept[layer].features, z, 0)
        edit |= replaced(coder, plain + (new - old) @ directions(coder))
    found = logits(demo, ids, prompt.keeping(kept))
    np.testing.assert_allclose(found, logits(demo, ids, edit), atol=2e-3)
    assert np.abs(found - logits(demo, ids)).max() > 0.1


@pytest.mark.parametrize("kind", ["cross-layer transcoder", "skip transcoder"])
def test_blocks_and_skips_read_what_earlier_coders_left(demo, kind):
    coder, first = make(kind), sae_of(0)
    if coder.has_skip:
        coder.W_skip = mx.random.normal(coder.W_skip.shape, key=mx.random.key(5)) / 8
    prompt, ids = prompt_of(demo, {0: first, 1: coder}), ids_of(demo)
    kept = all_kept(prompt)
    kept[0].features[:] = False
    kept[1].features[3:, ::2] = False
    states = prompt.states
    edit = replaced(
        first,
        np.array(states[0].found.written) - np.array(states[0].found.codes) @ directions(first),
    )
    written, rows = np.array(states[1].found.written), directions(coder)
    plain = captured(demo, ids, coder.reads.names)
    for block in coder.blocks:
        # Each block reads a stream to which the blocks before it have written already.
        x = captured(demo, ids, coder.reads.names, edit)
        z = np.array(coder.encode(mx.array(x)))
        z[0] = 0
        new = np.where(kept[1].features, z, 0)
        own = np.arange(coder.n_features)[block.features]
        written = written + (new - np.array(states[1].found.codes))[:, own] @ rows[own]
        if coder.has_skip:
            written = written + (x - plain) @ np.array(coder.W_skip).T
        edit |= replaced(coder, written)
    found = logits(demo, ids, prompt.keeping(kept))
    np.testing.assert_allclose(found, logits(demo, ids, edit), atol=2e-3)
    assert np.abs(found - logits(demo, ids)).max() > 0.05


def test_what_is_not_kept_has_the_value_on_the_corrupted_prompt(demo):
    coder = make("sae")
    prompt = prompt_of(demo, {2: coder}, corrupted=OTHER)
    assert len(ids_of(demo)) == len(ids_of(demo, OTHER))
    nothing = prompt.keeping(all_kept(prompt, features=False, errors=False))
    other = captured(demo, ids_of(demo, OTHER), coder.writes.names)
    edit = replaced(coder, other)
    np.testing.assert_allclose(
        logits(demo, ids_of(demo), nothing), logits(demo, ids_of(demo), edit), atol=1e-3
    )
    # Nothing is left of the prompt: the whole stream is that of the other one.
    np.testing.assert_allclose(
        logits(demo, ids_of(demo), nothing), logits(demo, ids_of(demo, OTHER)), atol=1e-3
    )


def test_means_are_those_over_tokens_that_are_not_special(demo):
    coder, texts = make("sae"), [TEXT, OTHER, "import os"]
    state = prompt_of(demo, {2: coder}, others=texts).states[2]
    codes, errors = [], []
    for text in texts:
        x = captured(demo, ids_of(demo, text), coder.reads.names)[1:]
        z = np.array(coder.encode(mx.array(x)))
        codes.append(z)
        errors.append(x - z @ directions(coder) - np.array(coder.b_dec))
    for found, values, own in (
        (state.codes, codes, state.found.codes), (state.errors, errors, state.found.errors),
    ):  # fmt: skip
        mean = np.concatenate(values).mean(axis=0)
        np.testing.assert_allclose(found[1:], np.tile(mean, (len(found) - 1, 1)), atol=1e-3)
        np.testing.assert_array_equal(found[0], own[0])


@pytest.mark.parametrize("options", [{}, {"others": [OTHER]}])
def test_special_tokens_are_left_as_they_are(demo, options):
    prompt = prompt_of(demo, two_saes(), **options)
    ids = ids_of(demo)
    assert special(demo, ids).tolist() == [True] + [False] * (len(ids) - 1)
    edit = prompt.keeping(all_kept(prompt, features=False, errors=False))
    for state in prompt.states.values():
        site = state.coder.writes.names
        np.testing.assert_array_equal(
            captured(demo, ids, site, edit)[0], captured(demo, ids, site)[0]
        )
        assert not np.array_equal(captured(demo, ids, site, edit)[1], captured(demo, ids, site)[1])
