import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.evals.tasks.labelled import Examples, LabelledSet
from mlxterp.sae.evals.tasks.logistic import fit_probe
from mlxterp.sae.evals.tasks.perturbation import perturbation_of, probe_perturbation
from mlxterp.sae.evals.tasks.splits import split
from tests.fakes import FakeSource
from tests.sae.evals.tasks.planted import coder_of, rotation
from tests.sae.kinds import make

CLASSES, EACH, WIDTH = 4, 200, 32


def planted(aligned=True):
    """Four classes of examples, each with two features of its own and noise in all others."""
    rng, axes = np.random.default_rng(0), rotation(WIDTH)
    labels = np.repeat(np.arange(CLASSES), EACH)
    values = 0.3 * rng.exponential(size=(len(labels), WIDTH))
    for c in range(CLASSES):
        values[labels == c, 2 * c : 2 * c + 2] += 3
    x = mx.array((values @ axes).astype(np.float32))
    examples = Examples("planted", tuple("abcd"), x, np.arange(len(labels)), labels,
                        rng.integers(0, 80, len(labels)))  # fmt: skip
    rows = axes if aligned else rotation(WIDTH, 1)
    return coder_of(rows, rows), examples


def test_removing_a_class_s_features_harms_its_probe_alone():
    coder, examples = planted()
    found = perturbation_of(coder, examples, ns=(1, 2), seeds=3)
    assert found["intended, n = 2"].score.value > 0.4
    assert abs(found["unintended, n = 2"].score.value) < 0.1
    assert found["TPP, n = 2"].score.value > 0.35
    assert found["TPP, n = 2"].control("features at random").value < 0.1
    assert found["TPP, n = 2"].above("random features").is_noise is False


def test_features_that_are_no_classes_s_do_less():
    aligned, examples = planted()
    other, _ = planted(aligned=False)
    scores = [
        perturbation_of(c, examples, ns=(2,), seeds=2)["TPP, n = 2"] for c in (aligned, other)
    ]
    assert scores[0].score.value > scores[1].score.value + 0.1


@pytest.mark.parametrize("n", [3, 25])  # more than have an effect
def test_scores_are_those_of_an_independent_computation(n):
    coder, examples = planted(aligned=False)
    coder.b_dec = mx.ones((WIDTH,))  # which the kept error takes with it
    found = perturbation_of(coder, examples, ns=(n,), seeds=1)
    x = np.array(examples.activations, np.float64)
    rows = np.array(coder.W_dec, np.float64)
    z = np.maximum(x @ np.array(coder.W_enc, np.float64).T, 0)
    drops = np.zeros((CLASSES, CLASSES))
    parts = [split(examples.labels == c, examples.groups, 0) for c in range(CLASSES)]
    probes = [fit_probe(x[p.train], examples.labels[p.train] == c) for c, p in enumerate(parts)]
    for c in range(CLASSES):
        train = parts[c].train
        own = train[examples.labels[train] == c]
        rest = train[examples.labels[train] != c]
        effect = [
            (z[own, i].mean() - z[rest, i].mean()) * (rows[i] @ probes[c].weights)
            for i in range(WIDTH)
        ]
        best = [i for i in sorted(range(WIDTH), key=lambda i: -effect[i])[:n] if effect[i] > 0]
        error = x - z @ rows
        kept = z.copy()
        kept[:, best] = 0
        for j in range(CLASSES):
            test, y = parts[j].test, examples.labels[parts[j].test] == j
            after = kept[test] @ rows + error[test]
            right = [((probes[j].decide(a) > 0) == y).mean() for a in (x[test], after)]
            drops[c, j] = right[0] - right[1]
    intended = np.diag(drops).mean()
    unintended = drops[~np.eye(CLASSES, dtype=bool)].mean()
    assert found[f"intended, n = {n}"].values[0] == pytest.approx(intended, abs=1e-9)
    assert found[f"unintended, n = {n}"].values[0] == pytest.approx(unintended, abs=1e-9)
    assert found[f"TPP, n = {n}"].values[0] == pytest.approx(intended - unintended, abs=1e-9)


def test_bad_arguments_and_coders_are_refused():
    coder, source = coder_of(rotation(6), rotation(6)), FakeSource()
    two = LabelledSet.of("two", ["abc1"] * 60, [[(0, 3, "a"), (3, 4, "b")]] * 60)
    with pytest.raises(ValueError, match="3 classes or more"):
        probe_perturbation(coder, source, two, ns=(1,))
    with pytest.raises(ValueError, match=r"ns must be in \[1, 6\], got \[50\]"):
        probe_perturbation(coder, source, two, ns=(50,))
    with pytest.raises(ValueError, match="Probe perturbation needs a coder that writes"):
        probe_perturbation(make("transcoder"), source, two)
    assert "Do not rank coders" in (probe_perturbation.__doc__ or "")
