import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae import SAE, ActivationDataset
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.evals.loss import LossRecovered, loss_recovered
from mlxterp.sae.model_pair import ModelPair
from tests.fakes import SITE, FakeSource

AFFINE = (1, 2, 4)


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
    with pytest.raises(
        ValueError, match=r"\['layers.0.mlp'\] are missing; there are \['elsewhere'\]"
    ):
        fidelity(random_coder(8), ActivationDataset.from_activations({"elsewhere": data()}))


def test_loss_needs_text():
    arrays = ActivationDataset.from_activations({SITE: data(width=6)})
    with pytest.raises(ValueError, match="dataset made from texts"):
        loss_recovered(identity(6), arrays)


def test_loss_needs_data_of_what_is_written():
    dataset = ActivationDataset.from_texts(FakeSource(), ["abc"], SITE)
    other = SparseCoder(Columns((SITE,), (6,)), Columns(("b",), (6,)), 10, k=2)
    with pytest.raises(ValueError, match=r"\['b'\] are missing"):
        loss_recovered(other, dataset)


def test_figures_can_be_read():
    found = fidelity(random_coder(8), of_array(data()))
    assert set(found.to_dict()) == {"fvu", "l0", "dead", "n_tokens"}
    assert "FVU" in repr(found) and "500 tokens" in repr(found)


def randomised(coder: SparseCoder, seed: int = 0, scale: float = 0.3) -> SparseCoder:
    for i, name in enumerate(sorted(coder.parameters())):
        if name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
            coder[name] = scale * mx.random.normal(coder[name].shape, key=mx.random.key(seed + i))
    return coder


def columns(*names: str, width: int = 128) -> Columns:
    return Columns(names, (width,) * len(names))


def summed_fvu(y: np.ndarray, y_hat: np.ndarray) -> float:
    y = y.astype(np.float64)
    return np.sum((y - y_hat) ** 2) / np.sum((y - y.mean(axis=0)) ** 2)


@pytest.mark.parametrize("skip", [False, True])
def test_each_site_has_its_fvu(skip):
    x = data(5000, 9, mean=2.0)
    x[:, 4:] *= 30
    dataset = ActivationDataset.from_activations({"r": x[:, :2], "a": x[:, 2:4], "b": x[:, 4:]})
    writes = Columns(("b", "a"), (5, 2))
    coder = randomised(SparseCoder(Columns(("r",), (2,)), writes, 12, k=3, skip=skip))
    r = x[:, :2].astype(np.float64)
    arrays = {name: np.array(coder[name], np.float64) for name in ("W_enc", "W_dec", "b_dec")}
    pre = r @ arrays["W_enc"].T + np.array(coder.b_enc, np.float64)
    z = np.where(pre >= np.sort(pre, axis=1)[:, -3, None], np.maximum(pre, 0), 0)
    y_hat = z @ arrays["W_dec"] + arrays["b_dec"]
    y_hat = y_hat + r @ np.array(coder.W_skip, np.float64).T if skip else y_hat
    y = np.concatenate([x[:, 4:], x[:, 2:4]], axis=1)
    found = fidelity(coder, dataset)
    assert list(found.fvu_by_site) == ["b", "a"]
    assert found.fvu_by_site["b"] == pytest.approx(summed_fvu(y[:, :5], y_hat[:, :5]), rel=1e-4)
    assert found.fvu_by_site["a"] == pytest.approx(summed_fvu(y[:, 5:], y_hat[:, 5:]), rel=1e-4)
    assert found.fvu == pytest.approx(np.mean([*found.fvu_by_site.values()]), rel=1e-6)
    assert found.to_dict()["fvu_by_site"] == dict(found.fvu_by_site)
    assert "  a: FVU" in repr(found)


def test_a_site_that_does_not_vary_has_no_fvu():
    x = data(100, 4)
    x[:, 2:] = 1
    dataset = ActivationDataset.from_activations({"a": x[:, :2], "b": x[:, 2:]})
    sites = Columns(("a", "b"), (2, 2))
    found = fidelity(randomised(SparseCoder(sites, sites, 10, k=2)), dataset)
    assert (
        np.isnan(found.fvu_by_site["b"]) and np.isfinite([found.fvu, found.fvu_by_site["a"]]).all()
    )


@pytest.fixture(scope="module")
def affine(model, texts) -> InterpretableModel:
    """The bundled model with MLPs that are affine maps, the best there are for three layers."""
    module = copy.deepcopy(model.model)
    tokens = mx.array([model.encode(text)[:128] for text in texts if len(text) == 2000])
    done = model.run(tokens, capture=["layers.*.mlp_in", "layers.*.mlp_out"])
    for i in AFFINE:
        x, y = (
            np.array(done[f"layers.{i}.{name}"][:, 1:].reshape(-1, 128), np.float64)
            for name in ("mlp_in", "mlp_out")
        )
        fit = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0].astype(np.float32)
        module.layers[i].mlp = nn.Linear(128, 128)
        module.layers[i].mlp.weight = mx.array(fit[:-1].T)
        module.layers[i].mlp.bias = mx.array(fit[-1])
    return InterpretableModel(module, model.tokenizer)


def test_an_affine_mlp_is_recovered_by_the_affine_transcoder(affine, texts):
    sites = ["layers.2.mlp_in", "layers.2.mlp_out"]
    dataset = ActivationDataset.from_texts(affine, texts[:2], sites, context_length=64)
    coder = SparseCoder(columns(sites[0]), columns(sites[1]), 8, k=2, skip=True)
    mlp = affine.model.layers[2].mlp
    coder.W_skip, coder.b_dec = mlp.weight, mlp.bias
    found = loss_recovered(coder, dataset)
    assert found.ablated > found.clean + 0.02 and not found.by_site
    assert found.spliced == pytest.approx(found.clean, abs=1e-5)
    assert found.recovered == pytest.approx(1.0, abs=1e-3)
    assert fidelity(coder, dataset).fvu < 1e-8
    coder.b_dec = coder.b_dec + 1
    assert loss_recovered(coder, dataset).recovered < 0.9


def exact_layers(affine, layers) -> CrossLayerTranscoder:
    """Two features per column and layer, one for each sign, which write their own layer alone."""
    n, reads, writes = (
        len(layers),
        *(columns(*(f"layers.{i}.{name}" for i in layers)) for name in ("mlp_in", "mlp_out")),
    )
    coder = CrossLayerTranscoder(reads, writes, 256 * n, "relu", k=None)
    both = mx.concatenate([mx.eye(128), -mx.eye(128)])
    coder.W_enc = mx.concatenate([both] * n)
    decoders = [mx.zeros_like(rows) for rows in coder.decoder_blocks()]
    for rows, layer in zip(decoders, layers, strict=True):
        rows[:, :128] = both @ affine.model.layers[layer].mlp.weight.T
    coder.W_dec = coder.joined_decoder(decoders)
    coder.b_dec = mx.concatenate([affine.model.layers[layer].mlp.bias for layer in layers])
    return coder


def test_affine_mlps_are_recovered_by_their_cross_layer_transcoder(affine, texts):
    coder = exact_layers(affine, AFFINE)
    names = [*coder.reads.names, *coder.writes.names]
    dataset = ActivationDataset.from_texts(affine, texts[:2], names, context_length=64)
    found = loss_recovered(coder, dataset)
    assert found.recovered == pytest.approx(1.0, abs=1e-3)
    assert list(found.by_site) == list(coder.writes.names)
    for alone in found.by_site.values():
        assert alone.spliced == pytest.approx(found.clean, abs=1e-4)
        assert alone.ablated < found.ablated
    assert found.to_dict()["by_site"]["layers.2.mlp_out"]["clean"] == found.clean
    assert "layers.4.mlp_out: " in repr(found)


def test_what_replaces_all_layers_reads_the_replaced_stream(affine, texts):
    """The first layer is wrong by a constant: alone, later layers are exact nevertheless."""
    coder = exact_layers(affine, (1, 2))
    names = [*coder.reads.names, *coder.writes.names]
    coder.b_dec = coder.b_dec + mx.concatenate([mx.ones((128,)), mx.zeros((128,))])
    dataset = ActivationDataset.from_texts(affine, texts[:1], names, context_length=64)
    found = loss_recovered(coder, dataset)
    first, second = found.by_site.values()
    assert first.spliced > found.clean + 0.01
    assert second.spliced == pytest.approx(found.clean, abs=1e-4)
    # With an exact second layer the whole is what the model computes after a wrong first.
    assert found.spliced == pytest.approx(first.spliced, abs=1e-4)


class Watched:
    """A model that keeps what every pass had at some sites."""

    def __init__(self, model, sites):
        self.model, self.sites, self.seen = model, sites, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def run(self, tokens, *, capture=(), **options):
        done = self.model.run(tokens, capture=[*capture, *self.sites], **options)
        self.seen.append((options.get("edit"), [done[site] for site in self.sites]))
        return done


def test_all_sites_keep_the_activation_of_positions_that_do_not_count(affine, texts):
    coder = exact_layers(affine, (1, 2))
    coder.b_dec = coder.b_dec + 100
    watched = Watched(affine, [*coder.writes.names])
    names = [*coder.reads.names, *coder.writes.names]
    dataset = ActivationDataset.from_texts(watched, texts[:1], names, context_length=512)
    watched.seen.clear()
    loss_recovered(coder, dataset)
    tokens = mx.array(dataset.corpus.tokens)
    edited = [(edits, found) for edits, found in watched.seen if edits]
    assert len(edited) == 6
    clean = [affine.run(tokens, capture=[site])[site] for site in watched.sites]
    for edits, found in edited:
        # Of the first site replaced: later ones change by what they attend to as well.
        first = next(i for i, site in enumerate(watched.sites) if site in edits)
        kept = mx.isclose(clean[first], found[first], atol=1e-4).all(axis=-1)
        np.testing.assert_array_equal(~np.array(kept), dataset.corpus.documents() >= 0)


def next_token_loss(logits, dataset) -> float:
    tokens, counts = dataset.corpus.tokens, dataset.corpus.documents() >= 0
    log_p = nn.log_softmax(logits[:, :-1])
    of_next = mx.take_along_axis(log_p, mx.array(tokens)[:, 1:, None], axis=-1)[..., 0]
    return float(-np.array(of_next, np.float64)[counts[:, 1:]].mean())


def by_hand(coder, source, dataset, replaced: dict[str, str]) -> float:
    """The loss of a model with `{site of the coder: site of the model}` from a clean pass."""
    tokens, counts = mx.array(dataset.corpus.tokens), dataset.corpus.documents() >= 0
    clean = dataset.source.run(tokens, capture=list(coder.reads.names))
    written = coder(mx.concatenate([clean[name] for name in coder.reads.names], axis=-1))
    here = mx.array(counts)[..., None]
    edit = {
        own: lambda x, y=written[..., coder.writes.slices[name]]: mx.where(here, y, x)
        for name, own in replaced.items()
    }
    return next_token_loss(source.run(tokens, edit=edit).output, dataset)


def test_a_crosscoders_sites_are_replaced_alone_and_together(model, texts):
    a, b = "layers.1.resid_post", "layers.3.mlp_out"
    coder = randomised(SparseCoder(columns(a, b), columns(a, b), 60, k=5), scale=0.05)
    dataset = ActivationDataset.from_texts(model, texts[:1], [a, b], context_length=64)
    found = loss_recovered(coder, dataset)
    assert found.spliced == pytest.approx(by_hand(coder, model, dataset, {a: a, b: b}), rel=1e-4)
    assert list(found.by_site) == [a, b]
    for site, alone in found.by_site.items():
        assert alone.spliced == pytest.approx(
            by_hand(coder, model, dataset, {site: site}), rel=1e-4
        )
        assert alone.clean == found.clean and alone.n_tokens == found.n_tokens
    losses = {found.spliced, *(alone.spliced for alone in found.by_site.values())}
    assert len(losses) == 3


def test_a_site_of_two_models_is_judged_by_its_own_model(model, affine, texts):
    pair = ModelPair({"plain": model, "other": affine})
    sites = pair.sites_of("layers.2.resid_post")
    coder = randomised(SparseCoder(columns(*sites), columns(*sites), 60, k=5), scale=0.05)
    dataset = ActivationDataset.from_texts(pair, texts[:1], list(sites), context_length=64)
    found = loss_recovered(coder, dataset)
    tokens = mx.array(dataset.corpus.tokens)
    for site, own in zip(sites, (model, affine), strict=True):
        alone, replaced = found.by_site[site], {site: "layers.2.resid_post"}
        assert alone.clean == pytest.approx(
            next_token_loss(own.run(tokens).output, dataset), rel=1e-4
        )
        assert alone.spliced == pytest.approx(by_hand(coder, own, dataset, replaced), rel=1e-4)
    first, second = found.by_site.values()
    assert abs(first.clean - second.clean) > 0.1
    for name in ("clean", "spliced", "ablated"):
        mean = (getattr(first, name) + getattr(second, name)) / 2
        assert getattr(found, name) == pytest.approx(mean, rel=1e-6)


def test_wide_codes_are_measured_in_smaller_batches(monkeypatch):
    coder, dataset = random_coder(8), ActivationDataset.from_activations(data(500), site=SITE)
    whole = fidelity(coder, dataset)
    monkeypatch.setattr("mlxterp.sae.evals.fidelity.BATCH_ENTRIES", 70 * coder.n_features)
    parts = fidelity(coder, dataset)
    assert parts.fvu == pytest.approx(whole.fvu, rel=1e-6)
    assert parts.firing_rates.tolist() == whole.firing_rates.tolist()
