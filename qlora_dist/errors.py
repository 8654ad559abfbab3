"""Errors that a user can mend: each message has the mistake, the value, the rule and the remedy."""

# Tested by tests/unit/test_cli.py.

EXIT_USER_ERROR = 2
EXIT_RESUME = 75
"""Exit code of a run that stopped before its end and can go on: EX_TEMPFAIL of sysexits.h."""


class QloraDistError(Exception):
    """Base of all errors shown without a traceback; the process exits with code 2."""


class ConfigError(QloraDistError):
    """A setting that is unknown, impossible, or contradicts another one."""


class DataError(QloraDistError):
    """A data file or row that cannot be used."""


class ModelError(QloraDistError):
    """A model folder that is missing, incomplete, or of a kind that cannot be trained."""


class CheckpointError(QloraDistError):
    """A run folder or adapter that cannot be written, read or trusted."""


class TrainingError(QloraDistError):
    """A run that cannot usefully go on: gradients that are not finite, or ranks that disagree."""


class LaunchError(QloraDistError):
    """A launcher, process count or backend that do not fit together."""


class Stopped(Exception):
    """Agreement of all ranks to stop, no error; the message is the signal or file that asked."""


class PeerError(Exception):
    """Failure of another process, which reports it; this process only has to end.

    `error` is the other process's exception.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
