"""Writes hooks_llama.npz and hooks_gpt2.npz: weights of tiny models, tokens, and every activation
that TransformerLens 3.9 caches of them. The weights are those of Hugging Face's classes, which also
made the logits. Of gpt2 the norms are folded, as TransformerLens does by default; nothing is
centred.

Needs torch, transformers and transformer_lens, which are no dependencies of the project.
"""

from pathlib import Path

import numpy as np
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import (
    convert_gpt2_weights,
    convert_llama_weights,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
TOKENS = torch.tensor([[3, 1, 7, 7, 2], [5, 0, 11, 4, 9]])
SHARED = {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_vocab": 12, "d_head": 4, "n_heads": 4}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, head_dim=4,
        initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    hf = LlamaForCausalLM(config).eval()
    cfg = HookedTransformerConfig(
        **SHARED, d_mlp=24, act_fn="silu", normalization_type="RMS", n_key_value_heads=2,
        positional_embedding_type="rotary", rotary_dim=4, rotary_base=10000, gated_mlp=True,
        final_rms=True, eps=1e-5, rotary_adjacent_pairs=False,
        original_architecture="LlamaForCausalLM",
    )  # fmt: skip
    return hf, cfg, convert_llama_weights


def gpt2():
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=12, n_embd=16, n_layer=2, n_head=4, n_positions=32, n_ctx=32,
        initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    hf = GPT2LMHeadModel(config).eval()
    cfg = HookedTransformerConfig(
        **SHARED, d_mlp=64, act_fn="gelu_new", normalization_type="LN",
        positional_embedding_type="standard", eps=1e-5, original_architecture="GPT2LMHeadModel",
    )  # fmt: skip
    return hf, cfg, convert_gpt2_weights


def main():
    for name, make in (("llama", llama), ("gpt2", gpt2)):
        hf, cfg, convert = make()
        with torch.no_grad():
            for parameter in hf.parameters():  # norms and biases that do something
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
        lens = HookedTransformer(cfg)
        state = convert(hf, cfg)
        lens.load_and_process_state_dict(
            state, fold_ln=name == "gpt2", center_writing_weights=False, center_unembed=False,
            fold_value_biases=False,
        )  # fmt: skip
        with torch.no_grad():
            logits = hf(TOKENS).logits
            ours, cache = lens.run_with_cache(TOKENS)
        assert (logits - ours).abs().max().item() < 1e-5
        weights = {f"weights/{k}": v.detach().numpy() for k, v in hf.state_dict().items()}
        hooks = {f"hooks/{k}": v.detach().numpy() for k, v in cache.items()}
        shared = {"tokens": TOKENS.numpy(), "logits": logits.numpy()}
        np.savez_compressed(HERE / f"hooks_{name}.npz", **shared, **weights, **hooks)


if __name__ == "__main__":
    main()
