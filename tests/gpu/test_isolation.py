"""Samples in one row do not see each other on the GPU, with any attention."""

from pathlib import Path

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from qlora_dist.data.batch import MicroBatch, collate
from qlora_dist.data.samples import Sample, join
from qlora_dist.model.adapters import adapter_parameters
from qlora_dist.model.loss import target_loss_sum
from qlora_dist.model.packing_check import check_packing
from qlora_dist.runtime.processes import start_runtime
from tests.support.adapted import build_adapted

LENGTHS = (5, 130, 3, 61)


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        ("sdpa", "float32"),
        ("sdpa", "bfloat16"),
        ("eager", "float32"),
        ("flash_attention_2", "bfloat16"),
    ],
)
def test_a_packed_sample_is_computed_as_if_alone(
    attention: str, dtype: str, device: torch.device, tiny_llama: Path
) -> None:
    """Loss and gradients of four samples in two packed rows are the sums over the samples alone."""
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("the package flash-attn is not installed")
    runtime = start_runtime(seed=0, dtype=dtype)
    model = build_adapted(tiny_llama, runtime, attention=attention)
    check_packing(model, device, 64)
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(ids, ids)
        for ids in (torch.randint(3, 300, (n,), generator=generator).tolist() for n in LENGTHS)
    ]

    def results(batches: list[MicroBatch]) -> torch.Tensor:
        """Summed loss and gradient, in one vector."""
        with runtime.autocast():
            loss = sum(
                target_loss_sum(
                    model, batch.input_ids, batch.attention_mask, batch.labels, batch.position_ids
                )
                for batch in (batch.to(device) for batch in batches)
            )
        gradients = torch.autograd.grad(loss, list(adapter_parameters(model).values()))
        return torch.cat(
            [loss.detach().reshape(1), *(gradient.flatten() for gradient in gradients)]
        )

    alone = results([collate([sample], 0) for sample in samples])
    packed = results([collate([join(samples[:3]), join(samples[3:])], 0)])
    together = [token for sample in samples for token in sample.input_ids]
    seen = results([collate([Sample(together, together)], 0)])
    tolerance = 1e-4 if dtype == "float32" else 0.05
    assert (packed - alone)[1:].norm() <= tolerance * alone[1:].norm()
    assert (packed - alone)[0].abs() <= tolerance / 10 * alone[0]
    # leaking between samples must be visible above the tolerance
    assert (seen - alone)[1:].norm() > 0.1 * alone[1:].norm()
