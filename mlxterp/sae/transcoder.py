"""The transcoder: a coder from one site to another, and the trainer that makes it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import SAEConfig, TranscoderConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.fitting import CoderTrainer, OnClassOrInstance, as_dataset, columns_of
from mlxterp.sae.forward_order import check_before
from mlxterp.sae.source import ActivationSource, find_site


class Transcoder(BaseSAE):
    """A sparse stand-in for what a model computes between two sites, such as an MLP.

    With `skip` a matrix leads from what is read to what is written, past the features.

    Reference: Dunefsky et al. 2024, arXiv 2406.11944; skip connections: Paulo et al. 2025,
    arXiv 2501.18823.
    """

    kind = "transcoder"
    may_skip = True

    def __init__(
        self, reads: Columns, writes: Columns, n_features: int, *args: Any, **options: Any
    ):
        if len(reads.names) != 1 or len(writes.names) != 1 or reads.names == writes.names:
            raise ValueError(
                f"A transcoder reads one site and writes another, got {reads} and {writes}."
            )
        super().__init__(reads, writes, n_features, *args, **options)

    @property
    def from_site(self) -> str:
        """The name of the site that it reads."""
        return self.reads.names[0]

    @property
    def to_site(self) -> str:
        """The name of the site that it writes."""
        return self.writes.names[0]


class TranscoderTrainer(CoderTrainer):
    """Trains transcoders: `fit` on activations, `train` from a model and texts.

    Its arguments are those of `SAETrainer`; `config=None` stands for the recommended recipe.
    """

    kind = Transcoder
    config_type = TranscoderConfig

    def fit(
        self,
        dataset: ActivationDataset | Any,
        resume: bool = False,
        *,
        reads: str | None = None,
        writes: str | None = None,
        model: ActivationSource | None = None,
    ) -> Transcoder:
        """A transcoder of a dataset of several sites, or of `{site: array [n_tokens, d]}`.

        It reads the site `reads` and writes `writes`, by default the first and the second one. A
        share `config.validation_split` is held out. Raises as `SAETrainer.fit` does.
        """
        dataset = as_dataset(dataset)
        names = dataset.columns.names
        if len(names) != 2 and (reads is None or writes is None):
            raise ValueError(
                f"A transcoder needs two sites; the dataset has {list(names)}: name them with "
                "reads=... and writes=..."
            )
        first, second = (
            dataset.columns.only(given or name)
            for given, name in zip((reads, writes), names[:2], strict=True)
        )
        return self.fit_between(first, second, dataset, resume, model)

    @OnClassOrInstance
    def train(
        self,
        model: ActivationSource,
        from_layer: Any,
        to_layer: Any = None,
        component: str | None = None,
        dataset: ActivationDataset | Iterable[str] = (),
        from_component: str | None = None,
        to_component: str | None = None,
        skip: bool | None = None,
        config: SAEConfig | None = None,
        validation_split: float | None = None,
        save_path: str | Path | None = None,
        resume: bool = False,
        verbose: bool = True,
    ) -> Transcoder:
        """A transcoder between two sites of a model, from texts or a dataset.

        The sites are `component` (`mlp` where none is given) at `from_layer` and at `to_layer`,
        or `from_component` and `to_component`; without a `to_layer` both are in one layer. Over one
        MLP they are `mlp_in` and `mlp_out`. `skip` adds a skip connection. The result remembers the
        model and the data. Raises `ValueError` as `SAETrainer.train` does, and where the target
        does not depend on the source.
        """
        to_layer = from_layer if to_layer is None else to_layer
        source = find_site(model, from_layer, from_component or component)
        target = find_site(model, to_layer, to_component or component)
        check_before(model, source, target)
        settings = {} if skip is None else {"skip": skip}
        return self.train_between(
            model, columns_of(model, [source]), columns_of(model, [target]), dataset,
            config=config, validation_split=validation_split, save_path=save_path, resume=resume,
            verbose=verbose, **settings,
        )  # fmt: skip
