"""Tiny random models of each family."""

from pathlib import Path

import torch

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}

# name: (config class, its arguments); tied and untied embeddings, with and without biases
FAMILIES = {
    "llama": ("LlamaConfig", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    ),
    "phi3": ("Phi3Config", {**GROUPED, "eos_token_id": 1, "bos_token_id": 2}),
    "gpt_neox": ("GPTNeoXConfig", {**COMMON, "rotary_pct": 0.5}),
}


def write_families(root: Path) -> dict[str, Path]:
    """Write a bfloat16 model folder of each family."""
    import transformers

    for name, (config_class, arguments) in FAMILIES.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config_class)(**arguments)
        )
        for param in model.parameters():
            # norms and biases too, so that a test notices a missing one
            torch.nn.init.normal_(param, std=0.1)
        model.to(torch.bfloat16).save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


def gemma3_wrapper():
    """Return the configuration of a tiny Gemma 3 with a vision tower, as those from 4B up."""
    import transformers

    text = {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return transformers.Gemma3Config(
        text_config={**text, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
