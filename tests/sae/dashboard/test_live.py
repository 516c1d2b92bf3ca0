"""A live model answers as it does when it is asked alone and directly."""

import asyncio

import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae.dashboard.asked import Refused, SteerRequest, TextRequest
from mlxterp.sae.dashboard.live import AT_ONCE, Live
from mlxterp.sae.features.analysis import analyze_text, encode_text
from mlxterp.sae.features.display import visible
from mlxterp.sae.model_pair import ModelPair
from mlxterp.sae.steering.edits import steering_edit
from tests.sae.dashboard.bundles import TEXTS, collected
from tests.sae.features.coders import KINDS, make, of_sites

PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def data(model):
    return collected(model)


@pytest.fixture
def live(data, model):
    return Live(data.coder, model, data)


def alone(data, asked: SteerRequest) -> dict[str, str]:
    """Both generations, made one after another without a dashboard."""
    model, maxima = data.source, data.maxima
    edits = steering_edit(
        data.coder, asked.strengths, mode=asked.mode, unit=asked.unit, maxima=maxima
    )
    options = {
        "max_tokens": asked.max_tokens, "temperature": asked.temperature, "seed": asked.seed,
    }  # fmt: skip
    ids = model.encode_batch([asked.prompt])[0]
    return {
        "plain": model.generate(ids, **options).text,
        "steered": model.generate(ids, edit=edits, **options).text,
    }


async def events_of(live: Live, asked: SteerRequest) -> list:
    return [event async for event in live.steer(asked)]


@pytest.mark.parametrize("rank_by", ["activation", "logit_effect", "attribution"])
def test_an_analysis_is_that_of_the_library(live, data, model, rank_by):
    text = TEXTS[2][:60]
    found = asyncio.run(live.analyze(TextRequest(text, rank_by, top_k=5, features=(3, 8))))
    options = {"rank_by": rank_by} if rank_by != "activation" else {}
    expected = analyze_text(data.coder, model, text, 5, **options)
    assert found["tokens"] == [visible(token) for token in expected.tokens]
    assert [one["id"] for one in found["top"]] == [one.feature_id for one in expected.top]
    for here, there in zip(found["by_token"], expected.by_token, strict=True):
        assert [i for i, _ in here] == [i for i, _ in there]
        np.testing.assert_allclose([x for _, x in here], [x for _, x in there], rtol=1e-3)
    for here, there in zip(found["top"], expected.top, strict=True):
        np.testing.assert_allclose(here["scores"], there.scores, rtol=1e-3, atol=1e-6)
        assert here["position"] == there.position
    codes = np.array(encode_text(data.coder, model, text))
    pinned = {one["id"]: one["values"] for one in found["pinned"]}
    np.testing.assert_allclose(pinned[8], codes[:, 8], rtol=1e-3, atol=1e-6)
    assert [*pinned] == [3, 8] and found["position"] == expected.position


def test_a_target_may_be_named(live):
    asked = TextRequest("the cat", "logit_effect", target=" the")
    assert set(asyncio.run(live.analyze(asked))["targets"]) == {" the"}
    with pytest.raises(Refused) as refused:
        asyncio.run(live.analyze(TextRequest("the cat", "attribution", position=99)))
    assert refused.value.status == 400


def test_a_text_that_would_take_too_much_memory_is_refused(live, monkeypatch):
    monkeypatch.setattr("mlxterp.sae.dashboard.live.AT_LEAST", 4)
    monkeypatch.setattr("mlxterp.sae.dashboard.live.MOST_ENTRIES", 40 * 4)
    with pytest.raises(Refused, match="up to 4 tokens"):
        asyncio.run(live.analyze(TextRequest(TEXTS[1])))


@pytest.mark.parametrize("mode", ["add", "clamp", "min_clamp", "scale", "ablate"])
def test_both_generations_are_those_of_the_model(live, data, mode):
    strength = 1.0 if mode == "ablate" else 2.0
    asked = SteerRequest(PROMPT, {int(data.firing_counts.argmax()): strength}, mode, max_tokens=6)
    found = asyncio.run(events_of(live, asked))
    assert found[-1] == ("end", alone(data, asked))
    for side in ("plain", "steered"):
        pieces = [e["text"] for name, e in found[:-1] if name == "piece" and e["side"] == side]
        assert "".join(pieces) == found[-1][1][side]


@pytest.mark.parametrize("kind", KINDS)
def test_coders_of_every_kind_steer(kind, model):
    data = collected(model, kind)
    live, asked = Live(data.coder, model, data), SteerRequest(PROMPT, {0: 3.0}, max_tokens=3)
    assert asyncio.run(events_of(live, asked))[-1] == ("end", alone(data, asked))


def test_a_model_and_a_coder_that_have_computed_nothing_yet_answer():
    live = Live(make("sae"), InterpretableModel.demo())
    asked = SteerRequest(PROMPT, {0: 3.0}, unit="activation", max_tokens=2)
    assert asyncio.run(live.analyze(TextRequest(PROMPT, "attribution")))["top"]
    assert asyncio.run(events_of(live, asked))[-1][0] == "end"


def test_so_do_two_models():
    pair = ModelPair([InterpretableModel.demo(), InterpretableModel.demo()])
    sites = ("base:layers.2.mlp_out", "tuned:layers.2.mlp_out")
    live = Live(of_sites(sites, sites), pair)
    assert asyncio.run(live.analyze(TextRequest(PROMPT)))["top"]


def test_people_who_steer_at_once_get_what_they_would_get_alone(live, data):
    strongest = np.argsort(-data.maxima)[:4].tolist()
    asked = [
        SteerRequest(PROMPT, {feature: 4.0}, max_tokens=12, temperature=t, seed=feature)
        for feature, t in zip(strongest, (0.0, 0.0, 0.9, 0.0), strict=True)
    ]

    async def together() -> list:
        text = live.analyze(TextRequest(PROMPT))
        return await asyncio.gather(*(events_of(live, one) for one in asked), text)

    *found, analysis = asyncio.run(together())
    ends = [events[-1][1] for events in found]
    assert ends == [alone(data, one) for one in asked]
    assert len({end["steered"] for end in ends}) == 4  # else the test would show nothing
    unsteered = analyze_text(data.coder, data.source, PROMPT, 16)
    assert [one["id"] for one in analysis["top"]] == [one.feature_id for one in unsteered.top]


def test_edits_of_a_person_do_not_reach_other_uses_of_the_model(live, data, model):
    plain = np.array(model.run(PROMPT).output)
    asked = SteerRequest(PROMPT, {int(data.maxima.argmax()): 50.0}, max_tokens=20)
    seen = []

    async def meanwhile() -> None:
        async for name, _ in live.steer(asked):
            if name == "piece":
                seen.append(np.array(model.run(PROMPT).output))

    asyncio.run(meanwhile())
    assert len(seen) > 5 and all(np.allclose(plain, one, atol=1e-5) for one in seen)


def test_generations_beyond_a_number_wait_for_another_day(live):
    asked = SteerRequest(PROMPT, {1: 1.0}, max_tokens=4)

    async def crowd() -> str:
        running = [live.steer(asked) for _ in range(AT_ONCE)]
        for one in running:
            await anext(one)
        with pytest.raises(Refused) as refused:
            await anext(live.steer(asked))
        assert refused.value.status == 429
        for one in running[:1]:
            await one.aclose()  # someone has closed the page
        return (await events_of(live, asked))[-1][0]

    assert asyncio.run(crowd()) == "end"


def test_prompts_have_room_in_the_context_of_the_model(live, model, monkeypatch):
    long = "a b c d e f " * 600
    limit = model.context_length
    assert limit is None or len(model.encode_batch([long])[0]) + 256 > limit
    monkeypatch.setattr(type(model), "context_length", property(lambda self: 20))
    with pytest.raises(Refused, match="20 tokens"):
        asyncio.run(events_of(live, SteerRequest(PROMPT, {1: 1.0}, max_tokens=20)))


def test_without_data_strengths_are_in_units_of_the_activation(data, model):
    live = Live(data.coder, model)
    assert live.unit == "activation"
    with pytest.raises(Refused, match="largest value"):
        asyncio.run(events_of(live, SteerRequest(PROMPT, {1: 1.0}, unit="max")))
    assert asyncio.run(live.together([1, 2])) is None


def test_co_occurrences_are_those_of_the_data(live, data):
    found = asyncio.run(live.together([4, 1, 30]))
    np.testing.assert_array_equal(found["counts"], data.co_activation([4, 1, 30]))
    assert found["exact"] and found["n_tokens"] == data.codes.n_tokens


def test_data_of_another_coder_are_refused(data, model):
    with pytest.raises(ValueError, match="30"):
        Live(data.coder, model, collected(model, n_features=30))
