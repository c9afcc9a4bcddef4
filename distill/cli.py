"""Command lines: what went wrong is one sentence and an exit code, 2 for bad input, 1 for a failed run, 130 for Ctrl-C.

75 says that the run was asked to end by a signal, and that the command to continue it was named.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill.errors import Stopped, UserError
from distill.recipe.compose import explain_error

T = TypeVar("T")

ENVIRONMENT = {  # what the user has not set
    "MKL_CBWR": "AUTO,STRICT",  # a product is the same wherever its operands lie in memory, as on AMD it is not by itself
    "OMP_WAIT_POLICY": "passive",  # threads that wait for others sleep: much faster where other processes want the cores too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",  # of maps that take moments
    "HF_HUB_VERBOSITY": "error",  # one sentence of ours says what could not be reached, not a line per attempt
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",  # transformers imports torchao where it is installed; its kernels are not used here
}
CHATTY = ("torchao", "torch.utils._pytree")  # loggers that warn about torchao's own code
SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")


def cli_command(main: Callable[..., None]) -> Callable[..., None]:
    """Turn what the user can mend into one sentence; `HYDRA_FULL_ERROR=1` shows the traceback in its place."""

    @functools.wraps(main)
    def answered(*arguments: Any) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra is to hand its errors over, not to print them
        try:
            main(*arguments)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            if SHOW_TRACEBACK:
                raise
            print(f"distill: {_one_line(error)}", file=sys.stderr)
            sys.exit(getattr(error, "exit_code", 2))
        except OSError as error:
            if SHOW_TRACEBACK or error.errno is None:
                raise
            print(f"distill: {_of_the_disk(error)}", file=sys.stderr)
            sys.exit(1)
        except Stopped as asked:
            print(f"distill: {asked}", file=sys.stderr)
            sys.exit(asked.exit_code)
        except KeyboardInterrupt:
            print(
                "distill: interrupted: what was finished is kept, and the same command uses it again",
                file=sys.stderr,
            )
            sys.exit(130)

    return answered


def parse_options(schema: type[T], usage: str) -> T:
    """`key=value` arguments of the smaller commands -> a typed dataclass, without Hydra and without torch.

    `--help` prints the usage and ends. Unknown keys and wrong types are refused.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(usage)
        sys.exit(0)
    for argument in arguments:
        if not argument.partition("=")[1]:
            raise UserError(f"{argument} is given, but options are written key=value: see --help")
    try:
        given = OmegaConf.from_cli(arguments)
    except YAMLError as error:
        raise UserError(
            f"{' '.join(arguments)} is given, but a value in it is no YAML ({' '.join(str(error).split())}): quote it"
        ) from error
    parse_options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    assert isinstance(parse_options, schema)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("distill").setLevel(logging.INFO)
    return parse_options


def _of_the_disk(error: OSError) -> str:
    what = error.filename or "the disk"
    way_out = "mend that, or choose another place with hydra.run.dir (runs) or DISTILL_CACHE (what is used again)"
    return (
        f"{what} cannot be used ({error.strerror}), but the run must read and write it: {way_out}"
    )


def _one_line(error: BaseException) -> str:
    """The user's sentence from the innermost error that has one: Hydra wraps those of OmegaConf."""
    known: BaseException | None = error
    while known is not None and not isinstance(known, OmegaConfBaseException | UserError):
        known = known.__cause__ or known.__context__
    if isinstance(known, OmegaConfBaseException):
        return explain_error(known)
    return " ".join(str(known or error).split())
