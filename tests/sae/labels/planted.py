"""Features that fire on one letter each, and a labeller and judge that do what they are asked."""

import re

import numpy as np

from mlxterp.sae import ActivationDataset
from mlxterp.sae.features.collection import collect
from mlxterp.sae.features.data import FeatureData
from tests.fakes import SITE
from tests.sae.letters import Letters, one_to_one

LETTERS = "abcdef"
ALPHABET = "abcdefghijklmnopqrstuvwxyz      "


def random_texts(n: int = 40, length: int = 300, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(ALPHABET), length)) for _ in range(n)]


def planted(texts=None, **values: float) -> FeatureData:
    """What a coder's features 0 to 5 do, of which each fires on one letter of `abcdef`."""
    values = values or dict(zip(LETTERS, (3, 2, 5, 1, 2.5, 1.5), strict=True))
    texts = random_texts() if texts is None else texts
    dataset = ActivationDataset.from_texts(Letters(**values), texts, SITE, context_length=50)
    return collect(one_to_one(), dataset)


class Honest:
    """Labels by the letter that is marked most often; judges by the label and the texts alone."""

    def __init__(self):
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        if is_question_for_label(prompt):
            marked = re.findall(r"«(.)»\[", prompt)
            return f"Let me see.\nlabel: the letter {max(sorted(set(marked)), key=marked.count)}"
        letter = letter_of(prompt)
        is_right = _marks if "«" in "".join(contexts_of(prompt)) else _holds
        right = [str(i) for i, c in enumerate(contexts_of(prompt), 1) if is_right(c, letter)]
        return f"answer: {', '.join(right) or 'none'}"


def is_question_for_label(prompt: str) -> bool:
    return '"label:"' in prompt


def letter_of(prompt: str) -> str:
    """The letter that the label in a prompt to a judge names."""
    return re.search(r"^the letter (\w)$", prompt, re.M)[1]


def contexts_of(prompt: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", prompt, re.M)


def _holds(context: str, letter: str) -> bool:
    return letter in context


def _marks(context: str, letter: str) -> bool:
    """Whether the letter is marked wherever it is, and no other is."""
    return re.sub(f"«{letter}»", "", context).count(letter) == 0 and not re.search(
        f"«[^{letter}]»", context
    )
