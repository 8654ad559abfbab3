"""Adapted models in one process, built as in a run."""

from pathlib import Path

import torch
from peft import PeftModel

from qlora_dist.config.schema import AdapterConfig, MemoryConfig, ModelConfig, TrainConfig
from qlora_dist.model.adapters import adapter_parameters
from qlora_dist.runtime.processes import Runtime
from tests.support.built import build


def build_adapted(
    folder: Path,
    runtime: Runtime,
    *,
    dropout: float = 0.0,
    use_dora: bool = False,
    recompute: str | int = "none",
    is_compiled: bool = False,
    attention: str = "auto",
) -> PeftModel:
    """Model in train mode with non-zero adapters of rank 4, in the compute type of `runtime`."""
    dtype = str(runtime.compute_dtype).removeprefix("torch.")
    config = TrainConfig(
        model=ModelConfig(path=str(folder), dtype=dtype, attention=attention),
        adapter=AdapterConfig(rank=4, dropout=dropout, use_dora=use_dora),
        memory=MemoryConfig(recompute=recompute, compile=is_compiled),
    )
    parts, _ = build(config, folder, "single", runtime)
    model = parts.model.train()
    generator = torch.Generator(runtime.device).manual_seed(0)
    for name, param in adapter_parameters(model).items():
        if ".lora_B." in name:  # B starts at zero, and A would have no gradient
            torch.nn.init.normal_(param, std=0.05, generator=generator)
    return model
