"""Paths that are known are found, and all paths together are the whole effect."""

import numpy as np
import pytest

from mlxterp.analysis.patching import activation_patching
from mlxterp.analysis.path_patching import path_patching
from mlxterp.model import InterpretableModel
from mlxterp.sae.testbeds import induction, planted_circuit
from tests.tiny_models import MODEL_TYPES, build

A, B = [1, 2, 3, 4, 5, 6], [9, 2, 8, 4, 5, 6]
DIFFERENCE = {"metric": "logit_diff", "answers": (3, 5)}
# Blocks that do not add one attention and one MLP to one stream.
NOT_ADDED = {
    "falcon_h1", "gemma3n", "gemma4", "gemma4_text", "granitemoehybrid", "longcat_flash", "rwkv7",
    "talkie",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"))


@pytest.mark.parametrize("model_type", sorted({*MODEL_TYPES} - NOT_ADDED - {"nanbeige"}))
def test_all_that_is_added_together_is_the_whole_stream(model_type):
    model = InterpretableModel(build(model_type))
    blocks = enumerate(model.architecture.survey().blocks)
    parts = [
        f"layers.{n}.{name}" for n, b in blocks for name in ("attn", "mlp") if getattr(b, name)
    ]
    everything = ["layers.0.resid_pre", *parts]
    found = path_patching(model, A, B, [everything, everything[:-1]], **DIFFERENCE)
    assert found.recovered[0] == pytest.approx(100, abs=0.02)
    assert found.recovered[1] != pytest.approx(100, abs=0.02)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("longcat_flash", "adds more to the stream"), ("nanbeige", "goes through it 2 times")],
)
def test_what_cannot_be_held_is_an_error(model_type, reason):
    with pytest.raises(ValueError, match=f"paths through layer 0 of .* cannot be held: .*{reason}"):
        path_patching(InterpretableModel(build(model_type)), A, B, "mlps", **DIFFERENCE)


@pytest.fixture(scope="module")
def known():
    """The corrupted text lacks the first occurrence of the last token."""
    bed = induction()
    model = InterpretableModel(bed.model, bed.tokenizer)

    def recovered(senders, receivers="logits", **options):
        return path_patching(
            model, [0, 1, 2, 3, 4, 1], [0, 5, 2, 3, 4, 1], senders, receivers,
            answers=(2, 3), **options,
        ).recovered.tolist()  # fmt: skip

    return recovered


def test_the_paths_of_an_induction_circuit(known):
    """The head of layer 0 tells its MLP which token was before, and the MLP tells the keys."""
    assert known(["layers.0.mlp"], (1, 0, "k")) == pytest.approx([100], abs=0.1)
    assert known([(0, 0)], "layers.0.mlp") == pytest.approx([100], abs=0.1)
    for sender, receiver in [
        ("layers.0.mlp", (1, 0, "q")), ("layers.0.mlp", (1, 0, "v")), ((0, 0), (1, 0, "k")),
        ((0, 0), (1, 0, "v")), ("layers.0.resid_pre", (1, 0, "k")), ((0, 0), "logits"),
        ("layers.0.mlp", "logits"),
    ]:  # fmt: skip
        assert known([sender], receiver) == pytest.approx([0], abs=0.1)
    assert known([(1, 0)], "layers.1.mlp") == pytest.approx([100], abs=0.1)
    assert known(["layers.1.mlp"]) == pytest.approx([100], abs=0.1)


def test_with_mlps_free_the_path_goes_through_them(known):
    assert known([(0, 0)], (1, 0, "k"), freeze=["attn"]) == pytest.approx([100], abs=0.1)
    assert known([(1, 0)], freeze=["attn"]) == pytest.approx([100], abs=0.1)
    assert known([(0, 0)], freeze=["attn"]) == pytest.approx([0], abs=0.1)
    assert known([(0, 0)], freeze=()) == pytest.approx([100], abs=0.1)


def test_positions_of_the_sender(known):
    assert known(["layers.0.mlp"], (1, 0, "k"), positions="each")[0] == pytest.approx(
        [0, 0, 100, 0, 0, 0], abs=0.1
    )


def test_heads_and_mlps_as_senders_end_where_no_receiver_follows(known):
    ((first, second),) = np.array(known("heads", (1, 0, "k"))).T.tolist()
    assert first == pytest.approx(0, abs=0.1) and np.isnan(second)
    first, second = known("mlps", "layers.1.mlp")
    assert first == pytest.approx(0, abs=0.1) and np.isnan(second)
    assert known([["layers.0.mlp", (1, 0)]], (1, 0, "k")) == pytest.approx([100], abs=0.1)
    with pytest.raises(ValueError, match="receivers must come after senders"):
        known([(1, 0)], (1, 0, "q"))


@pytest.fixture(scope="module")
def linear():
    rng = np.random.default_rng(0)
    circuit = planted_circuit(
        rng.integers(1, 3, (6, 3)), rng.integers(0, 3, (3, 3, 3)) / 4, None,
        rng.integers(0, 2, (3, 3, 3)),
    )  # fmt: skip
    return InterpretableModel(circuit.model, circuit.tokenizer)


@pytest.mark.parametrize(
    ("sender", "layer"), [("layers.0.resid_pre", -1), ((0, 0), 0), ("layers.0.mlp", 0), ((1, 0), 1)]
)
def test_where_all_is_linear_the_paths_add_up_to_the_whole(linear, sender, layer):
    """Of a sender: straight to the logits, and through all that comes after it."""
    pair = ([0, 1, 2, 3], [4, 1, 5, 3])
    options = {"metric": "logit_diff", "answers": (0, 1)}
    receivers = ["logits", *((n, 0, "v") for n in range(layer + 1, 3))]
    receivers += [f"layers.{n}.mlp" for n in range(layer + 1 - (sender == (layer, 0)), 3)]
    parts = [path_patching(linear, *pair, [sender], r, **options).recovered[0] for r in receivers]
    whole = path_patching(linear, *pair, [sender], freeze=(), **options).recovered[0]
    assert sum(parts) == pytest.approx(whole, abs=0.1)
    assert sum(abs(part) > 1 for part in parts) > 1
    queries = [(n, 0, part) for n in range(layer + 1, 3) for part in "qk"]
    assert path_patching(linear, *pair, [sender], queries, **options).recovered[0] == pytest.approx(
        0, abs=0.1
    )


def test_nothing_held_is_activation_patching(model):
    free = path_patching(model, A, B, "heads", freeze=(), **DIFFERENCE)
    plain = activation_patching(model, A, B, "attn", heads="each", **DIFFERENCE)
    np.testing.assert_allclose(free.recovered, plain.recovered, atol=0.02)
    mlps = path_patching(model, A, B, "mlps", freeze=(), positions="each", **DIFFERENCE)
    plain = activation_patching(model, A, B, "mlp", positions="each", **DIFFERENCE)
    np.testing.assert_allclose(mlps.recovered, plain.recovered, atol=0.02)


@pytest.mark.parametrize(
    "model_type", ["llama", "phi", "qwen3", "gpt_oss", "gemma3_text", "mixtral"]
)
def test_queries_keys_and_values_of_all_heads_are_what_attention_returns(model_type):
    """With keys and values that heads share, too."""
    model = InterpretableModel(build(model_type))
    every = [(1, head, part) for head in range(4) for part in "qkv"]
    found = path_patching(model, A, B, ["layers.0.resid_pre"], every, freeze=(), **DIFFERENCE)
    plain = activation_patching(model, A, B, "attn", layers=[1], **DIFFERENCE)
    assert found.recovered[0] == pytest.approx(plain[1], abs=0.02)
    some = [
        path_patching(model, A, B, ["layers.0.resid_pre"], receiver, freeze=(), **DIFFERENCE)
        for receiver in ([(1, 0, "k")], [(1, 1, "k")], [(1, 0, "k"), (1, 1, "k")])
    ]
    values = [one.recovered[0] for one in some]
    assert len({round(value, 3) for value in values}) == 3


@pytest.mark.parametrize("batch_rows", [1, 5])
def test_senders_in_one_pass_are_each_as_one_alone(model, batch_rows):
    receivers = [(2, 1, "q"), (2, 3, "v"), "layers.2.mlp"]
    many = path_patching(model, A, B, "heads", receivers, **DIFFERENCE)
    few = path_patching(model, A, B, "heads", receivers, batch_rows=batch_rows, **DIFFERENCE)
    np.testing.assert_allclose(many.recovered, few.recovered, atol=0.01)
    for layer, head in [(0, 0), (1, 3)]:
        alone = path_patching(model, A, B, (layer, head), receivers, **DIFFERENCE)
        assert alone[f"{layer}.{head}"] == pytest.approx(many[layer][head], abs=0.01)
    assert np.isfinite(many.recovered).all(axis=1).tolist() == [True, True, True]
    assert np.abs(many.recovered[:2]).max() > 0.5


def test_noising_starts_from_the_clean_run(model):
    there = path_patching(model, A, B, "heads", **DIFFERENCE)
    back = path_patching(model, B, A, "heads", direction="noising", **DIFFERENCE)
    np.testing.assert_allclose(there.recovered, back.recovered, atol=0.01)


def test_runs_that_do_not_differ(model):
    assert np.isnan(path_patching(model, A, A, "heads", **DIFFERENCE).recovered).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"senders": []}, "senders must have at least one entry"),
        ({"senders": ["layers.0.mlp_in"]}, "senders must be 'heads', 'mlps', or of .*mlp_in"),
        ({"senders": [(0, 4)]}, r"head must be in \[-4, 3\], got 4"),
        ({"receivers": []}, "receivers must have at least one entry"),
        ({"receivers": (2, 1, "z")}, "what a head receives must be 'q', 'k' or 'v', got 'z'"),
        ({"receivers": ["logits", (2, 1, "q")]}, "receivers must be 'logits' alone, or of"),
        ({"receivers": "layers.2.attn"}, "receivers must be 'logits' alone, or of"),
        ({"freeze": ["norm"]}, "freeze must be of 'attn' and 'mlp', got 'norm'"),
        ({"metric": "logit_diff", "answers": None}, "answers must be"),
    ],
)
def test_what_cannot_be_is_an_error(model, options, message):
    with pytest.raises(ValueError, match=message):
        path_patching(model, A, B, **{**DIFFERENCE, **options})


def test_as_a_method(demo):
    found = demo.path_patching(
        "for name in names:\n    print(", "for value in values:\n    print(",
        answers=("name", "value"),
    )  # fmt: skip
    assert repr(found).startswith("Path patching (denoising) to logits: recovered (%)")
    assert found.strongest(1)[0].label == "layer 5, head 2"
    assert found.plot().axes[0].images[0].get_array().shape == (6, 4)
