"""Bytes that FSDP2 gathers on the GPU are the bytes that were sharded."""

from torch import multiprocessing

from benchmarks.gpu_parts.gather import storages, whole_model

SHAPE = {"hidden": 128, "intermediate": 352, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 500}


def check_integers() -> None:
    row = storages()
    assert row["uint8"] == {"foreach_copy": 0, "all_gather": 0, "fully_shard": 0}, row


def check_model() -> None:
    row = whole_model(SHAPE, 64)
    assert row["same_bytes"]
    first, others = row["losses"]["single"], row["losses"]["fsdp"]
    assert all(abs(one / other - 1) <= 1e-3 for one, other in zip(first, others, strict=True)), row
    assert first[2] < first[0]


def in_new_process(function) -> None:
    """A process group can be made once in a process."""
    process = multiprocessing.get_context("spawn").Process(target=function)
    process.start()
    process.join(300)
    assert process.exitcode == 0


def test_every_pattern_of_bits_survives_in_integer_storage() -> None:
    """All 65,536 patterns of two bytes come out of a copy, a gather and `fully_shard` as they went in."""
    in_new_process(check_integers)


def test_a_sharded_model_has_the_bytes_of_the_whole_one() -> None:
    """Weights and constants as layers see them, and the losses of three steps, in a group of one over NCCL."""
    in_new_process(check_model)
