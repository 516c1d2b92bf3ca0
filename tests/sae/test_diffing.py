import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset
from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.diffing import DENIED, RARE, SHRUNK, diff

SITES = ("base:mlp", "tuned:mlp")
SHARED, WEAK, ONLY_A, ONLY_B = slice(0, 12), slice(12, 16), slice(16, 20), slice(20, 24)
WIDTH, N = 32, 24
# In units of the decoder norms; the coefficient of the L1 penalty that makes it is found by it.
SHRINKAGE = 0.25
# What a value must exceed, so that noise does not fire.
BIAS = 0.1


def unit_rows(rng: np.random.Generator) -> np.ndarray:
    rows = rng.normal(size=(N, WIDTH))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Planted:
    """Two models with features in both, in both but weak in A (.2), and in one of them alone."""

    def __init__(self, same_basis: bool = True, n_tokens: int = 8000, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.A = unit_rows(rng)
        self.B = self.A if same_basis else unit_rows(rng)
        self.strengths = np.ones((N, 2))
        self.strengths[WEAK, 0] = 0.2
        self.strengths[ONLY_A, 1] = self.strengths[ONLY_B, 0] = 0
        self.f = (rng.random((n_tokens, N)) < 0.05) * rng.uniform(0.5, 1.5, (n_tokens, N))
        self.noise = 0.02 * rng.normal(size=(2, n_tokens, WIDTH))

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate([self.A * self.strengths[:, :1], self.B * self.strengths[:, 1:]], 1)

    def dataset(self, scale=(1.0, 1.0)) -> ActivationDataset:
        a, b = np.split(self.f @ self.rows, 2, axis=1)
        arrays = (a + self.noise[0]) * scale[0], (b + self.noise[1]) * scale[1]
        named = zip(SITES, (array.astype(np.float32) for array in arrays), strict=True)
        return ActivationDataset.from_activations(dict(named))

    def coder(self, lost: float = 0.0, activation_function: str = "relu") -> SparseCoder:
        """One that reads the features nearly perfectly, its decoder norms smaller by `lost`."""
        columns = Columns(SITES, (WIDTH, WIDTH))
        coder = SparseCoder(columns, columns, N, activation_function=activation_function, k=N)
        coder.W_enc = mx.array(np.linalg.pinv(self.rows).T.astype(np.float32))
        coder.b_enc = mx.full((N,), -BIAS)
        norms = np.maximum(self.strengths - lost, 0)
        rows = np.concatenate([self.A * norms[:, :1], self.B * norms[:, 1:]], axis=1)
        coder.W_dec = mx.array(rows.astype(np.float32))
        return coder

    def coefficient(self) -> float:
        """The one with which training takes `SHRINKAGE` from each norm, by the law."""
        f = self.f[self.f > 0] - BIAS  # as `coder` reads it
        return SHRINKAGE * 2 * np.mean(f**2) / np.mean(f) / (2 * WIDTH)


TRUTH = np.repeat(["shared", "scaled", f"only {SITES[0]}", f"only {SITES[1]}"], [12, 4, 4, 4])


@pytest.mark.parametrize("same_basis", [True, False])
def test_verdicts_are_the_truth_where_nothing_was_lost(same_basis):
    planted = Planted(same_basis)
    found = diff(planted.coder(activation_function="topk"), planted.dataset())
    assert found.verdicts.tolist() == TRUTH.tolist() and set(found.reasons) == {""}
    np.testing.assert_allclose(found.relative_norms[WEAK], 1 / 1.2, rtol=1e-5)
    np.testing.assert_allclose(found.delta_norms[WEAK], 0.9, rtol=1e-5)
    np.testing.assert_allclose(found.firing_rates, (planted.f > 0).mean(axis=0), atol=0.005)
    assert found.n_tokens == 8000 and (found.shrinkage == 0).all()


def test_only_the_ratio_without_a_direction_is_right_in_independent_bases():
    """The weak features are a fifth as strong in A as in B."""
    for same_basis in (True, False):
        planted = Planted(same_basis)
        found = diff(planted.coder(activation_function="topk"), planted.dataset())
        np.testing.assert_allclose(found.ratios[WEAK], 0.2, atol=0.02)
        assert (found.ratios[ONLY_A] < 0.07).all() and (found.ratios[ONLY_B] < 0.07).all()
        if same_basis:
            np.testing.assert_allclose(found.nu_error[WEAK], 0.2, atol=0.02)
            np.testing.assert_allclose(found.nu_error[SHARED], 1, atol=0.03)
        else:
            cosines = (planted.A * planted.B).sum(axis=1)
            np.testing.assert_allclose(found.nu_error[WEAK], 0.2 * cosines[WEAK], atol=0.02)
            assert (np.abs(found.nu_error[SHARED]) < 0.6).all()
            np.testing.assert_allclose(found.ratios[SHARED], 1, atol=0.03)


@pytest.mark.parametrize("same_basis", [True, False])
def test_features_that_lost_a_norm_to_the_penalty_are_not_called_exclusive(same_basis):
    planted = Planted(same_basis)
    coder = planted.coder(lost=SHRINKAGE)
    found = diff(coder, planted.dataset(), coefficient=planted.coefficient())
    np.testing.assert_allclose(found.shrinkage, SHRINKAGE, rtol=0.05)
    # By their norms they could not be told from the exclusive ones.
    assert (found.relative_norms[WEAK] == 1).all() and (found.relative_norms[ONLY_B] == 1).all()
    assert (found.verdicts[WEAK] == "unclear").all() and (found.reasons[WEAK] == SHRUNK).all()
    rest = np.delete(np.arange(N), np.arange(N)[WEAK])
    assert found.verdicts[rest].tolist() == TRUTH[rest].tolist()


def test_without_a_known_penalty_latent_scaling_denies():
    planted = Planted()
    for function in ("topk", "relu"):
        found = diff(planted.coder(SHRINKAGE, function), planted.dataset())
        assert (found.reasons[WEAK] == DENIED).all() and (found.verdicts[WEAK] == "unclear").all()


def test_what_the_penalty_took_is_added_back_before_features_are_called_scaled():
    planted = Planted()
    planted.strengths[WEAK, 0] = 0.5  # a share of one third, of which .25 leaves one quarter
    coder, dataset = planted.coder(lost=SHRINKAGE), planted.dataset()
    aware = diff(coder, dataset, coefficient=planted.coefficient())
    assert (aware.verdicts[WEAK] == "shared").all()
    assert (diff(coder, dataset).verdicts[WEAK] == "scaled").all()


def test_a_feature_that_others_write_in_the_second_model_is_not_exclusive():
    """Feature 0 has no row in A, where feature 1, which fires with it, writes it: decoupling."""
    planted = Planted()
    planted.f[:, 1] = planted.f[:, 0]
    coder, dataset = planted.coder(activation_function="topk"), planted.dataset()
    rows = np.array(coder.W_dec)
    rows[1, :WIDTH] = planted.A[0] + planted.A[1]
    rows[0, :WIDTH] = 0
    coder.W_dec = mx.array(rows)
    encoder = np.array(coder.W_enc)
    encoder[[0, 1]] = encoder[[0, 1]].mean(axis=0)
    coder.W_enc, coder.b_enc = mx.array(encoder), coder.b_enc / 5
    found = diff(coder, dataset)
    assert found.relative_norms[0] == 1 and found.nu_error[0] < 0.1 and found.ratios[0] < 0.1
    assert found.nu_reconstruction[0] == pytest.approx(1, abs=0.1)
    assert found.verdicts[0] == "unclear" and found.reasons[0] == DENIED
    assert found.verdicts[ONLY_B].tolist() == TRUTH[ONLY_B].tolist()


def test_a_row_that_the_stronger_model_does_not_have_proves_nothing():
    planted = Planted()
    coder = planted.coder(activation_function="topk")
    rows = np.array(coder.W_dec)
    rows[20] *= -1
    coder.W_dec = mx.array(rows)
    found = diff(coder, planted.dataset())
    assert np.isinf(found.nu_error[20]) and found.reasons[20] == DENIED
    assert found.to_dict()["nu_error"][20] is None


def test_a_feature_that_fired_too_rarely_is_unclear():
    """Feature 20 fires twice, on tokens that model A has large errors on."""
    planted = Planted()
    planted.f[:, 20] = 0
    planted.f[:2, 20] = 1.0
    planted.noise[0, :2] *= 10
    coder = planted.coder(activation_function="topk")
    coder.b_enc = mx.where(mx.arange(N) == 20, -0.5, coder.b_enc)
    found = diff(coder, planted.dataset())
    assert found.firing_rates[20] == 2 / 8000 and found.noise[20] > 0.2
    assert found.verdicts[20] == "unclear" and found.reasons[20] == RARE
    assert found.verdicts[21:].tolist() == TRUTH[21:].tolist()


def test_features_that_never_fire_or_write_nothing_are_dead():
    planted = Planted()
    coder = planted.coder()
    coder.b_enc = mx.where(mx.arange(N) == 2, -1e6, coder.b_enc)
    coder.W_dec = mx.where(mx.arange(N)[:, None] == 21, 0, coder.W_dec)
    found = diff(coder, planted.dataset())
    assert found.features("dead").tolist() == [2, 21] and (found.reasons[[2, 21]] == "").all()
    assert np.isnan(found.relative_norms[21]) and found.firing_rates[2] == 0


def test_the_scale_of_a_models_activations_does_not_matter():
    planted = Planted()
    plain = diff(planted.coder(), planted.dataset())
    coder = planted.coder()
    coder.W_dec = coder.W_dec * mx.concatenate([mx.full((WIDTH,), 10.0), mx.ones((WIDTH,))])
    coder.W_enc = coder.W_enc / mx.concatenate([mx.full((WIDTH,), 10.0), mx.ones((WIDTH,))])
    coder.site_scale = mx.array([0.1, 1.0])
    scaled = diff(coder, planted.dataset(scale=(10.0, 1.0)))
    assert scaled.verdicts.tolist() == plain.verdicts.tolist()
    for name in ("relative_norms", "ratios", "nu_error", "nu_reconstruction", "noise"):
        np.testing.assert_allclose(getattr(scaled, name), getattr(plain, name), atol=2e-3)


def test_models_of_different_widths_are_compared():
    planted = Planted(same_basis=False)
    coder, dataset = planted.coder(activation_function="topk"), planted.dataset()
    columns = Columns(SITES, (WIDTH, WIDTH - 1))
    narrow = SparseCoder(columns, columns, N, k=N)
    narrow.W_enc, narrow.W_dec, narrow.b_enc = coder.W_enc[:, :-1], coder.W_dec[:, :-1], coder.b_enc
    (batch,) = dataset.batches(8000)
    arrays = {SITES[0]: batch[:, :WIDTH], SITES[1]: batch[:, WIDTH:-1]}
    found = diff(narrow, ActivationDataset.from_activations(arrays))
    assert np.isnan(found.nu_error).all() and np.isnan(found.nu_reconstruction).all()
    exclusive = [*range(16, 24)]
    assert found.verdicts[exclusive].tolist() == TRUTH[exclusive].tolist()


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
def test_other_numbers_of_sites_are_refused(names):
    columns = Columns(names, (4,) * len(names))
    arrays = {name: np.ones((5, 4), np.float32) for name in names}
    with pytest.raises(ValueError, match=r"sites, got a \(width 4\)"):
        diff(SparseCoder(columns, columns, 8, k=2), ActivationDataset.from_activations(arrays))


def test_it_takes_one_pass_over_as_many_tokens_as_asked_for(monkeypatch):
    planted, passes = Planted(), []
    original = ActivationDataset.batches
    monkeypatch.setattr(
        ActivationDataset, "batches", lambda *a, **o: (passes.append(1), original(*a, **o))[1]
    )
    assert diff(planted.coder(), planted.dataset(), max_tokens=1234).n_tokens == 1234
    assert len(passes) == 1


def test_blocks_of_features_make_no_difference(monkeypatch):
    planted = Planted()
    whole = diff(planted.coder(), planted.dataset())
    monkeypatch.setattr("mlxterp.sae.latent_scaling.ROWS", 7)
    monkeypatch.setattr("mlxterp.sae.sharing.BATCH_ENTRIES", 1)
    parts = diff(planted.coder(), planted.dataset())
    for name in ("ratios", "nu_error", "nu_reconstruction", "noise"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-4)


def test_the_result_can_be_read():
    planted = Planted()
    coder = planted.coder(lost=SHRINKAGE)
    coder.metadata = SimpleNamespace(config={"lambda_sparse": planted.coefficient()})
    found = diff(coder, planted.dataset())
    assert found.coefficient == planted.coefficient()
    assert found.counts == {
        "shared": 12, "scaled": 0, "only base:mlp": 4, "only tuned:mlp": 4, "unclear": 4, "dead": 0,
    }  # fmt: skip
    assert found.features("tuned:mlp").tolist() == [20, 21, 22, 23]
    with pytest.raises(ValueError, match=r"'unclear', 'dead'\] or a site, got 'tuned'"):
        found.features("tuned")
    lines = [line.split() for line in repr(found).splitlines()]
    assert lines[3][:4] == ["shared", "12", "0.50", "1.00"]
    assert lines[-1][:5] == ["unclear:", "shrinkage", "explains", "it", "4"]
    assert found._repr_html_().count("<tr") == 8
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["counts"]["unclear"] == 4 and len(plain["shrinkage"]) == N
    (ax,) = found.plot().axes
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["shared (12)", "only base:mlp (4)", "only tuned:mlp (4)", "unclear (4)"]
    assert max(bar.get_y() + bar.get_height() for bar in ax.patches) == 12
