"""Command lines: what went wrong is one sentence and an exit code, 2 for bad input, 1 for a failed run, 130 for Ctrl-C."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from distill.errors import UserError
from distill.recipe import sentence

SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Turn what the user can mend into one sentence; `HYDRA_FULL_ERROR=1` shows the traceback in its place."""

    @functools.wraps(main)
    def answered(*arguments: Any) -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra is to hand its errors over, not to print them
        try:
            main(*arguments)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            if SHOW_TRACEBACK:
                raise
            print(f"distill: {_one_line(error)}", file=sys.stderr)
            sys.exit(getattr(error, "exit_code", 2))
        except KeyboardInterrupt:
            print("distill: interrupted: what was finished is kept, and the same command uses it again", file=sys.stderr)
            sys.exit(130)

    return answered


def _one_line(error: BaseException) -> str:
    """The user's sentence from the innermost error that has one: Hydra wraps those of OmegaConf."""
    known: BaseException | None = error
    while known is not None and not isinstance(known, OmegaConfBaseException | UserError):
        known = known.__cause__ or known.__context__
    if isinstance(known, OmegaConfBaseException):
        return sentence(known)
    return " ".join(str(known or error).split())
