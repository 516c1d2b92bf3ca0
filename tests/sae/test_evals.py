import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE, ActivationDataset
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.evals import LossRecovered, fidelity, loss_recovered
from tests.fakes import SITE, FakeSource


def random_coder(width: int, n_features: int = 40, k: int = 4, site: str = SITE) -> SAE:
    columns = Columns((site,), (width,))
    coder = SAE(columns, columns, n_features, k=k)
    rng = np.random.default_rng(0)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        coder[name] = mx.array(0.3 * rng.normal(size=coder[name].shape).astype(np.float32))
    return coder


def identity(width: int, site: str = SITE) -> SAE:
    """Two features per dimension, one for each sign: z @ W_dec = relu(x) - relu(-x) = x."""
    coder = random_coder(width, 2 * width, 2 * width, site)
    both = mx.concatenate([mx.eye(width), -mx.eye(width)])
    coder.W_enc = coder.W_dec = both
    coder.b_enc, coder.b_dec = mx.zeros((2 * width,)), mx.zeros((width,))
    return coder


def constant(value: mx.array, site: str = SITE) -> SAE:
    coder = random_coder(len(value), site=site)
    coder.W_dec, coder.b_dec = mx.zeros_like(coder.W_dec), value
    return coder


def data(n=500, width=8, mean=0.0) -> np.ndarray:
    return (np.random.default_rng(1).normal(size=(n, width)) + mean).astype(np.float32)


def of_array(x: np.ndarray) -> ActivationDataset:
    return ActivationDataset.from_activations({SITE: x})


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
def test_fidelity_follows_the_formula_in_float64(mean):
    coder, x = random_coder(8), data(5000, mean=mean)
    found = fidelity(coder, of_array(x))
    W_enc, b_enc, W_dec, b_dec = (
        np.array(coder[name], np.float64) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    x = x.astype(np.float64)
    pre = x @ W_enc.T + b_enc
    z = np.where(pre >= np.sort(pre, axis=1)[:, -4, None], np.maximum(pre, 0), 0)
    error = np.sum((x - z @ W_dec - b_dec) ** 2)
    assert found.fvu == pytest.approx(error / np.sum((x - x.mean(axis=0)) ** 2), rel=1e-3)
    assert found.l0 == pytest.approx((z > 0).sum(axis=1).mean(), rel=1e-3)
    np.testing.assert_allclose(found.firing_rates, (z > 0).mean(axis=0), atol=1e-3)
    assert found.dead == pytest.approx((~(z > 0).any(axis=0)).mean())
    assert found.n_tokens == 5000


def test_a_perfect_coder_leaves_nothing_unexplained_and_the_mean_everything():
    x = data(mean=5.0)
    dataset = of_array(x)
    assert fidelity(identity(8), dataset).fvu < 1e-10
    at_mean = constant(mx.array(x.astype(np.float64).mean(axis=0).astype(np.float32)))
    assert fidelity(at_mean, dataset).fvu == pytest.approx(1.0, abs=1e-6)


def test_max_tokens_bounds_what_is_measured():
    dataset = of_array(data(9000))
    assert fidelity(random_coder(8), dataset, max_tokens=5000).n_tokens == 4096
    assert fidelity(random_coder(8), dataset, max_tokens=10).n_tokens == 4096
    assert fidelity(random_coder(8), dataset).n_tokens == 9000


def test_only_the_written_sites_count():
    x = data(400, 5)
    dataset = ActivationDataset.from_activations({"a": x[:, :2], "b": x[:, 2:]})
    coder = SparseCoder(Columns(("a",), (2,)), Columns(("b",), (3,)), 10, k=2)
    coder.b_dec = mx.array([1.0, 2.0, 3.0])
    b = x[:, 2:].astype(np.float64)
    expected = np.sum((b - [1, 2, 3]) ** 2) / np.sum((b - b.mean(axis=0)) ** 2)
    assert fidelity(coder, dataset).fvu == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_fvu_of_activations_that_do_not_vary_is_not_a_number(n):
    dataset = of_array(np.ones((n, 8), np.float32))
    found = fidelity(random_coder(8), dataset)
    assert np.isnan(found.fvu) and found.n_tokens == n


def test_an_identity_recovers_all_of_the_loss_and_the_mean_none(model, texts):
    site = "layers.2.resid_post"
    dataset = ActivationDataset.from_texts(model, texts[:2], site, context_length=64)
    found = loss_recovered(identity(128, site), dataset)
    assert found.recovered == pytest.approx(1.0, abs=1e-4)
    assert found.spliced == pytest.approx(found.clean, abs=1e-4)
    mean = np.concatenate([np.array(batch) for batch in dataset.batches()]).mean(axis=0)
    ablated = loss_recovered(constant(mx.array(mean), site), dataset)
    assert ablated.recovered == pytest.approx(0.0, abs=1e-3)
    assert ablated.clean == pytest.approx(found.clean) and ablated.ablated > ablated.clean + 0.5


def test_the_clean_loss_is_the_cross_entropy_of_the_tokens_that_count(model, texts):
    site = "layers.2.resid_post"
    dataset = ActivationDataset.from_texts(model, texts[:2], site, context_length=64)
    found = loss_recovered(identity(128, site), dataset)
    tokens, documents = dataset.corpus.tokens, dataset.corpus.documents()
    logits = np.array(model.run(mx.array(tokens)).output, np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    of_next = np.take_along_axis(log_p, tokens[:, 1:, None].astype(np.int64), axis=2)[..., 0]
    counts = documents[:, 1:] >= 0
    assert found.clean == pytest.approx(-of_next[counts].mean(), rel=1e-4)
    assert found.n_tokens == counts.sum()


def test_first_tokens_and_padding_keep_their_activation():
    changed = []

    class Watch(FakeSource):
        def run(self, tokens, *, edit=None, **options):
            for function in (edit or {}).values():
                before = self.table[mx.array(tokens)]
                difference = np.array(function(before) != before).any(axis=-1)
                changed.append((np.array(tokens), difference))
            return super().run(tokens, edit=edit, **options)

    dataset = ActivationDataset.from_texts(Watch(head=0.1), ["abc", "defg"], SITE, context_length=6)
    loss_recovered(constant(mx.full((6,), 1e3)), dataset)
    assert len(changed) == 2
    for tokens, difference in changed:
        np.testing.assert_array_equal(difference, tokens > 1)


def test_where_ablation_hardly_hurts_there_is_no_ratio():
    dataset = ActivationDataset.from_texts(FakeSource(head=0.0), ["abc", "defg"], SITE)
    found = loss_recovered(random_coder(6), dataset)
    assert found.clean == pytest.approx(np.log(97), rel=1e-5)
    assert found.recovered is None and "hardly hurts" in repr(found)
    assert LossRecovered(2.0, 2.0, 1.5, 10).recovered is None


def test_the_ratio_is_the_share_of_the_gap_that_is_closed():
    result = LossRecovered(clean=2.0, spliced=2.5, ablated=4.0, n_tokens=100)
    assert result.recovered == 0.75 and result.to_dict()["recovered"] == 0.75
    assert "75.0% recovered" in repr(result) and "2.500" in repr(result)


def test_max_tokens_bounds_the_tokens_scored():
    texts = ["abcdefghijklmno"] * 1000
    dataset = ActivationDataset.from_texts(FakeSource(head=0.1), texts, SITE, context_length=16)
    assert loss_recovered(identity(6), dataset, max_tokens=5000).n_tokens == 2 * 256 * 15


def test_data_of_another_site_is_refused_by_name():
    with pytest.raises(ValueError, match=r"\['layers.0.mlp'\] are missing; got \['elsewhere'\]"):
        fidelity(random_coder(8), ActivationDataset.from_activations({"elsewhere": data()}))


def test_loss_needs_text_and_a_coder_of_one_site():
    arrays = ActivationDataset.from_activations({SITE: data(width=6)})
    with pytest.raises(ValueError, match="dataset made from texts"):
        loss_recovered(identity(6), arrays)
    dataset = ActivationDataset.from_texts(FakeSource(), ["abc"], SITE)
    other = SparseCoder(Columns((SITE,), (6,)), Columns(("b",), (6,)), 10, k=2)
    with pytest.raises(ValueError, match="write the one site they read"):
        loss_recovered(other, dataset)


def test_figures_can_be_read():
    found = fidelity(random_coder(8), of_array(data()))
    assert set(found.to_dict()) == {"fvu", "l0", "dead", "n_tokens"}
    assert "FVU" in repr(found) and "500 tokens" in repr(found)
