"""DeepSpeed's settings: those that a run decides, and those that a user's file may tune."""

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
from qlora_dist.optim.optimizers import ADAM_BETAS, ADAM_EPS
from qlora_dist.runtime.shards import whole_shape

Settings = dict[str, Any]
"""A DeepSpeed configuration, as its JSON files hold it."""

_MAX_BUCKET = 50_000_000
"""Elements of DeepSpeed's gradient bucket, allocated in full; its default of 5e8 takes 2 GB."""


def run_settings(config: TrainConfig, stage: int, world_size: int) -> Settings:
    """Make the DeepSpeed configuration of a run from its own file or the launcher's, if any.

    Raises:
        ConfigError: `parallel.deepspeed_config` cannot be read, or contradicts the run's settings.
        LaunchError: the launcher was given a different DeepSpeed file.
    """
    mine, launchers = config.parallel.deepspeed_config, launcher_file()
    if None not in (mine, launchers) and mine != launchers:
        raise LaunchError(
            f"parallel.deepspeed_config is {mine}, but the launcher was given {launchers}. "
            "Keep one of them."
        )
    return zero_settings(config, stage, world_size, mine or launchers)


def zero_settings(
    config: TrainConfig, stage: int, world_size: int, json_file: str | None
) -> Settings:
    """Make the DeepSpeed configuration of a run: its own settings and the user's tuning options.

    Args:
        stage: ZeRO stage, 2 or 3.
        json_file: DeepSpeed configuration of the user; its "auto" values are decided here.

    Raises:
        ConfigError: the file cannot be read, contradicts the run's settings, or sets a key that is
            no tuning option.
    """
    optim = config.optim
    tuning: Settings = {}
    # With float16 the section "fp16" is switched on: its settings have an effect.
    idle = _IDLE if config.model.dtype == "float16" else (*_IDLE, "fp16.")
    if json_file is not None:
        known = _decided_here(config, stage, world_size)
        for key, value in _leaves(read_deepspeed_file(json_file)):
            if key in known:
                _check_agreement(json_file, key, value, *known[key])
            elif key in _TUNING:
                if stage != 3 and ".stage3_" in key:
                    raise ConfigError(
                        f"deepspeed config {json_file} sets {key}, which has no effect: the "
                        f'backend is zero{stage}. Remove it, or set it to "auto".'
                    )
                section, _, leaf = key.rpartition(".")
                (tuning.setdefault(section, {}) if section else tuning)[leaf] = value
            elif not key.startswith(idle):
                raise ConfigError(
                    f"deepspeed config {json_file} sets {key} to {json.dumps(value)}, which is not "
                    'an option for tuning. Remove it, or set it to "auto". The options are '
                    f"{', '.join(sorted(_TUNING))}."
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
    """Return the ZeRO stage of Accelerate's DeepSpeed file or option, as the user wrote it."""
    stage, file = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"), launcher_file()
    if file is None:
        return stage
    return str(dict(_leaves(read_deepspeed_file(file))).get("zero_optimization.stage", stage))


def launcher_file() -> str | None:
    """Return the DeepSpeed file that Accelerate was given, if any."""
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
"""Keys that a user's file may set: they trade memory for time and leave the numbers alone."""

_IDLE = (
    "zero_optimization.offload_optimizer.",
    "zero_optimization.offload_param.",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
"""Beginnings of keys that many files have and that have no effect here: `_decided_here` holds the
switch of their section off."""


def _decided_here(config: TrainConfig, stage: int, world_size: int) -> dict[str, tuple[Any, str]]:
    """Map each DeepSpeed key that the run's own file decides to (value, reason in a message)."""
    optim, dtype = config.optim, f"model.dtype is {config.model.dtype}"
    size, accum, clip = optim.micro_batch_size, optim.grad_accum_steps, optim.max_grad_norm
    decay, betas = optim.weight_decay, list(ADAM_BETAS)
    batch, offload = size * accum * world_size, config.parallel.cpu_offload
    product = f"optim.micro_batch_size {size} x optim.grad_accum_steps {accum} x {world_size}"
    clipping = "null" if clip is None else f"{clip:g}"
    adam = "AdamW" if optim.optimizer == "adamw" else None
    schedules = {"constant": "WarmupLR", "linear": "WarmupDecayLR", "cosine": "WarmupCosineLR"}
    home, placed = "cpu" if offload else "none", f"parallel.cpu_offload is {offload}".lower()
    stays = "the optimizer's state stays on the device"
    decided: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch, f"{product} processes is {batch}"),
        "train_micro_batch_size_per_gpu": (size, f"optim.micro_batch_size is {size}"),
        "gradient_accumulation_steps": (accum, f"optim.grad_accum_steps is {accum}"),
        "gradient_clipping": (clip or 0, f"optim.max_grad_norm is {clipping}"),
        "optimizer.type": (adam, f"optim.optimizer is {optim.optimizer}"),
        "optimizer.params.lr": (optim.lr, f"optim.lr is {optim.lr:g}"),
        "optimizer.params.weight_decay": (decay, f"optim.weight_decay is {decay:g}"),
        "optimizer.params.betas": (betas, f"this program's betas are {betas}"),
        "optimizer.params.eps": (ADAM_EPS, f"this program's eps is {ADAM_EPS:g}"),
        "scheduler.type": (schedules.get(optim.schedule), f"optim.schedule is {optim.schedule}"),
        "fp16.enabled": (config.model.dtype == "float16", dtype),
        "bf16.enabled": (config.model.dtype == "bfloat16", dtype),
        "zero_optimization.stage": (stage, f"the backend is zero{stage}"),
        "zero_optimization.offload_optimizer.device": ("none", stays),
        "zero_optimization.offload_param.device": (home, placed),
    }
    if offload:
        pinned = (torch.cuda.is_available(), "memory is pinned for a GPU")
        decided["zero_optimization.offload_param.pin_memory"] = pinned
    return decided


def _check_agreement(file: str, key: str, found: Any, expected: Any, ours: str) -> None:
    # JSON's true is not 1, though Python's is.
    if found != expected or isinstance(found, bool) != isinstance(expected, bool):
        raise ConfigError(
            f"deepspeed config {file} sets {key} to {json.dumps(found)}, but {ours}. "
            f'Remove {key} there or set it to "auto": the run\'s own file decides.'
        )


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of each setting that is not "auto"."""
    for key, value in section.items():
        name = f"{prefix}{key}"
        # A tuning option may itself be a section, such as comms_logger.
        if isinstance(value, dict) and name not in _TUNING:
            yield from _leaves(value, f"{name}.")
        elif value != "auto":
            yield name, value


def sized_settings(settings: Settings, parts: ModelParts) -> Settings:
    """Return the settings with DeepSpeed's buffers fitted to the model, where the user set none.

    DeepSpeed's defaults are for training all of a large model: with them gathered parameters stay
    until there are a billion elements of them.
    """
    num_trained = sum(whole_shape(param).numel() for param in parts.adapters.values())
    layer = max(sum(whole_shape(p).numel() for p in layer.parameters()) for layer in parts.layers)
    defaults = {"reduce_bucket_size": min(num_trained, _MAX_BUCKET)}
    if settings["zero_optimization"]["stage"] == 3:
        defaults |= {
            "stage3_param_persistence_threshold": 0,  # small parameters are sharded like the rest
            "stage3_max_live_parameters": 2 * layer,  # the layer at work and the next one
            "stage3_max_reuse_distance": 2 * layer,  # from a layer's recomputation to its backward
            "stage3_prefetch_bucket_size": layer,
        }
    return {**settings, "zero_optimization": {**defaults, **settings["zero_optimization"]}}
