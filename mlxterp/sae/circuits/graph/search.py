"""Attribution graphs: which features, errors and tokens a model's next token is due to."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.circuits.behavior.targets import Token
from mlxterp.sae.circuits.circuit import Circuit, Node
from mlxterp.sae.circuits.cost import GraphCost
from mlxterp.sae.circuits.given import check_counts, token_ids
from mlxterp.sae.circuits.graph.attribution_graph import AttributionGraph
from mlxterp.sae.circuits.graph.checks import (
    ErrorNodes,
    affine_error,
    check_affine,
    check_interventions,
    check_pruning,
    checked,
    tolerance,
)
from mlxterp.sae.circuits.graph.influence import Adjacency, Extent
from mlxterp.sae.circuits.graph.readouts import (
    find_logits,
    logits_above_mean,
    target_groups,
    with_slopes_of_head,
)
from mlxterp.sae.circuits.graph.replacement import Replacement, Run
from mlxterp.sae.memory import device_memory
from mlxterp.sae.source import ActivationSource

Transcoders = Mapping[int, BaseSAE] | BaseSAE

MOST_FEATURES = 4096
TURNS = 16  # in which features are chosen by their influence, if there are many
FEATURES_PER_TURN = 256
SAMPLE = 96  # features that an estimate looks at


def find_attribution_graph(
    model: ActivationSource | None = None,
    transcoders: Transcoders | None = None,
    prompt: str | Sequence[int] = "",
    targets: Sequence[Token] | Token | None = None,
    *,
    max_features: int | None = MOST_FEATURES,
    node_share: float = 0.8,
    edge_share: float = 0.98,
    errors: ErrorNodes = "pruned",
    n_interventions: int = 8,
    seed: int = 0,
    verbose: bool = True,
) -> Circuit:
    """What the next token is due to: an attribution graph of transcoders, `{layer: transcoder}`, or
    of one cross-layer transcoder.

    On this prompt the coders stand in the place of MLPs, with their errors kept, and attention
    patterns, norm scales and all other MLPs are held at their values. Then the logits of the
    `targets`, less the mean logit, and the features before their activation function are affine in
    what features, errors and embeddings write, and every edge is an exact effect:

        value = bias + sum of edges
        edge of feature i at t = z[t, i] W_dec[i] . d value / d written[t], patterns and scales held

    Targets are tokens at the last position, by text or id; by default those likeliest that have
    95 % of the probability, at most 10. Of the features that fire, those are looked at that have
    any influence on the targets, at most `max_features`, the most influential first. The circuit is
    the part that `AttributionGraph.circuit` chooses by `node_share`, `edge_share` and `errors`;
    `circuit.origin` is the whole `AttributionGraph`, to prune it anew and to `validate`.

    `facts["checks"]` has what was checked: how far edges and bias are from adding up to the values
    (`affine_error`) and from what doubling `n_interventions` random sources does
    (`intervention_error`), both relative to the largest value; how far influences are from adding
    up to the targets' probability (`conservation_error`). It also has the scores of the graph,
    before and after pruning, and the mean length of its paths.
    Where a head caps its logits, its slopes stand in its place (`facts["head"]`).

    `attribution_graph_cost` says beforehand what it takes. Raises `ValueError` for coders of
    another model or of anything but MLPs, unknown tokens, and a model that is not affine when held;
    and `MemoryError` where the effects would not fit.

    Reference: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language
    Models"; Dunefsky et al. 2024, arXiv 2406.11944.
    """
    check_counts(n_interventions=n_interventions)
    check_pruning(Extent(node_share, edge_share), errors)
    search = _search(model, transcoders, prompt, targets, max_features)
    graph = search.graph(n_interventions, seed, verbose)
    return graph.circuit(node_share, edge_share, errors)


def attribution_graph_cost(
    model: ActivationSource | None = None,
    transcoders: Transcoders | None = None,
    prompt: str | Sequence[int] = "",
    targets: Sequence[Token] | Token | None = None,
    *,
    max_features: int | None = MOST_FEATURES,
) -> GraphCost:
    """What `find_attribution_graph` would take with the same arguments, at most: features without
    influence on the targets are not known yet. A few derivatives are taken to see how long that
    takes. Raises `ValueError` as it does."""
    return _search(model, transcoders, prompt, targets, max_features).cost()


def _search(
    model: ActivationSource | None,
    transcoders: Transcoders | None,
    prompt: str | Sequence[int],
    targets: Sequence[Token] | Token | None,
    max_features: int | None,
) -> _Search:
    """Check everything, and find what fires; raises `ValueError`."""
    check_counts(max_features=max_features)
    source, coders = checked(model, transcoders)
    ids = token_ids(source, prompt)
    logits = find_logits(source, ids, targets)
    r = Replacement(source, [*coders.values()], ids)
    allowed = tolerance(source, r.tokens)
    check_affine(r, allowed)
    outputs: Run = logits_above_mean(source, [node.index for node in logits])
    rows, head = r.rows(outputs, len(logits)), ""
    if not affine_error(r, outputs, rows) <= allowed:
        outputs = with_slopes_of_head(r, outputs, len(logits))
        rows = r.rows(outputs, len(logits))
        head = "caps its logits: its slopes at their plain values stand in its place"
    limit = min(len(r.features), max_features or len(r.features))
    return _Search(r, logits, outputs, rows, head, limit)


@dataclass(frozen=True, eq=False)
class _Search:
    """What is traced back, and how many features at most."""

    replacement: Replacement
    logits: tuple[Node, ...]
    outputs: Run
    rows: np.ndarray
    head: str
    limit: int

    @property
    def n_bytes(self) -> int:
        """The size of all effects."""
        return 4 * (len(self.logits) + self.limit) * self.replacement.n_sources

    def cost(self) -> GraphCost:
        """Take a few derivatives, and see how many there are."""
        r, seconds = self.replacement, 0.0
        n = len(r.features)
        some = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(int))
        for group in target_groups(r, self.outputs, len(self.logits), some):
            for _ in range(2):  # the first time more is to be done
                started = time.perf_counter()
                r.rows(group.run, len(group.numbers))
                took = time.perf_counter() - started
            seconds += took * self.limit / len(some)
        n_passes = -(-self.limit // r.rows_per_pass)
        return GraphCost(n, r.n_sources, self.limit, n_passes, self.n_bytes, seconds)

    def graph(self, n_interventions: int, seed: int, verbose: bool) -> AttributionGraph:
        """Take all derivatives, and check them."""
        self._check_memory()
        weights, targets = self._expanded(verbose)
        r, rng = self.replacement, np.random.default_rng(seed)
        used = np.flatnonzero(weights.any(axis=0))
        drawn = rng.permutation(used)[:n_interventions].tolist()
        place = {target: i for i, target in enumerate(targets.tolist())}
        affine, effects = [], []
        for group in target_groups(r, self.outputs, len(self.logits), targets):
            rows = weights[[place[number] for number in group.numbers.tolist()]]
            affine.append(affine_error(r, group.run, rows))
            effects.append(check_interventions(r, group.run, rows, drawn) if drawn else 0.0)
        errors = {"affine_error": max(affine), "intervention_error": max(effects)}
        if not max(errors.values()) <= tolerance(r.source, r.tokens):
            warnings.warn(
                "Edges are not exact: what sources add to a value is wrong by up to "
                f"{max(errors.values()):.2g} of the largest.",
                stacklevel=3,
            )
        checks = errors | {"n_interventions": len(drawn)}
        return AttributionGraph(r, self.logits, self.outputs, weights, targets, checks, self.head)

    def _expanded(self, verbose: bool) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the logits and, after them, those of features, the most influential first by
        what is known of them at each turn."""
        r, n_logits = self.replacement, len(self.logits)
        weights = np.zeros((n_logits + self.limit, r.n_sources), np.float32)
        targets = np.arange(r.n_sources, r.n_sources + n_logits)
        weights[:n_logits] = self.rows
        starts = np.zeros(r.n_sources + n_logits)
        starts[r.n_sources :] = [node.value for node in self.logits]
        sources, per_turn = np.arange(r.n_sources), max(FEATURES_PER_TURN, self.limit // TURNS)
        with tqdm(total=self.limit, desc="attribution", unit="feature", disable=not verbose) as bar:
            while (n := len(targets)) < len(weights):
                known = Adjacency(weights[:n], targets, sources, starts)
                influences = known.influences()[: len(r.features)]
                influences[targets[n_logits:]] = 0
                chosen = np.argsort(-influences, kind="stable")[: min(per_turn, len(weights) - n)]
                chosen = chosen[influences[chosen] > 0]
                if not len(chosen):
                    break
                for group in target_groups(r, self.outputs, n_logits, chosen):
                    count = len(group.numbers)
                    weights[len(targets) : len(targets) + count] = r.rows(group.run, count)
                    targets = np.concatenate([targets, group.numbers])
                    bar.update(count)
            bar.total = bar.n  # features without influence are left out
            bar.refresh()
        return weights[: len(targets)], targets

    def _check_memory(self) -> None:
        memory = device_memory()
        if memory is not None and self.n_bytes > 0.9 * memory.free:
            raise MemoryError(
                f"The effects of {self.replacement.n_sources:,} sources on {self.limit:,} features "
                f"take {self.n_bytes / 2**30:.1f} GiB, {memory.free / 2**30:.1f} GiB are free: "
                "lower max_features, or shorten the prompt."
            )
