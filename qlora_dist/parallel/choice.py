"""Choice of the backend by its name: from the configuration and the launcher's options."""

# Tested by tests/unit/parallel/test_deepspeed_config.py and tests/e2e/test_bad_input.py.

from __future__ import annotations

import os
from importlib.util import find_spec

from qlora_dist.config.rules import check_backend_reads
from qlora_dist.config.schema import BackendName, TrainConfig
from qlora_dist.errors import LaunchError
from qlora_dist.parallel.backend import Backend
from qlora_dist.parallel.deepspeed_config import launcher_stage
from qlora_dist.parallel.fsdp import Fsdp
from qlora_dist.parallel.replicated import Replicated
from qlora_dist.parallel.zero import Zero
from qlora_dist.runtime.processes import Runtime, launched_world_size

BACKENDS: dict[BackendName, type[Backend]] = {
    "single": Replicated,
    "ddp": Replicated,
    "fsdp": Fsdp,
    "zero2": Zero,
    "zero3": Zero,
}


def make_backend(name: BackendName, config: TrainConfig, runtime: Runtime) -> Backend:
    """Build the backend of this run, once its processes are known.

    Raises:
        ConfigError, LaunchError: the settings, the processes and the backend do not fit together.
    """
    return BACKENDS[name](name, config, runtime)


def choose_backend(config: TrainConfig) -> BackendName:
    """Choose the backend from the config and the launcher's environment; needs no process group.

    Raises:
        LaunchError: the launcher and `parallel.backend` contradict each other, or the backend is
            not installed.
        ConfigError: the launcher's DeepSpeed file cannot be read, or the backend does not read one
            of the settings.
    """
    backend = _asked_backend(config)
    package = BACKENDS[backend].needs
    if package is not None and find_spec(package.lower()) is None:
        raise LaunchError(
            f"the backend is {backend}, which needs {package}, and that is not installed. "
            f"Run: pip install 'qlora-dist[{package.lower()}]', or set parallel.backend: fsdp."
        )
    file = config.parallel.deepspeed_config
    if file is not None and BACKENDS[backend] is not Zero:
        raise LaunchError(
            f"parallel.deepspeed_config is {file}, but the backend is {backend}, which does not "
            "read it. Remove it, or set parallel.backend: zero2 or zero3."
        )
    check_backend_reads(config, backend)
    return backend


def _asked_backend(config: TrainConfig) -> BackendName:
    asked, world_size = config.parallel.backend, launched_world_size()
    launcher = _launcher_backend()
    if launcher is not None and asked not in ("auto", launcher):
        name, option = f"DeepSpeed with ZeRO stage {launcher[-1]}", "--use_deepspeed"
        if launcher == "fsdp":
            name, option = "FSDP", "--use_fsdp"
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


def _launcher_backend() -> BackendName | None:
    """Return the backend that the launcher was told to use, if any."""
    # Accelerate hands its options over in the environment.
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = launcher_stage()
        if stage not in ("2", "3"):
            raise LaunchError(
                f"the launcher was told to use DeepSpeed with ZeRO stage {stage}. Stages 2 and 3 "
                "are supported: give the launcher --zero_stage 2 or 3, or remove --use_deepspeed "
                "and set parallel.backend: ddp."
            )
        return "zero2" if stage == "2" else "zero3"
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else None
