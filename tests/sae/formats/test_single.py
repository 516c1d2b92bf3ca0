import json

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import load_sae
from mlxterp.sae.formats import single
from mlxterp.sae.formats.reading import FORMATS, recognised
from tests.sae.formats import golden

GOLDEN = {
    "dictionary_learning": "BatchTopKSAE/trainer_0",
    "gemma_scope": "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_71",
    "llama_scope": "Llama3_1-8B-Base-L15R-8x",
    "openai": "resid_post_mlp_v5_32k/autoencoders/8.pt",
    "qwen_scope": "with_config/layer6.sae.pt",
    "goodfire": "Llama-3.1-8B-Instruct-SAE-l19.pth",
    "hook_z": "gpt2-small_L1_Hcat_z.pt",
}


@pytest.mark.parametrize("format", GOLDEN)
def test_a_file_is_recognised_by_its_own_format_only(format):
    path = golden.ROOT / format / GOLDEN[format]
    found = [module.NAME for module in FORMATS if module.recognise(path)]
    assert found == [format.replace("hook_z", "connor_rob_hook_z")]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b'{"d_in": [', b"\xff" * 100])
def test_nothing_is_recognised_in_damaged_files_and_nothing_raised(content, tmp_path):
    for format, name in GOLDEN.items():
        path = golden.copy(format, name, tmp_path / format)
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file() and file.suffix != ".json":
                file.write_bytes(content)
        assert recognised(path) is None
    assert recognised(tmp_path / "nowhere") is None and recognised(tmp_path) is None
    for name in ("cfg.json", "config.json", "hyperparams.json", "params.npz", "ae.pt"):
        (tmp_path / name).write_bytes(content)
    assert recognised(tmp_path) is None


def test_a_bias_that_is_subtracted_is_folded_to_the_last_bits_of_float32(monkeypatch):
    monkeypatch.setattr(single, "ROWS", 7)
    rng = np.random.default_rng(0)
    W, b = rng.normal(size=(30, 500)).astype(np.float32), rng.normal(size=30).astype(np.float32)
    bias = (1000 * rng.normal(size=500)).astype(np.float32)
    found = np.array(single.centred(mx.array(W), mx.array(b), mx.array(bias)))
    wanted = b.astype(np.float64) - W.astype(np.float64) @ bias.astype(np.float64)
    assert np.array_equal(found, wanted.astype(np.float32))


def test_sites_of_a_transcoder():
    assert single.two_sites("a.1 -> b.2") == single.two_sites("a.1->b.2") == ("a.1", "b.2")
    for site in ("a", "a ->", "-> b", ""):
        with pytest.raises(ValueError, match=r"site must name both sites .* got '"):
            single.two_sites(site)


def test_facts_are_plain_values_without_what_is_unknown():
    facts = single.plain({"a": 1, "b": None, "c": {"d": (1, 2)}, "e": np.float32(2)})
    assert facts == {"a": 1, "c": {"d": [1, 2]}, "e": "2.0"} and json.dumps(facts)


CONFIGS = [
    ("dictionary_learning", "BatchTopKSAE/trainer_0", "config.json"),
    ("gemma_scope", "gemma-scope-2-270m-pt/transcoder/layer_5_width_16k_l0_big", "config.json"),
    ("gemma_scope", "gemma-scope-2-270m-pt/clt/width_262k_l0_big", "config.json"),
    ("llama_scope", "Llama3_1-8B-Base-L15R-8x", "hyperparams.json"),
    ("llama_scope", "R1-Distill/L15R", "config.json"),
    ("qwen_scope", "with_config", "config.json"),
]


VALUES = ("x", -1, [], 0.5, True, {}, ["y"], {"in": []})


@pytest.mark.parametrize("first", [0, 3, 6])
@pytest.mark.parametrize(("format", "name", "config"), CONFIGS)
def test_whatever_a_configuration_says_is_read_or_refused(format, name, config, first, tmp_path):
    path = golden.copy(format, name, tmp_path)
    before = (path / config).read_text()
    content = json.loads(before)
    for i, key in enumerate(content.get("trainer", content), start=first):
        golden.change_json(path / config, **{key: VALUES[i % len(VALUES)]})
        for site in (None, "layers.1.mlp_in -> layers.1.mlp_out"):
            try:
                coder = load_sae(path, site=site, format=format)
            except ValueError as error:
                assert str(error)
            else:
                json.dumps(coder.metadata.to_dict(), allow_nan=False)
                assert all(isinstance(name, str) for name in coder.metadata.model.values())
        (path / config).write_text(before)
