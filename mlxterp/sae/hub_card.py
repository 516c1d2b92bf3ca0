"""The model card of a coder on the Hugging Face Hub: what is known of it, and nothing else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxterp.notebook import render, visible
from mlxterp.sae import visualization
from mlxterp.sae.bound import BoundCoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARD_FILE, FIGURE_FILE = "README.md", "training.png"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CODE = re.compile(r"[\w.:-]+")
MARKS = re.compile(r"[\\`*\[\]|~$@]|(?<!\w)_|_(?!\w)")
TAGS = {"sae": "sparse-autoencoder"}
DEMO = "demo"
WIDEST = 200  # characters of a value
NUMBERS = {
    "fvu": ("FVU", ".4f"), "l0": ("L0", ".1f"), "dead": ("dead", ".1%"), "loss": ("loss", ".4g"),
}  # fmt: skip
FACTS = {
    "training_tokens": "tokens, training", "validation_tokens": "tokens, held out",
    "documents": "documents", "context_length": "context length",
    "name": "name", "n_layers": "layers", "d_model": "width", "dtype": "type of the weights",
    "quantization": "quantisation", "fingerprint": "fingerprint",
}  # fmt: skip


def model_card(
    coder: BoundCoder,
    repo: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    license: str | None = None,
    figure: str | None = None,
) -> str:
    """The text of `README.md` for a coder in the repository `repo`.

    Front matter in YAML, how to load the coder, the last figures of training and validation, labels
    of features, sites, data, model and configuration, each where the coder knows it. `figure` is
    the name of an image beside it, `license` an identifier of the Hub's, such as `mit`. Nothing in
    names or labels is taken for Markdown, HTML or YAML.
    """
    model, statistics = coder.metadata.model, coder.statistics
    rates = statistics.firing_rates
    labels = coder.labels.table if coder.labels else None
    return render(
        "hub_card.md",
        front=_front_matter(coder, license),
        title=_text(f"{_kind(coder)} of {_sites(coder)}{_of_model(model)}"),
        summary=_summary(coder),
        code=_code(coder, repo, revision, subfolder),
        after=_after(model),
        numbers=list(_numbers(statistics.training, statistics.validation)),
        figure=figure,
        caption="Curves of the training" if statistics.training else "How often features fire",
        labelled=_text(labels.title.splitlines()[0]) if labels else "",
        labels=[[*map(_text, row)] for row in (labels.header, *labels.rows)] if labels else [],
        sections=[
            (name, rows)
            for name, rows in (
                ("Coder", _coder_rows(coder, int((rates == 0).sum()) if len(rates) else None)),
                ("Data", _rows(coder.metadata.data)),
                ("Language model", _rows(model)),
                ("Configuration", _settings(coder.metadata.config)),
                ("Source", _settings(coder.metadata.source)),
            )
            if rows
        ],
    )


def figure(coder: BoundCoder) -> Figure | None:
    """The curves of the training or, where they are not known, how often features fire; `None`
    where neither is, or matplotlib is missing."""
    statistics = coder.statistics
    try:
        if any("tokens" in report for report in statistics.training):
            return statistics.plot()
        if len(statistics.firing_rates):
            return visualization.plot_density(statistics.firing_rates)
    except ImportError:
        return None
    return None


def public_name(name: Any) -> str:
    """The name of a model without the directories of this machine."""
    text = str(name or "")
    if text and (Path(text).exists() or not HUB_NAME.fullmatch(text)):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return text


def _front_matter(coder: BoundCoder, license: str | None) -> str:
    import yaml

    kind = getattr(coder, "kind", "coder")
    values: dict[str, Any] = {"library_name": "mlxterp"}
    if license is not None:
        values["license"] = license
    name = public_name(coder.metadata.model.get("name"))
    if HUB_NAME.fullmatch(name):
        values["base_model"] = name
    tags = [TAGS.get(kind, kind.replace("_", "-")), "interpretability", "mlx"]
    return yaml.safe_dump({**values, "tags": tags}, sort_keys=False)


def _kind(coder: BoundCoder) -> str:
    return type(coder).__name__


def _sites(coder: BoundCoder) -> str:
    ends = [
        names[0] if len(names) == 1 else f"{len(names)} sites"
        for names in (coder.reads.names, coder.writes.names)
    ]
    return ends[0] if coder.reads == coder.writes else " to ".join(ends)


def _of_model(model: Mapping[str, Any]) -> str:
    name = public_name(model.get("name"))
    return f" of {name}" if name else ""


def _summary(coder: BoundCoder) -> str:
    known = coder.metadata
    by = _text(f"mlxterp {known.library_version}") if known.library_version else "mlxterp"
    said = f"{coder.n_features:,} features that read {_named(coder.reads.to_list())}"
    if coder.reads != coder.writes:
        said += f" and write {_named(coder.writes.to_list())}"
    origin = known.source.get("format")
    how = f"read from a file of the format {_text(origin)} and saved by" if origin else "made by"
    return f"{said}; {how} {by}."


def _code(coder: BoundCoder, repo: str, revision: str | None, subfolder: str | None) -> str:
    where = {"revision": revision, "subfolder": subfolder}
    given = [json.dumps(repo), *(f"{n}={json.dumps(v)}" for n, v in where.items() if v)]
    name = public_name(coder.metadata.model.get("name"))
    if name == DEMO or HUB_NAME.fullmatch(name):
        model = "demo()" if name == DEMO else f"({json.dumps(name)})"
        return "\n".join(
            [
                "from mlxterp import InterpretableModel\n",
                f"model = InterpretableModel{'.' if name == DEMO else ''}{model}",
                f"sae = model.load_sae({', '.join(given)})",
                'print(sae.analyze_text("Paris is the capital of France"))',
            ]
        )
    return f"from mlxterp.sae import load_sae\n\nsae = load_sae({', '.join(given)})\nprint(sae)"


def _after(model: Mapping[str, Any]) -> str:
    name = public_name(model.get("name"))
    if name == DEMO or HUB_NAME.fullmatch(name):
        return "`sae.visualize_feature(0, dataset=texts)` shows a feature, `sae.dashboard()` all."
    if name:
        return (
            f"The language model, {_text(name)}, is none of the Hub: with it as an "
            "`InterpretableModel`, `model.load_sae` binds the coder to it."
        )
    return "The coder does not know its language model; `sae.bind(model)` tells it."


def _numbers(training: Any, validation: Any) -> Iterable[tuple[str, str, str]]:
    last, held = (reports[-1] if reports else {} for reports in (training, validation))
    for key, (name, form) in NUMBERS.items():
        both = [report.get(key) for report in (last, {} if key == "dead" else held)]
        if any(value is not None for value in both):
            yield name, *(_number(value, form) for value in both)  # type: ignore[misc]


def _number(value: Any, form: str) -> str:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:{form}}" if known else ""


def _coder_rows(coder: BoundCoder, silent: int | None) -> list[tuple[str, str]]:
    options = coder.activation_function.options.items()
    with_k = "".join(f", {name} = {value}" for name, value in options if value is not None)
    sites = [(name, _named(getattr(coder, name).to_list())) for name in ("reads", "writes")]
    return [
        ("kind", _text(_kind(coder))),
        *(sites[:1] if coder.reads == coder.writes else sites),
        ("features", f"{coder.n_features:,}"),
        ("activation function", _text(coder.activation_name + with_k)),
        *[("skip connection", "yes")] * coder.has_skip,
        *[("normalisation of a token", _text(coder.token_norm))] * (coder.token_norm != "none"),
        *([] if silent is None else [("features that never fired", f"{silent:,}")]),
    ]


def _named(sites: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{_text(site['site'])} (width {site['width']:,})" for site in sites)


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The values that are known, as rows of a table."""
    found = {**values, "name": public_name(values["name"])} if "name" in values else values
    return [
        (_text(FACTS.get(name, name.replace("_", " "))), _value(value))
        for name, value in found.items()
        if value not in (None, "", [], {})
    ]


def _settings(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same for values whose names are those that are written in Python."""
    rows = {n: v for n, v in values.items() if v not in (None, "", [], {})}
    plain = {n: f"`{n}`" if n.isidentifier() else _text(n) for n in rows}
    return [(plain[name], _text(value)) for name, value in rows.items()]


def _value(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else _text(value)


def _text(value: Any) -> str:
    """A text that Markdown and HTML show as it is, on one line."""
    text = visible(str(value).strip())
    text = text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
    if CODE.fullmatch(text) and "." in text and not text[0].isdigit():
        return f"`{text}`"
    return MARKS.sub(lambda mark: f"&#{ord(mark[0])};", html.escape(text, quote=False))
