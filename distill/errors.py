"""The exceptions that end a run early, each with one sentence for the user."""

__all__ = ["RunFailed", "Stopped", "UserError"]


class UserError(Exception):
    """Bad input: ``<thing> is <value>, but <rule>: <way out>``. Exit code 2, no traceback."""

    exit_code = 2


class RunFailed(UserError):
    """Valid input, but an invalid result, such as an export that is not equal. Exit code 1."""

    exit_code = 1


class Stopped(BaseException):
    """A request to stop ended the run before it was done.

    Args:
        message: How to continue.
        exit_code: 75, on which a scheduler runs the command again, or 130 after Ctrl-C.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
