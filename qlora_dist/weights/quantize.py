"""Quantization of a 16-bit model folder into a 4-bit one, in bitsandbytes' file format.

One matrix is in memory at a time, beside the output file that is being filled. Everything goes into
a partial folder next to the final one, is read back and compared, and then renamed into place.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from qlora_dist.atomic import read_json, whole_folder
from qlora_dist.config.schema import ModelConfig
from qlora_dist.errors import LaunchError, ModelError
from qlora_dist.metrics.console import Reporter
from qlora_dist.model.experts import expert_stacks
from qlora_dist.model.linear_layers import linear_layers
from qlora_dist.model.nf4 import QuantFormat
from qlora_dist.model.skeleton import build_skeleton
from qlora_dist.model.text_reach import left_out_towers
from qlora_dist.runtime.processes import launched_world_size, start_runtime
from qlora_dist.weights.check_headers import check_headers
from qlora_dist.weights.description import describe_base
from qlora_dist.weights.files import check_new_folder, resolve_model_folder
from qlora_dist.weights.loading import check_files
from qlora_dist.weights.names import reader_of, unused_note, unused_tensors
from qlora_dist.weights.prequantized import formats_in, is_prequantized
from qlora_dist.weights.reader import SafetensorsReader
from qlora_dist.weights.writer import FileWriter, stored_tensors

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")


def quantize(model: str, out: str, fmt: QuantFormat) -> None:
    """Write `model` in 4 bits to the new folder `out`.

    Raises:
        QloraDistError: the model cannot be quantized, or `out` cannot be written; then nothing is
            left there.
    """
    if launched_world_size() > 1:
        raise LaunchError("quantize runs as one process. Start it without a launcher.")
    target = Path(out).resolve()  # a rename replaces a link, not what it points to
    check_new_folder(target)
    folder = resolve_model_folder(model)
    stored = read_json(folder / "config.json", ModelError).get("quantization_config")
    if is_prequantized(folder, stored):
        raise ModelError(
            f"model folder {folder} is stored in 4 bits already. Use it as it is: it loads "
            "directly."
        )
    config = ModelConfig(path=model, quantization="none", dtype="bfloat16")
    reporter = Reporter(is_main=True)
    skeleton = describe_base(folder, config, reporter.log)
    _check_classes(skeleton, folder)
    device = start_runtime(seed=0, dtype="bfloat16").device
    try:
        with whole_folder(target) as partial:
            with reader_of(skeleton, folder) as reader:
                shapes = {name: tuple(param.shape) for name, param in skeleton.named_parameters()}
                check_headers(shapes, {}, reader)
                if unused := unused_tensors(skeleton, reader):
                    reporter.log(unused_note(unused))
                _check_space(partial, skeleton, fmt)
                total = sum(param.numel() * 2 for param in skeleton.parameters())
                with reporter.quantizing(total) as on_bytes:
                    written = FileWriter(partial)
                    done = 0
                    for tensors, num_elements in _quantized_tensors(skeleton, reader, fmt, device):
                        written.add(tensors)
                        done += 2 * num_elements
                        on_bytes(done)
                    written.close()
            with reporter.working("checking what was written"):
                _write_config(folder, partial, skeleton, fmt)
                _copy_rest(folder, partial)  # leaves the config that was just written
                _check_result(partial, fmt)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the 4-bit model cannot be written to {target}: {error}. Free some space or fix the "
            "folder's permissions."
        ) from None
    if expert_stacks(skeleton):
        reporter.log(
            "experts stay in 16 bits there, since transformers knows none in 4 bits: a run "
            "quantizes them while it loads"
        )
    reporter.log(
        f"{target}: {written.num_bytes / 2**20:,.0f} MiB in {written.num_files} files, "
        f"from {total / 2**20:,.0f}"
    )


def _quantized_tensors(
    skeleton: PreTrainedModel, reader: SafetensorsReader, fmt: QuantFormat, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Yield the output tensors and the element count of each parameter, in the order of files."""
    quantized = {f"{name}.weight" for name in linear_layers(skeleton)}
    towers = tuple(f"{name}." for name in left_out_towers(skeleton))
    names = [name for name, _ in skeleton.named_parameters()]
    names += [name for name, _ in skeleton.named_buffers() if name in reader]
    # Text does not pass through these, but other programs read the whole model.
    names += [name for name in reader.names() if name.startswith(towers)]
    for name in sorted(names, key=reader.file):
        tensor = reader.whole(name)
        if name not in quantized:
            if tensor.is_floating_point():
                # A copy even without a cast: the tensor is a window into the mapped file.
                tensor = tensor.to(torch.bfloat16, copy=True)
            yield {name: tensor}, tensor.numel()
            continue
        matrix = tensor.to(device, torch.bfloat16)
        if not bool(torch.isfinite(matrix).all()):
            raise ModelError(
                f"model folder {reader.folder}: tensor {name} holds values that are not finite in "
                "bfloat16 (NaN or infinity). Every output of the model would be NaN. Copy the "
                "model again, or use another version of it."
            )
        yield stored_tensors(name, matrix, fmt), tensor.numel()


def _check_classes(skeleton: PreTrainedModel, folder: Path) -> None:
    """Refuse a model with 4-bit layers of a class that transformers would not read in 4 bits.

    Raises:
        ModelError: naming the class.
    """
    for name in linear_layers(skeleton):
        kind = type(skeleton.get_submodule(name))
        if kind is not nn.Linear:
            raise ModelError(
                f"model folder {folder}: {name} is a {kind.__name__}, which transformers keeps in "
                "16 bits: it could not load a 4-bit model of this kind. Train with the 16-bit "
                "model: each process quantizes its part while it loads."
            )


def _check_space(folder: Path, skeleton: PreTrainedModel, fmt: QuantFormat) -> None:
    quantized = {f"{name}.weight" for name in linear_layers(skeleton)}
    # Per element: 4 bits, and its share of the constant of its block.
    bits = 4 + (8 if fmt.double_quant else 32) / fmt.block_size
    needed = sum(
        math.ceil(param.numel() * (bits / 8 if name in quantized else 2))
        for name, param in skeleton.named_parameters()
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"the 4-bit model needs {needed / 2**30:.1f} GiB, but {folder.parent} has "
            f"{free / 2**30:.1f} GiB free. Free some space, or give another OUT."
        )


def _write_config(folder: Path, partial: Path, skeleton: PreTrainedModel, fmt: QuantFormat) -> None:
    config = read_json(folder / "config.json", ModelError)
    config.pop("torch_dtype", None)  # the older name of the next key
    config["dtype"] = "bfloat16"
    head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        # A head of its own in the files counts more than what config.json says of it.
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and part.get("tie_word_embeddings"):
                part["tie_word_embeddings"] = False
    quantized = set(linear_layers(skeleton))
    named = skeleton.named_modules()
    config["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fmt.quant_type,
        bnb_4bit_use_double_quant=fmt.double_quant,
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="uint8",
        # Named, although it is transformers' default: other readers have other defaults.
        llm_int8_skip_modules=[
            *(n for n, layer in named if isinstance(layer, nn.Linear) and n not in quantized),
            *left_out_towers(skeleton),
        ],
    ).to_dict()
    target = partial / "config.json"
    target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in partial.glob("*.safetensors"):
        shutil.copymode(target, file)  # safetensors makes files that only their owner can read


def _copy_rest(folder: Path, partial: Path) -> None:
    """Copy the small files beside the weights: tokenizer, generation config, license."""
    for pattern in _COPIED:
        for file in folder.glob(pattern):
            is_index, target = file.name.endswith(".index.json"), partial / file.name
            if file.is_file() and not is_index and not target.exists():
                shutil.copyfile(file, target)


def _check_result(partial: Path, fmt: QuantFormat) -> None:
    """Open the finished folder as a training run would."""
    config = ModelConfig(str(partial), fmt.quant_type, fmt.double_quant)
    skeleton = build_skeleton(partial, config, formats_in(partial, config))
    with reader_of(skeleton, partial) as reader:
        check_files(skeleton, reader)
