"""Patching is what it says in every architecture, and many patches in one pass are each alone."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.analysis.patching import activation_patching
from mlxterp.model import InterpretableModel
from tests.pages import checked
from tests.tiny_models import MODEL_TYPES, build

CLEAN, CORRUPTED = "for name in names:\n    print(", "for value in values:\n    print("
ANSWERS = ("name", "value")
A, B = [1, 2, 3, 4, 5, 6], [9, 2, 8, 4, 5, 6]
# Where what enters a later layer is not all that it computes with.
OTHER_WAYS = {
    "afm7": "keys and values of earlier layers",
    "gemma4": "inputs of each layer", "gemma4_text": "inputs of each layer",
    "hunyuan": "keys and values of the layer before", "rwkv7": "values of the first layer",
    "talkie": "the embedding",
}  # fmt: skip
# What the heads return is gated, or their attention is not that of a softmax.
GATED = {
    "laguna", "muse_glimmer", "qwen3_5", "qwen3_5_moe", "qwen3_next", "spark2_5", "step3p5",
    "afmoe",
}  # fmt: skip
NO_HEADS = {"gemma2", "mamba", "mamba2", "rwkv7", "longcat_flash"}


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"))


@pytest.mark.parametrize("model_type", sorted({*MODEL_TYPES} - {"gemma3n"}))
def test_everything_brings_all_back_and_nothing_none(model_type):
    model = InterpretableModel(build(model_type))
    found = activation_patching(
        model, A, B, ["resid_pre", "output"], positions=[range(6), range(5), ()]
    )
    assert found.recovered.shape == (model.n_layers, 2, 3)
    whole, all_but_last, nothing = np.moveaxis(found.recovered, -1, 0)
    assert np.abs(nothing).max() < 0.05
    assert abs(whole[-1, 1] - 100) < 0.05
    if model_type != "nanbeige":  # which goes through its layers twice
        assert abs(all_but_last[-1, 1]) < 0.05
    if model_type in OTHER_WAYS:
        assert np.abs(whole - 100).max() > 0.2
    else:
        np.testing.assert_allclose(whole, 100, atol=0.05)


def test_several_streams_are_refused_by_name_but_not_what_is_added_to_them():
    model = InterpretableModel(build("gemma3n"))
    with pytest.raises(ValueError, match=r"layers.0.resid_post has the shape \[2, .*not \[B, S"):
        activation_patching(model, A, B, "output")
    assert np.abs(activation_patching(model, A, B, "mlp").recovered).max() > 1


@pytest.mark.parametrize("model_type", sorted({*MODEL_TYPES} - NO_HEADS))
def test_all_heads_together_are_the_attention(model_type):
    model = InterpretableModel(build(model_type))
    heads = activation_patching(model, A, B, "attn", heads=[range(4)], positions=[range(6), ()])
    whole = activation_patching(model, A, B, "attn", layers=list(heads))
    assert np.abs(heads.recovered[:, 0, 1]).max() < 0.05
    gap = np.abs(heads.recovered[:, 0, 0] - whole.recovered).max()
    assert gap > 0.05 if model_type in GATED else gap < 0.05


@pytest.mark.parametrize("model_type", ["gemma2", "mamba"])
def test_heads_that_cannot_be_seen_are_an_error(model_type):
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        activation_patching(InterpretableModel(build(model_type)), A, B, "attn", heads="each")


def logits_of(model, ids):
    return np.array(model.run([ids]).output[0, -1], np.float64)


def distance_from(clean):
    return lambda logits: -np.linalg.norm(np.array(logits[0, -1], np.float64) - clean)


def by_hand(model, patch, metric):
    """What one edit, and one pass, recovers."""
    clean, corrupted = (metric(model.run([ids]).output) for ids in (A, B))
    return 100 * (metric(model.run([B], edit=patch).output) - corrupted) / (clean - corrupted)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox", "olmoe", "minicpm"])
@pytest.mark.parametrize("batch_rows", [1, 7, None])
def test_many_patches_in_a_pass_are_each_as_one_alone(model_type, batch_rows):
    model = InterpretableModel(build(model_type))
    source = model.run([A], capture=["layers.*.mlp", "layers.*.attn"])

    distance = distance_from(logits_of(model, A))
    found = activation_patching(
        model, A, B, ["attn", "mlp"], positions="each", batch_rows=batch_rows
    ).recovered
    for layer, i, position in np.ndindex(model.n_layers, 2, 6):
        site = f"layers.{layer}.{('attn', 'mlp')[i]}"
        here = (mx.arange(6) == position)[:, None]
        alone = by_hand(
            model, {site: lambda x, s=site, h=here: mx.where(h, source[s], x)}, distance
        )
        assert abs(found[layer, i, position] - alone) < 0.02


class Projection:
    """In the place of an output projection: takes the input of one head from elsewhere."""

    def __init__(self, module):
        self.module, self.kept, self.head = module, None, None

    def __call__(self, x):
        if self.head is None:
            self.kept = x
            return self.module(x)
        width = x.shape[-1] // 4
        here = mx.arange(x.shape[-1]) // width == self.head
        return self.module(mx.where(here, self.kept, x))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "llama_quantized", "gpt_oss"])
def test_a_head_is_its_part_of_what_the_output_projection_reads(model_type):
    model = InterpretableModel(build(model_type))
    found = activation_patching(
        model, A, B, "attn", heads="each", metric="logit_diff", answers=(3, 5)
    )
    plain = build(model_type)
    rows = []
    for block in plain.layers:
        projection = Projection(block.self_attn.o_proj)
        block.self_attn.o_proj = projection

        def measure(ids):
            logits = plain(mx.array([ids]))[0, -1]
            return (logits[3] - logits[5]).item()

        corrupted, clean = measure(B), measure(A)
        values = []
        for head in range(4):
            projection.head = head
            values.append(100 * (measure(B) - corrupted) / (clean - corrupted))
        rows.append(values)
        block.self_attn.o_proj = projection.module
    np.testing.assert_allclose(found.recovered, rows, atol=0.02)


def test_the_result_is_a_mapping_of_layers_as_it_was(demo):
    found = demo.activation_patching(CLEAN, CORRUPTED)
    assert list(found) == [0, 1, 2, 3, 4, 5] and len(found) == 6
    assert all(isinstance(value, float) for value in found.values())
    assert dict(found) == {n: found[n] for n in range(6)}
    assert dict(found) == pytest.approx(dict(enumerate(found.recovered)))
    by_name = demo.activation_patching(CLEAN, CORRUPTED, component="self_attn", layers=[2, -1])
    assert list(by_name) == [2, 5]
    attn = demo.activation_patching(CLEAN, CORRUPTED, "attn")
    assert by_name[5] == pytest.approx(attn[5], abs=0.01)
    inside = demo.activation_patching(CLEAN, CORRUPTED, "mlp.down_proj")
    assert dict(inside) == pytest.approx(dict(found), abs=0.01)
    with pytest.raises(KeyError, match="no layer 6 in this result, which has 0, 1, 2, 3, 4, 5"):
        found[6]


def reference(name, x, clean):
    log = lambda v: v - np.log(np.exp(v).sum())  # noqa: E731
    return {
        "l2": lambda: -np.sqrt(((x - clean) ** 2).sum()),
        "mse": lambda: -((x - clean) ** 2).mean(),
        "cosine": lambda: x @ clean / np.linalg.norm(x) / np.linalg.norm(clean),
        "kl": lambda: -(np.exp(log(clean)) * (log(clean) - log(x))).sum(),
        "logit_diff": lambda: x[3] - x[5],
        "probability": lambda: np.exp(log(x))[3],
    }[name]()


@pytest.mark.parametrize(
    ("metric", "answers"),
    [("l2", None), ("mse", None), ("cosine", None), ("kl", None), ("logit_diff", (3, 5)),
     ("probability", 3)],
)  # fmt: skip
def test_metrics_are_their_formulas(model, metric, answers):
    found = activation_patching(model, A, B, "mlp", metric=metric, answers=answers)
    clean, corrupted = logits_of(model, A), logits_of(model, B)
    low, high = (reference(metric, x, clean) for x in (corrupted, clean))
    assert (found.clean, found.corrupted) == pytest.approx((high, low), rel=1e-4, abs=1e-5)
    value = model.run([A], capture="layers.1.mlp")["layers.1.mlp"]
    patched = np.array(model.run([B], edit={"layers.1.mlp": lambda x: value}).output[0, -1])
    expected = 100 * (reference(metric, patched.astype(np.float64), clean) - low) / (high - low)
    assert found[1] == pytest.approx(expected, abs=0.05)
    assert found.effects[1] == pytest.approx(expected / 100 * (high - low), rel=1e-2, abs=1e-4)


def test_a_function_of_logits_and_a_position_of_them(model):
    named = activation_patching(
        model, A, B, "mlp", metric="logit_diff", answers=(3, 5), metric_position=3
    )

    def difference(logits):
        assert logits.shape == (1, 6, 96)
        return logits[0, 3, 3] - logits[0, 3, 5]

    given = activation_patching(model, A, B, "mlp", metric=difference)
    assert given.metric == "difference"
    np.testing.assert_allclose(given.recovered, named.recovered, atol=0.02)
    other = activation_patching(model, A, B, "mlp", metric="logit_diff", answers=(3, 5))
    assert not np.allclose(other.recovered, named.recovered, atol=1)
    with pytest.raises(ValueError, match=r"must return an array of one number, got shape \(6,\)"):
        activation_patching(model, A, B, "mlp", metric=lambda logits: logits[0, :, 0])


def test_the_probable_token_is_the_default_answer(demo):
    found = demo.activation_patching(CLEAN, CORRUPTED, metric="probability")
    assert found.metric == "probability of 'name'"
    assert found.clean == pytest.approx(0.203, abs=0.01)


def test_noising_is_the_other_way_round(model):
    there = activation_patching(model, A, B, "mlp", metric="logit_diff", answers=(3, 5))
    back = activation_patching(
        model, B, A, "mlp", metric="logit_diff", answers=(3, 5), direction="noising"
    )
    np.testing.assert_allclose(there.recovered, back.recovered, atol=0.01)
    assert (back.clean, back.corrupted) == pytest.approx((there.corrupted, there.clean))
    whole = activation_patching(model, A, B, "output", direction="noising")
    np.testing.assert_allclose(whole.recovered, 100, atol=0.02)


def test_groups_are_patched_together(model):
    alone = activation_patching(model, A, B, "mlp", layers=[(0, 1), 2, [0, 1, 2]])
    assert list(alone) == [(0, 1), 2, (0, 1, 2)]
    assert alone.axes[0].labels == ("0+1", "2", "0-2")
    source = model.run([A], capture="layers.*.mlp")
    edit = {site: lambda x, s=site: source[s] for site in source if site.layer < 2}

    distance = distance_from(logits_of(model, A))
    assert alone[0, 1] == pytest.approx(by_hand(model, edit, distance), abs=0.02)
    both = activation_patching(model, A, B, [("attn", "mlp"), "attn"], layers=[1])
    assert both.axes[1].labels == ("attn+mlp", "attn")
    assert both[1][0] != pytest.approx(both[1][1], abs=1)


def test_texts_of_other_lengths_are_aligned_where_they_are_to_be(model):
    longer = [7, *A]
    with pytest.raises(ValueError, match=r"as many tokens as each other, got 7 and 6: \['7', '1'"):
        activation_patching(model, longer, B)
    end = activation_patching(model, longer, B, "output", positions="each", align="end")
    assert end.recovered.shape == (3, 6)
    assert end[2][-1] == pytest.approx(100, abs=0.02)
    source = model.run([longer], capture="layers.1")["layers.1"][:, 1:]
    here = (mx.arange(6) == 4)[:, None]
    plain, patched = (
        np.array(model.run([B], edit=edit).output[0, -1], np.float64)
        for edit in ({}, {"layers.1": lambda x: mx.where(here, source, x)})
    )
    clean = logits_of(model, longer)
    low, value = (-np.linalg.norm(x - clean) for x in (plain, patched))
    assert end[1][4] == pytest.approx(100 * (value - low) / -low, abs=0.02)
    start = activation_patching(model, A[:4], B, "output", positions="each", align="start")
    np.testing.assert_allclose(start.recovered[:, 4:], 0, atol=1e-3)
    assert np.abs(start.recovered[0, :4]).max() > 1


def test_runs_that_do_not_differ_have_no_share(demo):
    same = demo.activation_patching(CLEAN, CLEAN, positions="each")
    assert np.isnan(same.recovered).all()
    assert "the runs do not differ in the metric" in same.reason
    assert same.reason in repr(same) and same.strongest() == []
    assert same.to_dict()["recovered"][0][0] is None
    with pytest.raises(ValueError, match="nothing to plot: the runs do not differ"):
        same.plot()
    assert demo.activation_patching(CLEAN, CLEAN, plot=True).figure is None
    almost = demo.activation_patching(
        CLEAN,
        CORRUPTED,
        metric=lambda logits: logits[0, 0, 0],  # before the texts differ
    )
    assert almost.reason


def test_an_editing_block_is_part_of_all_runs(model):
    plain = activation_patching(model, A, B, "mlp")
    with model.editing({"norm": lambda x: x * mx.arange(32)}):
        other = activation_patching(model, A, B, "mlp")
    assert abs(other.corrupted) > 2 * abs(plain.corrupted)
    with model.frozen():
        frozen = activation_patching(model, A, B, "mlp")
    np.testing.assert_allclose(frozen.recovered, plain.recovered, atol=0.02)


def test_half_precision():
    model = InterpretableModel(build("llama"))
    wide = activation_patching(model, A, B, "attn", heads="each")
    model.model.set_dtype(mx.bfloat16)
    half = activation_patching(model, A, B, "attn", heads="each")
    np.testing.assert_allclose(half.recovered, wide.recovered, atol=15)
    assert np.corrcoef(half.recovered.ravel(), wide.recovered.ravel())[0, 1] > 0.98
    whole = activation_patching(model, A, B, "resid_pre")
    np.testing.assert_allclose(whole.recovered, 100, atol=0.5)


def test_layers_without_the_component_are_left_out():
    model = InterpretableModel(build("nemotron-nas"))  # no attention in layer 1, no MLP in 2
    both = activation_patching(model, A, B, ["attn", "mlp"])
    assert np.isnan(both.recovered).tolist() == [
        [False, False], [True, False], [False, True], [False, False],
    ]  # fmt: skip
    assert list(activation_patching(model, A, B, "mlp")) == [0, 1, 3]
    assert list(activation_patching(model, A, B, "attn", heads="each")) == [0, 2]
    with pytest.raises(ValueError, match="the block has no single mlp"):
        activation_patching(model, A, B, "mlp", layers=[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "l3"}, "metric must be one of l2, mse, cosine, kl, .*, got 'l3'"),
        ({"metric": 3}, "metric must be a name or a function of logits, got 3"),
        ({"metric": "logit_diff"}, r"answers must be \(right, wrong\) for 'logit_diff', got None"),
        ({"metric": "logit_diff", "answers": ("name", "name")}, "must be different tokens"),
        ({"metric": "probability", "answers": "nonsense"}, "answers must be one token, got"),
        ({"metric": "probability", "answers": 4096}, r"in \[0, 4095\], got 4096"),
        ({"metric": "kl", "answers": "name"}, "answers are for logit_diff and probability"),
        ({"component": "mpl"}, "nearest existing"),
        ({"component": []}, "component must be a name or a list of names"),
        ({"layers": [6]}, r"layers must be in \[-6, 5\], got 6"),
        ({"layers": []}, "layers must have at least one entry"),
        ({"positions": "all"}, "positions must be 'each' or a list of numbers, got 'all'"),
        ({"positions": [9]}, r"positions must be in \[-9, 8\], got 9"),
        ({"heads": "each"}, "heads are of attention, component='attn', not of 'mlp'"),
        ({"heads": [4], "component": "attn"}, r"heads must be in \[-4, 3\], got 4"),
        ({"direction": "up"}, "direction must be 'denoising' or 'noising', got 'up'"),
        ({"align": "left"}, "align must be 'start', 'end' or None, got 'left'"),
        ({"batch_rows": 0}, "batch_rows must be at least 1, got 0"),
        ({"metric_position": 9}, r"metric_position must be in \[-9, 8\], got 9"),
        ({"clean_text": [CLEAN, CLEAN]}, "clean_text must be one text, or the ids of one, got 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error(demo, options, message):
    given = {"clean_text": CLEAN, "corrupted_text": CORRUPTED, **options}
    with pytest.raises(ValueError, match=message):
        demo.activation_patching(**given)


def test_what_it_looks_like(demo):
    found = demo.activation_patching(
        CLEAN, CORRUPTED, "attn", heads="each", metric="logit_diff", answers=ANSWERS
    )
    lines = repr(found).split("\n")
    assert lines[0] == "Activation patching (denoising) of heads: recovered (%)"
    assert lines[1].startswith("logit of 'name' less that of 'value': 4.7")
    assert lines[2].split() == ["layer", "0", "1", "2", "3"]
    assert len(lines) == 9
    assert checked(found._repr_html_()).cells[0] == ["layer", "0", "1", "2", "3"]
    best = found.strongest(3)
    assert [entry.label for entry in best] == [
        "layer 5, head 2",
        "layer 4, head 2",
        "layer 4, head 1",
    ]
    assert best[0].where == {"layer": 5, "head": 2}
    assert best[0].recovered == found[5][2] == found.recovered.max()
    with pytest.raises(ValueError, match="verify is for estimates"):
        found.verify()
    plain = json.loads(json.dumps(found.to_dict()))
    assert np.array(plain["recovered"]).shape == (6, 4)
    assert plain["axes"]["head"] == ["0", "1", "2", "3"] and plain["tokens"][2] == " value"


def test_tokens_are_shown_as_they_can_be_seen(demo):
    by_position = demo.activation_patching(CLEAN, CORRUPTED, positions="each")
    assert ":⏎" in repr(by_position) and len(repr(by_position).split("\n")) == 9
    assert by_position.axes[1].labels[5] == ":\n"
    one = demo.activation_patching(CLEAN, CORRUPTED, positions=[5], layers=[0])
    assert one.strongest()[0].label == "layer 0, position 5 ':⏎'"
    many = demo.activation_patching(CLEAN * 3, CORRUPTED * 3, positions="each", layers=[0, 1])
    assert len(repr(many).split("\n")) == 3 + 10  # the strongest alone
    everything = demo.activation_patching(
        CLEAN, CORRUPTED, "attn", heads="each", positions="each", layers=[4, 5]
    )
    assert everything.recovered.shape == (2, 4, 9)
    assert "5 3" in repr(everything)


def test_figures(demo):
    bars = demo.activation_patching(CLEAN, CORRUPTED).plot()
    assert len(bars.axes[0].patches) == 6
    found = demo.activation_patching(
        CLEAN, CORRUPTED, positions="each", plot=True, figsize=(5, 3), cmap="viridis"
    )
    assert found.figure.get_size_inches().tolist() == [5, 3]
    image = found.figure.axes[0].images[0]
    assert image.get_cmap().name == "viridis"
    np.testing.assert_allclose(image.get_array(), found.recovered[::-1])
    assert [t.get_text() for t in found.figure.axes[0].get_yticklabels()] == list("543210")
    heads = demo.activation_patching(CLEAN, CORRUPTED, "attn", heads="each", positions=[2, 8])
    labels = heads.plot().axes[0].get_yticklabels()
    assert [label.get_text() for label in labels[:2]] == ["5 3", "5 2"]
