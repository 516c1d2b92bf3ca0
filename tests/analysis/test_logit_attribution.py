"""Direct logit attribution: shares that sum to the logit, and are those of the formula."""

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.model import InterpretableModel
from mlxterp.sae.coder import Columns
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder
from mlxterp.sae.sae import SAE
from mlxterp.sae.transcoder import Transcoder
from tests.pages import checked
from tests.tiny_models import MODEL_TYPES, build

IDS = [3, 1, 4, 1, 5, 9]
TEXT = "The function returns the number of"
REFUSED = {
    "falcon_h1", "gemma3n", "gemma4", "gemma4_text", "granitemoehybrid", "longcat_flash",
    "nanbeige", "rwkv7", "talkie",
}  # fmt: skip
CAPPED = {"gemma2", "muse_glimmer", "nanochat", "recurrent_gemma"}
NO_HEADS = {"gemma2", "mamba", "mamba2"}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_shares_sum_to_the_logit(model_type):
    model = InterpretableModel(build(model_type))
    if model_type in REFUSED:
        with pytest.raises(ValueError, match="no plain sum"):
            model.logit_attribution(IDS)
        return
    found = model.logit_attribution(IDS, 7, 11, position=4)
    logits = model.model(mx.array([IDS]))[0, 4]
    np.testing.assert_allclose(found.logit, float(logits[7] - logits[11]), atol=1e-4)
    np.testing.assert_allclose(sum(found.parts.values()), found.logit, atol=1e-4)
    assert abs(found.error) < 1e-4
    assert found.affine == (model_type not in CAPPED)
    assert bool(found.heads) == (model_type not in NO_HEADS)
    for layer, rest in found.head_rest.items():
        heads = [share for (own, _), share in found.heads.items() if own == layer]
        whole = found.parts[f"layers.{layer}.attn_out"]
        np.testing.assert_allclose(sum(heads) + rest, whole, atol=1e-4)


def frozen_slope(model, h, token):
    """The slope of a llama's logit by the last stream, the norm's scale held, in float64."""
    norm = np.array(model.model.model.norm.weight, np.float64)
    head = np.array(model.model.lm_head.weight, np.float64)
    return head[token] * norm / np.sqrt((h**2).mean() + 1e-5)


def at(model, site, position=-1):
    return np.array(model.run(IDS, capture=site)[site][0, position], np.float64)


def test_shares_are_those_of_the_formula():
    model = InterpretableModel(build("llama"))
    found = model.logit_attribution(IDS, 7)
    slope = frozen_slope(model, at(model, "layers.2"), 7)
    for name, share in found.parts.items():
        site = "layers.0.resid_pre" if name == "embedding" else name
        expected = 0.0 if name == "bias" else at(model, site) @ slope
        np.testing.assert_allclose(share, expected, atol=1e-5)
    heads = model.attention(IDS)
    for (layer, head), share in found.heads.items():
        z = np.array(heads[layer].z[0, head, -1], np.float64)
        width = len(z)
        o_proj = np.array(model.model.layers[layer].self_attn.o_proj.weight, np.float64)
        written = o_proj[:, head * width : (head + 1) * width] @ z
        np.testing.assert_allclose(share, written @ slope, atol=1e-5)
    assert max(map(abs, found.head_rest.values())) < 1e-5


def test_a_norm_after_attention_belongs_to_its_heads():
    """olmo2 normalises what attention returns: the scale of the pass is each head's."""
    model = InterpretableModel(build("olmo2"))
    found = model.logit_attribution(IDS, 7)
    slope = frozen_slope(model, at(model, "layers.2"), 7)
    layer = model.model.layers[1]
    returned = at(model, "layers.1.attn")
    norm = np.array(layer.post_attention_layernorm.weight, np.float64)
    norm = norm / np.sqrt((returned**2).mean() + 1e-5)
    o_proj = np.array(layer.self_attn.o_proj.weight, np.float64).reshape(32, 4, 8)
    z = np.array(model.attention(IDS)[1].z[0, :, -1], np.float64)
    expected = np.einsum("dhw,hw->hd", o_proj, z) * norm @ slope
    np.testing.assert_allclose([found.heads[1, h] for h in range(4)], expected, atol=1e-5)


def test_biases_belong_to_no_head_and_to_no_part():
    model = InterpretableModel(build("gpt2"))
    found = model.logit_attribution(IDS, 7)
    h = at(model, "layers.2")
    norm, head = model.model.model.ln_f, np.array(model.model.model.wte.weight, np.float64)
    weight, bias = np.array(norm.weight, np.float64), np.array(norm.bias, np.float64)
    scale = 1 / np.sqrt(h.var() + 1e-5)
    slope = head[7] * weight * scale
    slope = slope - slope.mean()
    np.testing.assert_allclose(found.parts["bias"], head[7] @ bias, atol=1e-5)
    for layer, rest in found.head_rest.items():
        own = np.array(model.model.layers[layer].attn.c_proj.bias, np.float64)
        np.testing.assert_allclose(rest, own @ slope, atol=1e-5)


def test_logits_that_are_capped_are_to_first_order():
    model = InterpretableModel(build("gemma2"))
    model.model.final_logit_softcapping = 0.5
    found = model.logit_attribution(IDS, 7)
    assert not found.affine and "first order" in repr(found)
    capped = float(model.model(mx.array([IDS]))[0, -1, 7])
    model.model.final_logit_softcapping = 1e6
    plain = model.logit_attribution(IDS, 7)
    assert plain.affine
    np.testing.assert_allclose([found.logit, found.error], [capped, 0], atol=1e-5)
    slope = 1 - (capped / 0.5) ** 2  # of the cap
    for name in plain.parts:
        if name != "bias":
            np.testing.assert_allclose(found.parts[name], slope * plain.parts[name], atol=1e-3)
    assert abs(found.parts["bias"]) > 10 * abs(plain.parts["bias"])


def coder(kind, reads, writes, width=128, n_features=40, seed=0, **options):
    columns = (Columns(names, (width,) * len(names)) for names in (reads, writes))
    made = kind(*columns, n_features, "topk", k=5, **options)
    rng = np.random.default_rng(seed)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
        if name in made:
            made[name] = mx.array(0.3 * rng.normal(size=made[name].shape).astype(np.float32))
    return made


CODERS = {
    "stream": coder(SAE, ("layers.2.resid_post",), ("layers.2.resid_post",)),
    "mlp": coder(SAE, ("layers.3.mlp",), ("layers.3.mlp",)),
    "attn_out": coder(SAE, ("layers.1.attn_out",), ("layers.1.attn_out",)),
    "skip": coder(Transcoder, ("layers.1.mlp_in",), ("layers.1.mlp_out",), skip=True),
    "two": coder(Crosscoder, ("layers.1.mlp", "layers.4.attn"), ("layers.1.mlp", "layers.4.attn")),
    "clt": coder(
        CrossLayerTranscoder, ("layers.1.mlp_in", "layers.3.mlp_in"),
        ("layers.1.mlp_out", "layers.3.mlp_out"),
    ),
}  # fmt: skip
DESCRIBED = {
    "stream": ["embedding", *(f"layers.{n}.{c}_out" for n in range(3) for c in ("attn", "mlp"))],
    "mlp": ["layers.3.mlp_out"],
    "attn_out": ["layers.1.attn_out"],
    "skip": ["layers.1.mlp_out"],
    "two": ["layers.1.mlp_out", "layers.4.attn_out"],
    "clt": ["layers.1.mlp_out", "layers.3.mlp_out"],
}


@pytest.mark.parametrize("name", CODERS)
def test_features_sum_to_what_their_coder_describes(demo, name):
    found = demo.logit_attribution(TEXT, coder=CODERS[name])
    shares = sum(found.features.values()) + sum(found.rest.values())
    np.testing.assert_allclose(
        shares, sum(found.parts[part] for part in DESCRIBED[name]), atol=1e-3
    )
    assert 1 <= len(found.features) <= (10 if name == "clt" else 5)
    assert set(found.rest) == {"error", "bias", *(["skip"] if name == "skip" else [])}
    assert found.described == CODERS[name].writes.names


def test_a_features_share_is_that_of_its_decoder_row(demo):
    sae = CODERS["stream"]
    found = demo.logit_attribution(TEXT, coder=sae)
    h = np.array(demo.run(TEXT, capture="layers.5")["layers.5"][0, -1], np.float64)
    norm = np.array(demo.model.model.norm.weight, np.float64)
    scale = 1 / np.sqrt((h**2).mean() + demo.model.args.rms_norm_eps)
    token = demo.logit_lens(TEXT, position=-1)[5][0][0][0]
    slope = np.array(demo.model.model.embed_tokens.weight[token], np.float64) * norm * scale
    x = demo.run(TEXT, capture="layers.2")["layers.2"][0, -1]
    z = np.array(sae.encode(x), np.float64)
    assert {*found.features} == {*np.flatnonzero(z).tolist()}
    for i, share in found.features.items():
        np.testing.assert_allclose(share, z[i] * np.array(sae.W_dec[i]) @ slope, rtol=1e-3)
    np.testing.assert_allclose(found.rest["bias"], np.array(sae.b_dec) @ slope, rtol=1e-3)


def test_a_coder_before_a_norm_reaches_the_stream_through_it():
    model = InterpretableModel(build("olmo2"))
    sae = coder(SAE, ("layers.1.mlp",), ("layers.1.mlp",), width=32)
    found = model.logit_attribution(IDS, 7, coder=sae)
    shares = sum(found.features.values()) + sum(found.rest.values())
    np.testing.assert_allclose(shares, found.parts["layers.1.mlp_out"], atol=1e-4)
    norm = np.array(model.model.layers[1].post_feedforward_layernorm.weight, np.float64)
    norm = norm / np.sqrt((at(model, "layers.1.mlp") ** 2).mean() + 1e-5)
    slope = norm * frozen_slope(model, at(model, "layers.2"), 7)
    z = np.array(sae.encode(model.run(IDS, capture="layers.1.mlp")["layers.1.mlp"][0, -1]))
    for i, share in found.features.items():
        np.testing.assert_allclose(share, z[i] * np.array(sae.W_dec[i]) @ slope, rtol=1e-3)


def test_targets(demo):
    logits = np.array(demo.run(TEXT).output[0, -1])
    found = demo.logit_attribution(TEXT)
    assert found.target == demo.token_to_str(int(logits.argmax())) and found.against is None
    assert found.position == 7
    np.testing.assert_allclose(found.logit, logits.max(), rtol=1e-5)
    both = demo.logit_attribution(TEXT, " the", " a")
    alone = [demo.logit_attribution(TEXT, token) for token in (" the", " a")]
    assert (both.target, both.against) == (" the", " a")
    for name in both.parts:
        expected = alone[0].parts[name] - alone[1].parts[name]
        np.testing.assert_allclose(both.parts[name], expected, atol=1e-4)


def test_half_precision_sums_up_to_rounding():
    model = InterpretableModel(build("llama"), dtype=mx.bfloat16)
    found = model.logit_attribution(IDS, 7)
    assert abs(found.error) < 0.05 * max(map(abs, found.parts.values()))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((["one", "two"],), {}, "text must be one text, or its token ids, not 2 rows"),
        ((TEXT, "no single token"), {}, "target"),
        ((TEXT, 4096), {}, r"target must be .* \[0, 4095\], got 4096"),
        ((TEXT, 5, 4096), {}, r"against must be .* \[0, 4095\], got 4096"),
        ((TEXT,), {"position": 8}, "position must be -8 to 7, not 8"),
        ((TEXT,), {"coder": coder(SAE, ("layers.1.mlp_in",), ("layers.1.mlp_in",))}, "coder must"),
        (
            (TEXT,),
            {"coder": coder(Crosscoder, *[("layers.1.mlp_out", "layers.3.resid_post")] * 2)},
            "one place of the residual stream",
        ),
    ],
)
def test_what_cannot_be_split_is_an_error(demo, args, options, message):
    with pytest.raises(ValueError, match=message):
        demo.logit_attribution(*args, **options)


def test_it_can_be_seen(demo):
    found = demo.logit_attribution(TEXT, " the", " a", coder=CODERS["stream"])
    lines = repr(found).splitlines()
    assert lines[0].startswith(f"The logit of “ the” less that of “ a” at 7: {found.logit:.3f}")
    assert [line.split()[0] for line in lines[1:4]] == ["part", "embedding", "layers.0.attn_out"]
    assert "Strongest heads" in lines and any("features at layers.2.resid_post" in x for x in lines)
    (layer, head), share = next(iter(found.strongest(1, "heads").items()))
    assert abs(share) == max(map(abs, found.heads.values()))
    cells = checked(found._repr_html_()).cells
    assert [f"{layer}.{head}", f"{share:.3f}"] in cells and [
        "error",
        f"{found.rest['error']:.3f}",
    ] in cells
    plain = found.to_dict()
    assert plain["heads"][f"{layer}.{head}"] == share and plain["parts"] == dict(found.parts)


def test_it_can_be_plotted(demo):
    found = demo.logit_attribution(TEXT, coder=CODERS["stream"])
    (ax,) = found.plot().axes
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [*found.parts.values()])
    image = found.plot("heads").axes[0].get_images()[0].get_array()
    assert image.shape == (6, 4)
    np.testing.assert_allclose(image[0, 2], found.heads[5, 2])
    (ax,) = found.plot("features").axes
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(sorted(widths), sorted(found.features.values()))
    assert abs(widths[-1]) == max(map(abs, widths))
    with pytest.raises(ValueError, match="what must be one of"):
        found.plot("layers")
    with pytest.raises(ValueError, match="there are no features to plot"):
        demo.logit_attribution(TEXT).plot("features")
