"""A run folder belongs to one run, is used by one process at a time, and keeps its checkpoints."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_dist.config.load import load_config
from qlora_dist.config.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from qlora_dist.errors import CheckpointError
from qlora_dist.run.folder import (
    STOP,
    STOPPED,
    RunLock,
    check_run_folder,
    create_run_folder,
    identity,
    mark_stopped,
)


def run_config(folder: Path, seed: int = 0, **sections: object) -> TrainConfig:
    """Small configuration of a run in `folder`."""
    config = TrainConfig(
        str(folder), seed, model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl")
    )
    return replace(config, **sections)


def create(config: TrainConfig, resumed_step: int | None = None) -> None:
    """Make the folder of a run as the run does, and end the run."""
    lock = RunLock(Path(config.output_dir))
    create_run_folder(Path(config.output_dir), config, resumed_step, lock)
    lock.release()


# -- whose it is


def test_a_run_folder_takes_its_own_run_again_and_no_other(tmp_path: Path) -> None:
    """A folder accepts its own configuration again, also after a move, and refuses any other."""
    create(run_config(tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert check_run_folder(run_config(tmp_path / "run")) == tmp_path / "run"
    (tmp_path / "run").rename(tmp_path / "moved")
    check_run_folder(run_config(tmp_path / "moved"))
    with pytest.raises(CheckpointError, match=r"different run \(seed: 0 there, 1 now\)"):
        check_run_folder(run_config(tmp_path / "moved", seed=1))


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": ParallelConfig(backend="ddp")},
        {"optim": OptimConfig(micro_batch_size=4, grad_accum_steps=2)},
        {"checkpoint": CheckpointConfig(every=7, resume="never")},
        {"eval": EvalConfig(every=3), "logging": LoggingConfig(every=5)},
    ],
)
def test_how_a_run_is_computed_may_change(tmp_path: Path, sections: dict[str, object]) -> None:
    """A run goes on with another backend, cut of the batch, or interval of checkpoints."""
    held_out = DataConfig(train="t.jsonl", eval="e.jsonl")
    create(run_config(tmp_path / "run", data=held_out))
    check_run_folder(run_config(tmp_path / "run", data=held_out, **sections))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"optim": OptimConfig(lr=1.0)}, "optim.lr: 0.0002 there, 1.0 now"),
        ({"adapter": AdapterConfig(target_modules=("q_proj",))}, "adapter.target_modules"),
        ({"data": DataConfig(train="other.jsonl")}, "data.train"),
    ],
)
def test_what_is_trained_may_not_change(
    tmp_path: Path, sections: dict[str, object], named: str
) -> None:
    """Settings that would make it another run are refused by name."""
    create(run_config(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=named):
        check_run_folder(run_config(tmp_path / "run", **sections))


def test_an_identity_survives_a_checkpoint(tmp_path: Path) -> None:
    """An identity survives a round trip through a checkpoint's JSON, or through config.yaml."""
    config = run_config(
        tmp_path / "run", adapter=AdapterConfig(target_modules=("q_proj", "v_proj"))
    )
    create(config)
    assert json.loads(json.dumps(identity(config))) == identity(config)
    assert identity(load_config(tmp_path / "run" / "config.yaml")) == identity(config)


def test_a_mapping_without_entries_is_as_none(tmp_path: Path) -> None:
    """A run that began before a mapping was a setting goes on; entries make it another run."""
    config = run_config(tmp_path / "run")
    assert identity(config)["data.columns"] is identity(config)["data.roles"] is None
    create(config)
    named = DataConfig(train="t.jsonl", columns={"text": "body"}, roles={"user": ("human",)})
    with pytest.raises(CheckpointError, match=r"data\.columns: None there, {'text': 'body'} now"):
        check_run_folder(run_config(tmp_path / "run", data=named))


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    """A folder with other files, a file in the folder's place, and the config.yaml of another
    program are refused."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match=r"not empty and holds no run \(it has thesis\.tex\)"):
        check_run_folder(run_config(tmp_path))
    with pytest.raises(CheckpointError, match="is a file"):
        check_run_folder(run_config(tmp_path / "thesis.tex"))
    (tmp_path / "config.yaml").write_text("something: else\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml cannot be read: .*something"):
        check_run_folder(run_config(tmp_path))
    with pytest.raises(CheckpointError, match="not a writable folder"):
        check_run_folder(run_config(tmp_path / "thesis.tex" / "run"))


@pytest.mark.parametrize("names", [[], [STOP], [STOPPED, ".lock"]])
def test_a_folder_without_a_run_is_free(tmp_path: Path, names: list[str]) -> None:
    """An empty folder, or one with only the files that come before a run's own, accepts any run."""
    for name in names:
        (tmp_path / name).touch()
    assert check_run_folder(run_config(tmp_path)) == tmp_path


def test_checking_makes_nothing(tmp_path: Path) -> None:
    """The check of a folder writes nothing."""
    check_run_folder(run_config(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


# -- what is in it


def fill(folder: Path, lines: list[str]) -> None:
    """Write the files that an earlier run left."""
    for name in ("adapter", "tensorboard", "checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(lines))


ROWS = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]


def test_starting_over_removes_the_earlier_run(tmp_path: Path) -> None:
    """A run that starts from nothing removes the files of the earlier run."""
    fill(tmp_path, ROWS)
    create(run_config(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", ".lock"}


def test_going_on_keeps_everything_up_to_the_checkpoint(tmp_path: Path) -> None:
    """Rows of steps that will be computed again, and a row that was cut off, are removed from the
    metrics; everything else stays."""
    fill(
        tmp_path,
        [*ROWS[:2], json.dumps({"step": 2, "eval_loss": 0.5}) + "\n", ROWS[2], '{"step": 4, "lo'],
    )
    create(run_config(tmp_path), resumed_step=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert {"adapter", "tensorboard", "checkpoints"} <= {path.name for path in tmp_path.iterdir()}


def test_a_stopped_run_leaves_word_until_it_goes_on(tmp_path: Path) -> None:
    """STOPPED has the reason; the STOP file is gone, or it would stop the next start as well."""
    (tmp_path / STOP).touch()
    mark_stopped(tmp_path, "signal SIGTERM")
    assert (tmp_path / STOPPED).read_text() == "signal SIGTERM\n"
    assert not (tmp_path / STOP).exists()
    create(run_config(tmp_path), resumed_step=2)
    assert not (tmp_path / STOPPED).exists()


# -- who is using it


def test_a_folder_is_used_by_one_run_at_a_time(tmp_path: Path) -> None:
    """A second run is refused, by the process that holds the folder, until the first run ends."""
    mine, other = RunLock(tmp_path), RunLock(tmp_path)
    create_run_folder(tmp_path, run_config(tmp_path), None, mine)
    mine.acquire()  # its own lock is no obstacle
    with pytest.raises(
        CheckpointError, match=rf"in use by another run \(process {os.getpid()} on "
    ):
        other.acquire()
    mine.release()
    other.acquire()
    other.release()


def test_a_run_that_is_refused_removes_nothing(tmp_path: Path) -> None:
    """A run that finds the folder locked leaves all files as they are."""
    fill(tmp_path, ROWS)
    mine = RunLock(tmp_path)
    mine.acquire()
    with pytest.raises(CheckpointError, match="in use"):
        create(run_config(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(ROWS)
    mine.release()


def test_a_dead_run_holds_no_folder(tmp_path: Path) -> None:
    """The lock of a killed process ends with it, though its file is still there."""
    code = (
        "import sys, time; from pathlib import Path; from qlora_dist.run.folder import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); lock.acquire(); print('locked', flush=True)\n"
        "time.sleep(600)"
    )
    mine = RunLock(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match=rf"process {other.pid} on "):
            mine.acquire()
        other.kill()
    assert (tmp_path / ".lock").exists()
    mine.acquire()
    mine.release()
