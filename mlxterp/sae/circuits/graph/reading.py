"""Attribution graphs out of the JSON files of Neuronpedia, circuit-tracer and of `export`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxterp.sae.circuits.circuit import Circuit, Edge, Node
from mlxterp.sae.circuits.graph.export import TYPES
from mlxterp.sae.files import read_json

LARGEST = 1 << 30  # bytes of a file
KINDS = {kind: name for name, kind in TYPES.items()}
LOGIT = re.compile(r'Output "(.*)" \(p=[\d.e-]+\)', re.DOTALL)


def load_attribution_graph(path: str | Path, component: str = "mlp_out") -> Circuit:
    """The circuit in a JSON file of an attribution graph.

    The file names the layers of features and not what they write: that is the `component` of each.
    Labels of features are those in the file. Its influences are sums over nodes, and are not read.
    Raises `ValueError`, naming the file, for anything else than a graph, for kinds of nodes that
    are not known, and for links between nodes that are not there or have an id in common.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST:,} bytes.")
    graph = read_json(path, ("metadata", "nodes", "links"))
    try:
        about = graph["metadata"]
        tokens = tuple(_typed(token, str) for token in _typed(about["prompt_tokens"], list))
        nodes = [_node(node, component, len(tokens)) for node in _typed(graph["nodes"], list)]
        numbers: dict[str, list[int]] = {}
        for i, node in enumerate(graph["nodes"]):
            numbers.setdefault(_typed(node["node_id"], str), []).append(i)
        edges = [_edge(link, numbers) for link in _typed(graph["links"], list)]
        levels = {node.site: _layer(node.site) for node in nodes if node.site}
        return Circuit(
            tuple(nodes),
            tuple(sorted(edges, key=lambda edge: -abs(edge.weight))),
            tuple(sorted(levels, key=lambda level: levels[level])),
            tokens,
            _facts(about),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} does not hold an attribution graph: {error}.") from None


def _node(node: Mapping[str, Any], component: str, n_tokens: int) -> Node:
    kind = KINDS.get(node["feature_type"])
    if kind is None:
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"'feature_type' must be one of {known}, got {node['feature_type']!r}")
    position, label = _typed(node["ctx_idx"], int), node.get("clerp") or None
    if not 0 <= position < n_tokens:
        raise ValueError(f"'ctx_idx' must be below {n_tokens}, got {position}")
    if kind in ("embedding", "logit"):
        match = LOGIT.fullmatch(label or "")
        value = _number(node.get("token_prob", 0.0)) if kind == "logit" else 0.0
        return Node(kind, "", _index(node), position, value, label=match[1] if match else None)
    layer = int(_typed(node["layer"], str))
    site = f"layers.{layer}.{component}"
    if kind == "error":
        return Node("error", site, -1, position)
    value = _number(node.get("activation") or 0.0)
    return Node("feature", site, _index(node), position, value, label=label and _typed(label, str))


def _index(node: Mapping[str, Any]) -> int:
    """The number of a feature, or the id of a token: the second part of `{layer}_{index}_{pos}`."""
    match = re.fullmatch(r"\w+?_(\d+)_\d+", _typed(node["node_id"], str))
    if match is None:
        raise ValueError(f"'node_id' must be as '3_42_7', got {node['node_id']!r}")
    return int(match[1])


def _edge(link: Mapping[str, Any], numbers: Mapping[str, list[int]]) -> Edge:
    source, target = (numbers.get(link[end], []) for end in ("source", "target"))
    if len(source) != 1 or len(target) != 1:
        raise ValueError(
            f"a link is from {link['source']!r} to {link['target']!r}, and each must be the id of "
            "one node"
        )
    return Edge(source[0], target[0], _number(link["weight"]))


def _facts(about: Mapping[str, Any]) -> dict[str, Any]:
    facts = about.get("facts")
    said = {key: about[key] for key in ("slug", "scan") if isinstance(about.get(key), str)}
    return {**(facts if isinstance(facts, dict) else {}), **said}


def _layer(site: str) -> int:
    return int(site.split(".")[1])


def _number(value: Any) -> float:
    return float(_typed(value, (int, float)))


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not of the type that it should be")
    return value
