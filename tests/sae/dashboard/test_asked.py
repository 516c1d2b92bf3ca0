"""What a page may ask for, and what is refused."""

import json

import pytest

from mlxterp.sae.dashboard.asked import (
    LIMITS,
    Refused,
    chosen_features,
    label_text,
    steer_request,
    text_request,
)


def body(**fields) -> bytes:
    return json.dumps(fields).encode()


def steered(**fields):
    return steer_request(
        body(**({"prompt": "a", "features": [{"id": 1}]} | fields)), n_features=10, unit="max"
    )


def test_what_is_not_said_has_a_default():
    asked = text_request(body(text="a"), 10)
    assert (asked.rank_by, asked.position, asked.features) == ("activation", -1, ())
    asked = steered()
    assert (asked.strengths, asked.mode, asked.unit) == ({1: 1.0}, "add", "max")


def test_what_is_said_is_taken():
    asked = text_request(
        body(text="é🙂", rank_by="attribution", position=3, features=[2, 2, 1]), 10
    )
    assert (asked.text, asked.position, asked.features) == ("é🙂", 3, (2, 1))
    asked = steered(
        features=[{"id": 0, "strength": -2}], mode="clamp", unit="activation", max_tokens=5,
        temperature=0.7, seed=9,
    )  # fmt: skip
    assert asked.strengths == {0: -2.0} and (asked.mode, asked.seed) == ("clamp", 9)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"1", b"null", b'"a"', b"\xff\xfe", b'{"text": NaN}', b"{}" * 2,
        b"[" * 100_000, b'{"text": ' + b"[" * 50_000, b'{"text": 1e999}', b'{"text": ""}',
        b'{"text": null}', b'{"text": ["a"]}', b'{"text": "\\ud800"}', b'{"text": "a", "x": 1}',
        b'{"text": "a", "top_k": 0}', b'{"text": "a", "top_k": true}',
        b'{"text": "a", "top_k": 2.0}',
        b'{"text": "a", "rank_by": "size"}', b'{"text": "a", "rank_by": []}',
        b'{"text": "a", "features": [10]}', b'{"text": "a", "features": [-1]}',
        b'{"text": "a", "features": "12"}', b'{"text": "a", "features": {"1": 1}}',
        b'{"text": "a", "position": 1e9}', b'{"text": "a", "target": ""}',
        b'{"text": "a", "target": 3}', b'{"text": "a", "top_k": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_a_malformed_request_for_a_text_is_refused(data):
    with pytest.raises(Refused) as refused:
        text_request(data, 10)
    assert refused.value.status == 400 and str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""}, {"prompt": "a" * (LIMITS["prompt_chars"] + 1)}, {"features": []},
        {"features": [{"id": 1}] * 17}, {"features": [1]}, {"features": [{"strength": 1}]},
        {"features": [{"id": 1, "x": 2}]}, {"features": [{"id": 1, "strength": "1"}]},
        {"features": [{"id": 1, "strength": None}]}, {"features": [{"id": 1, "strength": 1001}]},
        {"features": [{"id": 10}]}, {"mode": "explode"}, {"unit": "parsec"}, {"max_tokens": 0},
        {"max_tokens": 257}, {"temperature": -1}, {"temperature": True}, {"seed": -1},
        {"seed": 2**31}, {"max_tokens": None},
    ],
)  # fmt: skip
def test_a_malformed_request_for_a_generation_is_refused(fields):
    with pytest.raises(Refused):
        steered(**fields)


def test_the_limits_are_within_reach():
    assert len(steered(prompt="a" * LIMITS["prompt_chars"], max_tokens=256).prompt) == 8000
    assert len(chosen_features(body(features=[*range(64)]), 64)) == 64
    assert label_text(body(text=" x " + "y" * 497)) == "x " + "y" * 497


@pytest.mark.parametrize("fields", [{}, {"features": []}, {"features": [*range(65)]}])
def test_a_matrix_is_of_some_features(fields):
    with pytest.raises(Refused):
        chosen_features(body(**fields), 1000)


def test_a_label_may_be_empty_but_not_long():
    assert label_text(body(text="  ")) == ""
    for fields in ({}, {"text": 1}, {"text": "y" * 501}):
        with pytest.raises(Refused):
            label_text(body(**fields))
