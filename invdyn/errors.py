"""Errors that a user can act on."""


class InvdynError(Exception):  # no ValueError: what handles a damaged file must not take a silent service for one
    """Bad input: what must hold, what was found, where, and what to do, in one line.

    Commands print the message and exit with `exit_code`. Anything else that is raised is a fault of invdyn itself.
    """

    exit_code = 2


class ConfigError(InvdynError):
    """A configuration file, an override or a flag that cannot be used."""


class DataError(InvdynError):
    """Recordings, transitions or checkpoints that cannot be used."""


class StorageError(InvdynError):
    """A storage service that refuses or does not answer: nothing is known of the data."""


class TrainingDiverged(InvdynError):
    """The training loss is no longer finite: the input was valid, the work could not be done."""

    exit_code = 1
