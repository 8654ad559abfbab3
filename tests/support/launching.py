"""Launcher without import times: forked from a process that has imported all that ranks need."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

from torch.distributed import TCPStore

from tests.support.processes import be_rank, free_port


def start_launcher(function: Callable[[], None], log: Path, num_ranks: int = 2):
    """Start a process that runs `function` in `num_ranks` children; returns it and their ids.

    Like torchrun it holds the store at which they meet. It waits until it is killed.
    """
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_lead, args=(function, log, num_ranks, theirs))
    process.start()
    return process, ours.recv()


def _lead(function: Callable[[], None], log: Path, num_ranks: int, to_test) -> None:
    port = free_port()
    go, ready = os.pipe()
    pids = []
    for rank in range(num_ranks):  # before the store is made: a fork would lose its threads
        pid = os.fork()
        if pid == 0:
            os.close(ready)
            os.read(go, 1)  # returns when the store is there
            os.setsid()
            for descriptor in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
            be_rank(rank, num_ranks, port)
            os.environ.update(
                OMP_NUM_THREADS="1",
                TORCHELASTIC_RUN_ID="a run",
                TORCHELASTIC_USE_AGENT_STORE="True",
                TORCHELASTIC_RESTART_COUNT="0",
            )
            try:
                function()
            finally:
                os._exit(1)
        pids.append(pid)
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    os.close(go)
    os.close(ready)
    to_test.send(pids)
    while store is not None:
        signal.pause()
