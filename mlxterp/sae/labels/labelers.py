"""Who can be asked for a label: a model in this process, or a function; and what that may cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

CHARACTERS_PER_TOKEN = 3.5


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt: its text, or an `error` that says why there is none; and the
    tokens that prompt and answer took, estimated where they were not counted."""

    text: str = ""
    error: str = ""
    n_tokens: int = 0

    def read(self) -> str:
        """The text; raises `ValueError` with the error where there is none."""
        if self.error:
            raise ValueError(self.error)
        return self.text


@runtime_checkable
class Labeler(Protocol):
    """Answers prompts, as many at a time as it has `concurrency`."""

    name: str
    concurrency: int
    max_tokens: int

    def ask(self, prompts: Sequence[str]) -> list[Answer]: ...


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return round(len(text) / CHARACTERS_PER_TOKEN)


class LocalModel:
    """A language model of mlx-lm in this process, which answers greedily.

    `model` is a name or path for `mlx_lm.load`, loaded when it is first asked, or a loaded `(model,
    tokenizer)`, to which a `name` should be given. Its chat template is used where it has one.
    """

    concurrency = 1

    def __init__(self, model: str | tuple[Any, Any], *, name: str = "", max_tokens: int = 256):
        self._model = model
        self.name = name or (model if isinstance(model, str) else _name_of(model[1]))
        self.max_tokens = at_least("max_tokens", max_tokens, 1)

    def ask(self, prompts: Sequence[str]) -> list[Answer]:
        """The answers in order. A model that cannot be loaded raises what mlx-lm raises."""
        if isinstance(self._model, str):
            import mlx_lm

            self._model = mlx_lm.load(self._model)[:2]
        return [self._answer(*self._model, prompt) for prompt in prompts]

    def _answer(self, model: Any, tokenizer: Any, prompt: str) -> Answer:
        from mlx_lm import stream_generate

        text, response = "", None
        try:
            ids = _with_template(tokenizer, prompt)
            for response in stream_generate(model, tokenizer, ids, max_tokens=self.max_tokens):
                text += response.text
        except Exception as error:
            return Answer(error=f"{type(error).__name__}: {error}")
        n_tokens = response.prompt_tokens + response.generation_tokens if response else 0
        return Answer(text, n_tokens=n_tokens)

    def __repr__(self) -> str:
        return f"LocalModel({self.name!r}, max_tokens={self.max_tokens})"


def _with_template(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        return tokenizer.encode(prompt)
    return tokenizer.apply_chat_template(
        # Models that think unless told not to would use up their tokens before the answer.
        messages_of(prompt), add_generation_prompt=True, enable_thinking=False, return_dict=False,
    )  # fmt: skip


def messages_of(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _name_of(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "model"


class Function:
    """A function from a prompt to its answer or, with `messages`, from a list of one chat message
    `{"role": "user", "content": prompt}`."""

    concurrency = 1

    def __init__(
        self,
        function: Callable[[Any], str],
        *,
        name: str = "",
        messages: bool = False,
        max_tokens: int = 256,
    ):
        self._function, self._messages = function, messages
        self.name = name or getattr(function, "__qualname__", type(function).__name__)
        self.max_tokens = max_tokens

    def ask(self, prompts: Sequence[str]) -> list[Answer]:
        """The answers in order; what the function raises is the answer's error."""
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: str) -> Answer:
        try:
            text = self._function(messages_of(prompt) if self._messages else prompt)
        except Exception as error:
            return Answer(error=f"{type(error).__name__}: {error}")
        if not isinstance(text, str):
            return Answer(error=f"the answer must be a str, got {type(text).__name__}")
        return Answer(text, n_tokens=estimated_tokens(prompt) + estimated_tokens(text))

    def __repr__(self) -> str:
        return f"Function({self.name})"


@dataclass(frozen=True)
class Cost:
    """What a run takes at most: features to be worked on, requests, and tokens of prompts and
    answers, estimated."""

    n_features: int
    n_requests: int
    n_tokens: int

    def __repr__(self) -> str:
        return (
            f"Cost({self.n_features:,} features, {self.n_requests:,} requests, "
            f"at most about {self.n_tokens:,} tokens)"
        )


@dataclass
class Limits:
    """What may still be spent; None is without limit."""

    requests: int | None = None
    tokens: int | None = None

    def allow(self, who: Labeler, groups: Sequence[Sequence[str]]) -> int:
        """How many groups of prompts, from the first on, are within the limits."""
        requests = tokens = 0
        for i, prompts in enumerate(groups):
            requests += len(prompts)
            tokens += sum(most_tokens(who, prompt) for prompt in prompts)
            if self._exceeded(requests, tokens):
                return i
        return len(groups)

    def _exceeded(self, requests: int, tokens: int) -> bool:
        pairs = ((requests, self.requests), (tokens, self.tokens))
        return any(limit is not None and wanted > limit for wanted, limit in pairs)

    def spend(self, answers: Sequence[Answer]) -> None:
        """Take off what some requests took."""
        if self.requests is not None:
            self.requests -= len(answers)
        if self.tokens is not None:
            self.tokens -= sum(answer.n_tokens for answer in answers)


def most_tokens(who: Labeler, prompt: str) -> int:
    """About how many tokens a prompt and its answer may have."""
    return estimated_tokens(prompt) + who.max_tokens


def at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}.")
    return value
