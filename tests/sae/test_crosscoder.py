import copy

import mlx.core as mx
import numpy as np
import pytest

from mlxterp import InterpretableModel
from mlxterp.sae import (
    ActivationDataset,
    Crosscoder,
    CrosscoderConfig,
    CrosscoderTrainer,
    ModelPair,
    load_sae,
)
from mlxterp.sae.coder import Columns
from tests.sae.finetuning import TRIGGER, finetuned

N_SHARED, N_OWN, WIDTHS, SCALES = 16, 8, (24, 20), (1.0, 20.0)
CLASSES = np.repeat(["shared", "only a", "only b"], [N_SHARED, N_OWN, N_OWN])


def planted(n_tokens=20_000, seed=0):
    """True rows of both sites, balanced, and activations of two sites of different size.

    Features are shared or of one site alone; 2.5 of them are active on a token.
    """
    rng = np.random.default_rng(seed)
    n = len(CLASSES)
    rows = [rng.normal(size=(n, width)) for width in WIDTHS]
    rows = [site / np.linalg.norm(site, axis=1, keepdims=True) for site in rows]
    for site, absent in zip(rows, ("only b", "only a"), strict=True):
        site[absent == CLASSES] = 0
    z = rng.uniform(0.5, 1.5, (n_tokens, n)) * (rng.random((n_tokens, n)) < 2.5 / n)
    found = {}
    for name, site, scale in zip("ab", rows, SCALES, strict=True):
        noise = 0.01 * rng.normal(size=(n_tokens, site.shape[1]))
        found[name] = (scale * (z @ site + noise)).astype(np.float32)
    return rows, found


def config(**options) -> CrosscoderConfig:
    chosen = {"expansion_factor": 2, "num_epochs": 12, "batch_size": 256, "learning_rate": 5e-3}
    return CrosscoderConfig.recommended(22, 20_000, **{**chosen, **options})


def matched(crosscoder: Crosscoder, rows) -> tuple[np.ndarray, np.ndarray]:
    """Of every true feature the largest cosine with one of the coder's, and which that is."""
    scale = np.array(crosscoder.site_scale)
    own = np.array(crosscoder.W_dec) * np.repeat(scale, WIDTHS)
    true = np.concatenate([r * s * c for r, s, c in zip(rows, SCALES, scale, strict=True)], axis=1)
    own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-9)
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    cosines = true @ own.T
    return cosines.max(axis=1), cosines.argmax(axis=1)


WAYS = {
    "topk": {"k": 4},
    "batch_topk": {"k": 2},
    "relu": {"lambda_sparse": 0.01},
    "jumprelu": {"k": 3},
}


@pytest.mark.filterwarnings("ignore:.*features are dead")
@pytest.mark.parametrize("name", WAYS)
def test_planted_features_are_found_and_put_into_their_class(name):
    rows, data = planted()
    crosscoder = CrosscoderTrainer(config(activation_function=name, **WAYS[name])).fit(data)
    cosines, which = matched(crosscoder, rows)
    assert cosines.mean() > 0.95
    assert (crosscoder.sharing().classes[which] == CLASSES).mean() >= 0.95
    fvus = [site.fvu.value for site in crosscoder.evaluate().fidelity.by_site.values()]
    assert max(fvus) < 0.2
    assert max(fvus) < 2 * min(fvus)


def test_an_untrained_crosscoder_has_not_found_them():
    rows, data = planted(2000)
    crosscoder = CrosscoderTrainer(config(learning_rate=1e-12, num_epochs=1, k=4)).fit(data)
    cosines, which = matched(crosscoder, rows)
    assert cosines.mean() < 0.6
    assert (crosscoder.sharing().classes[which] == CLASSES).mean() < 0.7


@pytest.mark.filterwarnings("ignore:.*features are dead")
def test_component_weights_say_which_site_is_reconstructed_better():
    _, data = planted(5000)
    fvus = {}
    for weights in ({"a": 1, "b": 8}, {"a": 8, "b": 1}):
        settings = config(k=1, num_epochs=6, component_weights=weights)
        report = CrosscoderTrainer(settings).fit(data).evaluate()
        sites = report.fidelity.by_site.items()
        fvus[weights["a"]] = {site: alone.fvu.value for site, alone in sites}
    assert fvus[8]["a"] < 0.8 * fvus[1]["a"] and fvus[1]["b"] < 0.8 * fvus[8]["b"]


def test_a_crosscoder_writes_the_several_sites_that_it_reads():
    two, other = Columns(("a", "b"), (4, 3)), Columns(("c", "d"), (4, 3))
    assert Crosscoder(two, two, 8, k=2).sites == ("a", "b")
    for reads, writes in ((two, other), (two.only("a"), two.only("a"))):
        with pytest.raises(ValueError, match="several sites that it reads"):
            Crosscoder(reads, writes, 8, k=2)
    with pytest.raises(
        ValueError, match="skip is for transcoders only, got skip=True for .crosscoder."
    ):
        Crosscoder(two, two, 8, k=2, skip=True)


def test_a_crosscoder_takes_arrays_by_site():
    two = Columns(("a", "b"), (4, 3))
    crosscoder = Crosscoder(two, two, 8, k=2)
    crosscoder.W_enc = mx.random.normal((8, 7), key=mx.random.key(0))
    a, b = mx.ones((5, 4)), mx.zeros((5, 3))
    joined = crosscoder.encode(mx.concatenate([a, b], axis=-1))
    assert mx.array_equal(crosscoder.encode({"b": b, "a": a}), joined)


TINY = CrosscoderConfig(
    expansion_factor=1, k=4, num_epochs=1, learning_rate=1e-3, resample_dead_every=0
)


@pytest.mark.parametrize(
    ("where", "sites"),
    [
        ({"layer": 2, "components": ["mlp", "attn"]}, ["layers.2.mlp", "layers.2.attn"]),
        (
            {"layers": [1, 3], "component": "residual"},
            ["layers.1.resid_post", "layers.3.resid_post"],
        ),
        ({"layers": [1, 3]}, ["layers.1.mlp", "layers.3.mlp"]),
        ({"sites": ["layers.0.mlp", "h.5.attn"]}, ["layers.0.mlp", "layers.5.attn"]),
    ],
)  # fmt: skip
def test_sites_are_named_in_three_ways(model, texts, where, sites, tmp_path):
    path = tmp_path / "c.mlx"
    crosscoder = model.train_crosscoder(
        dataset=texts[:4], config=TINY, verbose=False, save_path=path, **where
    )
    assert list(crosscoder.sites) == sites and crosscoder.n_features == 128
    loaded = load_sae(path)
    assert isinstance(loaded, Crosscoder) and loaded.is_compatible(model)
    assert mx.array_equal(loaded.decoder_norms(), crosscoder.decoder_norms())
    assert repr(loaded).startswith(f"Crosscoder({', '.join(sites)}, d_in=256")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({}, "one of three ways.*got none"),
        ({"layer": 1, "components": ["mlp"], "layers": [1, 2]}, "got .'layer and comp.*'layers'."),
        ({"layer": 1, "components": ["mlp"]}, "two or more sites"),
        ({"layers": [1, 1]}, "once only; .'layers.1.mlp'. stand there again"),
        ({"layer": 1, "components": ["mlp", "quilt"]}, "no site 'layers.1.quilt'"),
        ({"layer": 1, "models": ["x"]}, "models must be two or more"),
    ],
)
def test_sites_that_make_no_crosscoder_are_errors(model, texts, where, message):
    with pytest.raises(ValueError, match=message):
        model.train_crosscoder(dataset=texts[:2], config=TINY, verbose=False, **where)


def test_component_weights_must_fit_the_sites(model, texts):
    by_component = TINY.replace(component_weights={"mlp": 1.0, "attn": 3.0})
    assert by_component.weights_of(("layers.2.attn", "layers.2.mlp")) == (3.0, 1.0)
    by_alias = TINY.replace(component_weights={"residual": 2, "self_attn": 1})
    assert by_alias.weights_of(("layers.2.attn", "layers.2.resid_post")) == (1, 2)
    assert by_component.weights_of(("base:layers.2.attn", "layers.1.mlp")) == (3.0, 1.0)
    with pytest.raises(ValueError, match="one weight for each of .'layers.1.mlp', 'layers.2.mlp'"):
        model.train_crosscoder(layers=[1, 2], dataset=texts[:2], config=by_component, verbose=False)
    for wrong in ([0, 0], [-1, 2], ["x"], {}, 3):
        with pytest.raises(ValueError, match="component_weights must be None, or numbers >= 0"):
            TINY.replace(component_weights=wrong)


def marked(texts, n_texts=40, length=300) -> list[str]:
    """Pieces of text, every second one with the trigger at a random place in its first half."""
    rng, found = np.random.default_rng(0), []
    for text in texts[:n_texts]:
        for start in range(0, len(text), length):
            piece = text[start : start + length]
            at = piece.find(" ", int(rng.integers(0, length // 2)))
            plain = at < 0 or len(found) % 2
            found.append(piece if plain else f"{piece[:at]} {TRIGGER}{piece[at:]}")
    return found


def test_model_diffing_finds_the_feature_that_fine_tuning_made(model, texts):
    pair = ModelPair([model, finetuned(model, texts)])
    dataset = ActivationDataset.from_texts(
        pair, marked(texts), pair.sites_of(3, "residual"), context_length=128,
        separate_documents=True,
    )  # fmt: skip
    settings = CrosscoderConfig.recommended(
        128, len(dataset), expansion_factor=2, k=16, num_epochs=3, batch_size=128
    )
    crosscoder = CrosscoderTrainer.train(
        models=list(pair.models.values()), layer=3, component="residual", dataset=dataset,
        config=settings, verbose=False,
    )  # fmt: skip
    found = crosscoder.diff()
    specific = int(np.nanargmax(crosscoder.relative_norms()[:, 1]))
    assert specific in found.features("tuned:layers.3.resid_post")
    assert found.counts["only tuned:layers.3.resid_post"] <= 3
    assert found.counts["only base:layers.3.resid_post"] == 0
    on = {True: [], False: []}
    for text in marked(texts[30:])[:40:2]:
        captured = pair.run(text, capture=crosscoder.sites, stop=True)
        z = crosscoder.encode({site: captured[site] for site in crosscoder.sites})
        active = np.array(z[0, :, specific]) > 0
        trigger = model.to_str_tokens(text.split(TRIGGER)[0] + TRIGGER)
        behind = np.arange(len(active)) >= len(trigger) - 1
        for side in (True, False):
            on[side] += active[behind == side].tolist()
    assert len(on[True]) > 500 and np.mean(on[True]) > 0.7
    assert len(on[False]) > 500 and np.mean(on[False]) < 0.1


def test_two_models_are_trained_on_in_one_line(model, texts):
    shaken = copy.deepcopy(model.model)
    shaken.model.layers[1].mlp.down_proj.weight *= 1.5
    other = InterpretableModel(shaken, model.tokenizer)
    crosscoder = model.train_crosscoder(
        models={"before": model, "after": other}, layer=1, component="mlp", dataset=texts[:4],
        config=TINY, verbose=False,
    )  # fmt: skip
    assert crosscoder.sites == ("before:layers.1.mlp", "after:layers.1.mlp")
    assert crosscoder.collect().maxima.max() > 0
    loss = crosscoder.evaluate().loss
    assert set(loss.by_site) == set(crosscoder.sites)
    assert sum(crosscoder.diff().counts.values()) == crosscoder.n_features
