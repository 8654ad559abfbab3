"""A log file gets a line whenever work takes long."""

import os
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

from tests.support.command import write_config
from tests.support.data_runs import when_called
from tests.support.interrupted import settings
from tests.support.processes import exit_code_of

INTERVAL = 0.4
"""Seconds of silence that are allowed here, instead of ten."""
LONG = 3.0
"""Seconds that each of the following takes."""
SLOW = {
    "sample_order": "qlora_dist.prepare",
    "load_data": "qlora_dist.data.dataset",
    "choose_checkpoint": "qlora_dist.prepare",
    "build_skeleton": "qlora_dist.weights.description",
    "load_base_weights": "qlora_dist.build",
    "verify_base": "qlora_dist.build",
    "loss_note": "qlora_dist.prepare",
    "target_loss_sum": "qlora_dist.evaluate",
    "micro_step": "qlora_dist.train",
    "_verify_tensors": "qlora_dist.run.checkpoint",
    "finish": "qlora_dist.train.Training",
}


def run_slowly(config: Path, out: Path) -> None:
    """Run `train` with slow parts and little patience for silence."""
    from qlora_dist.cli import main

    mock.patch("qlora_dist.metrics.console._SAY_EVERY_SECONDS", INTERVAL).start()
    for function, owner in SLOW.items():
        # The first checkpoint is written beside the second step, the last one after all steps.
        call = 2 if function == "_verify_tensors" else 1
        when_called(owner, function, partial(time.sleep, LONG), call)
    os.dup2(os.open(out, os.O_WRONLY), 1)
    os.write(1, b"began\n")
    main(["train", str(config)])


def test_the_longest_silence(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    """Before long work ends, a line says what is being done; there are not many such lines."""
    run = settings(tiny_llama, chat_file)
    run["optim"]["max_steps"] = 2
    run["logging"] = {"tensorboard": False, "every": 2}
    config = write_config(tmp_path / "c.yaml", **run, output_dir=str(tmp_path / "run"))
    os.mkfifo(tmp_path / "out")
    lines: list[tuple[float, str]] = []

    def read() -> None:
        with (tmp_path / "out").open() as out:
            lines.extend((time.monotonic(), line.strip()) for line in out)

    reader = threading.Thread(target=read)
    reader.start()
    assert exit_code_of(run_slowly, config, tmp_path / "out") == 0
    reader.join()
    silences = [(later - earlier, line) for (earlier, _), (later, line) in pairwise(lines)]
    assert max(silences)[0] < 0.8 * LONG, max(silences)
    text = "\n".join(line for _, line in lines)
    for words in (
        "reading the data, ",
        "still looking for a checkpoint, ",
        "still building the model, ",
        "loading layer 0/3, ",
        "still checking the weights, ",
        "still preparing the run, ",
        "evaluating batch 0/",
        "after step 0/2, for ",
        "still waiting for the checkpoint to be written, ",
        "still writing the adapter, ",
    ):
        assert words in text
    assert len(lines) < 20 + len(SLOW) * LONG / INTERVAL
