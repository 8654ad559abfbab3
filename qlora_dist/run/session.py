"""A process's part in a run from start to end: folder, lock, requests to stop, watchdog."""

# Tested by tests/distributed/test_failing_ranks.py and tests/distributed/test_orphans.py.

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from qlora_dist.config.schema import TrainConfig
from qlora_dist.errors import Stopped
from qlora_dist.metrics.console import Reporter
from qlora_dist.run.folder import RunLock, create_run_folder, mark_stopped
from qlora_dist.run.launcher import GONE, is_lost_to
from qlora_dist.run.stopping import StopRequest
from qlora_dist.run.watchdog import Watchdog
from qlora_dist.runtime.processes import Runtime


class Session:
    """Context of the work on a run; when `Stopped` ends it, the reason is left in the folder."""

    def __init__(self, folder: Path, config: TrainConfig, runtime: Runtime) -> None:
        self.folder = folder
        self.runtime = runtime
        self.reporter = Reporter(runtime.is_main)
        self._config = config
        self._lock = RunLock(folder)
        self._stop = StopRequest(folder, runtime)
        self._watchdog: Watchdog | None = None

    def __enter__(self) -> Session:
        if self.runtime.is_main and self.folder.is_dir():
            self._lock.acquire()
        if self._stop.launcher is not None:
            self._stop.launcher.take_charge(self._mark_lost)
        return self

    def watch(self) -> None:
        """Start to end this process when :meth:`check_in` is not called for too long."""
        self._watchdog = Watchdog(self._config.parallel.hang_timeout_seconds, self.runtime.rank)

    def check_in(self) -> None:
        """Report progress, and stop if asked to; a collective.

        Raises:
            Stopped: on all ranks, when any of them was asked to stop.
        """
        if self._watchdog is not None:
            self._watchdog.feed()
        self._stop.check()

    def claim_folder(self, resumed_step: int | None) -> None:
        """Make the run's folder, or take over that of an earlier run; needs good input."""
        if self.runtime.is_main:
            create_run_folder(self.folder, self._config, resumed_step, self._lock)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Stopped) and self.runtime.is_main:
            mark_stopped(self.folder, str(error))
            self.reporter.log(f"stopped ({error}); the same command goes on from here")
        if error is None or isinstance(error, Stopped):
            self.runtime.close()  # all ranks come here; after a failure they do not
        elif is_lost_to(error):
            self._mark_lost()
        # The watchdog stays on while the runtime, above, waits for the other ranks.
        if self._watchdog is not None:
            self._watchdog.close()
        self._lock.release()

    def _mark_lost(self) -> None:
        """Mark the run as stopped by its launcher's end: it can go on from its last checkpoint."""
        if self.runtime.is_main:
            with suppress(OSError):
                mark_stopped(self.folder, GONE)
