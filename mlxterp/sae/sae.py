"""The sparse autoencoder: a coder that reads and writes one site, and the trainer that makes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxterp.sae.base import BaseSAE
from mlxterp.sae.callbacks import Callback
from mlxterp.sae.coder import Columns
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.fitting import (
    CoderTrainer,
    OnClassOrInstance,
    as_dataset,
    columns_of,
    describe,
    divide,
)
from mlxterp.sae.source import ActivationSource, find_site
from mlxterp.sae.trainer import train_together


class SAE(BaseSAE):
    """A sparse autoencoder: it writes the site that it reads.

    Reference: Gao et al. 2024, arXiv 2406.04093.
    """

    kind = "sae"

    def __init__(
        self, reads: Columns, writes: Columns, n_features: int, *args: Any, **options: Any
    ):
        if reads != writes or len(reads.names) != 1:
            raise ValueError(f"An SAE writes the one site that it reads, got {reads} and {writes}.")
        super().__init__(reads, writes, n_features, *args, **options)

    @property
    def site(self) -> str:
        """The name of the site."""
        return self.reads.names[0]


class SAETrainer(CoderTrainer):
    """Trains SAEs: `fit` on activations, `train` from a model and texts.

    `config=None` stands for the recommended recipe, chosen by the width of the site and the amount
    of data. `parallel` divides the work among the processes that `mlx.launch` started, by tokens,
    `"data"`, or by features, `"features"`: see `Trainer`.
    """

    kind = SAE
    config_type = SAEConfig

    def fit(
        self,
        dataset: ActivationDataset | Any,
        resume: bool = False,
        *,
        model: ActivationSource | None = None,
    ) -> SAE:
        """An SAE of a dataset of one site, or of an array `[n_tokens, d_in]`.

        A share `config.validation_split` is held out. With `resume` a run that was cut off goes on
        from its last checkpoint in `checkpoint_dir`. `model` is the language model that the result
        remembers, where the dataset knows none. Raises `ValueError` for unusable data, and
        `TrainingError` for a run that cannot go on.
        """
        dataset = as_dataset(dataset)
        return self.fit_between(dataset.columns, dataset.columns, dataset, resume, model)

    def fit_many(
        self,
        dataset: ActivationDataset | Any,
        configs: Mapping[str, SAEConfig],
        resume: bool = False,
        *,
        sites: Mapping[str, str] | None = None,
        callbacks: Mapping[str, Sequence[Callback]] | None = None,
        model: ActivationSource | None = None,
    ) -> dict[str, SAE]:
        """Several SAEs from one pass over the activations: `{name: config}` gives `{name: SAE}`.

        Configs may differ in everything but `batch_size`, `num_epochs`, `seed` and
        `validation_split`. For a dataset of several sites `sites` names that of each SAE;
        `callbacks` are those of each. Each writes its checkpoints to a directory of its name in
        `checkpoint_dir`. Raises `ValueError` as `fit` does, and where the configs do not go
        together.
        """
        dataset = as_dataset(dataset)
        _check_names(configs, sites)
        if self.callbacks and len(configs) > 1:
            raise ValueError(
                "A callback keeps what one run reports: give callbacks={name: [...]} to fit_many, "
                "one list for each SAE, instead of to SAETrainer."
            )
        shares = {name: config.validation_split for name, config in configs.items()}
        if len(set(shares.values())) != 1:
            raise ValueError(f"validation_split must be the same for all configs, got {shares}.")
        training, held_out = divide(dataset, next(iter(configs.values())))
        saes = {}
        for name, config in configs.items():
            columns = dataset.columns
            if sites is not None:
                known = dataset.source
                site = sites[name] if known is None else str(find_site(known, sites[name]))
                columns = columns.only(site)
            saes[name] = SAE.untrained(columns, columns, config)
        results = train_together(
            {name: (sae, configs[name]) for name, sae in saes.items()},
            training,
            held_out,
            self.checkpoint_dir,
            callbacks or dict.fromkeys(configs, self.callbacks),
            resume,
            self.parallel,
        )
        for name, sae in saes.items():
            source = dataset.source or model
            describe(sae, configs[name], results[name], training, held_out, source)
        return saes

    @OnClassOrInstance
    def train_many(
        self,
        model: ActivationSource,
        layers: Sequence[Any],
        component: str | None = None,
        dataset: Iterable[str] = (),
        configs: Mapping[str, SAEConfig] | SAEConfig | None = None,
        resume: bool = False,
        verbose: bool = True,
    ) -> dict[str, SAE]:
        """SAEs of several sites of a model, each with one config or with several, from one pass of
        the texts through it.

        `layers` are as in `train`. The keys of the result are the sites' names, followed by a space
        and the config's name where there are several. Raises `ValueError` as `fit_many` does.
        """
        sites = [str(find_site(model, layer, component)) for layer in layers]
        data = ActivationDataset.of(model, dataset, sites, verbose=verbose)
        width = max(data.columns.widths, default=0)
        if not isinstance(configs, Mapping):
            configs = {"": configs or self.config or SAEConfig.recommended(width, len(data))}
        wanted = {f"{site} {name}".strip(): site for site in sites for name in configs}
        chosen = [config for _ in sites for config in configs.values()]
        return self.fit_many(data, dict(zip(wanted, chosen, strict=True)), resume, sites=wanted)

    @OnClassOrInstance
    def train(
        self,
        model: ActivationSource,
        layer: Any,
        component: str | None = None,
        dataset: ActivationDataset | Iterable[str] = (),
        config: SAEConfig | None = None,
        validation_split: float | None = None,
        save_path: str | Path | None = None,
        resume: bool = False,
        verbose: bool = True,
    ) -> SAE:
        """An SAE of one site of a model, from texts or a dataset; saved if a path is given.

        `component` is `mlp` (where none is given), `attn`, `residual` or any other of
        `model.sites()`; `layer` may also be the whole name of a site. The result remembers the
        model and the data. Raises `ValueError` for a site that does not exist, for an empty
        dataset or one without this site, and for a `save_path` where something else is.
        """
        site = columns_of(model, [find_site(model, layer, component)])
        return self.train_between(
            model, site, site, dataset, config=config, validation_split=validation_split,
            save_path=save_path, resume=resume, verbose=verbose,
        )  # fmt: skip


def _check_names(configs: Mapping[str, SAEConfig], sites: Mapping[str, str] | None) -> None:
    if not configs:
        raise ValueError("configs must hold at least one {name: config}.")
    for name in configs:
        if not name or name != Path(name).name:
            raise ValueError(f"A name of an SAE must be one of a directory, got {name!r}.")
    missing = [] if sites is None else [name for name in configs if name not in sites]
    if missing:
        raise ValueError(f"sites must name the site of every SAE; missing: {missing}.")
