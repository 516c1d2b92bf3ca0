"""Two models, or more, as one source of activations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlxterp.sae.source import ActivationSource, find_site
from mlxterp.sites import Site, UnknownSiteError

TOKENIZER_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    'JUMPS OVER, isn\'t it? ("Yes")',
    "def f(x_1: int) -> list[str]:\n\treturn {'key': x_1 ** 2 != 4}  # why\n",
    "0 7 12 345 6789 3.14159 1e-5 2024-01-31 $1,000.00 50%",
    "  two  spaces,\n\n\nnew lines\r\n\tand tabs \n",
    "Ünïcödé naïve e\u0301 ß Ωμέγα Привет שלום العربية हिन्दी",
    "漢字とかな 한국어 \u3000 \u200b 🙂👩‍🔬 ∑∂√ →",
)
ONE_TOKENIZER = (
    "If they were trained on the ids of one, give it to all: "
    "InterpretableModel(model, tokenizer=base.tokenizer)"
)


class PairSite(str):
    """The name of a site of one of the models, `base:layers.3.mlp`."""

    @property
    def layer(self) -> int | None:
        """The layer of the site."""
        return Site.from_string(self.rpartition(":")[2]).layer

    @property
    def component(self) -> str:
        """The component of the site, without the name of the model."""
        return Site.from_string(self.rpartition(":")[2]).component


class ModelPair:
    """Models with one tokenizer as one source, to tell what training or size has changed in them.

    `models` is a sequence, whose members are called `base` and `tuned`, or `model_0` and so on
    where there are more than two; or it is a mapping from names to models. A site is
    `name:site of that model`, such as `tuned:layers.3.mlp`. A crosscoder of the same site in two
    models has features of both and of one alone: Lindsey et al. 2024 (Transformer Circuits,
    "Sparse Crosscoders for Cross-Layer Features and Model Diffing"), and arXiv 2504.02922.

    What names no model is asked of the first: its tokenizer encodes, its head unembeds, and it runs
    where nothing is captured or edited. Raises `ValueError` for fewer than two models, for one
    given twice, for a name that has a colon, and for tokenizers that differ.
    """

    def __init__(self, models: Sequence[ActivationSource] | Mapping[str, ActivationSource]) -> None:
        self.models = _named(models)
        self.name = " + ".join(f"{name}: {model.name}" for name, model in self.models.items())
        _check_distinct(self.models)
        _check_tokenizers(self.models)
        self._first = next(iter(self.models.values()))

    def __eq__(self, other: object) -> bool:
        """Whether the other is a pair of the same models under the same names."""
        if not isinstance(other, ModelPair) or list(self.models) != list(other.models):
            return False
        both = zip(self.models.values(), other.models.values(), strict=True)
        return all(mine is theirs for mine, theirs in both)

    def __hash__(self) -> int:
        return hash(tuple((name, id(model)) for name, model in self.models.items()))

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that stand for no text in any of the models."""
        return frozenset().union(*(model.special_token_ids for model in self.models.values()))

    @property
    def context_length(self) -> int | None:
        """The longest input that all models were made for; None where none of them says."""
        known = [model.context_length for model in self.models.values()]
        return min((length for length in known if length is not None), default=None)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on the names and the weights of all models."""
        known = [[name, model.fingerprint] for name, model in self.models.items()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        return self._first.encode_batch(texts)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a chat, by the first model that has a chat template."""
        errors = []
        for model in self.models.values():
            try:
                return model.encode_chat(messages)
            except ValueError as error:
                errors.append(error)
        raise errors[0]

    def to_str_tokens(self, input: Any) -> list[str]:
        """Each token of a text or of token ids as text."""
        return self._first.to_str_tokens(input)

    def decode(self, tokens: Any) -> str:
        """The text of token ids."""
        return self._first.decode(tokens)

    def site(self, layer: Any, component: str | None = None) -> PairSite:
        """The site `base:layers.3.mlp`, from any spelling of it after the model's name.

        Raises `ValueError` where the name of a model is missing, or that model has no such site.
        """
        name, rest = self._split(layer, component)
        return self._site_in(name, rest, component)

    def sites(self) -> Iterator[PairSite]:
        """Every site of every model."""
        for name, model in self.models.items():
            yield from (PairSite(f"{name}:{site}") for site in model.sites())

    def sites_of(self, layer: Any, component: str | None = None) -> tuple[PairSite, ...]:
        """The same site in every model, by its name in one or by layer and component (`mlp` where
        none is given)."""
        return tuple(self._site_in(name, layer, component) for name in self.models)

    def width(self, site: Any) -> int:
        """The last dimension of the activation at `site`."""
        model, inner = owner(self, site)
        return model.width(inner)

    def run(
        self,
        tokens: Any,
        *,
        capture: str | Iterable[str] = (),
        edit: Mapping[str, Any] | None = None,
        stop: bool = False,
    ) -> PairCaptured:
        """One forward pass of each model of which a site is captured or edited.

        The arguments are those of `InterpretableModel.run`. With `stop=True` each pass ends
        after its model's last captured site. Edits are told the site within their model.
        """
        captures, edits = self._sites_by_model(capture), self._edits_by_model(edit)
        asked = [name for name in self.models if name in captures or name in edits]
        runs = {
            name: self.models[name].run(
                tokens, capture=captures.get(name, ()), edit=edits.get(name), stop=stop
            )
            for name in asked or [*self.models][:1]
        }
        return PairCaptured(self, runs)

    @contextmanager
    def editing(self, edits: Mapping[str, Any]) -> Iterator[None]:
        """Apply edits to every use of the models that they name; see
        `InterpretableModel.editing`."""
        with ExitStack() as stack:
            for name, own in self._edits_by_model(edits).items():
                stack.enter_context(self.models[name].editing(own))
            yield

    def gradients(
        self, tokens: Any, sites: Any, metric: Any, *, edit: Mapping[str, Any] | None = None
    ) -> Any:
        """The derivatives of a metric of one model's logits; see `InterpretableModel.gradients`.

        Raises `ValueError` where sites or edits are of several models.
        """
        wanted, edits = self._sites_by_model(sites), self._edits_by_model(edit)
        name = self._only_model({*wanted, *edits}, "gradients")
        found = self.models[name].gradients(
            tokens, wanted.get(name, ()), metric, edit=edits.get(name)
        )
        both = {
            part: PairCaptured(self, {name: getattr(found, part)})
            for part in ("activations", "gradients")
        }
        return replace(found, **both)

    def generate(self, prompt: Any, *, edit: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """What the model that is edited, or else the first, goes on with after a prompt; see
        `InterpretableModel.generate`. Raises `ValueError` where edits are of several models."""
        edits = self._edits_by_model(edit)
        name = self._only_model(edits, "generate")
        return self.models[name].generate(prompt, edit=edits.get(name), **kwargs)

    def _only_model(self, names: Collection[str], what: str) -> str:
        if len(names) > 1:
            raise ValueError(f"{what} is of one model, and sites of {', '.join(names)} are named")
        return next(iter(names or self.models))

    def unembed(self, hidden: mx.array) -> mx.array:
        """The logits of `hidden [..., d_model]` by the first model; see `owner` for another's."""
        return self._first.unembed(hidden)

    def _sites_by_model(self, sites: Any) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for site in [sites] if isinstance(sites, str) or not isinstance(sites, Iterable) else sites:
            name, rest = self._split(site)
            found.setdefault(name, []).append(rest)
        return found

    def _edits_by_model(self, edits: Mapping[str, Any] | None) -> dict[str, dict[Any, Any]]:
        found: dict[str, dict[Any, Any]] = {}
        for site, function in (edits or {}).items():
            name, rest = self._split(site)
            found.setdefault(name, {})[rest] = function
        return found

    def _split(self, site: Any, component: str | None = None) -> tuple[str, Any]:
        name, found, rest = str(site).partition(":")
        if found and name in self.models:
            return name, rest
        spelt = site if component is None else f"layers.{site}.{component}"
        choices = " or ".join(f"{known}:{rest if found else spelt}" for known in self.models)
        raise UnknownSiteError(
            f"{str(spelt)!r} does not say of which model, one of {', '.join(self.models)}: "
            f"write {choices}"
        )

    def _site_in(self, name: str, site: Any, component: str | None = None) -> PairSite:
        try:
            return PairSite(f"{name}:{find_site(self.models[name], site, component)}")
        except ValueError as error:
            error.add_note(f"in the model {name!r} of {self!r}")
            raise

    def __repr__(self) -> str:
        models = (f"{name}: {model.name}" for name, model in self.models.items())
        return f"ModelPair({', '.join(models)})"


class PairCaptured(Mapping[str, mx.array]):
    """Activations `[B, S, ...]` by site, looked up by any spelling that names the model.

    `runs` has what each model that ran has captured, by the model's name, and `outputs` its
    logits (None where the run was stopped).
    """

    def __init__(self, pair: ModelPair, runs: Mapping[str, Any]) -> None:
        self.runs = dict(runs)
        self._pair = pair
        self._activations = {
            PairSite(f"{name}:{site}"): x
            for name, found in runs.items()
            for site, x in found.items()
        }

    @property
    def outputs(self) -> dict[str, Any]:
        """The logits of each model that ran, by its name."""
        return {name: found.output for name, found in self.runs.items()}

    @property
    def output(self) -> Any:
        """The logits of the one model that ran; `ValueError` where several ran to the end."""
        outputs = [*self.outputs.values()]
        if len(outputs) > 1 and any(output is not None for output in outputs):
            raise ValueError(
                f"output is of one model, and {len(outputs)} ran: take one of outputs, "
                f"{', '.join(self.runs)}"
            )
        return outputs[0]

    def __getitem__(self, site: Any) -> mx.array:
        site = self._pair.site(site)
        if site not in self._activations:
            held = ", ".join(self._activations) or "nothing"
            raise KeyError(f"{site} was not captured; captured: {held}")
        return self._activations[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{site}: {list(x.shape)}" for site, x in self._activations.items())
        return f"{type(self).__name__}({shapes})"


def owner(source: ActivationSource, site: Any) -> tuple[ActivationSource, Any]:
    """The model that `site` is of, and the site's name there; other sources own all their sites."""
    if not isinstance(source, ModelPair):
        return source, site
    name, _, inner = source.site(site).partition(":")
    return owner(source.models[name], inner)


def _named(models: Any) -> dict[str, ActivationSource]:
    if not isinstance(models, Mapping):
        given = list(models)
        names = ("base", "tuned") if len(given) == 2 else [f"model_{i}" for i in range(len(given))]
        models = dict(zip(names, given, strict=True))
    if len(models) < 2:
        raise ValueError(f"models must be two or more, got {len(models)}")
    for name in models:
        if not isinstance(name, str) or not name or ":" in name:
            raise ValueError(
                f"a model's name must be text without ':', which ends it, got {name!r}"
            )
    return dict(models)


def _check_distinct(models: Mapping[str, ActivationSource]) -> None:
    """Also two wrappers of one module are one model, which an edit of either would change."""
    seen: dict[int, str] = {}
    for name, model in models.items():
        other = seen.setdefault(id(getattr(model, "model", model)), name)
        if other != name:
            raise ValueError(f"models must be different ones, and {other} and {name} are the same")


def _check_tokenizers(models: Mapping[str, ActivationSource]) -> None:
    """Raise `ValueError` unless all models know as many tokens and read text alike."""
    sizes = {name: _n_tokens(model) for name, model in models.items()}
    if len({size for size in sizes.values() if size is not None}) > 1:
        raise ValueError(
            f"models must share one tokenizer, and their vocabularies differ in size: {sizes}. "
            f"{ONE_TOKENIZER}"
        )
    without = [n for n, model in models.items() if getattr(model, "tokenizer", model) is None]
    if len(without) == len(models):
        return
    if without:
        raise ValueError(
            f"all models must have a tokenizer, or none: {', '.join(without)} has none. "
            f"{ONE_TOKENIZER}"
        )
    texts = [*TOKENIZER_PROBES, *_special_texts(models.values())]
    (first, expected), *others = ((n, model.encode_batch(texts)) for n, model in models.items())
    for name, found in others:
        for text, ours, theirs in zip(texts, expected, found, strict=True):
            if list(ours) != list(theirs):
                raise ValueError(
                    f"models must share one tokenizer, and {text!r} has the ids {list(ours)} in "
                    f"{first}, {list(theirs)} in {name}. {ONE_TOKENIZER}"
                )


def _n_tokens(model: ActivationSource) -> int | None:
    """The size of the tokenizer's vocabulary: an embedding may be padded to some round number."""
    get_vocab = getattr(getattr(model, "tokenizer", None), "get_vocab", None)
    return getattr(model, "vocab_size", None) if get_vocab is None else len(get_vocab())


def _special_texts(models: Iterable[ActivationSource]) -> list[str]:
    """Tokens such as `<|end|>` as text, which another model may read letter by letter."""
    found = (model.to_str_tokens(sorted(model.special_token_ids)) for model in models)
    return sorted({text for texts in found for text in texts if text})
