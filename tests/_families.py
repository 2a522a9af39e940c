"""Tiny random models of every family of causal language models that the project is tested with."""

import torch
from _weights import enlarged

COMMON = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
              bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
               shared_expert_intermediate_size=16)
GPT = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
              linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])
OWN = {
    "gpt2": {**GPT, **NO_DROPOUT}, "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neo": dict(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, bos_token_id=1,
                    eos_token_id=2, attention_types=[[["global", "local"], 1]]),
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "cohere": {**COMMON, "logit_scale": 0.3}, "granite": {**COMMON, "logits_scaling": 4.0},
    "gemma2": {**COMMON, "final_logit_softcapping": 0.4},
    "qwen3_next": {**COMMON, **EXPERTS, **LINEAR},
    "falcon_h1": {**COMMON, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "jamba": {**COMMON, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
              "mamba_d_state": 4},
    **{name: {**COMMON, **EXPERTS} for name in ("mixtral", "qwen2_moe", "qwen3_moe")}}


def tiny(family, **more):
    """A random model with large weights, so that a forgotten softcap, scale or context shows."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**OWN.get(family, COMMON), **more})
    return enlarged(AutoModelForCausalLM.from_config(config)).eval()
