"""Trace, edit and understand MLX language models, and learn the features hidden in them."""

from mlxterp import backend

backend.prepare()

from mlxterp import interventions  # noqa: E402 - MLX must be prepared before it is imported
from mlxterp.model import InterpretableModel  # noqa: E402
from mlxterp.sites import Site  # noqa: E402
from mlxterp.version import __version__ as __version__  # noqa: E402

__all__ = ["InterpretableModel", "Site", "interventions"]
