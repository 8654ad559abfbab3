"""Runs a function on several gloo processes of this machine."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing


def run_on_processes(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call `function(*arguments)` on each of `world_size` new processes, as a launcher would have started them.

    An assertion that fails on any of them fails the test, with that process's traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_enter, (world_size, port, function, arguments), nprocs=world_size, join=True)


def _enter(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    torch.set_num_threads(1)
    from qlora_dist.noise import quiet_third_parties

    quiet_third_parties()
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        os._exit(0)  # gloo aborts now and then on the ordinary way out; see cli._leave
