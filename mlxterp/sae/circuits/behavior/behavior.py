"""The circuit of one behaviour: which features a number is due to on one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from tqdm.auto import tqdm

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.circuits.behavior.ablation import Prompt, find_states, special
from mlxterp.sae.circuits.behavior.faithfulness import Behavior
from mlxterp.sae.circuits.behavior.flows import Way, find_flow
from mlxterp.sae.circuits.behavior.targets import Metric, Token, find_target
from mlxterp.sae.circuits.circuit import Circuit
from mlxterp.sae.circuits.given import (
    Method,
    any_ids,
    check_choice,
    check_counts,
    check_one_pass,
    fitting,
)
from mlxterp.sae.source import ActivationSource

ErrorsOnTheWay = Literal["kept", "nodes"]
Text = str | Sequence[int]


def find_behavior_circuit(
    model: ActivationSource | None = None,
    saes: Mapping[int, BaseSAE] | None = None,
    prompt: Text = "",
    target: Token | tuple[Token, Token] | None = None,
    *,
    feature: tuple[int, int] | None = None,
    metric: Metric | None = None,
    position: int = -1,
    corrupted: Text | None = None,
    mean_of: Iterable[str] | None = None,
    errors: ErrorsOnTheWay = "kept",
    method: Method = "integrated_gradients",
    n_steps: int | None = None,
    n_nodes: int | None = None,
    node_share: float = 0.8,
    edge_share: float = 0.95,
    verbose: bool = True,
) -> Circuit:
    """The features that make a model do one thing on one prompt, and how they act on each other.

    What is explained is one number at a `position`, the last by default: the logit of the `target`
    token (text or id; by default the likeliest), the logit of the first less that of the second of
    a pair of tokens, the value of a `feature` `(layer, feature_id)` before its activation function,
    or `metric(logits [1, S, vocabulary])`.

    Nodes are features, and errors of coders, at positions. The effect of a node on the number is

        (z - z0) W_dec . mean of d number / d what the coder writes there

    where `z0` is 0, the value on a `corrupted` prompt of as many tokens, or the mean over the
    tokens of the texts `mean_of`. The derivative is averaged over `n_steps` midpoints of the way
    from `z0` of all features of the coder to `z` (`method="integrated_gradients"`): by default over
    9, 27, 81 or 243, until the effects of the coder add up to what the number is above that with
    `z0` but for 1 %; the `gap` that is left is in `facts`. With `"gradient"` it is taken at the end
    alone, which says what a small change does and nothing of what is saturated. With `"ablation"`
    effects are measured, one by one, for the 1024 nodes of each coder that are strongest by
    integrated gradients. Errors stay on the way, or go it with the features (`errors="nodes"`).

    The weight of an edge is the part of the number that flows along it: the effect of the source on
    the value of the target before its activation function, coders between them held, times the
    mean derivative of the number by this value. Edges only begin at errors.

    Kept are the strongest nodes of each coder that make up `node_share` of the sizes of all its
    effects, or the `n_nodes` of all coders whose own shares (`Node.influence`) are the largest; of
    the edges between them the strongest that make up `edge_share`, and the strongest of each node.

    `facts` says how faithful and how complete the circuit is, all other features being set to `z0`;
    `circuit.origin` is a `Behavior`, which measures more of this and finds minimal circuits.

    Raises `ValueError` for coders that do not fit the model or each other, or that read a site
    after they have written an earlier one, as crosscoders do; for a prompt in which all tokens are
    special, an unknown target, and a corrupted prompt of another length.

    References: Marks et al. 2024, arXiv 2403.19647; Sundararajan et al. 2017, arXiv 1703.01365.
    """
    check_choice("method", method, get_args(Method))
    check_choice("errors", errors, get_args(ErrorsOnTheWay))
    _check_sizes(n_steps, n_nodes, node_share=node_share, edge_share=edge_share)
    if not saes:
        raise ValueError("saes must hold the coder of one layer or more, {layer: coder}, got none.")
    coders = {layer: saes[layer] for layer in sorted(saes)}
    source = fitting(model, coders, whole=True)
    check_one_pass(source, coders)
    ids = _ids(source, "prompt", prompt)
    if corrupted is not None and mean_of is not None:
        raise ValueError("Give corrupted or mean_of: one value takes the place of a feature's.")
    other = None if corrupted is None else _as_long(source, ids, corrupted)
    texts = None if mean_of is None else _texts(source, mean_of)
    found = find_target(source, coders, ids, target, feature, metric, position)
    if found.layer is not None:
        coders = _before(coders, found.layer)
    at = Prompt(source, tuple(ids), find_states(source, coders, ids, other, texts))
    way = Way(0 if method == "gradient" else n_steps, errors == "nodes", method == "ablation")
    bar = tqdm(at.states.items(), desc="effects", unit="coder", disable=not verbose)
    flows = {layer: find_flow(at, state, found, way) for layer, state in bar}
    behavior = Behavior(at, found, flows, way, verbose)
    if n_nodes is None:
        return behavior.circuit(behavior.strongest(node_share), edge_share)
    return behavior.circuit(behavior.ranking[:n_nodes], edge_share)


def _check_sizes(n_steps: int | None, n_nodes: int | None, **shares: float) -> None:
    check_counts(n_steps=n_steps, n_nodes=n_nodes)
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {share}.")


def _before(coders: Mapping[int, BaseSAE], layer: int) -> dict[int, BaseSAE]:
    """The coders of earlier layers."""
    found = {other: coder for other, coder in coders.items() if other < layer}
    if not found:
        raise ValueError(
            f"saes must hold the coder of a layer before {layer}, that of the feature, got "
            f"{[*coders]}."
        )
    return found


def _ids(source: ActivationSource, name: str, text: Any) -> list[int]:
    """The tokens of a text, or of ids."""
    ids = any_ids(source, text)
    if special(source, ids).all():
        raise ValueError(
            f"{name} must be a text, or ids, of at least one token that is not special, "
            f"got {text!r}."
        )
    return ids


def _texts(source: ActivationSource, texts: Iterable[str]) -> list[list[int]]:
    """The tokens of texts, of each no more than the model was made for."""
    if isinstance(texts, str):
        raise ValueError(f"mean_of must be a list of texts, got one: {texts[:40]!r}.")
    return [ids[: source.context_length] for ids in source.encode_batch([*texts])]


def _as_long(source: ActivationSource, ids: Sequence[int], corrupted: Text) -> list[int]:
    others = _ids(source, "corrupted", corrupted)
    if len(others) != len(ids):
        raise ValueError(
            f"corrupted must have as many tokens as the prompt, {len(ids)}, got {len(others)}: "
            f"{source.to_str_tokens(others)} in the place of {source.to_str_tokens(list(ids))}."
        )
    return others
