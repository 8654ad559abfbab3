"""Compiled layers that are ready in seconds, and gradients to compare."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from unittest import mock

import torch
from peft import PeftModel

from qlora_dist.data.batch import collate
from qlora_dist.data.tokenization import Sample
from qlora_dist.model import compile as compile_module
from qlora_dist.model.adapters import adapter_parameters
from qlora_dist.runtime.processes import Runtime
from qlora_dist.train import micro_step

LENGTHS = ((12, 20), (20, 17))


def without_kernels() -> AbstractContextManager:
    """Trace and differentiate layers as the real compiler does, but run single operations.

    Takes seconds instead of minutes.
    """
    return mock.patch.dict(compile_module._COMPILER, {"backend": "aot_eager", "options": None})


def gradient(
    model: PeftModel, runtime: Runtime, batches: Sequence[Sequence[int]] = LENGTHS
) -> tuple[float, torch.Tensor]:
    """Loss, and gradient of all adapters in one vector, of accumulated micro-batches.

    Args:
        batches: the lengths of each micro-batch's rows.
    """
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    loss, num_targets = 0.0, torch.tensor(float(sum(map(sum, batches))))
    for lengths in batches:
        rows = [
            torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths
        ]
        micro_loss = micro_step(
            model, collate([Sample(ids, ids) for ids in rows], pad_token_id=0), num_targets, runtime
        )
        micro_loss.backward()
        loss += micro_loss.item()
    return loss, torch.cat([param.grad.flatten() for param in adapter_parameters(model).values()])
