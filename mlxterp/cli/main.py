"""The commands, and how they are told what to do: flags, or a file of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from mlxterp.cli import commands
from mlxterp.cli.settings import add_settings
from mlxterp.sae.evals.evaluating import MAX_TOKENS
from mlxterp.sae.evals.schemas import Schema
from mlxterp.sae.evals.tasks.benchmarks import TASKS
from mlxterp.sae.formats.reading import known_formats
from mlxterp.sae.formats.writing import writable_formats
from mlxterp.version import __version__

KINDS = ("sae", "transcoder", "crosscoder", "cross_layer_transcoder")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 1 where what was asked for cannot be done."""
    parser, by_name = make_parser()
    chosen = parser.parse_args(arguments)
    try:
        if chosen.config is not None:
            command = by_name[chosen.command]
            command.set_defaults(**_read_config(Path(chosen.config), command))
            chosen = parser.parse_args(arguments)
        chosen.run(chosen)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"mlxterp {chosen.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mlxterp {chosen.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands by their names."""
    parser = argparse.ArgumentParser(
        prog="mlxterp", description="Open up MLX language models, and learn the features in them."
    )
    parser.add_argument("--version", action="version", version=f"mlxterp {__version__}")
    several = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    by_name = {}
    for name, (run, add) in _COMMANDS.items():
        what = str(run.__doc__).splitlines()[0]
        command = several.add_parser(name, help=what, description=what)
        command.set_defaults(run=run)
        command.add_argument(
            "-c", "--config", help="a YAML file with values of the flags below, which go before it"
        )
        add(command)
        by_name[name] = command
    return parser, by_name


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=200_000, help="to train on (200,000)")
    parser.add_argument("--save-path", help="where to keep the SAE; default: nowhere")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--kind", choices=KINDS, default="sae")
    parser.add_argument("--layer", type=_layer, nargs="+", help="a number, or the name of a site")
    parser.add_argument("--component", nargs="+", help="such as mlp (the default), attn, residual")
    parser.add_argument("--to-layer", type=_layer, help="of a transcoder; default: the same layer")
    parser.add_argument("--to-component", help="of a transcoder; default: the same component")
    parser.add_argument("--save-path", help="the directory of the coder, such as sae.mlx")
    parser.add_argument("--checkpoint-dir", help="for checkpoints and the log")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    add_settings(parser)


def _add_harvest(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--layer", type=_layer, nargs="+", help="a number, or the name of a site")
    parser.add_argument("--component", nargs="+", help="such as mlp (the default), attn, residual")
    parser.add_argument("--cache-dir", help="where the activations go")
    parser.add_argument(
        "--precision", choices=("bfloat16", "float16", "float32", "int8"), default="bfloat16"
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_coder(parser)
    _add_data(parser)
    parser.add_argument("--json", help="a file for the report")
    parser.add_argument(
        "--schema", choices=get_args(Schema), default="mlxterp", help="whose shape the file has"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, help="that are measured, at random (100,000)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        help="run these in place of the report; all but autointerp need no --data",
    )


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    _add_coder(parser)
    _add_data(parser)
    parser.add_argument("--text", help="show which features fire on which of its tokens")
    parser.add_argument("--feature", type=int, nargs="+", help="show these features")
    parser.add_argument("--collect", action="store_true", help="go over --data again")
    parser.add_argument("--label", action="store_true", help="label all features by their tokens")
    parser.add_argument("--top-k", type=int, default=10)


def _add_dashboard(parser: argparse.ArgumentParser) -> None:
    _add_coder(parser, "the directory of a coder or of a dashboard's bundle")
    _add_data(parser)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--save", help="write one offline HTML file and start no server")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", help="a coder: a file, a directory, or a Hub name")
    parser.add_argument("target", nargs="?", help="where the new one goes")
    parser.add_argument("--format", choices=("mlxterp", *writable_formats()), default="mlxterp")
    parser.add_argument("--source-format", choices=known_formats(), help="if not recognised")
    parser.add_argument("--site", help="where the source does not say it: layers.8.resid_post")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a Hugging Face name or a path; `demo`: the bundled model")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", help="text files, JSON lines, Parquet, a directory, a Hub name; `demo`: Python's"
    )
    parser.add_argument("--max-samples", type=int, help="tokens of the data that are used")
    parser.add_argument("--context-length", type=int, help="tokens of a context (256)")


def _add_coder(parser: argparse.ArgumentParser, what: str = "the directory of a coder") -> None:
    parser.add_argument("path", nargs="?", help=f"{what}, or a coder's name on the Hub, user/name")
    parser.add_argument("--revision", help="a branch, tag or commit on the Hub")
    parser.add_argument("--subfolder", help="of the coder, where there are several on the Hub")
    _add_model(parser)


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", help="the directory of a coder")
    parser.add_argument("repo", nargs="?", help="where it goes to on the Hub, user/name")
    parser.add_argument("--private", action="store_true", default=None, help="make it private")
    parser.add_argument("--revision", help="a branch; it is made where there is none")
    parser.add_argument("--subfolder", help="to keep several coders in one repository")
    parser.add_argument("--license", help="an identifier of the Hub's, such as mit")
    parser.add_argument("--commit-message", help="what the commit is called")
    parser.add_argument(
        "--features", action="store_true", help="also what was collected, with text of its data"
    )
    parser.add_argument(
        "--card", action=argparse.BooleanOptionalAction, default=True, help="write a model card"
    )


_COMMANDS = {
    "demo": (commands.demo, _add_demo),
    "train": (commands.train, _add_train),
    "harvest": (commands.harvest, _add_harvest),
    "eval": (commands.evaluate, _add_eval),
    "analyze": (commands.analyze, _add_analyze),
    "dashboard": (commands.dashboard, _add_dashboard),
    "convert": (commands.convert, _add_convert),
    "push": (commands.push, _add_push),
}


def _layer(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The values of a YAML file, by the names of the flags; raises `ValueError` for others."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold values by their names, got {type(values).__name__}.")
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    found = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(set(found) - set(actions))
    if unknown:
        raise ValueError(f"{path}: unknown names {unknown}; known are {sorted(actions)}.")
    return {name: _checked(path, actions[name], value) for name, value in found.items()}


def _checked(path: Path, action: argparse.Action, value: Any) -> Any:
    """A value as the flag would have given it."""
    if value is None:
        return None
    if isinstance(action, argparse._StoreTrueAction | argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {action.dest} must be true or false, got {value!r}.")
        return value
    several = action.nargs in ("+", "*")
    items = value if several and isinstance(value, list) else [value]
    kind = action.type if callable(action.type) else str
    found = []
    for item in items:
        try:
            found.append(kind(str(item)))
        except (ValueError, argparse.ArgumentTypeError):
            name = getattr(kind, "__name__", "value").strip("_")
            raise ValueError(f"{path}: {action.dest} must be a {name}, got {item!r}.") from None
        if action.choices is not None and found[-1] not in action.choices:
            choices = list(action.choices)
            raise ValueError(f"{path}: {action.dest} must be one of {choices}, got {item!r}.")
    return found if several else found[0]
