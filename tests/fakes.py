"""A stand-in for a language model where none is the point: one character per token, and one site
unless there are to be more."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import pytest

BOS, EOS, FIRST = 0, 1, 2
SITE = "layers.0.mlp"
VOCABULARY = FIRST + 95

counts_passes = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="a compiled forward pass is called once only"
)


class Result(dict):
    output: mx.array


class FakeSource:
    """Printable ASCII characters as tokens; column 0 of an activation is the token's id.

    Activations at the sites of `further`, `{name: width}`, are linear maps of those at `SITE`.
    """

    name, fingerprint, n_layers = "fake", "f00d", 1
    special_token_ids = frozenset({BOS, EOS})

    def __init__(self, width=6, context_length=64, bos=True, not_finite="", head=0.0, further=None):
        rng = np.random.default_rng(0)
        table = rng.normal(size=(VOCABULARY, width)).astype(np.float32)
        table[:, 0] = np.arange(VOCABULARY)
        table[self._ids(not_finite), -1] = np.nan
        self.table, self.d_model = mx.array(table), width
        self.context_length, self.bos, self.head = context_length, bos, head
        self.passes = 0
        self.maps = {
            name: mx.array(rng.normal(size=(width, d)).astype(np.float32))
            for name, d in (further or {}).items()
        }

    def _ids(self, text):
        return [FIRST + ord(character) - ord(" ") for character in text]

    def encode_batch(self, texts):
        if not self.bos and "" in texts:
            raise ValueError("the text has no tokens: ''")
        return [[BOS] * self.bos + self._ids(text) for text in texts]

    def encode_chat(self, messages):
        return self.encode_batch(["".join(message["content"] for message in messages)])[0]

    def to_str_tokens(self, input):
        ids = self.encode_batch([input])[0] if isinstance(input, str) else np.array(input).tolist()
        return [chr(ord(" ") + i - FIRST) if i >= FIRST else "<s>" for i in ids]

    def site(self, layer, component=None):
        name = f"layers.{layer}.{component or 'resid_post'}" if isinstance(layer, int) else layer
        if name != SITE and name not in self.maps:
            raise ValueError(f"no site {name!r}")
        return name

    def sites(self):
        return [SITE, *self.maps]

    def width(self, site):
        name = self.site(site)
        return self.d_model if name == SITE else self.maps[name].shape[1]

    def run(self, tokens, *, capture=(), edit: Mapping | None = None, stop=False):
        self.passes += 1
        hidden = self.table[mx.array(tokens)]
        edits = {self.site(name): function for name, function in (edit or {}).items()}
        if SITE in edits:
            hidden = edits[SITE](hidden)
        result = Result({self.site(n): self._at(self.site(n), hidden, edits) for n in capture})
        result.output = None if stop else self.unembed(hidden)
        return result

    def _at(self, name, hidden, edits):
        if name == SITE:
            return hidden
        there = hidden @ self.maps[name]
        return edits[name](there) if name in edits else there

    def unembed(self, hidden):
        return self.head * (hidden @ self.table.T)
