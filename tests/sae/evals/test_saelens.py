"""The numbers of SAELens's own evaluation, on the same coder, model and tokens."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAE, ActivationDataset
from mlxterp.sae.coder import Columns
from mlxterp.sae.evals.evaluating import evaluate
from mlxterp.sae.evals.replacing import Donors, Replacement, Replacing
from tests.fakes import FakeSource, Result

GOLDEN = Path(__file__).parents[2] / "golden" / "evals"
SITE = "layers.0.resid_post"


class Table(FakeSource):
    """Activations by position and token, and one matrix that predicts, as in `make_evals.py`."""

    special_token_ids = frozenset()

    def __init__(self, table, unembed):
        super().__init__(width=table.shape[-1], bos=False)
        self.table, self.matrix = mx.array(table), mx.array(unembed)

    def site(self, layer, component=None):
        return SITE

    def width(self, site):
        return self.d_model

    def run(self, tokens, *, capture=(), edit=None, stop=False):
        hidden = self.table[mx.arange(tokens.shape[1])[None], mx.array(tokens)]
        for function in (edit or {}).values():
            hidden = function(hidden)
        result = Result(dict.fromkeys(capture, hidden))
        result.output = hidden @ self.matrix
        return result


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(GOLDEN / "saelens.npz"))
    expected = json.loads((GOLDEN / "saelens.json").read_text())
    source = Table(arrays["table"], arrays["unembed"])
    sites = Columns((SITE,), (8,))
    coder = SAE(sites, sites, 32, "relu", k=None)
    coder.W_enc, coder.W_dec = mx.array(arrays["W_enc"].T), mx.array(arrays["W_dec"])
    coder.b_enc, coder.b_dec = mx.array(arrays["b_enc"]), mx.array(arrays["b_dec"])
    dataset = ActivationDataset.from_tokens(source, arrays["tokens"], SITE)
    return expected, coder, dataset


@pytest.fixture(scope="module")
def reports(golden):
    expected, coder, dataset = golden
    report = evaluate([coder], dataset)[0]
    return expected, {name: json.loads(report.to_json(schema=name)) for name in SCHEMAS}


SCHEMAS = ("saelens", "saebench")
GROUPS = ("reconstruction_quality", "shrinkage", "sparsity", "model_performance_preservation")


@pytest.mark.parametrize("group", GROUPS)
def test_metrics_are_those_of_saelens(reports, group):
    expected, found = reports
    metrics = found["saelens"]["metrics"][group]
    assert list(metrics) == list(expected["metrics"][group])
    for name, value in expected["metrics"][group].items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_the_divergence_is_that_of_saelens_at_each_position(golden, reports):
    expected, coder, dataset = golden
    by_position = {k: np.array(v) for k, v in expected["kl_by_position"].items()}
    donors = Donors({}, {})
    replacements = [Replacement((SITE,), coder=0), Replacement((SITE,), ablation="zero")]
    tokens = mx.array(dataset.corpus.tokens)
    counts = mx.array(dataset.corpus.documents() >= 0)
    assert counts.all()
    replacing = Replacing([coder], dataset.source, donors)
    spliced, zero = replacing.outcomes(replacements, tokens, counts)
    for mine, name in ((spliced, "kl_div_with_sae"), (zero, "kl_div_with_ablation")):
        np.testing.assert_allclose(mine.kl, by_position[name][:, :-1], rtol=1e-4, atol=1e-6)
    metrics = reports[1]["saelens"]["metrics"]["model_behavior_preservation"]
    for name, values in by_position.items():
        assert metrics[name] == pytest.approx(values[:, :-1].mean(), rel=1e-5)
    share = 1 - metrics["kl_div_with_sae"] / metrics["kl_div_with_ablation"]
    assert metrics["kl_div_score"] == pytest.approx(share, rel=1e-6)
    assert list(metrics) == list(expected["metrics"]["model_behavior_preservation"])


def test_features_have_the_numbers_of_saelens(reports):
    expected, found = reports
    features = found["saelens"]["feature_metrics"]
    assert set(features) == set(expected["feature_metrics"])
    for name, values in expected["feature_metrics"].items():
        mine, theirs = np.array(features[name]), np.array(values, np.float64)
        # SAELens has NaN, and -1 in its files, for a feature that never fires.
        np.testing.assert_allclose(mine, np.nan_to_num(theirs, nan=-1), rtol=1e-5, atol=1e-6)


def test_the_groups_are_those_of_saelens(reports):
    expected, found = reports
    report = found["saelens"]
    assert list(report["metrics"]) == list(expected["metrics"])
    assert list(report) == [
        "unique_id", "sae_set", "sae_id", "eval_cfg", "metrics", "feature_metrics", "sae_cfg",
    ]  # fmt: skip
    assert report["sae_id"] == "blocks.0.hook_resid_post"
    assert report["metrics"]["token_stats"]["total_tokens_eval_sparsity_variance"] == 240
