import mlx.core as mx
import numpy as np
import pytest

import mlxterp.sae
from mlxterp.sae import SAE, ActivationDataset, SAEConfig, SAETrainer, load_sae
from mlxterp.sae.coder import Columns
from tests.fakes import SITE, FakeSource
from tests.sae.runs import Interrupt, differences
from tests.sae.synthetic import planted

CONFIG = SAEConfig(
    expansion_factor=4, k=3, batch_size=32, num_epochs=2, learning_rate=3e-3, log_every=5
)
TEXTS = ["the quick brown fox jumps over the lazy dog " * 3, "pack my box with five dozen jugs"] * 5


def array(n=300) -> np.ndarray:
    return planted(n, n_features=16, width=8, active=2)[1]


def test_the_public_names_are_these():
    names = {
        "SAE", "ActivationDataset", "Callback", "CrossLayerConfig", "CrossLayerTrainer",
        "CrossLayerTranscoder", "Crosscoder", "CrosscoderConfig", "CrosscoderTrainer",
        "EarlyStopping", "JSONLLogger", "ModelPair", "ProgressBar", "SAEConfig", "SAETrainer",
        "StopTraining", "TensorBoardLogger", "TrackioLogger", "TrainingError",
        "Transcoder", "TranscoderConfig", "TranscoderTrainer", "WandbLogger", "load_sae", "splice",
        "Circuit", "find_attribution_graph", "find_behavior_circuit", "find_feature_circuits",
        "compare",
    }  # fmt: skip
    assert set(mlxterp.sae.__all__) == names
    assert all(hasattr(mlxterp.sae, name) for name in names)


def test_an_sae_writes_the_one_site_that_it_reads():
    a, b = Columns(("a",), (4,)), Columns(("b",), (4,))
    assert SAE(a, a, 8, k=2).site == "a"
    with pytest.raises(ValueError, match="one site that it reads"):
        SAE(a, b, 8, k=2)
    with pytest.raises(ValueError, match="one site that it reads"):
        SAE(*[Columns(("a", "b"), (2, 2))] * 2, 8, k=2)


def test_fit_takes_a_plain_array_and_describes_what_it_did():
    sae = SAETrainer(CONFIG).fit(array())
    assert (sae.d_in, sae.n_features, sae.k) == (8, 32, 3)
    assert sae.metadata.config == CONFIG.to_dict()
    assert sae.metadata.data["training_tokens"] == 285
    assert sae.metadata.data["validation_tokens"] == 15
    assert sae.metadata.model == {} and sae.metadata.data["documents"] is None
    assert len(sae.statistics.firing_rates) == 32 and sae.statistics.validation


def test_a_share_of_the_data_is_never_trained_on():
    x = array()
    whole = ActivationDataset.from_activations(x)
    training, held_out = whole.split(0.05, CONFIG.seed)
    changed = x.copy()
    held = np.array(held_out._array())
    rows = [i for i, row in enumerate(x) if (row == held).all(axis=1).any()]
    changed[rows] *= 50
    assert len(rows) == 15
    a, b = SAETrainer(CONFIG).fit(x), SAETrainer(CONFIG).fit(changed)
    assert mx.array_equal(a.W_dec, b.W_dec) and mx.array_equal(a.b_dec, b.b_dec)
    assert a.statistics.validation != b.statistics.validation


def test_without_a_validation_split_nothing_is_held_out():
    sae = SAETrainer(CONFIG.replace(validation_split=0)).fit(array())
    assert sae.metadata.data["training_tokens"] == 300
    assert sae.metadata.data["validation_tokens"] == 0 and sae.statistics.validation == ()


def test_skipped_rows_are_counted_in_the_metadata():
    x = array()
    x[[4, 9], 2] = np.nan
    with pytest.warns(UserWarning, match="2 of 300 activations are not finite"):
        sae = SAETrainer(CONFIG.replace(log_every=100)).fit(x)
    assert sae.metadata.data["skipped_tokens"] == 2
    assert mx.isfinite(sae.W_dec).all().item()


def test_nothing_but_rows_that_are_not_finite_is_an_error():
    with pytest.raises(ValueError, match="None of the 300 activations is finite"):
        SAETrainer(CONFIG).fit(array() * np.nan)


@pytest.mark.parametrize("n", [3, 10, 31])
def test_very_little_data_is_enough_to_run(n):
    sae = SAETrainer(CONFIG).fit(array(n))
    assert sae.W_dec.shape == (32, 8)


def test_a_coder_of_very_little_data_can_be_saved(tmp_path):
    sae = SAETrainer(CONFIG).fit(array(10))
    # The one token held out has no variance to explain.
    fvu = load_sae(sae.save(tmp_path / "s")).statistics.validation[-1]["fvu"]
    assert fvu is None


def test_one_token_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="the same on every token"):
        SAETrainer(CONFIG).fit(array(2))


def test_k_above_the_number_of_features_is_an_error():
    with pytest.raises(ValueError, match="k must be at most the number of features, 32"):
        SAETrainer(CONFIG.replace(k=33)).fit(array())


@pytest.mark.parametrize("trainer", [SAETrainer, SAETrainer()])
def test_train_works_on_the_class_and_on_an_instance(trainer, tmp_path):
    sae = trainer.train(
        model=FakeSource(width=8), layer=0, component="mlp", dataset=TEXTS, config=CONFIG,
        validation_split=0.2, save_path=tmp_path / "sae.mlx", verbose=False,
    )  # fmt: skip
    assert sae.site == SITE and sae.metadata.config["validation_split"] == 0.2
    assert sae.metadata.model["name"] == "fake" and sae.metadata.model["fingerprint"] == "f00d"
    assert sae.metadata.data["documents"] == 10
    total = sum(map(len, TEXTS))
    data = sae.metadata.data
    assert data["training_tokens"] + data["validation_tokens"] == total
    assert mx.array_equal(load_sae(tmp_path / "sae.mlx").W_enc, sae.W_enc)


def test_a_trainers_own_config_and_callbacks_are_used():
    sae = SAETrainer(CONFIG.replace(k=5)).train(FakeSource(), 0, dataset=TEXTS, verbose=False)
    assert sae.k == 5


def test_without_a_config_the_recipe_is_chosen_for_the_data():
    sae = SAETrainer.train(FakeSource(), 0, dataset=TEXTS[:2], verbose=False)
    tokens = sum(map(len, TEXTS[:2]))
    assert sae.metadata.config == SAEConfig.recommended(6, tokens).to_dict()


def test_a_site_may_be_given_by_its_whole_name():
    sae = SAETrainer.train(FakeSource(), SITE, dataset=TEXTS, config=CONFIG, verbose=False)
    assert sae.site == SITE


def test_the_progress_bar_belongs_to_verbose(capsys):
    SAETrainer.train(FakeSource(), 0, dataset=TEXTS, config=CONFIG, verbose=False)
    assert capsys.readouterr() == ("", "")
    SAETrainer.train(FakeSource(), 0, dataset=TEXTS, config=CONFIG)
    assert "training" in capsys.readouterr().err


def test_bad_data_and_sites_are_errors(model):
    train = SAETrainer.train
    with pytest.raises(ValueError, match="dataset is empty"):
        train(FakeSource(), 0, dataset=[], verbose=False)
    with pytest.raises(ValueError, match="dataset is empty"):
        train(FakeSource(), 0, verbose=False)
    with pytest.raises(ValueError, match="put it in a list"):
        train(FakeSource(), 0, dataset="some text", verbose=False)
    with pytest.raises(ValueError, match="no site"):
        train(FakeSource(), 7, dataset=TEXTS, verbose=False)
    with pytest.raises(ValueError, match="layers.6.mlp"):
        train(model, 6, dataset=TEXTS, verbose=False)
    other = ActivationDataset.from_activations({"elsewhere": array()})
    with pytest.raises(ValueError, match="the SAE needs layers.0.mlp"):
        train(FakeSource(), 0, dataset=other, verbose=False)


def test_a_run_interrupted_in_train_resumes_to_the_same_coder(tmp_path):
    def train(*arguments, **options):
        return SAETrainer(CONFIG, *arguments).train(
            FakeSource(), 0, dataset=TEXTS, verbose=False, **options
        )

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [Interrupt(7)])
    assert not differences(train(tmp_path, resume=True), train())


@pytest.mark.parametrize(
    ("name", "fvu"),
    [("topk", 0.3), ("batch_topk", 0.3), ("abs_topk", 0.3), ("relu", 0.3), ("gated", 0.3),
     ("jumprelu", 1.0)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*(L0 is|features are dead|FVU)")
def test_every_activation_function_trains_is_saved_and_resumed(name, fvu, tmp_path):
    config = CONFIG.replace(
        activation_function=name, num_epochs=4, learning_rate=1e-2, validate_every=20
    )
    x = array(600)
    sae = SAETrainer(config).fit(x)
    first, last = sae.statistics.validation[0], sae.statistics.validation[-1]
    assert last["fvu"] < fvu and (name == "jumprelu" or last["fvu"] < first["fvu"])
    assert sae.activation_name == name and sae.metadata.config == config.to_dict()

    loaded, z = load_sae(sae.save(tmp_path / "sae.mlx")), sae.encode(x)
    assert 0 < (z != 0).sum().item() < z.size
    assert mx.array_equal(loaded.encode(x), z) and mx.array_equal(loaded(x), sae(x))

    with pytest.raises(KeyboardInterrupt):
        SAETrainer(config, tmp_path / "run", [Interrupt(33)]).fit(x)
    resumed = SAETrainer(config, tmp_path / "run").fit(x, resume=True)
    assert not differences(resumed, sae)


GRID = {
    "small": CONFIG,
    "wide": CONFIG.replace(expansion_factor=8, k=5),
    "batch": CONFIG.replace(activation_function="batch_topk"),
}


def test_many_coders_are_trained_in_one_pass_over_the_data():
    dataset = ActivationDataset.from_activations(array())
    passes = 0
    batches = ActivationDataset.batches

    def counted(self, *arguments, drop_last=False, **options):
        nonlocal passes
        passes += drop_last
        return batches(self, *arguments, drop_last=drop_last, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActivationDataset, "batches", counted)
        saes = SAETrainer().fit_many(dataset, GRID)
    assert passes == CONFIG.num_epochs and list(saes) == list(GRID)
    assert [sae.n_features for sae in saes.values()] == [32, 64, 32]
    for name, sae in saes.items():
        alone = SAETrainer(GRID[name]).fit(array())
        assert not differences(sae, alone) and sae.metadata == alone.metadata
        assert sae.statistics.validation == alone.statistics.validation
        np.testing.assert_array_equal(sae.statistics.firing_rates, alone.statistics.firing_rates)


def test_many_coders_of_several_sites_remember_theirs_and_are_resumed(tmp_path):
    data = {"a": array(), "b": 2 * array()[:, :6] + 1}
    sites, configs = {"one": "a", "two": "b"}, {"one": CONFIG, "two": CONFIG.replace(k=4)}
    expected = SAETrainer().fit_many(_dataset(data), configs, sites=sites)
    assert [(sae.site, sae.d_in) for sae in expected.values()] == [("a", 8), ("b", 6)]
    with pytest.raises(KeyboardInterrupt):
        SAETrainer(checkpoint_dir=tmp_path).fit_many(
            _dataset(data), configs, sites=sites, callbacks={"two": [Interrupt(7)]}
        )
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    found = SAETrainer(checkpoint_dir=tmp_path).fit_many(
        _dataset(data), configs, resume=True, sites=sites
    )
    for name in configs:
        assert not differences(found[name], expected[name])
        assert found[name].metadata == expected[name].metadata


@pytest.mark.parametrize(
    ("names", "sites", "message"),
    [
        ((), None, "configs must hold at least one"),
        (("../k",), None, "must be one of a directory, got '../k'"),
        (("",), None, "must be one of a directory, got ''"),
        (("a", "b"), {"a": "x"}, r"sites must name the site of every SAE; missing: \['b'\]"),
    ],
)
def test_names_and_sites_of_many_coders_are_checked(names, sites, message):
    with pytest.raises(ValueError, match=message):
        SAETrainer().fit_many(array(), dict.fromkeys(names, CONFIG), sites=sites)


def test_many_coders_do_not_share_a_callback():
    with pytest.raises(ValueError, match="give callbacks={name"):
        SAETrainer(callbacks=[Interrupt(1)]).fit_many(array(), {"a": CONFIG, "b": CONFIG})


def test_sites_of_a_model_are_trained_from_one_pass():
    model = FakeSource(width=8)
    texts = ["".join(np.random.default_rng(i).choice(list("abcdefgh "), 60)) for i in range(20)]
    configs = {"small": CONFIG.replace(k=2), "large": CONFIG.replace(k=4)}
    calls = []
    run = model.run
    model.run = lambda *a, **options: calls.append(options["capture"]) or run(*a, **options)
    found = SAETrainer.train_many(model, [SITE], None, texts, configs, verbose=False)
    assert list(found) == [f"{SITE} small", f"{SITE} large"] and set(calls) == {(SITE,)}
    alone = SAETrainer.train(model, SITE, None, texts, configs["large"], verbose=False)
    assert not differences(found[f"{SITE} large"], alone)
    one = SAETrainer.train_many(model, [SITE], None, texts, configs["small"], verbose=False)
    assert list(one) == [SITE] and not differences(one[SITE], found[f"{SITE} small"])


def _dataset(arrays) -> ActivationDataset:
    return ActivationDataset.from_activations(arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 64}, "batch_size must be the same.*'a': 32, 'b': 64"),
        ({"num_epochs": 3}, "num_epochs must be the same"),
        ({"seed": 7}, "seed must be the same"),
        ({"validation_split": 0}, "validation_split must be the same.*'a': 0.05, 'b': 0"),
        ({"k": 33}, "k must be at most the number of features, 32"),
    ],
)
def test_many_configs_that_do_not_go_together_are_refused(change, message):
    configs = {"a": CONFIG, "b": CONFIG.replace(**change)}
    with pytest.raises(ValueError, match=message):
        SAETrainer().fit_many(array(), configs)


def test_many_coders_of_a_dataset_of_several_sites_need_theirs_named():
    data = _dataset({"a": array(), "b": array()})
    with pytest.raises(ValueError, match="one site that it reads"):
        SAETrainer().fit_many(data, {"one": CONFIG})
    with pytest.raises(ValueError, match=r"\['c'\] are missing; there are \['a', 'b'\]"):
        SAETrainer().fit_many(data, {"one": CONFIG}, sites={"one": "c"})


def test_the_trained_coder_of_the_bundled_model_is_good(sae):
    report = sae.evaluate()
    assert report.fvu < 0.35 and report.l0 <= 8
    assert report.loss.recovered.value > 0.7
    assert report.fvu == pytest.approx(sae.statistics.validation[-1]["fvu"], rel=1e-3)


def test_an_evaluation_on_other_texts_needs_the_texts(sae, model, texts, tmp_path):
    loaded = load_sae(sae.save(tmp_path / "s.mlx"))
    with pytest.raises(ValueError, match="pass dataset="):
        loaded.evaluate(model=model)
    assert loaded.evaluate(model, texts[:3]).fvu < 0.5


def test_a_coder_is_compatible_with_its_model_and_site(sae, model):
    compatible = sae.is_compatible(model, layer=2, component="residual")
    assert compatible and repr(compatible) == "compatible"
    assert sae.is_compatible(model)
    assert sae.is_compatible(model, "layers.2.resid_post")


def test_every_reason_against_compatibility_is_given(sae, model):
    other_site = sae.is_compatible(model, layer=3, component="residual")
    assert not other_site
    assert other_site.reasons == ("it is of layers.2.resid_post, not of layers.3.resid_post",)
    assert not sae.is_compatible(model, layer=2)
    assert "layers.99" in sae.is_compatible(model, layer=99).reasons[0]

    fake = FakeSource()
    missing, depth, other_weights = sae.is_compatible(fake).reasons
    assert "no site 'layers.2.resid_post'" in missing
    assert depth == "the model has layers: 1, the one that it was trained on: 6"
    assert other_weights == "it was trained on other weights (demo)"
    narrow = SAE(*[Columns((SITE,), (5,))] * 2, 10, k=2)
    assert narrow.is_compatible(fake).reasons == (
        "layers.0.mlp has width 6 in the model, 5 in the coder",
    )
    assert repr(narrow.is_compatible(fake)).startswith("not compatible: layers.0.mlp has width 6")


def test_repr_says_what_the_coder_is(sae):
    assert repr(sae) == "SAE(layers.2.resid_post, d_in=128, n_features=512, topk, k=8)"


def test_origin_and_data_are_no_parameters_of_the_module(sae):
    assert set(sae.parameters()) == {"W_enc", "b_enc", "W_dec", "b_dec", "activation_function"}


def test_a_path_where_something_else_is_is_refused_before_the_training(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="it is not overwritten"):
        SAETrainer.train(FakeSource(), 0, dataset=iter(()), save_path=tmp_path, verbose=False)


def test_arrays_of_a_named_site_train_a_coder_that_knows_its_model():
    data = ActivationDataset.from_activations(array(), site=SITE)
    sae = SAETrainer.train(FakeSource(width=8), 0, dataset=data, config=CONFIG, verbose=False)
    assert sae.metadata.model["fingerprint"] == "f00d"
    assert sae.find_top_features("abc")
    assert sae.evaluate().loss is None
    with pytest.raises(
        ValueError, match=r"needs layers.0.mlp \(width 6\).*from_activations\(\{site: array\}\)"
    ):
        SAETrainer.train(FakeSource(width=6), 0, dataset=data, config=CONFIG, verbose=False)


def test_a_component_without_a_layer_is_not_passed_over(sae, model):
    with pytest.raises(ValueError, match="component='attn' says nothing without layer"):
        sae.is_compatible(model, component="attn")


def test_a_dataset_of_another_model_is_refused():
    dataset = ActivationDataset.from_texts(FakeSource(), TEXTS, SITE, context_length=8)
    with pytest.raises(ValueError, match="another model"):
        SAETrainer.train(FakeSource(), SITE, dataset=dataset, config=CONFIG, verbose=False)


def test_a_site_that_is_not_one_vector_per_token_is_refused(demo):
    dataset = ActivationDataset.from_texts(demo, TEXTS, "layers.2.self_attn.rope")
    with pytest.raises(ValueError, match=r"rope must be one vector per token.*\[2, 2, 256, 32\]"):
        next(dataset.batches(8))
