"""DeepSpeed's settings: what a run decides, and what a user's file may tune."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_dist.atomic import read_json
from qlora_dist.config.schema import TrainConfig
from qlora_dist.errors import ConfigError, LaunchError
from qlora_dist.model.parts import ModelParts
from qlora_dist.optim.adamw import ADAM_BETAS, ADAM_EPS
from qlora_dist.runtime.shards import whole_shape

Settings = dict[str, Any]
"""A DeepSpeed configuration, as its JSON files hold it."""

_MAX_BUCKET = 50_000_000
"""Elements of DeepSpeed's gradient bucket, which it allocates in full; its own default takes 2 GB."""


def run_settings(config: TrainConfig, stage: int, world_size: int) -> Settings:
    """The DeepSpeed configuration of a run, with the file of its own configuration or of the launcher, if any.

    Raises:
        ConfigError: `parallel.deepspeed_config` cannot be read, or contradicts the run's settings.
        LaunchError: the launcher was given another such file.
    """
    mine, launchers = config.parallel.deepspeed_config, launcher_file()
    if None not in (mine, launchers) and mine != launchers:
        raise LaunchError(
            f"parallel.deepspeed_config is {mine}, but the launcher was given {launchers}. Keep one of them."
        )
    return zero_settings(config, stage, world_size, mine or launchers)


def zero_settings(
    config: TrainConfig, stage: int, world_size: int, json_file: str | None
) -> Settings:
    """The DeepSpeed configuration of a run: this program's settings, and the tuning options of the user's file.

    Args:
        stage: ZeRO stage, 2 or 3.
        json_file: DeepSpeed's own kind of file. What is "auto" there is decided here.

    Raises:
        ConfigError: the file cannot be read, contradicts the run's settings, or sets what this program decides.
    """
    optim = config.optim
    tuning: Settings = {}
    if json_file is not None:
        known = _decided_here(config, stage, world_size)
        for key, value in _leaves(read_deepspeed_file(json_file)):
            if key in known:
                _check_agreement(json_file, key, value, *known[key])
            elif key in _TUNING:
                if stage != 3 and ".stage3_" in key:
                    raise ConfigError(
                        f"deepspeed config {json_file} sets {key}, which has no effect: the backend is zero{stage}. "
                        'Remove it, or set it to "auto".'
                    )
                section, _, leaf = key.rpartition(".")
                (tuning.setdefault(section, {}) if section else tuning)[leaf] = value
            elif not key.startswith(_IDLE) or (
                key.startswith("fp16.") and config.model.dtype == "float16"
            ):
                raise ConfigError(
                    f"deepspeed config {json_file} sets {key} to {json.dumps(value)}, which is not an option for "
                    f'tuning. Remove it, or set it to "auto". The options are {", ".join(sorted(_TUNING))}.'
                )
    zero_section = {**tuning.get("zero_optimization", {}), "stage": stage}
    if config.parallel.cpu_offload:
        zero_section["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        **tuning,
        "train_micro_batch_size_per_gpu": optim.micro_batch_size,
        "gradient_accumulation_steps": optim.grad_accum_steps,
        "gradient_clipping": optim.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,  # bitsandbytes' are not on DeepSpeed's list
        "zero_optimization": zero_section,
    }


def launcher_stage() -> str:
    """The ZeRO stage that Accelerate was told to use, as it was written: in its DeepSpeed file, or as an option."""
    option = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    file = launcher_file()
    if file is None:
        return option
    stage = dict(_leaves(read_deepspeed_file(file))).get("zero_optimization.stage")
    return option if stage is None else str(stage)


def launcher_file() -> str | None:
    """The DeepSpeed file that Accelerate was given, if any."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if file.lower() == "none" else file


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises:
        ConfigError: it is not a readable JSON object.
    """
    if not Path(path).exists():
        raise ConfigError(
            f"deepspeed config {path} does not exist. Give the path of a DeepSpeed JSON file."
        )
    return read_json(Path(path), ConfigError, "deepspeed config ")


_TUNING = {
    "comms_logger",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    *(
        f"zero_optimization.{name}"
        for name in (
            "allgather_bucket_size",
            "allgather_partitions",
            "allgather_sequential",
            "contiguous_gradients",
            "overlap_comm",
            "reduce_bucket_size",
            "reduce_scatter",
            "round_robin_gradients",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_model_persistence_threshold",
            "stage3_param_persistence_threshold",
            "stage3_prefetch_bucket_size",
            "sub_group_size",
            "use_all_reduce_for_fetch_params",
        )
    ),
}
"""What a user's file may choose: options that move memory and time about, and leave the numbers alone."""

_IDLE = (
    "fp16.",
    "zero_optimization.offload_optimizer.",
    "zero_optimization.offload_param.",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
"""What many files have, and has no effect while the switch above it (see `_decided_here`) is off."""


def _decided_here(config: TrainConfig, stage: int, world_size: int) -> dict[str, tuple[Any, str]]:
    """DeepSpeed's keys for what the run's own file decides: the value that agrees with it, and what it says."""
    optim, dtype, offload = (
        config.optim,
        f"model.dtype is {config.model.dtype}",
        config.parallel.cpu_offload,
    )
    batch = optim.micro_batch_size * optim.grad_accum_steps * world_size
    clip = "null" if optim.max_grad_norm is None else f"{optim.max_grad_norm:g}"
    schedules = {"constant": "WarmupLR", "linear": "WarmupDecayLR", "cosine": "WarmupCosineLR"}
    return {
        "train_batch_size": (
            batch,
            f"optim.micro_batch_size {optim.micro_batch_size} x optim.grad_accum_steps {optim.grad_accum_steps} x "
            f"{world_size} processes is {batch}",
        ),
        "train_micro_batch_size_per_gpu": (
            optim.micro_batch_size,
            f"optim.micro_batch_size is {optim.micro_batch_size}",
        ),
        "gradient_accumulation_steps": (
            optim.grad_accum_steps,
            f"optim.grad_accum_steps is {optim.grad_accum_steps}",
        ),
        "gradient_clipping": (optim.max_grad_norm or 0, f"optim.max_grad_norm is {clip}"),
        "optimizer.type": (
            "AdamW" if optim.optimizer == "adamw" else None,
            f"optim.optimizer is {optim.optimizer}",
        ),
        "optimizer.params.lr": (optim.lr, f"optim.lr is {optim.lr:g}"),
        "optimizer.params.weight_decay": (
            optim.weight_decay,
            f"optim.weight_decay is {optim.weight_decay:g}",
        ),
        "optimizer.params.betas": (
            list(ADAM_BETAS),
            f"this program's betas are {list(ADAM_BETAS)}",
        ),
        "optimizer.params.eps": (ADAM_EPS, f"this program's eps is {ADAM_EPS:g}"),
        "scheduler.type": (schedules.get(optim.schedule), f"optim.schedule is {optim.schedule}"),
        "fp16.enabled": (config.model.dtype == "float16", dtype),
        "bf16.enabled": (config.model.dtype == "bfloat16", dtype),
        "zero_optimization.stage": (stage, f"the backend is zero{stage}"),
        "zero_optimization.offload_optimizer.device": (
            "none",
            "the optimizer's state stays on the device",
        ),
        "zero_optimization.offload_param.device": (
            "cpu" if offload else "none",
            f"parallel.cpu_offload is {str(offload).lower()}",
        ),
        **(
            {
                "zero_optimization.offload_param.pin_memory": (
                    torch.cuda.is_available(),
                    "memory is pinned for a GPU",
                )
            }
            if offload
            else {}
        ),
    }


def _check_agreement(file: str, key: str, found: Any, expected: Any, ours: str) -> None:
    if found != expected or isinstance(found, bool) != isinstance(expected, bool):
        raise ConfigError(
            f"deepspeed config {file} sets {key} to {json.dumps(found)}, but {ours}. "
            f'Remove {key} there or set it to "auto": the run\'s own file decides.'
        )


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is set, except to "auto"."""
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in _TUNING:
            yield from _leaves(value, f"{name}.")
        elif value != "auto":
            yield name, value


def sized_settings(settings: Settings, parts: ModelParts) -> Settings:
    """The settings with those of DeepSpeed's buffers that the user left open fitted to the model.

    Its defaults are made for training all of a large model: with them nothing that is gathered would be let go of
    before a billion elements have come together.
    """
    num_adapter_elements = sum(whole_shape(param).numel() for param in parts.adapters.values())
    layer = max(sum(whole_shape(p).numel() for p in layer.parameters()) for layer in parts.layers)
    defaults = {"reduce_bucket_size": min(num_adapter_elements, _MAX_BUCKET)}
    if settings["zero_optimization"]["stage"] == 3:
        defaults |= {
            "stage3_param_persistence_threshold": 0,  # small parameters are sharded like the rest
            "stage3_max_live_parameters": 2 * layer,  # the layer at work and the next one
            "stage3_max_reuse_distance": 2 * layer,  # from a layer's recomputation to its backward
            "stage3_prefetch_bucket_size": layer,
        }
    return {**settings, "zero_optimization": {**defaults, **settings["zero_optimization"]}}
