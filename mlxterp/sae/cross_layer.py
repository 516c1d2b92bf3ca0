"""Cross-layer transcoders: the features of each layer write to that layer and all later ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.coder import Block, Columns
from mlxterp.sae.config import CrossLayerConfig, SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.fitting import CoderTrainer, OnClassOrInstance, as_dataset, columns_of
from mlxterp.sae.forward_order import check_before
from mlxterp.sae.source import ActivationSource, find_site


class CrossLayerTranscoder(BaseSAE):
    """A transcoder over many layers at once, in which features write across layers.

        z_l   = activation_function(x_l @ W_enc_l.T + b_enc_l)        of the features of layer l
        y'_l' = sum over l <= l' of z_l @ W_dec_(l, l') + b_dec_l'

    It reads one site of each layer, such as the MLPs' inputs, and writes one, such as their
    outputs. There are equally many features for each layer.

    Reference: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language
    Models"; Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing".
    """

    kind = "cross_layer_transcoder"

    def __init__(
        self, reads: Columns, writes: Columns, n_features: int, *args: Any, **options: Any
    ):
        n = len(reads.names)
        if n < 2 or len(writes.names) != n:
            raise ValueError(
                "A cross-layer transcoder reads a site and writes one of each of two or more "
                f"layers, got {reads} and {writes}."
            )
        if len(set(reads.widths)) > 1 or len(set(writes.widths)) > 1:
            raise ValueError(f"All layers must have one width, got {reads} and {writes}.")
        super().__init__(reads, writes, n_features, *args, **options)

    @classmethod
    def untrained(cls, reads: Columns, writes: Columns, config: SAEConfig) -> Self:
        n_features = len(reads.names) * config.n_features(reads.widths[0])
        name = config.activation_function
        return cls(reads, writes, n_features, name, config.k, skip=config.skip)

    def make_blocks(self, n_features: int) -> tuple[Block, ...]:
        n = len(self.reads.names)
        bounds = itertools.pairwise(n_features * i // n for i in range(n + 1))
        columns = zip(self.reads.slices.values(), self.writes.slices.values(), strict=True)
        return tuple(
            Block(slice(*own), read, slice(written.start, self.writes.width), slice(i, n))
            for i, (own, (read, written)) in enumerate(zip(bounds, columns, strict=True))
        )


class CrossLayerTrainer(CoderTrainer):
    """Trains cross-layer transcoders: `fit` on activations, `train` from a model and texts.

    Its arguments are those of `SAETrainer`; `config=None` stands for the recommended recipe.
    """

    kind = CrossLayerTranscoder
    config_type = CrossLayerConfig

    def fit(
        self,
        dataset: ActivationDataset | Any,
        reads: Sequence[str],
        writes: Sequence[str],
        resume: bool = False,
        *,
        model: ActivationSource | None = None,
    ) -> CrossLayerTranscoder:
        """A cross-layer transcoder of a dataset, or of `{site: array [n_tokens, d]}`.

        `reads` and `writes` name a site of each layer, in the order of the layers. A share
        `config.validation_split` is held out. Raises as `SAETrainer.fit` does.
        """
        dataset = as_dataset(dataset)
        columns = dataset.columns
        first, second = columns.those(tuple(reads)), columns.those(tuple(writes))
        return self.fit_between(first, second, dataset, resume, model)

    @OnClassOrInstance
    def train(
        self,
        model: ActivationSource,
        layers: Sequence[Any],
        dataset: ActivationDataset | Iterable[str] = (),
        from_component: str = "mlp_in",
        to_component: str = "mlp_out",
        config: SAEConfig | None = None,
        validation_split: float | None = None,
        save_path: str | Path | None = None,
        resume: bool = False,
        verbose: bool = True,
    ) -> CrossLayerTranscoder:
        """A cross-layer transcoder over layers of a model, from texts or a dataset.

        It reads the `from_component` of each of the `layers`, which ascend, and writes the
        `to_component`. The result remembers the model and the data. Raises `ValueError` as
        `SAETrainer.train` does, and where what is written does not depend on what is read.
        """
        if len(layers) < 2:
            raise ValueError(f"layers must be two or more, ascending, got {list(layers)}.")
        reads = [find_site(model, layer, from_component) for layer in layers]
        writes = [find_site(model, layer, to_component) for layer in layers]
        for source, target in zip(reads, writes, strict=True):
            check_before(model, source, target)
        for source, target in itertools.pairwise(reads):
            check_before(model, source, target)
        return self.train_between(
            model, columns_of(model, reads), columns_of(model, writes), dataset,
            config=config, validation_split=validation_split, save_path=save_path, resume=resume,
            verbose=verbose,
        )  # fmt: skip
