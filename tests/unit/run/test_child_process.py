"""A command and the process that started it end together."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from qlora_dist.run.child_process import run_child
from tests.support.processes import exit_code_of

OBEDIENT = 'trap "exit 7" HUP INT TERM; echo $$ > pid; while true; do sleep 0.05; done'
DEAF = 'trap "" HUP INT TERM; echo $$ > pid; while true; do sleep 0.05; done'


def run_and_be_told(folder: Path, script: str, number: int, expected: tuple[int, int]) -> None:
    """Run a script, and send this process a signal once the script has begun."""
    os.chdir(folder)

    def tell() -> None:
        pid_in(folder)
        os.kill(os.getpid(), number)

    threading.Thread(target=tell).start()
    assert run_child(["sh", "-c", script], patience_seconds=0.5) == expected
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def pid_in(folder: Path, seconds: float = 30) -> int:
    """Wait for the script to begin; return its process id."""
    deadline = time.monotonic() + seconds
    while not (folder / "pid").exists() or not (folder / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int((folder / "pid").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    """A signal to the starter alone reaches the command, which is waited for."""
    assert exit_code_of(run_and_be_told, tmp_path, OBEDIENT, number, (7, number)) == 0


def test_a_command_that_does_not_listen(tmp_path: Path) -> None:
    """A command that ignores the signal is killed after `patience_seconds`."""
    expected = (-signal.SIGKILL, signal.SIGTERM)
    assert exit_code_of(run_and_be_told, tmp_path, DEAF, signal.SIGTERM, expected) == 0


def test_without_a_signal() -> None:
    """Without a signal the result is the command's exit code and None."""
    assert run_child(["sh", "-c", "exit 3"]) == (3, None)


def run_in(folder: Path) -> None:
    os.chdir(folder)
    run_child(["sh", "-c", OBEDIENT])


def kill_soon(folder: Path) -> None:
    threading.Thread(target=lambda: (pid_in(folder), os.kill(os.getpid(), signal.SIGKILL))).start()
    run_in(folder)


def test_the_starter_is_killed(tmp_path: Path) -> None:
    """The kernel ends the command of a starter that SIGKILL ended."""
    assert exit_code_of(kill_soon, tmp_path) == -signal.SIGKILL
    pid, deadline = pid_in(tmp_path), time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    if is_running(pid):
        os.kill(pid, signal.SIGKILL)
        raise AssertionError("the command lives on")


def is_running(pid: int) -> bool:
    """True if a process has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
