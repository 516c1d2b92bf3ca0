"""Reading coders from disk, ours and those of other libraries; `BaseSAE.save` writes ours.

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

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae import hub
from mlxterp.sae.base import CONFIG_FILE, FORMAT_VERSION, BaseSAE
from mlxterp.sae.coder import MARKER, Columns
from mlxterp.sae.cross_layer import CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder
from mlxterp.sae.files import check_keys, read_arrays, read_json, recover
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.formats.tensors import check_finite
from mlxterp.sae.metadata import Metadata, Statistics
from mlxterp.sae.sae import SAE
from mlxterp.sae.transcoder import Transcoder

logger = logging.getLogger("mlxterp")

Files = dict[str, dict[str, Any]]  # the JSON files of a saved coder
KINDS: dict[str, type[BaseSAE]] = {
    kind.kind: kind for kind in (SAE, Transcoder, Crosscoder, CrossLayerTranscoder)
}


def load_sae(
    path: str | Path,
    site: str | None = None,
    format: str | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> BaseSAE:
    """The coder saved at a path, of the class that it was saved from, or one of another library.

    `path` may also be the name of a repository on the Hugging Face Hub, `user/name`, with a branch,
    tag or commit as `revision` and, where it holds several coders, the `subfolder` of one; see
    `hub.pull`. `format` is the name of another library's format, for a file that is not recognised;
    `site` is the place in the model, such as `layers.8.resid_post`, for a file that does not say
    it. `coder.metadata.source["format"]` says what was read, if not a coder of mlxterp.

    Raises `FileNotFoundError` where there is nothing, and `ValueError`, naming file and key, for a
    file that is missing, cut short, of a later version, or of other shapes than the
    configuration says. Nothing is returned half-loaded. From the Hub, also `ConnectionError` and
    `PermissionError`.
    """
    if not Path(path).exists():
        recover(Path(path).parent, Path(path).name)
    if hub.is_name(path):
        return _pulled(str(path), site, format, revision, subfolder)
    if revision is not None or subfolder is not None:
        raise ValueError(f"revision and subfolder are of names on the Hub, user/name; got {path}.")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no saved coder at {path}.")
    if format is not None or not _is_ours(path):
        from mlxterp.sae.formats.reading import read_foreign

        parts = read_foreign(path, site, format)
        logger.info("%s is read as %s", path, parts.metadata.source["format"])
        try:
            return build(parts)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from None
    if site is not None:
        raise ValueError(f"{path} says itself which sites it is of; got site={site!r}.")
    return _load(path)


def _pulled(
    repo: str, site: str | None, format: str | None, revision: str | None, subfolder: str | None
) -> BaseSAE:
    """A coder of the Hub. What is found out about it is not written to the Hub's cache."""
    try:
        path = hub.pull(repo, revision, subfolder)
    except (FileNotFoundError, ConnectionError) as error:
        message = f"There is no saved coder at {repo}, and as a name on the Hub: {error}"
        raise type(error)(message) from error
    coder = load_sae(path, site, format)
    coder.detach()
    return coder


def build(parts: Parts) -> BaseSAE:
    """The coder of what a file of another library holds.

    Raises `ValueError` for arrays that are missing, unknown, of other shapes than the sites and the
    number of features say, or not finite, and for all that the coder's class refuses.
    """
    if parts.kind not in KINDS:
        raise ValueError(f"kind must be one of {sorted(KINDS)}, got {parts.kind!r}.")
    if "b_enc" not in parts.arrays or parts.arrays["b_enc"].ndim != 1:
        raise ValueError("'b_enc' must be there, one number for each feature.")
    coder = KINDS[parts.kind](
        parts.reads, parts.writes, parts.n_features, parts.activation_function,
        skip="W_skip" in parts.arrays, token_norm=parts.token_norm, **parts.options,
    )  # fmt: skip
    expected = _arrays(coder)
    unknown = sorted(parts.arrays.keys() - expected.keys())
    missing = sorted(expected.keys() - parts.arrays.keys() - {"site_scale"})
    if unknown or missing:
        raise ValueError(f"arrays are missing, {missing}, or unknown, {unknown}.")
    for name, array in parts.arrays.items():
        shape = tuple(expected[name].shape)
        if tuple(array.shape) != shape:
            raise ValueError(f"{name!r} must have shape {shape}, got {tuple(array.shape)}.")
        check_finite(array, repr(name))
        coder.set_array(name, array.astype(mx.float32))
    rates = np.asarray(parts.firing_rates, dtype=np.float64)
    if rates.shape not in ((0,), (coder.n_features,)) or not np.all((rates >= 0) & (rates <= 1)):
        raise ValueError(f"firing rates must be {coder.n_features} shares in [0, 1] or none.")
    coder.metadata, coder.statistics = parts.metadata, Statistics(firing_rates=rates)
    return coder


def _is_ours(path: Path) -> bool:
    if not path.is_dir():
        return False
    if (path / MARKER).is_file():
        return True
    try:
        return "format_version" in read_json(path / CONFIG_FILE)
    except ValueError:
        return False


def _load(path: Path) -> BaseSAE:
    file = path / CONFIG_FILE
    version = read_json(file, ("format_version",))["format_version"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{file}: 'format_version' must be a whole number >= 1, got {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version}, which a newer mlxterp wrote; this one reads up "
            f"to {FORMAT_VERSION}: upgrade mlxterp."
        )
    names = (CONFIG_FILE, "metadata.json", "statistics.json")
    files = {name: read_json(path / name) for name in names}
    for upgrade in UPGRADES[version - 1 :]:
        upgrade(files)
    coder = _empty_coder(file, files[CONFIG_FILE])
    metadata = _described(Metadata, path, files, "metadata.json")
    statistics = _described(Statistics, path, files, "statistics.json")
    if len(statistics.firing_rates) not in (0, coder.n_features):
        raise ValueError(
            f"{path / 'statistics.json'}: 'firing_rates' must have {coder.n_features} entries or "
            f"none, got {len(statistics.firing_rates)}."
        )
    for name, arrays in coder.array_files().items():
        shapes = {key: tuple(array.shape) for key, array in arrays.items()}
        for key, array in read_arrays(path / name, shapes).items():
            coder.set_array(key, array)
    coder.metadata, coder.statistics, coder.path = metadata, statistics, path
    return coder


def _to_version_2(files: Files) -> None:
    """Coders may normalise tokens, and may come from other libraries."""
    files[CONFIG_FILE].setdefault("token_norm", "none")
    files["metadata.json"].setdefault("source", {})


# What brings the files of each version, the first one first, to the next one.
UPGRADES: tuple[Callable[[Files], None], ...] = (_to_version_2,)


def _arrays(coder: BaseSAE) -> dict[str, mx.array]:
    return {key: array for arrays in coder.array_files().values() for key, array in arrays.items()}


def _described(kind: type[Metadata] | type[Statistics], path: Path, files: Files, name: str) -> Any:
    empty, values, file = kind().to_dict(), files[name], path / name
    check_keys(file, values, tuple(empty))
    for key, value in empty.items():
        if not isinstance(values[key], type(value)):
            raise ValueError(f"{file}: {key!r} must be a {type(value).__name__}.")
    try:
        return kind.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}.") from None


def _empty_coder(file: Path, config: dict[str, Any]) -> BaseSAE:
    check_keys(
        file, config,
        ("kind", "reads", "writes", "n_features", "activation_function", "token_norm"),
    )  # fmt: skip
    if config["kind"] not in list(KINDS):
        raise ValueError(f"{file}: 'kind' must be one of {sorted(KINDS)}, got {config['kind']!r}.")
    try:
        return KINDS[config["kind"]](
            _columns(config["reads"]),
            _columns(config["writes"]),
            int(config["n_features"]),
            skip=bool(config.get("skip", False)),
            token_norm=config["token_norm"],
            **config["activation_function"],
        )
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not describe a coder: {error}") from None


def _columns(sites: list[dict[str, Any]]) -> Columns:
    widths = tuple(int(site["width"]) for site in sites)
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be >= 1, got {list(widths)}")
    return Columns(tuple(str(site["site"]) for site in sites), widths)
