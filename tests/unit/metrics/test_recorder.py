"""Recording: the rows of metrics.jsonl and their mirror in TensorBoard."""

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlora_dist.config.schema import LoggingConfig
from qlora_dist.metrics.console import Reporter
from qlora_dist.metrics.recorder import MetricsWriter, Recorder
from qlora_dist.metrics.rows import EvalMetrics, StepMetrics, StepSums
from qlora_dist.runtime.memory import GIB, MemoryMeter
from qlora_dist.runtime.processes import Runtime, start_runtime

DOCUMENTED = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "num_tokens",
    "num_target_tokens",
    "tokens_per_second",
    "target_tokens_per_second",
    "step_seconds",
    "data_wait_seconds",
    "peak_memory_gib",
    "mfu",
    "epoch",
    "num_skipped_steps",
}
"""The fields that docs/adapter.md promises to readers of metrics.jsonl."""

STEP = StepMetrics(
    step=3,
    loss=1.5,
    grad_norm=0.25,
    lr=2e-4,
    num_tokens=100,
    num_target_tokens=40,
    tokens_per_second=50.0,
    target_tokens_per_second=20.0,
    step_seconds=2.0,
    data_wait_seconds=0.25,
    peak_memory_gib=0.5,
    mfu=None,
    epoch=0.75,
    num_skipped_steps=1,
)
EVAL = EvalMetrics(
    step=3, eval_loss=0.5, eval_perplexity=1.6487, num_target_tokens=7, seconds=0.1, epoch=0.75
)


def rows(folder: Path) -> list[dict]:
    """The rows of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars that TensorBoard itself reads from the event files: (step, value) by tag."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def runtime(rank: int = 0) -> Runtime:
    """The one process of this test, on CPU, which may claim another rank."""
    return replace(start_runtime(seed=0, dtype="float32"), device=torch.device("cpu"), rank=rank)


def sums(loss: float, num_tokens: int, num_targets: int = 1, grad_norm: float = 1.0) -> StepSums:
    """Results of a step on the device."""
    return StepSums(
        *(torch.tensor(float(value)) for value in (loss, grad_norm, num_targets, num_tokens))
    )


# -- writing


def test_a_step_is_one_json_object_with_the_documented_fields(tmp_path: Path) -> None:
    """A row has exactly the fields of docs/adapter.md, each with its value; null for no
    measurement."""
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=False))
    writer.write(STEP)
    writer.close()
    [row] = rows(tmp_path)
    assert set(row) == DOCUMENTED
    assert row == {
        "step": 3,
        "loss": 1.5,
        "grad_norm": 0.25,
        "lr": 2e-4,
        "num_tokens": 100,
        "num_target_tokens": 40,
        "tokens_per_second": 50.0,
        "target_tokens_per_second": 20.0,
        "step_seconds": 2.0,
        "data_wait_seconds": 0.25,
        "peak_memory_gib": 0.5,
        "mfu": None,
        "epoch": 0.75,
        "num_skipped_steps": 1,
    }


def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    """A run that dies leaves every row it logged: nothing waits for the end of the run."""
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=False))
    writer.write(STEP)
    assert len(rows(tmp_path)) == 1
    writer.write(EVAL)
    assert [("loss" in row, "eval_loss" in row) for row in rows(tmp_path)] == [
        (True, False),
        (False, True),
    ]
    writer.close()


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    """Each measured number is a scalar at its step, training under train/, evaluation under
    eval/."""
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=True))
    writer.write(STEP)
    writer.write(EVAL)
    writer.close()
    shown = scalars(tmp_path)
    train = {
        f"train/{name}": value
        for name, value in vars(STEP).items()
        if name != "step" and value is not None
    }
    evaluation = {
        "eval/loss": 0.5,
        "eval/perplexity": 1.6487,
        "eval/num_target_tokens": 7,
        "eval/seconds": 0.1,
        "eval/epoch": 0.75,
    }
    assert set(shown) == {*train, *evaluation}
    for tag, value in {**train, **evaluation}.items():
        [(step, found)] = shown[tag]
        assert step == 3
        assert found == pytest.approx(value, rel=1e-6)  # event files hold float32


def test_a_run_that_goes_on_has_one_value_per_step(tmp_path: Path) -> None:
    """TensorBoard drops the values of steps that are computed again."""
    for first_step, losses in ((1, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {2: 20.0})):
        writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=True), first_step)
        for step, loss in losses.items():
            writer.write(replace(STEP, step=step, loss=loss))
        writer.close()
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 20.0)]


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    """With `logging.tensorboard: false` the rows are all there is."""
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=False))
    writer.write(STEP)
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# -- recording


def test_rates_count_their_own_tokens_and_utilization_their_operations(tmp_path: Path) -> None:
    """Targets per second count targets. MFU is the operations of the window over those that its
    seconds offered, and null when no peak is known."""
    for peak in (1e6, None):
        folder = tmp_path / str(peak)
        folder.mkdir()
        config = LoggingConfig(every=2, tensorboard=False)
        with Recorder(folder, config, runtime(), Reporter(False), 4, 1, peak) as recorder:
            for step in range(1, 5):
                tokens = sums(loss=1, num_tokens=100 * step, num_targets=step)
                recorder.step(step, 0.1, tokens, epoch=0.0, num_skipped_steps=0, flops=1000 * step)
        for row, targets, flops in zip(rows(folder), (3, 7), (3000, 7000), strict=True):
            seconds = 2 * row["step_seconds"]
            assert row["target_tokens_per_second"] * seconds == pytest.approx(targets)
            expected = None if peak is None else pytest.approx(flops / 1e6 / seconds)
            assert row["mfu"] == expected


@pytest.mark.parametrize(
    ("every", "logged"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (5, [5]), (10, [5])]
)
def test_steps_are_logged_when_due_and_at_the_end(
    tmp_path: Path, every: int, logged: list[int]
) -> None:
    """Every N-th step makes a row and the last one always does, on file and on the console
    alike."""
    out = StringIO()
    config = LoggingConfig(every=every, tensorboard=False)
    with Recorder(
        tmp_path, config, runtime(), Reporter(True, file=out), num_steps=5, first_step=1
    ) as recorder:
        for step in range(1, 6):
            recorder.step(
                step,
                lr=0.1 * step,
                sums=sums(loss=step, num_tokens=10),
                epoch=step / 5,
                num_skipped_steps=0,
                waited_seconds=0.0,
            )
    assert [row["step"] for row in rows(tmp_path)] == logged
    assert [row["loss"] for row in rows(tmp_path)] == logged
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx([0.1 * step for step in logged])
    assert [line.partition(" | ")[0] for line in out.getvalue().splitlines()] == [
        f"step {s}/5" for s in logged
    ]


def test_a_row_holds_what_the_step_left(tmp_path: Path) -> None:
    """Loss, norm and counts are those of the logged step alone; counts are whole numbers."""
    config = LoggingConfig(every=2, tensorboard=False)
    with Recorder(
        tmp_path, config, runtime(), Reporter(False), num_steps=2, first_step=1
    ) as recorder:
        recorder.step(
            1,
            0.1,
            sums(loss=9.0, num_tokens=900, num_targets=99, grad_norm=9.0),
            epoch=0.5,
            num_skipped_steps=0,
            waited_seconds=1.0,
        )
        recorder.step(
            2,
            0.2,
            sums(loss=1.25, num_tokens=300, num_targets=70, grad_norm=0.5),
            epoch=1.0,
            num_skipped_steps=0,
            waited_seconds=1.5,
        )
    [row] = rows(tmp_path)
    assert set(row) == DOCUMENTED
    assert (row["loss"], row["grad_norm"], row["epoch"]) == (1.25, 0.5, 1.0)
    assert row["data_wait_seconds"] == 0.75  # 1.5 in two steps
    assert json.dumps([row["num_tokens"], row["num_target_tokens"]]) == "[300, 70]"
    assert row["peak_memory_gib"] > 0


def test_throughput_is_over_all_steps_since_the_last_row(tmp_path: Path) -> None:
    """Tokens per second times seconds is the tokens of the whole window, not those of its last
    step."""
    config = LoggingConfig(every=3, tensorboard=False)
    with Recorder(
        tmp_path, config, runtime(), Reporter(False), num_steps=5, first_step=1
    ) as recorder:
        for step, num_tokens in enumerate([10, 20, 30, 100, 200], start=1):
            recorder.step(
                step,
                0.1,
                sums(loss=1, num_tokens=num_tokens),
                epoch=0.0,
                num_skipped_steps=0,
                waited_seconds=0.0,
            )
    tokens = [row["tokens_per_second"] * row["step_seconds"] for row in rows(tmp_path)]
    assert tokens == pytest.approx([60 / 3, 300 / 2])  # windows of three and of two steps


def test_time_spent_evaluating_is_not_training_time(tmp_path: Path) -> None:
    """The duration of an evaluation is taken out of the next row's seconds.

    An hour that never passed: if it is subtracted, the two steps took about minus 1,800 seconds
    each.
    """
    config = LoggingConfig(every=2, tensorboard=False)
    with Recorder(
        tmp_path, config, runtime(), Reporter(False), num_steps=2, first_step=1
    ) as recorder:
        recorder.step(1, 0.1, sums(loss=1, num_tokens=10), epoch=0.0, num_skipped_steps=0)
        recorder.evaluation(EvalMetrics(1, 0.5, math.exp(0.5), 7, seconds=3600.0, epoch=0.0))
        recorder.step(2, 0.1, sums(loss=1, num_tokens=10), epoch=0.0, num_skipped_steps=0)
    assert [("eval_loss" in row) for row in rows(tmp_path)] == [True, False]
    assert rows(tmp_path)[1]["step_seconds"] == pytest.approx(-1800, abs=60)


def test_time_left_is_told_once_it_can_be_known(tmp_path: Path) -> None:
    """The time left is unknown after the first step, which includes warm-up, and after the last."""
    out = StringIO()
    config = LoggingConfig(tensorboard=False)
    with Recorder(
        tmp_path, config, runtime(), Reporter(True, file=out), num_steps=4, first_step=1
    ) as recorder:
        for step in range(1, 5):
            recorder.step(step, 0.1, sums(loss=1, num_tokens=10), epoch=0.0, num_skipped_steps=0)
    assert [line.endswith(" left") for line in out.getvalue().splitlines()] == [
        False,
        True,
        True,
        False,
    ]


def test_a_loss_spike_is_pointed_out(tmp_path: Path) -> None:
    """A loss above twice the median of the last twenty gets a line of advice. Exactly twice does
    not, the first twenty are never compared, and a spike does not become the usual loss."""
    out = StringIO()
    config = LoggingConfig(tensorboard=False)
    losses = [9.0, *[1.0] * 19, 2.0, 2.1, 1.0, float("nan"), 3.0]
    with Recorder(
        tmp_path, config, runtime(), Reporter(True, file=out), len(losses), first_step=1
    ) as recorder:
        for step, loss in enumerate(losses, start=1):
            recorder.step(step, 0.1, sums(loss=loss, num_tokens=10), epoch=0.0, num_skipped_steps=0)
    warnings = [
        line.partition(":")[0]
        for line in out.getvalue().splitlines()
        if "more than 2 times its median" in line
    ]
    assert warnings == ["step 22", "step 25"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    """Only rank 0 makes files; the others take part without leaving a file."""
    config = LoggingConfig(tensorboard=True)
    with Recorder(
        tmp_path, config, runtime(rank=1), Reporter(False), num_steps=1, first_step=1
    ) as recorder:
        recorder.evaluation(EVAL)
        recorder.step(1, 0.1, sums(loss=1, num_tokens=10), epoch=0.0, num_skipped_steps=0)
    assert list(tmp_path.iterdir()) == []


def test_peak_memory_of_the_host_is_what_the_kernel_says() -> None:
    """Peak memory on CPU is the kernel's high-water mark of resident memory in /proc, in GiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the independent figure comes from Linux's /proc")
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    assert MemoryMeter(torch.device("cpu")).peak() / GIB == pytest.approx(
        int(line.split()[1]) / 2**20, rel=0.05
    )


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """Rows hold no NaN: strict JSON readers must be able to read those of a run that went wrong."""
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=False))
    writer.write(
        StepMetrics(1, float("nan"), float("inf"), 1.0, 1, 1, 1.0, 1.0, 1.0, 0.0, 1.0, None, 0.0, 0)
    )
    writer.close()
    row = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert row["loss"] is None
    assert row["grad_norm"] is None
