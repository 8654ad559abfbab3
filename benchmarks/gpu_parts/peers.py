"""Peers that train an equal model: transformers and peft in a plain loop, and TRL."""

from __future__ import annotations

import importlib
import itertools
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_parts import NotMeasured
from benchmarks.gpu_parts.models import SHARED_ABOVE, make_batch, random_matrix
from benchmarks.gpu_parts.steps import (
    NUM_WARMUP,
    busy,
    reset_peak,
    row_of,
    this_device,
    timed,
    wait,
)
from benchmarks.memory import Shape


def hf_loop(
    shape: Mapping[str, int],
    rows: int,
    seq_len: int,
    *,
    rank: int = 64,
    recompute: str,
    with_liger: bool = False,
) -> dict[str, Any]:
    """transformers' model with bitsandbytes' and peft's layers, bfloat16 adapters and fused AdamW.

    Nothing is upcast.

    Args:
        with_liger: replace transformers' norms, SwiGLU, rotation and loss by liger-kernel's,
            without logits; it patches them for the rest of the process.
    """
    device = this_device()
    if with_liger and device.type == "cpu":
        raise NotMeasured(
            "needs a GPU: liger-kernel is written in Triton, which makes no code for a CPU"
        )
    reset_peak(device)
    model = hf_model(Shape(**shape), seq_len, device)
    if with_liger:
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(
            model=model
        )
    if recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = _adapted(model, rank).train()
    trained = [param for param in adapted.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    batch = make_batch(shape["vocab"], rows, seq_len).to(device)
    reset_peak(device)

    def step() -> float:
        loss = adapted(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    row = row_of(*timed(step, device), batch.num_tokens, device)
    return {**row, "busy": busy(step, device)}


def trl(
    shape: Mapping[str, int], rows: int, seq_len: int, *, rank: int = 64, defaults: bool
) -> dict[str, Any]:
    """TRL's SFTTrainer.

    Args:
        defaults: keep TRL's defaults; else recompute nothing.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device = this_device()
    reset_peak(device)
    model = hf_model(Shape(**shape), seq_len, device)
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    ids = make_batch(shape["vocab"], rows, seq_len).input_ids.tolist()
    num_steps = NUM_WARMUP + 4
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(wait(device))

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any
        ) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_length=seq_len,
            max_steps=num_steps,
            per_device_train_batch_size=rows,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            use_cpu=device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **({} if defaults else {"gradient_checkpointing": False}),
        )
        SFTTrainer(
            model=model,
            args=arguments,
            processing_class=tokenizer,
            callbacks=[Clock()],
            train_dataset=Dataset.from_list(
                [{"input_ids": row, "labels": row} for row in ids * num_steps]
            ),
            peft_config=LoraConfig(
                r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        ).train()
    seconds = [later - earlier for earlier, later in itertools.pairwise(times)][NUM_WARMUP:]
    return row_of(seconds, losses, rows * seq_len, device)


@torch.no_grad()
def hf_model(shape: Shape, seq_len: int, device: torch.device) -> nn.Module:
    """Llama as `from_pretrained` makes it with `load_in_4bit`, NF4 and double quantization.

    The weights are random.
    """
    import bitsandbytes as bnb
    from accelerate import init_empty_weights
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=seq_len,
        tie_word_embeddings=False,
    )
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    made: dict[object, Any] = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            size = (module.out_features, module.in_features)
            # shared bytes by shape, as in this program's model
            key: object = size if size[0] * size[1] > SHARED_ABOVE else name
            if key not in made:
                made[key] = bnb.functional.quantize_4bit(
                    random_matrix(size, generator), quant_type="nf4", compress_statistics=True
                )
            model.set_submodule(name, _linear4bit(size, *made[key]))
        else:
            for leaf, param in list(module.named_parameters(recurse=False)):
                is_matrix = param.ndim == 2
                value = (
                    random_matrix(tuple(param.shape), generator)
                    if is_matrix
                    else torch.ones(param.shape)
                )
                module._parameters[leaf] = nn.Parameter(
                    value.to(device, torch.bfloat16), requires_grad=False
                )
    model.to(device)  # moves the buffers
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config)
    model.quantization_method = model.hf_quantizer.quantization_config.quant_method
    return model


def _linear4bit(size: tuple[int, int], packed: torch.Tensor, state: Any) -> nn.Module:
    """bitsandbytes' layer with bytes of its own; the small constants are shared."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        size[1],
        size[0],
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        packed.clone(),
        requires_grad=False,
        quant_state=state,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    # in eval mode this path repacks the weight, which then cannot be trained
    layer.support_avx512bf16_for_cpu = False
    return layer


def _adapted(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for param in adapted.parameters():
        if param.requires_grad:
            param.data = param.data.to(torch.bfloat16)
    return adapted
