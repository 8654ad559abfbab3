"""Processes of a run: kernels they avoid, waits for each other, and the network between them."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import distributed as dist

from qlora_dist.runtime import processes as runtime_module
from qlora_dist.runtime.processes import Runtime, start_runtime


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    """Runtime of this test's one process."""
    return replace(start_runtime(seed=0, dtype="float32"), device=torch.device("cpu"))


@pytest.fixture
def kernels_of_pytorch() -> Iterator[None]:
    """PyTorch's own choice of kernels, before a run begins."""
    matmul = torch.backends.cuda.matmul
    torch.backends.cuda.enable_cudnn_sdp(True)
    matmul.allow_bf16_reduced_precision_reduction = True
    matmul.allow_fp16_reduced_precision_reduction = True
    yield
    start_runtime(seed=0, dtype="float32")


@pytest.mark.usefixtures("kernels_of_pytorch")
def test_kernels_that_go_wrong_are_off() -> None:
    """A run uses no cuDNN attention, whose gradients may be NaN, and no partial sums in 16 bits."""
    assert torch.backends.cuda.cudnn_sdp_enabled()
    start_runtime(seed=0, dtype="float32")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


@pytest.mark.parametrize(("device", "expected"), [("cpu", None), ("cuda:0", [0])])
def test_ranks_wait_on_the_device_that_they_have(
    device: str, expected: list[int] | None, runtime: Runtime
) -> None:
    """The fourth process of a node, if it sees only one GPU, waits on GPU 0, not on GPU 3."""
    fourth = replace(runtime, device=torch.device(device), rank=3, local_rank=3, world_size=4)
    with mock.patch.object(dist, "barrier") as barrier:
        fourth.barrier()
        fourth.close()
    assert barrier.call_args_list == [mock.call(device_ids=expected)] * 2


def test_one_process_waits_for_nobody(runtime: Runtime) -> None:
    """A single process, which may have no process group, waits for nothing."""
    with mock.patch.object(dist, "barrier") as barrier:
        runtime.barrier()
        runtime.close()
    assert not barrier.called


@pytest.mark.parametrize(
    ("device", "world_size", "is_left"), [("cuda", 1, False), ("cuda", 2, True), ("cpu", 1, True)]
)
def test_only_the_group_of_a_single_gpu_is_destroyed(
    device: str, world_size: int, is_left: bool, runtime: Runtime
) -> None:
    """NCCL warns of a group that is left; destroying one of gloo's, or of several processes, makes
    processes abort."""
    alone = replace(runtime, device=torch.device(device, 0), world_size=world_size)
    for _ in range(2):  # a second run in the same process can make its own
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            with mock.patch.object(dist, "barrier"):
                alone.close()
            assert dist.is_initialized() == is_left
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@pytest.mark.parametrize(
    ("nccl", "gloo", "expected"),
    [
        ("ib0", None, "ib0"),
        ("ib", None, "ib0"),
        ("=eth1,ib1", None, "eth1"),
        ("=ib", None, None),
        ("^docker", None, None),
        ("wlan0", None, None),
        ("", None, None),
        (None, None, None),
        ("ib0", "eth1", "eth1"),
    ],
)
def test_gloo_talks_over_the_network_of_nccl(
    nccl: str | None, gloo: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo takes the first interface that NCCL may take: by the beginning of its name or, after
    `=`, by its whole name. A list of excluded interfaces changes nothing; gloo's setting stays."""
    for name, value in (("NCCL_SOCKET_IFNAME", nccl), ("GLOO_SOCKET_IFNAME", gloo)):
        monkeypatch.setenv(name, value or "")  # also records the old value, to put it back
        if value is None:
            monkeypatch.delenv(name)
    there = [(1, "lo"), (2, "docker0"), (3, "eth1"), (4, "ib0"), (5, "ib1")]
    monkeypatch.setattr(socket, "if_nameindex", lambda: there)
    runtime_module._follow_nccl_interface()
    assert runtime_module.os.environ.get("GLOO_SOCKET_IFNAME") == expected
