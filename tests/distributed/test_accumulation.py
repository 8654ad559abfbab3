"""Gradient accumulation runs one collective per optimizer step for any number of micro-batches."""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_dist import train as train_module
from tests.support.processes import run_on_processes
from tests.support.training import train_here

train_step = train_module.train_step


class ReductionCounter(TorchDispatchMode):
    """Counts elements that are reduced over ranks while the context is open, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "reduce" in str(func):
            sizes = [
                leaf.numel()
                for leaf in tree_leaves((args, kwargs))
                if isinstance(leaf, torch.Tensor)
            ]
            if max(sizes) > 8:  # counts, norms and flags are smaller
                self.counts[str(func)] += max(sizes)
        return func(*args, **(kwargs or {}))


def reductions_of_a_step(folder: Path, settings: dict) -> Counter[str]:
    """Elements that the second optimizer step of a run reduces over ranks, by operation."""
    counter = ReductionCounter()
    num_steps = 0

    def step(*arguments):
        nonlocal num_steps
        num_steps += 1
        if num_steps != 2:  # the first one sets things up
            return train_step(*arguments)
        with counter:
            return train_step(*arguments)

    with mock.patch.object(train_module, "train_step", step):
        assert train_here(folder, settings)
    return counter.counts


def compare_accumulations(root: Path, model: Path, data: Path, backend: str) -> None:
    found = {}
    for accum in (1, 4):
        settings = {
            "model": {"path": str(model), "dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": str(data), "max_seq_len": 96, "packing": False},
            "optim": {"max_steps": 2, "grad_accum_steps": accum},
            "parallel": {"backend": backend},
            "logging": {"tensorboard": False},
        }
        found[accum] = reductions_of_a_step(root / f"run-{accum}", settings)
    assert sum(found[1].values()) > 0
    assert found[4] == found[1]


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2", "zero3"])
def test_gradients_are_reduced_once_per_step(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, backend: str
) -> None:
    """A step of four micro-batches reduces as many elements over two ranks as a step of one."""
    if backend.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is an optional dependency")
    run_on_processes(compare_accumulations, 2, tmp_path, tiny_llama, chat_file, backend)
