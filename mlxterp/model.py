"""The model that a user holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxterp import loading, tokenization, tracing
from mlxterp.analysis.familiar import FamiliarMethods
from mlxterp.analysis.methods import AnalysisMethods
from mlxterp.architecture import Architecture
from mlxterp.attention import Attention, attention
from mlxterp.constants import Recording
from mlxterp.editing import editing
from mlxterp.freezing import frozen, record
from mlxterp.generation import GenerationStream
from mlxterp.notebook import fragment
from mlxterp.sae.base import BaseSAE
from mlxterp.sae.checkpoint import load_sae
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.cross_layer import CrossLayerTrainer, CrossLayerTranscoder
from mlxterp.sae.crosscoder import Crosscoder, CrosscoderTrainer
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.sae import SAE, SAETrainer
from mlxterp.sae.transcoder import Transcoder, TranscoderTrainer
from mlxterp.sites import Site, SiteTable
from mlxterp.tokenization import TextMethods
from mlxterp.trace import LayerListProxy, OutputProxy, Trace
from mlxterp.tracing import Captured, Edit, Gradients, Plan, Spelling, make_plan

Edits = Mapping[Any, "Edit | Sequence[Edit]"]


class InterpretableModel(TextMethods, AnalysisMethods, FamiliarMethods):
    """An MLX language model whose activations can be read, edited and differentiated.

    `model` is a name on the Hugging Face Hub, a local directory, or any MLX module. `layer_attr`
    is the dotted path of its blocks, and the other paths name modules that are not found by
    themselves. The wrapped module stays the model it is, in `.model`.

    Half-precision weights that are loaded on a CPU become float32, because products of bfloat16
    are many times slower there; `dtype` asks for another type. Raises `ValueError` where no model
    can be loaded, `AttributeError` where there are no layers at `layer_attr`.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: Any = None,
        layer_attr: str = "layers",
        embedding_path: str | None = None,
        norm_path: str | None = None,
        lm_head_path: str | None = None,
        *,
        dtype: mx.Dtype | None = None,
    ) -> None:
        loaded = not isinstance(model, nn.Module)
        if loaded and not isinstance(model, (str, Path)):
            raise TypeError(f"model must be a name, a path or an MLX module, not {model!r:.80}")
        self._config: dict = {}
        self.name = str(model) if loaded else ""
        if not isinstance(model, nn.Module):
            model, tokenizer, self._config = loading.load(str(model), tokenizer)
        loading.cast(model, dtype, loaded)
        self.model = model
        self.tokenizer = tokenizer
        self.architecture = Architecture(model, layer_attr, embedding_path, norm_path, lm_head_path)
        self.model_type = getattr(model, "model_type", None) or type(model).__name__
        self.name = self.name or self.model_type

    @classmethod
    def demo(cls) -> InterpretableModel:
        """The bundled model: a 6-layer llama of width 128, in float32; no network is needed."""
        model = cls(str(loading.DEMO), dtype=mx.float32)
        model.name = "demo"
        return model

    @property
    def layers(self) -> LayerListProxy:
        """The blocks, for use inside a trace: `model.layers[3].mlp.output.save()`."""
        return LayerListProxy(self)

    @property
    def output(self) -> OutputProxy:
        """What the model returned in the current trace."""
        return OutputProxy(self, "__model_output__")

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return len(self.architecture.blocks)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.architecture.d_model

    @property
    def vocab_size(self) -> int | None:
        """The number of rows of the embedding, which token ids must stay below."""
        rows = self.architecture.vocab_size
        return getattr(self.tokenizer, "vocab_size", None) if rows is None else rows

    @property
    def context_length(self) -> int | None:
        """The longest input in tokens that the model was made for; None where it does not say."""
        return loading.context_length(self.model, self._config)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of tokens that stand for no text; empty without a tokenizer."""
        return tokenization.special_ids(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits by which another session can tell that it has the same weights."""
        return loading.fingerprint(self.model)

    @property
    def precision(self) -> dict[str, str | None]:
        """`dtype`, the type of the weights, and `quantization`, None where there is none."""
        return loading.precision(self.model)

    def site(self, layer: int | str | Site, component: str | None = None) -> Site:
        """The site that a layer and component, or any spelling such as `h.3.attn`, mean."""
        return self.architecture.site(layer, component)

    def width(self, site: int | Spelling) -> int:
        """The last dimension of the activation at `site`."""
        return self.architecture.width(self.site(site))

    def sites(self) -> SiteTable:
        """Every site of the model with its shape; nothing is computed to find them."""
        title = f"Sites of {self.name}: {self.n_layers} layers"
        return self.architecture.sites(title)

    def tokens(self, inputs: Any) -> tuple[mx.array, mx.array | None]:
        """Text, ids or an array as `tokens [B, S]` and `mask [B, S]`, True at real tokens."""
        inputs = mx.array(inputs) if isinstance(inputs, np.ndarray) else inputs
        bound = self._token_bound(inputs)
        pad_id = getattr(self.tokenizer, "pad_token_id", None)
        if not isinstance(pad_id, int) or not 0 <= pad_id < (bound or 0):
            pad_id = 0
        return tokenization.to_tokens(inputs, self.tokenizer, bound, pad_id)

    def _token_bound(self, inputs: Any) -> int | None:
        if isinstance(inputs, mx.array) and not mx.issubdtype(inputs.dtype, mx.integer):
            self.architecture.survey(inputs if inputs.ndim > 1 else inputs[None])
            return None
        return self.architecture.vocab_size

    def run(
        self,
        tokens: Any,
        *,
        capture: Spelling | Iterable[Spelling] = (),
        edit: Edits | None = None,
        stop: bool = False,
        **kwargs: Any,
    ) -> Captured:
        """One forward pass that holds the `capture` sites and passes others through `edit`.

        `tokens` is text, a list of texts, token ids (one list or several, of unequal length too) or
        an array `[S]` or `[B, S]`. An edit is `fn(x)` or `fn(x, context)` and returns the shape
        of `x [B, S, ...]`; a list of them is applied in order. With `stop=True` the pass ends after
        the last captured site. Other arguments go to the model. Works inside `mx.compile` and
        `mx.grad`, where captured arrays must be returned. Raises `ValueError` for unknown sites,
        empty input, and token ids beyond the embedding.
        """
        ids, mask = self.tokens(tokens)
        plan = make_plan(self.architecture, capture, edit)
        return tracing.run(self.architecture, ids, plan, mask=mask, stop=stop, **kwargs)

    def gradients(
        self,
        tokens: Any,
        sites: Spelling | Iterable[Spelling],
        metric: Callable[..., mx.array],
        *,
        edit: Edits | None = None,
        **kwargs: Any,
    ) -> Gradients:
        """`metric(logits)`, or `metric(logits, captured)`, and its derivative by every site.

        The result has `value`, `activations` and `gradients`, the last two by site `[B, S, ...]`.
        """
        ids, mask = self.tokens(tokens)
        plan = make_plan(self.architecture, sites, edit)
        return tracing.gradients(self.architecture, ids, plan, metric, mask=mask, **kwargs)

    def unembed(self, hidden: mx.array) -> mx.array:
        """The logits `[..., vocab]` of `hidden [..., d_model]`, by the model's own norm and head.

        `hidden` takes the place of the last block's output, so that scales and soft-caps apply too.
        """
        last = Site(self.n_layers - 1, "resid_post")
        if len(self.sites()[last].shape) != 3:
            raise ValueError(f"{self.name} keeps several streams: one cannot be unembedded alone")
        if hidden.shape[-1] != self.d_model:
            raise ValueError(f"hidden must have width {self.d_model}, not {hidden.shape[-1]}")
        rows = hidden.reshape(-1, 1, self.d_model)
        tokens = mx.zeros((rows.shape[0], 1), dtype=mx.int32)
        plan = Plan(edits={last: (lambda x, context: rows,)})  # without any edits that stand
        logits = tracing.run(self.architecture, tokens, plan).output
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def trace(
        self,
        inputs: Any,
        interventions: Edits | None = None,
        *,
        capture: Spelling | Iterable[Spelling] | None = None,
        stop: bool = False,
        **kwargs: Any,
    ) -> Trace:
        """A pass for notebooks: `with model.trace("text"): h = model.layers[3].output.save()`.

        Every activation can be read in the body, or only those of `capture`, which takes far less
        memory. Interventions are edits as in `run`.
        """
        return Trace(self, inputs, interventions, capture=capture, stop=stop, **kwargs)

    def stream(
        self,
        prompt: Any,
        *,
        edit: Edits | None = None,
        capture: Spelling | Iterable[Spelling] = (),
        **kwargs: Any,
    ) -> GenerationStream:
        """The pieces of a generation, one by one; the arguments are those of `generate`."""
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer, which generate needs to write text and to know where "
                "it ends: give one, InterpretableModel(model, tokenizer=...)"
            )
        ids, _ = self.tokens(prompt)
        plan = make_plan(self.architecture, capture, edit)
        return GenerationStream(self.architecture, plan, ids, self.tokenizer, **kwargs)

    def generate(self, prompt: Any, *, stream: bool = False, **kwargs: Any) -> Any:
        """Continue `prompt` (text or token ids) by up to `max_tokens`, with edits and captures.

        `edit` and `capture` are those of `run`; the positions that edits are told count from the
        start of the prompt. Greedy at `temperature` 0, else sampled from `seed` with `top_p`,
        `top_k` and `min_p`. Other arguments go to mlx-lm. Returns a `Generation`, or with
        `stream=True` its pieces one by one.
        """
        pieces = self.stream(prompt, **kwargs)
        if stream:
            return pieces
        for _ in pieces:
            pass
        return pieces.result()

    def editing(self, edits: Edits) -> AbstractContextManager[None]:
        """Apply edits to every use of the model: `with model.editing({"layers.3": edit}): ...`.

        In the block `run`, `trace`, `gradients`, `generate` and plain calls of the model have them,
        before edits of their own, in this thread alone; blocks can be nested. A function of
        `mx.compile` keeps the edits of its first call, and a stream those of its beginning.
        """
        return editing(self.architecture, edits)

    def attention(
        self,
        tokens: Any,
        layers: int | Iterable[int] | None = None,
        *,
        edit: Edits | None = None,
        **kwargs: Any,
    ) -> Attention:
        """The exact `q`, `k`, `v`, `pattern` and `z` of each head: `attention[layer].pattern`.

        All layers that have softmax attention where None are named; see `AttentionHeads`.
        """
        ids, mask = self.tokens(tokens)
        plan = make_plan(self.architecture, edit=edit)
        return attention(self.architecture, ids, layers, plan, mask=mask, **kwargs)

    def frozen(self, at: Any = None) -> AbstractContextManager[None]:
        """Hold attention patterns and the scales of norms constant: `with model.frozen(): ...`.

        With nothing `at` values stay as they are and derivatives take them as constants; with
        tokens, or a `Recording` of them, they are those of a plain pass `at` these tokens in every
        pass of the block. See `mlxterp.freezing.frozen`, and `check` for where that is affine.
        """
        if at is not None and not isinstance(at, Recording):
            ids, mask = self.tokens(at)
            at = record(self.architecture, ids, mask=mask)
        return frozen(self.architecture, at)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def parameters(self) -> dict:
        """The parameters of the wrapped model."""
        return self.model.parameters()

    def trainable_parameters(self) -> dict:
        """The parameters of the wrapped model that are not frozen."""
        return self.model.trainable_parameters()

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The modules of the wrapped model with their dotted paths, the model itself first."""
        return self.model.named_modules()

    def train_sae(
        self,
        layer: int | str | Site,
        dataset: ActivationDataset | Iterable[str],
        component: str | None = None,
        save_path: str | Path | None = None,
        config: SAEConfig | None = None,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        verbose: bool = True,
    ) -> SAE:
        """A sparse autoencoder of one site (`mlp` if none is named); see `SAETrainer.train`."""
        trainer = SAETrainer(config, checkpoint_dir)
        return trainer.train(
            self, layer, component, dataset, save_path=save_path, resume=resume, verbose=verbose
        )

    def train_transcoder(
        self,
        from_layer: int | str | Site,
        to_layer: int | str | Site | None = None,
        component: str | None = None,
        dataset: ActivationDataset | Iterable[str] = (),
        *,
        config: SAEConfig | None = None,
        checkpoint_dir: str | Path | None = None,
        **options: Any,
    ) -> Transcoder:
        """A transcoder between two sites, such as across an MLP; see `TranscoderTrainer.train`."""
        trainer = TranscoderTrainer(config, checkpoint_dir)
        return trainer.train(self, from_layer, to_layer, component, dataset, **options)

    def train_crosscoder(
        self,
        layer: int | str | Site | None = None,
        components: Sequence[str] = (),
        dataset: ActivationDataset | Iterable[str] = (),
        *,
        config: SAEConfig | None = None,
        checkpoint_dir: str | Path | None = None,
        **options: Any,
    ) -> Crosscoder:
        """A crosscoder of several sites, or of several models; see `CrosscoderTrainer.train`."""
        trainer = CrosscoderTrainer(config, checkpoint_dir)
        return trainer.train(self, layer, components, dataset, **options)

    def train_cross_layer_transcoder(
        self,
        layers: Sequence[int],
        dataset: ActivationDataset | Iterable[str] = (),
        *,
        config: SAEConfig | None = None,
        checkpoint_dir: str | Path | None = None,
        **options: Any,
    ) -> CrossLayerTranscoder:
        """A transcoder over the MLPs of several layers; see `CrossLayerTrainer.train`."""
        trainer = CrossLayerTrainer(config, checkpoint_dir)
        return trainer.train(self, layers, dataset, **options)

    def load_sae(self, path: str | Path, **options: Any) -> BaseSAE:
        """The coder saved at `path`, or `user/name` on the Hub, bound to this model; warns where it
        does not fit. The options are those of `mlxterp.sae.load_sae`."""
        sae = load_sae(path, **options)
        fits = sae.is_compatible(self)
        if fits.reasons or fits.doubts:
            warnings.warn(f"{path} is {fits}", stacklevel=2)
        sae.bind(self)
        return sae

    def __repr__(self) -> str:
        tokenizer = "✓" if self.tokenizer is not None else "✗"
        return (
            f"InterpretableModel(\n  model={self.name},\n  layers={self.n_layers},\n"
            f"  tokenizer={tokenizer}\n)"
        )

    def _repr_html_(self) -> str:
        title, groups = f"InterpretableModel: {self.name}", self.sites().groups()
        return fragment("sites.html", title=title, facts=loading.facts(self), groups=groups)
