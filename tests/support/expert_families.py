"""Tiny random models with experts: fused, apart on disk, transposed with biases, shared."""

from pathlib import Path

import torch

from tests.support.families import COMMON, GROUPED

# Eight experts of which two, matrices whose blocks end within rows.
ROUTED = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# name: (config class, its arguments)
EXPERT_FAMILIES = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            **ROUTED,
            "head_dim": 16,
            "num_experts": 8,
            "mlp_only_layers": [0],
            "num_hidden_layers": 3,
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        {**GROUPED, "intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    "mixtral": (
        "MixtralConfig",
        {**GROUPED, "intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **GROUPED,
            "intermediate_size": 48,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **COMMON,
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 48,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **GROUPED,
            "intermediate_size": 48,
            "intermediate_size_mlp": 112,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "moe_layers": [1, 3],
            "attention_chunk_size": 16,
        },
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        {**GROUPED, "intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}


def write_expert_family(name: str, folder: Path) -> Path:
    """Write a bfloat16 model folder of a family, as transformers saves it."""
    import transformers

    config_class, arguments = EXPERT_FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config_class)(**arguments)
    )
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
