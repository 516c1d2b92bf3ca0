import mlx.core as mx
import pytest

from mlxterp.sae.run_state import last_checkpoint, read_checkpoint, save_checkpoint

RUN = {
    "step": 5, "n_steps": 10, "n_dead": 0, "seconds": 1.0, "random_state": {}, "config": {},
    "training": [], "validation": [],
}  # fmt: skip
ARRAYS = {"params.W_dec": mx.ones((2, 3)), "t": mx.array(5.0)}
SHAPES = {name: tuple(array.shape) for name, array in ARRAYS.items()}


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in (5, 10, 100, 10_000):
        save_checkpoint(tmp_path / "run", step, {**RUN, "step": step}, ARRAYS)
    assert names(tmp_path / "run") == ["step_00000100", "step_00010000"]
    assert last_checkpoint(tmp_path / "run").name == "step_00010000"


def test_there_is_no_last_checkpoint_in_an_empty_or_missing_directory(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "missing") is None


def test_a_directory_without_its_run_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "step_00000099").mkdir()
    save_checkpoint(tmp_path, 5, RUN, ARRAYS)
    assert last_checkpoint(tmp_path).name == "step_00000005"


def test_a_checkpoint_is_read_back(tmp_path):
    save_checkpoint(tmp_path, 5, RUN, ARRAYS)
    run, arrays = read_checkpoint(tmp_path / "step_00000005", SHAPES)
    assert run == RUN
    assert all(mx.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)


def test_a_crash_while_writing_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 5, RUN, ARRAYS)

    def crash(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(mx, "save_safetensors", crash)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path, 10, RUN, ARRAYS)
    assert names(tmp_path) == ["step_00000005"]


@pytest.mark.parametrize("key", sorted(RUN))
def test_a_missing_key_is_named_with_its_file(tmp_path, key):
    save_checkpoint(tmp_path, 5, {k: v for k, v in RUN.items() if k != key}, ARRAYS)
    with pytest.raises(ValueError, match=f"step_00000005/run.json has no key '{key}'"):
        read_checkpoint(tmp_path / "step_00000005", SHAPES)


def test_arrays_of_another_coder_are_refused(tmp_path):
    save_checkpoint(tmp_path, 5, RUN, ARRAYS)
    with pytest.raises(ValueError, match=r"'params.W_dec' must have shape \(9, 3\), got \(2, 3\)"):
        read_checkpoint(tmp_path / "step_00000005", {"params.W_dec": (9, 3)})
