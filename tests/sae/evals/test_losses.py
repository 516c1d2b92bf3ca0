"""The language model's loss and divergence against NumPy, with each ablation, and when a share of
them means nothing."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlxterp import InterpretableModel
from mlxterp.sae import SAE, ActivationDataset
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.evals import replacing
from mlxterp.sae.evals.evaluating import evaluate
from mlxterp.sae.evals.loss import loss_recovered
from mlxterp.sae.evals.measuring import chosen, measure

PLACE = "layers.2.resid_post"


def log_softmax(logits: mx.array) -> np.ndarray:
    x = np.array(logits, np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def by_numpy(source, corpus, before, edit=None) -> tuple[float, float]:
    """Loss and KL(before || edited), means over the tokens that count and are predicted."""
    tokens, counts = corpus.tokens, corpus.documents()[:, 1:] >= 0
    after = log_softmax(source.run(mx.array(tokens), edit=edit).output)[:, :-1]
    of_next = np.take_along_axis(after, tokens[:, 1:, None].astype(np.int64), axis=2)[..., 0]
    kl = (np.exp(before) * (before - after)).sum(axis=-1)
    return -of_next[counts].mean(), kl[counts].mean()


@pytest.fixture(scope="module")
def dataset(model, texts):
    short = [text[:500] for text in texts[:6]]
    return ActivationDataset.from_texts(model, short, PLACE, context_length=64)


@pytest.fixture(scope="module")
def loss(sae, dataset):
    return evaluate([sae], dataset, max_tokens=None)[0].loss


def test_losses_and_divergences_of_all_ablations(sae, model, dataset, loss):
    report = loss
    corpus = chosen(dataset.corpus, None, 0)
    counts = mx.array(corpus.documents() >= 0)[..., None]
    before = log_softmax(model.run(mx.array(corpus.tokens)).output)[:, :-1]
    found = measure([sae], dataset, None, 0)
    whole = np.concatenate([np.array(b) for b in dataset.batches()]).astype(np.float64)
    np.testing.assert_allclose(np.array(found.mean), whole.mean(axis=0), rtol=1e-4, atol=1e-5)
    edits = {
        "spliced": lambda x: sae(x),
        "zero": lambda x: 0 * x,
        "mean": lambda x: mx.broadcast_to(found.mean, x.shape),
    }
    expected = {
        name: by_numpy(model, corpus, before, {PLACE: lambda x, f=f: mx.where(counts, f(x), x)})
        for name, f in edits.items()
    }
    clean = by_numpy(model, corpus, before)[0]
    assert report.clean.value == pytest.approx(clean, rel=1e-5)
    assert report.spliced.value == pytest.approx(expected["spliced"][0], rel=1e-5)
    assert report.kl.value == pytest.approx(expected["spliced"][1], rel=1e-4)
    assert report.difference.value == pytest.approx(expected["spliced"][0] - clean, rel=1e-4)
    for how in ("zero", "mean"):
        loss, kl = expected[how]
        ablation = report.ablations[how]
        assert ablation.loss.value == pytest.approx(loss, rel=1e-5)
        assert ablation.kl.value == pytest.approx(kl, rel=1e-4)
        share = (loss - expected["spliced"][0]) / (loss - clean)
        assert ablation.recovered.value == pytest.approx(share, rel=1e-4)
        share = 1 - expected["spliced"][1] / kl
        assert ablation.kl_recovered.value == pytest.approx(share, rel=1e-4)
    assert report.recovered.value > 0.5 and 0 < report.recovered.spread < 0.2
    assert report.n_tokens == (corpus.documents()[:, 1:] >= 0).sum()
    plain = loss_recovered(sae, dataset)
    assert plain.spliced == pytest.approx(report.spliced.value, rel=1e-5)
    assert plain.recovered == pytest.approx(report.recovered.value, rel=1e-3)


def test_resampled_activations_are_those_of_other_tokens(sae, dataset, monkeypatch):
    """By the activations that take the place: each is one of the sample, and they differ."""
    put = []
    constant = replacing._constant

    def watched(value):
        put.append(np.array(value))
        return constant(value)

    monkeypatch.setattr(replacing, "_constant", watched)
    evaluate([sae], dataset)
    sample = np.array(measure([sae], dataset, None, 0).sample)
    resampled = [value for value in put if value.ndim == 3 and value.shape[-1] == 128][1]
    rows = {row.tobytes() for row in sample}
    flat = resampled.reshape(-1, 128)
    assert all(row.tobytes() in rows for row in flat)
    assert len({row.tobytes() for row in flat}) > 0.4 * len(flat)


def test_ablations_in_order_of_how_far_they_go(sae, dataset, loss):
    found = loss
    losses = {how: x.loss.value for how, x in found.ablations.items()}
    assert found.clean.value < found.spliced.value < min(losses.values())
    assert losses["mean"] < losses["resample"]
    other = evaluate([sae], dataset, seed=3)[0].loss
    assert other.ablations["resample"].loss.value != losses["resample"]


def test_blocks_of_contexts_do_not_matter(sae, dataset, loss, monkeypatch):
    whole = loss
    monkeypatch.setattr(replacing, "LOGIT_ENTRIES", 3 * 64 * 4096)
    parts = evaluate([sae], dataset)[0].loss
    assert parts.spliced.value == pytest.approx(whole.spliced.value, rel=1e-6)
    kl = whole.ablations["mean"].kl.value
    assert parts.ablations["mean"].kl.value == pytest.approx(kl, rel=1e-5)


@pytest.fixture(scope="module")
def untrained(model) -> InterpretableModel:
    """The bundled model as it was before its training: every matrix drawn anew."""
    module = copy.deepcopy(model.model)
    key = mx.random.key(0)
    drawn = []
    for i, (name, array) in enumerate(tree_flatten(module.parameters())):
        if array.ndim > 1:
            scale = array.shape[-1] ** -0.5
            array = scale * mx.random.normal(array.shape, key=mx.random.split(key, i + 1)[i])
        drawn.append((name, array))
    module.update(tree_unflatten(drawn))
    return InterpretableModel(module, model.tokenizer)


def test_of_an_untrained_model_nothing_can_be_recovered(untrained, texts):
    dataset = ActivationDataset.from_texts(untrained, texts[:1], PLACE, context_length=64)
    report = evaluate([near(dataset)], dataset)[0]
    assert report.fidelity.explained_variance.value > 0.8  # which is why it is no sign of anything
    assert report.loss.clean.value > 0.98 * np.log(4096)
    for ablation in report.loss.ablations.values():
        for share in (ablation.recovered, ablation.kl_recovered):
            assert share.value is None and "no better than a uniform guess" in share.reason
    note = repr(report).splitlines()[-1]
    assert note.startswith("  loss recovered (zero), ") and "KL recovered (mean)" in note
    assert "no value, for the model predicts no better than a uniform guess" in note
    assert "why there is no value" in report._repr_html_()
    assert "no share recovered" in report.summary
    assert report.to_dict()["loss"]["ablations"]["zero"]["recovered"]["value"] is None


def near(dataset: ActivationDataset) -> SAE:
    """An SAE that writes what it reads, but for a tenth."""
    width = dataset.columns.width
    coder = SAE(dataset.columns, dataset.columns, 2 * width, "relu", k=None)
    both = mx.concatenate([mx.eye(width), -mx.eye(width)])
    coder.W_enc, coder.W_dec = both, 0.9 * both
    return coder


def test_where_ablation_costs_too_little_there_is_a_reason(model, texts, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.evals.loss_passes.LEAST_GAP", 100.0)
    dataset = ActivationDataset.from_texts(model, texts[:1], PLACE, context_length=64)
    found = evaluate([near(dataset)], dataset)[0].loss
    assert found.recovered.value is None
    assert "ablation (mean) costs" in found.recovered.reason
    assert "too little to divide by" in found.reasons["KL recovered (zero)"]


def columns(*names: str) -> Columns:
    return Columns(names, (128,) * len(names))


def test_a_transcoder_is_judged_by_what_it_writes(model, texts, monkeypatch):
    """With the best affine map of its MLP it is as good as its control, and no better."""
    sites = "layers.2.mlp_in", "layers.2.mlp_out"
    dataset = ActivationDataset.from_texts(model, texts[:20], [*sites], context_length=128)
    x, y = np.split(np.concatenate([np.array(b, np.float64) for b in dataset.batches()]), 2, axis=1)
    fit = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0].astype(np.float32)
    coder = SparseCoder(columns(sites[0]), columns(sites[1]), 8, k=2, skip=True)
    coder.W_skip, coder.b_dec = mx.array(fit[:-1].T), mx.array(fit[-1])
    monkeypatch.setattr(replacing, "LOGIT_ENTRIES", 2 * 128 * 4096)
    report = evaluate([coder], dataset, max_loss_tokens=200)[0]
    fvu = np.sum((y - np.c_[x, np.ones(len(x))] @ fit) ** 2) / np.sum((y - y.mean(axis=0)) ** 2)
    assert report.fvu == pytest.approx(fvu, rel=1e-4)
    assert report.fidelity.control == "affine map"
    control = report.fidelity.fvu.control
    assert report.fvu < control < 1.3 * report.fvu
    assert 200 <= report.loss.n_tokens < 600
    module = model.model.layers[2].mlp
    assert not isinstance(module, nn.Linear) and report.loss.difference.value > 0


def test_sites_of_a_crosscoder_are_replaced_together_and_alone(model, texts):
    names = "layers.1.resid_post", "layers.3.mlp_out"
    coder = SparseCoder(columns(*names), columns(*names), 60, k=5)
    for i, name in enumerate(("W_enc", "b_enc", "W_dec", "b_dec")):
        coder[name] = 0.05 * mx.random.normal(coder[name].shape, key=mx.random.key(i))
    short = [text[:300] for text in texts[:2]]
    dataset = ActivationDataset.from_texts(model, short, [*names], context_length=64)
    report = evaluate([coder], dataset)[0].loss
    plain = loss_recovered(coder, dataset)
    assert report.spliced.value == pytest.approx(plain.spliced, rel=1e-5)
    assert list(report.by_site) == list(names)
    for name, alone in report.by_site.items():
        assert alone.spliced.value == pytest.approx(plain.by_site[name].spliced, rel=1e-5)
        assert alone.ablated.value == pytest.approx(plain.by_site[name].ablated, rel=1e-4)
    assert f"recovered at {names[1]} (mean)" in repr(report)
    assert report.plot().axes
