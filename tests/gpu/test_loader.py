"""Micro-batches reach the GPU unchanged, from page-locked memory."""

import torch

from qlora_dist.data.loader import StepLoader, step_batches
from qlora_dist.data.order import BatchPlan, SampleOrder
from qlora_dist.data.samples import Sample

SAMPLES = [Sample([i + 1] * (i + 1), [i + 1] * (i + 1)) for i in range(12)]


def test_batches_are_pinned_and_arrive_unchanged(device: torch.device) -> None:
    """Over two epochs every tensor is page-locked and equals the CPU loader's tensor on the GPU."""
    plan = BatchPlan(SampleOrder((len(SAMPLES),), 0), 2, 2, 1, None)
    with StepLoader(plan, SAMPLES, 0, 0, pin_memory=True) as loader:
        for position in range(0, 24, 4):
            expected = step_batches(plan, position, SAMPLES, 0, 0)
            for batch, other in zip(loader.take(position), expected, strict=True):
                there = batch.to(device)
                for name in ("input_ids", "attention_mask", "labels"):
                    assert getattr(batch, name).is_pinned()
                    assert getattr(there, name).device.type == device.type
                    assert torch.equal(getattr(there, name).cpu(), getattr(other, name))
                assert (batch.num_tokens, batch.num_targets, batch.seed) == (
                    other.num_tokens,
                    other.num_targets,
                    other.seed,
                )
