"""Backend: how the processes of a run share the model. One subclass a file, one line in `choice.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from peft.tuners.lora import LoraLayer

from qlora_dist.config.schema import BackendName, TrainConfig
from qlora_dist.model.parts import ModelParts, lora_layers
from qlora_dist.parallel.engine import Engine
from qlora_dist.runtime.processes import Runtime


class Backend(ABC):
    """How the processes of a run share the model and the work.

    This base holds the whole model on every rank; a backend that shards overrides what differs.

    Raises:
        ConfigError, LaunchError: the settings, the processes and the backend do not fit together.
    """

    needs: ClassVar[str | None] = None
    """Package without which it cannot run; in lower case also the name of the extra that installs it."""

    def __init__(self, name: BackendName, config: TrainConfig, runtime: Runtime) -> None:
        self.name = name
        self.config = config
        self.runtime = runtime

    @property
    def num_shards(self) -> int:
        """Parts that the frozen base is cut into."""
        return 1

    @property
    def home(self) -> torch.device:
        """Device on which this rank's part of the parameters lives."""
        return torch.device("cpu") if self.config.parallel.cpu_offload else self.runtime.device

    @abstractmethod
    def cut(self, parts: ModelParts) -> None:
        """Prepare a meta-device model for its parameters: afterwards each rank has only its part of them."""

    @abstractmethod
    def engine(self, parts: ModelParts) -> Engine:
        """Build the engine of a loaded model, and its optimizer: adapters must have their initial values."""

    def gathered(self, parts: ModelParts) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each frozen parameter by name, whole, gathered as forward does it; a collective."""
        for name, param in parts.model.named_parameters():
            if not param.requires_grad:
                yield name, param

    def whole_layers(self, parts: ModelParts) -> Iterator[LoraLayer]:
        """Yield the layers with adapters, each with its parameters whole while it is the current one; a collective.

        No more than one gathered unit is whole at a time.
        """
        yield from lora_layers(parts.model)
