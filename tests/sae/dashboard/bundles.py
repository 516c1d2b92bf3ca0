"""Small coders of the bundled model with what is collected of them."""

from mlxterp.sae import ActivationDataset
from mlxterp.sae.features.collection import collect
from mlxterp.sae.features.data import FeatureData
from tests.sae.features.coders import make

NASTY = (
    "<script>alert(1)</script>", "</script><!--", "a\u2028b\u2029c", "\u202edesrever",
    "\x00\x1b[31m", "مرحبا", "\"&'", "👩\u200d🔬",
)  # fmt: skip
TEXTS = [
    "def add(a, b):\n    return a + b\n\nclass Adder:\n    pass\n" * 3,
    "The quick brown fox jumps over the lazy dog, twice, and then once more.",
    "".join(NASTY) + " 🙂 ∑ naïve 日本語",
    "raise ValueError('no') if x is None else x  # <b>bold</b> &amp; more",
]


def collected(model, kind: str = "sae", n_features: int = 40, **options) -> FeatureData:
    """What a pass over a few texts learns of a random coder."""
    coder = make(kind, n_features)
    sites = list(coder.reads.union(coder.writes).names)
    dataset = ActivationDataset.from_texts(model, TEXTS, sites, context_length=32)
    return collect(coder, dataset, **options)
