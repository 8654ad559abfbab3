"""The processes of a run: which device this one has, who the others are, and what they agree on."""

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
from torch import distributed as dist

from qlora_dist.errors import PeerError, QloraDistError
from qlora_dist.runtime.compute_type import DType, ability, choose

Made = TypeVar("Made")


@dataclass(frozen=True)
class Runtime:
    """This process among `world_size`; one object, made once by :func:`start_runtime`."""

    accelerator: Accelerator
    device: torch.device
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    """Processes on this node."""
    compute_dtype: torch.dtype
    """Type of products, the same on all ranks."""
    compute_note: str = ""
    """Line of the log about it."""
    host_group: dist.ProcessGroup | None = None
    """All ranks, for what they agree on without their devices; None is the default group."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def dtype_name(self) -> DType:
        """`compute_dtype` as `model.dtype` spells it."""
        return cast(DType, str(self.compute_dtype).removeprefix("torch."))

    def main_first(self, make: Callable[[], Made]) -> Made:
        """Call `make` on each node's first process before the others, so that these find what it left on the disk.

        They wait as long as it takes, beyond the patience of other collectives; an error ends the wait, on all ranks.

        Raises:
            Echo: `make` failed in another process.
        """
        if self.world_size == 1:
            return make()
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        made, error = _tried(make) if self.local_rank == 0 else (None, None)
        errors: list[Exception | None] = [None] * self.world_size
        dist.all_gather_object(errors, error, group=patient)
        if error is not None:
            raise error
        for one in errors:
            if one is not None:
                raise PeerError(one)
        return make() if made is None else made

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place over all ranks and return the tensor; a collective."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_over_ranks(self, value: float) -> float:
        """Largest of a number over all ranks; a collective that waits for the device."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def max_on_host(self, number: int) -> int:
        """Largest of a number over all ranks; a collective that does not wait for the device."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(tensor)

    def from_main(self, value: Any) -> Any:
        """What rank 0 has, on every rank; small and picklable; a collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def from_all(self, value: Made) -> list[Made]:
        """Collect each rank's value, in their order, on every rank; small and picklable; a collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def max_of_each(self, tensor: torch.Tensor) -> torch.Tensor:
        """Largest of each element over all ranks, in a new tensor; a collective."""
        tensor = tensor.clone()
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def ensure_group(self) -> None:
        """Have a process group even when there is one process: sharding libraries need one, of itself."""
        if not dist.is_initialized():
            communicator = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(communicator, store=dist.HashStore(), rank=0, world_size=1)

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in the run's dtype: float32 master adapters are cast where they are used."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size == 1:
            return
        # Not Accelerate's: it waits on GPU number `local_rank`, which is not there where each
        # process sees only its own (`srun --gpus-per-task=1`).
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def close(self) -> None:
        """The last collective of a run: wait for all ranks.

        Process groups are left to the operating system: destroying one of gloo's, which a run on GPUs has as well,
        makes some processes abort on exit (1 run in 8 of three processes). So does exiting while another process still
        talks to this one, hence the wait.
        """
        self.barrier()
        if self.world_size == 1 and self.device.type == "cuda" and dist.is_initialized():
            dist.destroy_process_group()  # sharding's group of one, or NCCL warns of it


def _tried(make: Callable[[], Made]) -> tuple[Made | None, Exception | None]:
    try:
        return make(), None
    except QloraDistError as error:
        return None, error
    except Exception as error:  # noqa: BLE001 - told to the other ranks, of which not all could read it
        return None, RuntimeError(f"{type(error).__name__}: {error}").with_traceback(
            error.__traceback__
        )


def launched_world_size() -> int:
    """Number of processes that the launcher started, known before torch is imported."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is rank 0, known before the processes are."""
    return os.environ.get("RANK", "0") == "0"


def start_runtime(
    seed: int, dtype: str, collective_timeout_seconds: float = 1800, *, is_dtype_kept: bool = False
) -> Runtime:
    """Join the process group that the launcher set up (if any), pick the device, set seeds and thread counts.

    Args:
        dtype: `model.dtype`; rank 0's counts. With `auto` the devices decide.
        is_dtype_kept: see :func:`~qlora_dist.runtime.compute_type.choose`.
    """
    use_cpu = not torch.cuda.is_available()
    if use_cpu:
        _limit_threads()
    # The launcher's choice of engine has been read by now. Accelerate would act on it by itself: load the engine's
    # plugin, believe in one process on CPU, and have transformers build every model in its ZeRO-3 mode.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    _choose_kernels()
    _follow_nccl_interface()
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout_seconds))
    accelerator = Accelerator(cpu=use_cpu, mixed_precision="no", kwargs_handlers=[patience])
    has_gpu_group = accelerator.num_processes > 1 and accelerator.device.type != "cpu"
    runtime = Runtime(
        accelerator=accelerator,
        device=accelerator.device,
        rank=accelerator.process_index,
        local_rank=accelerator.local_process_index,
        world_size=accelerator.num_processes,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        compute_dtype=torch.float32,
        host_group=dist.new_group(backend="gloo", timeout=patience.timeout)
        if has_gpu_group
        else None,
    )
    set_seed(
        seed
    )  # what matters has generators of its own: data order, adapters, and dropout by micro-batch
    # Rank 0 alone may see the folder of a run that goes on.
    dtype, is_dtype_kept = runtime.from_main((dtype, is_dtype_kept))
    chosen = choose(dtype, runtime.from_all(ability(runtime.device, dtype)), is_dtype_kept)
    return replace(runtime, compute_dtype=chosen.dtype, compute_note=chosen.note)


def _choose_kernels() -> None:
    """Keep PyTorch from kernels on GPUs that go wrong, or are less exact."""
    # From torch 2.11 on, SDPA takes cuDNN first on H100 and B200. Its backward returns NaN where
    # there is a mask and the length is 64 above a multiple of 128 (pytorch#196678), on B200 its
    # forward goes wrong with fewer than 8 key-value heads (pytorch#193893), and every new shape
    # costs it about a second of planning.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Adapter gradients are sums over thousands of tokens: no partial sums in 16 bits.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _follow_nccl_interface() -> None:
    """Let gloo, which a run on GPUs uses as well, talk over the network that NCCL was told to take.

    By itself gloo takes the one that this host's name stands for, which may be 127.0.1.1: processes
    of other nodes then wait for ever. NCCL's variable may hold beginnings of names, gloo's not.
    """
    asked = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if not asked or asked.startswith("^") or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    names = asked.removeprefix("=").split(",")
    for _, interface in socket.if_nameindex():
        is_exact = asked.startswith("=")
        if interface in names or (not is_exact and interface.startswith(tuple(names))):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            return


def _limit_threads() -> None:
    """Share the cores among the processes of this node; oversubscription costs a factor of ten.

    Launchers set OMP_NUM_THREADS when they start several processes; a value that is there is kept.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_processes))
