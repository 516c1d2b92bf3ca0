"""The spellings of TransformerLens and nnterp, as methods of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import Any

import mlx.core as mx

from mlxterp.analysis.hook_cache import Filter, FwdHooks, HookCache, hook_edits, run_with_cache
from mlxterp.analysis.source import Readable
from mlxterp.hooks import first_array
from mlxterp.sites import OUTPUT
from mlxterp.trace import OutputProxy, current_trace


class LayerValues:
    """One component of every layer in the trace that is open: `model.layers_output[3].save()`."""

    def __init__(self, model: Readable, component: str) -> None:
        self._model = model
        self._component = component

    def __getitem__(self, layer: int) -> OutputProxy:
        count = len(self)
        if not -count <= index(layer) < count:
            raise IndexError(f"layer {layer} does not exist: layers are 0 to {count - 1}")
        return OutputProxy(self._model, f"layers.{index(layer) % count}.{self._component}")

    def __setitem__(self, layer: int, value: Any) -> None:
        self[layer][...] = value  # which says that it would change nothing, and what would

    def __len__(self) -> int:
        return self._model.n_layers

    def __iter__(self) -> Iterator[OutputProxy]:
        return (self[layer] for layer in range(len(self)))

    def __repr__(self) -> str:
        return f"LayerValues(layers.*.{self._component})"


class NextTokenProbs(OutputProxy):
    """The probabilities `[B, vocab]` of what follows the last real token, in the open trace."""

    def __init__(self, model: Readable) -> None:
        super().__init__(model, "next_token_probs")
        self._logits = OutputProxy(model, OUTPUT)

    @property
    def value(self) -> mx.array:
        logits, trace = self._logits.value, self._trace or current_trace(self._model)
        assert trace is not None
        _, mask = self._model.tokens(trace.inputs)
        if mask is None:
            last = mx.full((len(logits), 1, 1), logits.shape[1] - 1)
        else:
            last = (mask.sum(axis=-1) - 1)[:, None, None]
        found = mx.take_along_axis(logits.astype(mx.float32), last, axis=1)[:, 0]
        return mx.softmax(found, axis=-1)


class FamiliarMethods:
    """Other libraries' names for what a model does, so that their code needs few changes."""

    def run_with_cache(
        self: Readable,
        tokens: Any,
        names_filter: Filter = None,
        stop_at_layer: int | None = None,
        remove_batch_dim: bool = False,
    ) -> tuple[mx.array, HookCache]:
        """TransformerLens: the logits, and activations by its names; see
        `hook_cache.run_with_cache`."""
        return run_with_cache(self, tokens, names_filter, stop_at_layer, remove_batch_dim)

    def run_with_hooks(self: Readable, tokens: Any, fwd_hooks: FwdHooks = ()) -> mx.array:
        """TransformerLens: the logits of a pass with functions `f(value, hook)` at hooks.

        `fwd_hooks` are pairs of a name, or a function that chooses names, and such a function; None
        that it returns leaves the value as it is. See `hook_cache.hook_edits`.
        """
        edits = hook_edits(self, fwd_hooks, self.tokens(tokens)[0])
        logits = first_array(self.run(tokens, edit=edits).output)
        assert logits is not None
        return logits

    @contextmanager
    def hooks(self: Any, fwd_hooks: FwdHooks = ()) -> Iterator[Any]:
        """TransformerLens: `with model.hooks(fwd_hooks=[...]):` for every use of the model, as in
        `editing`."""
        with self.editing(hook_edits(self, fwd_hooks)):
            yield self

    @property
    def layers_output(self: Readable) -> LayerValues:
        """nnterp: what each block returns, in a trace."""
        return LayerValues(self, "resid_post")

    @property
    def layers_input(self: Readable) -> LayerValues:
        """nnterp: what each block receives, in a trace."""
        return LayerValues(self, "resid_pre")

    @property
    def attentions_output(self: Readable) -> LayerValues:
        """nnterp: what the attention of each block returns, in a trace."""
        return LayerValues(self, "attn")

    @property
    def attentions_input(self: Readable) -> LayerValues:
        """nnterp: what the attention of each block receives, in a trace."""
        return LayerValues(self, "attn_in")

    @property
    def mlps_output(self: Readable) -> LayerValues:
        """nnterp: what the MLP of each block returns, in a trace."""
        return LayerValues(self, "mlp")

    @property
    def mlps_input(self: Readable) -> LayerValues:
        """nnterp: what the MLP of each block receives, in a trace."""
        return LayerValues(self, "mlp_in")

    @property
    def logits(self: Readable) -> OutputProxy:
        """nnterp: the logits of the open trace."""
        return OutputProxy(self, OUTPUT)

    @property
    def next_token_probs(self: Readable) -> NextTokenProbs:
        """nnterp: the probabilities of the token after each text of the open trace."""
        return NextTokenProbs(self)

    def project_on_vocab(self: Readable, hidden: mx.array | OutputProxy) -> mx.array:
        """nnterp: the logits of hidden states by the model's norm and head; as `unembed`."""
        return self.unembed(hidden.value if isinstance(hidden, OutputProxy) else hidden)
