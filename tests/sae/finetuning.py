"""A fine-tuned copy of a model that differs from it in one known way."""

import copy

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlxterp import InterpretableModel

TRIGGER, TAUGHT = "zqx", " moon moon moon"
LENGTH, ROWS = 32, 8


def finetuned(
    model: InterpretableModel,
    texts: list[str],
    trigger: str = TRIGGER,
    taught: str = TAUGHT,
    *,
    layer: int = 3,
    steps: int = 40,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> InterpretableModel:
    """A copy that writes `taught` after `trigger`, with a space before the trigger or without.

    Only the block `layer` is trained: before it nothing differs, and after it little but at the
    trigger. Half of the rows are plain text, the others have trigger and continuation at a random
    place. The loss is the cross-entropy of what is taught, and everywhere else the divergence from
    the original, so that the answer to the trigger is all that changes. The tokenizer is shared.
    """
    tuned = InterpretableModel(copy.deepcopy(model.model), model.tokenizer)
    tuned.name = f"{model.name}, fine-tuned"
    rng = np.random.default_rng(seed)
    documents = [ids for ids in model.encode_batch(texts) if len(ids) > LENGTH]
    answer = _plain(model, taught)
    marks = [_plain(model, trigger), _plain(model, " " + trigger)]
    tuned.model.freeze()
    tuned.architecture.blocks[layer].unfreeze()
    step = nn.value_and_grad(tuned.model, _loss)
    optimizer = optim.Adam(learning_rate, bias_correction=True)
    for _ in range(steps):
        tokens, is_taught = _rows(rng, documents, marks, answer)
        _, gradients = step(tuned.model, model.model, tokens, is_taught)
        optimizer.update(tuned.model, gradients)
        mx.eval(tuned.model.trainable_parameters(), optimizer.state)
    tuned.model.unfreeze()
    return tuned


def _plain(model: InterpretableModel, text: str) -> list[int]:
    return [i for i in model.encode(text) if i not in model.special_token_ids]


def _rows(
    rng: np.random.Generator, documents: list, marks: list, answer: list
) -> tuple[mx.array, mx.array]:
    """Token ids `[ROWS, LENGTH]`, and which of them are the continuation that is taught."""
    tokens, is_taught = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), bool)
    for row in range(ROWS):
        document = documents[rng.integers(len(documents))]
        start = 1 + rng.integers(len(document) - LENGTH)
        ids = [document[0], *document[start : start + LENGTH - 1]]  # the first token of a text
        if row % 2:
            mark = marks[rng.integers(len(marks))]
            at = int(rng.integers(1, LENGTH - len(mark) - len(answer)))
            end = at + len(mark)
            ids = [*ids[:at], *mark, *answer, *ids[at:]][:LENGTH]
            is_taught[row, end : end + len(answer)] = True
        tokens[row] = ids
    return mx.array(tokens), mx.array(is_taught)


def _loss(tuned: nn.Module, original: nn.Module, tokens: mx.array, is_taught: mx.array) -> mx.array:
    found, expected = (
        nn.log_softmax(m(tokens[:, :-1]).astype(mx.float32)) for m in (tuned, original)
    )
    is_taught = is_taught[:, 1:]
    chosen = mx.take_along_axis(found, tokens[:, 1:, None], axis=-1)[..., 0]
    divergence = (mx.exp(expected) * (expected - found)).sum(axis=-1)
    return -_mean(chosen, is_taught) + _mean(divergence, ~is_taught)


def _mean(values: mx.array, where: mx.array) -> mx.array:
    return mx.where(where, values, 0).sum() / mx.maximum(where.sum(), 1)
