"""A run whose launcher, terminal or shell ends: its processes stop in good order, or go on where
they should."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from qlora_dist.run.checkpoint import complete_steps
from qlora_dist.run.launcher import LauncherWatch
from tests.support.command import ROOT, run_forked, run_ranks, write_config
from tests.support.interrupted import children, rank_pid, settings, wait_for
from tests.support.launching import start_launcher
from tests.support.processes import be_rank, free_port
from tests.support.slow import run_slowly
from tests.support.training import adapter_bytes

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TERM": "xterm",
    "COLUMNS": "200",
}
LAUNCHERS = {
    "accelerate": [
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch" / "cpu_2.yaml"),
        "--main_process_port",
        "0",
    ],
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
}


@pytest.fixture(autouse=True)
def _adopt() -> Iterator[None]:
    """Let processes that lose their parent become children of this one, which can read their exit
    codes.

    A run therefore sees another parent than process 1, as under a service manager.
    """
    prctl = ctypes.CDLL(None).prctl
    assert prctl(36, 1) == 0  # PR_SET_CHILD_SUBREAPER
    yield
    prctl(36, 0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_llama: Path, chat_file: Path) -> Path:
    """Folder of the run on two processes that nothing disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    config = write_config(
        root / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(root / "run")
    )
    assert [done.returncode for done in run_ranks("train", config, processes=2)] == [0, 0]
    return root / "run"


def launch(
    launcher: str, moment: str, config: Path, root: Path
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start the run with a slow part, under a launcher, writing to a log file."""
    log = root / "log.txt"
    command = [
        sys.executable,
        "-m",
        *LAUNCHERS[launcher],
        "-m",
        "tests.support.slow",
        moment,
        "train",
        str(config),
    ]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=ENVIRONMENT), log


def exit_codes(pids: list[int], seconds: float = 60) -> list[int]:
    """Exit codes of adopted processes, all of which must end within the time."""
    deadline = time.monotonic() + seconds
    codes = {}
    while len(codes) < len(pids):
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{sorted(set(pids) - set(codes))} still ran")
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return [codes[pid] for pid in pids]


class Living:
    """Processes that are not children of this one, with the methods that `wait_for` calls."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids

    def poll(self) -> int | None:
        """Return None while all processes are alive."""
        return None if all(map(is_running, self._pids)) else 1


def is_running(pid: int) -> bool:
    """True if a process has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def went_on(config: Path, folder: Path, undisturbed: Path) -> bool:
    """True if the same command brings the run to the end of the undisturbed one."""
    assert [done.returncode for done in run_ranks("train", config, processes=2)] == [0, 0]
    assert not (folder / "STOPPED").exists()
    return adapter_bytes(folder) == adapter_bytes(undisturbed)


def reached(log: Path, moment: str, sign: str) -> bool:
    """True if the slow part has begun, after a line with the sign."""
    text = log.read_text() if log.exists() else ""
    return sign in text and f"<{moment}>" in text[text.index(sign) :]


@pytest.mark.parametrize(
    ("moment", "sign", "newest"),
    [
        ("loading", "% of them targets", set()),
        ("stepping", "step 2/", {2, 3}),
        ("evaluating", "step 4/", {4}),
    ],
)
def test_the_launcher_is_killed(
    tmp_path: Path,
    tiny_llama: Path,
    chat_file: Path,
    undisturbed: Path,
    moment: str,
    sign: str,
    newest: set[int],
) -> None:
    """After SIGKILL of the launcher alone its ranks end within seconds with code 75 and a
    checkpoint of the last finished step; the same command goes on to the undisturbed adapter."""
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(folder)
    )
    launcher, pids = start_launcher(partial(run_slowly, moment, ["train", str(config)]), log)
    try:
        wait_for(lambda: reached(log, moment, sign), Living(pids), log)
    finally:
        launcher.kill()
        launcher.join()
    assert exit_codes(pids, 30) == [75, 75]
    check_stopped(folder, log, newest)
    assert went_on(config, folder, undisturbed)


def check_stopped(folder: Path, log: Path, newest: set[int]) -> None:
    """Check that the run logged why it stopped, and that its newest checkpoint is of the last
    step."""
    assert (folder / "STOPPED").read_text() == "the launcher is gone\n"
    assert "stopped (the launcher is gone); the same command goes on from here" in log.read_text()
    assert set(complete_steps(folder / "checkpoints")[-1:]) <= newest
    assert bool(newest) == (folder / "checkpoints").exists()


def test_accelerate_is_killed(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, undisturbed: Path
) -> None:
    """The real `accelerate launch`, killed in an evaluation, leaves a run that can go on."""
    folder = tmp_path / "run"
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(folder)
    )
    process, log = launch("accelerate", "evaluating", config, tmp_path)
    try:
        wait_for(lambda: reached(log, "evaluating", "step 4/"), process, log)
        pids = [rank_pid(process.pid, rank) for rank in (0, 1)]
    finally:
        process.kill()
    process.wait()
    assert exit_codes(pids) == [75, 75]
    check_stopped(folder, log, {4})
    assert went_on(config, folder, undisturbed)


def hang(moment: str, config: Path, patience: float) -> None:
    """Run `train` with one rank that hangs, and less patience after the launcher's end than
    usual."""
    with mock.patch.object(LauncherWatch.__init__, "__defaults__", (0.1, patience)):
        run_slowly(moment, ["train", str(config)])


@pytest.mark.parametrize(("moment", "sign"), [("hanging", "step 2/"), ("tokenizing", "")])
def test_a_rank_that_comes_to_no_stop(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, undisturbed: Path, moment: str, sign: str
) -> None:
    """A rank that hangs, in a step or while the others wait for its data, ends a while after its
    launcher, and so do those that wait for it in a collective; the run can go on."""
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(folder)
    )
    launcher, pids = start_launcher(partial(hang, moment, config, 3.0), log)
    try:
        wait_for(lambda: reached(log, moment, sign), Living(pids), log)
    finally:
        launcher.kill()
        launcher.join()
    assert exit_codes(pids, 30) == [75, 75]
    assert (folder / "STOPPED").read_text() == "the launcher is gone\n"
    assert "stopped (the launcher is gone)" in log.read_text()
    assert went_on(config, folder, undisturbed)


def test_a_rank_that_is_killed_with_the_launcher(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, undisturbed: Path
) -> None:
    """The other rank, which waits for the killed one in a collective, ends without a traceback, and
    the run can go on."""
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(folder)
    )
    launcher, pids = start_launcher(partial(run_slowly, "stepping", ["train", str(config)]), log)
    try:
        wait_for(lambda: reached(log, "stepping", "step 3/"), Living(pids), log)
        os.kill(pids[1], signal.SIGKILL)
    finally:
        launcher.kill()
        launcher.join()
    assert exit_codes(pids, 30) == [75, -signal.SIGKILL]
    assert (folder / "STOPPED").read_text() == "the launcher is gone\n"
    assert "Traceback" not in log.read_text()
    assert went_on(config, folder, undisturbed)


def test_a_launcher_that_is_gone_before_its_rank_looks(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    """A rank that finds nobody at the address of its launcher ends at once, instead of trying for
    half an hour."""
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(tmp_path / "run")
    )
    assert run_forked("train", config, before=be_forsaken).returncode == 75
    assert not (tmp_path / "run").exists()


def be_forsaken() -> None:
    """Make this process a rank of a launcher that has ended."""
    be_rank(0, 2, free_port())
    os.environ.update(TORCHELASTIC_RUN_ID="a run", TORCHELASTIC_USE_AGENT_STORE="True")


def test_ctrl_c_for_the_launcher_alone(
    tmp_path: Path, tiny_llama: Path, chat_file: Path, undisturbed: Path
) -> None:
    """SIGINT to the launcher reaches its ranks: they save a checkpoint, and no process is left."""
    folder = tmp_path / "run"
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(folder)
    )
    process, log = launch("torchrun", "stepping", config, tmp_path)
    try:
        wait_for(lambda: "step 2/" in log.read_text(), process, log)
        pids = [rank_pid(process.pid, rank) for rank in (0, 1)]
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    finally:
        process.kill()
    assert not any(map(is_running, pids))
    assert (folder / "STOPPED").read_text() == "SIGINT\n"
    assert went_on(config, folder, undisturbed)


def test_a_shell_is_no_launcher(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    """A run of one process in the background of a shell goes on to its end when the shell is
    killed."""
    folder = tmp_path / "run"
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(folder)
    )
    command = f"{sys.executable} -m tests.support.slow stepping train {config} & wait"
    log = tmp_path / "log.txt"
    with log.open("wb") as out:
        shell = subprocess.Popen(
            ["bash", "-c", command], stdout=out, stderr=out, cwd=ROOT, env=ENVIRONMENT
        )
    try:
        wait_for(lambda: "step 1/" in log.read_text(), shell, log)
        [run] = children(shell.pid)
    finally:
        shell.kill()
    shell.wait()
    assert exit_codes([run]) == [0]
    assert (folder / "adapter").is_dir()


def test_a_terminal_that_is_closed(tmp_path: Path, tiny_llama: Path, chat_file: Path) -> None:
    """A run in a terminal that is closed saves a checkpoint, though nothing can be written to the
    terminal."""
    folder = tmp_path / "run"
    config = write_config(
        tmp_path / "c.yaml", **settings(tiny_llama, chat_file), output_dir=str(folder)
    )
    terminal, end = os.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.support.slow", "stepping", "train", str(config)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(end)
    seen = b""
    try:
        while b"step 2/8" not in seen:
            seen += os.read(terminal, 4096)
    finally:
        os.close(terminal)
    try:
        assert run.wait(timeout=60) == 75
    finally:
        run.kill()
    assert (folder / "STOPPED").read_text() == "SIGHUP\n"
    assert complete_steps(folder / "checkpoints")[-1] in (2, 3)
