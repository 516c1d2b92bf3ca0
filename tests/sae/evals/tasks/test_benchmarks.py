import json
import math
from dataclasses import replace

import numpy as np
import pytest

from mlxterp.sae import ActivationDataset
from mlxterp.sae.evals.tasks.autointerp import ALWAYS_NO, OTHERS_LABEL, autointerp
from mlxterp.sae.evals.tasks.benchmarks import benchmark
from mlxterp.sae.evals.tasks.labelled import LabelledSet
from mlxterp.sae.evals.tasks.result import TaskResult, Values
from mlxterp.sae.evals.tasks.stability import seed_stability
from mlxterp.sae.evals.tasks.synthetic import SyntheticFeatures
from tests.fakes import FakeSource
from tests.sae.evals.tasks.planted import coder_of, rotation
from tests.sae.evals.tasks.test_probing import letters_and_digits
from tests.sae.kinds import make


def test_a_score_is_the_mean_with_its_spread_and_the_first_control():
    values = Values((0.5, 0.7, math.nan), {"chance": (0.1, 0.2, math.nan), "other": (0.3,)})
    score = values.score
    assert score.value == pytest.approx(0.6) and score.control == pytest.approx(0.15)
    assert score.spread == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert values.control("other").value == 0.3
    assert "not defined" in Values((math.nan,)).score.reason
    features = Values((0.0, 1.0, 1.0, 0.0), by_seed=False)
    assert features.score.spread == pytest.approx(np.std([0, 1, 1, 0], ddof=1) / 2)


def test_differences_are_paired_and_know_that_seeds_share_data():
    a, b = Values((0.5, 0.7, 0.9), overlap=1 / 3), Values((0.4, 0.55, 0.85))
    found = a.minus(b)
    assert found.value == pytest.approx(0.1)
    assert found.spread == pytest.approx(np.std([0.1, 0.15, 0.05], ddof=1) * math.sqrt(2 / 3))
    assert found.is_noise is False
    assert a.minus(a).is_noise
    assert Values((0.5,)).minus(Values((0.4,))).is_noise is None
    with pytest.raises(ValueError, match="the same seeds, got 3 and 1"):
        a.minus(Values((0.5,)))
    one, two = Values((1.0, 0.0), by_seed=False), Values((0.0, 0.0, 1.0), by_seed=False)
    assert one.minus(two).spread == pytest.approx(math.hypot(one.score.spread, two.score.spread))


def test_results_of_other_settings_are_not_compared():
    one, other = (TaskResult("t", {"a": Values((1.0, 2.0))}, settings={"k": k}) for k in (1, 2))
    with pytest.raises(ValueError, match="the same settings"):
        one.minus(other)
    with pytest.raises(KeyError, match="none of the figures"):
        one["b"]
    assert one.minus(one)["a"].value == 0


@pytest.fixture(scope="module")
def found():
    coder = coder_of(rotation(6), rotation(6))
    three = LabelledSet.of(
        "three", ["ab12#"] * 80, [[(0, 2, "letter"), (2, 4, "digit"), (4, 5, "sign")]] * 80
    )
    options = {"probing": {"ks": (1, 2)}, "absorption": {"words": three},
               "perturbation": {"labelled": three, "ns": (1, 2)},
               "ground_truth": {"n_tokens": 400}}  # fmt: skip
    return benchmark(
        coder,
        FakeSource(),
        ["probing", "absorption", "perturbation", "stability", "ground_truth", "autointerp"],
        sets=[letters_and_digits()],
        others=[coder_of(rotation(6, 1), rotation(6, 1))],
        synthetic=SyntheticFeatures.make("sparse", 8, 6, 1.0),
        seeds=2,
        options=options,
    )


def test_all_tasks_run_and_what_is_missing_says_why(found):
    tasks = {"probing", "absorption", "perturbation", "stability", "ground_truth"}
    assert set(found.results) == tasks
    assert found.left_out == {"autointerp": "it needs data=..."}
    with pytest.raises(KeyError, match="it needs data="):
        found["autointerp"]
    for result in found.results.values():
        assert any(values.controls for values in result.figures.values())
    assert "left out, autointerp: it needs data=..." in repr(found)
    assert "<table" in found._repr_html_() and "<table" in found["probing"]._repr_html_()
    assert len(found.plot().axes) == 5


def test_a_coder_compared_with_itself_differs_by_noise_only(found):
    compared = found.minus(found)
    verdicts = {d.is_noise for of in compared.differences.values() for d in of.values()}
    assert verdicts <= {True, None} and "noise" in repr(compared)
    assert json.dumps(compared.to_dict()) and "<table" in compared._repr_html_()


def test_tasks_of_other_settings_are_left_out_of_a_comparison(found):
    others = dict(found.results)
    others["stability"] = replace(others["stability"], settings={"n_others": 7})
    compared = found.minus(replace(found, results=others))
    assert "the same settings" in compared.left_out["stability"]
    assert "stability" not in compared.differences and "probing" in compared.differences
    assert "left out, stability" in repr(compared)


def test_the_report_is_json_in_both_shapes(found, tmp_path):
    whole = json.loads(found.to_json(tmp_path / "report.json"))
    assert whole == json.loads((tmp_path / "report.json").read_text())
    assert whole["results"]["probing"]["figures"]["accuracy, k = 1"]["values"]
    reports = json.loads(found.to_json(schema="saebench"))
    assert set(reports) == {"sparse_probing", "absorption_first_letter", "tpp"}
    envelope = {
        "eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics",
        "eval_result_details", "eval_result_unstructured", "sae_bench_commit_hash", "sae_lens_id",
        "sae_lens_release_id", "sae_lens_version", "sae_cfg_dict",
    }  # fmt: skip
    for name, report in reports.items():
        assert set(report) == envelope and report["eval_type_id"] == name
    probing = reports["sparse_probing"]["eval_result_metrics"]
    own = found["probing"]["accuracy, k = 1"]
    assert probing["sae"]["sae_top_1_test_accuracy"] == own.score.value
    assert probing["llm"]["llm_top_1_test_accuracy"] == own.control("neurons").value
    assert (
        probing["llm"]["llm_test_accuracy"] == found["probing"]["accuracy, all neurons"].score.value
    )
    mean = reports["absorption_first_letter"]["eval_result_metrics"]["mean"]
    assert mean["mean_full_absorption_score"] == found["absorption"]["full absorption"].score.value
    assert {"std_dev_absorption_fraction_score", "mean_num_split_features"} <= set(mean)
    tpp = reports["tpp"]["eval_result_metrics"]["tpp_metrics"]
    assert tpp["tpp_threshold_2_total_metric"] == found["perturbation"]["TPP, n = 2"].score.value
    with pytest.raises(ValueError, match="schema must be one of"):
        found.to_json(schema="saelens")


def test_a_transcoder_is_probed_and_the_rest_says_why_not():
    coder = make("transcoder")
    source = FakeSource(further={"in.0": 6, "out.0": 5})
    found = benchmark(coder, source, ("probing", "absorption", "perturbation"),
                      sets=[letters_and_digits()], seeds=1,
                      options={"probing": {"ks": (1,)}})  # fmt: skip
    assert list(found.results) == ["probing"]
    assert all("writes what it reads" in why for why in found.left_out.values())
    with pytest.raises(ValueError, match="tasks must be some of .*got 'ravel'"):
        benchmark(coder, source, ("ravel",))
    assert benchmark(coder, None, ("probing",)).left_out == {"probing": "it needs model=..."}


def test_stability_is_that_of_matching_and_1_with_itself():
    one, other = coder_of(rotation(12), rotation(12)), coder_of(rotation(12, 1), rotation(12, 1))
    found = seed_stability(one, [one, other])
    assert found["MCC"].values[0] == pytest.approx(1)
    assert found["MCC"].values[1] == pytest.approx(found["MCC"].control("random directions").value,
                                                   abs=0.12)  # fmt: skip
    with pytest.raises(ValueError, match="other coders to look in"):
        seed_stability(one, [])


@pytest.fixture(scope="module")
def data(model, texts, sae):
    dataset = ActivationDataset.from_texts(model, texts[:12], 2, "residual", context_length=128)
    from mlxterp.sae.features.collection import collect

    return collect(sae, dataset, verbose=False)


def test_labels_by_tokens_are_above_both_controls(sae, data):
    found = autointerp(sae, data, n_features=30)
    f1, balanced = found["F1 of tokens"], found["balanced accuracy of tokens"]
    assert f1.control(ALWAYS_NO).value == 0 and balanced.control(ALWAYS_NO).value == 0.5
    assert balanced.control(OTHERS_LABEL).value == pytest.approx(0.5, abs=0.05)
    assert f1.score.value > f1.control(OTHERS_LABEL).value + 0.1
    assert found.settings["labeler"] == "tables of tokens"


def test_a_judge_who_always_says_no_has_what_the_control_has(sae, data):
    def labeler(prompt: str) -> str:
        return "answer: none" if "numbers" in prompt else f"label: words of {len(prompt)}"

    found = autointerp(sae, data, labeler, n_features=8)
    for kind in ("detection", "fuzzing"):
        for name, always in (("balanced accuracy", 0.5), ("F1", 0.0)):
            values = found[f"{name} of {kind}"]
            assert values.score.value == values.control(ALWAYS_NO).value == always
    assert list(found.figures)[0] == "balanced accuracy of detection"
    assert OTHERS_LABEL in found["F1 of detection"].controls
    assert OTHERS_LABEL not in found["F1 of fuzzing"].controls
    with pytest.raises(ValueError, match="n_features must be >= 1"):
        autointerp(sae, data, labeler, n_features=0)


def test_a_coder_runs_its_tasks_as_a_method(sae, model, texts):
    found = sae.benchmark(["probing", "ground_truth"], model=model, sets=[letters_and_digits(40)],
                          seeds=1, options={"probing": {"ks": (1,)}})  # fmt: skip
    assert list(found.results) == ["probing"] and found.model == "demo"
    assert found.left_out == {"ground_truth": "it needs synthetic=..."}
