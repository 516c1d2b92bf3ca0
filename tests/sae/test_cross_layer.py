import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset, CrossLayerConfig, CrossLayerTrainer, load_sae
from mlxterp.sae.coder import Columns
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.evals.fidelity import fidelity
from tests.sae import kinds
from tests.sae.kinds import dense_decoder, dense_encoder
from tests.sae.runs import config, differences
from tests.sae.synthetic import recovery

KIND = "cross-layer transcoder"
FUNCTIONS = kinds.FUNCTIONS
SMALL = CrossLayerConfig(
    expansion_factor=0.5, k=4, num_epochs=2, learning_rate=3e-3, batch_size=64, warmup_steps=0,
    validation_split=0.1,
)  # fmt: skip
TEXTS = ["def f(x):\n    return [x, x + 1]\n" * 40]
N_FACTORS, D_OUT = 24, 20


def settings(**options):
    return config(**{**kinds.settings(KIND), **options})


def fit(rows: mx.array, **options) -> CrossLayerTranscoder:
    return kinds.fit(KIND, rows, settings(validation_split=0, **options))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# Its structure


@pytest.mark.parametrize("name", FUNCTIONS)
def test_features_read_their_own_layer_and_write_to_that_and_later_ones(name):
    coder = fit(kinds.activations(), activation_function=name)
    n = coder.n_features // 2
    W_enc, W_dec = dense_encoder(coder), dense_decoder(coder)
    before = W_dec[n:, :5], W_enc[:n, 6:], W_enc[n:, :6]
    assert not any(part.any() for part in before)
    others = W_dec[:n, :5], W_dec[:n, 5:], W_dec[n:, 5:], W_enc[:n, :6], W_enc[n:, 6:]
    assert all((np.abs(part).max(axis=1) > 0).all() for part in others)
    norms = np.array(coder.decoder_norms())
    assert (norms[:n] > 0).all() and (norms[n:, 0] == 0).all() and (norms[n:, 1] > 0).all()


@pytest.mark.parametrize("n_layers", [2, 3, 5])
def test_only_blocks_that_are_written_are_stored(n_layers):
    reads, writes = (
        Columns(tuple(f"{side}.{i}" for i in range(n_layers)), (width,) * n_layers)
        for side, width in (("in", 4), ("out", 3))
    )
    coder = CrossLayerTranscoder(reads, writes, 10 * n_layers, k=2)
    assert coder.W_enc.shape == (10 * n_layers, 4)
    assert coder.W_dec.size == 10 * 3 * n_layers * (n_layers + 1) // 2
    assert (coder.d_in, coder.d_out, len(coder.blocks)) == (4 * n_layers, 3 * n_layers, n_layers)


def test_what_a_layer_writes_depends_on_no_later_layer():
    rows = kinds.activations()
    coder, sites = fit(rows), kinds.of_sites(rows)
    changed = {**sites, "in.1": sites["in.1"] + 1}
    before, after = (np.array(coder(x)) for x in (sites, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max() > 0.01
    changed = {**sites, "in.0": sites["in.0"] + 1}
    assert (np.abs(np.array(coder(changed)) - before).max(axis=0) > 1e-4).all()


@pytest.mark.parametrize("name", ["topk", "abs_topk", "batch_topk"])
def test_k_is_that_of_each_layer(name):
    rows = kinds.activations(600)
    coder = fit(rows, activation_function=name, k=3, num_epochs=4, learning_rate=1e-2)
    active = np.array(coder.encode(kinds.of_sites(rows)) != 0)
    for block in coder.blocks:
        of_layer = active[:, block.features].sum(axis=1)
        if name == "batch_topk":  # by a threshold, which is an average over the last steps
            assert of_layer.mean() == pytest.approx(3, rel=0.4) and of_layer.max() > 3
        else:
            assert 2 < of_layer.mean() <= 3 and of_layer.max() == 3
    if name == "batch_topk":
        assert coder.statistics.training[-1]["l0"] == pytest.approx(6, rel=1e-3)
        assert coder.activation_function.threshold.shape == (2,)


def test_the_wanted_l0_of_penalised_functions_is_that_of_each_layer():
    rows = kinds.activations(300)
    coder = fit(rows, activation_function="jumprelu", target_l0=3.0, num_epochs=30)
    assert coder.statistics.training[-1]["l0"] == pytest.approx(6, rel=0.3)


# What it learns


def planted(n=12_000, active=2.0):
    """Activations, and what factors write: those of layer 0 `[n, 2 d]` to both, those of layer 1.

    Factors of layer 0 appear in what layer 0 reads only, though layer 1 writes them too.
    """
    rng = np.random.default_rng(0)

    def factors(width):
        return unit(rng.normal(size=(N_FACTORS, width)))

    codes = [
        (rng.random((n, N_FACTORS)) < active / N_FACTORS) * rng.uniform(0.5, 1.5, (n, N_FACTORS))
        for _ in range(2)
    ]
    both, last = np.hstack([factors(D_OUT), factors(D_OUT)]), factors(D_OUT)
    arrays = {f"in.{i}": codes[i] @ factors(24) for i in range(2)}
    arrays["out.0"] = codes[0] @ both[:, :D_OUT]
    arrays["out.1"] = codes[0] @ both[:, D_OUT:] + codes[1] @ last
    return {
        name: (x + 0.01 * rng.normal(size=x.shape)).astype(np.float32)
        for name, x in arrays.items()
    }, both, last  # fmt: skip


def test_features_that_write_to_a_later_layer_are_found_with_what_they_write_there():
    arrays, both, last = planted()
    options = {"batch_size": 256, "num_epochs": 12, "dead_window": 20_000, "log_every": 100}
    own = settings(
        expansion_factor=2, dead_neuron_threshold=0, validation_split=0, activation_function="topk",
        **options,
    )  # fmt: skip
    coder = CrossLayerTrainer(own).fit(arrays, ["in.0", "in.1"], ["out.0", "out.1"])
    first, second = (np.array(W) for W in coder.decoder_blocks())
    assert recovery(unit(both), first) > 0.95 and recovery(last, second) > 0.95
    here, later = (unit(first[:, part]) for part in (slice(0, D_OUT), slice(D_OUT, None)))
    # The feature that has a factor's row at its own layer has its row at the later one.
    of_factor = (unit(both[:, :D_OUT]) @ here.T).argmax(axis=1)
    cosines = (unit(both[:, D_OUT:]) * later[of_factor]).sum(axis=1)
    assert cosines.mean() > 0.95
    rng = np.random.default_rng(9)
    assert recovery(unit(both), rng.normal(size=first.shape)) < 0.6
    assert recovery(last, rng.normal(size=second.shape)) < 0.6


# Settings and sites that are refused


@pytest.mark.parametrize(
    ("field", "value"),
    [("resample_dead_every", 10), ("tied_weights", True), ("decoder_unit_norm", True)],
)
def test_settings_that_need_one_block_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be (0|False) for .*, got {value}"):
        fit(kinds.activations(), **{field: value})


def test_the_defaults_are_settings_that_it_can_have():
    defaults = CrossLayerConfig()
    assert (defaults.resample_dead_every, defaults.decoder_unit_norm) == (0, False)
    assert CrossLayerConfig.recommended(64, 10_000).decoder_unit_norm is False


def unread():
    raise AssertionError("the texts were read before the sites were checked")
    yield


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2, 1], r"layers\.1\.mlp_in does not depend on layers\.2\.mlp_in"),
        ([1, 3, 2], r"layers\.2\.mlp_in does not depend on layers\.3\.mlp_in"),
        ([2, 2], "The source and the target are both layers.2.mlp_in"),
        ([1, 9], "9"),
    ],
)
def test_layers_that_do_not_ascend_are_refused(model, layers, message):
    with pytest.raises(ValueError, match=message):
        CrossLayerTrainer.train(model, layers, unread(), config=SMALL, verbose=False)


def test_one_layer_is_refused(model):
    with pytest.raises(ValueError, match="two or more"):
        CrossLayerTrainer.train(model, [2], TEXTS, config=SMALL, verbose=False)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (("mlp_out", "mlp_in"), r"layers\.1\.mlp_in does not depend on layers\.1\.mlp_out"),
        (("mlp", "mlp"), "The source and the target are both layers.1.mlp"),
    ],
)
def test_components_in_the_wrong_order_are_refused(model, components, message):
    with pytest.raises(ValueError, match=message):
        CrossLayerTrainer.train(
            model, [1, 2], unread(), *components, config=SMALL, verbose=False
        )  # fmt: skip


@pytest.mark.parametrize(
    ("reads", "writes", "message"),
    [
        (["in.0"], ["out.0"], "of each of two or more layers, got in.0"),
        (["in.0", "in.1"], ["out.0"], "of each of two or more layers"),
        (["in.0", "out.1"], ["in.1", "out.0"], "All layers must have one width"),
        (["in.0", "in.7"], ["out.0", "out.1"], r"\['in.7'\] are missing"),
    ],
)
def test_sites_that_are_not_one_of_each_layer_are_refused(reads, writes, message):
    data = kinds.of_sites(kinds.activations())
    with pytest.raises(ValueError, match=message):
        CrossLayerTrainer(settings()).fit(data, reads, writes)


# On a model


@pytest.fixture(scope="module")
def trained(model) -> CrossLayerTranscoder:
    return CrossLayerTrainer.train(model, [1, 2, 4], TEXTS, config=SMALL, verbose=False)


def test_it_is_trained_between_the_inputs_and_outputs_of_mlps(trained, model):
    assert trained.reads.names == tuple(f"layers.{i}.mlp_in" for i in (1, 2, 4))
    assert trained.writes.names == tuple(f"layers.{i}.mlp_out" for i in (1, 2, 4))
    assert (trained.n_features, trained.k, len(trained.blocks)) == (3 * 64, 4, 3)
    first, last = (trained.statistics.validation[i] for i in (0, -1))
    assert last["fvu"] < 0.9 * first["fvu"] and set(last["fvu_by_site"]) == set(
        trained.writes.names
    )
    sites = [*trained.reads.names, *trained.writes.names]
    data = ActivationDataset.from_texts(model, TEXTS, sites)
    assert fidelity(trained, data).fvu < 1


def test_other_components_may_be_named(model):
    coder = CrossLayerTrainer.train(
        model, [1, 2], TEXTS, "attn_in", "attn_out", config=SMALL, verbose=False
    )
    assert coder.reads.names == ("layers.1.attn_in", "layers.2.attn_in")
    assert coder.writes.names == ("layers.1.attn_out", "layers.2.attn_out")


def test_it_comes_back_from_the_disk_with_its_model(trained, model, tmp_path):
    path = trained.save(tmp_path / "clt.mlx")
    loaded = model.load_sae(path)
    assert isinstance(loaded, CrossLayerTranscoder) and not differences(loaded, trained)
    assert isinstance(load_sae(path), CrossLayerTranscoder)
    assert loaded.find_top_features("def f(x):") == trained.find_top_features("def f(x):")


def test_one_that_writes_what_it_reads_trains_too():
    """Each layer of a stream writes itself and the later ones."""
    names = ("in.0", "in.1")
    rows = kinds.of_sites(kinds.activations(300))
    coder = CrossLayerTrainer(SMALL.replace(expansion_factor=4)).fit(rows, names, names)
    assert coder.reads == coder.writes and coder.W_dec.shape == (3 * coder.n_features // 2, 6)
    assert coder.statistics.validation[-1]["fvu"] < 0.9
