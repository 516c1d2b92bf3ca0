"""Reading coders from disk; `BaseSAE.save` writes them.

config.json                everything that rebuilds the coder
encoder.safetensors        W_enc, and the activation function's own arrays
decoder.safetensors        W_dec, b_dec; W_skip, site_scale where the coder has them
encoder_bias.safetensors   b_enc
statistics.json            reports, firing rates, dead features
metadata.json              model, data, training configuration, library version
labels.json                labels of features, where there are any
features/                  what `collect` found out about the features, where it was called
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxterp.sae.base import CONFIG_FILE, FORMAT_VERSION, BaseSAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder
from mlxterp.sae.files import read_arrays, read_json, recover
from mlxterp.sae.metadata import Metadata, Statistics
from mlxterp.sae.sae import SAE
from mlxterp.sae.transcoder import Transcoder

KINDS: dict[str, type[BaseSAE]] = {
    kind.kind: kind for kind in (SAE, Transcoder, Crosscoder, CrossLayerTranscoder)
}


def load_sae(path: str | Path) -> BaseSAE:
    """The coder saved at a path, of the class that it was saved from.

    Raises `FileNotFoundError` where there is nothing, and `ValueError`, naming file and key, for a
    file that is missing, cut short, of another version, or of other shapes than the
    configuration says. Nothing is returned half-loaded.
    """
    path = Path(path)
    if not path.is_dir():
        recover(path.parent, path.name)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no saved coder at {path}.")
    file = path / CONFIG_FILE
    config = read_json(file, ("format_version",))
    version = config["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r}; this release of mlxterp reads "
            f"{FORMAT_VERSION}."
        )
    coder = _empty_coder(file)
    metadata = _described(Metadata, path / "metadata.json")
    statistics = _described(Statistics, path / "statistics.json")
    if len(statistics.firing_rates) not in (0, coder.n_features):
        raise ValueError(
            f"{path / 'statistics.json'}: 'firing_rates' must have {coder.n_features} entries or "
            f"none, got {len(statistics.firing_rates)}."
        )
    for file, arrays in coder.array_files().items():
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        for name, array in read_arrays(path / file, shapes).items():
            coder.set_array(name, array)
    coder.metadata, coder.statistics, coder.path = metadata, statistics, path
    return coder


def _described(kind: type[Metadata] | type[Statistics], file: Path) -> Any:
    empty = kind().to_dict()
    values = read_json(file, tuple(empty))
    for key, value in empty.items():
        if not isinstance(values[key], type(value)):
            raise ValueError(f"{file}: {key!r} must be a {type(value).__name__}.")
    try:
        return kind.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}.") from None


def _empty_coder(file: Path) -> BaseSAE:
    config = read_json(file, ("kind", "reads", "writes", "n_features", "activation_function"))
    if config["kind"] not in list(KINDS):
        raise ValueError(f"{file}: 'kind' must be one of {sorted(KINDS)}, got {config['kind']!r}.")
    try:
        return KINDS[config["kind"]](
            _columns(config["reads"]),
            _columns(config["writes"]),
            int(config["n_features"]),
            skip=bool(config.get("skip", False)),
            **config["activation_function"],
        )
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not describe a coder: {error}") from None


def _columns(sites: list[dict[str, Any]]) -> Columns:
    widths = tuple(int(site["width"]) for site in sites)
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be >= 1, got {list(widths)}")
    return Columns(tuple(str(site["site"]) for site in sites), widths)
