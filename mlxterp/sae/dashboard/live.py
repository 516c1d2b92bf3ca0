"""What a dashboard asks of a language model while it runs, one call after another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlxterp.sae.coder import SparseCoder
from mlxterp.sae.dashboard.asked import Refused, SteerRequest, TextRequest
from mlxterp.sae.dashboard.calling import Caller
from mlxterp.sae.dashboard.strings import shorts
from mlxterp.sae.features.analysis import analyze_text, encode_text
from mlxterp.sae.features.data import FeatureData
from mlxterp.sae.features.display import visible
from mlxterp.sae.model_pair import owner
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.steering.edits import Unit, steering_edit

Result = TypeVar("Result")

MOST_ENTRIES = 1 << 25  # of the dense code of a text
AT_LEAST = 128  # tokens of a text, however many features there are
AT_ONCE = 8  # generations


class Live:
    """A language model and a coder that answer questions.

    All calls of the model are made in one thread, and each of them is a whole: a forward pass, or a
    step of a generation with the edits of its own. So several people can ask at once, and each gets
    what would come of asking alone.
    """

    def __init__(
        self, coder: SparseCoder, source: ActivationSource, data: FeatureData | None = None
    ):
        if data is not None and data.n_features != coder.n_features:
            raise ValueError(
                f"data is of {data.n_features} features, and the coder has {coder.n_features}."
            )
        _settle(coder, source)
        self.coder, self.source, self.data = coder, source, data
        self._caller = Caller("mlxterp-dashboard-model")
        self._generations = 0

    @property
    def unit(self) -> Unit:
        """The unit of strengths: the largest values, where they are known."""
        return "activation" if self.data is None else "max"

    async def call(self, function: Callable[[], Result]) -> Result:
        """Run a function in the thread of the model; a `ValueError` refuses the request."""

        def refusing() -> Result:
            try:
                return function()
            except ValueError as error:
                raise Refused(400, str(error)) from None

        return await asyncio.wrap_future(self._caller.submit(refusing))

    async def analyze(self, asked: TextRequest) -> dict[str, Any]:
        """The features of a text, by token and of the whole."""
        return await self.call(lambda: self._analyze(asked))

    def _analyze(self, asked: TextRequest) -> dict[str, Any]:
        self._check_length(asked.text)
        options: dict[str, Any] = {} if asked.rank_by == "activation" else {"target": asked.target}
        if asked.rank_by == "attribution":
            options["position"] = asked.position
        found = analyze_text(
            self.coder, self.source, asked.text, asked.top_k, rank_by=asked.rank_by, **options
        )
        pinned = []
        if asked.features:
            codes: Any = encode_text(self.coder, self.source, asked.text)
            chosen = codes[:, mx.array(asked.features)].astype(mx.float32)
            pinned = np.array(chosen).T.tolist()
        return {
            "tokens": [visible(token) for token in found.tokens],
            "by_token": [[[i, *shorts([x])] for i, x in row] for row in found.by_token],
            "top": [_top(feature) for feature in found.top],
            "pinned": [
                {"id": i, "values": shorts(values)}
                for i, values in zip(asked.features, pinned, strict=True)
            ],
            "rank_by": found.rank_by,
            "targets": [visible(target) for target in found.targets],
            "position": found.position,
        }

    def _check_length(self, text: str) -> None:
        n = len(self.source.encode_batch([text])[0])
        most = max(AT_LEAST, MOST_ENTRIES // self.coder.n_features)
        most = min(most, self.source.context_length or most)
        if n > most:
            raise ValueError(f"The text must have up to {most} tokens, got {n}.")

    async def together(self, features: Sequence[int]) -> dict[str, Any] | None:
        """On how many tokens each two of some features fire; None where codes are not known."""
        if self.data is None:
            return None
        codes = self.data.codes
        counts = await asyncio.to_thread(codes.counts_together, features)
        return {
            "features": [*features],
            "counts": counts.tolist(),
            "n_tokens": codes.n_tokens,
            "exact": True,
        }

    async def steer(self, asked: SteerRequest) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The events of a generation, plain and steered in turns: `piece` many times, then `end`.

        Refused where too many go on already; `Refused` is raised before the first event only.
        """
        if self._generations >= AT_ONCE:
            raise Refused(429, f"{AT_ONCE} generations are going on: try again in a moment.")
        self._generations += 1
        streams: dict[str, Any] = {}
        try:
            streams |= await self.call(lambda: self._streams(asked))
            texts = dict.fromkeys(streams, "")
            while streams:
                for side in [*streams]:
                    piece = await self.call(lambda stream=streams[side]: next(stream, None))
                    if piece is None:
                        del streams[side]
                    elif piece.text:
                        texts[side] += piece.text
                        yield "piece", {"side": side, "text": piece.text}
            yield "end", texts
        finally:
            self._generations -= 1
            # Where they ran: elsewhere MLX cannot let go of what they hold.
            self._caller.submit(lambda: [stream.close() for stream in streams.values()])

    def _streams(self, asked: SteerRequest) -> dict[str, Any]:
        """Both generations, before their first step."""
        ids, limit = self.source.encode_batch([asked.prompt])[0], self.source.context_length
        if limit is not None and len(ids) + asked.max_tokens > limit:
            raise ValueError(
                f"Prompt and generation must have up to {limit} tokens, got {len(ids)} and "
                f"{asked.max_tokens}."
            )
        strengths = dict(asked.strengths)
        if asked.mode == "ablate":
            strengths = dict.fromkeys(strengths, 1.0)
        maxima = None if self.data is None else self.data.maxima
        edits = steering_edit(
            self.coder, strengths, mode=asked.mode, unit=asked.unit, maxima=maxima
        )
        options = {
            "max_tokens": asked.max_tokens, "temperature": asked.temperature, "seed": asked.seed,
        }  # fmt: skip
        return {
            "plain": self.source.generate(ids, stream=True, **options),
            "steered": self.source.generate(ids, stream=True, edit=edits, **options),
        }


def _settle(coder: SparseCoder, source: ActivationSource) -> None:
    """Compute all arrays of a coder and of the models whose sites it reads and writes.

    What MLX has put off, such as the cast of a model just loaded, can be computed in the thread
    that asked for it alone. A pass reaches arrays that are no parameters too.
    """
    names = [*coder.reads.names, *coder.writes.names]
    models = {id(model): model for model in (owner(source, name)[0] for name in names)}
    mx.eval(coder.parameters(), [model.run([[0]]).output for model in models.values()])


def _top(feature: Any) -> dict[str, Any]:
    value, score = shorts([feature.value, feature.score])
    return {
        "id": feature.feature_id,
        "value": value,
        "score": score,
        "position": feature.position,
        "token": visible(feature.token),
        "scores": shorts(feature.scores),
    }
