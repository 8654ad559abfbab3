"""Tests that need a GPU: `python -m pytest tests/gpu`. Without one, each is skipped at once."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def device() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)
