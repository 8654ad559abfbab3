"""Jobs of `slurm/train.sbatch` on a real Slurm cluster of two nodes on this machine.

`tests/slurm/cluster.sh` makes the cluster.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import ROOT, write_config

# Only ever the cluster made for tests: on a login node, `make test` must not queue jobs.
CLUSTER = Path(os.environ.get("SLURM_TEST_DIR", f"/tmp/qlora-dist-slurm-{os.getuid()}"))
ENVIRONMENT = {
    **os.environ,
    "SLURM_CONF": str(CLUSTER / "slurm.conf"),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
MAX_STEPS = 20
# A living job has many more names than RUNNING: SIGNALING, CONFIGURING, REQUEUE_HOLD ...
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> None:
    remedy = "run tests/slurm/cluster.sh install and tests/slurm/cluster.sh start"
    if not shutil.which("sinfo"):
        pytest.skip(f"Slurm is not installed: {remedy}")
    if not (CLUSTER / "slurm.conf").exists():
        pytest.skip(f"no test cluster is running: {remedy}")
    sinfo = subprocess.run(
        ["timeout", "10", "sinfo", "-h"], env=ENVIRONMENT, capture_output=True, check=False
    )
    if sinfo.returncode:
        pytest.skip(f"the test cluster in {CLUSTER} does not answer: {remedy}")


def slurm(*command: str | Path) -> str:
    """Run a Slurm command from the repository's folder; return its output."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


class Job:
    """One submission of `slurm/train.sbatch`, with its log in `folder`."""

    def __init__(self, folder: Path, *arguments: str | Path, options: tuple[str, ...] = ()) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "log.txt"
        self.id = slurm(
            "sbatch",
            "--parsable",
            f"--output={self.log}",
            *options,
            "slurm/train.sbatch",
            *arguments,
        )

    def field(self, name: str) -> str:
        """A field of `scontrol show job`, such as JobState."""
        found = re.search(
            rf"\b{name}=(\S+)", slurm("scontrol", "--oneliner", "show", "job", self.id)
        )
        assert found, name
        return found[1]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Poll until the condition holds; the job must not end before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.field("JobState") not in ENDED, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.2)

    def end(self, seconds: float = 300) -> tuple[str, str]:
        """Wait for the end; returns state and exit code, such as ("COMPLETED", "0:0")."""
        deadline = time.monotonic() + seconds
        try:
            while (state := self.field("JobState")) not in ENDED:
                assert time.monotonic() < deadline, self.text()
                time.sleep(0.2)
            return state, self.field("ExitCode")
        finally:
            slurm("scancel", "--quiet", self.id)

    def text(self) -> str:
        """The job's log so far."""
        return self.log.read_text() if self.log.exists() else "(the job has not written anything)"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, chat_file: Path) -> Path:
    """Configuration of a run of about six seconds after loading; tests override output_dir."""
    return write_config(
        tmp_path_factory.mktemp("slurm") / "config.yaml",
        output_dir="given on the command line",
        model={"path": str(tiny_llama), "dtype": "float32"},
        data={"train": str(chat_file)},
        optim={"max_steps": MAX_STEPS, "grad_accum_steps": 4},
        parallel={"backend": "fsdp"},
        logging={"tensorboard": False},
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """The run folder of a job that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = Job(folder, config, "--output_dir", folder / "out")
    assert job.end() == ("COMPLETED", "0:0"), job.text()
    assert "2 nodes (n[1-2]), 1 processes each" in job.text()
    return folder / "out"


def weights(run_folder: Path) -> bytes:
    """The trained adapter, byte for byte."""
    return (run_folder / "adapter" / "adapter_model.safetensors").read_bytes()


def num_steps(run_folder: Path) -> int:
    """Rows of metrics.jsonl so far."""
    file = run_folder / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def test_the_cluster_has_two_nodes() -> None:
    """One task runs on each node."""
    out = slurm("srun", "-N2", "-n2", "bash", "-c", "echo $SLURMD_NODENAME $SLURM_NODEID")
    assert sorted(out.splitlines()) == ["n1 0", "n2 1"]


def test_a_mistake_in_the_configuration_ends_the_job_before_any_launcher(
    tmp_path: Path, config: Path
) -> None:
    """The log of a job with a mistake holds the message and nothing else."""
    job = Job(tmp_path, config, "--optim.learning_rate", "1")
    assert job.end() == ("FAILED", "2:0")
    assert job.text() == "error: unknown key optim.learning_rate. Did you mean optim.lr?\n"


def test_one_process_on_each_node_train_together(uninterrupted: Path) -> None:
    """Two ranks, one on each node, make one run of all steps and one adapter."""
    assert num_steps(uninterrupted) == MAX_STEPS
    assert weights(uninterrupted)


def test_a_job_near_its_time_limit_goes_back_into_the_queue_and_on(
    tmp_path: Path, config: Path, uninterrupted: Path
) -> None:
    """USR1 to the batch script, which Slurm sends before the limit, costs no step and changes no
    bit of the adapter."""
    out = tmp_path / "out"
    job = Job(tmp_path, config, "--output_dir", out)
    job.wait_for(lambda: num_steps(out) >= MAX_STEPS // 4)
    slurm("scancel", "--signal=USR1", "--batch", job.id)
    assert job.end() == ("COMPLETED", "0:0"), job.text()
    assert job.field("Restarts") == "1"
    check_continued(job, out, uninterrupted)


@pytest.mark.slow  # three jobs of a minute: Slurm counts limits in minutes
def test_the_real_time_limit(tmp_path: Path, config: Path) -> None:
    """A run longer than its job's time limit ends like a run without a limit."""
    longer = ("--optim.max_steps", "100", "--optim.grad_accum_steps", "16")
    whole = Job(tmp_path / "whole", config, *longer, "--output_dir", tmp_path / "whole" / "out")
    assert whole.end() == ("COMPLETED", "0:0"), whole.text()
    # Slurm may send the signal up to a minute early: with a shorter limit a job could end before
    # its first step.
    options = ("--time=2", "--signal=B:USR1@40")
    job = Job(tmp_path, config, *longer, "--output_dir", tmp_path / "out", options=options)
    assert job.end(seconds=500) == ("COMPLETED", "0:0"), job.text()
    assert int(job.field("Restarts")) >= 1
    check_continued(job, tmp_path / "out", tmp_path / "whole" / "out", num_expected=100)


STOPS = {
    "STOP": (lambda job, out: (out / "STOP").touch(), ("FAILED", "75:0")),
    "SIGTERM": (
        lambda job, out: slurm("scancel", "--signal=TERM", "--batch", job.id),
        ("FAILED", "75:0"),
    ),
    "scancel": (lambda job, out: slurm("scancel", job.id), ("CANCELED", "75:0")),
}


@pytest.mark.slow  # two jobs each; what they share is tested above
@pytest.mark.parametrize("how", STOPS)
def test_a_job_stopped_by_hand_stays_stopped(
    tmp_path: Path, config: Path, uninterrupted: Path, how: str
) -> None:
    """A job stopped by hand writes a checkpoint and ends; submitted again it goes on."""
    out = tmp_path / "out"
    stop, expected = STOPS[how]
    first = Job(tmp_path, config, "--output_dir", out)
    first.wait_for(lambda: num_steps(out) >= MAX_STEPS // 4)
    stop(first, out)
    assert first.end() == expected, first.text()
    assert first.field("Restarts") == "0"
    assert (out / "STOPPED").exists()
    again = Job(tmp_path, config, "--output_dir", out)
    assert again.end() == ("COMPLETED", "0:0"), again.text()
    check_continued(again, out, uninterrupted)


def check_continued(
    job: Job, out: Path, uninterrupted: Path, num_expected: int = MAX_STEPS
) -> None:
    """Check that a run went on, not from its start, and ended like the undisturbed run."""
    assert job.text().count(f"step 1/{num_expected} ") == 1
    assert num_steps(out) == num_expected
    assert weights(out) == weights(uninterrupted)
    assert not {"STOP", "STOPPED"} & {path.name for path in out.iterdir()}
