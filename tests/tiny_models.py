"""Tiny random mlx-lm models, one per architecture, for tests that must hold on all of them.

Names are mlx-lm module names, plus "mistral" and "llama_quantized", which are llama variants.
Left out: bitnet (its linear layer is a Metal kernel only), olmo (needs the hf_olmo package),
phi3small (writes -inf to logits past token 100256, so it needs the full vocabulary).
The first run on a machine takes longer: MLX compiles CPU kernels and keeps them in $TMPDIR/mlx.
"""

from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

VOCAB = 96

_SWA, _FULL = "sliding_attention", "full_attention"

# Values shared by every architecture; ``from_dict`` drops the keys that one does not declare.
_BASE = dict(
    # size, in the names of the GPT and OLMo families too
    vocab_size=VOCAB, max_position_embeddings=128, n_positions=128, n_ctx=128,
    hidden_size=32, n_embd=32, d_model=32, intermediate_size=48, n_inner=48,
    num_hidden_layers=3, n_layer=3, n_layers=3, num_layers=3,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, num_key_value_heads=2, head_dim=8,
    # norms, biases, positions
    rms_norm_eps=1e-5, layer_norm_eps=1e-5, layer_norm_epsilon=1e-5, norm_eps=1e-5,
    attention_bias=False, mlp_bias=False, use_bias=False, use_qk_norm=True,
    tie_word_embeddings=False, rope_theta=10000.0, partial_rotary_factor=0.5, sliding_window=4,
    # mixture of experts: 4 experts, 2 active, 1 shared, the first layer dense
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    num_experts_per_tok=2, num_experts_per_token=2, moe_topk=2, moe_top_k=2, moe_k=2,
    n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1,
    moe_intermediate_size=16, shared_intermediate_size=16, shared_expert_intermediate_size=16,
    moe_shared_expert_intermediate_size=16, intermediate_size_mlp=48,
    first_k_dense_replace=1, num_dense_layers=1, moe_layer_start_index=1,
    mlp_only_layers=[0], decoder_sparse_step=1, norm_topk_prob=True, routed_scaling_factor=1.5,
    n_group=1, topk_group=1,
    # latent attention; linear attention and state spaces, whose Metal kernels want multiples of 32
    q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
    linear_value_head_dim=32, linear_conv_kernel_dim=4,
    state_size=32, ssm_state_size=32, conv_kernel=4, n_groups=2, use_conv_bias=True,
    time_step_rank="auto", mamba_d_state=32, mamba_d_conv=4, mamba_proj_bias=False,
    conv_L_cache=3, conv_bias=False,
    # multipliers
    logits_scaling=2.0, attention_multiplier=0.3, embedding_multiplier=3.0,
    residual_multiplier=0.5, scale_depth=1.4, scale_emb=3.0, dim_model_base=16,
)  # fmt: skip

_ROPE = dict(rope_type="default", rope_theta=10000.0)
_YARN = dict(type="yarn", factor=2.0, original_max_position_embeddings=64, mscale_all_dim=1.0)
_ROPE_PER_KIND = {_SWA: _ROPE, _FULL: _ROPE}
_FOUR_ALTERNATING = dict(num_hidden_layers=4, sliding_window_pattern=2)
_LFM2 = dict(
    block_dim=32, block_multiple_of=8, block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=False, use_expert_bias=True, layer_types=["conv", "conv", _FULL],
)  # fmt: skip
_GEMMA3N = dict(
    num_hidden_layers=4, num_kv_shared_layers=2, layer_types=[_SWA, _FULL] * 2,
    vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, laurel_rank=4,
    rope_local_base_freq=1000.0, final_logit_softcapping=30.0,
    activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0],
    altup_num_inputs=2, altup_active_idx=0, altup_coef_clip=120.0, altup_correct_scale=True,
)  # fmt: skip
_GEMMA4 = dict(
    _FOUR_ALTERNATING, num_kv_shared_layers=2, global_head_dim=16, partial_rotary_factor=1.0,
    vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8,
)  # fmt: skip
_NEMOTRON_NAS = [
    dict(attention=dict(n_heads_in_group=2), ffn=dict(ffn_mult=1.0)),
    dict(attention=dict(no_op=True), ffn=dict(ffn_mult=1.0)),
    dict(attention=dict(n_heads_in_group=2), ffn=dict(no_op=True)),
    dict(attention=dict(replace_with_linear=True), ffn=dict(replace_with_linear=True)),
]

# Architectures that the shared values describe completely.
_PLAIN = [
    "Klear", "bailing_moe", "cohere", "deepseek", "deepseek_v3", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone", "gemma", "gemma2", "glm", "glm4", "glm4_moe_lite", "gpt2",
    "gpt_bigcode", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm2", "internlm3",
    "llama", "mimo", "minicpm", "mixtral", "olmo2", "olmoe", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "solar_open", "starcoder2", "talkie",
    "telechat3", "youtu_llm",
]  # fmt: skip

_CONFIGS: dict[str, dict] = {name: {} for name in _PLAIN} | {
    "afm7": dict(hidden_dim=32, num_layers=4, num_kv_reuse_layers=2, num_kv_heads=2),
    "afmoe": dict(layer_types=[_SWA, _SWA, _FULL]),
    "apertus": dict(post_norm=False, qk_norm=True),
    "baichuan_m1": dict(sliding_window_layers=[1], conv_window=2),
    "bailing_hybrid": dict(num_hidden_layers=4, layer_group_size=2, group_norm_size=2),
    "bailing_moe_linear": dict(num_hidden_layers=4, layer_group_size=2, group_norm_size=2),
    "cohere2": _FOUR_ALTERNATING,
    "dbrx": dict(
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
    ),
    "deepseek_v2": dict(rope_scaling=_YARN),
    "deepseek_v32": dict(index_head_dim=8, index_n_heads=2, index_topk=4),
    "exaone4": dict(num_hidden_layers=4, rope_scaling=None, sliding_window_pattern="LG"),
    "exaone_moe": dict(layer_types=[_SWA, _SWA, _FULL], is_moe_layer=[False, True, True]),
    "falcon_h1": dict(mamba_d_head=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_rms_norm=True),
    "gemma3": dict(text_config=_FOUR_ALTERNATING),
    "gemma3_text": _FOUR_ALTERNATING,
    "gemma3n": dict(text_config=_GEMMA3N),
    "gemma4": dict(text_config=_GEMMA4),
    "gemma4_text": _GEMMA4,
    "glm4_moe": dict(rope_scaling=None),
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.5),
    "gpt_oss": dict(num_hidden_layers=4),
    "gptj": dict(rotary_dim=4),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2, mamba_conv_bias=True,
    ),
    "hunyuan": dict(
        num_shared_expert=1, use_mixed_mlp_moe=True, use_cla=True, cla_share_factor=2,
        rope_scaling=dict(type="dynamic", alpha=1000.0, factor=1.0),
    ),
    "jamba": dict(
        num_hidden_layers=4, attn_layer_offset=1, attn_layer_period=2,
        expert_layer_offset=1, expert_layer_period=2, mamba_expand=2,
    ),
    "kimi_vl": dict(text_config={}),
    "laguna": dict(layer_types=[_SWA, _SWA, _FULL]),
    "lfm2": _LFM2,
    "lfm2-vl": dict(text_config=_LFM2),
    "lfm2_moe": _LFM2,
    "lille-130m": dict(n_embd=64, block_size=128, n_kv_heads=2),
    "llama4": dict(
        text_config=dict(
            num_hidden_layers=4, attention_chunk_size=4, interleave_moe_layer_step=2,
            num_experts_per_tok=1, rope_scaling=None,
        )
    ),
    "llama4_text": dict(no_rope_layers=[1, 1, 0]),
    "llama_quantized": dict(hidden_size=64, intermediate_size=128, head_dim=16),
    "longcat_flash": dict(
        num_layers=2, attention_method="MLA", mla_scale_q_lora=True, mla_scale_kv_lora=True,
        zero_expert_type="identity", zero_expert_num=2,
        ffn_hidden_size=48, expert_ffn_hidden_size=16,
    ),
    "mamba": dict(intermediate_size=64),
    "mamba2": dict(num_heads=8, intermediate_size=64, time_step_limit=(0.001, 100.0)),
    "mellum": dict(layer_types=[_SWA, _SWA, _FULL], rope_parameters=_ROPE_PER_KIND),
    "mimo_v2_flash": dict(
        hybrid_layer_pattern=[0, 1, 1], moe_layer_freq=[0, 1, 1], sliding_window_size=4,
        add_swa_attention_sink_bias=True, add_full_attention_sink_bias=False,
        topk_method="noaux_tc", scoring_func="sigmoid", layernorm_epsilon=1e-5,
        swa_rope_theta=1000.0, swa_num_attention_heads=4, swa_num_key_value_heads=2,
        swa_head_dim=8, swa_v_head_dim=8,
    ),
    "minicpm3": dict(rope_scaling=dict(short_factor=[1.0, 1.5], long_factor=[2.0, 3.0])),
    "minimax": dict(rotary_dim=4),
    "ministral3": dict(
        layer_types=[_SWA, _SWA, _FULL],
        rope_parameters=dict(
            _ROPE, llama_4_scaling_beta=0.1, original_max_position_embeddings=4
        ),
    ),
    "mistral": dict(layer_types=[_SWA, _SWA, _FULL], head_dim=16, rope_theta=1e6),
    "mistral3": dict(text_config=dict(model_type="llama")),
    "muse_glimmer": dict(num_hidden_layers=4),
    "nanbeige": dict(num_loops=2),
    "nanochat": dict(num_key_value_heads=4),
    "nemotron": dict(hidden_act="relu2"),
    "nemotron-nas": dict(num_hidden_layers=4, block_configs=_NEMOTRON_NAS),
    "nemotron_h": dict(
        hybrid_override_pattern=list("M*-E"), mamba_num_heads=4, mamba_head_dim=16
    ),
    "olmo3": dict(num_hidden_layers=4),
    "olmo_hybrid": dict(num_hidden_layers=4, linear_allow_neg_eigval=True),
    "openelm": dict(
        num_transformer_layers=3, model_dim=32, ffn_dim_divisor=8,
        num_query_heads=[4, 4, 4], num_kv_heads=[2, 2, 2], ffn_multipliers=[1.0, 1.5, 2.0],
    ),
    "phixtral": dict(num_vocab=VOCAB, model_dim=32, rotary_dim=4),
    "pixtral": dict(text_config={}),
    "plamo": dict(n_shared_head=2),
    "plamo2": dict(num_hidden_layers=4, hidden_size_per_head=8, mamba_num_heads=4),
    "plamo3": _FOUR_ALTERNATING,
    "qwen": dict(kv_channels=8),
    "qwen2_vl": dict(text_config=dict(model_type="qwen2")),
    "qwen3_5": dict(text_config=dict(num_hidden_layers=4, num_experts=0)),
    "qwen3_5_moe": dict(text_config=dict(num_hidden_layers=4)),
    "qwen3_next": dict(num_hidden_layers=4),
    "qwen3_vl": dict(text_config={}),
    "qwen3_vl_moe": dict(text_config={}),
    "recurrent_gemma": dict(
        block_types=["recurrent", "recurrent", "attention"], num_key_value_heads=1,
        conv1d_width=4, attention_window_size=4, logits_soft_cap=30.0,
    ),
    "rwkv7": dict(
        hidden_size=64, head_dim=32,
        a_low_rank_dim=4, v_low_rank_dim=4, gate_low_rank_dim=4, decay_low_rank_dim=4,
    ),
    "smollm3": dict(num_hidden_layers=4, no_rope_layer_interval=2),
    "spark2_5": dict(layer_types=[_SWA, _SWA, _FULL], rope_parameters=_ROPE_PER_KIND),
    "stablelm": dict(use_qkv_bias=True),
    "step3p5": dict(
        num_attention_groups=2, layer_types=[_FULL, _SWA, _SWA],
        share_expert_dim=16, moe_layers_enum="1,2",
    ),
}  # fmt: skip

MODEL_TYPES: tuple[str, ...] = tuple(sorted(_CONFIGS))


def build(model_type: str, seed: int = 0) -> nn.Module:
    """A tiny float32 model of this type in eval mode; equal seeds give equal weights."""
    name = "llama" if model_type in ("mistral", "llama_quantized") else model_type
    module = import_module(f"mlx_lm.models.{name}")
    base = _BASE | {"model_type": name}
    config = base | _CONFIGS[model_type]
    if "text_config" in config:
        config["text_config"] = base | config["text_config"]
    if hasattr(module.ModelArgs, "from_dict"):
        args = module.ModelArgs.from_dict(config)
    else:  # a dataclass that is not a BaseModelArgs
        known = module.ModelArgs.__dataclass_fields__
        args = module.ModelArgs(**{k: v for k, v in config.items() if k in known})

    mx.random.seed(seed)
    model = module.Model(args)
    model.update(tree_map(_with_noise, model.parameters()))
    if model_type == "llama_quantized":
        nn.quantize(model, group_size=32, bits=4)
    model.eval()
    mx.eval(model.parameters())
    return model


def _with_noise(p: mx.array) -> mx.array:
    """Norms, gates and biases start at exactly 0 or 1; noise makes every one of them matter."""
    if not mx.issubdtype(p.dtype, mx.floating):
        return p
    return p.astype(mx.float32) + 0.1 * mx.random.normal(p.shape)
