"""One process's part in a run, from its first word to its last: folder, lock, requests to stop, watchdog."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType

from qlora_dist.config.schema import TrainConfig
from qlora_dist.errors import Stopped
from qlora_dist.metrics.console import Reporter
from qlora_dist.run.folder import RunLock, create_run_folder, mark_stopped
from qlora_dist.run.launcher import GONE, is_lost_to
from qlora_dist.run.stopping import StopRequest
from qlora_dist.run.watchdog import Watchdog
from qlora_dist.runtime.processes import Runtime


class Session:
    """A context in which a run is worked on; leaving it by `Stopped` leaves word of that in the run's folder."""

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
        """From now on, end this process when :meth:`check_in` is not called for too long."""
        self._watchdog = Watchdog(self._config.parallel.hang_timeout_seconds, self.runtime.rank)

    def check_in(self) -> None:
        """What all ranks call together whenever there was progress.

        Raises:
            Stopped: on all of them alike, when any was asked to stop.
        """
        if self._watchdog is not None:
            self._watchdog.feed()
        self._stop.check()

    def claim_folder(self, resumed_step: int | None) -> None:
        """Make the run's folder, or what an earlier run left of it, ours; called when all input is known to be good."""
        if self.runtime.is_main:
            create_run_folder(self.folder, self._config, resumed_step, self._lock)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Stopped) and self.runtime.is_main:
            mark_stopped(self.folder, str(error))
            self.reporter.log(f"stopped ({error}); the same command goes on from here")
        if error is None or isinstance(error, Stopped):
            self.runtime.close()  # all ranks come here; after a failure they do not
        elif is_lost_to(error):
            self._mark_lost()
        if self._watchdog is not None:
            self._watchdog.close()
        self._lock.release()

    def _mark_lost(self) -> None:
        """Leave word that the run ends because its launcher did, and can go on from its last checkpoint."""
        if self.runtime.is_main:
            with suppress(OSError):
                mark_stopped(self.folder, GONE)
