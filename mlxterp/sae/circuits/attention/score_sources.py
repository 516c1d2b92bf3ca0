"""One attention score as a function of what a model's sources write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.circuits.attention.score_pairs import Against, QKAttribution
from mlxterp.sae.circuits.behavior.targets import Edits
from mlxterp.sae.circuits.graph.replacement import Replacement
from mlxterp.sae.circuits.nodes import Node
from mlxterp.sae.coder import Block, SparseCoder
from mlxterp.sae.features.display import pieces

HIDDEN = -3e4  # a mask that adds less hides a key
MOST_MISSED = 0.05  # of |q| |k|, above which a score is no sum over pairs


@dataclass(frozen=True, eq=False)
class AttentionScore:
    """The score of a head from a query to a key, in a model whose sources can be changed.

    `weights [S]` are 1 at the key, less those of the keys that it is set against.
    """

    replacement: Replacement
    layer: int
    head: int
    query: int
    key: int
    against: Against
    weights: mx.array

    def attribution(self) -> tuple[QKAttribution, np.ndarray, np.ndarray]:
        """What each source adds to the query and to the key, and the numbers of those that add
        something; raises `ValueError` where they are no sums of it."""
        r, tokens = self.replacement, self.replacement.tokens
        call = self.call(tokens, {})
        seen = visible_keys(call, self.head, self.query)
        rows = r.rows(self._vectors, 2 * call.q.shape[-1])
        rows = np.concatenate([rows, r.bias(self._vectors)[:, None]], axis=1)
        Q, K = np.split(rows, 2)
        of_q, of_k = (np.flatnonzero((side[:, :-1] != 0).any(axis=0)) for side in (Q, K))
        nodes = self._nodes()
        queries = _with_effects(nodes, of_q, Q.T @ K.sum(axis=1))
        keys = _with_effects(nodes, of_k, K.T @ Q.sum(axis=1))
        scores = np.array(call.scores[0, self.head, self.query])
        found = QKAttribution(
            self.layer, self.head, self.query, self.key, self.against,
            queries,
            keys,
            Q[:, [*of_q, -1]],
            K[:, [*of_k, -1]],
            np.array(call.k[0, self.head].astype(mx.float32)).T,
            np.where(seen, scores, np.nan),
            np.array(call.pattern[0, self.head, self.query]),
            self._levels((*queries, *keys)),
            pieces(r.source, np.array(tokens[0]).tolist()),
            self._constant(call),
        )  # fmt: skip
        self._check(found)
        return found, of_q, of_k

    def contrast(self, tokens: mx.array, edits: Edits) -> mx.array:
        """The score above what it is set against, in every row, `[B, 1]`."""
        call = self.call(tokens, edits)
        seen = self.weights != 0
        return mx.where(seen, call.scores[:, self.head, self.query], 0) @ self.weights[:, None]

    def call(self, tokens: mx.array, edits: Edits) -> Any:
        """The attention of the layer in a pass."""
        return self.replacement.source.attention(tokens, self.layer, edit=edits)[self.layer]

    def _vectors(self, tokens: mx.array, edits: Edits) -> mx.array:
        """The query, times the scale, and the key above what it is set against, `[B, 2 d_head]`."""
        call = self.call(tokens, edits)
        q = call.q[:, self.head, self.query].astype(mx.float32) * call.scale
        k = self.weights @ call.k[:, self.head].astype(mx.float32)
        return mx.concatenate([q, k], axis=-1)

    def _masked(self, tokens: mx.array, edits: Edits) -> mx.array:
        """What the mask adds to the contrast, `[B, 1]`."""
        call = self.call(tokens, edits)
        mask = mx.broadcast_to(call.mask, call.scores.shape)[:, self.head, self.query]
        added = mx.where(mask > HIDDEN, mask.astype(mx.float32), 0)
        return added @ self.weights[:, None]

    def _constant(self, call: Any) -> float:
        """What the mask adds; raises `ValueError` where that is due to sources."""
        mask = call.mask
        if not isinstance(mask, mx.array) or mask.dtype == mx.bool_:
            return 0.0
        added = float(self._masked(self.replacement.tokens, {}))
        if np.abs(self.replacement.rows(self._masked, 1)).max(initial=0.0) > 0:
            raise ValueError(
                f"The mask of layer {self.layer} has a part of the scores in it that depends on "
                "what the model reads, as that of latent attention (DeepSeek): the query and the "
                "key do not make up the score alone, so that it cannot be taken apart."
            )
        return added

    def _check(self, found: QKAttribution) -> None:
        q, k = self._vectors(self.replacement.tokens, {})[0].split(2)
        size = float(mx.linalg.norm(q) * mx.linalg.norm(k))
        if not abs(found.gap) <= MOST_MISSED * max(size, 1e-6):
            raise ValueError(
                f"The pairs miss the score of layer {self.layer} by {found.gap:.3g}, of "
                f"{found.contrast:.3g}: what its head compares is no sum of what sources write, "
                "even with attention patterns, norm scales and MLPs held. "
                "mlxterp.freezing.check says up to which site it is."
            )

    def _nodes(self) -> tuple[Node, ...]:
        """All sources, by their numbers."""
        r, ids = self.replacement, np.array(self.replacement.tokens[0]).tolist()
        levels = [[_level(c, b) for b in c.blocks for _ in range(c.n_features)[b.features]]
                  for c in r.coders]  # fmt: skip
        features = (
            Node("feature", levels[coder][feature], feature, position, float(value))
            for (coder, position, feature), value in zip(r.features.tolist(), r.values, strict=True)
        )
        errors = (
            Node("error", name, -1, position)
            for name in r.error_sites
            for position in range(len(ids))
        )
        embeddings = (Node("embedding", "", token, i) for i, token in enumerate(ids))
        return (*features, *errors, *embeddings)

    def _levels(self, sources: Sequence[Node]) -> tuple[str, ...]:
        """The levels of all features and of the errors among some sources."""
        coders = self.replacement.coders
        levels = (_level(coder, block) for coder in coders for block in coder.blocks)
        errors = (node.site for node in sources if node.kind == "error")
        return tuple(dict.fromkeys([*levels, *errors]))


def _level(coder: SparseCoder, block: Block) -> str:
    """The first site that features of a block write."""
    return coder.writes.names[block.sites.start]


def _with_effects(
    nodes: Sequence[Node], numbers: np.ndarray, effects: np.ndarray
) -> tuple[Node, ...]:
    """Some of the nodes, with their effects of all."""
    return tuple(replace(nodes[i], effect=float(effects[i])) for i in numbers.tolist())


def visible_keys(call: Any, head: int, query: int) -> np.ndarray:
    """Which keys a query sees, `[S]`."""
    q, k = (x.astype(mx.float32) for x in (call.q[0, head, query], call.k[0, head]))
    return np.array(call.scores[0, head, query] - call.scale * (k @ q) > HIDDEN)
