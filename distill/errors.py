"""The two ways in which a run ends early, each with one sentence for the user."""


class UserError(Exception):
    """Bad input: ``<thing> is <value>, but <rule>: <way out>``. Exit code 2, no traceback."""

    exit_code = 2


class RunFailed(UserError):
    """The input was good, but the result does not hold (an export that is not equal, say). Exit code 1."""

    exit_code = 1
