"""Errors that a user can act on. The message says what was wrong, where (file, line, field) and what to do.

The CLI prints the message alone, without a traceback, and exits with `exit_status`. The ops do not use these: wrong
arguments to a function are ValueError or TypeError, as everywhere in Python.
"""


class RLHFFastError(Exception):
    """Base of everything that is the user's to mend."""

    exit_status = 1


class ConfigError(RLHFFastError):
    """A configuration that cannot run: unknown key, wrong type, contradicting fields, does not fit in memory."""

    exit_status = 2


class DataError(RLHFFastError):
    """A data file that is missing, unreadable or has a bad row; names file, line and field."""


class ModelError(RLHFFastError):
    """A model or tokenizer folder that cannot be loaded."""


class RewardError(RLHFFastError):
    """A reward that raised, hung, or returned something that is not one finite number a completion."""


class CheckpointError(RLHFFastError):
    """A checkpoint that could not be written, or none that is whole to resume from."""


class BuildError(RLHFFastError):
    """The C++ extension could not be built; says what to install and how to go on without it."""


class NonFiniteError(RLHFFastError):
    """Too many batches in a row could not be trained on: NaN, infinity, a spike, a reward that failed."""
