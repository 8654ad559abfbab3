"""Training in this process, as often as wanted, stopped where a test wants it."""

import os
import signal
from pathlib import Path
from unittest import mock

import yaml

from qlora_dist import train as train_module
from qlora_dist.config.load import load_config
from qlora_dist.errors import Stopped
from tests.support.command import run_rows


def train_here(
    folder: Path, settings: dict, stop_after: int | None = None, stop_on_rank: int = 0
) -> bool:
    """Train in `folder` with `settings`; returns True if the run came to its end.

    Args:
        stop_after: number of the micro-batch of this process at which SIGUSR1 arrives.
        stop_on_rank: the process that receives the signal.
    """
    file = folder.with_name(f"{folder.name}-{os.environ.get('RANK', '0')}.yaml")
    file.write_text(yaml.safe_dump({**settings, "output_dir": str(folder)}))
    num_done = 0
    micro_step = train_module.micro_step

    def counted(*arguments):
        nonlocal num_done
        num_done += 1
        if num_done == stop_after and int(os.environ.get("RANK", "0")) == stop_on_rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        return micro_step(*arguments)

    with mock.patch.object(train_module, "micro_step", counted):
        try:
            train_module.train(load_config(file))
        except Stopped:
            return False
    return True


def lasting_rows(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without the values that vary with the machine's load."""
    unstable = (
        "tokens_per_second",
        "target_tokens_per_second",
        "step_seconds",
        "peak_memory_gib",
        "seconds",
        "mfu",
        "data_wait_seconds",
    )
    return [
        {key: value for key, value in row.items() if key not in unstable}
        for row in run_rows(folder)
    ]


def adapter_bytes(folder: Path) -> bytes:
    """Bytes of the final adapter's weights on disk."""
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()
