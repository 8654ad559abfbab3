"""The norm of a gradient: of all its elements, with equal bits for every cut."""

import math

import pytest
import torch

from qlora_dist.parallel import engine as parallel


@pytest.fixture(scope="module")
def gradient() -> torch.Tensor:
    """A gradient of more than two pieces of a CPU, with sizes from 1e-7 to 1e3."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2 * parallel._CPU_PIECE + 1001, generator=generator)
    return values * 10.0 ** torch.randint(-7, 4, values.shape, generator=generator)


def test_it_is_the_norm_of_all_elements(gradient: torch.Tensor) -> None:
    exact = math.fsum(value * value for value in gradient.double().tolist())
    assert float(parallel.squared_norm([gradient])) == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("num_parts", [2, 3, 7])
def test_it_has_the_same_bits_however_the_gradient_is_cut(
    gradient: torch.Tensor, num_parts: int
) -> None:
    """The float32 norm has equal bits for parts of one dimension or two, and for empty parts, as
    shards have them."""
    whole = parallel.squared_norm([gradient]).sqrt().float()
    parts = [
        part.unsqueeze(0) if i % 2 else part for i, part in enumerate(gradient.chunk(num_parts))
    ]
    assert torch.equal(parallel.squared_norm([*parts, gradient[:0]]).sqrt().float(), whole)
