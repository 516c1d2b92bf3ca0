"""Coders of other libraries come from the Hub as they come from a disk."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlxterp.sae import load_sae
from mlxterp.sae.hub_files import choose
from tests.sae.test_hub import fetched

FORMATS = Path(__file__).parents[1] / "golden" / "formats"
GEMMA = "layer_3/width_16k/average_l0_71"


@pytest.mark.parametrize(
    ("directory", "repo", "place"),
    [
        ("saelens", "org/saes", "jumprelu"),
        ("sparsify", "org/sae-llama", "layers.5.mlp"),
        ("dictionary_learning", "org/trained", "BatchTopKSAE/trainer_0"),
        ("gemma_scope/gemma-scope-2b-pt-res", "google/gemma-scope-2b-pt-res", GEMMA),
        ("llama_scope", "org/scope", "Llama3_1-8B-Base-L15R-8x"),
        ("goodfire", "org/lone", "Llama-3.1-8B-Instruct-SAE-l19.pth"),
        ("qwen_scope/SAE-Res-Qwen3-1.7B-Base-W32K-L0_4", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_4",
         "layer5.sae.pt"),
        ("circuit_tracer/jumprelu_set", "org/set", "layer_1.safetensors"),
        ("circuit_tracer/jumprelu_clt", "org/clt", ""),
    ],
    ids=lambda value: value.split("/")[0],
)  # fmt: skip
def test_a_coder_of_another_library_is_the_same_from_the_hub(directory, repo, place, hub):
    root = FORMATS / directory
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    hub.add(repo, {name: path.read_bytes() for name, path in files.items()})
    local, pulled = load_sae(root / place), load_sae(repo, subfolder=place or None)
    assert repr(pulled) == repr(local) and pulled.metadata == local.metadata
    x = mx.random.normal((4, local.d_in), key=mx.random.key(0))
    assert mx.array_equal(pulled.encode(x), local.encode(x))
    assert mx.array_equal(pulled(x), local(x))
    assert fetched(hub) == set(choose(repo, files, place or None, features=False).files)
