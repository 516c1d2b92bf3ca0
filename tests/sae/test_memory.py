from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae import SAEConfig, SAETrainer, memory
from mlxterp.sae.config import CrosscoderConfig, CrossLayerConfig, TranscoderConfig
from mlxterp.sae.cross_layer import CrossLayerTrainer
from mlxterp.sae.crosscoder import CrosscoderTrainer
from mlxterp.sae.kernels import GATHERED_BYTES
from mlxterp.sae.memory import DeviceMemory, check, device_memory, estimate, together
from mlxterp.sae.transcoder import TranscoderTrainer

GIB = 1 << 30
SIZES = {"d_in": 512, "d_out": 512, "n_features": 8192, "batch_size": 1024, "k": 32}
ON_CPU = estimate(**SIZES, on_gpu=False)


def test_parameters_and_optimizer_are_counted_exactly():
    P = 4 * (2 * 512 * 8192 + 8192 + 512)
    assert (ON_CPU.parameters, ON_CPU.gradients, ON_CPU.optimizer_state) == (P, P, 2 * P)
    tied = estimate(**SIZES, tied=True, on_gpu=False)
    assert tied.parameters == P - 4 * 512 * 8192
    assert tied.trained_coder == ON_CPU.trained_coder == P


def test_the_total_is_the_sum_of_the_parts_and_the_largest_comes_first():
    found = estimate(**SIZES, dataset_bytes=7 * GIB)
    assert found.total == sum(found.parts.values())
    assert found.total == estimate(**SIZES).total + 7 * GIB
    assert list(found.parts.values()) == sorted(found.parts.values(), reverse=True)
    lines = repr(found).splitlines()
    assert lines[1].split() == ["dataset", "7.0", "GiB"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"batch_size": 2048}, "code"),
        ({"batch_size": 2048}, "gathered_rows"),
        ({"batch_size": 2048}, "batch"),
        ({"k": 64}, "gathered_rows"),
        ({"n_features": 16384}, "code"),
        ({"n_features": 16384}, "parameter_update"),
        ({"d_in": 1024}, "parameter_update"),
    ],
)
def test_twice_the_size_takes_twice_the_memory(change, part):
    larger = estimate(**{**SIZES, **change}, on_gpu=False)
    assert getattr(larger, part) == pytest.approx(2 * getattr(ON_CPU, part), rel=1e-6)


def test_dense_codes_gpus_and_half_precision_differ():
    dense = estimate(**{**SIZES, "k": None}, on_gpu=False)
    gpu = estimate(**SIZES, on_gpu=True)
    half = estimate(**SIZES, on_gpu=False, precision="bfloat16")
    assert dense.gathered_rows == gpu.gathered_rows == 0
    assert dense.code > gpu.code > ON_CPU.code == 2 * half.code
    assert half.parameters == ON_CPU.parameters


def test_validation_counts_for_what_it_takes_beyond_a_step():
    small = {**SIZES, "batch_size": 16, "k": 8, "on_gpu": False}
    large = estimate(**{**small, "batch_size": 8192})
    assert estimate(**small).validation > 0 == large.validation
    assert estimate(**small, validation_tokens=0).validation == 0


def test_gathered_rows_are_bounded_by_what_is_gathered_at_once():
    most = memory.BLOCKS * GATHERED_BYTES
    assert ON_CPU.gathered_rows < most
    for k in (1000, 2000):
        assert estimate(**{**SIZES, "k": k}, on_gpu=False).gathered_rows == most


def test_the_start_counts_for_what_it_takes_beyond_a_step():
    narrow = {"d_in": 64, "d_out": 64, "n_features": 16384, "k": 16, "on_gpu": False}
    small, large = (estimate(**narrow, batch_size=n, validation_tokens=0) for n in (256, 8192))
    assert small.start > 4096 * 16384 * 4 > large.start == 0
    assert estimate(**narrow, batch_size=256, training_tokens=500).start < small.start / 4


def test_every_penalised_function_has_its_own_number_of_dense_arrays():
    dense = {**SIZES, "k": None, "on_gpu": False}
    relu, jumprelu, gated = (
        estimate(**dense, activation_function=name) for name in ("relu", "jumprelu", "gated")
    )
    assert relu.code < jumprelu.code < gated.code
    assert estimate(**dense).code == jumprelu.code


def test_coders_that_take_turns_share_all_but_what_they_keep():
    narrow = estimate(**SIZES, on_gpu=False)
    wide = estimate(**{**SIZES, "n_features": 16384}, on_gpu=False, dataset_bytes=GIB)
    both = together([narrow, wide, narrow])
    for name in ("parameters", "optimizer_state", "trained_coder"):
        assert getattr(both, name) == 2 * getattr(narrow, name) + getattr(wide, name)
    for name in ("gradients", "parameter_update", "code", "gathered_rows", "batch", "dataset"):
        assert getattr(both, name) == getattr(wide, name)
    assert together([narrow]) == narrow


def test_what_fits_is_not_mentioned():
    check(ON_CPU, DeviceMemory(total=ON_CPU.total * 2, free=int(ON_CPU.total / 0.89)))


def test_what_hardly_fits_is_warned_of_with_what_to_change():
    found = estimate(
        d_in=1024, d_out=1024, n_features=16384, batch_size=4096, k=64, on_gpu=False,
        dataset_bytes=3 * GIB,
    )  # fmt: skip
    with pytest.warns(UserWarning) as warned:
        check(found, DeviceMemory(16 * GIB, 3 * GIB))
    message = str(warned[0].message)
    assert f"needs about {found.total / GIB:.1f} GiB; 3.0 GiB of 16.0 GiB are free" in message
    assert "Largest: dataset 3.0 GiB, gathered rows 832 MiB, code 589 MiB. " in message
    assert "Lower batch_size (now 4096), expansion_factor (16), or buffer_bytes" in message
    with pytest.warns(UserWarning) as warned:
        check(replace(found, dataset=0), DeviceMemory(16 * GIB, GIB))
    assert str(warned[0].message).endswith("Lower batch_size (now 4096) or expansion_factor (16).")


def test_what_cannot_fit_is_refused():
    with pytest.raises(MemoryError, match="Lower batch_size"):
        check(ON_CPU, DeviceMemory(ON_CPU.total - 1, ON_CPU.total - 1))
    with pytest.warns(UserWarning):
        check(ON_CPU, DeviceMemory(ON_CPU.total, 0))


def test_what_is_not_known_is_not_checked(monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda: None)
    check(replace(ON_CPU, dataset=1 << 60))


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"memory_size": 100, "max_recommended_working_set_size": 75}, (100, 65)),
        ({"total_memory": 100, "free_memory": 50}, (100, 53)),
        ({"total_memory": 100}, (100, 90)),
        ({"device_name": "x"}, None),
    ],
)
def test_the_memory_of_a_gpu_is_what_mlx_says(monkeypatch, info, expected):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 10)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 3)
    assert device_memory() == (None if expected is None else DeviceMemory(*expected))


def test_the_memory_of_a_cpu_is_what_linux_says(monkeypatch, tmp_path):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    file = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMINFO", file)
    assert device_memory() is None
    file.write_text("MemTotal: 100 kB\nMemFree: 5 kB\nMemAvailable: 60 kB\nHugePages_Total: 0\n")
    assert device_memory() == DeviceMemory(102400, 61440)
    file.write_text("MemTotal: 100 kB\n")
    assert device_memory() is None


def test_matrices_without_their_zero_blocks_count_as_they_are():
    # Four layers of width 64 with 512 features each, which write 4, 3, 2 and 1 layers.
    sizes = {"d_in": 256, "d_out": 256, "n_features": 2048, "batch_size": 64, "k": 8}
    matrices = [2048 * 64, 512 * 64 * (4 + 3 + 2 + 1)]
    found = estimate(**sizes, matrices=matrices, n_blocks=4, n_sites=4, on_gpu=False)
    assert found.parameters == 4 * (sum(matrices) + 2048 + 256) == found.trained_coder
    assert found.parameter_update == 4 * memory.UPDATED * matrices[1]
    rows = 64 * 8 * 64 * (4 + 3 + 2 + 1)
    assert found.gathered_rows == pytest.approx(4 * memory.GATHERED * rows)
    skip = estimate(**sizes, matrices=[*matrices, 256 * 256], n_blocks=4, n_sites=4)
    assert skip.parameters == found.parameters + 4 * 256 * 256


def test_norms_at_several_sites_and_regression_take_more():
    several = estimate(**SIZES, n_sites=2, on_gpu=False)
    assert several.code > ON_CPU.code
    assert several.parameter_update > ON_CPU.parameter_update
    regressed = estimate(**SIZES, regressed=True, on_gpu=False)
    assert regressed.start > ON_CPU.start


def test_a_sample_counts_where_it_takes_more_than_a_step():
    narrow = {"d_in": 64, "d_out": 64, "n_features": 64, "k": 4, "batch_size": 64, "on_gpu": False}
    found = estimate(**narrow, sample_bytes=GIB)
    assert found.total == pytest.approx(memory.SAMPLED * GIB, rel=0.01)
    more = estimate(**narrow, sample_bytes=GIB, sampled=5)
    assert more.total == pytest.approx(5 * GIB, rel=0.01)


def real_peak(trainer, *data, **sites) -> int:
    """What a training takes at its peak beyond what is there before."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    trainer.fit(*data, **sites)
    return mx.get_peak_memory() - before


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="measured on the CPU")
def test_a_real_run_takes_about_what_was_estimated():
    x = np.random.default_rng(0).normal(size=(4096, 128)).astype(np.float32)
    config = SAEConfig(
        expansion_factor=16, k=16, batch_size=1024, num_epochs=1, warmup_steps=0, log_every=2,
        validation_split=0.5,
    )  # fmt: skip
    peak = real_peak(SAETrainer(config), x)
    found = estimate(
        d_in=128,
        d_out=128,
        n_features=2048,
        batch_size=1024,
        k=16,
        dataset_bytes=2 * x.nbytes,
        training_tokens=2048,
        validation_tokens=2048,
    )
    assert 0.6 < found.total / peak < 1.5


RUN = {"num_epochs": 1, "warmup_steps": 0, "log_every": 2, "validation_split": 0.5}


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="measured on the CPU")
@pytest.mark.parametrize("activation_function", ["topk", "relu"])
@pytest.mark.parametrize("kind", ["crosscoder", "transcoder", "cross-layer transcoder"])
def test_a_real_run_of_every_kind_takes_about_what_was_estimated(
    kind, activation_function, monkeypatch
):
    found = []
    monkeypatch.setattr(memory, "check", lambda needed, **_: found.append(needed))
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=(4096, 128)).astype(np.float32) for name in "abcd"}
    options = {**RUN, "activation_function": activation_function, "k": 16}
    if kind == "crosscoder":
        config = CrosscoderConfig(**options, expansion_factor=12, batch_size=512)
        peak = real_peak(CrosscoderTrainer(config), data)
    elif kind == "transcoder":
        config = TranscoderConfig(**options, expansion_factor=16, batch_size=512)
        peak = real_peak(TranscoderTrainer(config), data, reads="a", writes="b")
    else:
        config = CrossLayerConfig(**options, expansion_factor=8, batch_size=512)
        peak = real_peak(CrossLayerTrainer(config), data, reads=["a", "b"], writes=["c", "d"])
    in_memory = sum(array.nbytes for array in data.values())
    assert 0.6 < (found[0].total + in_memory) / peak < 1.6
