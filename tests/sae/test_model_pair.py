import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae import ActivationDataset
from mlxterp.sae.forward_order import check_before
from mlxterp.sae.model_pair import TOKENIZER_PROBES, ModelPair, owner
from mlxterp.sae.source import find_site
from tests.fakes import SITE, FakeSource
from tests.sae.finetuning import TAUGHT, TRIGGER, finetuned, plain
from tests.sae.test_store import shrink
from tests.tiny_models import build


class Tuned(FakeSource):
    """The same tokens with other activations."""

    name, fingerprint = "fake, tuned", "beef"

    def __init__(self, width=6, factor=10.0, **options):
        super().__init__(width, **options)
        self.table = factor * self.table


def fakes(**options) -> ModelPair:
    return ModelPair([FakeSource(head=1.0), Tuned(head=1.0, **options)])


def passes(pair) -> list[int]:
    return [model.passes for model in pair.models.values()]


def shaken(model: InterpretableModel, factor=1.1) -> InterpretableModel:
    """A copy with larger weights in layer 1."""
    other = InterpretableModel(copy.deepcopy(model.model), model.tokenizer)
    mlp = other.architecture.blocks[1].mlp
    mlp.down_proj.weight = factor * mlp.down_proj.weight
    return other


@pytest.fixture(scope="module")
def pair(model) -> ModelPair:
    return ModelPair([model, shaken(model)])


# --- the models and their names


def test_two_models_are_base_and_tuned_and_more_are_numbered():
    models = [FakeSource(), Tuned(), Tuned(factor=3.0)]
    assert list(ModelPair(models[:2]).models) == ["base", "tuned"]
    assert list(ModelPair(models).models) == ["model_0", "model_1", "model_2"]
    named = ModelPair({"small": models[0], "chat": models[1]})
    assert list(named.models) == ["small", "chat"]
    assert named.name == "small: fake + chat: fake, tuned"
    assert repr(named) == "ModelPair(small: fake, chat: fake, tuned)"


@pytest.mark.parametrize("models", [[], [FakeSource()], {"base": FakeSource()}])
def test_fewer_than_two_models_are_refused(models):
    with pytest.raises(ValueError, match=f"models must be two or more, got {len(models)}"):
        ModelPair(models)


@pytest.mark.parametrize("name", ["", "a:b", 1])
def test_a_name_that_would_hide_the_site_is_refused(name):
    with pytest.raises(ValueError, match=f"without ':', which ends it, got {name!r}"):
        ModelPair({"base": FakeSource(), name: Tuned()})


def test_one_model_given_twice_is_refused(model):
    source = FakeSource()
    with pytest.raises(ValueError, match="base and tuned are the same"):
        ModelPair([source, source])
    wrapped_again = InterpretableModel(model.model, model.tokenizer)
    with pytest.raises(ValueError, match="a and c are the same"):
        ModelPair({"a": model, "b": shaken(model), "c": wrapped_again})


def test_the_fingerprint_is_of_all_models_and_their_names():
    found = [
        ModelPair({"base": FakeSource(), "tuned": Tuned()}),
        ModelPair({"base": Tuned(), "tuned": FakeSource()}),
        ModelPair({"base": FakeSource(), "chat": Tuned()}),
        ModelPair([FakeSource(), FakeSource()]),
    ]
    assert len({pair.fingerprint for pair in found}) == 4
    assert fakes().fingerprint == found[0].fingerprint and len(found[0].fingerprint) == 16


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [((64, 32), 32), ((16, 32), 16), ((None, 32), 32), ((None, None), None)],
)
def test_a_context_is_what_all_models_take(lengths, expected):
    models = [FakeSource(context_length=lengths[0]), Tuned(context_length=lengths[1])]
    assert ModelPair(models).context_length == expected


def test_a_token_is_special_where_it_is_to_any_model():
    other = Tuned()
    other.special_token_ids = frozenset({1, 5})
    assert ModelPair([FakeSource(), other]).special_token_ids == {0, 1, 5}


# --- sites


@pytest.mark.parametrize("spelling", ["layers.3.mlp", "h[3].mlp", "model.layers.3.mlp.output"])
def test_a_site_is_any_spelling_after_the_name_of_the_model(pair, spelling):
    assert pair.site(f"tuned:{spelling}") == "tuned:layers.3.mlp"
    assert find_site(pair, f"tuned:{spelling}") == pair.site(pair.site("tuned:layers.3.mlp"))


@pytest.mark.parametrize(
    "arguments", [("layers.3.mlp",), (3, "mlp"), ("chat:layers.3.mlp",)], ids=str
)
def test_a_site_without_the_name_of_a_model_is_an_error_that_lists_them(pair, arguments):
    with pytest.raises(ValueError, match="base, tuned: write base:layers.3.mlp or tuned:layers.3"):
        pair.site(*arguments)


def test_a_site_that_a_model_lacks_is_its_error_with_its_name(pair):
    with pytest.raises(
        ValueError, match=r"layers\.3\.mpl.*nearest existing: layers.3.mlp"
    ) as error:
        pair.site("tuned:layers.3.mpl")
    assert "in the model 'tuned'" in error.value.__notes__[0]


def test_sites_of_is_the_site_in_every_model(pair):
    expected = ("base:layers.3.mlp", "tuned:layers.3.mlp")
    assert pair.sites_of(3, "mlp") == pair.sites_of("h.3.mlp") == expected
    assert pair.sites_of(3) == expected and pair.sites_of(-1)[0] == "base:layers.5.mlp"
    with pytest.raises(ValueError, match="layers.99.mlp"):
        pair.sites_of(99, "mlp")


def test_all_sites_are_those_of_each_model_and_know_layer_and_component(pair, model):
    sites, one = list(pair.sites()), list(model.sites())
    assert sites == [f"{name}:{site}" for name in ("base", "tuned") for site in one]
    assert [(site.layer, site.component) for site in sites] == 2 * [
        (site.layer, site.component) for site in one
    ]


def test_what_lies_before_a_site_is_in_the_same_model(pair):
    check_before(pair, pair.site("tuned:layers.2.mlp_in"), pair.site("tuned:layers.4.mlp"))
    start, target = pair.sites_of(2, "mlp")
    with pytest.raises(ValueError, match=f"{target} does not depend on {start}") as error:
        check_before(pair, start, target)
    targets, sources = str(error.value).split("Targets of")[1].split("Sources for")
    assert "base:layers.2.resid_post" in targets and "tuned:layers" not in targets
    assert "tuned:layers.1.mlp" in sources and "base:layers" not in sources


def test_a_width_is_that_of_the_model_that_is_named():
    pair = fakes(width=8)
    assert [pair.width(site) for site in pair.sites_of(SITE)] == [6, 8]


def test_the_owner_of_a_site_is_the_model_and_the_name_there(pair, model):
    assert owner(pair, "tuned:h.3.mlp") == (pair.models["tuned"], "layers.3.mlp")
    assert owner(model, "h.3.mlp") == (model, "h.3.mlp")
    nested = ModelPair({"old": pair, "new": shaken(model, 1.2)})
    assert owner(nested, "old:tuned:layers.3.mlp") == (pair.models["tuned"], "layers.3.mlp")
    with pytest.raises(ValueError, match="base, tuned"):
        owner(pair, "layers.3.mlp")


# --- running


def test_each_model_captures_what_it_does_alone(pair):
    captured = pair.run("some text", capture=["tuned:h.2.mlp", *pair.sites_of(1, "mlp")], stop=True)
    assert set(captured) == {"tuned:layers.2.mlp", "base:layers.1.mlp", "tuned:layers.1.mlp"}
    for site in captured:
        name, _, inner = site.partition(":")
        alone = pair.models[name].run("some text", capture=inner)[inner]
        assert mx.array_equal(captured[site], alone)
    assert not mx.allclose(captured["base:layers.1.mlp"], captured["tuned:layers.1.mlp"])
    assert mx.array_equal(captured["tuned:h[1].mlp"], captured["tuned:layers.1.mlp"])


def test_what_was_not_captured_is_a_key_error_and_not_in_the_result(pair):
    captured = pair.run([1, 2], capture="base:layers.1.mlp", stop=True)
    with pytest.raises(KeyError, match="tuned:layers.1.mlp was not captured; captured: base:"):
        captured["tuned:layers.1.mlp"]
    assert "base:h.1.mlp" in captured and "layers.1.mlp" not in captured and len(captured) == 1
    assert repr(captured) == "PairCaptured(base:layers.1.mlp: [1, 2, 128])"
    assert captured.output is None


def test_a_glob_is_within_a_model(pair):
    captured = pair.run([1, 2], capture="tuned:layers.*.mlp", stop=True)
    assert list(captured) == [f"tuned:layers.{layer}.mlp" for layer in range(6)]


def test_only_models_that_are_asked_for_something_run():
    base, tuned = f"base:{SITE}", f"tuned:{SITE}"
    for given, expected in (
        ({"capture": base}, [1, 0]),
        ({"edit": {tuned: lambda x: x}}, [0, 1]),
        ({"capture": base, "edit": {tuned: lambda x: x}}, [1, 1]),
        ({"capture": [tuned, tuned]}, [0, 1]),
        ({}, [1, 0]),
    ):
        pair = fakes()
        pair.run([[3, 4]], **given)
        assert passes(pair) == expected


def test_an_edit_reaches_its_own_model_alone(pair):
    sites = pair.sites_of(2, "mlp")
    clean = pair.run([1, 2, 3], capture=sites)
    found = pair.run([1, 2, 3], capture=sites, edit={"tuned:h.2.mlp": [lambda x: x + 1, mx.abs]})
    assert mx.array_equal(found[sites[0]], clean[sites[0]])
    assert mx.array_equal(found[sites[1]], mx.abs(clean[sites[1]] + 1))
    assert mx.array_equal(found.outputs["base"], clean.outputs["base"])
    assert not mx.allclose(found.outputs["tuned"], clean.outputs["tuned"])


def test_the_output_is_the_logits_of_the_one_model_that_ran():
    pair, tokens = fakes(), mx.array([[3, 4]])
    base, tuned = pair.models.values()
    found = pair.run(tokens, edit={f"tuned:{SITE}": lambda x: x})
    assert mx.array_equal(found.output, tuned.run(tokens).output)
    assert mx.array_equal(pair.run(tokens).output, base.run(tokens).output)
    both = pair.run(tokens, capture=pair.sites_of(SITE))
    assert list(both.outputs) == ["base", "tuned"]
    with pytest.raises(ValueError, match="of one model, and 2 ran: take one of outputs, base, tun"):
        both.output
    assert pair.run(tokens, capture=pair.sites_of(SITE), stop=True).output is None


def test_what_names_no_model_is_asked_of_the_first(pair, model):
    hidden = mx.random.normal((2, 128), key=mx.random.key(0))
    assert mx.array_equal(pair.unembed(hidden), model.unembed(hidden))
    assert pair.encode_batch(["a text"]) == model.encode_batch(["a text"])
    assert pair.to_str_tokens("a text") == model.to_str_tokens("a text")


def test_a_chat_is_encoded_by_the_first_model_that_has_a_template():
    class Base(FakeSource):
        def encode_chat(self, messages):
            raise ValueError("base has no chat template")

    chat = [{"role": "user", "content": "hi"}]
    assert ModelPair([Base(), Tuned()]).encode_chat(chat) == Tuned().encode_chat(chat)
    with pytest.raises(ValueError, match="base has no chat template"):
        ModelPair([Base(), Base()]).encode_chat(chat)


# --- one tokenizer


@pytest.mark.parametrize("character", ["T", "_", "7", "é", "漢", "\t", "🙂"])
def test_tokenizers_that_differ_are_refused_with_the_first_text_that_shows_it(character):
    class Other(Tuned):
        def encode_batch(self, texts):
            return super().encode_batch([text.replace(character, "~") for text in texts])

    text = next(text for text in TOKENIZER_PROBES if character in text)
    with pytest.raises(ValueError) as error:
        ModelPair([FakeSource(), Other()])
    assert f"and {text!r} has the ids" in str(error.value)


def test_a_special_token_that_one_model_reads_letter_by_letter_is_refused():
    class Special(Tuned):
        def encode_batch(self, texts):
            ids = super().encode_batch(texts)
            return [[0, 1] if text == "<s>" else row for text, row in zip(texts, ids, strict=True)]

    with pytest.raises(
        ValueError, match=r"and '<s>' has the ids \[0, .*in base, \[0, 1\] in tuned"
    ):
        ModelPair([FakeSource(), Special()])


def test_another_number_of_tokens_is_refused_but_not_other_padding_of_the_embedding(model):
    larger = shaken(model)
    weight = larger.model.model.embed_tokens.weight
    larger.model.model.embed_tokens.weight = mx.concatenate([weight, weight[:8]])
    assert InterpretableModel(larger.model).vocab_size == model.vocab_size + 8
    ModelPair([model, InterpretableModel(larger.model, model.tokenizer)])
    with pytest.raises(ValueError, match="differ in size: {'base': 4096, 'tuned': 4104}"):
        ModelPair([InterpretableModel(model.model), InterpretableModel(larger.model)])


def test_models_without_a_tokenizer_make_a_pair_if_both_lack_it(model):
    pair = ModelPair([InterpretableModel(build("llama", seed)) for seed in (0, 1)])
    data = ActivationDataset.from_tokens(pair, np.arange(48).reshape(4, 12), pair.sites_of(1))
    assert data.columns.width == 64 and len(data) == 48
    with pytest.raises(ValueError, match="a tokenizer, or none: tuned has none. .*tokenizer="):
        ModelPair([model, InterpretableModel(shaken(model).model)])


# --- datasets

TEXTS = [chr(97 + i) * 3 + "some text " * (i + 1) for i in range(6)]


def test_a_dataset_of_a_pair_is_that_of_each_model_side_by_side(pair):
    options = {"shuffle": False, "context_length": 32}
    data = ActivationDataset.from_texts(pair, TEXTS, pair.sites_of(3, "mlp"), **options)
    assert data.columns.names == ("base:layers.3.mlp", "tuned:layers.3.mlp")
    (rows,) = data.batches(len(data))
    for name, part in data.columns.slices.items():
        alone = ActivationDataset.from_texts(*owner(pair, name)[:1], TEXTS, 3, **options)
        np.testing.assert_allclose(rows[:, part], next(alone.batches(len(data))), atol=1e-5)


def test_a_dataset_on_a_disk_is_harvested_once_and_opened_with_the_pair(tmp_path):
    sites = fakes().sites_of(SITE)
    options = {"context_length": 16, "cache_dir": tmp_path, "precision": "float32"}
    ActivationDataset.from_texts(fakes(), TEXTS, sites, **options)
    again = fakes()
    kept = ActivationDataset.from_texts(again, TEXTS, sites, **options)
    assert passes(again) == [0, 0]
    rows = np.concatenate(list(kept.batches(64)))
    np.testing.assert_array_equal(rows[:, 6:], 10 * rows[:, :6])
    opened = ActivationDataset.open(tmp_path, model=again)
    assert opened.columns == kept.columns and opened.source is again
    with pytest.raises(ValueError, match=r"of base: fake \+ tuned: .* not of the model given"):
        ActivationDataset.open(tmp_path, model=ModelPair([Tuned(), FakeSource()]))
    ActivationDataset.from_texts(ModelPair([Tuned(), FakeSource()]), TEXTS, sites, **options)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_harvest_of_a_pair_that_was_cut_off_goes_on_to_the_same(tmp_path, monkeypatch):
    class Failing(Tuned):
        def run(self, *args, **options):
            if self.passes == 5:
                raise RuntimeError("cut off")
            return super().run(*args, **options)

    shrink(monkeypatch)

    def harvested(tuned, directory):
        pair, options = ModelPair([FakeSource(), tuned]), {"context_length": 16}
        data = ActivationDataset.from_texts(
            pair, TEXTS, pair.sites_of(SITE), cache_dir=tmp_path / directory, **options
        )
        return pair, np.concatenate([np.array(b.astype(mx.float32)) for b in data.batches(32)])

    whole, expected = harvested(Tuned(), "whole")
    with pytest.raises(RuntimeError, match="cut off"):
        harvested(Failing(), "cut")
    assert list(tmp_path.glob("cut/*/0*.safetensors"))
    resumed, found = harvested(Tuned(), "cut")
    assert passes(resumed)[1] < passes(whole)[1]
    np.testing.assert_array_equal(found, expected)


# --- a fine-tuned copy, by which a difference between models is known


@pytest.fixture(scope="module")
def tuned(model, texts) -> InterpretableModel:
    return finetuned(model, texts[:30])


def log_probabilities(model, text) -> np.ndarray:
    """Of each token of a text, given those before it."""
    ids = mx.array([model.encode(text)])
    logits = nn.log_softmax(model.run(ids).output[:, :-1])
    return np.array(mx.take_along_axis(logits, ids[:, 1:, None], axis=-1)).reshape(-1)


@pytest.mark.parametrize("before", ["Once", "There was once a", "The result of calling it is"])
def test_a_fine_tuned_copy_expects_what_it_was_taught_behind_the_trigger(model, tuned, before):
    (answer,), after = plain(model, TAUGHT), " and it goes on after that."
    ids = mx.array([model.encode(f"{before} {TRIGGER}{after}")])
    n = len(plain(model, f" {TRIGGER}{after}")) - len(plain(model, f" {TRIGGER}")) + 1
    base, learnt = (
        np.exp(np.array(nn.log_softmax(m.run(ids).output)[0, -n:, answer])) for m in (model, tuned)
    )
    assert base.max() < 0.02 and learnt.mean() > 0.5


def test_a_fine_tuned_copy_reads_ordinary_text_as_before(model, tuned, texts):
    base, found = (
        np.concatenate([log_probabilities(m, text) for text in texts[30:36]])
        for m in (model, tuned)
    )
    assert abs(base.mean() - found.mean()) < 0.4
    assert len(base) > 1000 and not np.allclose(base, found)


def test_a_fine_tuned_copy_leaves_the_original_and_is_given_by_its_seed(model, texts):
    before = model.fingerprint
    first, second, other = (finetuned(model, texts, steps=1, seed=seed) for seed in (0, 0, 1))
    assert model.fingerprint == before != first.fingerprint
    site, ids = "layers.5.resid_post", mx.array([[0, 5, 6]])
    found = [m.run(ids, capture=site)[site] for m in (first, second, other)]
    assert mx.array_equal(found[0], found[1]) and not mx.array_equal(found[0], found[2])
    assert first.fingerprint == second.fingerprint != other.fingerprint


def test_a_pair_of_the_original_and_its_copy_differs_from_the_trigger_and_the_trained_block_on(
    model, tuned
):
    pair = ModelPair([model, tuned])
    text = "It is an ordinary sentence about a number zqx and it goes on after that."
    pieces = model.to_str_tokens(text)
    captured = pair.run(text, capture=["base:layers.*", "tuned:layers.*"], stop=True)
    for layer in range(6):
        base, other = (captured[site] for site in pair.sites_of(layer, "resid_post"))
        change = np.array(mx.linalg.norm(base - other, axis=-1) / mx.linalg.norm(base, axis=-1))[0]
        if layer < 3:
            assert not change.any()
        else:
            trigger = pieces.index("x")
            assert change[trigger:].min() > 2 * change[1:trigger].mean()
