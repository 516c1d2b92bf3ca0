import json
import logging
import re

import pytest

from mlxterp.sae import load_sae
from mlxterp.sae.features.collection import collect
from mlxterp.sae.labels.labelers import Function, Labeler, LocalModel
from mlxterp.sae.labels.labeling import (
    IN_A_ROW,
    LabelerError,
    as_labeler,
    auto_label_features,
    by_usefulness,
    label_cost,
)
from mlxterp.sae.labels.labels import FeatureLabels
from mlxterp.sae.labels.server import Server
from tests.sae.labels.planted import LETTERS, Honest, contexts_of, is_question_for_label, planted


@pytest.fixture(scope="module")
def data():
    return planted()


def run(data, labeler, **options) -> FeatureLabels:
    return auto_label_features(data.coder, data, labeler, **options)


def asked_for_labels(honest) -> int:
    return sum(map(is_question_for_label, honest.prompts))


def test_right_labels_score_above_9_tenths(data):
    labels = run(data, Honest())
    assert labels.texts == {i: f"the letter {letter}" for i, letter in enumerate(LETTERS)}
    for label in labels.values():
        assert label.detection.balanced_accuracy > 0.9 and label.fuzzing.balanced_accuracy > 0.9
        assert label.detection.n == label.fuzzing.n == 20
    assert labels.failures == {} and labels.stopped == ""


def test_shuffled_labels_score_one_half_within_the_interval(data):
    labels = FeatureLabels(6)
    for i in range(6):
        labels.set(i, f"the letter {LETTERS[i - 1]}")
    run(data, Honest(), labels=labels, n_scored=100)
    means = labels.means
    assert means["detection"].low < 0.5 < means["detection"].high
    assert 0.4 < means["detection"].value < 0.6
    for label in labels.values():
        # Marks on another letter are not those of this one: they are found wrong, all of them.
        assert label.fuzzing.hits == 0 and label.fuzzing.balanced_accuracy <= 0.5
        low, high = label.detection.interval
        assert low < 0.5 < high


def test_controls_score_one_half(data):
    labels = run(data, Honest(), n_scored=60)
    control = labels.means["control"]
    assert control.n == 6 and 0.4 < control.value < 0.6
    assert run(data, Honest(), n_control=0).means.keys() == {"detection", "fuzzing"}


@pytest.mark.parametrize("always", ["1, 2, 3, 4, 5", "none"])
def test_a_judge_that_always_says_the_same_scores_one_half(data, always):
    labels = run(data, Honest(), judge=lambda prompt: f"answer: {always}")
    for label in labels.values():
        assert label.detection.balanced_accuracy == label.fuzzing.balanced_accuracy == 0.5


def test_the_judge_may_be_another_one(data):
    labeler, judge = Honest(), Honest()
    labels = run(data, Function(labeler, name="one"), judge=Function(judge, name="two"))
    assert labels[0].source == "one" and labels[0].judge == "two"
    assert all(map(is_question_for_label, labeler.prompts)) and len(labeler.prompts) == 6
    assert not any(map(is_question_for_label, judge.prompts)) and judge.prompts


def test_what_is_done_is_not_asked_for_again(data, tmp_path):
    path, honest = tmp_path / "labels.json", Honest()
    labels = run(data, honest, labels=FeatureLabels(6, path))
    n = len(honest.prompts)
    again = run(data, honest, labels=FeatureLabels.load(path))
    assert len(honest.prompts) == n and again.to_dict() == labels.to_dict()
    run(data, honest, labels=again, num_examples=10)
    assert asked_for_labels(honest) == 12
    run(data, honest, labels=again, num_examples=10, n_scored=10)
    assert asked_for_labels(honest) == 12 and again[0].detection.n == 10
    assert again[0].settings == {**labels[0].settings, "num_examples": 10}
    other = Function(Honest(), name="other")
    run(data, other, labels=again)
    assert [label.source for label in again.of(0)] == [labels[0].source, "other"]


def test_labels_of_the_users_own_are_scored_but_kept(data):
    labels, honest = FeatureLabels(6), Honest()
    labels.set(1, "the letter b")
    labels.set(2, "the letter x")
    run(data, honest, labels=labels)
    assert asked_for_labels(honest) == 4
    assert labels[1].source == labels[2].source == "user"
    assert labels[1].detection.balanced_accuracy == 1 and labels[2].text == "the letter x"
    assert labels[2].fuzzing.hits == 0


def test_useful_features_come_first_dense_ones_last_and_dead_ones_not_at_all():
    data = planted(["aab" * 30 + "x" * 300 + "cdd" * 5, "bbc" * 5 + "x" * 50], a=1, b=1, c=1, e=1)
    assert data.firing_rates[0] > 0.1 > data.firing_rates[1] > data.firing_rates[2] > 0
    assert by_usefulness(data) == [1, 2, 0]
    honest = Honest()
    labels = run(data, honest, n_scored=0)
    assert set(labels) | set(labels.failures) == {0, 1, 2}


class Failing(Honest):
    """Fails on the labels that it is asked for at some of its turns."""

    def __init__(self, turns):
        super().__init__()
        self.turns = set(turns)

    def __call__(self, prompt):
        answer = super().__call__(prompt)
        if is_question_for_label(prompt) and asked_for_labels(self) in self.turns:
            raise TimeoutError("no answer within 60 s")
        return answer


def test_one_failure_is_noted_and_the_rest_is_done(data, tmp_path):
    labels = run(data, Failing([2]), labels=FeatureLabels(6, tmp_path / "labels.json"))
    (failed,) = labels.failures
    assert labels.failures[failed] == "TimeoutError: no answer within 60 s"
    assert len(labels) == 5 and failed not in labels
    loaded = FeatureLabels.load(labels.path)
    assert loaded.failures == labels.failures
    run(data, Failing([]), labels=loaded)
    assert len(loaded) == 6 and loaded.failures == {}


def test_those_that_failed_before_are_tried_last(data):
    labels, honest = FeatureLabels(6), Honest()
    first, second = by_usefulness(data)[:2]
    labels.failures = {first: "late", second: "late"}
    run(data, honest, labels=labels, max_features=4)
    assert labels.keys() == set(range(6)) - {first, second}
    run(data, honest, labels=labels)
    assert len(labels) == 6 and labels.failures == {}


def test_nonsense_is_noted(data):
    labels = run(data, lambda prompt: "I am a teapot", features=[0, 1])
    assert len(labels) == 0
    assert labels.failures[0].startswith("the answer has no line that begins with 'label:'")


def test_several_failures_in_a_row_end_the_run_and_keep_what_is_done(data, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.labels.labeling.IN_A_ROW", 3)
    labels = FeatureLabels(6, tmp_path / "labels.json")
    with pytest.raises(LabelerError) as error:
        run(data, Failing([1, 3, 4, 5]), labels=labels)
    message = str(error.value)
    assert "failed 3 times in a row, at last with: TimeoutError: no answer within 60 s" in message
    assert "Labels of 1 features are kept, in" in message and "labels.json" in message
    kept = FeatureLabels.load(labels.path)
    assert len(kept) == 1 and kept[next(iter(kept))].detection.balanced_accuracy > 0.9
    honest = Honest()
    run(data, Function(honest, name=Function(Failing([])).name), labels=kept)
    assert len(kept) == 6 and asked_for_labels(honest) == 5
    assert IN_A_ROW == 5


def test_without_a_file_the_error_has_the_labels(data):
    def gone(prompt):
        raise ConnectionRefusedError("nobody there")

    with pytest.raises(LabelerError, match="nobody there.*labels of this error") as error:
        run(data, gone)
    assert len(error.value.labels) == 0 and len(error.value.labels.failures) == 5


def test_a_judge_that_fails_leaves_the_labels(data):
    def judge(prompt):
        raise TimeoutError("late")

    labels, honest = FeatureLabels(6), Honest()
    with pytest.raises(LabelerError, match="The judge .* failed 5 times in a row.*late"):
        run(data, honest, judge=judge, labels=labels)
    assert len(labels) == 5 and labels[0].detection is None
    assert set(labels.failures.values()) == {"no score: TimeoutError: late"}
    run(data, honest, labels=labels)
    assert asked_for_labels(honest) == 6 and labels.failures == {}
    assert all(label.detection.balanced_accuracy > 0.9 for label in labels.values())


def test_features_with_too_few_contexts_are_said_to_have(data):
    texts = ["x" * 200 + "a", *("y" * 200 + chr(ord("g") + i) for i in range(9))]
    rare = planted(texts, a=1)
    honest = Honest()
    labels = run(rare, honest)
    assert labels.failures == {0: "it fires in too few contexts to make a label from"}
    assert honest.prompts == []
    labels.set(0, "the letter a")
    run(rare, honest, labels=labels)
    assert labels.failures[0] == "no score: it fires, or is silent, in too few contexts"
    assert honest.prompts == [] and labels[0].detection is None


@pytest.mark.parametrize(
    ("limit", "n_labels", "n_scored"), [(1, 1, 0), (9, 1, 1), (13, 2, 1), (20, 3, 2)]
)
def test_no_more_requests_are_made_than_allowed(data, limit, n_labels, n_scored):
    honest, labels = Honest(), FeatureLabels(6)
    run(data, honest, labels=labels, max_requests=limit)
    assert len(honest.prompts) <= limit and len(labels) == n_labels
    assert sum(label.detection is not None for label in labels.values()) == n_scored
    assert "limit of requests or tokens" in labels.stopped and "stopped:" in repr(labels)
    run(data, honest, labels=labels)
    assert asked_for_labels(honest) == 6 and labels.stopped == ""


def test_tokens_and_features_are_limited(data):
    honest = Honest()
    labels = run(data, honest, max_features=2)
    assert len(labels) == 2 and labels.stopped == ""
    honest = Honest()
    labels = run(data, honest, max_tokens=9_000)
    used = sum(len(prompt) for prompt in honest.prompts) / 3.5
    assert 1 <= len(labels) < 6 and labels.stopped and used < 9_000


def test_the_cost_is_known_before_anything_is_asked(data, caplog):
    honest = Honest()
    cost = label_cost(data.coder, data, honest)
    assert honest.prompts == [] and cost.n_features == 6
    with caplog.at_level(logging.INFO, "mlxterp"):
        run(data, honest)
    assert len(honest.prompts) == cost.n_requests == 6 * 9 + 6 * 4
    tokens = sum(len(prompt) / 3.5 for prompt in honest.prompts)
    assert tokens < cost.n_tokens < 1.1 * tokens + 256 * cost.n_requests
    assert repr(cost) in caplog.text and "78 requests" in repr(cost)
    labels = run(data, honest, max_features=4, n_control=0)
    assert label_cost(data.coder, data, honest, labels=labels, n_control=0).n_requests == 18


def test_the_file_is_written_every_few_features(data, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.labels.labeling.SAVED_EVERY", 2)
    monkeypatch.setattr("mlxterp.sae.labels.labeling.SHARE_OF_SAVING", 1e9)
    path, found = tmp_path / "labels.json", []

    class Looking(Honest):
        def __call__(self, prompt):
            if is_question_for_label(prompt):
                found.append(len(json.loads(path.read_text())["labels"]) if path.exists() else 0)
            return super().__call__(prompt)

    run(data, Looking(), labels=FeatureLabels(6, path))
    assert found == [0, 0, 2, 2, 4, 4]


def test_an_interrupted_run_keeps_what_is_done(data, tmp_path):
    class Interrupted(Honest):
        def __call__(self, prompt):
            if is_question_for_label(prompt) and asked_for_labels(self) == 3:
                raise KeyboardInterrupt
            return super().__call__(prompt)

    path = tmp_path / "labels.json"
    with pytest.raises(KeyboardInterrupt):
        run(data, Interrupted(), labels=FeatureLabels(6, path))
    assert len(FeatureLabels.load(path)) == 3


def test_several_prompts_at_a_time_give_the_same(data):
    class Four:
        name, concurrency, max_tokens = "Honest", 4, 10

        def __init__(self):
            self.sizes, self.function = [], Function(Honest())

        def ask(self, prompts):
            self.sizes.append(len(prompts))
            return self.function.ask(prompts)

    four = Four()
    labels = run(data, four)
    assert four.sizes[:4] == [4, 32, 2, 16]
    alone = run(data, Function(Honest(), name="Honest"))
    assert labels.to_dict() == alone.to_dict()


def test_a_labeller_that_loses_answers_is_an_error(data):
    class Losing:
        name, concurrency, max_tokens = "losing", 1, 10

        def ask(self, prompts):
            return []

    with pytest.raises(ValueError, match="gave 0 answers to 1 prompts"):
        run(data, Losing())


def test_without_a_labeller_tables_make_the_labels(data):
    labels = run(data, None)
    assert labels.texts == {i: f"'{letter}'" for i, letter in enumerate(LETTERS)}
    assert labels[0].tokens.f1 == 1


def test_prompts_are_made_of_text_of_the_bundled_model(sae):
    prompts, data = [], collect(sae, sae._training_data, max_tokens=4_000)
    features = by_usefulness(data)[:3]
    labels = run(data, lambda p: prompts.append(p) or "label: x", features=features, n_scored=0)
    assert labels.texts == dict.fromkeys(features, "x")
    for prompt in prompts:
        contexts = contexts_of(prompt)
        assert 2 < len(contexts) <= 20
        assert all(re.search(r"«[^«»]*»\[\d+\]", context) for context in contexts)
        assert "»[10]" in prompt


def test_a_model_that_knows_no_better_gives_up(sae, demo):
    data = collect(sae, sae._training_data, max_tokens=4_000)
    labeler = LocalModel((demo.model, demo.tokenizer), name="demo", max_tokens=8)
    with pytest.raises(LabelerError, match="'demo' failed 5 .* no line that begins with 'label:'"):
        run(data, labeler, num_examples=4)


def test_bad_settings_are_named(data):
    for options, message in (
        ({"num_examples": 1}, "num_examples must be >= 2, got 1"),
        ({"n_scored": -1}, "n_scored must be >= 0, got -1"),
        ({"max_features": 0}, "max_features must be >= 1, got 0"),
        ({"max_requests": 0}, "max_requests must be >= 1, got 0"),
        ({"features": [6]}, r"feature_id must be in \[0, 5\], got 6"),
        ({"judge": 7}, "A labeller must be"),
    ):
        with pytest.raises(ValueError, match=message):
            run(data, Honest(), **options)
    with pytest.raises(ValueError, match="must not have the name 'user'"):
        run(data, Function(Honest(), name="user"))


def test_labellers_are_made_of_what_they_are_named_by(demo):
    assert isinstance(as_labeler("http://localhost:8080/v1"), Server)
    assert isinstance(as_labeler("mlx-community/some-model"), LocalModel)
    assert isinstance(as_labeler((demo.model, demo.tokenizer)), LocalModel)
    assert isinstance(as_labeler(len), Function)
    own = Function(len)
    assert as_labeler(own) is own and isinstance(own, Labeler)
    for wrong in ("", 7, None, (1, 2, 3)):
        with pytest.raises(ValueError, match="A labeller must be"):
            as_labeler(wrong)


@pytest.fixture
def saved(sae, model, texts, tmp_path):
    """A saved coder that knows its model."""
    before, copy = sae.path, load_sae(sae.save(tmp_path / "coder.mlx"))
    sae.path = before
    copy.bind(model)
    copy.collect(texts, max_tokens=4_000, verbose=False)
    return copy


def test_a_coder_keeps_its_labels_beside_it(saved, model):
    honest = Function(lambda prompt: "label: x", name="honest")
    features = by_usefulness(saved.features)[:3]
    labels = saved.auto_label_features(verbose=False)
    assert labels is saved.labels and len(labels) > 100
    made = {"features": features, "n_scored": 0, "verbose": False}
    saved.auto_label_features(labeler=honest, num_examples=4, **made)
    saved.labels.set(features[0], "mine")
    loaded = load_sae(saved.path)
    assert loaded.labels.to_dict() == labels.to_dict()
    assert [loaded.labels[i].text for i in features] == ["mine", "x", "x"]
    shown = loaded.visualize_feature(features[0], model=model)
    assert shown.label == "mine" and repr(shown).startswith(f"Feature {features[0]}: mine")
    silent = int(saved.features.dead[0]) if len(saved.features.dead) else None
    assert silent is None or saved.visualize_feature(silent).label is None


def test_the_labeller_is_named_in_one_way(saved):
    asked = []
    saved.auto_label_features(
        lambda prompt: asked.append(prompt) or "label: x", max_features=1, n_scored=0, verbose=False
    )
    assert len(asked) == 1
    with pytest.raises(ValueError, match="labeler_model or labeler, not both"):
        saved.auto_label_features("some-model", labeler=len)
