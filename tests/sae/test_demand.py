"""Of a training that is too large: which settings make it small enough."""

import pytest

from mlxterp.sae import SAEConfig, demand, initialization, memory, trainer
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import CrossLayerConfig
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.demand import Training
from mlxterp.sae.sae import SAE
from tests.sae.kinds import KINDS, make, settings

N_TOKENS = 100_000


def sae(factor=16, width=64, **options):
    config = SAEConfig(expansion_factor=factor, k=4, **options)
    columns = Columns(("site",), (width,))
    return SAE.untrained(columns, columns, config), config


def training(*coders, batch_size=256, dataset_bytes=0) -> Training:
    width = max(coder.d_in for coder, _ in coders)
    return Training(coders, batch_size, width, N_TOKENS, 4096, dataset_bytes)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_exactly_for_every_kind(kind):
    coder = make(kind, "relu")
    found = training((coder, SAEConfig(activation_function="relu", **settings(kind)))).needed()
    arrays = ["W_enc", "b_enc", "W_dec", "b_dec", *(["W_skip"] if coder.has_skip else [])]
    assert found.parameters == sum(coder[name].nbytes for name in arrays)


def test_the_sizes_are_those_that_a_run_uses():
    assert demand.SAMPLE_TOKENS == trainer.SAMPLE_TOKENS
    assert memory.FITTED_TOKENS == initialization.FITTED_TOKENS


def test_the_factor_is_that_of_the_config():
    columns = Columns(("a", "b"), (8, 8)), Columns(("c", "d"), (8, 8))
    config = CrossLayerConfig(expansion_factor=6, k=3)
    coder = CrossLayerTranscoder.untrained(*columns, config)
    found = training((coder, config))
    assert found.needed().expansion_factor == 6
    smaller = found.needed(expansion_factor=2.5)
    other = config.replace(expansion_factor=2.5)
    assert smaller == training((CrossLayerTranscoder.untrained(*columns, other), other)).needed()


def test_each_setting_alone_is_lowered_until_it_fits():
    wanted = training(sae(), batch_size=8192)
    limit = 0.9 * wanted.needed().total
    found = wanted.smaller(limit)
    assert [name.split()[0] for name in found] == ["batch_size", "expansion_factor"]
    assert all(needed.total <= limit for needed in found.values())
    name, value = next(iter(found)).split()
    assert wanted.needed(**{name: 2 * int(value)}).total > limit


def test_settings_that_cannot_help_are_not_named():
    wanted = training(sae(), dataset_bytes=1 << 40)
    assert wanted.smaller(1 << 39) == {}


def test_the_factor_stays_large_enough_for_what_shall_be_active():
    coder, config = sae(factor=4)
    assert training((coder, config)).smaller(1 << 60)["expansion_factor 3.5"]
    few = config.replace(k=256)  # as many as there are features
    assert not any("expansion" in name for name in training((coder, few)).smaller(1 << 60))


def test_of_several_coders_none_gets_more_than_the_factor():
    narrow, wide = sae(factor=2), sae(factor=32)
    both = training(narrow, wide)
    assert both.needed(expansion_factor=4) == training(narrow, sae(factor=4)).needed()
