"""What a page may ask for: the bodies of requests, checked before anything is done with them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from mlxterp.sae.features.analysis import RankBy
from mlxterp.sae.steering.edits import Mode, Unit

LIMITS = {
    "text_chars": 8000, "prompt_chars": 8000, "max_tokens": 256, "steer_features": 16,
    "strength": 1000, "together": 64, "pinned": 32, "top_k": 64, "label_chars": 500,
}  # fmt: skip
MOST_BYTES = 1 << 17  # of a body


class Refused(Exception):
    """A request that gets no answer but an error, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class TextRequest:
    """A text whose features are asked for; see `features.analysis.analyze_text`."""

    text: str
    rank_by: RankBy = "activation"
    target: str | None = None
    position: int = -1
    top_k: int = 16
    features: tuple[int, ...] = ()


@dataclass(frozen=True)
class SteerRequest:
    """A prompt to go on with, plain and steered; see `steering.edits.steering_edit`."""

    prompt: str
    strengths: Mapping[int, float]
    mode: Mode = "add"
    unit: Unit = "max"
    max_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0


class Body(Mapping[str, Any]):
    """The object of a request's body, whose fields are read with their types and ranges."""

    def __init__(self, data: bytes):
        try:
            content = json.loads(data, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"The body is not valid JSON: {error}.") from None
        if not isinstance(content, dict):
            raise Refused(400, "The body must be a JSON object.")
        self._content = content

    def __getitem__(self, name: str) -> Any:
        return self._content[name]

    def __iter__(self) -> Any:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def only(self, *names: str) -> None:
        """Refuse fields of other names, which a page would wonder about."""
        unknown = sorted(set(self) - set(names))
        if unknown:
            raise Refused(400, f"Unknown fields {unknown[:5]}; there are {list(names)}.")

    def text(self, name: str, most: int, empty: bool = False, default: Any = ...) -> Any:
        """A string of bounded length."""
        value = self._value(name, default)
        if value is default and default is not ...:
            return value
        if not isinstance(value, str) or not (value or empty) or len(value) > most:
            raise Refused(
                400, f"{name} must be a text of {0 if empty else 1} to {most} characters."
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Refused(400, f"{name} must be valid Unicode.") from None
        return value

    def number(self, name: str, low: float, high: float, default: Any = ...) -> float:
        """A number in a range."""
        return _number(name, self._value(name, default), low, high)

    def whole(self, name: str, low: int, high: int, default: Any = ...) -> int:
        """A whole number in a range."""
        return _whole(name, self._value(name, default), low, high)

    def choice(self, name: str, choices: Sequence[str], default: str) -> Any:
        """One of some strings."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in choices:
            raise Refused(400, f"{name} must be one of {list(choices)}.")
        return value

    def features(self, name: str, n_features: int, low: int, high: int) -> tuple[int, ...]:
        """Ids of different features, from `low` to `high` of them."""
        value = self._value(name, [])
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise Refused(400, f"{name} must be a list of {low} to {high} features.")
        found = tuple(_whole(name, i, 0, n_features - 1) for i in value)
        return tuple(dict.fromkeys(found))

    def strengths(self, name: str, n_features: int) -> dict[int, float]:
        """The strength of each of some features."""
        value, most = self._value(name, ...), LIMITS["steer_features"]
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise Refused(400, f"{name} must be a list of 1 to {most} features.")
        found = {}
        for entry in value:
            if not isinstance(entry, dict) or not {"id"} <= set(entry) <= {"id", "strength"}:
                raise Refused(400, f'{name} must hold {{"id": ..., "strength": ...}}.')
            feature_id = _whole("id", entry["id"], 0, n_features - 1)
            largest = LIMITS["strength"]
            found[feature_id] = _number("strength", entry.get("strength", 1), -largest, largest)
        return found

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is ...:
            raise Refused(400, f"{name} is missing.")
        return value


def text_request(data: bytes, n_features: int) -> TextRequest:
    """The request for the features of a text."""
    body = Body(data)
    body.only("text", "rank_by", "target", "position", "top_k", "features")
    return TextRequest(
        text=body.text("text", LIMITS["text_chars"]),
        rank_by=body.choice("rank_by", get_args(RankBy), "activation"),
        target=body.text("target", 100, default=None),
        position=body.whole("position", -LIMITS["text_chars"], LIMITS["text_chars"], -1),
        top_k=body.whole("top_k", 1, LIMITS["top_k"], 16),
        features=body.features("features", n_features, 0, LIMITS["pinned"]),
    )


def steer_request(data: bytes, n_features: int, unit: Unit) -> SteerRequest:
    """The request for a generation; `unit` is that of strengths where none is given."""
    body = Body(data)
    body.only("prompt", "features", "mode", "unit", "max_tokens", "temperature", "seed")
    return SteerRequest(
        prompt=body.text("prompt", LIMITS["prompt_chars"]),
        strengths=body.strengths("features", n_features),
        mode=body.choice("mode", get_args(Mode), "add"),
        unit=body.choice("unit", get_args(Unit), unit),
        max_tokens=body.whole("max_tokens", 1, LIMITS["max_tokens"], 60),
        temperature=body.number("temperature", 0, 10, 0),
        seed=body.whole("seed", 0, 2**31 - 1, 0),
    )


def label_text(data: bytes) -> str:
    """The text of a label, empty where it is to be removed."""
    body = Body(data)
    body.only("text")
    return body.text("text", LIMITS["label_chars"], empty=True).strip()


def chosen_features(data: bytes, n_features: int) -> tuple[int, ...]:
    """The features of a matrix of co-occurrences."""
    body = Body(data)
    body.only("features")
    return body.features("features", n_features, 1, LIMITS["together"])


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _number(name: str, value: Any, low: float, high: float) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not low <= value <= high or not math.isfinite(value):
        raise Refused(400, f"{name} must be a number in [{low}, {high}].")
    return float(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise Refused(400, f"{name} must be a whole number in [{low}, {high}].")
    return value
