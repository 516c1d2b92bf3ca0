"""Make MLX importable and fast on this machine; done once, before anything imports `mlx.core`.

Two things on Linux only: the wheel of MLX without an extra has no back-end at all, and its CPU
back-end ships the reference BLAS, about 50 times slower than OpenBLAS. OpenBLAS is used in its
place when its symbols are already global at the moment MLX is loaded.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

CPU_CACHE_BYTES = 8 << 30

_NO_BACKEND = (
    "MLX is installed without a back-end for this machine. Install one of the extras: pip install "
    "'mlxterp[cpu]' (Linux, CPU), 'mlxterp[cuda12]' or 'mlxterp[cuda13]' (Linux, NVIDIA)."
)
_NO_OPENBLAS = (
    "OpenBLAS was not found, so MLX multiplies matrices about 50 times slower than this CPU can. "
    "Install it (Debian, Ubuntu: apt-get install libopenblas0-pthread; Fedora: dnf install "
    "openblas)."
)
_TOO_LATE = (
    "mlx.core was imported before mlxterp, so OpenBLAS cannot be used and MLX multiplies matrices "
    "about 50 times slower than this CPU can. Import mlxterp first."
)


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def _load_openblas() -> bool:
    names = ("libopenblas.so.0", "libopenblas.so", ctypes.util.find_library("openblas"))
    for name in filter(None, names):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def _openblas_is_loaded() -> bool:
    """Whether the process has OpenBLAS mapped, for instance through `LD_PRELOAD`."""
    with open("/proc/self/maps") as maps:
        return any("libopenblas" in line and "numpy" not in line for line in maps)


def _import_mlx() -> Any:
    try:
        import mlx.core as mx
    except ImportError as error:
        raise ImportError(_NO_BACKEND) from error
    return mx


def prepare() -> None:
    """Load OpenBLAS where it helps, import MLX and size its cache.

    Raises `ImportError`, naming the extra to install, where MLX has no back-end; warns
    (`RuntimeWarning`) where the CPU back-end has to work without OpenBLAS.
    """
    linux_cpu = sys.platform == "linux" and _installed("mlx-cpu")
    if linux_cpu and not _openblas_is_loaded():
        if "mlx.core" in sys.modules:
            warnings.warn(_TOO_LATE, RuntimeWarning, stacklevel=3)
        elif not _load_openblas():
            warnings.warn(_NO_OPENBLAS, RuntimeWarning, stacklevel=3)
    mx = _import_mlx()
    if mx.default_device() == mx.Device(mx.cpu):
        # The default of 32 MB makes every large temporary a malloc and a page fault.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        mx.set_cache_limit(min(CPU_CACHE_BYTES, memory // 4))
