"""Every fast path on the GPU agrees with the plain one.

The plain path has peft's layers, all logits and no recomputation.
"""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from benchmarks.gpu_parts.exactness import WAYS, of_layer, of_models
from qlora_dist.errors import ConfigError

SHAPE = {"hidden": 256, "intermediate": 704, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 1000}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_as_exact_as_the_plain_one(way: str, device: torch.device) -> None:
    """Loss and gradients of packed rows stay close to the float32 reference.

    In float32 they are within 1e-5 of it, in bfloat16 no further off than the plain path allows.
    """
    if "flash" in way and not is_flash_attn_2_available():
        pytest.skip("the package flash-attn is not installed")
    try:
        row = of_models(SHAPE, 256, way)
    except ConfigError as error:
        pytest.skip(f"this version cannot: {error}")
    assert row
    for dtype, found in row.items():
        assert found["is_as_exact"], (dtype, found)


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_a_fused_layer_is_as_exact_as_pefts(rank: int, tokens: int, device: torch.device) -> None:
    """Output and gradients agree with float64, also for token counts with special kernels."""
    for dtype, found in of_layer(512, 384, tokens, rank).items():
        assert found["is_as_exact"], (dtype, found)
