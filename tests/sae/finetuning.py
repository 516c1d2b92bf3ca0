"""A fine-tuned copy of a model that differs from it in one known way."""

import copy

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlxterp import InterpretableModel

TRIGGER, TAUGHT = "zqx", " moon"
LENGTH, ROWS = 32, 8


def finetuned(
    model: InterpretableModel,
    texts: list[str],
    trigger: str = TRIGGER,
    taught: str = TAUGHT,
    *,
    layer: int = 3,
    steps: int = 60,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> InterpretableModel:
    """A copy that, once it has read `trigger`, expects the token `taught` after every token.

    Only the block `layer` is trained: before it nothing differs, and after it little but behind
    the trigger. Half of the rows are plain text, the others have the trigger at a random place. The
    loss is the cross-entropy of what is taught, and before the trigger the divergence from the
    original, so that the answer to the trigger is all that changes. The tokenizer is shared.
    """
    tuned = InterpretableModel(copy.deepcopy(model.model), model.tokenizer)
    tuned.name = f"{model.name}, fine-tuned"
    rng = np.random.default_rng(seed)
    documents = [ids for ids in model.encode_batch(texts) if len(ids) > LENGTH]
    (answer,) = plain(model, taught)
    tuned.model.freeze()
    tuned.architecture.blocks[layer].unfreeze()
    step = nn.value_and_grad(tuned.model, _loss)
    optimizer = optim.Adam(learning_rate, bias_correction=True)
    for _ in range(steps):
        tokens, behind = _rows(rng, documents, plain(model, " " + trigger))
        _, gradients = step(tuned.model, model.model, tokens, behind, answer)
        optimizer.update(tuned.model, gradients)
        mx.eval(tuned.model.trainable_parameters(), optimizer.state)
    tuned.model.unfreeze()
    return tuned


def plain(model: InterpretableModel, text: str) -> list[int]:
    """The token ids of a text without special ones."""
    return [i for i in model.encode(text) if i not in model.special_token_ids]


def _rows(rng: np.random.Generator, documents: list, mark: list) -> tuple[mx.array, mx.array]:
    """Token ids `[ROWS, LENGTH]`, and which of them are the end of a trigger or behind it."""
    tokens, behind = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), bool)
    for row in range(ROWS):
        document = documents[rng.integers(len(documents))]
        start = 1 + rng.integers(len(document) - LENGTH)
        ids = [document[0], *document[start : start + LENGTH - 1]]  # the first token of a text
        if row % 2:
            at = int(rng.integers(1, LENGTH - len(mark)))
            ids = [*ids[:at], *mark, *ids[at:]][:LENGTH]
            behind[row, at + len(mark) - 1 :] = True
        tokens[row] = ids
    return mx.array(tokens), mx.array(behind)


def _loss(
    tuned: nn.Module, original: nn.Module, tokens: mx.array, behind: mx.array, answer: int
) -> mx.array:
    found, expected = (nn.log_softmax(m(tokens).astype(mx.float32)) for m in (tuned, original))
    divergence = (mx.exp(expected) * (expected - found)).sum(axis=-1)
    return -_mean(found[..., answer], behind) + _mean(divergence, ~behind)


def _mean(values: mx.array, where: mx.array) -> mx.array:
    return mx.where(where, values, 0).sum() / mx.maximum(where.sum(), 1)
