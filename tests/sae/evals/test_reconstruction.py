"""Every score of fidelity against float64 NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE, ActivationDataset
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.evals import measuring
from mlxterp.sae.evals.definitions import DEFINITIONS
from mlxterp.sae.evals.evaluating import evaluate
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.evals.measuring import measure, spans
from mlxterp.sae.evals.reconstruction import SCORES
from tests.fakes import SITE, FakeSource


def coder_of(width: int, site: str = SITE, seed: int = 0) -> SAE:
    columns = Columns((site,), (width,))
    coder = SAE(columns, columns, 40, k=4)
    rng = np.random.default_rng(seed)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        coder[name] = mx.array(0.3 * rng.normal(size=coder[name].shape).astype(np.float32))
    return coder


def reconstructed(coder: SparseCoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Code and reconstruction in float64."""
    W_enc, b_enc, W_dec, b_dec = (
        np.array(coder[name], np.float64) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    pre = x.astype(np.float64) @ W_enc.T + b_enc
    z = np.where(pre >= np.sort(pre, axis=1)[:, -coder.k, None], np.maximum(pre, 0), 0)
    return z, z @ W_dec + b_dec


def of_numpy(y: np.ndarray, y_hat: np.ndarray) -> dict[str, float]:
    y, r = y.astype(np.float64), y - y_hat
    norms, written = np.linalg.norm(y, axis=1), np.linalg.norm(y_hat, axis=1)
    fvu = np.sum(r**2) / np.sum((y - y.mean(axis=0)) ** 2)
    return {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "cosine": np.mean((y * y_hat).sum(axis=1) / norms / written),
        "norm_ratio": np.mean(written / norms),
        "reconstruction_bias": np.mean(written**2) / np.mean((y * y_hat).sum(axis=1)),
        "mse": np.mean(np.sum(r**2, axis=1)),
    }


def defined(y: np.ndarray, y_hat: np.ndarray, batch: int) -> dict[str, float]:
    y = y.astype(np.float64)
    r2, y2 = np.sum((y - y_hat) ** 2, axis=1), np.sum(y**2, axis=1)
    batches = [slice(i, i + batch) for i in range(0, len(y), batch)]
    centred = np.concatenate([y[b] - y[b].mean(axis=0) for b in batches])
    c2 = np.sum(centred**2, axis=1)
    return {
        "global_mean": 1 - r2.sum() / np.sum((y - y.mean(axis=0)) ** 2),
        "without_offset": 1 - np.var(y - y_hat, axis=0).sum() / np.var(y, axis=0).sum(),
        "per_token": np.mean(1 - r2 / c2),
        "quasi_uncentred": quasi_uncentred(y, r2),
        "uncentred": 1 - r2.sum() / y2.sum(),
        "normalized_mse": 1 - np.mean(r2 / y2),
        "per_batch": np.mean([1 - r2[b].sum() / c2[b].sum() for b in batches]),
    }


def quasi_uncentred(y: np.ndarray, r2: np.ndarray) -> float | None:
    below = np.sum(y**2, axis=1).mean() - np.mean(y**2) ** 2
    return 1 - r2.mean() / below if below > 0 else None


def data(n=500, width=8, mean=0.0) -> np.ndarray:
    return (np.random.default_rng(1).normal(size=(n, width)) + mean).astype(np.float32)


@pytest.mark.parametrize(("mean", "rel"), [(0.0, 1e-5), (3.0, 1e-5), (100.0, 1e-4)])
def test_scores_follow_their_formulas(mean, rel):
    coder, x = coder_of(8), data(9000, mean=mean)
    dataset = ActivationDataset.from_activations({SITE: x}, shuffle=False)
    report = evaluate([coder], dataset)[0]
    z, y_hat = reconstructed(coder, x)
    for name, value in of_numpy(x, y_hat).items():
        assert float(getattr(report.fidelity, name)) == pytest.approx(value, rel=rel), name
    definitions = report.fidelity.definitions
    for name, value in defined(x, y_hat, 4096).items():
        same = definitions[name] is None if value is None else pytest.approx(value, rel=rel)
        assert same is True or definitions[name] == same, name
    assert definitions["per_prompt"] is None
    assert report.l0 == pytest.approx((z > 0).sum(axis=1).mean(), rel=1e-3)
    assert report.fvu == pytest.approx(fidelity(coder, dataset).fvu, rel=1e-6)
    assert set(report.fidelity.definitions) == set(DEFINITIONS)


def test_far_from_zero_the_variance_is_not_lost():
    x = data(5000, mean=10_000.0)
    identity = SAE(*[Columns((SITE,), (8,))] * 2, 8, "relu", k=None)
    identity.W_enc = identity.W_dec = mx.eye(8)
    identity.b_enc, identity.b_dec = mx.zeros((8,)), mx.zeros((8,))
    # Of what the mean of the activations writes all is unexplained; of one column more, 1 / 8.
    found = evaluate([identity], ActivationDataset.from_activations({SITE: x}))[0]
    assert found.fvu == pytest.approx(0, abs=1e-6)
    identity.W_dec = mx.zeros((8, 8))
    identity.b_dec = mx.array(x.astype(np.float64).mean(axis=0).astype(np.float32))
    assert evaluate([identity], ActivationDataset.from_activations({SITE: x}))[0].fvu == (
        pytest.approx(1, rel=1e-3)
    )


def test_definitions_differ_as_they_are_said_to():
    """A constant error is not seen by one, and the mean counts as explained in three."""
    x = data(4000, mean=5.0)
    identity = SAE(*[Columns((SITE,), (8,))] * 2, 8, "relu", k=None)
    identity.W_enc = identity.W_dec = mx.eye(8)
    identity.b_dec = mx.full((8,), 0.5)
    found = evaluate([identity], ActivationDataset.from_activations({SITE: x}))[0].fidelity
    assert found.definitions["without_offset"] == pytest.approx(1, abs=1e-4)
    assert found.definitions["global_mean"] == pytest.approx(0.75, abs=0.02)
    for name in ("uncentred", "normalized_mse"):
        assert found.definitions[name] > 0.98
    assert found.definitions["quasi_uncentred"] is None  # it would divide by less than nothing


@pytest.fixture(scope="module")
def spoken():
    rng = np.random.default_rng(3)
    texts = ["".join(rng.choice(list("abcdefgh xyz"), size=n)) for n in rng.integers(8, 60, 30)]
    return ActivationDataset.from_texts(FakeSource(head=0.1), texts, SITE, context_length=16)


def test_scores_of_contexts_and_documents(spoken):
    coder = coder_of(6)
    report = evaluate([coder], spoken, max_tokens=None)[0]
    corpus, source = spoken.corpus, spoken.source
    documents = corpus.documents()
    ratios, sums = [], {}
    for row, owners in zip(corpus.tokens, documents, strict=True):
        x = np.array(source.table)[row[owners >= 0]]
        if not len(x):
            continue
        _, y_hat = reconstructed(coder, x)
        error = np.sum((x - y_hat) ** 2, axis=1)
        varied = np.sum((x.astype(np.float64) - x.astype(np.float64).mean(axis=0)) ** 2)
        if varied > 1e-6 * np.sum(x**2):
            ratios.append(1 - error.sum() / varied)
        for owner, value in zip(owners[owners >= 0], error, strict=True):
            sums.setdefault(owner, []).append(value)
    assert report.fidelity.definitions["per_prompt"] == pytest.approx(np.mean(ratios), rel=1e-4)
    assert report.data.n_documents == len(sums) == report.data.n_clusters == 30
    assert report.data.n_tokens == (documents >= 0).sum()
    # The standard error of a ratio of sums over documents, by the delta method.
    n = np.array([len(x) for x in sums.values()])
    total = np.array([np.sum(x) for x in sums.values()])
    rest = total - n * total.sum() / n.sum()
    expected = np.sqrt(len(n) / (len(n) - 1) * np.sum(rest**2)) / n.sum()
    assert report.fidelity.mse.spread == pytest.approx(expected, rel=0.1)


def test_scores_do_not_depend_on_how_codes_are_cut(spoken, monkeypatch):
    coder = coder_of(6)
    whole = evaluate([coder], spoken)[0]
    monkeypatch.setattr(measuring, "CODE_ENTRIES", 50 * coder.n_features)
    parts = evaluate([coder], spoken)[0]
    assert parts.fvu == pytest.approx(whole.fvu, rel=1e-6)
    np.testing.assert_array_equal(parts.sparsity.density, whole.sparsity.density)
    np.testing.assert_array_equal(parts.sparsity.per_context, whole.sparsity.per_context)
    np.testing.assert_array_equal(parts.sparsity.first, whole.sparsity.first)


def test_pieces_end_where_contexts_do():
    contexts = np.repeat([4, 1, 7, 2], [5, 3, 6, 4])
    assert list(spans(contexts, 18, 7)) == [(0, 5), (5, 8), (8, 18)]
    for size in (1, 7, 100):
        found = list(spans(contexts, 18, size))
        assert found[0][0] == 0 and found[-1][1] == 18
        assert all(a[1] == b[0] for a, b in zip(found, found[1:], strict=False))
        assert {end for _, end in found} <= {5, 8, 14, 18}
    assert list(spans(contexts, 18, 100)) == [(0, 18)]
    assert list(spans(None, 10, 4)) == [(0, 4), (4, 8), (8, 10)]


def test_so_many_tokens_are_chosen_at_random_and_by_the_seed(spoken):
    coder = coder_of(6)
    found = [measure([coder], spoken, 200, seed) for seed in (0, 0, 1)]
    assert all(100 < one.n_tokens <= 200 for one in found)
    first, again, other = (one.corpus.tokens.tolist() for one in found)
    assert first == again and first != other
    rows = spoken.corpus.tokens.tolist()
    assert all(row in rows for row in first) and first != rows[: len(first)]
    with pytest.raises(ValueError, match="max_tokens must be None or >= 1, got 0"):
        measure([coder], spoken, 0, 0)


def test_each_site_has_its_scores_and_together_they_are_averaged():
    x = data(3000, 9, mean=2.0)
    x[:, 4:] *= 30
    dataset = ActivationDataset.from_activations({"a": x[:, :4], "b": x[:, 4:]}, shuffle=False)
    sites = Columns(("b", "a"), (5, 4))
    coder = SparseCoder(sites, sites, 30, k=3)
    rng = np.random.default_rng(4)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        coder[name] = mx.array(0.3 * rng.normal(size=coder[name].shape).astype(np.float32))
    report = evaluate([coder], dataset)[0].fidelity
    y = np.concatenate([x[:, 4:], x[:, :4]], axis=1)
    _, y_hat = reconstructed(coder, y)
    parts = {"b": slice(0, 5), "a": slice(5, 9)}
    expected = {site: of_numpy(y[:, part], y_hat[:, part]) for site, part in parts.items()}
    assert list(report.by_site) == ["b", "a"]
    for name in SCORES:
        for site, alone in report.by_site.items():
            assert float(getattr(alone, name)) == pytest.approx(expected[site][name], rel=1e-4)
        mean = np.mean([expected[site][name] for site in parts])
        assert float(getattr(report, name)) == pytest.approx(mean, rel=1e-4)
    assert set(report.to_dict()["by_site"]) == {"a", "b"} and "explained at a" in repr(report)


def test_what_does_not_vary_has_a_reason_in_place_of_a_value():
    dataset = ActivationDataset.from_activations({SITE: np.ones((50, 8), np.float32)})
    report = evaluate([coder_of(8)], dataset)[0]
    assert report.fidelity.explained_variance.value is None
    assert report.fidelity.fvu.reason == "the activations do not vary"
    assert "explained variance: no value, for the activations do not vary" in repr(report)
    assert np.isnan(report.fvu) and report.to_json()


def test_of_arrays_each_token_is_its_own():
    x = data(5000)
    dataset = ActivationDataset.from_activations({SITE: x}, shuffle=False)
    report = evaluate([coder_of(8)], dataset, max_tokens=100)[0]
    assert report.data.n_tokens == report.data.n_clusters == 100
    assert report.data.clusters == "tokens" and report.loss is None
    _, y_hat = reconstructed(coder_of(8), x[:100])
    errors = np.sum((x[:100] - y_hat) ** 2, axis=1)
    assert report.fidelity.mse.spread == pytest.approx(errors.std(ddof=1) / 10, rel=0.1)
    assert "documents" not in repr(report) and "special" not in repr(report)
    with pytest.raises(ValueError, match="max_loss_tokens must be None or >= 1, got 0"):
        evaluate([coder_of(8)], dataset, max_loss_tokens=0)


def test_without_a_finite_activation_nothing_can_be_measured():
    source = FakeSource(not_finite="ab")
    dataset = ActivationDataset.from_texts(source, ["abba", "baab"], SITE, context_length=8)
    with pytest.raises(ValueError, match="None of the activations is finite"):
        evaluate([coder_of(6)], dataset)


def test_layers_of_a_cross_layer_transcoder_are_compared_with_what_they_can_read():
    """The second layer's output is linear in what both layers read, the first one's in nothing
    that its own layer reads: an affine map explains all of the one, and nothing of the other."""
    rng = np.random.default_rng(5)
    read = rng.normal(size=(2000, 6)).astype(np.float32)
    second = read @ rng.normal(size=(6, 4)).astype(np.float32)
    first = read[:, 3:] @ rng.normal(size=(3, 4)).astype(np.float32)
    sites = {"r0": read[:, :3], "r1": read[:, 3:], "w0": first, "w1": second}
    reads, writes = Columns(("r0", "r1"), (3, 3)), Columns(("w0", "w1"), (4, 4))
    coder = CrossLayerTranscoder(reads, writes, 16, "relu", k=None)
    for name in ("W_enc", "W_dec"):
        coder[name] = mx.array(0.3 * rng.normal(size=coder[name].shape).astype(np.float32))
    report = evaluate([coder], ActivationDataset.from_activations(sites, shuffle=False))[0].fidelity
    y_hat = np.array(coder(mx.array(read)), np.float64)
    for name, y, part in (("w0", first, slice(0, 4)), ("w1", second, slice(4, 8))):
        expected = of_numpy(y, y_hat[:, part])["fvu"]
        assert report.by_site[name].fvu.value == pytest.approx(expected, rel=1e-4)
    assert report.by_site["w0"].explained_variance.control == pytest.approx(0, abs=0.02)
    assert report.by_site["w1"].explained_variance.control == pytest.approx(1, abs=1e-4)
