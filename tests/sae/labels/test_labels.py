import json

import pytest
from matplotlib.figure import Figure

from mlxterp.sae.labels.labels import FeatureLabels, Label, Rule
from mlxterp.sae.labels.scores import Score

GOOD, POOR = Score(9, 1, 0, 10), Score(5, 5, 5, 5)


def filled(path=None) -> FeatureLabels:
    labels = FeatureLabels(100, path)
    rules = (Rule(None, " class", 0.9, 10), Rule("\n", "def", 1.0, 3))
    labels.add(
        7, Label("' class'", "tokens", {"version": 1}, tokens=GOOD, control=POOR, rules=rules)
    )
    labels.add(7, Label("keywords", "judge", {"n": 1}, "judge", {"n": 2}, GOOD, POOR))
    labels.add(42, Label("French words", "tokens", tokens=POOR))
    labels.failures[3] = "no answer"
    return labels


def test_the_users_label_counts_first_and_tables_last():
    labels = filled()
    assert labels[7].text == "keywords" and len(labels) == 2 and list(labels) == [7, 42]
    labels.add(7, Label("words", "another"))
    assert labels[7].text == "words"
    labels.set(7, "  Python\nkeywords ")
    assert labels[7] == Label("Python keywords", "user")
    labels.add(7, Label("other words", "another"))
    assert labels[7].source == "user"
    assert [label.source for label in labels.of(7)] == ["tokens", "judge", "user", "another"]
    assert labels.texts == {7: "Python keywords", 42: "French words"}
    assert labels.by("judge").keys() == {7}


def test_labels_are_a_mapping():
    labels = filled()
    assert 7 in labels and 8 not in labels and labels.get(8) is None and labels.of(8) == ()
    with pytest.raises(KeyError):
        labels[8]


def test_labels_are_forgotten_by_source_or_altogether():
    labels = filled()
    labels.set(7, "mine")
    labels.remove(7, "user")
    assert labels[7].text == "keywords"
    labels.remove(7)
    labels.remove(42, "tokens")
    labels.remove(42)
    assert len(labels) == 0


def test_what_is_saved_comes_back(tmp_path):
    labels = filled()
    loaded = FeatureLabels.load(labels.save(tmp_path / "labels.json"), 100)
    assert loaded.to_dict() == labels.to_dict() and repr(loaded) == repr(labels)
    assert [loaded.of(i) for i in loaded] == [labels.of(i) for i in labels]
    assert loaded.failures == {3: "no answer"}
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]
    written = json.loads((tmp_path / "labels.json").read_text())["labels"]["7"]
    assert written[1]["text"] == "keywords"
    assert written[1]["detection"]["balanced_accuracy"] == 0.95


def test_changes_by_the_user_are_written_at_once(tmp_path):
    labels = filled(tmp_path / "labels.json")
    labels.set(5, "numbers")
    assert FeatureLabels.load(labels.path)[5].text == "numbers"
    labels.remove(5)
    assert 5 not in FeatureLabels.load(labels.path)


def test_what_was_left_of_a_killed_write_is_in_nobodys_way(tmp_path):
    labels = filled(tmp_path / "labels.json")
    labels.write()
    (tmp_path / ".labels.json.new").write_text("half of it")
    assert FeatureLabels.load(labels.path).texts == labels.texts
    labels.set(1, "more")
    assert FeatureLabels.load(labels.path)[1].text == "more"


def test_labels_are_beside_the_coder(tmp_path):
    empty = FeatureLabels.of_coder(tmp_path, 100)
    assert len(empty) == 0 and not list(tmp_path.iterdir())
    empty.set(3, "names")
    assert FeatureLabels.of_coder(tmp_path, 100).texts == {3: "names"}
    with pytest.raises(ValueError, match="is of a coder with 100 features, not 99"):
        FeatureLabels.of_coder(tmp_path, 99)
    assert FeatureLabels.of_coder(None, 5).path is None


def test_damaged_files_are_named(tmp_path):
    path = filled().save(tmp_path / "labels.json")
    whole = path.read_text()
    with pytest.raises(ValueError, match="labels.json is of a coder with 100 features, not 99"):
        FeatureLabels.load(path, 99)
    for broken, message in (
        (whole[:100], "not valid JSON"),
        (whole.replace('"format_version": 1', '"format_version": 2'), "format_version 2"),
        (whole.replace('"n_features": 100', '"n_features": 10'), "does not hold labels"),
        (whole.replace('"text": "keywords"', '"text": 7'), "is no label"),
        (whole.replace('"hits": 9', '"hits": "9"'), "A score has the counts"),
        (whole.replace('"share"', '"part"'), "is no label"),
        ('{"format_version": 1, "n_features": 100, "labels": [1]}', "does not hold labels"),
        ('{"format_version": 1, "n_features": 100, "labels": {"1": [2]}}', "does not hold labels"),
    ):
        assert broken != whole
        path.write_text(broken)
        with pytest.raises(ValueError, match=message) as error:
            FeatureLabels.load(path)
        assert "labels.json" in str(error.value)


def test_the_table_shows_the_best_first_with_the_means():
    labels = filled()
    labels.stopped = "too dear"
    lines = repr(labels).splitlines()
    assert lines[0] == "Labels of 2 of 100 features"
    assert lines[1].startswith("mean detection 0.950 [0.000, 1.000] (n=1)")
    assert "1 failed, such as 3: no answer" in lines and "stopped: too dear" in lines
    first, second = [line.split() for line in lines[-2:]]
    assert first == ["7", "keywords", "0.95", "0.50", "judge"]
    assert second == ["42", "French", "words", "0.50", "0.50", "tokens"]
    assert lines[-3].split() == [
        "feature", "detection", "fuzzing", "tokens", "tokens", "F1", "by",
    ]  # fmt: skip
    assert "n=20" in repr(labels[7]) and repr(labels[7]).startswith("'keywords', by judge")


def test_means_are_of_the_labels_that_count():
    means = filled().means
    assert means["detection"].value == pytest.approx(0.95) and means["tokens"].value == 0.5
    assert means["tokens F1"].value == 0.5 and "control" not in means
    labels = filled()
    labels.remove(7, "judge")
    means = labels.means
    assert means["tokens F1"].n == 2 and means["control F1"].n == 1
    assert means["control F1"].value == POOR.f1
    assert FeatureLabels(3).means == {}


def test_text_from_outside_is_shown_safely():
    labels = FeatureLabels(10)
    labels.add(1, Label("<script>alert(1)</script>\u202e\x1b[31m", "<b>evil</b>"))
    labels.failures[2] = "<img src=x>\x07"
    html, text = labels._repr_html_(), repr(labels) + repr(labels[1])
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "<b>" not in html and "<img" not in html
    assert not {"\u202e", "\x1b", "\x07"} & set(html + text)


def test_scores_are_drawn():
    figure = filled().plot()
    assert isinstance(figure, Figure)
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == [
        "detection (1)", "fuzzing (1)", "tokens (1)",
    ]  # fmt: skip
    assert isinstance(FeatureLabels(3).plot(), Figure)


def test_wrong_ids_and_texts_are_refused():
    labels = FeatureLabels(10)
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match=r"feature_id must be in \[0, 9\]"):
            labels.set(wrong, "x")
    for wrong in ("", "  ", None):
        with pytest.raises(ValueError, match="text must be a str that is not empty"):
            labels.set(1, wrong)
    assert len(labels) == 0
