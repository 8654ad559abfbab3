"""The processes of a run: the device of this one, the ranks of all, and values they agree on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import Tensor
from torch import distributed as dist

from qlora_dist.errors import PeerError, QloraDistError
from qlora_dist.runtime.compute_type import DType, ability, choose

Made = TypeVar("Made")


@dataclass(frozen=True)
class Runtime:
    """This process as one of `world_size`; made once by :func:`start_runtime`."""

    accelerator: Accelerator
    device: torch.device
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    """Processes on this node."""
    compute_dtype: torch.dtype
    """Type of matrix products, alike on all ranks."""
    compute_note: str = ""
    """Line of the log about the compute type."""
    host_group: dist.ProcessGroup | None = None
    """All ranks, for collectives that do not wait for their devices; None is the default group."""

    @property
    def is_main(self) -> bool:
        """True in the process that writes files and prints to the user."""
        return self.rank == 0

    @property
    def dtype_name(self) -> DType:
        """`compute_dtype` as `model.dtype` spells it."""
        return cast(DType, str(self.compute_dtype).removeprefix("torch."))

    def main_first(self, make: Callable[[], Made]) -> Made:
        """Call `make` in each node's first process, then in all others; return its result.

        The others find on the disk what the first process wrote there. An error ends the wait on
        all ranks.

        Raises:
            PeerError: `make` failed in another process.
        """
        if self.world_size == 1:
            return make()
        # Fetching or tokenizing may take hours, longer than the timeout of other collectives.
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        made, error = _tried(make) if self.local_rank == 0 else (None, None)
        errors: list[Exception | None] = [None] * self.world_size
        dist.all_gather_object(errors, error, group=patient)
        if error is not None:
            raise error
        if failed := next(filter(None, errors), None):
            raise PeerError(failed)
        return make() if made is None else made

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum a tensor in place over all ranks and return it; a collective."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_over_ranks(self, value: float) -> float:
        """Return the largest value on any rank; a collective that waits for the device."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def max_on_host(self, number: int) -> int:
        """Return the largest number on any rank; a collective that does not wait for the device."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(tensor)

    def from_main(self, value: Any) -> Any:
        """Return rank 0's small, picklable value on every rank; a collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def from_all(self, value: Made) -> list[Made]:
        """Return all ranks' small, picklable values, by rank, on every rank; a collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def max_of_each(self, tensor: Tensor) -> Tensor:
        """Return a new tensor with the largest value of each element on any rank; a collective."""
        tensor = tensor.clone()
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def ensure_group(self) -> None:
        """Make a process group of one if there is none: sharding libraries need a group."""
        if not dist.is_initialized():
            communicator = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(communicator, store=dist.HashStore(), rank=0, world_size=1)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context that computes in the run's type."""
        # The adapters' float32 master weights are cast where they are used.
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size == 1:
            return
        # Not Accelerate's barrier: it waits on GPU number `local_rank`, which does not exist where
        # each process sees only its own GPU (`srun --gpus-per-task=1`).
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def close(self) -> None:
        """Wait for all ranks; the last collective of a run."""
        # Process groups are left to the operating system: destroying a gloo group, which a run on
        # GPUs has as well, makes some processes abort on exit (1 run in 8 of three processes).
        # So does exiting while another process still talks to this one, hence the wait.
        self.barrier()
        if self.world_size == 1 and self.device.type == "cuda" and dist.is_initialized():
            dist.destroy_process_group()  # NCCL warns if the group of one is left


def _tried(make: Callable[[], Made]) -> tuple[Made | None, Exception | None]:
    """Call `make`; return its result, or its error in a form that all ranks can unpickle."""
    try:
        return make(), None
    except QloraDistError as error:
        return None, error
    except Exception as error:  # noqa: BLE001 - raised again on all ranks
        readable = RuntimeError(f"{type(error).__name__}: {error}")
        return None, readable.with_traceback(error.__traceback__)


def launched_world_size() -> int:
    """Return the number of processes that the launcher started, from its variables."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """True in rank 0, from the launcher's variables: before there is a :class:`Runtime`."""
    return os.environ.get("RANK", "0") == "0"


def start_runtime(
    seed: int, dtype: str, collective_timeout_seconds: float = 1800, *, is_dtype_kept: bool = False
) -> Runtime:
    """Join the launcher's process group (if any), pick the device, set seeds and thread counts.

    Args:
        dtype: `model.dtype`; rank 0's counts. With `auto` the devices decide.
        is_dtype_kept: see `is_kept` of :func:`~qlora_dist.runtime.compute_type.choose`.
    """
    use_cpu = not torch.cuda.is_available()
    if use_cpu:
        _limit_threads()
    # The launcher's choice of engine has been read by now. Accelerate would act on it by itself:
    # load the engine's plugin, assume one process on CPU, and make transformers build every model
    # in its ZeRO-3 mode.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    _choose_kernels()
    _follow_nccl_interface()
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout_seconds))
    accelerator = Accelerator(cpu=use_cpu, mixed_precision="no", kwargs_handlers=[patience])
    runtime = Runtime(
        accelerator=accelerator,
        device=accelerator.device,
        rank=accelerator.process_index,
        local_rank=accelerator.local_process_index,
        world_size=accelerator.num_processes,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        compute_dtype=torch.float32,  # replaced below
    )
    if accelerator.num_processes > 1 and accelerator.device.type != "cpu":
        host_group = dist.new_group(backend="gloo", timeout=patience.timeout)
        runtime = replace(runtime, host_group=host_group)
    # Data order, adapters and dropout have seeded generators of their own; this is for the rest.
    set_seed(seed)
    # Rank 0 alone may see the folder of a run that goes on.
    dtype, is_dtype_kept = runtime.from_main((dtype, is_dtype_kept))
    chosen = choose(dtype, runtime.from_all(ability(runtime.device, dtype)), is_dtype_kept)
    return replace(runtime, compute_dtype=chosen.dtype, compute_note=chosen.note)


def _choose_kernels() -> None:
    """Keep PyTorch from GPU kernels that go wrong, or are less exact."""
    # From torch 2.11 on, SDPA prefers cuDNN on H100 and B200. Its backward returns NaN with a mask
    # and a length of 64 above a multiple of 128 (pytorch#196678), on B200 its forward goes wrong
    # with fewer than 8 key-value heads (pytorch#193893), and planning takes about a second for
    # every new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Adapter gradients are sums over thousands of tokens: no partial sums in 16 bits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _follow_nccl_interface() -> None:
    """Let gloo, which a run on GPUs uses as well, talk over the network that NCCL was told to take.

    By itself gloo takes the network of this host's name, which may be 127.0.1.1: processes of other
    nodes then wait for ever. NCCL's variable may hold beginnings of names, gloo's variable may not.
    """
    asked = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if not asked or asked.startswith("^") or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    names = tuple(asked.removeprefix("=").split(","))
    for _, interface in socket.if_nameindex():
        # "=eth1" means this name, "eth" every name that begins so.
        if interface in names or (not asked.startswith("=") and interface.startswith(names)):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            return


def _limit_threads() -> None:
    """Share the cores among the processes of this node; oversubscription costs a factor of ten."""
    # Launchers set OMP_NUM_THREADS when they start several processes: that value stays.
    if "OMP_NUM_THREADS" not in os.environ:
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))
