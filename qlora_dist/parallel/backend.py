"""Backend: division of a model among processes. One subclass per file, one line in `choice.py`."""

# Tested by tests/distributed/test_sharding.py and tests/distributed/test_equivalence.py.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from qlora_dist.config.schema import BackendName, TrainConfig
from qlora_dist.model.parts import ModelParts, lora_layers
from qlora_dist.parallel.engine import Engine
from qlora_dist.runtime.processes import Runtime


class Backend(ABC):
    """Division of the model and the work among the processes of a run.

    This base class holds the whole model on every rank; a backend that shards overrides the rest.

    Raises:
        ConfigError, LaunchError: the settings, the processes and the backend do not fit together.
    """

    needs: ClassVar[str | None] = None
    """Package that the backend requires; in lower case, the extra that installs it."""

    def __init__(self, name: BackendName, config: TrainConfig, runtime: Runtime) -> None:
        self.name = name
        self.config = config
        self.runtime = runtime

    @property
    def num_shards(self) -> int:
        """Number of parts that the frozen base is cut into."""
        return 1

    @property
    def home(self) -> torch.device:
        """Device that holds this rank's part of the parameters."""
        return torch.device("cpu") if self.config.parallel.cpu_offload else self.runtime.device

    @abstractmethod
    def cut(self, parts: ModelParts) -> None:
        """Cut a model that is on the meta device, so that each rank allocates only its part."""

    @abstractmethod
    def engine(self, parts: ModelParts) -> Engine:
        """Build engine and optimizer of a loaded model; its adapters must have their values."""

    def gathered(self, parts: ModelParts) -> Iterator[tuple[str, Tensor]]:
        """Yield each frozen parameter by name, whole, gathered as in forward; a collective."""
        for name, param in parts.model.named_parameters():
            if not param.requires_grad:
                yield name, param

    def whole_layers(self, parts: ModelParts) -> Iterator[LoraLayer]:
        """Yield each layer with adapters, its parameters whole until the next; a collective.

        At most one gathered unit is whole at a time.
        """
        yield from lora_layers(parts.model)
