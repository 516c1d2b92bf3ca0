import numpy as np
import pytest

from mlxterp.sae import SAEConfig
from mlxterp.sae.schedules import K_STAGES, active_features, learning_rate, sparsity_share


def rates(config: SAEConfig, n_steps: int) -> list[float]:
    return [learning_rate(step, n_steps, config) for step in range(n_steps)]


def test_constant_is_constant_after_warm_up():
    config = SAEConfig(learning_rate=2.0, warmup_steps=4, lr_schedule="constant")
    assert rates(config, 100) == [0.5, 1.0, 1.5] + 97 * [2.0]


def test_linear_falls_over_the_last_fifth():
    config = SAEConfig(learning_rate=1.0, warmup_steps=4, lr_schedule="linear")
    found = rates(config, 100)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[80:] == [(100 - step) / 20 for step in range(80, 100)]
    assert found[4:81] == 77 * [1.0] and found[99] == 0.05


def test_cosine_falls_from_the_end_of_warm_up():
    config = SAEConfig(learning_rate=1.0, warmup_steps=0, lr_schedule="cosine")
    expected = [0.5 * (1 + np.cos(np.pi * step / 100)) for step in range(100)]
    assert rates(config, 100) == pytest.approx(expected)
    warmed = rates(config.replace(warmup_steps=10), 100)
    assert warmed[9:11] == [1.0, 1.0] and warmed[55] == pytest.approx(0.5)


def test_warm_up_is_capped_at_a_tenth_of_the_run():
    config = SAEConfig(learning_rate=1.0, warmup_steps=1000, lr_schedule="constant")
    assert rates(config, 50)[:6] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert rates(config, 5) == 5 * [1.0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("n_steps", [1, 2, 7, 1000])
def test_every_rate_is_above_zero_and_at_most_the_peak(schedule, n_steps):
    config = SAEConfig(learning_rate=2.0, warmup_steps=3, lr_schedule=schedule)
    assert all(0 < rate <= 2 for rate in rates(config, n_steps))
    assert max(rates(config, n_steps)) == 2


def test_the_penalty_is_raised_over_its_own_warm_up():
    config = SAEConfig(sparsity_warmup_steps=4, warmup_steps=0)
    assert [sparsity_share(step, 100, config) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert sparsity_share(99, 100, config) == 1
    capped = config.replace(sparsity_warmup_steps=1000)
    assert [sparsity_share(step, 50, capped) for step in (0, 3, 4, 49)] == [0.2, 0.8, 1, 1]
    at_once = config.replace(sparsity_warmup_steps=0)
    assert sparsity_share(0, 100, at_once) == sparsity_share(0, 5, config) == 1


def test_k_comes_down_in_stages_of_one_ratio():
    config = SAEConfig(k=2, k_anneal_steps=80)
    found = [active_features(step, 200, 512, 4096, config) for step in range(200)]
    # From 512 to 2 in eight stages, each half of the one before, and then 2.
    assert K_STAGES == 8
    stages = [512, 256, 128, 64, 32, 16, 8, 4]
    assert found == [k for k in stages for _ in range(10)] + 120 * [2]


def test_k_starts_at_the_number_of_features_where_that_is_smaller():
    config = SAEConfig(k=2, k_anneal_steps=8)
    assert active_features(0, 100, 512, 32, config) == 32
    assert active_features(8, 100, 512, 32, config) == 2


@pytest.mark.parametrize("k_anneal_steps", [3, 8, 1000])
def test_k_never_rises_and_ends_at_the_config(k_anneal_steps):
    config = SAEConfig(k=5, k_anneal_steps=k_anneal_steps)
    found = [active_features(step, 1200, 100, 200, config) for step in range(1200)]
    assert found[0] == 100 and sorted(found, reverse=True) == found
    assert set(found[min(k_anneal_steps, 600) :]) == {5} and len(set(found)) <= K_STAGES + 1


def test_without_annealing_k_is_that_of_the_config():
    assert active_features(0, 100, 512, 4096, SAEConfig(k=7)) == 7
    above = SAEConfig(k=64, k_anneal_steps=100)
    assert active_features(0, 200, 16, 256, above) == 64
