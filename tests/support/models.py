"""Models loaded by this program and by transformers, whole in one process; folders to load."""

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.cpu.attention import NAME
from qlora_dist.model.experts import QuantizedStack
from qlora_dist.model.nf4 import QuantizedLinear, four_bit_code
from qlora_dist.model.parts import base_model
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.weights.loading import load_base_weights, materialize
from qlora_dist.weights.prequantized import formats_in

CPU = torch.device("cpu")


def load_here(folder: Path, device: torch.device = CPU, **config: object):
    """Load the base model of `folder` with this program, without adapters.

    Type and attention are those of `load_there`.
    """
    model_config = ModelConfig(path=str(folder), **{"dtype": "bfloat16", **config})
    model = build_skeleton(folder, model_config, formats_in(folder, model_config))
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")
    materialize(model, device, device)
    load_base_weights(model, folder, device)
    return model.eval()


@cache
def mend_bitsandbytes() -> None:
    """Let bitsandbytes dequantize on this CPU what was quantized.

    With AVX512 its kernel gives other numbers where rows end inside of a block.
    """
    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("dequantize_4bit", _dequantize, "CPU", allow_override=True)
    _LIBRARIES.append(library)  # with it the replacement would go


_LIBRARIES: list[torch.library.Library] = []


def _dequantize(packed, absmax, block_size, quant_type, shape, dtype) -> torch.Tensor:
    """Look up each half byte, and multiply it with the largest value of its block."""
    code, packed = four_bit_code(quant_type, packed.device), packed.view(torch.uint8).reshape(-1)
    halves = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: math.prod(shape)]
    scale = absmax.float().repeat_interleave(block_size)[: len(halves)]
    return (code[halves.int()] * scale).to(dtype).view(*shape)


def load_there(folder: Path, **arguments: object):
    """Load the model of `folder` with transformers."""
    from transformers import AutoModelForCausalLM

    mend_bitsandbytes()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **arguments)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its kernel rounds differently
    return model.eval()


def dequantized_there(model: torch.nn.Module, folder: Path):
    """Load the model of `folder` with transformers in float32, with our 4-bit weights as numbers.

    transformers has no experts in 4 bits.
    """
    from transformers import AutoModelForCausalLM

    base = base_model(model)
    there = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = dict(there.named_parameters())
    for name, module in base.named_modules():
        plain = name.replace(".base_layer", "")
        if isinstance(module, QuantizedLinear):
            theirs[f"{plain}.weight"].data = module.dequantized().float()
        elif isinstance(module, QuantizedStack):
            theirs[plain].data = module.dequantized(0, module.shape[0], torch.float32)
    return there.eval()


def save_with_transformers(
    source: Path, folder: Path, *, max_shard_size: str = "1GB", **bnb: object
) -> Path:
    """Let transformers quantize `source` while it loads it, and save the result."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **bnb
    )
    load_there(source, quantization_config=quantization).save_pretrained(
        folder, max_shard_size=max_shard_size
    )
    return folder


def logits(model) -> torch.Tensor:
    """Logits of fixed tokens, (2, 9, vocab)."""
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def spoiled(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a model folder of one weight file, with `change` applied to its tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def edit_json(file: Path, change: Callable[[dict], None]) -> None:
    """Change a JSON file in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
