"""Measuring coders: one pass for fidelity and sparsity, and one for the language model's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxterp.sae.coder import Columns, SparseCoder
from mlxterp.sae.dataset import ActivationDataset
from mlxterp.sae.evals.controls import affine_map, explained, random_directions
from mlxterp.sae.evals.loss_passes import losses_of
from mlxterp.sae.evals.measuring import Measured, Pass, measure
from mlxterp.sae.evals.origin import EvaluationData, described
from mlxterp.sae.evals.reconstruction import Draws, Reconstruction, joined, reconstruction_of
from mlxterp.sae.evals.replacing import Donors
from mlxterp.sae.evals.report import Evaluation
from mlxterp.sae.evals.sparsity import sparsity_of

MAX_TOKENS = 100_000
MAX_LOSS_TOKENS = 50_000
RANDOM, AFFINE = "random directions", "affine map"


def evaluate(
    coders: Sequence[SparseCoder],
    dataset: ActivationDataset,
    *,
    max_tokens: int | None = MAX_TOKENS,
    max_loss_tokens: int | None = MAX_LOSS_TOKENS,
    seed: int = 0,
) -> list[Evaluation]:
    """A report on each of some coders, all on the same tokens.

    Of texts, random contexts with `max_tokens` tokens are taken, chosen by the `seed`, and the loss
    is that of `max_loss_tokens` of these (`None`: all). Without texts there is no loss, and tokens
    are taken as independent. The language model runs once up to the last site, for the loss five
    times whole, and there four more times for each site where several are written; what coders of
    the same sites have in common is run once.

    The fidelity's control is what random directions make of the activations, as many as there are
    features and as sparse; of a coder that writes what it does not read it is the affine map of
    what is read that fits best. Raises `ValueError` for a dataset that lacks a site of a coder, and
    where no activation is finite.
    """
    if max_loss_tokens is not None and max_loss_tokens < 1:
        raise ValueError(f"max_loss_tokens must be None or >= 1, got {max_loss_tokens}.")
    found = measure(coders, dataset, max_tokens, seed)
    losses: Sequence[Any] = [(None, {})] * len(coders)
    if found.corpus is not None and dataset.source is not None:
        donors = _donors(coders, dataset.columns, found)
        losses = losses_of(
            coders, dataset.source, found.corpus, donors, max_loss_tokens, seed, dataset.verbose
        )
    reports = []
    for coder, sums, (loss, drawn) in zip(coders, found.measured, losses, strict=True):
        sparsity, counted = sparsity_of(sums.codes)
        l0 = round(float(sparsity.l0))
        fidelity, scored = _fidelity(coder, dataset.columns, sums, found, l0, seed)
        draws = {**scored, **counted, **drawn}
        data = _data(coder, dataset, found, seed)
        reports.append(Evaluation(fidelity, sparsity, loss, data, coder, draws))
    return reports


def _donors(coders: Sequence[SparseCoder], columns: Columns, found: Pass) -> Donors:
    sites = dict.fromkeys(name for coder in coders for name in coder.writes.names)
    parts = {name: columns.slices[name] for name in sites}
    return Donors(
        {name: found.mean[part] for name, part in parts.items()},
        {name: found.sample[:, part] for name, part in parts.items()},
    )


def _fidelity(
    coder: SparseCoder, columns: Columns, sums: Measured, found: Pass, l0: int, seed: int
) -> tuple[Reconstruction, Draws]:
    reports, draws, affine = {}, {}, coder.reads != coder.writes
    for name, of_site in sums.sites.items():
        y = found.sample[:, columns.slices[name]]
        if affine:
            fitted = affine_map(columns.take(found.sample, _read_for(coder, name)), y)
        else:
            fitted = y, random_directions(y, coder.n_features, l0, seed)
        controls = (None, None) if fitted is None else explained(*fitted)
        control = "" if fitted is None else AFFINE if affine else RANDOM
        reports[name], draws[name] = reconstruction_of(of_site, controls, control)
    if len(reports) == 1:
        return next(iter(zip(reports.values(), draws.values(), strict=True)))
    return joined(reports, draws, found.n_groups)


def _read_for(coder: SparseCoder, site: str) -> tuple[str, ...]:
    """The sites that are read by those features that write a site."""
    slices, written = coder.reads.slices, coder.writes.names.index(site)
    blocks = [b for b in coder.blocks if b.sites.start <= written < b.sites.stop]
    return tuple(
        name
        for name, part in slices.items()
        if any(b.reads.start <= part.start < b.reads.stop for b in blocks)
    )


def _data(coder: SparseCoder, dataset: ActivationDataset, found: Pass, seed: int) -> EvaluationData:
    corpus = found.corpus
    return EvaluationData(
        coder=described(coder),
        model="" if dataset.source is None else dataset.source.name,
        n_tokens=found.n_tokens,
        n_documents=None if corpus is None else corpus.n_documents,
        n_contexts=None if corpus is None else len(corpus),
        context_length=None if corpus is None else corpus.context,
        clusters=found.clusters,
        n_clusters=found.n_groups,
        seed=seed,
        fingerprint="" if corpus is None else corpus.fingerprint,
    )
