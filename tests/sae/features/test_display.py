import unicodedata

import pytest

from mlxterp.sae.features.display import pieces, strip, visible

TEXTS = {
    "html": "<script>alert('&amp;')</script>",
    "emoji": "a 👩‍👩‍👧 and 🏳️‍🌈, ok 👍🏽.",
    "arabic": "قال: مرحبا (hello) يا عالم",
    "hebrew": "abc שלום 123",
    "chinese": "漢字と仮名、そして한글",
    "combining": "e\u0301 o\u0308 à",
    "control": "a\x00b\x07c\x1b[31mred\x1b[0m\r\n\t\x7f",
    "direction": "user \u202edrow\u202c \u2066x\u2069",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_of_a_text_join_to_the_text(demo, text):
    ids = [i for i in demo.encode(text) if i not in demo.special_token_ids]
    found = pieces(demo, ids)
    assert len(found) == len(ids)
    assert "".join(found) == demo.decode(ids) == text
    assert "\ufffd" not in "".join(found)


def test_the_first_token_of_a_character_has_all_of_it(demo):
    ids = [i for i in demo.encode("x👍y") if i not in demo.special_token_ids]
    found = pieces(demo, ids)
    assert len(ids) > 3 and "👍" in found and found.count("") == len(ids) - 3


def test_bytes_that_make_no_character_stay_marked(demo):
    whole = [i for i in demo.encode("👍") if i not in demo.special_token_ids]
    assert len(whole) > 2
    cut = pieces(demo, whole[:-1])
    assert len(cut) == len(whole) - 1 and "\ufffd" in "".join(cut)
    after = pieces(demo, whole[:-1] + demo.encode(" cat")[1:])
    assert "".join(after).endswith(" cat")
    assert pieces(demo, []) == ()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_shown_changes_nothing_around_it(text):
    shown = visible(text)
    hidden = [
        c for c in shown if unicodedata.category(c) in ("Cc", "Cf") and c not in "\u200c\u200d"
    ]
    assert not hidden
    assert unicodedata.bidirectional("\u202e") == "RLO" and "\u202e" not in shown


def test_signs_stand_for_what_is_not_seen():
    assert visible("a\n\tb\x00\x1b\x7f") == "a⏎⇥b␀␛␡"
    assert visible("\u202ex\ufeff") == "\\u202ex\\ufeff"
    assert visible("👩‍👧 é <b>") == "👩‍👧 é <b>"  # escaping is the template's work


def test_tokens_of_one_character_are_shown_as_one_part():
    tokens, scores = ("a", "👍", "", "", "b"), (0.0, 1.0, -3.0, 0.0, 2.0)
    assert strip(tokens, scores, "vwxyz") == [
        ("a", 0.0, "v"), ("👍", -3.0, "w; x; y"), ("b", 2.0, "z"),
    ]  # fmt: skip
    assert strip(("", "b"), (1.0, 2.0)) == [("", 1.0, "1.000"), ("b", 2.0, "2.000")]
