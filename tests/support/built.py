"""Models built and cut as in a run, for tests that need its parts without the run."""

from pathlib import Path

from torch import nn

from qlora_dist.build import build_model
from qlora_dist.config.schema import BackendName, TrainConfig
from qlora_dist.metrics.console import Reporter
from qlora_dist.model.parts import ModelParts
from qlora_dist.parallel.backend import Backend
from qlora_dist.parallel.choice import make_backend
from qlora_dist.runtime.processes import Runtime


def build(
    config: TrainConfig, folder: Path, name: BackendName, runtime: Runtime
) -> tuple[ModelParts, Backend]:
    """Build the adapted, cut and filled model of `folder`; returns its parts and the backend."""
    backend = make_backend(name, config, runtime)
    return build_model(config, folder, backend, Reporter(is_main=False)), backend


def cut(model: nn.Module, name: BackendName, runtime: Runtime) -> None:
    """Cut a model that is described on meta."""
    make_backend(name, TrainConfig(), runtime).cut(ModelParts(model))
