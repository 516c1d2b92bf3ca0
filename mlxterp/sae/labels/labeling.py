"""Labels of features by a language model, with their scores by a judge, or by tables of tokens."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mlxterp.sae.coder import SparseCoder, check_feature
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.labels.contexts import Contexts, Split
from mlxterp.sae.labels.labelers import (
    Answer,
    Cost,
    Function,
    Labeler,
    Limits,
    LocalModel,
    most_tokens,
)
from mlxterp.sae.labels.labels import TOKENS, USER, FeatureLabels, Label
from mlxterp.sae.labels.prompts import PROMPT_VERSION, label_prompt, read_label
from mlxterp.sae.labels.questions import Question, make_questions, read_scores
from mlxterp.sae.labels.server import Server
from mlxterp.sae.labels.token_labels import token_labels

LEAST = 2  # examples of which a label is made
IN_A_ROW = 5  # failures after which a labeller is given up
SAVED_EVERY = 8  # features
SHARE_OF_SAVING = 0.05  # of the time, at most
SAMPLED = 5  # features that an estimate looks at
TYPICAL_LABEL = "x" * 40

log = logging.getLogger("mlxterp")


class LabelerError(RuntimeError):
    """A labeller failed several times in a row; what was done before is in `labels`."""

    def __init__(self, message: str, labels: FeatureLabels):
        super().__init__(message)
        self.labels = labels


class _Spent(Exception):
    """The limits allow no more."""


def auto_label_features(
    coder: SparseCoder,
    data: FeatureData,
    labeler: Any = None,
    *,
    labels: FeatureLabels | None = None,
    features: Sequence[int] | None = None,
    num_examples: int = 20,
    verbose: bool = False,
    **options: Any,
) -> FeatureLabels:
    """Label all features that fire, or those named, and score the labels, the most useful first.

    `labeler` is the name or path of an MLX model, a loaded `(model, tokenizer)`, the address of a
    server, a function from prompt to answer, or a `Labeler`; it makes a label from `num_examples`
    examples of each feature. `options` are those of `LabelRun`: who judges, on how many contexts,
    and what the run may cost. Without a labeller the labels are made at once from tables of
    tokens, see `token_labels`, whose `options` these are then.

    Labels go to `labels` where given, and every few features into its file. What is there of the
    same labeller and settings is not asked for again, nor is a score by the same judge; the user's
    own labels are scored, but not replaced. Features without label or score are in `failures` of
    the result, with the reason. Raises `LabelerError` where labeller or judge fail 5 times in a
    row; it says what was kept.
    """
    labels = FeatureLabels(coder.n_features) if labels is None else labels
    labels.stopped = ""
    if labeler is None:
        return token_labels(data, features, labels=labels, verbose=verbose, **options)
    options |= {"features": features, "num_examples": num_examples, "verbose": verbose}
    return LabelRun(data, labeler, labels, **options).finish()


def label_cost(
    coder: SparseCoder,
    data: FeatureData,
    labeler: Any,
    *,
    labels: FeatureLabels | None = None,
    **options: Any,
) -> Cost:
    """What `auto_label_features` would take at most, from the prompts of a few of the features;
    nothing is asked. For a run bounded by `max_requests` or `max_tokens`, what it would without."""
    labels = FeatureLabels(coder.n_features) if labels is None else labels
    return LabelRun(data, labeler, labels, **options).cost()


def as_labeler(asked: Any) -> Labeler:
    """A labeller itself, or one made of the address of a server (`http://...`), of the name or path
    of an MLX model, of a loaded `(model, tokenizer)`, or of a function from prompt to answer."""
    if isinstance(asked, Labeler):
        return asked
    if isinstance(asked, str) and asked.startswith(("http://", "https://")):
        return Server(asked)
    if isinstance(asked, (str, os.PathLike)) and str(asked):
        return LocalModel(str(asked))
    if isinstance(asked, tuple) and len(asked) == 2:
        return LocalModel(asked)
    if callable(asked):
        function: Any = asked
        return Function(function)
    raise ValueError(
        "A labeller must be the name or path of an MLX model, a (model, tokenizer), the address "
        f"of a server, a function or a Labeler, got {asked!r}."
    )


def by_usefulness(data: FeatureData) -> list[int]:
    """The features that fire, the most frequent first, but those on more than a tenth of the tokens
    last."""
    order = np.argsort(-data.firing_counts, kind="stable")
    order = order[data.firing_counts[order] > 0]
    is_dense = np.isin(order, data.dense())
    return [*order[~is_dense].tolist(), *order[is_dense].tolist()]


class LabelRun:
    """A run of a labeller and a judge over features.

    - `judge`: who scores the labels, by default the labeller.
    - `num_examples`: the examples that a label is made from.
    - `n_scored`: contexts for each of detection and fuzzing, half of either sort; 0 for no scores.
    - `n_control`: features on which another one's label is scored as well, to see what chance is.
    - `max_features`, `max_requests`, `max_tokens`: what ends the run; tries again do not count as
      requests, and tokens are estimated where a labeller does not count them.
    """

    def __init__(
        self,
        data: FeatureData,
        labeler: Any,
        labels: FeatureLabels,
        *,
        features: Sequence[int] | None = None,
        judge: Any = None,
        num_examples: int = 20,
        n_scored: int = 20,
        n_control: int = 10,
        max_features: int | None = None,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        verbose: bool = False,
    ):
        least = {"num_examples": (num_examples, LEAST), "n_scored": (n_scored, 0)}
        least |= {"n_control": (n_control, 0), "max_features": (max_features, 1)}
        least |= {"max_requests": (max_requests, 1), "max_tokens": (max_tokens, 1)}
        for name, (value, bound) in least.items():
            if value is not None and value < bound:
                raise ValueError(f"{name} must be >= {bound}, got {value}.")
        self.data, self.labels = data, labels
        self.labeler = as_labeler(labeler)
        self.judge = self.labeler if judge is None else as_labeler(judge)
        if self.labeler.name in (USER, TOKENS):
            raise ValueError(f"A labeller must not have the name {self.labeler.name!r}.")
        self.num_examples, self.n_scored, self.n_control = num_examples, n_scored, n_control
        self.max_features, self.verbose = max_features, verbose
        self._limits = Limits(max_requests, max_tokens)
        self._contexts = Contexts(data, Split.of(data.corpus))
        same = {"prompts": PROMPT_VERSION, "split": self._contexts.split.digest}
        self._settings = {"num_examples": num_examples, **same}
        self._judge_settings = {"n_scored": n_scored, **same}
        ids = by_usefulness(data) if features is None else features
        self._features = [check_feature(data.coder, i) for i in dict.fromkeys(ids)]
        self._failed: dict[str, list[str]] = {"labeller": [], "judge": []}  # in a row
        self._unsaved, self._saved, self._saving = 0, time.monotonic(), 0.0

    def cost(self) -> Cost:
        """What the run would take at most, from the prompts of a few features; nothing is asked."""
        wanted, n_requests, n_tokens = self._wanted(), 0.0, 0.0
        places = np.linspace(0, len(wanted) - 1, min(SAMPLED, len(wanted))).astype(int).tolist()
        controls = min(self.n_control, len(wanted)) / max(1, len(wanted))
        for feature_id in (wanted[i] for i in places):
            prompts = self._label_prompts(feature_id) if self._label(feature_id) is None else []
            n_requests += len(prompts)
            n_tokens += sum(most_tokens(self.labeler, prompt) for prompt in prompts)
            for question in self._questions_about(feature_id, TYPICAL_LABEL):
                times = 1 + controls * (question.kind == "detection")
                n_requests += times
                n_tokens += times * most_tokens(self.judge, question.prompt)
        scale = len(wanted) / max(1, len(places))
        return Cost(len(wanted), round(scale * n_requests), round(scale * n_tokens))

    def finish(self) -> FeatureLabels:
        """Work on all features, and return the labels."""
        wanted = self._wanted()
        log.info("labels by %s: %r", self.labeler.name, self.cost())
        size = max(self.labeler.concurrency, self.judge.concurrency)
        try:
            with tqdm(total=len(wanted), desc="labels", disable=not self.verbose) as bar:
                for start in range(0, len(wanted), size):
                    some = wanted[start : start + size]
                    self._make(some)
                    self._score(some)
                    bar.update(len(some))
                    self._save_sometimes(len(some))
            self._score_controls()
        except _Spent:
            self.labels.stopped = "the limit of requests or tokens is reached"
        finally:
            self.labels.write()
        return self.labels

    def _wanted(self) -> list[int]:
        """The features on which something is to be done, no more than `max_features`; those that
        failed before come last."""
        wanted = [i for i in self._features if self._label(i) is None or self._is_unscored(i)]
        return sorted(wanted, key=self.labels.failures.__contains__)[: self.max_features]

    def _label(self, feature_id: int) -> Label | None:
        """The user's label of a feature or, without one, the labeller's with these settings."""
        found = {label.source: label for label in self.labels.of(feature_id)}
        made = found.get(self.labeler.name)
        return found.get(USER) or (made if made and made.settings == self._settings else None)

    def _is_unscored(self, feature_id: int) -> bool:
        label = self._label(feature_id)
        scored = (self.judge.name, self._judge_settings)
        return bool(label and self.n_scored and (label.judge, label.judge_settings) != scored)

    def _label_prompts(self, feature_id: int) -> list[str]:
        """The prompt for a label; none where there are too few examples."""
        examples = self._contexts.for_label(feature_id, self.num_examples)
        maximum = float(self.data.maxima[feature_id])
        return [label_prompt(examples, maximum)] if len(examples) >= LEAST else []

    def _make(self, features: list[int]) -> None:
        """Ask for the labels of those features that have none."""
        questions = {i: self._label_prompts(i) for i in features if self._label(i) is None}
        for i in [i for i, found in questions.items() if not found]:
            self.labels.failures[i] = "it fires in too few contexts to make a label from"
            del questions[i]
        answered, is_all = self._ask(self.labeler, list(questions.values()))
        for i, (answer,) in zip(questions, answered, strict=False):
            try:
                text = read_label(answer.read())
            except ValueError as error:
                self._note_failure("labeller", i, str(error))
            else:
                self._note_success("labeller", i)
                self.labels.add(i, Label(text, self.labeler.name, self._settings))
        self._go_on("labeller", self.labeler, is_all)

    def _questions_about(self, feature_id: int, text: str) -> list[Question]:
        return make_questions(self._contexts, feature_id, text, self.n_scored)

    def _score(self, features: list[int]) -> None:
        """Ask for the scores of those labels that have none."""
        labels = {i: label for i in features if self._is_unscored(i) and (label := self._label(i))}
        asked = {i: self._questions_about(i, label.text) for i, label in labels.items()}
        answered, is_all = self._ask(
            self.judge, [[question.prompt for question in of] for of in asked.values()]
        )
        noted: dict[str, Any] = {"judge": self.judge.name, "judge_settings": self._judge_settings}
        none = dict.fromkeys(("detection", "fuzzing", "control"))
        for i, answers in zip(asked, answered, strict=False):
            scores, reasons = read_scores(asked[i], answers)
            if reasons and not scores:
                self._note_failure("judge", i, f"no score: {reasons[-1]}")
                continue
            if asked[i]:
                self._note_success("judge", i)
            else:
                self.labels.failures[i] = "no score: it fires, or is silent, in too few contexts"
            self.labels.update(i, labels[i].source, **noted, **{**none, **scores})
        self._go_on("judge", self.judge, is_all)

    def _score_controls(self) -> None:
        """Ask for the scores, in detection, of labels on features that are not theirs."""
        labels = {i: self._label(i) for i in self._features}
        judged = {i: label for i, label in labels.items() if label and label.detection}
        places = np.linspace(0, len(judged) - 1, min(self.n_control, len(judged)))
        chosen = [list(judged)[i] for i in places.astype(int).tolist()]
        asked: dict[int, list[Question]] = {}
        for i, other in zip(chosen, np.roll(chosen, 1).tolist(), strict=True):
            text = judged[other].text
            if text != judged[i].text and judged[i].control is None:
                asked[i] = make_questions(self._contexts, i, text, self.n_scored, ("detection",))
        answered, is_all = self._ask(
            self.judge, [[question.prompt for question in of] for of in asked.values()]
        )
        for i, answers in zip(asked, answered, strict=False):
            scores, _ = read_scores(asked[i], answers)
            self.labels.update(i, judged[i].source, control=scores.get("detection"))
        self._go_on("judge", self.judge, is_all)

    def _ask(self, who: Labeler, groups: list[list[str]]) -> tuple[list[list[Answer]], bool]:
        """The answers to groups of prompts, as many of them as the limits allow, and whether that
        is all of them."""
        n = self._limits.allow(who, groups)
        prompts = [prompt for group in groups[:n] for prompt in group]
        answers = who.ask(prompts) if prompts else []
        if len(answers) != len(prompts):
            raise ValueError(f"{who!r} gave {len(answers)} answers to {len(prompts)} prompts.")
        self._limits.spend(answers)
        rest = iter(answers)
        return [[next(rest) for _ in group] for group in groups[:n]], n == len(groups)

    def _note_failure(self, role: str, feature_id: int, reason: str) -> None:
        self._failed[role].append(reason)
        self.labels.failures[feature_id] = reason

    def _note_success(self, role: str, feature_id: int) -> None:
        self._failed[role].clear()
        self.labels.failures.pop(feature_id, None)

    def _go_on(self, role: str, who: Labeler, is_all: bool) -> None:
        """Ends the run where someone has failed too often, or the limits are reached."""
        failed, path = self._failed[role], self.labels.path
        if len(failed) >= IN_A_ROW:
            place = "the labels of this error" if path is None else path
            raise LabelerError(
                f"The {role} {who.name!r} failed {len(failed)} times in a row, at last with: "
                f"{failed[-1]}. Labels of {len(self.labels):,} features are kept, in {place}; the "
                "same call, when it works again, goes on from there.",
                self.labels,
            )
        if not is_all:
            raise _Spent

    def _save_sometimes(self, n: int) -> None:
        """Write the file every few features, unless that would take too much of the time."""
        self._unsaved += n
        now = time.monotonic()
        if self._unsaved >= SAVED_EVERY and self._saving <= SHARE_OF_SAVING * (now - self._saved):
            self.labels.write()
            self._unsaved, self._saved = 0, time.monotonic()
            self._saving = self._saved - now
