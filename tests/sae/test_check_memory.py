"""A run that does not fit is refused before anything is computed for it."""

import json
import logging
import re

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import ActivationDataset, Callback, StopTraining, memory
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import CrosscoderConfig
from mlxterp.sae.crosscoder import Crosscoder, CrosscoderTrainer
from mlxterp.sae.memory import DeviceMemory
from mlxterp.sae.trainer import Trainer, check_memory, train_together
from tests.fakes import SITE, FakeSource
from tests.sae.runs import Interrupt, coder_for, config, fit, in_memory


class Unused(FakeSource):
    def run(self, *arguments, **options):
        raise AssertionError("The model was run.")


def of_texts(source) -> ActivationDataset:
    return ActivationDataset.from_texts(source, ["abcdefgh" * 4] * 20, SITE, context_length=16)


@pytest.fixture
def device(monkeypatch):
    """Sets how much memory there is, and how much of it is free."""

    def set_to(total, free=None):
        free = total if free is None else free
        monkeypatch.setattr(memory, "device_memory", lambda: DeviceMemory(total, free))

    return set_to


def needed(*coders, dataset) -> int:
    """What `check_memory` asks for."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "check", lambda needed, **_: found.append(needed))
        check_memory(coders, dataset, None)
    return found[0].total


def test_a_run_that_cannot_fit_is_refused_before_the_model_is_run(device, tmp_path):
    dataset = of_texts(Unused(width=8))
    coder = coder_for(dataset, config())
    before = coder.W_dec
    device(needed((coder, config()), dataset=dataset) - 1)
    with pytest.raises(MemoryError, match=r"What fits is at most expansion_factor"):
        Trainer(config(), tmp_path / "run").fit(coder, dataset)
    assert coder.W_dec is before and not (tmp_path / "run").exists()


def test_several_coders_that_fit_one_by_one_may_not_fit_together(device):
    dataset = of_texts(Unused(width=8))
    settings = config(expansion_factor=64)
    coders = {name: (coder_for(dataset, settings), settings) for name in "abcd"}
    one, all_four = (needed(*list(coders.values())[:n], dataset=dataset) for n in (1, 4))
    assert all_four > one
    device((one + all_four) // 2)
    with pytest.raises(MemoryError, match="Training needs about"):
        train_together(coders, dataset)


GIB = 1 << 30
WIDE = {f"layers.{i}.mlp": 2048 for i in range(3)}


def crosscoder_of(settings: CrosscoderConfig, n_sites: int = 3) -> Crosscoder:
    columns = Columns(tuple(WIDE)[:n_sites], tuple(WIDE.values())[:n_sites])
    return Crosscoder.untrained(columns, columns, settings)


def wide_data(n_sites: int = 3) -> ActivationDataset:
    rows = np.ones((32, 2048), np.float32)
    return ActivationDataset.from_activations({site: rows for site in list(WIDE)[:n_sites]})


def test_a_wide_crosscoder_is_refused_before_anything_large_is_allocated(device):
    device(8 * GIB)
    data, settings = wide_data(), CrosscoderConfig(validation_split=0)
    assert crosscoder_of(settings).n_features == 49_152
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(MemoryError, match=r"Training needs about 1\d\.\d GiB"):
        CrosscoderTrainer(settings).fit(data)
    assert mx.get_peak_memory() - before < 1 << 20


def longer(monkeypatch, n_tokens: int) -> None:
    """Datasets of so many tokens, as far as their lengths tell."""
    monkeypatch.setattr(ActivationDataset, "__len__", lambda _: n_tokens)


@pytest.mark.parametrize(
    ("batch_size", "total", "named"),
    [
        (128, 8, {"expansion_factor"}),
        (128, 16, {"expansion_factor", "sites"}),
        (16_384, 28, {"batch_size", "expansion_factor", "sites"}),
    ],
)
def test_the_settings_that_a_refusal_names_pass_the_check(
    device, monkeypatch, batch_size, total, named
):
    longer(monkeypatch, 1_000_000)
    device(total * GIB)
    settings = CrosscoderConfig(batch_size=batch_size)
    with pytest.raises(MemoryError) as refused:
        check_memory([(crosscoder_of(settings), settings)], wide_data(), None)
    message = str(refused.value)
    changes = dict(re.findall(r"(batch_size|expansion_factor) ([\d.]+) \(", message))
    sites = re.findall(r"(\d) sites \(", message)
    assert {*changes, *(["sites"] if sites else [])} == named
    for name, value in changes.items():
        value = type(getattr(settings, name))(float(value))
        assert value < getattr(settings, name)
        changed = settings.replace(**{name: value})
        check_memory([(crosscoder_of(changed), changed)], wide_data(), None)
    for n in map(int, sites):
        check_memory([(crosscoder_of(settings, n), settings)], wide_data(n), None)


def test_the_next_larger_factor_would_not_have_fitted(device, monkeypatch):
    longer(monkeypatch, 1_000_000)
    device(32 * GIB, free=16 * GIB)
    settings = CrosscoderConfig()
    with pytest.warns(UserWarning) as warned:
        check_memory([(crosscoder_of(settings), settings)], wide_data(), None)
    (factor,) = re.findall(r"expansion_factor (\d+) \(", str(warned[0].message))
    larger = settings.replace(expansion_factor=int(factor) + 1)
    with pytest.warns(UserWarning, match=f"expansion_factor {factor} "):
        check_memory([(crosscoder_of(larger), larger)], wide_data(), None)


def test_where_nothing_fits_it_says_what_to_lower(device):
    device(GIB // 4)
    settings = CrosscoderConfig(k=2048)
    with pytest.raises(
        MemoryError, match=r"Lower batch_size \(now 32\) or expansion_factor \(24\)"
    ):
        check_memory([(crosscoder_of(settings), settings)], wide_data(), None)


def test_a_run_that_fits_is_made_and_one_that_hardly_fits_is_warned_of(device):
    training, _ = in_memory()
    wanted = needed((coder_for(training, config()), config()), dataset=training)
    device(2 * wanted)
    fit((training, None), config(num_epochs=1))
    device(2 * wanted, free=wanted)
    with pytest.warns(UserWarning, match="Training needs about"):
        fit((training, None), config(num_epochs=1))


def test_data_still_to_be_computed_count_and_those_in_memory_do_not():
    dataset, settings = of_texts(FakeSource(width=8)), config()
    coder = coder_for(dataset, settings), settings
    before = needed(coder, dataset=dataset)
    list(dataset.batches(32))
    assert before - needed(coder, dataset=dataset) == dataset.n_bytes > 0


# Stopped, and at the end


def test_a_wish_to_stop_at_the_end_has_nothing_left_to_stop(caplog):
    ended = []

    class Late(Callback):
        def on_train_end(self):
            ended.append(True)
            raise StopTraining("too late")

    with caplog.at_level(logging.ERROR, logger="mlxterp"):
        coder, result = fit(in_memory(), config(), callbacks=[Late(), Late()])
    assert ended == [True, True] and caplog.text == ""
    assert result.training[-1]["step"] == 18 and result.validation


def test_a_stopped_run_says_so_in_its_checkpoint_and_is_not_trained_on(tmp_path):
    fit(in_memory(), config(), tmp_path, [Interrupt(7, StopTraining)])
    (saved,) = (path for path in tmp_path.glob("step_*") if path.name.endswith("07"))
    assert json.loads((saved / "run.json").read_text())["ended"] is True
    # Each step of the resumed run would raise.
    _, result = fit(in_memory(), config(), tmp_path, [Interrupt(0, RuntimeError)], resume=True)
    assert result.n_tokens == 7 * 32


def test_an_interrupted_run_is_trained_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(in_memory(), config(), tmp_path, [Interrupt(7)])
    saved = max(tmp_path.glob("step_*"))
    assert json.loads((saved / "run.json").read_text())["ended"] is False
    _, result = fit(in_memory(), config(), tmp_path, resume=True)
    assert result.n_tokens == 18 * 32
