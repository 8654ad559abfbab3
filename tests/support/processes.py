"""Functions run in new processes: several that talk over gloo, or one that may die."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import start_processes

# Processes are forked from one that has only imported what all of them need: imports would take
# most of the tests' time.
multiprocessing.set_forkserver_preload(["tests.support.preloaded"])


def run_on_processes(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call `function(*arguments)` on each of `world_size` new processes, set up as by a launcher.

    An assertion that fails on any of them fails the test, with that process's traceback.
    """
    start_processes(
        _enter,
        (world_size, free_port(), function, arguments),
        nprocs=world_size,
        start_method="forkserver",
    )


def exit_code_of(function: Callable[..., None], *arguments: Any, timeout: float = 120) -> int:
    """Call `function(*arguments)` in a new process; return 0, or minus the fatal signal."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_enter_alone, args=(function, arguments)
    )
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{function.__name__} did not end within {timeout:g} seconds")
    assert process.exitcode is not None
    return process.exitcode


def free_port() -> int:
    """Port of this machine where several processes can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def be_rank(rank: int, world_size: int, port: int) -> None:
    """Set this process up as one of several ranks, as a launcher does."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _enter(
    rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    be_rank(rank, world_size, port)
    _enter_alone(function, arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        os._exit(0)  # gloo aborts now and then on the ordinary way out; see cli._leave


def _enter_alone(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    from qlora_dist.commands.startup import quiet_third_parties

    quiet_third_parties()
    function(*arguments)


def obey_permissions() -> None:
    """Make this process obey files' permissions from here on, even if it is root's."""
    import ctypes

    if os.geteuid() != 0:
        return
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; effective only
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "capset")
