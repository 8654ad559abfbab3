"""Bytes that FSDP2 gathers on the GPU are the bytes that were sharded."""

from torch import multiprocessing

from benchmarks.gpu_parts.gather import foreach_copies, pretended

SHAPE = {"hidden": 128, "intermediate": 352, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 500}


def check_rank_of_eight() -> None:
    row = pretended(SHAPE, 64, rank=8, ranks=8)
    assert row["gathered_parameters"] > 50, row
    assert row["that_differ"] == row["bytes_that_differ"] == 0, row
    assert row["last_loss"] < row["first_loss"], row


def in_new_process(function) -> None:
    """A process group can be made once in a process."""
    process = multiprocessing.get_context("spawn").Process(target=function)
    process.start()
    process.join(300)
    assert process.exitcode == 0


def test_every_pattern_of_bits_survives_in_integer_storage() -> None:
    """All 65,536 patterns of two bytes come out of a foreach copy, FSDP2's way into its buffers, as they went in."""
    assert foreach_copies()["uint8"] == 0


def test_gathered_weights_are_the_shards_behind_each_other() -> None:
    """Weights and constants as layers see them on rank 0 of eight, where the others have the same shards."""
    in_new_process(check_rank_of_eight)
