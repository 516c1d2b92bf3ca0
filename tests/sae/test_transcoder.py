import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import (
    ActivationDataset,
    TranscoderConfig,
    TranscoderTrainer,
)
from mlxterp.sae.activation_functions import ACTIVATION_FUNCTIONS
from mlxterp.sae.coder import Columns
from mlxterp.sae.transcoder import Transcoder
from tests.sae import kinds
from tests.sae.runs import config
from tests.sae.synthetic import planted, recovery

NAMES = sorted(ACTIVATION_FUNCTIONS)
UNMOVED = {"learning_rate": 1e-12, "num_epochs": 1, "log_every": 1, "validation_split": 0}
SMALL = TranscoderConfig(
    expansion_factor=0.5, k=4, num_epochs=1, learning_rate=3e-3, batch_size=64, warmup_steps=0,
    validation_split=0.1, resample_dead_every=0,
)  # fmt: skip


def arrays(n=384, nonlinear=True, seed=0) -> dict[str, np.ndarray]:
    """`y` `[n, 5]` from `x` `[n, 8]`, far from the origin and of another size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 8)) @ rng.normal(size=(8, 8)) + 4
    y = 30 * (x @ rng.normal(size=(8, 5))) - 100
    if nonlinear:
        y = y + 200 * np.maximum(x @ rng.normal(size=(8, 5)), 0)
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def fit(data, **options) -> Transcoder:
    return TranscoderTrainer(config(**options)).fit(data)


def fvu(transcoder: Transcoder, data) -> float:
    x, y = (np.array(data[name], np.float64) for name in ("x", "y"))
    error = y - np.array(transcoder(mx.array(data["x"])), np.float64)
    return (error**2).sum() / ((y - y.mean(axis=0)) ** 2).sum()


# What it learns


def test_the_factors_of_a_linear_map_are_recovered_at_both_ends():
    factors, x = planted(12_000)
    A = np.random.default_rng(5).normal(size=(24, 32)) / np.sqrt(32)
    written = factors @ A.T
    written /= np.linalg.norm(written, axis=1, keepdims=True)
    options = {"k": 4, "batch_size": 256, "num_epochs": 12, "dead_window": 20_000}
    data = {"x": x, "y": (x @ A.T).astype(np.float32)}
    found = fit(data, log_every=100, dead_neuron_threshold=0, validation_split=0, **options)
    W_enc, W_dec = np.array(found.W_enc), np.array(found.W_dec)
    assert recovery(written, W_dec) > 0.95
    chance = np.random.default_rng(9)
    assert recovery(written, chance.normal(size=W_dec.shape)) < 0.65
    # Encoder rows tell overlapping factors apart, so that they are not the factors themselves: the
    # feature that writes a factor is one that answers to this factor more than to any other.
    rows = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    of_factor = (written @ rows.T).argmax(axis=1)
    answers = W_enc[of_factor] @ factors.T
    assert (answers.argmax(axis=1) == np.arange(len(factors))).mean() > 0.95
    assert recovery(factors, W_enc) > 0.75
    assert recovery(factors, chance.normal(size=W_enc.shape)) < 0.6


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:L0 is")
def test_training_starts_better_than_the_mean_of_the_target_and_ends_well(name, skip):
    data = arrays()
    options = {"activation_function": name, "skip": skip}
    start, end = (
        fit(data, **options, **settings).statistics.training
        for settings in (UNMOVED, {"num_epochs": 8, "validation_split": 0, "log_every": 12})
    )
    assert start[0]["fvu"] < 1 and end[-1]["fvu"] < 0.5
    if ACTIVATION_FUNCTIONS[name].selects:  # the others start with more active features
        assert end[-1]["fvu"] < 0.7 * start[0]["fvu"]


def test_a_transcoder_of_other_widths_works_on_raw_activations():
    data = arrays()
    found = fit(data, num_epochs=20, expansion_factor=4, validation_split=0)
    assert found.W_enc.shape == (32, 8) and found.W_dec.shape == (32, 5)
    np.testing.assert_allclose(np.linalg.norm(np.array(found.W_dec), axis=1), 1, atol=1e-5)
    assert fvu(found, data) < 0.3
    assert found(mx.array(data["x"])).shape == (384, 5)
    assert (found.from_site, found.to_site) == ("x", "y")
    assert repr(found) == "Transcoder(x -> y, d_in=8, d_out=5, n_features=32, topk, k=3)"


# Skip connections


def least_squares(data) -> np.ndarray:
    x, y = (np.array(data[name], np.float64) for name in ("x", "y"))
    return np.linalg.lstsq(x - x.mean(axis=0), y - y.mean(axis=0), rcond=None)[0].T


def test_a_skip_connection_starts_at_zero_or_at_the_least_squares_solution():
    data = arrays()
    zero, best = (fit(data, skip=True, skip_init=s, **UNMOVED) for s in ("zero", "least_squares"))
    assert np.abs(np.array(zero.W_skip)).max() < 1e-6
    # Folded into raw units.
    expected = least_squares(data)
    np.testing.assert_allclose(np.array(best.W_skip), expected, atol=1e-3 * np.abs(expected).max())
    assert best.statistics.training[0]["fvu"] < 0.9 * zero.statistics.training[0]["fvu"]


@pytest.mark.parametrize("normalise", [True, False])
def test_a_linear_map_is_left_to_the_skip_connection(normalise):
    data = arrays(nonlinear=False)
    options = {"skip": True, "skip_init": "least_squares", "normalize_activations": normalise}
    found = fit(data, **options, **UNMOVED)
    assert fvu(found, data) < 1e-4
    # What is read is not centred where it is not normalised, but the line is the same.
    expected = least_squares(data)
    np.testing.assert_allclose(np.array(found.W_skip), expected, atol=2e-3 * np.abs(expected).max())


def test_a_skip_connection_is_trained_too():
    data = arrays(nonlinear=False)
    options = {"num_epochs": 20, "learning_rate": 1e-2, "validation_split": 0}
    without, with_skip = (fit(data, skip=skip, **options) for skip in (False, True))
    assert with_skip.has_skip and not without.has_skip
    assert fvu(with_skip, data) < 0.2 * fvu(without, data)


# Data that do not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reads": "x", "writes": "z"}, r"\['z'\] are missing; there are \['x', 'y'\]"),
        ({"reads": "z"}, r"\['z'\] are missing; there are \['x', 'y'\]"),
        ({"reads": "y", "writes": "y"}, "reads one site and writes another, got y"),
        ({"reads": "y"}, "reads one site and writes another, got y"),
    ],
)
def test_sites_that_fit_cannot_use_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TranscoderTrainer(config()).fit(arrays(), **options)


@pytest.mark.parametrize("n", [1, 3])
def test_of_one_or_many_sites_fit_asks_which(n):
    data = {name: arrays()["x"] for name in "abc"[:n]}
    with pytest.raises(ValueError, match=r"needs two sites; the dataset has \['a'.*reads=\.\.\. a"):
        TranscoderTrainer(config()).fit(data)
    with pytest.raises(ValueError, match="needs two sites; the dataset has"):
        TranscoderTrainer(config()).fit(arrays()["x"])


def test_the_two_sites_of_a_dataset_are_taken_in_order_or_by_name():
    data, options = {**arrays(), "z": arrays(seed=1)["x"]}, config(**UNMOVED)
    two = {name: data[name] for name in ("x", "y")}
    trainer = TranscoderTrainer(options)
    assert (trainer.fit(two).from_site, trainer.fit(two).to_site) == ("x", "y")
    other = trainer.fit(data, reads="z", writes="x")
    assert (other.from_site, other.to_site) == ("z", "x")


# Sites of a model


def train(model, *args, **options) -> Transcoder:
    options = {"config": SMALL, "verbose": False, "dataset": ["def f(x):\n    return x\n" * 40],
               **options}  # fmt: skip
    return TranscoderTrainer.train(model, *args, **options)


@pytest.mark.parametrize(
    ("args", "options", "reads", "writes"),
    [
        ((2, 4), {}, "layers.2.mlp", "layers.4.mlp"),
        ((2, 3, "attn"), {}, "layers.2.attn", "layers.3.attn"),
        ((2,), {"from_component": "mlp_in", "to_component": "mlp_out"},
         "layers.2.mlp_in", "layers.2.mlp_out"),
        ((2, 3), {"from_component": "mlp", "to_component": "attn"},
         "layers.2.mlp", "layers.3.attn"),
        ((2, 3, "attn"), {"to_component": "mlp"}, "layers.2.attn", "layers.3.mlp"),
        (("h.1.mlp", "layers.2.self_attn.k_proj"), {},
         "layers.1.mlp", "layers.2.self_attn.k_proj"),
    ],
)  # fmt: skip
def test_sites_are_named_by_layers_and_components(model, args, options, reads, writes):
    found = train(model, *args, **options)
    assert (found.from_site, found.to_site) == (reads, writes)
    assert found.d_out == model.width(writes)


@pytest.mark.parametrize("skip", [None, True, False])
def test_skip_may_be_given_to_train(model, skip):
    assert train(model, 2, 3, skip=skip).has_skip == bool(skip)


def unread():
    raise AssertionError("the texts were read before the sites were checked")
    yield


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((3, 2), {}, r"layers\.2\.mlp does not depend on layers\.3\.mlp: .*"
         r"Targets of layers\.3\.mlp: .*Sources for layers\.2\.mlp: layers\.0\.mlp, layers\.1\.m"),
        ((2,), {"from_component": "mlp", "to_component": "attn"},
         r"layers\.2\.attn does not depend on layers\.2\.mlp"),
        ((2,), {}, "The source and the target are both layers.2.mlp"),
        ((2, 2, "attn"), {}, "The source and the target are both layers.2.attn"),
        ((2, 9), {}, "9"),
        ((2, 3, "quilt"), {}, "quilt"),
    ],
)  # fmt: skip
def test_sites_that_cannot_be_source_and_target_are_refused(model, args, options, message):
    with pytest.raises(ValueError, match=message):
        train(model, *args, **options, dataset=unread())


def test_a_transcoder_needs_texts(model):
    with pytest.raises(ValueError, match="no t|empty|at least"):
        train(model, 2, 3, dataset=[])


def test_a_dataset_that_lacks_the_target_is_refused(model):
    dataset = ActivationDataset.from_texts(model, ["def f(x): return x\n" * 40], 2, "mlp")
    with pytest.raises(ValueError, match=r"holds layers\.2\.mlp .*, the Transcoder needs .*3\.mlp"):
        train(model, 2, 3, dataset=dataset)


# Kinds that cannot skip


@pytest.mark.parametrize("kind", ["sae", "crosscoder", "cross-layer transcoder"])
def test_other_kinds_cannot_skip(kind):
    settings = config(**{**kinds.settings(kind), "skip": True})
    with pytest.raises(ValueError, match="skip is for transcoders only"):
        kinds.fit(kind, kinds.activations(), settings)


@pytest.mark.parametrize(
    ("reads", "writes"), [(("a",), ("a",)), (("a", "b"), ("c",)), (("a",), ("b", "c"))]
)
def test_a_transcoder_reads_one_site_and_writes_another(reads, writes):
    columns = (Columns(names, (4,) * len(names)) for names in (reads, writes))
    with pytest.raises(ValueError, match="reads one site and writes another"):
        Transcoder(*columns, 10, k=2)
