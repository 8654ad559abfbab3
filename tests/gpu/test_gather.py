"""FSDP2 on the GPU gathers the bytes that were sharded."""

from torch import multiprocessing

from benchmarks.gpu_parts.gather import foreach_copies, pretended

SHAPE = {"hidden": 128, "intermediate": 352, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 500}


def check_rank_of_eight() -> None:
    row = pretended(SHAPE, 64, rank=8, ranks=8)
    assert row["gathered_parameters"] > 50, row
    assert row["that_differ"] == row["bytes_that_differ"] == 0, row
    assert row["last_loss"] < row["first_loss"], row


def in_new_process(function) -> None:
    """Run a function in a new process, because a process can make a process group only once."""
    process = multiprocessing.get_context("spawn").Process(target=function)
    process.start()
    process.join(300)
    assert process.exitcode == 0


def test_every_pattern_of_bits_survives_in_integer_storage() -> None:
    """FSDP2's foreach copy into its buffers preserves all 65,536 patterns of two bytes."""
    assert foreach_copies()["uint8"] == 0


def test_gathered_weights_are_the_shards_behind_each_other() -> None:
    """Layers on rank 0 of eight see the concatenated shards, which are equal on all ranks here."""
    in_new_process(check_rank_of_eight)
