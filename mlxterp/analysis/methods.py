"""The analyses of a language model, as its methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxterp.analysis import (
    attribution_patching,
    causal_tracing,
    patching,
    path_patching,
    predictions,
)
from mlxterp.analysis import logit_lens as lenses
from mlxterp.analysis import tuned_lens as tuned
from mlxterp.analysis.contrasts import Method as VectorMethod
from mlxterp.analysis.grid import Components, Layers
from mlxterp.analysis.lens_training import train_tuned_lens
from mlxterp.analysis.logit_attribution import Token, logit_attribution
from mlxterp.analysis.logit_parts import LogitParts
from mlxterp.analysis.metrics import Measure
from mlxterp.analysis.patching_result import PatchingResult, drawn
from mlxterp.analysis.probe_data import Place
from mlxterp.analysis.probe_fits import Method as ProbeMethod
from mlxterp.analysis.probe_layers import LayerProbes, probe_layers
from mlxterp.analysis.probes import Probe, train_probe
from mlxterp.analysis.site_rows import Position
from mlxterp.analysis.source import Readable
from mlxterp.analysis.steering_vectors import SteeringVector, steering_vector
from mlxterp.sae.coder import SparseCoder
from mlxterp.sites import Site


class AnalysisMethods:
    """What is read of a model, as methods of it."""

    def get_token_predictions(
        self: Readable,
        hidden_state: mx.array,
        top_k: int = 10,
        return_scores: bool = False,
        embedding_layer: nn.Module | None = None,
        lm_head: nn.Module | None = None,
    ) -> list:
        """The likeliest tokens of a hidden state; see `predictions.get_token_predictions`."""
        return predictions.get_token_predictions(
            self, hidden_state, top_k, return_scores, embedding_layer, lm_head
        )

    def logit_lens(
        self: Readable,
        text: Any,
        top_k: int = 1,
        layers: int | Iterable[int] | None = None,
        position: int | Iterable[int] | None = None,
        plot: bool = False,
        max_display_tokens: int = 15,
        figsize: tuple[float, float] = (16, 10),
        cmap: str = "viridis",
        font_family: str | None = None,
        final_norm: nn.Module | None = None,
        skip_norm: bool = False,
    ) -> lenses.Lenses:
        """What each layer would predict if it were the last, `{layer: [[(id, logit, text), ...]]}`
        with a list for each position; see `logit_lens.logit_lens`.

        With `plot=True` the result has a `figure`, which a notebook shows.
        """
        found = lenses.logit_lens(self, text, top_k, layers, position, final_norm, skip_norm)
        return lenses.plotted(found, plot, max_display_tokens, figsize, cmap, font_family)

    def tuned_lens(
        self: Readable,
        text: Any,
        tuned_lens: tuned.TunedLens,
        top_k: int = 1,
        layers: int | Iterable[int] | None = None,
        position: int | Iterable[int] | None = None,
        plot: bool = False,
        max_display_tokens: int = 15,
        figsize: tuple[float, float] = (16, 10),
        cmap: str = "viridis",
        font_family: str | None = None,
        final_norm: nn.Module | None = None,
        skip_norm: bool = False,
    ) -> lenses.Lenses:
        """As `logit_lens`, of states that a trained lens maps; see `tuned_lens.tuned_lens`."""
        chosen = (top_k, layers, position, final_norm, skip_norm)
        found = tuned.tuned_lens(self, text, tuned_lens, *chosen)
        return lenses.plotted(found, plot, max_display_tokens, figsize, cmap, font_family)

    def train_tuned_lens(
        self: Readable,
        dataset: Any,
        num_steps: int = 250,
        learning_rate: float = 1.0,
        momentum: float = 0.9,
        max_seq_len: int = 2048,
        gradient_clip: float | None = 1.0,
        save_path: str | Path | None = None,
        verbose: bool = True,
        callback: Callable[[int, float], Any] | None = None,
        *,
        seed: int = 0,
    ) -> tuned.TunedLens:
        """Train a tuned lens for this model; see `lens_training.train_tuned_lens`."""
        return train_tuned_lens(
            self, dataset, num_steps, learning_rate, momentum, max_seq_len, gradient_clip,
            save_path, verbose, callback, seed=seed,
        )  # fmt: skip

    def load_tuned_lens(self: Readable, path: str | Path) -> tuned.TunedLens:
        """The tuned lens saved at `path`; raises `ValueError` where it does not fit the model."""
        return tuned.load_for(self, path)

    def logit_attribution(
        self: Readable,
        text: Any,
        target: Token | None = None,
        against: Token | None = None,
        position: int = -1,
        coder: SparseCoder | None = None,
    ) -> LogitParts:
        """What each layer, head and feature adds to a logit by itself, past all later layers; see
        `logit_attribution.logit_attribution`."""
        return logit_attribution(self, text, target, against, position, coder)

    def activation_patching(
        self: Readable,
        clean_text: Any,
        corrupted_text: Any,
        component: Components = "mlp",
        layers: Layers | None = None,
        metric: str | Measure = "l2",
        plot: bool = False,
        figsize: tuple[float, float] = (12, 8),
        cmap: str = "RdBu_r",
        **options: Any,
    ) -> PatchingResult:
        """What comes back of a clean run where activations of it are put into a corrupted one,
        `{layer: percent}`; the `options`, such as `positions="each"`, `heads` and `answers`, are
        those of `patching.activation_patching`.

        With `plot=True` the result has a `figure`, which a notebook shows.
        """
        found = patching.activation_patching(
            self, clean_text, corrupted_text, component, layers, metric, **options
        )
        return drawn(found, plot, figsize, cmap)

    def attribution_patching(
        self: Readable,
        clean_text: Any,
        corrupted_text: Any,
        component: Components = "mlp",
        layers: Layers | None = None,
        metric: str | Measure = "l2",
        plot: bool = False,
        figsize: tuple[float, float] = (12, 8),
        cmap: str = "RdBu_r",
        **options: Any,
    ) -> PatchingResult:
        """An estimate of `activation_patching` by derivatives, for all patches together; see
        `attribution_patching.attribution_patching` for the `options`, of which `steps` is new."""
        found = attribution_patching.attribution_patching(
            self, clean_text, corrupted_text, component, layers, metric, **options
        )
        return drawn(found, plot, figsize, cmap)

    def path_patching(
        self: Readable,
        clean_text: Any,
        corrupted_text: Any,
        senders: Any = "heads",
        receivers: Any = "logits",
        metric: str | Measure = "logit_diff",
        **options: Any,
    ) -> PatchingResult:
        """What comes back through direct paths from senders to receivers, all else being held; see
        `path_patching.path_patching`."""
        return path_patching.path_patching(
            self, clean_text, corrupted_text, senders, receivers, metric, **options
        )

    def causal_tracing(
        self: Readable,
        text: Any,
        subject: str | Sequence[int],
        component: Components = "output",
        layers: Sequence[int] | None = None,
        metric: str | Measure = "probability",
        **options: Any,
    ) -> PatchingResult:
        """What comes back of a prediction where activations are restored after the embeddings of a
        subject were blurred by noise; see `causal_tracing.causal_tracing`."""
        return causal_tracing.causal_tracing(
            self, text, subject, component, layers, metric, **options
        )

    def steering_vector(
        self: Readable,
        positive: Iterable[Any],
        negative: Iterable[Any],
        layer: int | str | Site,
        component: str | None = None,
        position: Position = -1,
        method: VectorMethod = "mean",
        seed: int = 0,
    ) -> SteeringVector:
        """The direction from the activations of negative prompts to those of positive ones; see
        `steering_vectors.steering_vector`."""
        return steering_vector(self, positive, negative, layer, component, position, method, seed)

    def train_probe(
        self: Readable,
        texts: Iterable[Any],
        labels: Iterable[Any],
        layer: int | str | Site,
        component: str | None = None,
        position: Place = -1,
        method: ProbeMethod = "logistic",
        test_split: float = 0.25,
        seed: int = 0,
        *,
        l2: float = 1.0,
        groups: Iterable[Any] | None = None,
    ) -> Probe:
        """A linear classifier of labels by the activations at a site, judged on held-out texts; see
        `probes.train_probe`."""
        return train_probe(
            self, texts, labels, layer, component, position, method, test_split, seed,
            l2=l2, groups=groups,
        )  # fmt: skip

    def probe_layers(
        self: Readable,
        texts: Iterable[Any],
        labels: Iterable[Any],
        layers: Iterable[int] | None = None,
        component: str | None = None,
        position: Place = -1,
        method: ProbeMethod = "logistic",
        **options: Any,
    ) -> LayerProbes:
        """A probe of each layer, of the same texts; see `probe_layers.probe_layers`."""
        return probe_layers(self, texts, labels, layers, component, position, method, **options)
