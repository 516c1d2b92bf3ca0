"""What the commands do: a few calls of the library each."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlxterp.cli.settings import given_settings
from mlxterp.model import InterpretableModel
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.checkpoint import load_sae
from mlxterp.sae.cross_layer import CrossLayerTrainer
from mlxterp.sae.crosscoder import CrosscoderTrainer
from mlxterp.sae.dashboard.dashboard import open_dashboard
from mlxterp.sae.dashboard.layout import MARKER as BUNDLE
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.sae import SAETrainer
from mlxterp.sae.source import find_site
from mlxterp.sae.steering.sweep import peaked_features
from mlxterp.sae.transcoder import TranscoderTrainer
from mlxterp.texts import python_texts

DEMO = "demo"
TRAINERS: dict[str, Any] = {
    "sae": SAETrainer,
    "transcoder": TranscoderTrainer,
    "crosscoder": CrosscoderTrainer,
    "cross_layer_transcoder": CrossLayerTrainer,
}


def demo(arguments: Namespace) -> None:
    """Train an SAE on the bundled model, measure it, show features and steer with one."""
    model = _model(DEMO)
    dataset = ActivationDataset.from_texts(
        model, python_texts(), 2, "residual", context_length=128, max_samples=arguments.tokens
    )
    print(dataset.info(batch_size=1024))
    sae = model.train_sae(
        layer=2, component="residual", dataset=dataset, save_path=arguments.save_path
    )
    print(sae.evaluate())
    data = sae.collect(max_tokens=200_000)
    for feature_id in data.clearest(3):
        print(f"\n{sae.visualize_feature(feature_id, top_k=4)}")
    for feature_id in peaked_features(sae, model, data.firing_rates, n=1):
        print(f"\n{sae.compare_generations(feature_id, 'The function returns', max_tokens=12)}")


def train(arguments: Namespace) -> None:
    """Train a coder on activations of a model."""
    _needed(arguments, "model", "layer", "data")
    model = _model(arguments.model)
    reads, writes = _ends(arguments, model)
    dataset = _dataset(arguments, model, [*dict.fromkeys((*reads, *writes))])
    trainer = TRAINERS[arguments.kind](checkpoint_dir=arguments.checkpoint_dir)
    coder = trainer.train_between(
        model,
        dataset.columns.those(reads),
        dataset.columns.those(writes),
        dataset,
        save_path=arguments.save_path,
        resume=arguments.resume,
        **given_settings(arguments),
    )
    print(coder.evaluate())
    if coder.path is not None:
        print(f"saved at {coder.path}")


def harvest(arguments: Namespace) -> None:
    """Write a model's activations to a disk, to train on them many times."""
    _needed(arguments, "model", "layer", "data", "cache_dir")
    model = _model(arguments.model)
    sites = _sites(model, arguments.layer, arguments.component or [None])
    dataset = _dataset(
        arguments, model, [*sites],
        cache_dir=arguments.cache_dir, precision=arguments.precision, verbose=True,
    )  # fmt: skip
    print(dataset.info())


def evaluate(arguments: Namespace) -> None:
    """Measure a coder: fidelity, sparsity, and the model's loss with it in place; or by tasks."""
    coder, model = _coder(arguments)
    sites = list(coder.reads.union(coder.writes).names)
    if arguments.tasks is not None:
        data = None if arguments.data is None else _dataset(arguments, model, sites)
        found = coder.benchmark(arguments.tasks, dataset=data)
    else:
        _needed(arguments, "data")
        found = coder.evaluate(
            dataset=_dataset(arguments, model, sites), max_tokens=arguments.max_tokens
        )
    print(found)
    if arguments.json is not None:
        found.to_json(arguments.json, schema=arguments.schema)


def analyze(arguments: Namespace) -> None:
    """Show what features respond to, or which of them a text activates."""
    coder, model = _coder(arguments)
    if arguments.text is not None:
        print(coder.analyze_text(arguments.text, top_k=arguments.top_k))
        return
    if coder.features is None or arguments.collect:
        _needed(arguments, "data")
        coder.collect(_dataset(arguments, model, list(coder.reads.union(coder.writes).names)))
    if arguments.label:
        print(coder.auto_label_features())
        return
    data = coder.features
    if data is None:
        raise ValueError("Nothing was collected.")
    print(data)
    for feature_id in arguments.feature or data.clearest(3):
        print(f"\n{coder.visualize_feature(feature_id, top_k=arguments.top_k)}")


def dashboard(arguments: Namespace) -> None:
    """Look at a coder, or at a dashboard's bundle, in a browser, or write one HTML file."""
    if arguments.path is None:
        raise ValueError("Give the directory of a coder or of a dashboard's bundle.")
    if (Path(arguments.path) / BUNDLE).is_file():
        given = [f"--{name}" for name in ("model", "data") if getattr(arguments, name) is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} would go with a coder, and {arguments.path} is a bundle."
            )
        made = open_dashboard(arguments.path)
    else:
        coder, model = _coder(arguments)
        sites = list(coder.reads.union(coder.writes).names)
        data = None if arguments.data is None else _dataset(arguments, model, sites)
        made = coder.dashboard(validation_dataset=data, port=None)
    if arguments.save is not None:
        print(f"saved at {made.save(arguments.save)}")
        return
    print(f"{made.start(arguments.host, arguments.port)}; Ctrl-C ends it", flush=True)
    made.wait()


def push(arguments: Namespace) -> None:
    """Upload a coder to the Hugging Face Hub, with a model card."""
    if None in (arguments.path, arguments.repo):
        raise ValueError("Give the directory of a coder, and user/name.")
    names = ("private", "revision", "subfolder", "license", "commit_message", "features", "card")
    options = {name: getattr(arguments, name) for name in names}
    print(load_sae(arguments.path).push_to_hub(arguments.repo, **options))


def convert(arguments: Namespace) -> None:
    """Turn a coder of another library into one of mlxterp, or one of mlxterp into another's."""
    _needed(arguments, "source", "target")
    coder = load_sae(arguments.source, arguments.site, arguments.source_format)
    ours = arguments.format == "mlxterp"
    target = arguments.target
    path = coder.save(target) if ours else coder.export(arguments.format, target)
    print(coder, f"saved at {path}", sep="\n")


def _needed(arguments: Namespace, *names: str) -> None:
    missing = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given, as a flag or in the config.")


def _model(name: str) -> InterpretableModel:
    print(f"loading {name}", flush=True)  # takes seconds
    return InterpretableModel.demo() if name == DEMO else InterpretableModel(name)


def _ends(
    arguments: Namespace, model: InterpretableModel
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites that a coder reads and those that it writes."""
    kind, layers, components = arguments.kind, arguments.layer, arguments.component or [None]
    counts = {"layer": layers} if kind in ("sae", "transcoder") else {}
    if kind != "crosscoder":
        counts["component"] = components
    for name, values in counts.items():
        if len(values) > 1:
            raise ValueError(f"--{name} of a {kind} must be one, got {values}.")
    to = arguments.to_layer, arguments.to_component
    if kind == "transcoder":
        layer = layers if to[0] is None else [to[0]]
        return _sites(model, layers, components), _sites(model, layer, [to[1] or components[0]])
    if kind == "cross_layer_transcoder":
        ends = components[0] or "mlp_in", to[1] or "mlp_out"
        to = to[0], None
    if to != (None, None):
        raise ValueError(f"--to-layer and --to-component are for transcoders, not for a {kind}.")
    if kind == "cross_layer_transcoder":
        return _sites(model, layers, [ends[0]]), _sites(model, layers, [ends[1]])
    sites = _sites(model, layers, components)
    return sites, sites


def _sites(
    model: InterpretableModel, layers: Iterable[Any], components: Iterable[str | None]
) -> tuple[str, ...]:
    """The names of the sites of all layers and components."""
    return tuple(str(find_site(model, a, b)) for a in layers for b in components)


def _dataset(
    arguments: Namespace, model: InterpretableModel, sites: list[str], **options: Any
) -> ActivationDataset:
    """The data that were named, of some sites."""
    settings = {"context_length": arguments.context_length, "max_samples": arguments.max_samples}
    given = {name: value for name, value in settings.items() if value is not None}
    data = python_texts() if arguments.data == DEMO else arguments.data
    if given or options or arguments.data == DEMO:
        return ActivationDataset.from_texts(model, data, sites, **given, **options)
    return ActivationDataset.of(model, data, sites, verbose=True)


def _coder(arguments: Namespace) -> tuple[BaseSAE, InterpretableModel]:
    """The coder at a path, bound to the model that is named, or to the one that it is of."""
    if arguments.path is None:
        raise ValueError("Give the directory of a coder, or its name on the Hub.")
    where = {"revision": arguments.revision, "subfolder": arguments.subfolder}
    name = arguments.model or load_sae(arguments.path, **where).metadata.model.get("name")
    if not name:
        raise ValueError(f"{arguments.path} does not say of which model it is: give --model.")
    model = _model(name)
    return model.load_sae(arguments.path, **where), model
