"""How processes share the model and the work: the only module that knows a backend by name."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

from torch import nn
from torch.distributed.fsdp import FSDPModule

from qlora_dist.config.rules import check_backend_reads
from qlora_dist.config.schema import OptimConfig, TrainConfig
from qlora_dist.errors import LaunchError
from qlora_dist.parallel.deepspeed_config import Settings, launcher_file, launcher_stage, zero_settings
from qlora_dist.parallel.engine import Engine, ReplicatedEngine
from qlora_dist.parallel.fsdp import ShardedEngine
from qlora_dist.parallel.zero import ZeroEngine
from qlora_dist.runtime.processes import Runtime, launched_world_size

Backend = Literal["single", "ddp", "fsdp", "zero2", "zero3"]


def choose_backend(config: TrainConfig) -> Backend:
    """The backend of this run, from the config and from what the launcher started; needs no process group.

    Raises:
        LaunchError: the launcher and `parallel.backend` contradict each other, or the backend is not installed.
        ConfigError: the launcher's DeepSpeed file cannot be read, or a setting is none of the backend's.
    """
    backend = _asked_backend(config)
    if backend in ("zero2", "zero3") and find_spec("deepspeed") is None:
        raise LaunchError(
            f"the backend is {backend}, which needs DeepSpeed, and that is not installed. "
            "Run: pip install 'qlora-dist[deepspeed]', or set parallel.backend: fsdp."
        )
    if config.parallel.deepspeed_config is not None and backend not in ("zero2", "zero3"):
        raise LaunchError(
            f"parallel.deepspeed_config is {config.parallel.deepspeed_config}, but the backend is {backend}, which "
            "does not read it. Remove it, or set parallel.backend: zero2 or zero3."
        )
    check_backend_reads(config, backend)
    return backend


def _asked_backend(config: TrainConfig) -> Backend:
    asked, world_size = config.parallel.backend, launched_world_size()
    launcher = _launcher_backend()
    if launcher is not None and asked not in ("auto", launcher):
        name = "FSDP" if launcher == "fsdp" else f"DeepSpeed with ZeRO stage {launcher[-1]}"
        option = "--use_fsdp" if launcher == "fsdp" else "--use_deepspeed"
        raise LaunchError(
            f"parallel.backend is {asked}, but the launcher was told to use {name}. "
            f"Remove {option} from the launcher, or set parallel.backend: auto."
        )
    if asked == "single" and world_size > 1:
        raise LaunchError(
            f"parallel.backend is single, but the launcher started {world_size} processes. "
            "Start one process, or set parallel.backend: auto, ddp or fsdp."
        )
    if asked != "auto":
        return asked
    return launcher or ("fsdp" if world_size > 1 else "single")


def _launcher_backend() -> Backend | None:
    """What the launcher was told to use, if anything: Accelerate hands its choice over in the environment."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = launcher_stage()
        if stage not in ("2", "3"):
            raise LaunchError(
                f"the launcher was told to use DeepSpeed with ZeRO stage {stage}. Stages 2 and 3 are supported: "
                "give the launcher --zero_stage 2 or 3, or remove --use_deepspeed and set parallel.backend: ddp."
            )
        return "zero2" if stage == "2" else "zero3"
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else None


def engine_settings(config: TrainConfig, backend: Backend) -> Settings | None:
    """What the backend's library is configured with; None for backends that are written here.

    Raises:
        ConfigError: `parallel.deepspeed_config` cannot be read, or contradicts the run's settings.
        LaunchError: the launcher was given another such file.
    """
    if backend not in ("zero2", "zero3"):
        return None
    mine, launchers = config.parallel.deepspeed_config, launcher_file()
    if None not in (mine, launchers) and mine != launchers:
        raise LaunchError(
            f"parallel.deepspeed_config is {mine}, but the launcher was given {launchers}. Keep one of them."
        )
    return zero_settings(config, 2 if backend == "zero2" else 3, launched_world_size(), mine or launchers)


def build_engine(model: nn.Module, config: OptimConfig, runtime: Runtime, settings: Settings | None = None) -> Engine:
    """The engine for a loaded model; builds the optimizer, so the adapters must have their initial values."""
    if settings is not None:
        return ZeroEngine(model, config, settings, runtime)
    if isinstance(model, FSDPModule):
        return ShardedEngine(model, config, runtime)
    return ReplicatedEngine(model, config, runtime)
