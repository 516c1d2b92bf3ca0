"""Circuits that are made up, and texts that are hard to show."""

import numpy as np

from mlxterp.sae.circuits.circuit import Circuit, Edge, Node

LEVELS = ("layers.8.resid_post", "layers.10.resid_post", "layers.12.resid_post")
TOKENS = ("The", " capital", " of", " France", " is", " the", " city", " of", " Paris")
NASTY = (
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "<!-- --> ]]>",
    "a\u202eb\x00c\nnew", "$\\frac{1", "日本語のラベルはとても長い", "🙂 مرحبا", "W" * 300,
    "' \" & ` {{ 7*7 }} {% x %}", "\ud800 lone", "\u2028",
)  # fmt: skip


def small() -> Circuit:
    """Three layers with errors; the strongest edge is that of an error."""
    nodes = (
        Node("feature", LEVELS[0], 42, value=1.5, label="French words"),
        Node("feature", LEVELS[0], 7),
        Node("feature", LEVELS[1], 5),
        Node("feature", LEVELS[2], 91),
        Node("error", LEVELS[0], -1),
    )
    edges = (
        Edge(0, 2, 2.0, share=0.75, consistency=1.0, n=24),
        Edge(1, 2, -1.0, share=0.5, consistency=0.9, n=24),
        Edge(2, 3, 0.5, share=1.0, consistency=0.8, n=12, measured=0.25),
        Edge(4, 2, -3.0, n=24),
        Edge(4, 3, 0.1, n=12),
    )
    facts = {"method": "gradient", "explained": 0.831, "errors": np.float32(0.1), "more": [1, 2]}
    return Circuit(nodes, edges, LEVELS, facts=facts)


def over_dataset(n: int = 12, n_edges: int = 60, seed: int = 0) -> Circuit:
    """Features of three layers, `n` each, and random edges."""
    rng = np.random.default_rng(seed)
    nodes = tuple(
        Node("feature", level, i, label="some words " * int(i % 3) or None)
        for level in LEVELS
        for i in range(n)
    )
    pairs = {
        (a, b) for a, b in np.sort(rng.integers(0, 3 * n, (9 * n_edges, 2))).tolist()
        if a // n < b // n
    }  # fmt: skip
    edges = [Edge(a, b, float(rng.normal())) for a, b in sorted(pairs)[:: len(pairs) // n_edges]]
    return Circuit(nodes, tuple(sorted(edges, key=lambda e: -abs(e.weight)))[:n_edges], LEVELS)


def over_prompt() -> Circuit:
    """One of every kind of node, and several features at one place."""
    nodes = (
        Node("embedding", "", 3, 3),
        Node("feature", LEVELS[0], 11, 3),
        Node("feature", LEVELS[0], 12, 3),
        Node("error", LEVELS[0], -1, 3),
        Node("feature", LEVELS[1], 20, 8),
        Node("logit", "", 77, 8, value=0.61, label=" Paris"),
    )
    weights = {(0, 1): 1.0, (0, 2): 0.5, (3, 4): 0.7, (1, 4): -0.8, (2, 4): 0.2, (4, 5): 2.0}
    edges = tuple(Edge(a, b, w) for (a, b), w in weights.items())
    return Circuit(nodes, edges, LEVELS, TOKENS)


def nasty() -> Circuit:
    """Texts that are hard to show, everywhere."""
    levels = ("layers.0.<b>", "layers.1.mlp")
    nodes = tuple(
        Node("feature", levels[i % 2], i, i // 2, label=text) for i, text in enumerate(NASTY)
    ) + tuple(Node(kind, "", 1, 0, label=NASTY[1]) for kind in ("embedding", "logit"))
    edges = tuple(Edge(i, i + 1, (-1.0) ** i) for i in range(0, len(NASTY) - 1, 2))
    ends = Edge(len(NASTY), 0, 1.0), Edge(1, len(NASTY) + 1, -2.0)
    return Circuit(nodes, edges + ends, levels, NASTY[:6], {NASTY[0]: NASTY[1]})
