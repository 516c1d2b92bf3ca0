import io
import keyword
import tokenize

import pytest

from mlxterp.sae.evals.tasks.builtin_sets import MAKERS, builtin_sets

N = 40


@pytest.fixture(scope="module")
def sets():
    return {labelled.name: labelled for labelled in builtin_sets(n_texts=N)}


def spans(labelled):
    for text, of_text in zip(labelled.texts, labelled.labels, strict=True):
        for start, end, name in of_text:
            yield text[start:end], name


def test_all_sets_are_there_with_their_classes(sets):
    assert list(sets) == list(MAKERS)
    for name in ("keyword", "string", "comment", "definition", "capital", "digit", "prose"):
        assert sets[name].classes == (False, True)
    assert set(sets["kind"].classes) >= {"keyword", "name", "operator", "string", "comment"}
    assert len(sets["package"].classes) == 5
    assert [s.name for s in sets.values() if not s.of_tokens] == ["prose", "package"]


def test_labels_are_what_they_say(sets):
    for part, label in spans(sets["keyword"]):
        assert part.isidentifier() and keyword.iskeyword(part) == label
    for part, label in spans(sets["digit"]):
        assert part.isdigit() == label
    for part, label in spans(sets["capital"]):
        assert part.isalpha() and part[0].isupper() == label
    assert all(part.startswith("#") for part, label in spans(sets["comment"]) if label)


def test_kinds_are_those_of_the_tokenizer_read_alone(sets):
    """Every span that is whole within its text is one token, of the same kind when read alone."""
    types = {"operator": tokenize.OP, "number": tokenize.NUMBER, "comment": tokenize.COMMENT}
    seen = set()
    for part, name in spans(sets["kind"]):
        if name in types:
            first = next(tokenize.generate_tokens(io.StringIO(part).readline))
            assert (first.type, first.string) == (types[name], part)
            seen.add(name)
    assert seen == set(types)


def test_definitions_follow_def_or_class(sets):
    labelled = sets["definition"]
    n = 0
    for text, of_text in zip(labelled.texts, labelled.labels, strict=True):
        for start, _, label in of_text:
            if label and start > 10:
                assert text[:start].split()[-1] in ("def", "class")
                n += 1
    assert n > 10


def test_no_document_is_on_two_sides_unnoticed(sets):
    for labelled in sets.values():
        assert len(labelled.groups) == len(labelled.texts) <= N
    assert all(group.startswith("topic ") for group in sets["capital"].groups)


def test_sets_are_the_same_each_time_and_others_by_another_seed():
    (one,), (again,) = builtin_sets(["prose"], N), builtin_sets(["prose"], N)
    (other,) = builtin_sets(["prose"], N, seed=1)
    assert one.texts == again.texts != other.texts


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="names must be some of .*got 'nothing'"):
        builtin_sets(["nothing"])
    with pytest.raises(ValueError, match="n_texts must be >= 20, got 3"):
        builtin_sets(n_texts=3)
