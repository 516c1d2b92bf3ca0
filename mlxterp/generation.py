"""Generate text with edits and captures, through mlx-lm and its key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.architecture import Architecture
from mlxterp.hooks import Hooks
from mlxterp.notebook import fragment
from mlxterp.sites import Site
from mlxterp.tracing import Captured, Pass, Plan, cache_offset


@dataclass(frozen=True)
class Generation:
    """Generated `text` and `tokens`, and `captured` activations `[1, S, ...]` of the prompt
    and of every generated token."""

    text: str
    tokens: list[int]
    prompt_tokens: list[int]
    captured: Captured

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return (
            f"Generation({self.text!r}, {len(self.tokens)} tokens after {len(self.prompt_tokens)})"
        )

    def _repr_html_(self) -> str:
        facts = [
            ("text", self.text),
            ("prompt", f"{len(self.prompt_tokens):,} tokens"),
            ("generated", f"{len(self.tokens):,} tokens"),
            *((str(site), str(list(array.shape))) for site, array in self.captured.items()),
        ]
        return fragment("facts.html", title="Generation", facts=facts)


class GenerationStream(Iterator[Any]):
    """The pieces of a generation as mlx-lm makes them, each with `.text` and `.token`."""

    def __init__(
        self,
        architecture: Architecture,
        plan: Plan,
        prompt: mx.array,
        tokenizer: Any,
        *,
        max_tokens: int = 100,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        from mlx_lm import stream_generate

        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        if prompt.shape[0] != 1:
            raise ValueError(f"generate takes one prompt, not {prompt.shape[0]}")
        prompt = prompt[0]
        if kwargs.get("draft_model") is not None and plan:
            raise ValueError(
                "draft_model cannot be used with edit= or capture=: it rewinds positions"
            )
        self._architecture = architecture
        self._prompt = prompt
        self._recorder = _Recorder(architecture, plan, prompt.size, kwargs.get("prompt_cache"))
        kwargs |= {
            "max_tokens": max_tokens,
            "sampler": make_sampler(temperature, top_p, top_k, min_p, seed),
        }
        self._pieces = stream_generate(architecture.model, tokenizer, prompt, **kwargs)
        self.tokens: list[int] = []
        self.text = ""

    def __next__(self) -> Any:
        # Open for one step only: between steps the caller's own code runs.
        try:
            with self._recorder.hooks, self._recorder.forward.hooks:
                piece = next(self._pieces)
        except BaseException:
            self._recorder.close()
            raise
        self._recorder.settle()
        self.tokens.append(piece.token)
        self.text += piece.text
        return piece

    def close(self) -> None:
        """End the generation where it is, in the thread that it ran in; nothing more comes."""
        self._pieces.close()
        self._recorder.close()

    def result(self) -> Generation:
        """All that was generated so far."""
        ids: list[int] = np.array(self._prompt).tolist()
        activations = self._recorder.activations(len(ids) + len(self.tokens))
        tokens = mx.array([ids + self.tokens])
        captured = Captured(activations, self._architecture, None, tokens, mx.ones_like(tokens) > 0)
        return Generation(self.text, list(self.tokens), ids, captured)


class _Recorder:
    """Follows the calls of the model: tells edits where they are, keeps what calls captured."""

    def __init__(
        self, architecture: Architecture, plan: Plan, prompt_length: int, cache: Any
    ) -> None:
        start = 0 if cache is None else cache_offset(cache)
        if start is None and plan:
            raise ValueError(
                "prompt_cache does not tell how many tokens it holds, which edit= and capture= "
                "need: leave it out"
            )
        self._position = start or 0
        self._prompt_end = self._position + prompt_length
        self._axes = {site: _position_axis(architecture, site) for site in plan.capture}
        self._parts: dict[Site, list[mx.array]] = {site: [] for site in plan.capture}
        self.forward = Pass(architecture, plan)
        self.hooks = Hooks()
        self.hooks.add_before(architecture.model, self._begin)
        self.forward.hooks.add_after(architecture.model, self._end)

    def _begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        length = args[0].shape[1]
        here = self._position
        self._position += length
        self.forward.begin(
            positions=mx.arange(here, here + length),
            step=max(0, here - self._prompt_end + 1),
            phase="prefill" if here < self._prompt_end else "decode",
            mask=mx.ones((1, length), dtype=mx.bool_),
            prompt_end=self._prompt_end,
        )
        return args, kwargs

    def _end(self, output: Any) -> Any:
        self.forward.check()
        for site, array in self.forward.activations.items():
            self._parts[site].append(array)
        return output

    def close(self) -> None:
        """Let go of the hooks, which refer back here."""
        self.hooks.clear()
        self.forward.hooks.clear()

    def settle(self) -> None:
        """Compute what was captured, so that no graph of a past step stays alive."""
        mx.async_eval([parts[-1] for parts in self._parts.values() if parts])

    def activations(self, length: int) -> dict[Site, mx.array]:
        """What was captured at the first `length` positions."""
        joined = {}
        for site, parts in self._parts.items():
            if not parts:
                continue  # nothing has run yet
            axis = self._axes[site]
            whole = mx.concatenate(parts, axis=axis)
            joined[site] = mx.split(whole, [length], axis=axis)[0]
        return joined


def _position_axis(architecture: Architecture, site: Site) -> int:
    info = architecture.table.get(site)
    if info is None or "S" not in info.shape:
        raise ValueError(f"{site} cannot be captured while generating: it has no axis of positions")
    return info.shape.index("S")


def make_sampler(
    temperature: float, top_p: float, top_k: int, min_p: float, seed: int
) -> Callable[[mx.array], mx.array]:
    """A sampler with a random state of its own; at temperature 0 it takes the largest."""
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    key = mx.random.key(seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        if temperature == 0:
            return mx.argmax(logprobs, axis=-1)
        if 0 < top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p)
        if top_k > 0:
            logprobs = apply_top_k(logprobs, top_k)
        key, now = mx.random.split(key)
        return mx.random.categorical(logprobs / temperature, key=now)

    return sample
