"""Getting MLX ready: which library is loaded, which error is raised, which hint is given."""

import subprocess
import sys
import types

import mlx.core as mx
import pytest

from mlxterp import backend

linux_cpu = pytest.mark.skipif(
    sys.platform != "linux" or mx.default_device() != mx.Device(mx.cpu), reason="Linux CPU only"
)


@pytest.fixture
def no_openblas(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backend, "_installed", lambda package: True)
    monkeypatch.setattr(backend, "_openblas_is_loaded", lambda: False)
    monkeypatch.setattr(backend, "_load_openblas", lambda: False)


def test_without_a_back_end_the_error_names_the_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.setattr(backend, "_installed", lambda package: False)
    with pytest.raises(ImportError, match=r"mlxterp\[cpu\].*mlxterp\[cuda12\].*mlxterp\[cuda13\]"):
        backend.prepare()


def test_mlx_imported_too_early_is_said(no_openblas):
    with pytest.warns(RuntimeWarning, match="Import mlxterp first"):
        backend.prepare()


def test_a_missing_openblas_is_said(no_openblas, monkeypatch):
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(backend, "_import_mlx", lambda: mx)
    with pytest.warns(RuntimeWarning, match="apt-get install libopenblas0-pthread"):
        backend.prepare()


def test_elsewhere_nothing_is_loaded(no_openblas, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(backend, "_load_openblas", lambda: pytest.fail("loaded"))
    assert backend.prepare() is None


def test_the_cache_of_the_cpu_grows(monkeypatch):
    limits = []
    fake = types.SimpleNamespace(
        default_device=lambda: "cpu",
        Device=lambda kind: kind,
        cpu="cpu",
        set_cache_limit=limits.append,
    )
    monkeypatch.setattr(backend, "_installed", lambda package: False)
    monkeypatch.setattr(backend, "_import_mlx", lambda: fake)
    backend.prepare()
    assert len(limits) == 1 and 32 << 20 < limits[0] <= backend.CPU_CACHE_BYTES


@linux_cpu
def test_products_are_those_of_openblas_where_it_is_found():
    code = (
        "import mlxterp; from mlxterp import backend;"
        "print(backend._openblas_is_loaded(), backend._load_openblas())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded, found = done.stdout.split()
    assert loaded == found
