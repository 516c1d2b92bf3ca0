import pytest

from mlxterp.sae import load_sae
from tests.sae.formats import golden

FILE = "gpt2-small_L1_Hcat_z.pt"
CONFIG = "gpt2-small_L1_Hcat_z_cfg.json"


def changed(folder, config: dict | None = None, **arrays):
    """A copy of weights and configuration, with changes."""
    golden.change_json(golden.copy("hook_z", CONFIG, folder), **(config or {}))
    file = golden.copy("hook_z", FILE, folder)
    if arrays:
        golden.change_arrays(file, **arrays)
    return file


def test_codes_and_reconstructions_are_those_of_the_judge():
    sae = load_sae(golden.ROOT / "hook_z" / FILE)
    golden.agrees(sae, "hook_z", "hook_z")
    assert sae.metadata.source["format"] == "connor_rob_hook_z"
    assert sae.site == "layers.1.attn_z" and sae.metadata.model == {"name": "gpt2-small"}


def test_without_hook_the_site_has_to_be_given(tmp_path):
    file = changed(tmp_path, {"act_name": None})
    with pytest.raises(ValueError, match="_cfg.json does not say .* give site='layers.8.attn_z'"):
        load_sae(file)
    assert load_sae(file, site="layers.2.attn_z").site == "layers.2.attn_z"


@pytest.mark.parametrize(
    ("config", "arrays", "message"),
    [
        ({"dict_size": 64}, {}, r"'W_enc' must have shape \(8, 64\), got \(8, 32\)"),
        ({"dict_size": None}, {}, "has no key 'dict_size'"),
        ({"act_name": "blocks.1.attn.hook_k"}, {}, "No site of ours is the hook"),
        ({}, {"W_dec": lambda W: W.T}, r"'W_dec' must have shape \(32, 8\)"),
        ({}, {"b_enc": golden.with_nan}, "'b_enc' holds numbers that are not finite"),
        ({"act_size": None}, {}, "looks like none of the formats"),
        ({}, {"b_dec": None}, "looks like none of the formats"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(config, arrays, message, tmp_path):
    file = changed(tmp_path, config, **arrays)
    with pytest.raises(ValueError, match=message):
        load_sae(file)
