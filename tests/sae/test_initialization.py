import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.activation_functions import ACTIVATION_FUNCTIONS
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.initialization import (
    Normalisation,
    balanced_norms,
    fold,
    geometric_median,
    initial_params,
)
from mlxterp.sae.objective import Objective
from tests.sae.kinds import KINDS, SITES, activations, make

D, N, K, BATCH = 8, 40, 4, 64
COLUMNS = Columns(("layers.0.mlp",), (D,))
NAMES = sorted(ACTIVATION_FUNCTIONS)
# Without a threshold of their own, the functions are as linear in a scale as the decoder is.
HOMOGENEOUS = sorted(set(NAMES) - {"jumprelu"})


def sample(n=BATCH, width=D, seed=0, offset=0.0) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array((rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + offset).astype(
        np.float32
    ))  # fmt: skip


def coder_of(name="topk", reads=COLUMNS, writes=COLUMNS, n_features=N) -> SparseCoder:
    return SparseCoder(reads, writes, n_features, activation_function=name, k=K)


def start(name="topk", data=None, normalise=True, **options):
    """A coder, its normalisation, its config and its initial values."""
    data = sample() if data is None else data
    config = SAEConfig(activation_function=name, k=K, **options)
    coder, normalisation = coder_of(name), Normalisation.measure(data, COLUMNS, normalise)
    return coder, normalisation, config, initial_params(coder, normalisation, COLUMNS, config, data)


# Normalisation


def test_normalisation_centres_and_scales_each_site_by_itself():
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(500, 5)) * [1, 2, 30, 40, 50] + [5, -5, 100, 0, -7]
    columns = Columns(("a", "b"), (2, 3))
    data = mx.array(raw.astype(np.float32))
    normalisation = Normalisation.measure(data, columns, True)
    x = np.array(normalisation.apply(data), np.float64)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
    for part in (slice(0, 2), slice(2, 5)):
        width = part.stop - part.start
        assert (x[:, part] ** 2).sum(axis=1).mean() == pytest.approx(width, rel=1e-4)
    centred = raw - raw.mean(axis=0)
    by_hand = centred[:, 2:] * np.sqrt(3 / (centred[:, 2:] ** 2).sum(axis=1).mean())
    np.testing.assert_allclose(x[:, 2:], by_hand, atol=1e-4)
    np.testing.assert_allclose(np.array(normalisation.origin), 0, atol=1e-6)


def test_without_normalisation_activations_stay_as_they_are():
    data = sample(offset=2.0)
    normalisation = Normalisation.measure(data, COLUMNS, False)
    assert mx.array_equal(normalisation.apply(data), data)
    np.testing.assert_allclose(
        np.array(normalisation.origin), np.array(data).mean(axis=0), rtol=1e-5
    )


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1234.5])
def test_equal_rows_do_not_vary_whatever_rounding_says(value):
    with pytest.raises(ValueError, match="the same on every token"):
        Normalisation.measure(mx.full((3000, D), value), COLUMNS, True)


@pytest.mark.parametrize("factor", [1e25, 1e-25])
def test_activations_beyond_float32_are_refused(factor):
    with pytest.raises(ValueError, match="too large or small for float32"):
        Normalisation.measure(sample() * factor, COLUMNS, True)


def test_a_site_that_does_not_vary_is_named():
    data = mx.concatenate([mx.random.normal((50, 2), key=mx.random.key(0)), mx.ones((50, 3))], 1)
    with pytest.raises(ValueError, match="'b' are the same on every token"):
        Normalisation.measure(data, Columns(("a", "b"), (2, 3)), True)


# The middle of the data


def weiszfeld(points: np.ndarray) -> np.ndarray:
    median = points.mean(axis=0)
    for _ in range(1000):
        weights = 1 / np.maximum(np.linalg.norm(points - median, axis=1), 1e-12)
        median = weights @ points / weights.sum()
    return median


def spread(points: np.ndarray, at: np.ndarray) -> float:
    return np.linalg.norm(points - at, axis=1).sum()


@pytest.mark.parametrize("seed", range(4))
def test_the_geometric_median_has_the_least_summed_distance(seed):
    points = np.random.default_rng(seed).exponential(size=(300, 5)) * [1, 1, 3, 1, 10]
    expected = weiszfeld(points)
    found = np.array(geometric_median(mx.array(points.astype(np.float32))), np.float64)
    assert spread(points, found) == pytest.approx(spread(points, expected), rel=1e-4)
    far = np.linalg.norm(points.mean(axis=0) - expected)
    assert np.linalg.norm(found - expected) < 0.05 * far


@pytest.mark.parametrize("width", [1, 3])
def test_outliers_move_the_mean_but_not_the_median(width):
    points = np.concatenate([sample(90, width), np.full((10, width), 1000)]).astype(np.float32)
    median = np.array(geometric_median(mx.array(points)))
    assert np.linalg.norm(points.mean(axis=0)) > 90
    without = np.array(geometric_median(mx.array(points[:90])))
    assert np.linalg.norm(median - without) < 2


def test_the_geometric_median_of_few_points_is_the_known_one():
    # Of the corners of a square it is their middle; on a line, the ordinary median.
    square = mx.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) + 5
    np.testing.assert_allclose(np.array(geometric_median(square)), [5, 5], atol=1e-4)
    line = mx.array([[0.0], [1], [2], [10], [100]])
    assert geometric_median(line).item() == pytest.approx(2, abs=0.05)


def test_a_point_at_the_median_is_no_division_by_zero():
    points = mx.concatenate([sample(30) - 1, mx.zeros((200, D))])
    np.testing.assert_allclose(np.array(geometric_median(points)), 0, atol=1e-3)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_bias_starts_at_the_mean_or_at_the_geometric_median(normalise):
    rows = np.array(sample(offset=3.0))
    rows[:6] *= 50
    data = mx.array(rows)
    by_mean, by_median = (
        start(data=data, normalise=normalise, bias_init=choice)
        for choice in ("mean", "geometric_median")
    )
    x = np.array(by_mean[1].apply(data), np.float64)
    b_mean, b_median = (np.array(s[3]["b_dec"], np.float64) for s in (by_mean, by_median))
    np.testing.assert_allclose(b_mean, x.mean(axis=0), atol=1e-4 * np.abs(x).max())
    expected = weiszfeld(x)
    far = np.linalg.norm(expected - x.mean(axis=0))
    assert np.linalg.norm(b_median - expected) < 0.05 * far
    for _, _, _, params in (by_mean, by_median):
        middle = np.array(params["b_dec"], np.float64)
        pre = np.array(params["W_enc"], np.float64) @ middle + np.array(params["b_enc"])
        np.testing.assert_allclose(pre, 0, atol=1e-4 * np.abs(x).max())


# Encoder and decoder


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_starts_as_the_scaled_transpose_of_a_decoder_of_unit_rows(name):
    _, _, _, params = start(name)
    W_dec, W_enc = (np.array(params[n], np.float64) for n in ("W_dec", "W_enc"))
    np.testing.assert_allclose(np.linalg.norm(W_dec, axis=1), 1, atol=1e-6)
    scale = (W_enc * W_dec).sum() / N
    np.testing.assert_allclose(W_enc, scale * W_dec, atol=1e-5 * scale)
    assert scale > 0 and scale != pytest.approx(1, abs=0.01)
    assert set(params) - {"W_enc", "b_enc", "W_dec", "b_dec"} == set(
        coder_of(name).activation_function.trained(mx.array(0.1))
    )


@pytest.mark.parametrize("options", [{"scale_init": False}, {"tied_weights": True}])
def test_the_encoder_is_not_scaled_where_that_is_not_wanted_or_possible(options):
    _, _, _, params = start(**options)
    assert ("W_enc" in params) != options.get("tied_weights", False)
    assert mx.array_equal(params.get("W_enc", params["W_dec"]), params["W_dec"])
    expected = -(params["W_dec"] @ params["b_dec"])
    np.testing.assert_allclose(np.array(params["b_enc"]), np.array(expected), atol=1e-6)


@pytest.mark.parametrize("name", HOMOGENEOUS)
@pytest.mark.parametrize("normalise", [True, False])
def test_no_other_scale_reconstructs_the_sample_better(name, normalise):
    data = sample(200, offset=2.0)
    coder, normalisation, config, params = start(name, data, normalise)
    x = normalisation.apply(data)

    def error(factor: float) -> float:
        scaled = {n: params[n] * factor if n.endswith("_enc") else params[n] for n in params}
        y_hat = Objective(coder, config, K).reconstruct(scaled, x)
        return float(np.square(np.array(y_hat, np.float64) - np.array(x, np.float64)).sum())

    assert all(error(1.0) < error(factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))
    # Of two linear parts the least-squares factor is <part, target> / <part, part>: here it is 1.
    b_dec = np.array(params["b_dec"], np.float64)
    part = np.array(Objective(coder, config, K).reconstruct(params, x), np.float64) - b_dec
    target = np.array(x, np.float64) - b_dec
    assert (part * target).sum() / (part * part).sum() == pytest.approx(1, rel=1e-4)


def test_a_sample_that_no_feature_sees_leaves_the_scale_alone():
    columns, data = Columns(("a",), (1,)), mx.array([[1.0], [3.0]])
    coder = SparseCoder(columns, columns, 1, k=1)
    normalisation = Normalisation.measure(data, columns, False)
    for seed in range(6):
        config = SAEConfig(k=1, seed=seed)
        params = initial_params(coder, normalisation, columns, config, data[:1] * 0 + 2)
        assert mx.array_equal(params["W_enc"], params["W_dec"])


@pytest.mark.parametrize("name", NAMES)
def test_initial_values_follow_from_the_seed(name):
    a, b, c = (start(name, seed=seed)[3] for seed in (1, 1, 2))
    assert all(mx.array_equal(a[part], b[part]) for part in a)
    assert not mx.array_equal(a["W_dec"], c["W_dec"])


def test_a_coder_of_two_widths_has_an_encoder_of_its_own():
    columns = Columns(("a", "b"), (3, 5))
    data = sample(width=8)
    coder = coder_of(reads=columns.only("a"), writes=columns.only("b"))
    normalisation = Normalisation.measure(data, columns, True)
    params = initial_params(coder, normalisation, columns, SAEConfig(k=K), data)
    assert params["W_enc"].shape == (N, 3) and params["W_dec"].shape == (N, 5)
    norms = np.linalg.norm(np.array(params["W_enc"]), axis=1)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-5)
    tied = SAEConfig(k=K, tied_weights=True)
    with pytest.raises(ValueError, match="tied_weights needs equal widths.*reads 3 and writes 5"):
        initial_params(coder, normalisation, columns, tied, data)


# Folding


def trained_like(kind: str, name: str, unit_norm: bool, tied: bool = False):
    """Arrays as training might leave them, away from all special values."""
    raw = activations(BATCH)
    config = SAEConfig(
        activation_function=name, k=K, decoder_unit_norm=unit_norm, tied_weights=tied,
        resample_dead_every=0, skip="skip" in kind,
    )  # fmt: skip
    coder = make(kind, name, N, K)
    normalisation = Normalisation.measure(raw, SITES, True, balanced_norms(coder))
    params = initial_params(coder, normalisation, SITES, config, raw)
    rng = np.random.default_rng(5)
    for part in params:
        noise = mx.array(rng.normal(size=params[part].shape).astype(np.float32))
        params[part] = params[part] + (0.0 if part == "W_dec" and unit_norm else 0.2) * noise
    return raw, coder, normalisation, config, params


def codes_in_training(objective: Objective, params, x) -> np.ndarray:
    codes = objective.codes(params, x)
    parts = [c.values if c.pairs is None else c.pairs.dense(c.values) for c in codes]
    return np.concatenate([np.array(part, np.float64) for part in parts], axis=1)


CASES = [(kind, unit, False) for kind in KINDS for unit in (True, False)]
CASES = [case for case in CASES if case[:2] != ("cross-layer transcoder", True)]
CASES += [("sae", True, True), ("sae", False, True)]


@pytest.mark.parametrize(("kind", "unit_norm", "tied"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_the_folded_coder_does_on_raw_activations_what_was_trained(name, kind, unit_norm, tied):
    raw, coder, normalisation, config, params = trained_like(kind, name, unit_norm, tied)
    averaged = coder.activation_function.averaged()
    data = normalisation.apply(raw)
    x, read = (SITES.take(a, coder.reads.names) for a in (data, raw))
    objective = Objective(coder, config, K)
    decoders = [np.array(W, np.float64) for W in coder.decoder_blocks(params["W_dec"])]
    weights = np.concatenate([
        sum(
            np.linalg.norm(W[:, part.start - b.writes.start : part.stop - b.writes.start], axis=1)
            for part in list(coder.writes.slices.values())[b.sites]
        )
        for W, b in zip(decoders, coder.blocks, strict=True)
    ])  # fmt: skip
    if name == "batch_topk":
        # Half way between the smallest value that is kept and the largest that is not.
        thresholds = []
        for block, code in zip(coder.blocks, objective.codes(params, x), strict=True):
            scores = np.maximum(np.array(code.pre), 0) * weights[block.features]
            ordered = np.sort(scores.reshape(-1))
            thresholds.append(ordered[-K * BATCH - 1 : -K * BATCH + 1].mean())
        shape = averaged["threshold"].shape
        averaged["threshold"] = mx.array(np.array(thresholds, np.float32)).reshape(shape)
    z = codes_in_training(objective, params, x)
    scale, centre = (SITES.take(a, coder.writes.names) for a in
                     (normalisation.scale, normalisation.centre))  # fmt: skip
    expected = objective.reconstruct(params, x) / scale + centre
    fold(params, averaged, normalisation, SITES, coder)

    found = np.array(coder.encode(read), np.float64)
    site_scales = [float(scale[part.start]) for part in coder.writes.slices.values()]
    unit = np.exp(np.log(site_scales).mean())
    in_raw_units = z * weights / unit
    assert (in_raw_units != 0).any() and (in_raw_units == 0).any()
    tolerance = 1e-4 * np.abs(in_raw_units).max()
    np.testing.assert_allclose(found, in_raw_units, rtol=1e-3, atol=tolerance)
    y_hat, expected = np.array(coder(read)), np.array(expected)
    np.testing.assert_allclose(y_hat, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    norms = np.array(coder.decoder_norms(), np.float64)
    if len(site_scales) == 1:
        np.testing.assert_allclose(norms[:, 0], 1, atol=1e-5)
    else:
        np.testing.assert_allclose(np.array(coder.site_scale), site_scales, rtol=1e-5)
        np.testing.assert_allclose(norms.sum(axis=1), unit, rtol=1e-4)


@pytest.mark.parametrize("name", ["crosscoder", "cross-layer transcoder"])
def test_the_sites_that_are_written_are_scaled_to_one_mean_norm(name):
    raw, coder, normalisation, *_ = trained_like(name, "topk", False)
    data = np.array(normalisation.apply(raw), np.float64)
    norms = [
        np.linalg.norm(data[:, SITES.slices[site]], axis=1).mean() for site in coder.writes.names
    ]
    mean_width = coder.writes.width / len(coder.writes.names)
    np.testing.assert_allclose(norms, np.sqrt(mean_width), rtol=1e-4)


def test_arrays_without_normalisation_are_folded_as_they_are():
    data = sample(offset=3.0)
    coder, normalisation, _, params = start(data=data, normalise=False)
    fold(params, {}, normalisation, COLUMNS, coder)
    for name, array in params.items():
        np.testing.assert_allclose(np.array(coder[name]), np.array(array), rtol=1e-5, atol=1e-6)


def test_sites_of_different_scale_are_folded_each_by_its_own():
    rng = np.random.default_rng(0)
    columns = Columns(("a", "b"), (3, 5))
    raw = rng.normal(size=(BATCH, 8)) * np.repeat([1, 100], [3, 5]) + np.repeat([0, 1000], [3, 5])
    data = mx.array(raw.astype(np.float32))
    normalisation = Normalisation.measure(data, columns, True)
    coder = coder_of(reads=columns.only("b"), writes=columns.only("a"))
    config = SAEConfig(k=K)
    params = initial_params(coder, normalisation, columns, config, data)
    x = normalisation.apply(data)[:, 3:]
    y_hat = Objective(coder, config, K).reconstruct(params, x)
    expected = y_hat / normalisation.scale[:3] + normalisation.centre[:3]
    fold(params, {}, normalisation, columns, coder)
    np.testing.assert_allclose(np.array(coder(data[:, 3:])), np.array(expected), atol=1e-3)
    norms = np.linalg.norm(np.array(coder.W_dec), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)
