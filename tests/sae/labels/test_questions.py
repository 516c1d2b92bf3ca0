import pytest

from mlxterp.sae.labels.contexts import Contexts, Split
from mlxterp.sae.labels.labelers import Answer
from mlxterp.sae.labels.questions import make_questions, read_scores
from tests.sae.labels.planted import Honest, contexts_of, planted


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    data = planted()
    return Contexts(data, Split.of(data.corpus))


def test_contexts_are_asked_about_five_at_a_time_and_each_once(contexts):
    questions = make_questions(contexts, 0, "the letter a", 12)
    assert [len(question.items) for question in questions] == [5, 5, 2] * 2
    for question in questions:
        assert contexts_of(question.prompt) == [item.text for item in question.items]
        assert question.prompt.count("the letter a") == 1
    items = [item for question in questions[:3] for item in question.items]
    assert tuple(items) == contexts.for_detection(0, 12)


def test_nothing_is_asked_of_what_is_not_wanted(contexts):
    assert make_questions(contexts, 0, "x", 0) == []
    assert {q.kind for q in make_questions(contexts, 0, "x", 20, ("fuzzing",))} == {"fuzzing"}


def test_two_contexts_of_either_sort_are_needed(contexts):
    assert make_questions(contexts, 0, "x", 3) == []
    assert len(make_questions(contexts, 0, "x", 4)) == 2


def test_answers_that_cannot_be_read_are_left_out_of_scores(contexts):
    questions = make_questions(contexts, 0, "the letter a", 20)
    assert [question.kind for question in questions] == ["detection"] * 4 + ["fuzzing"] * 4
    honest = Honest()
    answers = [Answer(honest(question.prompt)) for question in questions]
    answers[1] = Answer(error="late")
    answers[2] = Answer("answer: maybe")
    scores, reasons = read_scores(questions, answers)
    assert scores["detection"].n == 10 and scores["detection"].unanswered == 10
    assert scores["fuzzing"].n == 20 and scores["fuzzing"].balanced_accuracy == 1
    assert reasons[0] == "late" and "lists no numbers" in reasons[1]
    assert read_scores(questions, [Answer(error="late")] * 8)[0] == {}
