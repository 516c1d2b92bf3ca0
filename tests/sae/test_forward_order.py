import mlx.core as mx
import pytest

import mlxterp
from mlxterp.sae.forward_order import check_before, depends
from tests import tiny_models


@pytest.fixture(scope="module")
def parallel() -> mlxterp.InterpretableModel:
    """Attention and MLP of a block read the same residual stream, and add to it together."""
    return mlxterp.InterpretableModel(tiny_models.build("gpt_neox"), None)


# In the order of a forward pass; two names of one activation stand together.
SERIAL = [
    ("resid_pre",), ("attn_in",), ("attn", "attn_out"), ("resid_mid",), ("mlp_in",),
    ("mlp", "mlp_out"), ("resid_post",),
]  # fmt: skip


def flat(model, layer: int) -> list:
    return [model.site(layer, name) for names in SERIAL for name in names]


def test_a_site_depends_on_all_that_come_before_it(model):
    sites = flat(model, 2)
    for i, names in enumerate(SERIAL):
        for start in names:
            found = {site.component for site in depends(model, model.site(2, start), sites)}
            later = {name for others in SERIAL[i + 1 :] for name in others}
            # The stream after attention can only be changed by way of what attention adds to it.
            by_way_of = {"attn", "attn_out"} if start == "resid_mid" else set(names)
            assert found - by_way_of == later, start


@pytest.mark.parametrize("component", ["resid_pre", "attn", "mlp_in", "mlp", "resid_post"])
def test_a_later_layer_depends_on_an_earlier_one_and_not_the_other_way(model, component):
    earlier, later = (model.site(layer, component) for layer in (1, 4))
    assert depends(model, earlier, [later]) == [later]
    assert depends(model, later, [earlier]) == []


def test_a_site_is_not_said_to_depend_on_itself(model):
    site = model.site(2, "mlp")
    assert depends(model, site, [site]) == []


def test_in_a_parallel_block_attention_and_mlp_do_not_depend_on_each_other(parallel, model):
    for start, target in (("attn", "mlp"), ("attn_out", "mlp_in"), ("mlp", "attn")):
        start, target = parallel.site(1, start), parallel.site(1, target)
        assert depends(parallel, start, [target]) == []
        with pytest.raises(ValueError, match=f"{target} does not depend on {start}"):
            check_before(parallel, start, target)
    check_before(model, model.site(1, "attn"), model.site(1, "mlp"))
    for start, target in (((0, "attn"), (1, "mlp")), ((1, "mlp_in"), (1, "mlp_out"))):
        check_before(parallel, parallel.site(*start), parallel.site(*target))
    check_before(parallel, parallel.site(1, "attn"), parallel.site(1, "resid_post"))


def test_the_error_lists_targets_of_the_source_and_sources_of_the_target(model):
    start, target = model.site(4, "mlp"), model.site(1, "mlp")
    with pytest.raises(ValueError) as error:
        check_before(model, start, target)
    message = str(error.value)
    assert message.startswith("layers.1.mlp does not depend on layers.4.mlp: the source must come")
    targets, sources = message.split("Targets of layers.4.mlp: ")[1].split(
        ". Sources for layers.1.mlp: "
    )
    shown, _, rest = targets.partition(" and ")
    named = shown.split(", ")
    assert len(named) == 8 and rest.endswith(" more")
    assert depends(model, start, named) == named
    assert sources == "layers.0.mlp."


def test_where_there_is_no_source_or_target_the_error_says_so(model):
    first, last = model.site(0, "resid_pre"), model.site(5, "resid_post")
    with pytest.raises(ValueError, match=r"Sources for layers\.0\.resid_pre: none\."):
        check_before(model, last, first)


def test_one_site_twice_is_refused_with_what_to_do(model):
    site = model.site(2, "mlp")
    with pytest.raises(ValueError, match="both layers.2.mlp: give another one, or train an SAE"):
        check_before(model, site, site)


def test_a_half_precision_model_is_ordered_too():
    half = mlxterp.InterpretableModel(tiny_models.build("gpt_neox"), None)
    half.model.set_dtype(mx.bfloat16)
    site = half.site(0, "mlp_in")
    sites = [half.site(0, "mlp"), half.site(0, "attn"), half.site(2, "resid_post")]
    assert depends(half, site, sites) == [sites[0], sites[2]]


def test_of_two_names_of_one_activation_the_later_comes_after(model):
    mlp, output, mid, attn = (
        model.site(2, name) for name in ("mlp", "mlp_out", "resid_mid", "attn")
    )
    check_before(model, mlp, output)
    with pytest.raises(ValueError, match="layers.2.mlp does not depend on layers.2.mlp_out"):
        check_before(model, output, mlp)
    check_before(model, attn, mid)
    with pytest.raises(ValueError, match="layers.2.attn does not depend on layers.2.resid_mid"):
        check_before(model, mid, attn)
