import mlx.core as mx
import pytest

from mlxterp.sae.run_state import last_checkpoint, read_checkpoint, save_checkpoint

RUN = {
    "step": 5, "n_steps": 10, "n_dead": 0, "ended": False, "seconds": 1.0, "random_state": {},
    "config": {}, "training": [], "validation": [],
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


def test_any_number_of_checkpoints_can_be_kept(tmp_path):
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, RUN, ARRAYS, keep=1)
    assert names(tmp_path) == ["step_00000100"]
    for step in (200, 300):
        save_checkpoint(tmp_path, step, RUN, ARRAYS, keep=5)
    assert names(tmp_path) == ["step_00000100", "step_00000200", "step_00000300"]


def test_other_files_and_directories_are_no_checkpoints_and_stay(tmp_path):
    (tmp_path / "step_00000099").mkdir()
    (tmp_path / "step_00000099" / "notes.txt").write_text("mine")
    (tmp_path / "step_00000098").write_text("mine")
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, step, RUN, ARRAYS)
    assert last_checkpoint(tmp_path).name == "step_00000015"
    assert names(tmp_path)[2:] == ["step_00000098", "step_00000099"]


def cut(path):
    (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-1])


def flip_one_bit(path):
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)


def bad_json(path):
    (path / "run.json").write_text("{")


def empty(path):
    for file in path.iterdir():
        file.unlink()


def without(name):
    return lambda path: (path / name).unlink()


DAMAGES = [
    (cut, "state.safetensors is damaged"),
    (flip_one_bit, "state.safetensors is damaged"),
    (without("state.safetensors"), "state.safetensors is missing"),
    (bad_json, "run.json is damaged"),
    (without("run.json"), "run.json is missing"),
    (without("checksums.json"), "checksums.json is missing"),
    (empty, "checksums.json is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_named_passed_over_and_replaced(tmp_path, damage, message):
    for step in (5, 10):
        save_checkpoint(tmp_path, step, RUN, ARRAYS)
    damage(tmp_path / "step_00000010")
    with pytest.warns(UserWarning, match=f"step_00000010 is not used: .*{message}"):
        assert last_checkpoint(tmp_path).name == "step_00000005"
    save_checkpoint(tmp_path, 10, RUN, ARRAYS)
    assert last_checkpoint(tmp_path).name == "step_00000010"
    assert names(tmp_path) == ["step_00000005", "step_00000010"]


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path):
    for step in (5, 20):
        save_checkpoint(tmp_path, step, RUN, ARRAYS)
    cut(tmp_path / "step_00000020")
    save_checkpoint(tmp_path, 10, RUN, ARRAYS)
    assert names(tmp_path) == ["step_00000005", "step_00000010"]


def test_there_is_no_last_checkpoint_where_all_are_damaged(tmp_path):
    for step in (5, 10):
        save_checkpoint(tmp_path, step, RUN, ARRAYS)
        cut(tmp_path / f"step_{step:08d}")
    with pytest.warns(UserWarning) as warned:
        assert last_checkpoint(tmp_path) is None
    assert [str(w.message)[:24] for w in warned] == [
        "Checkpoint step_00000010", "Checkpoint step_00000005"
    ]  # fmt: skip


def test_saving_takes_no_copy_of_the_arrays(tmp_path):
    arrays = {name: mx.random.normal((1 << 20,)) for name in "ab"}
    mx.eval(arrays)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    save_checkpoint(tmp_path, 5, RUN, arrays)
    assert mx.get_peak_memory() - before < 1 << 20


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
