"""What the trainers of all kinds share: what they make of data, configs and places to save to."""

import mlx.core as mx
import numpy as np
import pytest

import mlxterp
from mlxterp.sae import (
    ActivationDataset,
    CrosscoderTrainer,
    CrossLayerTrainer,
    SAEConfig,
    SAETrainer,
    TranscoderTrainer,
    load_sae,
)
from mlxterp.sae.evals.fidelity import fidelity
from mlxterp.sae.fitting import columns_of
from tests.sae import kinds
from tests.sae.runs import Interrupt, differences, fit

CONFIG = SAEConfig(
    expansion_factor=4, k=3, learning_rate=1e-2, batch_size=32, num_epochs=4, warmup_steps=0,
    validation_split=0.1, log_every=100, resample_dead_every=0,
)  # fmt: skip
# On the bundled model, what comes before the dataset.
TRAIN = {
    "sae": (SAETrainer, {"layer": 2, "component": "mlp"}),
    "transcoder": (TranscoderTrainer, {"from_layer": 2, "to_layer": 3}),
    "crosscoder": (CrosscoderTrainer, {"layer": 2, "components": ["mlp", "attn"]}),
    "cross-layer transcoder": (CrossLayerTrainer, {"layers": [1, 2]}),
}
SMALL = CONFIG.replace(expansion_factor=0.5, k=4, num_epochs=1, learning_rate=3e-3)


def config_of(kind: str, name: str = "topk", **options) -> SAEConfig:
    return CONFIG.replace(activation_function=name, **kinds.settings(kind), **options)


def train(kind: str, model, dataset, config=SMALL, **options):
    trainer, arguments = TRAIN[kind]
    if config is not None:
        config = config.replace(**kinds.settings(kind))
    return trainer.train(
        model=model, **arguments, dataset=dataset, config=config, verbose=False, **options
    )


@pytest.fixture(scope="module")
def few(texts) -> list[str]:
    return texts[:2]


@pytest.mark.parametrize(("kind", "name"), kinds.PAIRS)
def test_a_coder_of_raw_activations_is_as_good_as_the_run_said(kind, name):
    rows = kinds.activations(600) + 50  # far from the origin
    coder = kinds.fit(kind, rows, config_of(kind, name, batch_size=64, num_epochs=8, log_every=9))
    dataset = ActivationDataset.from_activations(kinds.of_sites(rows))
    _, held_out = dataset.split(CONFIG.validation_split, CONFIG.seed)
    measured = fidelity(coder, held_out).fvu
    assert coder.statistics.validation[-1]["fvu"] == pytest.approx(measured, rel=1e-5)
    # By hand, on all activations, as they are; the run measured those that it had normalised.
    named = {name: np.array(part, np.float64) for name, part in kinds.of_sites(rows).items()}
    y_hat = np.array(coder({name: mx.array(part) for name, part in named.items()}), np.float64)
    found = {}
    for site, part in coder.writes.slices.items():
        y = named[site]
        found[site] = ((y - y_hat[:, part]) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum()
    fvu = np.mean(list(found.values()))
    assert fvu == pytest.approx(coder.statistics.training[-1]["fvu"], rel=0.3) and fvu < 0.8


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_coders_know_data_config_and_firing_rates(kind):
    config = config_of(kind)
    coder = kinds.fit(kind, kinds.activations(400), config)
    data = coder.metadata.data
    assert (data["training_tokens"], data["validation_tokens"]) == (360, 40)
    assert coder.metadata.config == config.to_dict() and coder.metadata.model == {}
    assert coder.statistics.firing_rates.shape == (coder.n_features,)
    # The features of each block share what is active.
    l0 = coder.statistics.firing_rates.sum() / len(coder.blocks)
    assert 2 < l0 <= 3
    assert [report["step"] for report in coder.statistics.validation][-1] == 4 * (360 // 32)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_recommended_recipe_is_that_of_the_kind(kind):
    of_kind, reads, _, _ = kinds.KINDS[kind]
    trainer = kinds.TRAINERS[of_kind]()
    columns = kinds.SITES.those(reads)
    config = trainer.recommended(columns, 10_000)
    assert type(config) is trainer.config_type
    assert config == type(config).recommended(round(columns.width / len(reads)), 10_000)
    assert config.expansion_factor == type(config).expansion_factor
    assert trainer.recommended(columns, 10_000, k=2, skip=True).replace(skip=False).k == 2
    coder = kinds.untrained(kind, config.replace(**kinds.settings(kind)))
    width = round(columns.width / len(reads))
    assert coder.n_features == len(coder.blocks) * round(config.expansion_factor * width)


@pytest.mark.parametrize("kind", TRAIN)
def test_without_a_config_the_recommended_one_is_taken(kind):
    coder = kinds.fit(kind, kinds.activations(300), None)
    trainer = kinds.TRAINERS[type(coder)]()
    expected = trainer.recommended(coder.reads, 300)
    assert coder.metadata.config == expected.to_dict()
    assert expected.activation_function == coder.activation_name == "batch_topk"


@pytest.mark.parametrize("kind", TRAIN)
def test_a_coder_of_a_model_remembers_model_and_data_and_is_saved(kind, model, few, tmp_path):
    path = tmp_path / "coder.mlx"
    coder = train(kind, model, few, save_path=path, validation_split=0.3)
    assert coder.metadata.model["fingerprint"] == model.fingerprint
    assert coder.metadata.config["validation_split"] == 0.3
    assert coder.metadata.data["documents"] == 2
    assert coder.is_compatible(model)
    assert len(coder.find_top_features("def f(x):", top_k=3)) == 3
    loaded = load_sae(path)
    assert type(loaded) is type(coder) and not differences(loaded, coder)
    assert loaded.metadata == coder.metadata


@pytest.mark.parametrize("kind", TRAIN)
def test_settings_given_to_train_take_the_place_of_the_config(kind, model, few):
    coder = train(kind, model, few, validation_split=0)
    assert coder.metadata.data["validation_tokens"] == 0 and coder.statistics.validation == ()


@pytest.mark.parametrize("kind", TRAIN)
def test_a_config_that_is_none_of_ours_is_refused_before_anything_is_harvested(kind, model):
    trainer, sites = TRAIN[kind]
    refused = r"config must be a \w+Config, such as \w+Config\(k=32\), got {'k': 3}"
    with pytest.raises(ValueError, match=refused):
        trainer({"k": 3})
    with pytest.raises(ValueError, match=refused):
        trainer.train(model=model, **sites, dataset=None, config={"k": 3})


@pytest.mark.parametrize("kind", TRAIN)
def test_a_dataset_without_one_of_the_sites_is_refused(kind, model, few):
    dataset = ActivationDataset.from_texts(model, few, [0, "layers.1.mlp_in"])
    with pytest.raises(ValueError) as error:
        train(kind, model, dataset)
    name = kinds.KINDS[kind][0].__name__
    message = "dataset holds layers.0.mlp (width 128), layers.1.mlp_in (width 128), the "
    assert str(error.value).startswith(f"{message}{name} needs layers.")


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_further_sites_of_a_dataset_change_nothing(kind):
    config, rows = config_of(kind), kinds.of_sites(kinds.activations(200))
    whole = ActivationDataset.from_activations(rows)
    _, reads, writes, _ = kinds.KINDS[kind]
    own = {name: rows[name] for name in reversed(rows) if name in reads + writes}
    coder, expected = (fit((data, None), config, kind=kind)[0] for data in (
        whole, ActivationDataset.from_activations(own)
    ))  # fmt: skip
    assert not differences(coder, expected)


@pytest.mark.parametrize("kind", TRAIN)
def test_a_place_where_something_else_is_is_refused_before_anything_is_trained(
    kind, model, tmp_path
):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="it is not overwritten"):
        train(kind, model, ["never read"], save_path=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("kind", TRAIN)
def test_a_dataset_of_another_model_is_refused(kind, model, few):
    other = mlxterp.InterpretableModel(model.model, model.tokenizer)
    dataset = ActivationDataset.from_texts(other, few, ["layers.2.mlp", "layers.3.mlp"])
    with pytest.raises(ValueError, match="made with another model"):
        train(kind, model, dataset)


def test_one_site_twice_is_refused(model):
    with pytest.raises(ValueError, match=r"once only; \['layers.2.mlp'\] stand there again"):
        columns_of(model, ["layers.2.mlp", "layers.3.mlp", "layers.2.mlp"])


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_trainer_resumes_a_run_to_the_same_coder(kind, tmp_path):
    config, rows = config_of(kind, num_epochs=2), kinds.activations(200)
    with pytest.raises(KeyboardInterrupt):
        kinds.fit(kind, rows, config, tmp_path, callbacks=[Interrupt(7)])
    found = kinds.fit(kind, rows, config, tmp_path, resume=True)
    assert not differences(found, kinds.fit(kind, rows, config))
