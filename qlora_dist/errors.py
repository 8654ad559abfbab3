"""Errors that a user can mend: each message says what was wrong, the value, the rule and the remedy."""

EXIT_USER_ERROR = 2


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


class LaunchError(QloraDistError):
    """A launcher, process count or backend that do not fit together."""
