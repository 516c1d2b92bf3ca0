"""What a user holds: a trained coder of one kind, which can be measured and saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mlxterp.sae import hub
from mlxterp.sae.bound import FEATURES
from mlxterp.sae.coder import MARKER, Columns
from mlxterp.sae.compatibility import Compatibility, compatibility
from mlxterp.sae.config import SAEConfig
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.evals.evaluating import evaluate
from mlxterp.sae.evals.report import Evaluation
from mlxterp.sae.files import write_directory
from mlxterp.sae.formats.parts import Parts
from mlxterp.sae.hub_card import model_card
from mlxterp.sae.labels.labels import LABELS_FILE
from mlxterp.sae.metadata import training_facts
from mlxterp.sae.methods import CoderMethods
from mlxterp.sae.source import ActivationSource
from mlxterp.sae.visualization import fragment

if TYPE_CHECKING:
    from mlxterp.sae.evals.tasks.benchmarks import Benchmarks, Task

FORMAT_VERSION = 2
CONFIG_FILE = "config.json"
SITES_AT_ONCE = 4  # that a notebook shows unasked


class BaseSAE(CoderMethods):
    """A trained coder with its origin, and the library's functions on it as methods."""

    kind: ClassVar[str]
    may_skip: ClassVar[bool] = False

    def __init__(
        self, reads: Columns, writes: Columns, n_features: int, *args: Any, **options: Any
    ):
        super().__init__(reads, writes, n_features, *args, **options)
        if self.has_skip and not self.may_skip:
            raise ValueError(f"skip is for transcoders only, got skip=True for {self.kind!r}.")

    @classmethod
    def untrained(cls, reads: Columns, writes: Columns, config: SAEConfig) -> Self:
        """A coder of the config's size, counted from the mean width of the sites that it reads."""
        n_features = config.n_features(round(reads.width / max(1, len(reads.names))))
        name = config.activation_function
        return cls(reads, writes, n_features, name, config.k, skip=config.skip)

    def evaluate(
        self,
        model: ActivationSource | None = None,
        dataset: Iterable[Any] | ActivationDataset | None = None,
        **options: Any,
    ) -> Evaluation:
        """Fidelity, sparsity and, of texts, the language model's loss with the coder spliced in,
        each with its spread and its control, as one report; see `evaluating.evaluate`.

        Without a `dataset` the data held out in training serve, in the session of the training.
        """
        data = self._as_dataset(model, dataset, self._held_out)
        return evaluate([self], data, **options)[0]

    def benchmark(
        self,
        tasks: Sequence[Task] | None = None,
        *,
        model: ActivationSource | None = None,
        dataset: Iterable[Any] | ActivationDataset | None = None,
        **options: Any,
    ) -> Benchmarks:
        """Sparse probing, absorption, probe perturbation, scores of labels and more, or the `tasks`
        that are named, each beside what chance has; see `benchmarks.benchmark`.

        Labels are of what `collect` found or finds in the `dataset`; the other tasks bring their
        own text. What cannot be asked of this coder or model is left out, and the result says why.
        """
        from mlxterp.sae.evals.tasks.benchmarks import TASKS, benchmark

        source = self._source if model is None else model
        chosen = TASKS if tasks is None else tasks
        return benchmark(
            self, source, chosen, data=lambda: self._collected(model, dataset), **options
        )

    def is_compatible(
        self, model: ActivationSource, layer: Any = None, component: str | None = None
    ) -> Compatibility:
        """Whether the coder fits the model, and the site if one is named; false says why."""
        return compatibility(self, self.metadata, model, layer, component)

    def to_config(self) -> dict[str, Any]:
        """Everything that rebuilds the coder but its arrays, as saved in `config.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "reads": self.reads.to_list(),
            "writes": self.writes.to_list(),
            "n_features": self.n_features,
            "skip": self.has_skip,
            "token_norm": self.token_norm,
            "activation_function": {
                "activation_function": self.activation_name,
                **self.activation_function.options,
            },
        }

    def _repr_html_(self) -> str:
        facts, sites = [("reads", _listed(self.reads))], self.reads.to_list()
        if self.writes != self.reads:
            facts, sites = [*facts, ("writes", _listed(self.writes))], sites + self.writes.to_list()
        k = "" if self.k is None else f", k = {self.k}"
        facts += [
            ("features", f"{self.n_features:,}"),
            ("activation function", self.activation_name + k),
            *[("skip connection", "yes")] * self.has_skip,
            *[("norm of a token", self.token_norm)] * (self.token_norm != "none"),
            *training_facts(self.statistics.training, self.statistics.validation),
            *[("model", str(name)) for name in [self.metadata.model.get("name")] if name],
            *[("format", str(name)) for name in [self.metadata.source.get("format")] if name],
            *[("labels", f"{len(self.labels):,}")] * bool(self.labels),
        ]
        listed = [(str(site["site"]), f"width {site['width']}") for site in sites]
        config = self.metadata.config.items()
        more = {
            "Sites": listed if len(listed) > SITES_AT_ONCE else [],
            "Configuration": [(name, str(value)) for name, value in config if value is not None],
        }
        return fragment("facts.html", title=type(self).__name__, facts=facts, more=more)

    def save(self, path: str | Path) -> Path:
        """Write the coder as a directory (by custom named `*.mlx`) and return its path.

        An older coder there is replaced whole, labels included; raises `ValueError` where
        something else is there.
        """
        self.path = write_directory(path, self._contents(), marker=MARKER)
        self.labels.path = self.path / LABELS_FILE
        return self.path

    def _contents(self, features: bool = True) -> dict[str, Any]:
        """All files of a saved coder by their names, with what was collected or without."""
        contents: dict[str, Any] = {
            CONFIG_FILE: self.to_config(),
            "statistics.json": self.statistics.to_dict(),
            "metadata.json": self.metadata.to_dict(),
        }
        contents |= self.array_files()
        if features and self.features is not None:
            contents |= {f"{FEATURES}/{name}": part for name, part in self.features.files.items()}
        if self.labels:
            contents[LABELS_FILE] = self.labels.to_dict()
        return contents

    def push_to_hub(self, repo: str, *, features: bool = False, **options: Any) -> str:
        """Upload the coder to `user/name` on the Hugging Face Hub, with a model card, and return
        the address of the commit; with `features` also what `collect` found, which holds text of
        the dataset. `private=True` makes a new repository private; see `hub.push` for the rest.
        """
        return hub.push(self, self._contents(features), repo, **options)

    def model_card(self, repo: str, **options: Any) -> str:
        """The text of the model card that `push_to_hub` writes; see `hub_card.model_card`."""
        return model_card(self, repo, **options)

    def export(self, format: str, path: str | Path) -> Path:
        """Write the coder as a file of another library, such as `"saelens"`, and return its path.

        Raises `ValueError` for a format that is not written, listing those that are, and for what
        the format cannot express.
        """
        from mlxterp.sae.formats.writing import write_foreign

        rates = self.statistics.firing_rates
        return write_foreign(Parts.of(self, self.kind, self.metadata, rates), format, path)


def _listed(columns: Columns) -> str:
    names = columns.names
    if len(names) <= SITES_AT_ONCE:
        return str(columns)
    return f"{len(names)} sites, {names[0]} to {names[-1]} (width {columns.width} together)"
