"""Attribution graphs as the JSON files that Neuronpedia and open front-ends for them read."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.circuits.circuit import Circuit, Node
from mlxterp.sae.circuits.graph.feature_export import feature_files
from mlxterp.sae.circuits.graph.influence import cumulative
from mlxterp.sae.circuits.storage import plain
from mlxterp.sae.features.display import visible
from mlxterp.sae.files import read_json, write_json
from mlxterp.sites import Site
from mlxterp.version import __version__

GRAPHS, INDEX, FEATURES = "graph_data", "graph-metadata.json", "features"
SCHEMA_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
}
MOST_COMMON = 2 / 3  # of the tokens: features on more of them are not shown by front-ends


def save_attribution_graph(
    circuit: Circuit,
    directory: str | Path,
    slug: str,
    *,
    scan: str | None = None,
    coders: Iterable[BaseSAE] | None = None,
) -> Path:
    """Write a circuit of a prompt in the JSON format of attribution graphs; the path of its file.

        directory/graph_data/{slug}.json       the graph
        directory/graph-metadata.json          the list of graphs, to which it is added
        directory/features/{scan}/{id}.json    examples of each feature

    `slug` names the graph and replaces one of the same name; `scan` names the set of coders, by
    default the model. Files of features are written for `coders`, by default those that the circuit
    was found with, as far as `coder.collect(texts)` has collected their examples. Their ids are the
    pairing of layer and feature `(l + i)(l + i + 1) / 2 + i`.

    Characters that front-ends would take for HTML or for the end of a token's name are replaced by
    others that look alike. Warns of features on more than two thirds of the tokens, which
    front-ends hide. Raises `ValueError` for names with other characters than letters, digits, dots,
    dashes and underscores, for a circuit without tokens, and where a level has no layer of its own.
    """
    directory, origin = Path(directory), getattr(circuit.origin, "replacement", None)
    if scan is None:
        scan = re.sub(r"[^A-Za-z0-9_.-]+", "-", origin.source.name if origin else "").strip("-.")
    slug, scan = _name("slug", slug), _name("scan", scan or "mlxterp")
    index = _read_index(directory / INDEX)
    graph = to_attribution_json(circuit, slug, scan)
    _warn_of_common(circuit)
    known: Iterable[BaseSAE] = origin.coders if origin else ()
    place = directory / FEATURES / scan
    for node, content in feature_files(circuit, known if coders is None else coders):
        write_json(place / f"{feature_id(_layer(node.site), node.index)}.json", content)
    others = [one for one in index["graphs"] if one.get("slug") != slug]
    path = write_json(directory / GRAPHS / f"{slug}.json", graph)
    write_json(directory / INDEX, index | {"graphs": [*others, graph["metadata"]]})
    return path


def to_attribution_json(circuit: Circuit, slug: str, scan: str) -> dict[str, Any]:
    """The content of the file of a graph; raises `ValueError` as `save_attribution_graph` does."""
    if not circuit.tokens or any(node.position is None for node in circuit.nodes):
        raise ValueError("circuit must be one of a prompt, got one over a dataset.")
    layers = [_layer(level) for level in circuit.levels]
    if len(set(layers)) < len(layers):
        raise ValueError(
            f"circuit must have one level in each layer, got {list(circuit.levels)}: the format "
            "tells features apart by their layer."
        )
    nodes = _nodes(circuit, max(layers, default=0) + 1)
    ids = [node["node_id"] for node in nodes]
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": [harmless(token) for token in circuit.tokens],
            "prompt": "".join(circuit.tokens),
            "node_threshold": circuit.facts.get("node_share"),
            "schema_version": SCHEMA_VERSION,
            "info": {"generator": {"name": "mlxterp", "version": __version__}},
            "facts": plain(circuit.facts),
        },
        "qParams": {
            "linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": [], "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": ids[edge.source], "target": ids[edge.target], "weight": edge.weight}
            for edge in circuit.edges
        ],
    }  # fmt: skip


def feature_id(layer: int, feature: int) -> int:
    """One number for a layer and a feature of it: Cantor's pairing."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def harmless(text: str) -> str:
    """The text with hidden characters shown, and without what a browser takes for a tag."""
    return re.sub(r"<(?=[A-Za-z/!?])", "‹", visible(text))


def _nodes(circuit: Circuit, n_layers: int) -> list[dict[str, Any]]:
    shares = np.array([node.influence or 0.0 for node in circuit.nodes])
    known = any(node.influence is not None for node in circuit.nodes)
    reached = (cumulative(shares) if known else np.zeros(len(shares))).tolist()
    likeliest = max((n.value for n in circuit.nodes if n.kind == "logit"), default=0.0)
    found = []
    for node, share in zip(circuit.nodes, reached, strict=True):
        layer, number, feature = _place(node, n_layers)
        is_logit = node.kind == "logit"
        of_feature = node.kind == "feature"
        found.append(
            {
                "node_id": f"{layer}_{number}_{node.position}",
                "feature": feature,
                "layer": layer,
                "ctx_idx": node.position,
                "feature_type": TYPES[node.kind],
                "token_prob": node.value if is_logit else 0.0,
                "is_target_logit": is_logit and node.value == likeliest,
                "run_idx": 0,
                "reverse_ctx_idx": 0,
                # One of each position: front-ends know nodes by it.
                "jsNodeId": f"{'L' if is_logit else layer}_{number}-{node.position}",
                "clerp": _clerp(node),
                "influence": share if known and not is_logit else None,
                "activation": node.value if of_feature else None,
            }
        )
    return found


def _place(node: Node, n_layers: int) -> tuple[str, int, int]:
    """The layer of a node, its number in it, and the id that front-ends group by."""
    if node.kind == "embedding":
        return "E", node.index, int(node.position or 0)
    if node.kind == "logit":
        return str(n_layers + 1), node.index, node.index
    layer = _layer(node.site)
    if node.kind == "error":  # -1 is the number of no feature
        return str(layer), -1, -1
    return str(layer), node.index, feature_id(layer, node.index)


def _clerp(node: Node) -> str:
    """The label; of a logit front-ends read the token between quotes and the probability."""
    if node.kind != "logit":
        return harmless(node.label or "") if node.kind == "feature" else ""
    token = harmless(node.label or f"token {node.index}")
    token = token.replace('"', "”").replace("(p=", "(p꞊")
    return f'Output "{token}" (p={node.value:.3f})'


def _layer(level: str) -> int:
    layer = Site.from_string(level.split(", ")[0]).layer
    if layer is None:
        raise ValueError(f"circuit must have levels that are in a layer, got {level!r}.")
    return layer


def _warn_of_common(circuit: Circuit) -> None:
    counts = Counter((n.site, n.index) for n in circuit.nodes if n.kind == "feature")
    most = len(circuit.tokens) * MOST_COMMON
    common = [f"{site}/{i}" for (site, i), count in counts.items() if count > most]
    if common:
        warnings.warn(
            "Front-ends hide features that are on more than two thirds of the tokens: "
            f"{', '.join(common)}.",
            stacklevel=3,
        )


def _name(what: str, name: str) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{what} must be 1 to 128 letters, digits, dots, dashes and underscores, the first no "
            f"dot or dash, got {name!r}."
        )
    return name


def _read_index(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"graphs": []}
    index = read_json(path, ("graphs",))
    graphs = index["graphs"]
    if not isinstance(graphs, list) or not all(isinstance(known, Mapping) for known in graphs):
        raise ValueError(f"{path} does not hold a list of graphs.")
    return index
