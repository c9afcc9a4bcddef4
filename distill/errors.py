"""The ways in which a run ends early, each with one sentence for the user."""


class UserError(Exception):
    """Bad input: ``<thing> is <value>, but <rule>: <way out>``. Exit code 2, no traceback."""

    exit_code = 2


class RunFailed(UserError):
    """The input was good, but the result does not hold (an export that is not equal, say). Exit code 1."""

    exit_code = 1


class Stopped(BaseException):
    """Nothing is wrong, but the run was asked to end before it was done: 75 tells a scheduler to run it again, 130 is Ctrl-C."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code
