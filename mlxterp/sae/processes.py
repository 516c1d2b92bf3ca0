"""The processes that `mlx.launch` started, which is one where it did not."""

from __future__ import annotations

import mlx.core as mx


def rank() -> int:
    """The number of this process."""
    return mx.distributed.init().rank()


def count() -> int:
    """How many there are."""
    return mx.distributed.init().size()


def wait_for_all() -> None:
    """Return when every process has come here."""
    mx.eval(mx.distributed.all_sum(mx.array(0)))
