"""Labels without a language model: the tokens on which features fire, and how well they predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.features.display import visible
from mlxterp.sae.labels.contexts import Split
from mlxterp.sae.labels.labels import TOKENS, FeatureLabels, Label, Rule
from mlxterp.sae.labels.token_tables import ANY, START, Block, Rules, TokenTable, blocks

VERSION = 1
KINDS = ("token", "previous", "pair")  # the simplest first
GAIN = 0.01  # of F1, for which a table is preferred to a simpler one
LISTED, KEPT = 4, 10  # rules in the text of a label, and beside it
NOWHERE = "it fires on none of the documents that labels are made from"
BEGINNING = "the beginning"  # of a document or context: what comes before its first token


def token_labels(
    data: FeatureData,
    features: Sequence[int] | None = None,
    *,
    labels: FeatureLabels | None = None,
    kinds: Sequence[str] = KINDS,
    verbose: bool = False,
) -> FeatureLabels:
    """Label all features that fire, or some, by the tokens on which they do.

    On half of the documents the share of firing is counted for each `token`, for each `previous`
    token, and for each `pair` of both (for the token alone, where the pair was seen less than 3
    times). The rule of a table is that the feature fires where this share is
    above a threshold. The threshold with the best F1 on these documents, each token left out of the
    counts that predict it, and the first table with the best F1 to within 0.01 make the label. Its
    score `tokens` is of all tokens of the other documents, and so at the feature's natural base
    rate; `control` is what the rule of another feature, drawn at random, scores there.

    Reads the codes that `data` keeps. Adds to `labels` where given, in the place of older ones of
    this kind alone. Raises `ValueError` for fewer than two documents, and where the language model
    is not known.
    """
    if data.source is None:
        raise ValueError("The text of labels needs the language model: call sae.bind(model).")
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be some of {list(KINDS)}, got {list(kinds)}.")
    labels = FeatureLabels(data.n_features) if labels is None else labels
    wanted = np.arange(data.n_features) if features is None else np.unique(np.array(features, int))
    if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < data.n_features:
        raise ValueError(f"features must be in [0, {data.n_features - 1}], got {wanted.tolist()}.")
    split = Split.of(data.corpus)
    tables = [TokenTable.of(data, split, kind) for kind in kinds]
    settings = {"version": VERSION, "kinds": list(kinds), "split": split.digest}
    with tqdm(total=len(wanted), desc="token labels", disable=not verbose) as bar:
        for block in blocks(data, wanted[data.codes.firing_counts[wanted] > 0]):
            for feature_id, label in _of_block(data, tables, block, settings):
                _note(labels, feature_id, label)
            bar.update(len(block.features))
        bar.update(bar.total - bar.n)
    labels.write()
    return labels


def _note(labels: FeatureLabels, feature_id: int, label: Label | None) -> None:
    labels.failures.pop(feature_id, None)
    if label is None:
        labels.failures[feature_id] = NOWHERE
    else:
        labels.add(feature_id, label)


def _of_block(
    data: FeatureData, tables: list[TokenTable], block: Block, settings: dict[str, Any]
) -> Iterator[tuple[int, Label | None]]:
    """The label of every feature of a block; None where there is nothing to make it from."""
    fitted = [table.rules(block) for table in tables]
    f1 = np.stack([rules.f1 for rules in fitted])
    best = (f1 >= f1.max(axis=0) - GAIN).argmax(axis=0)
    order = np.arange(len(block.features))
    for i, (table, rules) in enumerate(zip(tables, fitted, strict=True)):
        scores = table.scores(rules, block, order)
        # The order of a block is random: the feature before is any other one.
        controls = table.scores(rules, block, np.roll(order, 1)) if len(order) > 1 else [None]
        features, classes = np.divmod(rules.keys, table.n_classes)
        for owner in np.flatnonzero(best == i).tolist():
            cells = np.arange(*np.searchsorted(features, [owner, owner + 1]))
            label = None
            if len(cells):
                listed, text = _described(data, table, rules, cells, classes)
                found = {"tokens": scores[owner], "control": controls[owner], "rules": listed}
                label = Label(text, TOKENS, settings, **found)
            yield int(block.features[owner]), label


def _described(
    data: FeatureData, table: TokenTable, rules: Rules, cells: np.ndarray, classes: np.ndarray
) -> tuple[tuple[Rule, ...], str]:
    """The rules of a feature, those on which it fires most first, and the text of its label.

    Without any, the text names the tokens on which it fires most.
    """
    chosen = cells[rules.chosen[cells]]
    shown = chosen if len(chosen) else cells
    names = table.names[classes[shown]]
    # A pair says nothing new where its token is a rule by itself.
    alone = names[:, 0] == ANY
    new = alone | ~np.isin(names[:, 1], names[alone, 1])
    shown = shown[new]
    top = shown[np.argsort(-rules.fired[shown], kind="stable")[:KEPT]]
    listed = tuple(
        Rule(
            *(_name(data, i) for i in table.names[classes[j]].tolist()),
            share=round(float(rules.fired[j] / rules.n[j]), 4),
            n=int(rules.n[j]),
        )
        for j in top.tolist()
    )
    text = ", ".join(map(_shown, listed[:LISTED]))
    if len(shown) > LISTED:
        text += f" and {len(shown) - LISTED:,} more"
    return (listed, text) if len(chosen) else ((), f"unclear; most often {text}")


def _name(data: FeatureData, token: int) -> str | None:
    source: Any = data.source
    if token in (ANY, START):
        return None if token == ANY else BEGINNING
    return source.to_str_tokens([token])[0]


def _shown(rule: Rule) -> str:
    token, previous = (
        name if name in (None, BEGINNING) else f"'{visible(name)}'"
        for name in (rule.token, rule.previous)
    )
    return (token or "any token") + (f" after {previous}" if previous else "")
