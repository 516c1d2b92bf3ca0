"""What all tests share."""

import mlxterp  # isort: skip - before MLX, so that OpenBLAS is found

import warnings
from collections.abc import Iterator

import pytest

from tests.sae.hub_server import Hub


@pytest.fixture(scope="session")
def demo() -> mlxterp.InterpretableModel:
    """The bundled model."""
    return mlxterp.InterpretableModel.demo()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A stand-in for the Hugging Face Hub and an empty cache, for the user `user`."""
    from huggingface_hub import constants

    # The client's own, where it uploads without hf_xet.
    warnings.filterwarnings("ignore", "Use 'content", DeprecationWarning)
    stand_in = Hub()
    template = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {
        "ENDPOINT": stand_in.url, "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": str(tmp_path / "no_token"),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    yield stand_in
    stand_in.close()
