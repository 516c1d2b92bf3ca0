import shutil

import numpy as np
import pytest

from mlxterp.sae import load_sae
from tests.sae.formats import golden

FORMAT = "qwen_scope"
REPOSITORY = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4"
FILE = f"{REPOSITORY}/layer5.sae.pt"
WITH_CONFIG = "with_config"


@pytest.mark.parametrize(
    ("path", "layer"), [(FILE, 5), (REPOSITORY, 5), (f"{WITH_CONFIG}/layer6.sae.pt", 6)]
)
def test_codes_and_reconstructions_are_those_of_the_judge(path, layer):
    sae = golden.load(FORMAT, path)
    golden.agrees(sae, FORMAT, REPOSITORY)
    assert (sae.site, sae.k) == (f"layers.{layer}.resid_post", 4)
    assert sae.metadata.model == {"name": "Qwen/Qwen3-1.7B-Base"}


def test_the_number_of_active_features_is_at_most_k_and_they_are_positive():
    z = golden.expected(FORMAT, REPOSITORY)["z"]
    assert (z >= 0).all() and 0 < (z > 0).sum(axis=1).min() < 4


def test_of_several_layers_one_has_to_be_named(tmp_path):
    path = golden.copy(FORMAT, WITH_CONFIG, tmp_path)
    shutil.copyfile(path / "layer6.sae.pt", path / "layer7.sae.pt")
    with pytest.raises(ValueError, match=r"must hold one file layer\{n\}.sae.pt, got 2: give the"):
        load_sae(path)
    assert load_sae(path / "layer7.sae.pt").site == "layers.7.resid_post"


def test_without_k_the_file_is_refused(tmp_path):
    path = golden.copy(FORMAT, WITH_CONFIG, tmp_path)
    golden.change_json(path / "config.json", k="many")
    with pytest.raises(ValueError, match="'k' is not known, got 'many'"):
        load_sae(path)
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match="'k' is not known, got None: it is read from config.json"):
        load_sae(path)


@pytest.mark.parametrize("hook", ["mlp_out", None])
def test_another_hook_or_name_needs_a_site(hook, tmp_path):
    path = golden.copy(FORMAT, WITH_CONFIG, tmp_path)
    file = path / "layer6.sae.pt"
    if hook is None:
        file = file.rename(path / "mine.sae.pt")
    else:
        golden.change_json(path / "config.json", hook_point=hook)
    with pytest.raises(ValueError, match="does not say which site it is of: give site="):
        load_sae(file)
    assert load_sae(file, site="layers.6.mlp_out").site == "layers.6.mlp_out"


@pytest.mark.parametrize(
    ("config", "arrays", "message"),
    [
        ({"d_sae": 64}, {}, r"'W_enc' must have shape \(64, 8\), got \(32, 8\)"),
        ({}, {"W_enc": lambda W: W.T}, r"'W_enc' must have shape \(32, 8\), got \(8, 32\)"),
        ({}, {"W_enc": lambda W: W[0]}, "'W_enc' must be a matrix"),
        ({}, {"W_dec": lambda W: W.T}, r"'W_dec' must have shape \(8, 32\)"),
        ({}, {"b_dec": golden.with_nan}, "'b_dec' holds numbers that are not finite"),
        ({}, {"b_enc": None}, "looks like none of the formats"),
        ({"k": 33}, {}, r"k must be in \[1, n_features = 32\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(config, arrays, message, tmp_path):
    path = golden.copy(FORMAT, WITH_CONFIG, tmp_path)
    golden.change_json(path / "config.json", **config)
    if arrays:
        golden.change_arrays(path / "layer6.sae.pt", **arrays)
    with pytest.raises(ValueError, match=message):
        load_sae(path)


def test_the_golden_weights_are_not_square():
    with golden.open_tensors(golden.ROOT / FORMAT / FILE) as file:
        assert np.unique(file.shape("W_enc")).size == 2


def test_the_repository_is_known_in_the_cache_of_the_hub_too(tmp_path):
    source = golden.copy(FORMAT, FILE, tmp_path)
    cache = tmp_path / "models--Qwen--SAE-Res-Qwen3.5-27B-W80K-L0_7" / "snapshots" / "0a1b"
    cache.mkdir(parents=True)
    (cache / "layer3.sae.pt").symlink_to(source)
    sae = load_sae(cache / "layer3.sae.pt")
    assert sae.k == 7 and sae.metadata.model == {"name": "Qwen/Qwen3.5-27B"}
