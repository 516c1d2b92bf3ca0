import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE
from mlxterp.sae.circuits.given import fitting
from mlxterp.sae.circuits.graph.checks import checked
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.features.attribution import direct_effects, total_effects
from mlxterp.sae.features.collection import fingerprint
from mlxterp.sae.steering.edits import splice, steer, steering_edit
from mlxterp.sae.token_norms import normalise, shift_and_scale
from mlxterp.sae.trainer import Trainer
from mlxterp.sae.transcoder import Transcoder
from tests.sae import kinds

D, F = 6, 20
READS, WRITES = Columns(("layers.0.mlp_in",), (D,)), Columns(("layers.0.mlp",), (D,))
NORMS = ("layer_norm", "rescale")


def in_numpy(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalised tokens, shift and scale in float64."""
    x = x.astype(np.float64)
    if name == "layer_norm":
        shift, scale = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
        return (x - shift) / (scale + 1e-5), shift, scale
    scale = np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(x.shape[-1])
    return x / scale, np.zeros_like(scale), scale


def tokens(n: int = 40) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (rng.normal(size=(n, D)) * rng.uniform(0.1, 30, (n, 1)) + 5).astype(np.float32)


def coder_of(norm: str, kind=SAE) -> SAE | Transcoder:
    reads, writes = (READS, READS) if kind is SAE else (READS, WRITES)
    coder = kind(reads, writes, F, "topk", 4, token_norm=norm, skip=kind is Transcoder)
    rng = np.random.default_rng(2)
    for arrays in coder.array_files().values():
        for name, array in arrays.items():
            coder.set_array(name, mx.array(rng.normal(size=array.shape).astype(np.float32)))
    return coder


@pytest.mark.parametrize("name", NORMS)
def test_tokens_are_normalised_as_in_double_precision(name):
    x = tokens()
    expected, *rest = in_numpy(name, x)
    np.testing.assert_allclose(np.array(normalise(name, mx.array(x))), expected, atol=1e-5)
    for found, value in zip(shift_and_scale(name, mx.array(x)), rest, strict=True):
        np.testing.assert_allclose(np.array(found), value, rtol=1e-5, atol=1e-6)


def test_a_small_spread_beside_a_large_mean_is_not_lost():
    x = (1000 + 0.01 * np.random.default_rng(0).normal(size=(20, 64))).astype(np.float32)
    scale = np.array(shift_and_scale("layer_norm", mx.array(x))[1])
    np.testing.assert_allclose(scale, in_numpy("layer_norm", x)[2], rtol=2e-3)


@pytest.mark.parametrize("name", NORMS)
def test_tokens_without_size_stay_finite(name):
    for value in (0.0, 3.0):
        x = mx.full((2, D), value)
        assert np.isfinite(np.array(normalise(name, x))).all()
        y = coder_of(name)(x)
        assert np.isfinite(np.array(y)).all()


@pytest.mark.parametrize("name", NORMS)
def test_codes_are_of_normalised_tokens_and_reconstructions_are_scaled_back(name):
    coder, x = coder_of(name), tokens()
    n, shift, scale = in_numpy(name, x)
    pre = n @ np.array(coder.W_enc, np.float64).T + np.array(coder.b_enc)
    z = np.where(pre >= np.sort(pre)[:, [-4]], np.maximum(pre, 0), 0)
    y = (z @ np.array(coder.W_dec) + np.array(coder.b_dec)) * scale + shift
    given = mx.array(x)
    np.testing.assert_allclose(np.array(coder.encode(given)), z, atol=1e-4)
    np.testing.assert_allclose(np.array(coder.encode_block(0, given)), z, atol=1e-4)
    np.testing.assert_allclose(np.array(coder(given)), y, rtol=1e-4, atol=1e-3)
    decoded = coder.decode(coder.encode(given), like=given)
    np.testing.assert_allclose(np.array(decoded), y, rtol=1e-4, atol=1e-3)
    batched = coder(given.reshape(4, 10, D))
    np.testing.assert_allclose(np.array(batched).reshape(40, D), y, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NORMS)
def test_a_code_alone_has_no_size(name):
    coder = coder_of(name)
    with pytest.raises(ValueError, match=r"token_norm='.*decode\(z, like=activation\)"):
        coder.decode(mx.zeros((2, F)))
    with pytest.raises(ValueError, match="The activation must have shape"):
        coder.decode(mx.zeros((2, F)), like=mx.zeros((2, D + 1)))


def test_a_norm_is_shown():
    assert repr(coder_of("layer_norm")).endswith("topk, k=4, layer_norm)")


def test_without_a_norm_the_tokens_do_not_matter():
    coder = coder_of("none")
    z = coder.encode(mx.array(tokens()))
    assert mx.array_equal(coder.decode(z), coder.decode(z, like=mx.array(tokens())))
    assert not coder.scales_back


@pytest.mark.parametrize("name", NORMS)
def test_what_another_site_has_is_not_scaled(name):
    coder, x = coder_of(name, Transcoder), tokens()
    z = coder.encode(mx.array(x))
    written = np.array(z) @ np.array(coder.W_dec) + np.array(coder.b_dec)
    np.testing.assert_allclose(np.array(coder.decode(z)), written, rtol=1e-5, atol=1e-4)
    skipped = x @ np.array(coder.W_skip).T
    np.testing.assert_allclose(
        np.array(coder(mx.array(x))), written + skipped, rtol=1e-4, atol=1e-3
    )


def test_a_norm_is_known_and_of_one_site():
    with pytest.raises(ValueError, match=r"token_norm must be one of .*, got 'batch'"):
        SAE(READS, READS, F, "relu", token_norm="batch")
    crosscoder = kinds.make("crosscoder", "topk")
    with pytest.raises(ValueError, match="token_norm is for coders that read one site"):
        type(crosscoder)(crosscoder.reads, crosscoder.writes, 8, "topk", 2, token_norm="layer_norm")


def in_place(edits: dict, x: mx.array) -> mx.array:
    """What edits of one site make of what is there."""
    (edit,) = edits.values()
    return edit(x, None)


@pytest.mark.parametrize("name", NORMS)
def test_a_spliced_coder_writes_its_reconstruction(name):
    coder, x = coder_of(name), mx.array(tokens())
    found = in_place(splice(coder), x)
    np.testing.assert_allclose(np.array(found), np.array(coder(x)), rtol=1e-4, atol=1e-3)
    kept = splice(coder, keep_error=True, features={3: lambda z: z})
    assert mx.array_equal(in_place(kept, x), x)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("mode", ["add", "ablate", "clamp", "scale", "min_clamp"])
def test_changed_features_are_in_the_size_of_the_token(name, mode):
    coder, x = coder_of(name), mx.array(tokens())
    z = np.array(coder.encode(x), np.float64)
    feature = int((z > 0).sum(axis=0).argmax())
    old = z[:, feature]
    strength = 1.0 if mode == "ablate" else 0.7
    new = {
        "add": old + strength, "ablate": 0 * old, "clamp": 0 * old + strength,
        "scale": old * strength, "min_clamp": np.maximum(old, strength),
    }[mode]  # fmt: skip
    scale = in_numpy(name, np.array(x))[2]
    change = (new - old)[:, None] * scale * np.array(coder.W_dec[feature], np.float64)
    edits = steering_edit(coder, feature, strength, mode=mode, unit="activation")  # pyright: ignore
    found = np.array(in_place(edits, x), np.float64)
    np.testing.assert_allclose(found, np.array(x) + change, rtol=1e-4, atol=1e-3)
    replaced = steering_edit(
        coder,
        feature,
        strength,
        mode=mode,
        unit="activation",
        keep_error=False,  # pyright: ignore
    )
    expected = np.array(coder(x), np.float64) + change
    np.testing.assert_allclose(np.array(in_place(replaced, x)), expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", NORMS)
def test_steering_by_hand_is_steering_by_an_edit(name):
    coder, x = coder_of(name), mx.array(tokens())
    edits = steering_edit(coder, 3, 0.7, unit="activation")
    expected = np.array(in_place(edits, x))
    np.testing.assert_allclose(np.array(steer(coder, x, 3, 0.7)), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", NORMS)
def test_the_fidelity_is_that_of_the_reconstruction(name):
    coder, x = coder_of(name), tokens(400)
    dataset = ActivationDataset.from_activations({READS.names[0]: mx.array(x)})
    error = np.square(x - np.array(coder(mx.array(x)), np.float64)).sum()
    expected = error / np.square(x - x.mean(axis=0, dtype=np.float64)).sum()
    assert fidelity(coder, dataset).fvu == pytest.approx(expected, rel=1e-4)


def test_coders_of_normalised_tokens_are_told_apart():
    assert len({fingerprint(coder_of(name)) for name in ("none", *NORMS)}) == 3


def test_what_takes_values_for_what_the_model_has_refuses(model):
    columns = Columns(("layers.1.resid_post",), (model.width("layers.1.resid_post"),))
    coder = SAE(columns, columns, 32, "topk", 4, token_norm="layer_norm")
    coder.bind(model)
    ids = model.encode_batch(["The cat sat."])[0]
    dataset = ActivationDataset.from_activations(mx.zeros((64, columns.width)))
    calls = {
        "In circuits, layer 1": lambda: fitting(None, {1: coder}),
        "In attribution graphs, layer 1": lambda: checked(None, {1: coder}),
        "An attribution": lambda: total_effects(coder, model, ids),
        "logit_effects of texts": lambda: coder.logit_effects(3, texts=["The cat sat."]),
        "Training": lambda: Trainer(SAEConfig(k=4)).fit(coder, dataset),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError, match=f"{what} needs a coder that takes activations as"):
            call()
    with pytest.raises(ValueError, match="An attribution needs"):
        direct_effects(coder, model, ids)
    assert coder.logit_effects(3).path is None  # by its weights alone


def test_groupmax_is_not_trained():
    coder = SAE(READS, READS, F, "groupmax", 4)
    dataset = ActivationDataset.from_activations({READS.names[0]: mx.array(tokens(200))})
    with pytest.raises(ValueError, match="Coders with groupmax are used, not trained"):
        Trainer(SAEConfig(k=4)).fit(coder, dataset)
    with pytest.raises(ValueError, match="activation_function must be"):
        SAEConfig(activation_function="groupmax")  # pyright: ignore
