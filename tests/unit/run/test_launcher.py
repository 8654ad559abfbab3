"""Processes that watch the process which started them."""

import os
import subprocess
import sys

import pytest

from tests.support.command import ROOT

LOOK = "from qlora_dist.run.launcher import watch_launcher; print(watch_launcher() is not None)"
BY_HAND = {
    key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "LOCAL_RANK")
}


@pytest.mark.parametrize(
    ("marks", "under_shell", "watches"),
    [
        ({}, False, False),
        ({"WORLD_SIZE": "1"}, False, False),
        ({"WORLD_SIZE": "2"}, False, True),
        ({"LOCAL_RANK": "0"}, False, True),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False, True),
        ({"TORCHELASTIC_RUN_ID": "x"}, False, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True, False),
        ({"TORCHELASTIC_RUN_ID": "x"}, True, True),
    ],
)
def test_who_watches(marks: dict[str, str], under_shell: bool, watches: bool) -> None:
    """Ranks of a launcher watch it; a process started by hand from a shell watches nothing."""
    command = [sys.executable, "-c", LOOK]
    if under_shell:
        command = ["bash", "-c", f"'{sys.executable}' -c '{LOOK}'; exit $?"]
    done = subprocess.run(
        command, env={**BY_HAND, **marks}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(watches)
