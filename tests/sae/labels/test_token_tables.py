import numpy as np
import pytest

from mlxterp.sae.features.collection import collect
from mlxterp.sae.labels.contexts import Split
from mlxterp.sae.labels.scores import Score
from mlxterp.sae.labels.token_labels import KINDS, token_labels
from mlxterp.sae.labels.token_tables import LEAST_PAIRS, START, THRESHOLDS, TokenTable, blocks


def direct_rule(data, split, kind: str, feature: int) -> tuple[set, float]:
    """A feature's rule, as pairs (previous, token) of the kept tokens, one token at a time."""
    positions, tokens = data.codes.positions, data.corpus.tokens.reshape(-1)
    owners = data.corpus.owners.reshape(-1)
    fires = set(data.codes.of(feature)[0].tolist())
    is_scored = split.scored[data.documents(positions)]

    def pair(position):
        starts = position % data.corpus.context == 0 or owners[position] != owners[position - 1]
        return (START if starts else int(tokens[position - 1]), int(tokens[position]))

    pairs = [pair(position) for position in positions.tolist()]
    counted = [i for i in range(len(pairs)) if not is_scored[i]]
    seen = {}
    for i in counted:
        seen[pairs[i]] = seen.get(pairs[i], 0) + 1

    def classes(i):
        previous, token = pairs[i]
        if kind == "token":
            return [("token", token)]
        if kind == "previous":
            return [("previous", previous)]
        alone = ("token", token)
        return [pairs[i], alone] if seen.get(pairs[i], 0) >= LEAST_PAIRS else [alone]

    n, fired = {}, {}
    for i in counted:
        for name in classes(i):
            n[name] = n.get(name, 0) + 1
            fired[name] = fired.get(name, 0) + (i in fires)
    best = (-1.0, 0.0)
    for level in THRESHOLDS:
        hits = alarms = 0
        for i in counted:
            name = classes(i)[0]
            # Without the token itself, and with one silent token more.
            says = (fired[name] - (i in fires)) / n[name] > level
            hits, alarms = hits + (says and i in fires), alarms + (says and i not in fires)
        f1 = 2 * hits / max(1, hits + alarms + sum(i in fires for i in counted))
        best = max(best, (f1, -level))
    rule = {name for name in n if fired[name] / (n[name] + 1) > -best[1]}
    counts = {(a, b): 0 for a in (True, False) for b in (True, False)}
    for i in range(len(pairs)):
        if is_scored[i]:
            counts[i in fires, bool(classes(i)[0] in rule)] += 1
    score = Score(
        counts[True, True], counts[True, False], counts[False, True], counts[False, False]
    )
    return score, best[0]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_a_direct_count(sae, kind):
    data = collect(sae, sae._training_data, max_tokens=2_000)
    split = Split.of(data.corpus)
    features = np.flatnonzero(data.firing_counts > 20)[::20]
    table = TokenTable.of(data, split, kind)
    (block,) = blocks(data, features)
    rules = table.rules(block)
    scores = table.scores(rules, block, np.arange(len(features)))
    assert len(features) > 8 and len({rules.f1[i] for i in range(len(features))}) > 5
    for i, feature in enumerate(block.features.tolist()):
        score, f1 = direct_rule(data, split, kind, feature)
        assert scores[i] == score and rules.f1[i] == pytest.approx(f1)


def test_blocks_hold_every_feature_once(sae, monkeypatch):
    data = collect(sae, sae._training_data)
    whole = token_labels(data)
    monkeypatch.setattr("mlxterp.sae.labels.token_tables.ENTRIES_AT_ONCE", 5_000)
    found = list(blocks(data, np.arange(data.n_features)))
    assert len(found) > 5
    assert sorted(np.concatenate([block.features for block in found])) == list(range(512))
    for block in found:
        assert len(block.rows) == data.codes.firing_counts[block.features].sum()
    parts = token_labels(data)
    for i in whole:
        assert parts[i].text == whole[i].text and parts[i].tokens == whole[i].tokens
