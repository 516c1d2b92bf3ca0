"""Vectors are differences of what a model computes, and edits by them do what they say."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.analysis import SteeringVector
from mlxterp.analysis.contrasts import contrast, separation
from mlxterp.model import InterpretableModel
from mlxterp.sites import Site
from tests.analysis.test_probes import ERROR, FOUND
from tests.pages import checked
from tests.tiny_models import MODEL_TYPES, build

PROMPT = "If the key is not in the dictionary"
STREAMS = ("gemma3n",)  # which keeps several
FEW = ("cohere", "gemma2", "gemma4", "gpt2", "granite", "mamba", "olmo2", "phi", "rwkv7", "talkie")


@pytest.fixture(scope="module")
def vector(demo):
    return demo.steering_vector(ERROR, FOUND, 3)


def last_rows(demo, texts, site):
    return np.stack([np.array(demo.run(t, capture=site)[site][0, -1], np.float64) for t in texts])


def test_the_mean_is_that_of_last_real_tokens(demo, vector):
    p, n = (last_rows(demo, texts, "layers.3") for texts in (ERROR, FOUND))
    np.testing.assert_allclose(vector.vector, p.mean(axis=0) - n.mean(axis=0), atol=1e-4)
    assert (str(vector.site), vector.method, vector.position) == ("layers.3.resid_post", "mean", -1)
    assert (vector.n_positive, vector.n_negative, vector.model) == (20, 20, "demo")
    assert vector.norm == pytest.approx(np.linalg.norm(p.mean(axis=0) - n.mean(axis=0)), abs=1e-3)


def test_a_single_pair_has_a_vector_without_a_measure(demo):
    one = demo.steering_vector(ERROR[0], FOUND[0], "layers.2.mlp", position=2)
    both = [demo.run(t[0], capture="layers.2.mlp")["layers.2.mlp"][0, 2] for t in (ERROR, FOUND)]
    np.testing.assert_allclose(one.vector, both[0] - both[1], atol=1e-4)
    assert one.separation is None and "separation" not in repr(one)


@pytest.mark.parametrize("n", [30, 300])
def test_the_first_component_is_that_of_an_svd_at_the_size_of_the_difference(n):
    rng = np.random.default_rng(0)
    planted = rng.normal(size=60)
    planted /= np.linalg.norm(planted)
    middle = rng.normal(size=(n, 60))
    p = middle + 2 * planted + 0.2 * rng.normal(size=(n, 60))
    q = middle - 2 * planted + 0.2 * rng.normal(size=(n, 60))
    found = contrast(p, q, "pca")
    u = np.linalg.svd(p - q)[2][0]
    np.testing.assert_allclose(found, u * ((p - q) @ u).mean(), atol=1e-9)
    np.testing.assert_allclose(found, 4 * planted, atol=0.3)
    assert found @ planted > 3.9


def test_separation_is_found_where_it_is_and_nowhere_else():
    rng = np.random.default_rng(0)
    p, n = rng.normal(size=(2, 40, 30))
    for method in ("mean", "pca"):
        for negative in (n, n[:33]) if method == "mean" else (n,):
            shifted = separation(p + 2.0, negative, method, 0)
            assert shifted.area > 0.99 and shifted.folds == 5
            assert 0.35 < shifted.shuffled < 0.65 > shifted.shuffled_max - 0.3
            nothing = separation(p, negative, method, 0)
            assert nothing.area <= nothing.shuffled_max + 0.1 and abs(nothing.area - 0.5) < 0.25
    # On the rows that it was made of the vector would look well.
    made_of = contrast(p, n, "mean")
    assert (p @ made_of > n @ made_of).mean() > 0.7
    assert separation(p[:1], n, "mean", 0) is None


def test_a_direction_that_is_planted_is_recovered(demo):
    rng = np.random.default_rng(0)
    planted = rng.normal(size=128).astype(np.float32)
    planted *= 20 / np.linalg.norm(planted)
    ids = [demo.encode(text) for text in ERROR]
    marker = 4000  # a token that texts do not have, and whose embedding is moved
    assert all(marker not in row for row in ids)

    def plant(x, context):
        return x + mx.array(planted) * marked[:, -1:, None]

    marked = None
    rows = {}
    for name, sign in (("yes", 1.0), ("no", 0.0)):
        taken = []
        for row in ids:
            marked = mx.full((1, len(row)), sign)
            done = demo.run([row], capture="layers.3", edit={"layers.3": plant})
            taken.append(np.array(done["layers.3"][0, -1], np.float64))
        rows[name] = np.stack(taken)
    for method in ("mean", "pca"):
        np.testing.assert_allclose(contrast(rows["yes"], rows["no"], method), planted, atol=1e-3)


def test_prompts_may_be_token_ids(demo, vector):
    ids = [[demo.encode(text) for text in texts] for texts in (ERROR, FOUND)]
    assert mx.array_equal(
        demo.steering_vector(*ids, "blocks.3.hook_resid_post").vector, vector.vector
    )


def test_both_methods_agree_on_prompts(demo, vector):
    first = demo.steering_vector(ERROR, FOUND, 3, method="pca")
    assert vector.separation.area > 0.9 and first.separation.area > 0.9
    assert 0.3 < vector.separation.shuffled < 0.7
    cosine = (vector.unit.vector @ first.unit.vector).item()
    assert cosine > 0.9


def test_an_edit_adds_the_vector_where_it_is_told_to(demo, vector):
    plain = demo.run([PROMPT, "if"], capture="layers.3")
    moved = demo.run([PROMPT, "if"], capture="layers.3", edit=vector.edit(0.5))["layers.3"]
    expected = plain["layers.3"] + 0.5 * vector.vector
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    last = demo.run([PROMPT, "if"], capture="layers.3", edit=vector.edit(2.0, positions=[-1]))
    change = np.array(last["layers.3"] - plain["layers.3"])
    where = np.abs(change).max(axis=-1) > 1e-3
    lengths = np.array(plain.mask.sum(axis=1))
    assert where.sum() == 2 and where[0, lengths[0] - 1] and where[1, lengths[1] - 1]
    np.testing.assert_allclose(change[1, lengths[1] - 1], 2.0 * vector.vector, atol=1e-4)


def test_normalized_edits_keep_the_norm_of_each_token(demo, vector):
    plain = demo.run(PROMPT, capture="layers.3")["layers.3"]
    moved = demo.run(PROMPT, capture="layers.3", edit=vector.edit(3.0, normalize=True))["layers.3"]
    norms = [np.linalg.norm(np.array(x), axis=-1) for x in (plain, moved)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    along = (plain + 3.0 * vector.vector)[0, 2]
    cosine = (along @ moved[0, 2]) / (mx.linalg.norm(along) * mx.linalg.norm(moved[0, 2]))
    assert cosine.item() == pytest.approx(1, abs=1e-5)


def test_generations_and_standing_edits_take_it(demo, vector):
    edit = vector.edit(1.0)
    text = demo.generate(PROMPT, edit=edit, max_tokens=8).text
    with demo.editing(edit):
        assert demo.generate(PROMPT, max_tokens=8).text == text
    assert demo.generate(PROMPT, max_tokens=8).text != text
    decode = demo.generate(PROMPT, edit=vector.edit(1.0, phase="decode"), max_tokens=8)
    assert decode.tokens[0] == demo.generate(PROMPT, max_tokens=1).tokens[0]


def test_the_dtype_stays():
    vector = SteeringVector(Site(0, "resid_post"), mx.ones(4))
    x = mx.ones((1, 2, 4), dtype=mx.bfloat16)
    for edits in (vector.edit(), vector.ablate(everywhere=False), vector.edit(normalize=True)):
        assert edits["layers.0.resid_post"](x, None).dtype == mx.bfloat16


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in FEW else pytest.mark.slow)
        for name in sorted({*MODEL_TYPES} - {*STREAMS})
    ],
)
def test_an_ablated_direction_is_nowhere_in_the_stream(model_type):
    model = InterpretableModel(build(model_type))
    tokens = mx.array([[1, 2, 3, 4]])
    rng = np.random.default_rng(0)
    vector = SteeringVector(model.site(1), mx.array(rng.normal(size=model.d_model)))
    names = [f"layers.{i}.{c}" for i in range(model.n_layers) for c in ("resid_pre", "resid_post")]
    sites = [model.site(name) for name in names]
    try:
        done = model.run(tokens, capture=sites, edit=vector.ablate())
    except ValueError as error:
        assert "does not exist in this model" in str(error)
        edits = vector.ablate(components=("resid_pre", "resid_post"))
        done = model.run(tokens, capture=sites, edit=edits)
    for site in sites:
        x = done[site]
        assert mx.abs(vector.project(x)).max().item() < 2e-5 * (1 + mx.abs(x).max().item()), site
    assert mx.abs(vector.project(model.run(tokens, capture=sites[:1])[sites[0]])).max() > 1e-3


def test_ablation_at_one_site_leaves_what_is_written_later(demo, vector):
    edit = vector.ablate(everywhere=False)
    assert list(edit) == ["layers.3.resid_post"]
    done = demo.run(PROMPT, capture=["layers.3", "layers.4"], edit=edit)
    assert mx.abs(vector.project(done["layers.3"])).max() < 1e-4
    assert mx.abs(vector.project(done["layers.4"])).max() > 1e-2
    plain = demo.run(PROMPT, capture="layers.3")["layers.3"]
    rest = plain - vector.project(plain)[..., None] * vector.unit.vector
    np.testing.assert_allclose(done["layers.3"], rest, atol=1e-4)
    of_heads = SteeringVector(Site(1, "attn_z"), mx.ones(128))
    with pytest.raises(ValueError, match=r"layers\.1\.attn_z: give everywhere=False"):
        of_heads.ablate()


def test_vectors_are_added_and_scaled(demo, vector):
    other = demo.steering_vector(FOUND, ERROR[:10], 3)
    assert mx.allclose((vector + 2 * other - vector / 2).vector,
                       vector.vector + 2 * other.vector - vector.vector / 2, atol=1e-5)  # fmt: skip
    assert mx.array_equal((-vector).vector, -vector.vector)
    assert (vector + other).separation is None and (-vector).separation is None
    assert (vector * 2).separation == vector.separation
    assert vector.unit.norm == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="of one site and width"):
        vector + demo.steering_vector(ERROR, FOUND, 2)
    with pytest.raises(TypeError):
        vector + 1
    with pytest.raises(TypeError):
        vector * vector
    with pytest.raises(ValueError, match="it has no direction"):
        (0 * vector).project(vector.vector)


def test_a_vector_is_saved_whole(demo, vector, tmp_path):
    vector.save(tmp_path / "v")
    back = SteeringVector.load(tmp_path / "v")
    assert mx.array_equal(back.vector, vector.vector)
    assert back.to_dict() == vector.to_dict() and back.separation == vector.separation
    assert back.site == vector.site
    for change, message in (
        ({"width": 64}, r"must have shape \(64,\)"),
        ({"width": 0}, "width must be a whole number >= 1, got 0"),
        ({"site": 3}, "site must be a name"),
        ({"separation": {"a": 1}}, "separation is not what it should be"),
    ):
        file = tmp_path / "v" / "steering_vector.json"
        file.write_text(json.dumps(vector.to_dict() | change))
        with pytest.raises(ValueError, match=message):
            SteeringVector.load(tmp_path / "v")
    with pytest.raises(ValueError, match="is missing"):
        SteeringVector.load(tmp_path / "nothing")


def test_a_vector_says_what_it_is(vector):
    assert repr(vector).startswith("SteeringVector(site: layers.3.resid_post, norm: ")
    assert "20 positive, 20 negative" in checked(vector._repr_html_()).text
    json.dumps(vector.to_dict())


def test_bad_input_is_refused(demo, vector):
    with pytest.raises(ValueError, match="method must be one of"):
        demo.steering_vector(ERROR, FOUND, 3, method="svm")
    with pytest.raises(ValueError, match="needs pairs: 20 positive and 19 negative"):
        demo.steering_vector(ERROR, FOUND[1:], 3, method="pca")
    with pytest.raises(ValueError, match="negative must have at least one text"):
        demo.steering_vector(ERROR, [], 3)
    with pytest.raises(ValueError, match="positive must be texts or lists of token ids, not 5"):
        demo.steering_vector([5, 6], FOUND, 3)
    with pytest.raises(ValueError, match="position must be a whole number or 'mean'"):
        demo.steering_vector(ERROR, FOUND, 3, position="last")
    with pytest.raises(ValueError, match="strength must be finite, got nan"):
        vector.edit(float("nan"))
    with pytest.raises(ValueError, match="phase must be None or one of"):
        vector.edit(phase="later")
    with pytest.raises(ValueError, match="the vector has width 128"):
        vector.project(mx.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"finite and of shape \[d\]"):
        SteeringVector(Site(0, "mlp"), mx.array([[1.0]]))
    with pytest.raises(ValueError, match="the vector has width 3"):
        demo.run(PROMPT, edit=SteeringVector(Site(0, "mlp"), mx.ones(3)).edit())
