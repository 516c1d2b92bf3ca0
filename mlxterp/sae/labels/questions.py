"""What a judge is asked about a label, and the scores from its answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlxterp.sae.labels.contexts import Contexts, Item
from mlxterp.sae.labels.labelers import Answer
from mlxterp.sae.labels.prompts import DETECTION_PROMPT, FUZZING_PROMPT, judge_prompt, read_numbers
from mlxterp.sae.labels.scores import Score

Kind = Literal["detection", "fuzzing"]

PER_PROMPT = 5  # contexts that a judge is asked about at once
LEAST = 2  # contexts of either kind
# Whether a context is right, and whether it was said to be: as a `Score` counts them.
SORTS = ((True, True), (True, False), (False, True), (False, False))
TEMPLATES: dict[Kind, str] = {"detection": DETECTION_PROMPT, "fuzzing": FUZZING_PROMPT}


@dataclass(frozen=True)
class Question:
    """A prompt to a judge, and the contexts that it asks about."""

    kind: Kind
    prompt: str
    items: tuple[Item, ...]


def make_questions(
    contexts: Contexts, feature_id: int, label: str, n: int, kinds: Iterable[Kind] = TEMPLATES
) -> list[Question]:
    """What to ask about a label on a feature's contexts, up to `n` for each kind; nothing of a kind
    for which there are fewer than 2 contexts of either sort."""
    chosen = {"detection": contexts.for_detection, "fuzzing": contexts.for_fuzzing}
    found = []
    for kind in kinds:
        items = chosen[kind](feature_id, n) if n else ()
        if sum(item.is_right for item in items) >= LEAST:
            parts = [items[i : i + PER_PROMPT] for i in range(0, len(items), PER_PROMPT)]
            found += [
                Question(kind, judge_prompt(TEMPLATES[kind], label, [i.text for i in part]), part)
                for part in parts
            ]
    return found


def read_scores(
    questions: Sequence[Question], answers: Sequence[Answer]
) -> tuple[dict[Kind, Score], list[str]]:
    """The score of each kind, and why answers could not be read. A kind of which no answer could be
    read, or none about contexts of one sort, has no score."""
    counts: dict[Kind, dict[tuple[bool, bool], int]] = {
        question.kind: dict.fromkeys(SORTS, 0) for question in questions
    }
    unanswered = dict.fromkeys(counts, 0)
    reasons: list[str] = []
    for question, answer in zip(questions, answers, strict=True):
        try:
            said = read_numbers(answer.read(), len(question.items))
        except ValueError as error:
            reasons.append(str(error))
            unanswered[question.kind] += len(question.items)
            continue
        for number, item in enumerate(question.items, 1):
            counts[question.kind][item.is_right, number in said] += 1
    scores: dict[Kind, Score] = {
        kind: Score(*(of[sort] for sort in SORTS), unanswered=unanswered[kind])
        for kind, of in counts.items()
    }
    known: dict[Kind, Score] = {
        kind: score for kind, score in scores.items() if 0 < score.base_rate < 1
    }
    return known, reasons
