"""Errors that a user can mend: each message says what was wrong, the value, the rule and the remedy."""

EXIT_USER_ERROR = 2
EXIT_RESUME = 75
"""A run that stopped before its end and can go on: EX_TEMPFAIL of sysexits.h."""


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
    """Not an error: all ranks agreed to stop because somebody asked, and the message says who."""


class PeerError(Exception):
    """Another process of the run failed, and says of what; this one only has to end. `error` is what it failed of."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
