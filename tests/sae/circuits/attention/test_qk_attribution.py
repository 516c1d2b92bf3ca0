import json
import math
from dataclasses import replace
from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.attention import Attention
from mlxterp.sae.circuits.attention.heads import prefix_matching
from mlxterp.sae.circuits.attention.qk_attribution import find_qk_attribution
from mlxterp.sae.circuits.attention.score_pairs import QKAttribution
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.sae import SAE, SAETrainer
from mlxterp.sae.testbeds import WordTokenizer, induction, train_induction
from mlxterp.sae.transcoder import Transcoder
from tests import tiny_models
from tests.fakes import FakeSource
from tests.sae.features.coders import KINDS, filled, make

IDS = [5, 9, 13, 5, 9, 22, 31, 7, 9, 13, 2, 5]
# Rotary embeddings with grouped heads, norms of queries and keys, biases, learned positions,
# sinks, partly rotary, a sliding window, multipliers, and queries scaled by their position.
ARCHITECTURES = (
    "llama", "qwen3", "gemma3_text", "qwen2", "gpt2", "gpt_oss", "phi", "mistral", "granite",
    "llama4_text",
)  # fmt: skip


def tiny(name: str) -> InterpretableModel:
    words = [f"w{i}" for i in range(tiny_models.VOCAB)]
    return InterpretableModel(tiny_models.build(name), tokenizer=WordTokenizer(words))


def columns(model, *names: str) -> Columns:
    return Columns(names, tuple(model.width(name) for name in names))


def residual(model, layer: int = 1, n_features: int = 24) -> SAE:
    sites = columns(model, f"layers.{layer}.resid_post")
    made = filled(SAE(sites, sites, n_features, "topk", k=6))
    made.b_dec = mx.random.normal(made.b_dec.shape, key=mx.random.key(9)) / 4
    return made


def transcoders(model, n_layers: int) -> dict[int, Transcoder]:
    ends = [
        columns(model, f"layers.{i}.{s}") for i in range(n_layers) for s in ("mlp_in", "mlp_out")
    ]
    return {
        i: filled(Transcoder(*ends[2 * i : 2 * i + 2], 24, k=6, skip=i == 0))
        for i in range(n_layers)
    }  # fmt: skip


def every_pair(found: QKAttribution) -> np.ndarray:
    """The whole matrix, biases last, `[n + 1, m + 1]`."""
    numbers = ([*range(len(nodes)), -1] for nodes in (found.queries, found.keys))
    return found.pair_scores(*numbers)


@pytest.fixture(scope="module")
def bed():
    return induction()


@pytest.fixture(scope="module")
def by_hand(bed) -> InterpretableModel:
    return InterpretableModel(bed.model, tokenizer=bed.tokenizer)


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def plain(llama) -> QKAttribution:
    return find_qk_attribution(llama, residual(llama), IDS, 2, 3, 10, 4, against=None)


@pytest.mark.parametrize("position", [8, 10, 12])
def test_the_pair_of_induction_is_found_with_its_analytic_score(bed, by_hand, position):
    tokens = bed.sequences(1)[0].tolist()
    step = bed.step(tokens, position)
    found = find_qk_attribution(by_hand, bed.saes, tokens, 1, 0, step.query)
    n = step.query + 1
    assert (found.key, found.attention) == (step.key, pytest.approx(1, abs=1e-3))
    assert found.score == pytest.approx(bed.match)
    assert found.baseline == pytest.approx(1.5 * bed.match / n)
    pair, rest = found.pairs()
    assert (pair.query.index, pair.query.position) == (step.query_feature, step.query)
    assert (pair.key.index, pair.key.position) == (step.key_feature, step.key)
    assert pair.score == pytest.approx(bed.match * (1 - 1 / n), rel=1e-6)
    # The token that begins a text is special, so that what is written there is all error.
    assert (rest.key.kind, rest.key.position) == ("error", 0)
    assert rest.score == pytest.approx(-bed.match / 2 / n, rel=1e-6)
    (alone,) = find_qk_attribution(
        by_hand, bed.saes, tokens, 1, 0, step.query, against=None
    ).pairs()
    assert (alone.query.key, alone.key.key) == (pair.query.key, pair.key.key)
    assert (alone.score, alone.share) == (pytest.approx(bed.match), pytest.approx(1))


def test_with_transcoders_the_pair_of_induction_goes_back_to_the_embedding(bed, by_hand):
    tokens = bed.sequences(1, seed=3)[0].tolist()
    step = bed.step(tokens)
    found = find_qk_attribution(by_hand, bed.transcoders, tokens, 1, 0, against=None)
    assert found.key == step.key
    pair = found.pairs(1)[0]
    assert (pair.query.kind, pair.query.index, pair.query.position) == (
        "embedding", tokens[-1], len(tokens) - 1,
    )  # fmt: skip
    assert (pair.key.site, pair.key.index, pair.key.position) == (
        "layers.0.mlp_out", tokens[-1], step.key,
    )  # fmt: skip
    assert (pair.score, pair.share) == (pytest.approx(bed.match), pytest.approx(1))


@pytest.mark.parametrize("key", [0, 3, 5, 8])
def test_every_pair_of_features_has_the_score_of_the_weights_written_by_hand(bed, by_hand, key):
    tokens = bed.sequences(1, seed=4)[0].tolist()
    found = find_qk_attribution(by_hand, bed.saes[0], tokens, 1, 0, 11, key, against=None)
    for i, query in enumerate(found.queries):
        for j, other in enumerate(found.keys):
            if query.kind == other.kind == "feature":
                expected = query.value * other.value * bed.pair_scores[query.index, other.index]
                assert found.pair_scores([i], [j]) == pytest.approx(expected, abs=1e-5)
    assert found.scores[0] == pytest.approx(bed.match / 2)


def rotated(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """The rotary embedding of `x [..., d]`, of pairs that are half of it apart."""
    half = x.shape[-1] // 2
    angle = position * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=-1
    )


def test_pairs_are_those_of_the_weights_in_float64(llama, plain):
    args, block = llama.model.args, llama.model.layers[2]
    sae, head, d = residual(llama), 3, 8
    assert (args.num_attention_heads, args.num_key_value_heads) == (4, 2)
    x = np.array(
        llama.run(mx.array([IDS]), capture="layers.1.resid_post")["layers.1.resid_post"][0]
    )
    W = {n: np.array(block.self_attn[f"{n}_proj"].weight, np.float64) for n in "qk"}
    W = {"q": W["q"][head * d : (head + 1) * d], "k": W["k"][head // 2 * d : (head // 2 + 1) * d]}
    norm = np.array(block.input_layernorm.weight, np.float64)

    def vector(name: str, source, position: int) -> np.ndarray:
        here = x[position].astype(np.float64)
        pre = here @ np.array(sae.W_enc, np.float64).T + np.array(sae.b_enc, np.float64)
        z = np.where(pre >= np.sort(pre)[-6], np.maximum(pre, 0), 0)
        written = z @ np.array(sae.W_dec, np.float64)
        bias = np.array(sae.b_dec, np.float64)
        if source is None:
            part = bias
        elif source.kind == "error":
            part = here - written - bias
        else:
            part = z[source.index] * np.array(sae.W_dec[source.index], np.float64)
        scale = 1 / np.sqrt(np.mean(here**2) + args.rms_norm_eps)
        return rotated(W[name] @ (norm * part * scale), position, args.rope_theta)

    expected = np.array(
        [
            [vector("q", a, 10) @ vector("k", b, 4) / d**0.5 for b in (*plain.keys, None)]
            for a in (*plain.queries, None)
        ]
    )
    assert expected.shape == (8, 8)  # six features, the error and the bias
    np.testing.assert_allclose(every_pair(plain), expected, atol=1e-5)
    np.testing.assert_allclose(expected.sum(), plain.score, atol=1e-5)


def test_the_mean_key_is_that_of_all_keys_in_sight(llama, plain):
    found = find_qk_attribution(llama, residual(llama), IDS, 2, 3, 10, 4)
    scores = llama.attention(IDS, 2)[2].scores[0, 3, 10, :11]
    assert found.baseline == pytest.approx(float(scores.mean()), abs=1e-5)
    assert {node.position for node in found.keys} == {*range(11)}
    assert {node.position for node in plain.keys} == {4}
    at = [i for i, node in enumerate(found.keys) if node.position == 4]
    of_plain = plain.pair_scores(range(len(plain.queries)), range(len(plain.keys)))
    of_mean = found.pair_scores(range(len(found.queries)), at)
    np.testing.assert_allclose(of_mean, of_plain * (1 - 1 / 11), atol=1e-5)


def test_another_key_takes_the_place_of_the_mean(llama, plain):
    found = find_qk_attribution(llama, residual(llama), IDS, 2, 3, 10, 4, against=-5)
    assert (found.against, found.baseline) == (7, pytest.approx(float(plain.scores[7]), abs=1e-5))
    assert every_pair(found).sum() == pytest.approx(plain.score - plain.scores[7], abs=1e-5)
    assert {node.position for node in found.keys} == {4, 7}


@pytest.mark.parametrize("against", ["mean", None, 9])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_pairs_add_up_to_the_score_of_the_model(name, against):
    model = tiny(name)
    layer, coder = len(model.layers) - 1, residual(model)
    found = find_qk_attribution(model, coder, IDS, layer, 2, 11, 10, against=against)
    scores = np.array(model.attention(IDS, layer)[layer].scores[0, 2, 11])
    seen = scores[scores > -1e4]
    baseline = {"mean": seen.mean(), None: 0.0, 9: scores[9]}[against]
    assert np.isfinite(found.scores).sum() == len(seen)
    assert every_pair(found).sum() == pytest.approx(scores[10] - baseline, abs=1e-4)
    assert abs(found.gap) < 1e-4 and found.constant == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_upstream_features_of_transcoders_add_up_through_frozen_heads(name):
    model = tiny(name)
    found = find_qk_attribution(model, transcoders(model, 2), IDS, 2, 1, against=None)
    score = np.array(model.attention(IDS, 2)[2].scores[0, 1, 11, found.key])
    assert every_pair(found).sum() == pytest.approx(score, abs=1e-4)
    kinds = {node.kind for node in found.queries}
    assert kinds == {"feature", "error", "embedding"}
    assert {node.position for node in found.queries if node.kind == "feature"} > {11}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("what, factor", [("pairs", -1.0), ("sources", -1.0), ("sources", 1.0)])
def test_predictions_are_exact_where_the_rest_is_held(name, what, factor):
    model = tiny(name)
    for coders in (residual(model), transcoders(model, 2)):
        found = find_qk_attribution(model, coders, IDS, 2, 1)
        checked = found.validate(what=what, n=4, factor=factor)
        assert np.abs(checked.predicted).max() > 0.01
        np.testing.assert_allclose(checked.measured, checked.predicted, atol=1e-4)


def test_what_is_predicted_of_a_pair_is_its_score_both_ways(llama):
    found = find_qk_attribution(llama, transcoders(llama, 2), IDS, 2, 1)
    matrix = {}
    for (i, a), (j, b) in product(enumerate(found.queries), enumerate(found.keys)):
        matrix[a.key, b.key] = float(found.pair_scores([i], [j])[0, 0])
    best = [(found.queries[i], found.keys[j]) for i, j in found.strongest(30) if min(i, j) >= 0]
    a, b = next((a, b) for a, b in best if a.key != b.key)
    checked = found.validate(n=1, factor=0.5)
    both = matrix[a.key, b.key] + matrix.get((b.key, a.key), 0)
    assert checked.predicted[0] == pytest.approx(both / 4, abs=1e-6)
    assert {*checked.names[0].split(" × ")} == {found.name(a), found.name(b)}


def test_sources_know_what_all_their_pairs_add(llama):
    found = find_qk_attribution(llama, residual(llama), IDS, 2, 3, 10, 4)
    for nodes, effects in (
        (found.queries, every_pair(found).sum(axis=1)),
        (found.keys, every_pair(found).sum(axis=0)),
    ):
        assert [node.effect for node in nodes] == pytest.approx(effects[:-1], abs=1e-6)


def test_a_source_paired_with_itself_cannot_be_validated_as_a_pair(bed, by_hand):
    tokens = bed.sequences(1)[0].tolist()
    found = find_qk_attribution(by_hand, bed.saes, tokens, 1, 0, 0, against=None)
    ((i, j),) = found.strongest()
    assert found.queries[i].key == found.keys[j].key
    with pytest.raises(ValueError, match=r"validate\(what='sources'\)"):
        found.validate()
    checked = found.validate(what="sources", factor=1.0)
    assert checked.predicted == pytest.approx([3 * found.score])
    assert checked.measured == pytest.approx([3 * found.score], rel=1e-5)


@pytest.mark.parametrize("options", [{"what": "features"}, {"n": 0}])
def test_validation_of_something_else_is_an_error(plain, options):
    with pytest.raises(ValueError, match="what must be one of|n must be >= 1"):
        plain.validate(**options)


def test_what_the_query_is_made_of_adds_up_to_its_scores_at_all_keys(plain):
    np.testing.assert_allclose(plain.over_keys.sum(axis=0)[:11], plain.scores[:11], atol=1e-5)
    i, j = plain.strongest(1)[0]
    assert plain.over_keys[i, 4] == pytest.approx(every_pair(plain).sum(axis=1)[i], abs=1e-5)
    assert np.isnan(plain.scores[11]) and j < len(plain.keys)


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_coders_are_taken(demo, kind):
    ids = demo.encode("def add(a, b):\n    return a + b")
    found = find_qk_attribution(demo, make(kind), ids, 4, 1)
    assert abs(found.gap) < 1e-4 and "feature" in {node.kind for node in found.keys}
    checked = found.validate(what="sources", n=3)
    np.testing.assert_allclose(checked.measured, checked.predicted, atol=1e-4)


def test_the_whole_model_answers_where_nothing_is_held(llama):
    found = find_qk_attribution(llama, residual(llama), IDS, 2, 3, 10, 4)
    checked = found.validate(what="sources", n=2, frozen=False)
    number, size = checked.nodes[0], llama.width("layers.1.resid_post")
    written = found.origin.score.replacement.writes(number)
    ((position, vector),) = written.values()
    more = np.zeros((1, len(IDS), size), np.float32)
    more[0, position] = -np.array(vector)

    def contrast(**options) -> float:
        scores = np.array(llama.attention(IDS, 2, **options)[2].scores[0, 3, 10, :11])
        return float(scores[4] - scores.mean())

    changed = contrast(edit={"layers.1.resid_post": lambda x: x + mx.array(more)})
    assert checked.measured[0] == pytest.approx(changed - contrast(), abs=1e-5)
    assert abs(checked.measured[0] - checked.predicted[0]) > 1e-3
    assert checked.method == "taken out, whole model"


def test_the_key_that_gets_most_attention_is_taken(llama):
    found = find_qk_attribution(llama, residual(llama), IDS, 2, 0, 9)
    pattern = np.array(llama.attention(IDS, 2)[2].pattern[0, 0, 9])
    assert found.key == pattern.argmax()
    np.testing.assert_allclose(found.pattern, pattern, atol=1e-6)
    assert found.attention == pytest.approx(pattern.max(), abs=1e-6)


def test_coders_that_come_later_are_left_out(llama):
    coders = {layer: residual(llama, layer) for layer in (0, 1, 2)}
    found = find_qk_attribution(llama, coders, IDS, 2, 0)
    assert {n.site for n in found.queries if n.kind == "feature"} == {"layers.1.resid_post"}
    assert found.levels == ("layers.0.resid_post", "layers.1.resid_post")


def test_layers_and_heads_and_positions_count_from_the_end_too(llama):
    found, same = (
        find_qk_attribution(llama, residual(llama), IDS, *where)
        for where in ((-1, -1, -2, -8), (2, 3, 10, 4))
    )
    assert every_pair(found) == pytest.approx(every_pair(same))
    assert (found.layer, found.head, found.query, found.key) == (2, 3, 10, 4)


class Masked(InterpretableModel):
    """A model whose masks add a score: of the distance alone, or of what a key holds."""

    latent = False

    def attention(self, *args, **options):
        calls = []
        for call in super().attention(*args, **options).calls:
            n = call.q.shape[2]
            distances = (mx.arange(n)[:, None] - mx.arange(n)).astype(mx.float32)
            added = call.k[..., :1].swapaxes(-1, -2) if self.latent else -0.1 * distances
            mask = mx.where(distances < 0, -mx.inf, added)
            calls.append(replace(call, mask=mask))
        return Attention(calls)


def test_what_the_mask_adds_by_distance_is_a_constant():
    words = [f"w{i}" for i in range(tiny_models.VOCAB)]
    model = Masked(tiny_models.build("llama"), tokenizer=WordTokenizer(words))
    found = find_qk_attribution(model, residual(model), IDS, 2, 0, 10, 4)
    assert found.constant == pytest.approx(-0.1 * (6 - np.arange(11).mean()), abs=1e-6)
    assert abs(found.gap) < 1e-5 and np.isfinite(found.scores).sum() == 11
    model.latent = True
    with pytest.raises(ValueError, match="depends on what the model reads"):
        find_qk_attribution(model, residual(model), IDS, 2, 0, 10, 4)


def test_latent_attention_is_an_error_that_says_why():
    model = tiny("deepseek_v3")
    with pytest.raises(ValueError, match=r"mask of layer 2 .* latent attention"):
        find_qk_attribution(model, residual(model), IDS, 2, 0)


def test_what_is_no_sum_of_its_sources_is_an_error(llama):
    class Bent(InterpretableModel):
        def attention(self, *args, **options):
            calls = super().attention(*args, **options).calls
            return Attention([replace(call, q=mx.abs(call.q) + call.q**2) for call in calls])

    model = Bent(llama.model, tokenizer=llama.tokenizer)
    with pytest.raises(ValueError, match="The pairs miss the score of layer 2"):
        find_qk_attribution(model, residual(model), IDS, 2, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer": 3}, "layers must be of -3 to 2"),
        ({"layer": 1.5}, "layer must be a whole number, got 1.5"),
        ({"head": 4}, r"head must be in \[-4, 3\], got 4"),
        ({"query": 12}, r"query must be in \[-12, 11\], got 12"),
        ({"key": -13}, r"key must be in \[-12, 11\], got -13"),
        ({"key": 11}, "key must be a position that the query at 10 sees, of 0 to 10, got 11"),
        ({"against": 11}, "against must be a position that the query at 10 sees"),
        ({"against": 4}, "against must be another position than the key, got 4"),
        ({"against": "median"}, "against must be 'mean', a position or None, got 'median'"),
        ({"query": 0, "key": 0}, "The query at 0 sees one key only"),
        ({"prompt": ""}, "prompt must be a text, or ids, of at least one token, got ''"),
        ({"prompt": []}, "prompt must be a text, or ids, of at least one token"),
        ({"coders": {}}, r"coders must be a coder or \{layer: coder\}, got \{\}"),
        ({"coders": [1]}, r"coders must be a coder or \{layer: coder\}, got \[1\]"),
        ({"feature_labels": {7: {}}}, "feature_labels must be by layer or site"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_what_does(llama, change, message):
    given = {"coders": residual(llama), "prompt": IDS, "layer": 2, "head": 3, "query": 10, "key": 4}
    with pytest.raises(ValueError, match=message):
        find_qk_attribution(llama, **(given | change))


def test_coders_that_come_too_late_are_an_error(llama):
    given = {2: residual(llama, 2), 1: residual(llama, 1)}
    with pytest.raises(ValueError, match=r"such as layers.1.resid_pre; those given write layers.1"):
        find_qk_attribution(llama, given, IDS, 1, 0)
    ends = columns(llama, "layers.2.mlp_in"), columns(llama, "layers.0.mlp_out")
    with pytest.raises(ValueError, match="reads layers.2.mlp_in, which comes after the attention"):
        find_qk_attribution(llama, filled(Transcoder(*ends, 24, k=6)), IDS, 1, 0)


def test_coders_of_another_model_are_an_error(llama, demo):
    with pytest.raises(ValueError, match="does not fit the model"):
        find_qk_attribution(demo, residual(llama), IDS, 2, 0)


def test_a_model_whose_attention_is_unknown_is_an_error():
    source = FakeSource()
    sites = Columns(("layers.0.mlp",), (6,))
    with pytest.raises(ValueError, match="The attention of fake cannot be read"):
        find_qk_attribution(source, SAE(sites, sites, 8, "relu"), "abc", 0, 0)


def test_layers_without_attention_are_an_error():
    model = tiny("jamba")
    with pytest.raises(ValueError, match="layers 2 of this model .* no softmax attention"):
        find_qk_attribution(model, residual(model), IDS, 2, 0)


def test_a_key_beyond_the_window_is_not_seen():
    model = tiny("mistral")
    found = find_qk_attribution(model, residual(model, 0), IDS, 1, 0, 10, 8)
    assert np.flatnonzero(np.isfinite(found.scores)).tolist() == [7, 8, 9, 10]
    assert {node.position for node in found.keys} == {7, 8, 9, 10}
    with pytest.raises(ValueError, match="key must be a position that the query at 10 sees, of 7"):
        find_qk_attribution(model, residual(model, 0), IDS, 1, 0, 10, 3)


def test_labels_name_the_features(bed, by_hand):
    tokens = bed.sequences(1)[0].tolist()
    step = bed.step(tokens)
    labels = {0: {step.query_feature: "is here", step.key_feature: "was before"}}
    found = find_qk_attribution(by_hand, bed.saes, tokens, 1, 0, feature_labels=labels)
    assert f"L0/{step.query_feature} is here" in repr(found)
    assert f"L0/{step.key_feature} was before" in repr(found.source_table("key"))
    assert found.pairs(1)[0].key.label == "was before"


def test_the_result_is_plain_values_without_anything_that_is_no_number(plain):
    told = json.loads(json.dumps(plain.to_dict(), allow_nan=False))
    assert told["scores"][11] is None and told["score"] == pytest.approx(plain.score)
    assert sum(part["score"] for part in told["parts"]) == pytest.approx(plain.score, abs=1e-5)
    assert len(told["pairs"]) == 64
    assert math.isclose(sum(pair["score"] for pair in told["pairs"]), plain.score, abs_tol=1e-4)


@pytest.fixture(scope="module")
def trained():
    return train_induction(n_steps=180)


@pytest.mark.filterwarnings("ignore:.*of features are dead")
def test_in_a_trained_model_the_key_feature_is_about_the_token_before(trained):
    model, site = InterpretableModel(trained.model, trained.tokenizer), "layers.0.resid_post"
    rows = trained.sequences(200, seed=5)
    x = model.run(mx.array(rows), capture=site, stop=True)[site][:, 1:]
    config = SAEConfig(
        expansion_factor=2, k=4, batch_size=256, learning_rate=5e-3, num_epochs=20, seed=0
    )
    sae = SAETrainer(config).fit({site: x.reshape(-1, x.shape[-1])})
    z, before, now = np.array(sae.encode(x)), rows[:, :-1], rows[:, 1:]
    best = prefix_matching(model, trained.sequences(8, seed=3).tolist()).heads[0]
    assert best.layer == 1 and best.score > 0.8
    for tokens in trained.sequences(4, seed=9).tolist():
        found = find_qk_attribution(model, sae, tokens, best.layer, best.head)
        assert found.key == tokens.index(tokens[-1]) + 1
        pair = found.pairs(1, features=True)[0]
        assert (pair.query.position, pair.key.position) == (len(tokens) - 1, found.key)
        assert 0.7 < found.explained < 1.3
        fires = z[..., pair.key.index]
        of_before, of_now = (
            np.bincount(at.ravel(), fires.ravel()) / fires.sum() for at in (before, now)
        )
        assert of_before.argmax() == tokens[-1] and of_before.max() > 0.6 > 0.3 > of_now.max()
