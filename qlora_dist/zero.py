"""ZeRO-2 and ZeRO-3 through DeepSpeed's engine: how its settings are made, the model cut up, and a step taken.

``deepspeed.initialize`` is called directly, with Accelerate's processes underneath. Accelerate's own wrapper of the
engine takes the optimizer step inside ``backward``, before the step's learning rate is known, and divides the loss by
the number of micro-batches, which this program has done already, by tokens.

DeepSpeed runs in its float32 mode, whatever `model.dtype` is: its bfloat16 mode would cast the master adapters and the
float32 quantisation constants. Autocast decides the compute type here, as with every other engine.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import distributed as dist
from torch import nn

from qlora_dist.config import OptimConfig, TrainConfig
from qlora_dist.errors import ConfigError
from qlora_dist.model.adapters import adapter_parameters, lora_layers, whole_adapter
from qlora_dist.model.lora_linear import FusedLinear
from qlora_dist.model.shards import local_range, whole_shape
from qlora_dist.model.skeleton import decoder_layers
from qlora_dist.moments import Moments, Piece
from qlora_dist.optim import ADAM_BETAS, ADAM_EPS, build_optimizer, parameter_groups
from qlora_dist.runtime import Runtime

Settings = dict[str, Any]
"""A DeepSpeed configuration, as its JSON files hold it."""

_MAX_BUCKET = 50_000_000
"""Elements of DeepSpeed's gradient bucket, which it allocates in full; its own default takes 2 GB."""


def partition_skeleton(model: PeftModel, settings: Settings, runtime: Runtime) -> None:
    """Allocate a meta-device model on this rank's device, keeping 1/N of every parameter (ZeRO-3).

    One decoder layer, or one module outside of them, is allocated whole at a time and cut up before the next.
    Contents are undefined: weights are read afterwards, by each rank for its own parts. (DeepSpeed broadcasts the
    undefined contents of rank 0 on the way, a 4-bit model's size in all.)
    """
    deepspeed = _import_deepspeed(runtime)
    model.get_base_model().tie_weights()  # on meta, each use of a shared parameter may be one of its own
    allocated: dict[nn.Parameter, nn.Parameter] = {}  # by what it replaces: tied parameters stay tied
    units = [list(layer.modules()) for layer in decoder_layers(model)]
    inside = {module for unit in units for module in unit}
    for unit in [*units, *([module] for module in model.modules() if module not in inside)]:
        fresh = nn.ParameterList()
        for module in unit:
            for name, param in module.named_parameters(recurse=False):
                if param not in allocated:
                    empty = torch.empty_like(param, device=runtime.device)
                    allocated[param] = nn.Parameter(empty, requires_grad=param.requires_grad)
                    fresh.append(allocated[param])
                module._parameters[name] = allocated[param]
        if len(fresh) > 0:
            deepspeed.zero.Init(module=fresh, config_dict_or_path=settings)
    for layer in lora_layers(model):
        if layer.lora_variant or isinstance(layer, FusedLinear):
            # Their forward reads the parameters of the modules in it, which are gathered only while these run.
            for param in layer.parameters():
                deepspeed.zero.register_external_parameter(layer, param)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Have all parameters of a module whole, if they are in parts, to be read; a collective."""
    parts = [param for param in module.parameters() if hasattr(param, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


class ZeroEngine:
    """Adapter gradients and optimizer state are sharded, and with stage 3 every parameter, by DeepSpeed."""

    can_drop_gradients = False
    loss_scale = 1.0

    def __init__(self, model: nn.Module, config: OptimConfig, settings: Settings, runtime: Runtime) -> None:
        deepspeed = _import_deepspeed(runtime)
        adapters = adapter_parameters(model)
        groups = parameter_groups(adapters, config)
        self._model = model
        self._world_size = runtime.world_size
        self._is_main = runtime.is_main
        self._stage = settings["zero_optimization"]["stage"]
        self._lr_multipliers = list(groups)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer([list(members.values()) for members in groups.values()], config),
            config=_sized(settings, model, adapters),
            dist_init_required=False,
        )
        self._accumulation = ExitStack()
        self._is_accumulating = False

    def backward(self, loss: torch.Tensor, is_last_micro_batch: bool) -> None:
        if not is_last_micro_batch and not self._is_accumulating:
            self._accumulation.enter_context(self._engine.coalesce_grad_reduction())
            self._is_accumulating = True
        # DeepSpeed averages over ranks. The loss is divided by the global token count already: ranks are summed.
        loss = loss * (self.loss_scale * self._world_size)
        # The loop calls the model, not the engine, so what the engine's forward prepares is prepared here. DeepSpeed
        # tells by the running backward which graph it belongs to, so this has to happen inside of it.
        self._optimizer.clear_backward_seen_flag()
        loss.register_hook(lambda _: self._engine._backward_prologue())
        self._engine.backward(loss, scale_wrt_gas=False)
        if is_last_micro_batch and self._is_accumulating:
            self._accumulation.close()  # reduces the accumulated gradients
            self._is_accumulating = False

    def update(self, lr: float, max_grad_norm: float | None) -> torch.Tensor:
        for group, multiplier in zip(self._optimizer.param_groups, self._lr_multipliers, strict=True):
            group["lr"] = lr * multiplier
        self._optimizer.clip_grad = max_grad_norm or 0.0
        self._engine.set_gradient_accumulation_boundary(True)
        self._optimizer.loss_scale = self.loss_scale  # for this step only: backward would multiply by it
        self._engine.step()
        self._optimizer.loss_scale = 1.0
        if self._optimizer.overflow:  # gradients that are not finite: DeepSpeed has left everything as it was
            return torch.tensor(torch.nan, device=self._engine.device)
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._engine.device)

    def drop_gradients(self) -> None:
        raise NotImplementedError("DeepSpeed's buckets and hooks cannot be put back")

    def whole_adapter(self) -> dict[str, torch.Tensor]:
        return whole_adapter(self._model, self._is_main)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        adapters = adapter_parameters(self._model)
        return self._moments().gather({name: whole_shape(param).numel() for name, param in adapters.items()})

    def load_optimizer_state(self, saved: Mapping[str, torch.Tensor], num_updates: int) -> None:
        self._moments().scatter(saved, num_updates)

    def _moments(self) -> Moments:
        """DeepSpeed lays each rank's parts of the parameters end to end in buffers that its optimizer works on."""
        adapters = adapter_parameters(self._model)
        optimizer = self._optimizer
        if self._stage == 3:
            buffers = optimizer.fp32_partitioned_groups_flat
            pieces = []
            for name, param in adapters.items():
                first, stop = local_range(param)
                buffer, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
                pieces.append(Piece(name, first, stop - first, buffer, offset))
        else:
            buffers = optimizer.single_partition_of_fp32_groups
            pieces = [
                Piece(name, at.lp_fragment_address.start, at.lp_fragment_address.numel, at.param_group_index,
                      at.hp_fragment_address.start)
                for name, at in ((name, param._hp_mapping) for name, param in adapters.items())
                if at is not None
            ]  # fmt: skip
        return Moments(optimizer.optimizer, buffers, pieces, dist.group.WORLD, self._engine.device)


def zero_settings(config: TrainConfig, stage: int, world_size: int, json_file: str | None) -> Settings:
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
            elif not key.startswith(_IDLE) or (key.startswith("fp16.") and config.model.dtype == "float16"):
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
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"deepspeed config {path} does not exist. Give the path of a DeepSpeed JSON file.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed config {path} is not readable JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed config {path} must hold a JSON object.")
    return content


_TUNING = {
    "comms_logger", "memory_breakdown", "steps_per_print", "wall_clock_breakdown",
    *(f"zero_optimization.{name}" for name in (
        "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "contiguous_gradients",
        "overlap_comm", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
        "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "sub_group_size",
        "use_all_reduce_for_fetch_params",
    )),
}  # fmt: skip
"""What a user's file may choose: options that move memory and time about, and leave the numbers alone."""

_IDLE = (
    "fp16.", "zero_optimization.offload_optimizer.", "zero_optimization.offload_param.",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)  # fmt: skip
"""What many files have, and has no effect while the switch above it (see `_decided_here`) is off."""


def _decided_here(config: TrainConfig, stage: int, world_size: int) -> dict[str, tuple[Any, str]]:
    """DeepSpeed's keys for what the run's own file decides: the value that agrees with it, and what it says."""
    optim, dtype, offload = config.optim, f"model.dtype is {config.model.dtype}", config.parallel.cpu_offload
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
        "optimizer.params.weight_decay": (optim.weight_decay, f"optim.weight_decay is {optim.weight_decay:g}"),
        "optimizer.params.betas": (list(ADAM_BETAS), f"this program's betas are {list(ADAM_BETAS)}"),
        "optimizer.params.eps": (ADAM_EPS, f"this program's eps is {ADAM_EPS:g}"),
        "scheduler.type": (schedules[optim.schedule], f"optim.schedule is {optim.schedule}"),
        "fp16.enabled": (config.model.dtype == "float16", dtype),
        "bf16.enabled": (config.model.dtype == "bfloat16", dtype),
        "zero_optimization.stage": (stage, f"the backend is zero{stage}"),
        "zero_optimization.offload_optimizer.device": ("none", "the optimizer's state stays on the device"),
        "zero_optimization.offload_param.device": (
            "cpu" if offload else "none",
            f"parallel.cpu_offload is {str(offload).lower()}",
        ),
        **({"zero_optimization.offload_param.pin_memory": (torch.cuda.is_available(), "memory is pinned for a GPU")}
           if offload else {}),
    }  # fmt: skip


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


def _sized(settings: Settings, model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> Settings:
    """The settings with those of DeepSpeed's buffers that the user left open fitted to the model.

    Its defaults are made for training all of a large model: with them nothing that is gathered would be let go of
    before a billion elements have come together.
    """
    num_adapter_elements = sum(whole_shape(param).numel() for param in adapters.values())
    layer = max(sum(whole_shape(p).numel() for p in layer.parameters()) for layer in decoder_layers(model))
    defaults = {"reduce_bucket_size": min(num_adapter_elements, _MAX_BUCKET)}
    if settings["zero_optimization"]["stage"] == 3:
        defaults |= {
            "stage3_param_persistence_threshold": 0,  # small parameters are sharded like the rest
            "stage3_max_live_parameters": 2 * layer,  # the layer at work and the next one
            "stage3_max_reuse_distance": 2 * layer,  # from a layer's recomputation to its backward
            "stage3_prefetch_bucket_size": layer,
        }
    return {**settings, "zero_optimization": {**defaults, **settings["zero_optimization"]}}


def _import_deepspeed(runtime: Runtime) -> Any:
    """DeepSpeed on this run's device and process group, without its chatter."""
    if runtime.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise it looks for one by what is installed
    os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPU it would compile a collective of its own, at the start of the run and with the user's compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=True)
    return deepspeed
