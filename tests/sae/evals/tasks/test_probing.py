import mlx.core as mx
import numpy as np
import pytest
from scipy.optimize import minimize

from mlxterp.sae.evals.tasks.labelled import Examples, LabelledSet
from mlxterp.sae.evals.tasks.probing import CONTROLS, FULL, probe_examples, rank, sparse_probing
from mlxterp.sae.evals.tasks.splits import split
from tests.fakes import FakeSource
from tests.sae.evals.tasks.planted import coder_of, rotation
from tests.sae.kinds import make

WIDTH, N = 24, 600


def planted(informative=True, seed=0, n=N):
    """Values of `WIDTH` features along rotated axes, the third of which is the label."""
    rng, axes = np.random.default_rng(seed), rotation(WIDTH)
    y = rng.random(n) < 0.5
    values = rng.exponential(size=(n, WIDTH))
    if informative:
        values[:, 2] = 2 * y + 0.2 * rng.random(n)
    x = mx.array((values @ axes).astype(np.float32))
    groups = rng.integers(0, 60, n)
    examples = Examples("planted", (False, True), x, np.arange(n), y.astype(int), groups)
    return coder_of(axes, axes), examples, y


def test_the_planted_feature_tells_the_label_alone():
    coder, examples, _ = planted()
    figures = probe_examples(coder, examples, ks=(1, 2), seeds=3)["planted"]
    found = figures["accuracy, k = 1"]
    assert found.values == (1.0, 1.0, 1.0)
    assert figures["auc, k = 1"].score.value == 1.0
    assert found.control("neurons").value < 0.9
    assert found.control("random features").value < 0.9
    assert found.above("neurons").is_noise is False
    assert figures[f"accuracy, {FULL}"].score.value > 0.97


def test_shuffled_labels_score_chance_in_every_figure():
    coder, examples, _ = planted()
    figures = probe_examples(coder, examples, ks=(1, 5), seeds=5)["planted"]
    for name, values in figures.items():
        if name.startswith(("accuracy", "auc")):
            assert values.control(CONTROLS[0]).value == pytest.approx(0.5, abs=0.12), name


def test_without_anything_to_know_everything_is_chance():
    coder, examples, _ = planted(informative=False)
    figures = probe_examples(coder, examples, ks=(2,), seeds=5)["planted"]
    for name in ("accuracy, k = 2", f"accuracy, {FULL}"):
        assert figures[name].score.value == pytest.approx(0.5, abs=0.06)
        assert figures[name].above().is_noise
    for control in CONTROLS:
        assert figures["accuracy, k = 2"].control(control).value == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("k", [1, 3])
def test_selection_and_accuracy_are_those_of_an_independent_computation(k):
    coder, examples, y = planted(informative=False, seed=1)
    z = np.maximum(np.array(examples.activations, np.float64) @ np.array(coder.W_enc).T, 0)
    z[:, 5] *= 1 + 0.5 * y  # something to find
    coder.W_enc[5] *= 1.0
    found = probe_examples(_Coded(coder, z), examples, ks=(k,), seeds=1)["planted"]
    train, test = split(y, examples.groups, 0)
    gaps = [abs(z[train][y[train], i].mean() - z[train][~y[train], i].mean()) for i in range(WIDTH)]
    chosen = sorted(range(WIDTH), key=lambda i: -gaps[i])[:k]
    mean, deviation = z[train][:, chosen].mean(axis=0), z[train][:, chosen].std(axis=0)
    u, v = ((z[part][:, chosen] - mean) / deviation for part in (train, test))
    signs = np.where(y[train], 1, -1)

    def loss(w):
        return w[:-1] @ w[:-1] / 2 + np.log1p(np.exp(-signs * (u @ w[:-1] + w[-1]))).sum()

    w = minimize(loss, np.zeros(k + 1), tol=1e-12).x
    expected = ((v @ w[:-1] + w[-1] > 0) == y[test]).mean()
    assert found[f"accuracy, k = {k}"].values[0] == pytest.approx(expected, abs=1e-12)
    assert 5 in chosen


class _Coded:
    """A coder whose codes are given."""

    def __init__(self, coder, z):
        self._coder, self._z, self.n_features = coder, z, z.shape[1]

    def __copy__(self):
        import copy

        return copy.copy(self._coder)

    def __getattr__(self, name):
        return getattr(self._coder, name)

    def encode(self, x):
        n = len(x)
        if n > len(self._z):
            raise AssertionError
        return mx.array(self._z[:n].astype(np.float32))


def test_columns_are_ranked_for_each_of_several_labels():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(50, 7)).astype(np.float32), rng.random((3, 50)) < 0.4
    found = rank(x, labels)
    for y, order in zip(labels, found, strict=True):
        gaps = np.abs(x[y].mean(axis=0) - x[~y].mean(axis=0))
        assert order.tolist() == np.argsort(-gaps).tolist()


def test_every_class_of_several_is_looked_for_among_the_others():
    coder, examples, y = planted()
    labels = np.where(y, 2, np.arange(N) % 2)
    several = Examples("s", ("a", "b", "c"), examples.activations, examples.owners, labels,
                       examples.groups)  # fmt: skip
    found = probe_examples(coder, several, ks=(1,), seeds=2)
    assert list(found) == ["s: a", "s: b", "s: c"]
    assert found["s: c"]["accuracy, k = 1"].score.value == 1.0


def letters_and_digits(n=120):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdef123456"), 8)) for _ in range(n)]
    spans = [[(i, i + 1, c.isdigit()) for i, c in enumerate(text)] for text in texts]
    return LabelledSet.of("digits", texts, spans)


def test_sets_are_read_and_what_cannot_be_probed_is_left_out():
    coder = coder_of(rotation(6), rotation(6))
    few = LabelledSet.of("few", ["ab"], [[(0, 1, True), (1, 2, False)]])
    found = sparse_probing(coder, FakeSource(), [letters_and_digits(), few], ks=(1, 2), seeds=2)
    assert list(found.details) == ["digits"]
    assert found["accuracy, k = 1"] == found.details["digits"]["accuracy, k = 1"]
    assert "too few examples" in found.left_out["few"]
    assert found.settings["sets"] == ["digits"]
    assert found["accuracy, all neurons"].score.value > 0.95  # column 0 has the id


@pytest.mark.parametrize("kind", ["transcoder", "crosscoder", "cross-layer transcoder"])
def test_all_kinds_are_probed_by_what_they_read(kind):
    coder = make(kind)
    coder.W_enc = mx.random.normal(coder.W_enc.shape, key=mx.random.key(0))
    widths = dict(zip(coder.reads.names, coder.reads.widths, strict=True))
    source = FakeSource(further=widths)
    found = sparse_probing(coder, source, [letters_and_digits()], ks=(1,), seeds=1)
    assert not found.left_out and 0.3 < found["accuracy, k = 1"].score.value <= 1


def test_bad_arguments_are_refused():
    coder = coder_of(rotation(6), rotation(6))
    with pytest.raises(ValueError, match=r"ks must be in \[1, 6\], got \[7\]"):
        sparse_probing(coder, FakeSource(), [], ks=(7,))
    with pytest.raises(ValueError, match="seeds must be >= 1, got 0"):
        sparse_probing(coder, FakeSource(), [], seeds=0)
