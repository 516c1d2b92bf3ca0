"""Which files of a repository are fetched, for the layouts that there are on the Hub."""

import pytest

from mlxterp.sae.hub_files import choose

OURS = ["config.json", "encoder.safetensors", "decoder.safetensors", "encoder_bias.safetensors",
        "statistics.json", "metadata.json", "labels.json"]  # fmt: skip
AROUND = ["README.md", ".gitattributes", "training.png", "notes.txt"]
SAELENS = ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]
GEMMA = [f"layer_{i}/width_16k/average_l0_{k}/params.npz" for i in range(3) for k in (12, 105)]
LISTED = [f"trainer_{i}/{name}" for i in range(2) for name in ("ae.pt", "config.json")]


def under(folder: str, names: list[str]) -> set[str]:
    return {f"{folder}/{name}" for name in names}


@pytest.mark.parametrize(
    ("files", "subfolder", "place", "chosen"),
    [
        (OURS + AROUND, None, "", set(OURS)),
        ([f"a/b/{name}" for name in OURS + AROUND], None, "a/b", under("a/b", OURS)),
        ([*OURS, *(f"other/{name}" for name in OURS)], None, "", set(OURS)),
        ([*OURS, *(f"other/{name}" for name in OURS)], "other", "other", under("other", OURS)),
        ([f"{s}/{n}" for s in ("x", "y") for n in SAELENS], "/y/", "y", under("y", SAELENS)),
        (GEMMA, "layer_1/width_16k/average_l0_12", GEMMA[2][:-11], {GEMMA[2]}),
        ([*GEMMA, "layer_7/width_1m/average_l0_9/params.npz"], "layer_7",
         "layer_7/width_1m/average_l0_9", {"layer_7/width_1m/average_l0_9/params.npz"}),
        ([*LISTED, "trainer_1/checkpoints/ae_500.pt", "trainer_1/eval_results.json"], "trainer_1",
         "trainer_1", {"trainer_1/ae.pt", "trainer_1/config.json", "trainer_1/eval_results.json"}),
        (["L0R-8x/hyperparams.json", "L0R-8x/checkpoints/final.safetensors", "L0R-8x/lm.json"],
         None, "L0R-8x", {"L0R-8x/hyperparams.json", "L0R-8x/checkpoints/final.safetensors",
                          "L0R-8x/lm.json"}),
        (["layer_2.safetensors", "layer_12.safetensors", "config.yaml"], "layer_12.safetensors",
         "layer_12.safetensors", {"layer_12.safetensors", "config.yaml"}),
        (["1.pt", "1_cfg.json", "11.pt", "11_cfg.json"], "1.pt", "1.pt", {"1.pt", "1_cfg.json"}),
        (["W_enc_0.safetensors", "W_enc_1.safetensors", "W_dec_0.safetensors",
          "W_dec_1.safetensors", "config.yaml"], None, "",
         {"W_enc_0.safetensors", "W_enc_1.safetensors", "W_dec_0.safetensors",
          "W_dec_1.safetensors", "config.yaml"}),
        (["clt/params_layer_0.safetensors", "clt/params_layer_1.safetensors", "clt/config.json"],
         "clt", "clt", {"clt/params_layer_0.safetensors", "clt/params_layer_1.safetensors",
                        "clt/config.json"}),
        (["llama/model.safetensors", "llama/tokenizer.json", "sae/cfg.json", "sae/sae.safetensors"],
         None, "sae", {"sae/cfg.json", "sae/sae.safetensors"}),
        (["config.json", "model.safetensors"], None, "", {"config.json", "model.safetensors"}),
        (["README.md", "Llama-SAE-l19.pth"], None, "Llama-SAE-l19.pth", {"Llama-SAE-l19.pth"}),
        (["a/x-l19.pt", "b/y-l19.pt"], "b", "b/y-l19.pt", {"b/y-l19.pt"}),
    ],
    ids=["ours", "below", "at the top", "beside the top", "SAELens", "Gemma Scope", "the only one",
         "dictionary_learning", "Llama Scope", "one file", "numbered facts", "cross-layer",
         "a whole folder of files", "beside a language model", "a mixin's",
         "a lone file", "a lone file below"],
)  # fmt: skip
def test_the_files_of_one_coder_are_chosen(files, subfolder, place, chosen):
    found = choose("user/x", files, subfolder, features=False)
    assert (found.place, set(found.files)) == (place, chosen)
    assert len(found.files) == len(chosen)


def test_what_was_collected_comes_where_it_is_asked_for():
    features = ["features/collection.json", "features/codes.safetensors"]
    files = [*OURS, *features, "b/config.json", *(f"b/{name}" for name in features)]
    assert set(choose("user/x", files, None, features=False).files) == set(OURS)
    assert set(choose("user/x", files, None, features=True).files) == {*OURS, *features}


@pytest.mark.parametrize(
    ("files", "subfolder", "message"),
    [
        (GEMMA, None, r"holds 6 coders: name one of them, such as subfolder='layer_0/.*_12'"),
        (GEMMA, "layer_1", "holds 2 coders in 'layer_1'.* There are 'layer_1/width_16k/average_l0_"
                           "12', 'layer_1/width_16k/average_l0_105'."),
        (GEMMA, "layer_1/width_16k/average_l0_13", "no coder in .*; the nearest of 'layer_1/width_"
                                                   "16k/average_l0_12'"),
        (GEMMA, "zzz", "has no coder in subfolder='zzz'; there are 'layer_0/"),
        ([f"layer{i}.sae.pt" for i in range(40)], None,
         r"holds 40 coders: .*'layer9?7?.*\.sae\.pt' and 32 more"),
        (["1.pt", "2.pt"], "3.pt", "no coder in subfolder='3.pt'"),
        (OURS, "other", "no coder in subfolder='other'; there are the top"),
        (["README.md"], None, "holds no coder: it has no arrays of a coder"),
        (["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"], None,
         "holds a language model"),
        (["features/codes.safetensors", "checkpoints/ae_500.pt"], None, "holds no coder"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_said_with_the_names_that_there_are(files, subfolder, message):
    with pytest.raises(ValueError, match=f"^user/x .*{message}|^user/x {message}"):
        choose("user/x", files, subfolder, features=False)
