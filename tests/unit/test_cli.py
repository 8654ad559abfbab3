"""Environment that the command line sets before a command imports anything heavy."""

import os
import subprocess
import sys

import pytest

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SHOW = """
import os, sys
from qlora_dist.cli import main
main(["--version"])
assert "torch" not in sys.modules
print([os.environ.get(name) for name in sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["expandable_segments:True", None]),
        ({NAMES[0]: "max_split_size_mb:64"}, ["max_split_size_mb:64", None]),
        ({NAMES[1]: "max_split_size_mb:64"}, [None, "max_split_size_mb:64"]),
    ],
    ids=["unset", "set", "set by its older name"],
)
def test_blocks_of_gpu_memory_can_grow(given: dict[str, str], expected: list[str | None]) -> None:
    """The allocator is configured before torch is imported, unless it has been already."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    shown = subprocess.run(
        [sys.executable, "-c", SHOW, *NAMES],
        env=environment | given,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines()[-1] == repr(expected)
