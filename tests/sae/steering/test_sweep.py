"""The strength sweep: its figures against NumPy in float64 on one text at a time, without padding,
the directions that it compares with, and which features are chosen."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae import SAEConfig
from mlxterp.sae.coder import Columns
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder
from mlxterp.sae.features.logit_effects import logit_directions, logit_effects
from mlxterp.sae.model_pair import ModelPair
from mlxterp.sae.sae import SAE
from mlxterp.sae.steering import sweep
from mlxterp.sae.steering.sweep import peaked_features, promoted, strength_sweep
from mlxterp.sae.transcoder import Transcoder

FEATURE = 11
TEXTS = ("The function returns a new list", "Raise", "An import statement is executed in steps:\n")
SITE = "layers.2.resid_post"


def logprobs(model, ids, edit=None):
    """`[S, vocabulary]` of one text, in float64."""
    logits = np.array(model.run([ids], edit=edit).output[0].astype(mx.float32), np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def expected(model, texts, edit):
    """Mean log-probabilities `[vocabulary]`, mean divergence and perplexity under an edit."""
    total, kl, loss, n, n_predicted = 0, 0, 0, 0, 0
    for ids in model.encode_batch(texts):
        plain, edited = logprobs(model, ids), logprobs(model, ids, edit)
        counts = np.array([i not in model.special_token_ids for i in ids])
        total = total + edited[counts].sum(axis=0)
        kl += (np.exp(plain) * (plain - edited))[counts].sum()
        chosen = edited[np.arange(len(ids) - 1), ids[1:]]
        loss -= chosen[counts[1:]].sum()
        n, n_predicted = n + counts.sum(), n_predicted + counts[1:].sum()
    return total / n, kl / n, np.exp(loss / n_predicted), n_predicted


class Watched:
    """A model that notes the activations at some sites in every pass with them as output."""

    def __init__(self, model, sites):
        self._model, self._sites, self.passes = model, sites, []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def run(self, tokens, *, capture=(), edit=None, stop=False):
        if capture or stop:
            return self._model.run(tokens, capture=capture, edit=edit, stop=stop)
        done = self._model.run(tokens, capture=self._sites, edit=edit)
        self.passes.append([np.array(done[site], np.float64) for site in self._sites])
        return done


def changes(model, sites, *args, **options):
    """How each arm of a sweep changes the sites: `[n_arms, n_sites]` of `[B, S, width]`, after the
    plain pass."""
    watched = Watched(model, sites)
    report = strength_sweep(*args[:1], watched, *args[1:], **options)
    plain, *edited = watched.passes
    return report, [[y - x for x, y in zip(plain, arm, strict=True)] for arm in edited]


def test_every_figure_is_that_of_the_texts_one_by_one(sae, model, monkeypatch):
    monkeypatch.setattr(sweep, "TOKENS_PER_PASS", 20)  # two passes, the first of them padded
    strengths, ids = (0.0, 6.0), [5, 300, 301]
    report = strength_sweep(
        sae, model, FEATURE, TEXTS, strengths, targets=ids, n_random=0, unit="activation"
    )
    plain, _, perplexity, n = expected(model, TEXTS, None)
    assert report.n_tokens == n
    assert report.logprob == pytest.approx(plain[ids].mean(), rel=1e-5)
    assert report.perplexity == pytest.approx(perplexity, rel=1e-5)
    row = 6.0 * sae.W_dec[FEATURE]
    steered, kl, perplexity, _ = expected(model, TEXTS, {SITE: lambda x: x + row})
    moved = steered - plain
    others = np.abs(np.delete(moved, ids)).mean()
    assert report.steered.effects[1] == pytest.approx(moved[ids].mean(), rel=1e-4)
    assert report.steered.others[1] == pytest.approx(others, rel=1e-4)
    assert report.steered.specificity[1] == pytest.approx(moved[ids].mean() / others, rel=1e-3)
    assert report.steered.kl[1] == pytest.approx(kl, rel=1e-3)
    assert report.steered.perplexities[1] == pytest.approx(perplexity, rel=1e-5)
    assert kl > 0.01


def test_at_strength_zero_nothing_at_all_changes(sae, model):
    report = strength_sweep(
        sae, model, FEATURE, TEXTS, (0.0, 1.0), n_random=2, unit="activation",
        positive=TEXTS[:1], negative=TEXTS[1:],
    )  # fmt: skip
    for response in (report.steered, *report.random, report.difference):
        assert response.effects[0] == response.kl[0] == response.others[0] == 0
        assert response.perplexities[0] == report.perplexity != response.perplexities[1]


def test_random_directions_change_every_position_by_as_much_as_the_feature(sae, model):
    report, arms = changes(
        model, [SITE], sae, FEATURE, TEXTS[:2], (-2.0, 3.0), n_random=3, unit="activation"
    )
    assert [r.name for r in report.random] == ["random 1", "random 2", "random 3"]
    units = [arm[0] / np.linalg.norm(arm[0], axis=-1, keepdims=True) for arm in arms]
    for i, arm in enumerate(arms):
        size = (2.0, 3.0)[i % 2]
        np.testing.assert_allclose(np.linalg.norm(arm[0], axis=-1), size, rtol=1e-4)
        np.testing.assert_allclose(units[i], 0 * units[i] + units[i][0, 0], atol=1e-4)
    for i in range(0, len(arms), 2):
        np.testing.assert_allclose(units[i], -units[i + 1], atol=1e-4)
    directions = np.stack([unit[0, 0] for unit in units[1::2]])
    cosines = directions @ directions.T
    assert np.abs(cosines - np.eye(len(cosines))).max() < 0.5


def test_the_seed_decides_the_random_directions(sae, model):
    options = {"n_random": 1, "unit": "activation"}
    found = [
        strength_sweep(sae, model, FEATURE, TEXTS[:2], (3.0,), seed=seed, **options)
        for seed in (0, 0, 1)
    ]
    first, again, other = (report.random[0].effects[0] for report in found)
    assert first == again != other


def test_where_a_mode_lowers_a_feature_the_other_directions_go_backwards(sae, model):
    positive, negative = [model.encode(TEXTS[0])], [model.encode(TEXTS[2])]
    feature = int(mx.argmax(sae.encode_text(TEXTS[0])[1:].max(axis=0)))
    _, arms = changes(
        model, [SITE], sae, feature, TEXTS[:1], (0.5, 2.0), n_random=0, mode="scale",
        positive=positive, negative=negative,
    )  # fmt: skip
    halved, doubled, halved_mean, doubled_mean = (arm[0][0] for arm in arms)
    fires = np.linalg.norm(doubled, axis=-1) > 0
    assert fires.any()
    means = [
        np.array(model.run(rows, capture=[SITE])[SITE], np.float64)[
            0, [i not in model.special_token_ids for i in rows[0]]
        ].mean(axis=0)
        for rows in (positive, negative)
    ]
    unit = (means[0] - means[1]) / np.linalg.norm(means[0] - means[1])
    for change, of_mean, sign in ((halved, halved_mean, -1), (doubled, doubled_mean, 1)):
        wanted = sign * np.linalg.norm(change, axis=-1, keepdims=True) * unit
        np.testing.assert_allclose(of_mean, wanted, atol=1e-4)
    assert not of_mean[~fires].any()


def test_options_of_the_edit_hold_for_the_other_directions_too(sae, model):
    _, arms = changes(
        model, [SITE], sae, FEATURE, TEXTS[:1], (2.0,), n_random=1, unit="activation",
        positions=[1, 3],
    )  # fmt: skip
    for arm in arms:
        assert np.flatnonzero(np.abs(arm[0][0]).max(axis=-1)).tolist() == [1, 3]


def test_targets_are_the_top_logit_tokens_or_those_given(sae, model):
    options = {"n_random": 0, "unit": "activation"}
    report = strength_sweep(sae, model, FEATURE, TEXTS[:1], (0.0,), n_targets=3, **options)
    top = logit_effects(sae, model, FEATURE, top_k=10).top
    special = {model.token_to_str(i) for i in model.special_token_ids}
    assert report.targets == tuple([t for t, _ in top if t not in special][:3])
    ids = model.encode(" class")
    given = strength_sweep(sae, model, FEATURE, TEXTS[:1], (0.0,), targets=[" class"], **options)
    same = strength_sweep(sae, model, FEATURE, TEXTS[:1], (0.0,), targets=ids[-1:], **options)
    assert given.targets == same.targets == (" class",)
    assert given.logprob == same.logprob


def test_of_several_features_the_targets_are_those_of_their_sum(sae, model):
    features = {3: 2.0, 8: -1.0}
    report = strength_sweep(
        sae, model, features, TEXTS[:1], (0.0,), n_targets=1, n_random=0, unit="activation"
    )
    row = 2 * sae.W_dec[3] - sae.W_dec[8]
    (best,) = mx.argmax(model.unembed(row[None]), axis=-1).tolist()
    assert report.targets == (model.token_to_str(best),)
    assert report.features == features


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("strengths must be one or more", {"strengths": ()}),
        ("strengths must be one or more, each once", {"strengths": (1.0, 1.0)}),
        ("texts must hold at least one of two or more tokens", {"texts": []}),
        ("A target must be one token", {"targets": ["the function returns"]}),
        ("A target must be a token id of 0 or more, got -1", {"targets": [-1]}),
        ("targets must be at least one token", {"targets": []}),
        ("targets must be at least one token", {"n_targets": 0}),
        ("call sae.collect", {"unit": "max"}),
    ],
)
def test_what_cannot_be_measured_is_refused(sae, model, message, options):
    texts, strengths = options.pop("texts", TEXTS), options.pop("strengths", (1.0,))
    with pytest.raises(ValueError, match=message):
        strength_sweep(sae, model, 3, texts, strengths, **{"unit": "activation", **options})


def columns(model, *names):
    return Columns(names, tuple(model.width(name) for name in names))


def several(model):
    """Coders of the other kinds with random weights, by name."""
    mlp = [[f"layers.{i}.{part}" for i in (1, 2)] for part in ("mlp_in", "mlp_out")]
    residual = columns(model, "layers.1.resid_post", SITE)
    mx.random.seed(0)
    return {
        "transcoder": Transcoder(
            columns(model, mlp[0][0]), columns(model, mlp[1][0]), 32, "topk", k=4
        ),
        "crosscoder": Crosscoder(residual, residual, 32, "topk", k=4),
        "cross-layer": CrossLayerTranscoder(
            columns(model, *mlp[0]), columns(model, *mlp[1]), 32, "topk", k=4
        ),
    }


@pytest.mark.parametrize("kind", ["transcoder", "crosscoder", "cross-layer"])
def test_coders_of_other_kinds_are_measured_at_all_the_sites_that_they_write(model, kind):
    coder = several(model)[kind]
    names = coder.writes.names
    report, arms = changes(
        model, names, coder, 3, TEXTS[:2], (0.0, 4.0), n_random=1, unit="activation"
    )
    row = coder.direction(3)
    parts = {name: 4.0 * coder.writes.take(row, (name,)) for name in names}
    edits = {name: lambda x, part=part: x + part for name, part in parts.items()}
    _, kl, perplexity, _ = expected(model, TEXTS[:2], edits)
    assert report.steered.kl[1] == pytest.approx(kl, rel=1e-3)
    assert report.steered.perplexities[1] == pytest.approx(perplexity, rel=1e-4)
    assert report.random[0].perplexities[0] == report.perplexity
    first = arms[3][0]  # of a later site the change holds what the first one's change does to it
    np.testing.assert_allclose(
        np.linalg.norm(first, axis=-1), np.linalg.norm(np.array(parts[names[0]])), rtol=1e-3
    )


def test_of_a_model_pair_the_model_that_is_written_is_measured(sae, model):
    pair = ModelPair({"a": InterpretableModel.demo(), "b": model})
    named = columns(pair, f"b:{SITE}")
    coder = SAE(named, named, sae.n_features, "topk", k=8)
    coder.W_dec = sae.W_dec
    options = {"unit": "activation", "n_random": 1}
    found = strength_sweep(coder, pair, FEATURE, TEXTS[:2], (3.0,), **options).to_dict()
    assert found == strength_sweep(sae, model, FEATURE, TEXTS[:2], (3.0,), **options).to_dict()


def test_the_method_knows_the_model_and_collects_the_largest_values(sae, model, monkeypatch):
    data = SimpleNamespace(maxima=np.linspace(1, 3, sae.n_features))
    monkeypatch.setattr(sae, "_features", None)
    monkeypatch.setattr(type(sae), "_collected", lambda self, model: data)
    options = {"n_random": 0}
    found = sae.strength_sweep(FEATURE, TEXTS[:1], (0.0, 1.0), **options)
    same = strength_sweep(sae, model, FEATURE, TEXTS[:1], (0.0, 1.0), maxima=data.maxima, **options)
    assert found.to_dict() == same.to_dict()
    assert found.steered.effects[1] != 0


def test_the_features_chosen_are_those_whose_logits_stand_out_most(sae, model):
    rates = np.full(sae.n_features, 0.01)
    rates[[1, 2, 3]] = 0.0009, 0.051, 0.0
    logits = logit_directions(sae, model, range(sae.n_features)).astype(np.float64)
    scores = (logits.T - logits.mean(axis=1)) / logits.std(axis=1)
    text = np.array([i not in model.special_token_ids for i in range(len(scores))])
    allowed = (rates >= 0.001) & (rates <= 0.05)
    order = np.argsort(-np.where(allowed, scores[text].max(axis=0), -np.inf), kind="stable")
    assert peaked_features(sae, model, rates, 6) == order[:6].tolist()
    (token,) = model.encode(" class")[-1:]
    order = np.argsort(-np.where(allowed, scores[token], -np.inf), kind="stable")
    assert peaked_features(sae, model, rates, 6, token=" class") == order[:6].tolist()
    assert peaked_features(sae, model, np.zeros(sae.n_features)) == []
    assert len(peaked_features(sae, model, rates, 10**6)) == allowed.sum()


def test_special_tokens_are_no_targets_and_make_no_feature_peaked(sae, model, monkeypatch):
    logits = np.random.default_rng(0).normal(size=(sae.n_features, model.vocab_size))
    logits[4, min(model.special_token_ids)] = 1000
    logits[[4, 7], [300, 301]] = 20, 50
    monkeypatch.setattr(
        sweep,
        "logit_directions",
        lambda coder, source, features, sites: logits[[*map(int, features)]],
    )
    assert peaked_features(sae, model, np.full(sae.n_features, 0.01), 1) == [7]
    monkeypatch.setattr(sweep, "logit_directions", lambda *arguments: logits[[4]])
    assert promoted(sae, model, 4, 1) == [300]


@pytest.mark.slow
def test_the_top_logit_tokens_of_peaked_features_become_likelier_with_every_step(model):
    from pydoc_data.topics import topics

    texts = list(topics.values())
    config = SAEConfig(expansion_factor=8, k=16, batch_size=1024)
    sae = model.train_sae(
        layer=4, component="residual", dataset=texts[10:], config=config, verbose=False
    )
    data = sae.collect(max_tokens=50_000, verbose=False)
    scored = [text[:400] for text in texts[:6]]
    reports = [
        sae.strength_sweep(i, scored, (0.0, 0.25, 0.5, 0.75, 1.0))
        for i in peaked_features(sae, model, data.firing_rates, 3)
    ]
    assert len(reports) == 3
    for report in reports:
        assert report.is_monotone
        assert report.steered.perplexities[0] == report.perplexity
        assert report.steered.effects[-1] > 2 * max(r.effects[-1] for r in report.random)
