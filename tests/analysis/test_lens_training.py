"""Training the maps of a tuned lens: the loss, its slopes, the steps, and what comes of it."""

import math
from pydoc_data.topics import topics

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.analysis import lens_training, readout
from mlxterp.analysis.tuned_lens import TunedLens
from mlxterp.model import InterpretableModel
from tests.tiny_models import build

ROWS = [[int(i) for i in row] for row in np.random.default_rng(0).integers(1, 96, (12, 16))]


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(build("llama"))


def shifted(seed=1, size=0.05):
    lens = TunedLens(3, 32)
    rng = np.random.default_rng(seed)
    for translator in lens.translators:
        for name in ("weight", "bias"):
            noise = rng.normal(size=translator[name].shape) * size
            translator[name] = translator[name] + mx.array(noise.astype(np.float32))
    return lens


def expected_loss(model, lens, row, counted, layer):
    """In float64, by the llama's own norm and head."""
    h = model.run([row], capture="layers.*")
    norm = np.array(model.model.model.norm.weight, np.float64)
    head = np.array(model.model.lm_head.weight, np.float64)

    def log_p(x):
        x = norm * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        logits = x @ head.T
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    weight, bias = (np.array(lens.translators[layer][n], np.float64) for n in ("weight", "bias"))
    states = [np.array(h[f"layers.{i}"][0], np.float64) for i in (layer, 2)]
    own, wanted = log_p(states[0] @ weight.T + bias), log_p(states[1])
    return ((np.exp(wanted) * (wanted - own)).sum(-1) * counted).sum() / counted.sum()


@pytest.mark.parametrize("memory", [256 << 20, 8 * 5 * 4 * 96])
def test_loss_and_slopes_are_those_of_the_formula(model, monkeypatch, memory):
    monkeypatch.setattr(readout, "LOGIT_BYTES", memory)
    lens, counted = shifted(), np.arange(16) != 0
    loss, slopes = lens_training._losses(model)(
        lens, mx.array([ROWS[0]]), mx.array([counted.tolist()])
    )
    expected = [expected_loss(model, lens, ROWS[0], counted, layer) for layer in range(2)]
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-4)
    assert all(not np.array(x).any() for x in slopes[2].values())
    rng, eps = np.random.default_rng(2), 1e-3
    for layer in range(2):
        for name in ("weight", "bias"):
            start = lens.translators[layer][name]
            direction = rng.normal(size=start.shape)
            ends = []
            for sign in (1, -1):
                lens.translators[layer][name] = start + mx.array(
                    (sign * eps * direction).astype(np.float32)
                )
                ends.append(expected_loss(model, lens, ROWS[0], counted, layer))
            lens.translators[layer][name] = start
            by_differences = (ends[0] - ends[1]) / (2 * eps)
            np.testing.assert_allclose(
                (np.array(slopes[layer][name]) * direction).sum(), by_differences, rtol=1e-2
            )


def test_steps_are_those_of_nesterov_with_a_falling_rate(model, monkeypatch):
    made = [
        {"weight": mx.array(w), "bias": mx.array(b)}
        for w, b in zip(
            np.random.default_rng(3).normal(size=(3, 32, 32)).astype(np.float32),
            np.random.default_rng(4).normal(size=(3, 32)).astype(np.float32),
            strict=True,
        )
    ]
    monkeypatch.setattr(lens_training, "_losses", lambda model: lambda *args: (1.0, made))
    lens = model.train_tuned_lens(ROWS, 3, 0.5, 0.9, 16, gradient_clip=1.0, verbose=False)
    size = math.sqrt(sum((np.array(x, np.float64) ** 2).sum() for m in made for x in m.values()))
    assert size > 1
    for layer in range(3):
        slope = np.array(made[layer]["weight"], np.float64) / size
        weight, speed = np.eye(32), 0.0
        for step in range(3):
            speed = 0.9 * speed + slope
            weight = weight - 0.5 * (1 - step / 3) * (slope + 0.9 * speed)
        np.testing.assert_allclose(lens.translators[layer].weight, weight, atol=1e-5)


def test_kl_falls_on_text_that_was_not_trained_on(demo):
    texts = list(topics.values())
    lens = demo.train_tuned_lens(texts[:8], 15, max_seq_len=64, verbose=False)
    held_out = [t[:300] for t in texts[-3:]]
    before = np.mean([x.kl[:, 1:].mean(axis=1) for x in demo.logit_lens(held_out)], axis=0)
    after = np.mean([x.kl[:, 1:].mean(axis=1) for x in demo.tuned_lens(held_out, lens)], axis=0)
    assert (after[:4] < 0.85 * before[:4]).all(), (before, after)
    assert after[5] < 1e-5


def test_the_last_map_stays_and_equal_seeds_give_equal_maps(model):
    lenses = [
        model.train_tuned_lens(ROWS, 4, max_seq_len=16, verbose=False, seed=seed)
        for seed in (0, 0, 1)
    ]
    first, same, other = (np.array(lens.translators[0].weight) for lens in lenses)
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other) and not np.array_equal(first, np.eye(32))
    np.testing.assert_array_equal(lenses[0].translators[2].weight, np.eye(32))
    np.testing.assert_array_equal(lenses[0].translators[2].bias, 0)


def test_every_context_is_read_before_one_is_again():
    order = [*lens_training._orders(5, 12, 0)]
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert len(order) == 12 and order[:5] != order[5:10]


def test_special_tokens_and_padding_do_not_count(demo, monkeypatch):
    seen = []

    def losses(model):
        def one(lens, tokens, counted):
            seen.append((np.array(tokens[0]), np.array(counted[0])))
            return 0.0, [
                {n: mx.zeros_like(t[n]) for n in ("weight", "bias")} for t in lens.translators
            ]

        return one

    monkeypatch.setattr(lens_training, "_losses", losses)
    demo.train_tuned_lens(["The function returns"], 1, max_seq_len=8, verbose=False)
    ((tokens, counted),) = seen
    ids = demo.encode("The function returns")
    assert tokens[: len(ids)].tolist() == ids
    assert counted.tolist() == [False, *[True] * (len(ids) - 1), *[False] * (8 - len(ids))]


def test_what_is_told_and_saved(model, tmp_path, capsys):
    told = []
    lens = model.train_tuned_lens(
        ROWS, 3, max_seq_len=16, save_path=tmp_path / "lens",
        callback=lambda step, loss: told.append((step, loss)),
    )  # fmt: skip
    assert [step for step, _ in told] == [0, 1, 2] and all(loss > 0 for _, loss in told)
    assert "tuned lens" in capsys.readouterr().err
    loaded = model.load_tuned_lens(tmp_path / "lens")
    assert mx.array_equal(loaded.translators[1].weight, lens.translators[1].weight)
    model.train_tuned_lens(ROWS, 1, max_seq_len=16, verbose=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"learning_rate": 0}, "learning_rate must be above 0, not 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"momentum": 1.0}, "momentum must be from 0 to below 1"),
        ({"max_seq_len": 1}, "max_seq_len must be at least 2"),
        ({"gradient_clip": 0}, "gradient_clip must be above 0, or None"),
        ({"dataset": []}, "empty"),
        ({"dataset": [[96]]}, "token ids must be 0 to 95"),
    ],
)
def test_values_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.train_tuned_lens(**({"dataset": ROWS, "num_steps": 1, "verbose": False} | options))


def test_blank_texts_are_an_error(demo):
    with pytest.raises(ValueError, match="empty"):
        demo.train_tuned_lens(["", ""], 1, verbose=False)


def test_a_loss_that_is_no_number_ends_the_run():
    broken = build("llama")
    broken.model.norm.weight = broken.model.norm.weight * mx.nan
    with pytest.raises(
        RuntimeError, match=r"loss is nan at step 0: use a learning_rate below 1\.0"
    ):
        InterpretableModel(broken).train_tuned_lens(ROWS, 9, max_seq_len=16, verbose=False)


@pytest.mark.parametrize("model_type", ["gemma2", "mamba", "olmoe", "llama_quantized", "gpt2"])
def test_other_architectures(model_type):
    model = InterpretableModel(build(model_type))
    losses = []
    model.train_tuned_lens(
        ROWS[:1], 8, 0.05, max_seq_len=16, verbose=False,
        callback=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < 0.9 * losses[0]  # of the same context
