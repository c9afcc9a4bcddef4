"""Command lines: a failure is one sentence and an exit code.

2 is bad input, 1 a failed run, 130 Ctrl-C. 75: a signal stopped the run, which can continue.
"""

import functools
import logging
import os
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, TypeVar

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill.errors import Stopped, UserError
from distill.processes.exits import SHOW_TRACEBACK, report_failure
from distill.recipe import trust
from distill.recipe.explain import explain_error

__all__ = ["ENVIRONMENT", "ConsoleFilter", "cli_command", "parse_options"]

T = TypeVar("T")

# defaults of the commands, which the user's variables override
ENVIRONMENT = {
    # matrix products do not depend on the memory alignment of their operands, also on AMD
    "MKL_CBWR": "AUTO,STRICT",
    # waiting threads sleep: much faster while other processes use the cores too
    "OMP_WAIT_POLICY": "passive",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",  # our error names what cannot be reached, once
    # transformers imports torchao if it is installed; its kernels are not used here
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
}
# at import, torchao logs missing kernels, and torch a deprecated function that torchao uses
_QUIET_LOGGERS = ("torchao", "torch.utils._pytree")


class ConsoleFilter(logging.Filter):
    """Passes the lines of this library and of the user's code, not those of installed libraries."""

    folders = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))

    def filter(self, record: logging.LogRecord) -> bool:
        is_ours = record.name.partition(".")[0] == "distill"
        return is_ours or not record.pathname.startswith(self.folders)


def cli_command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate the main function of a command: errors become one sentence and an exit code.

    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """

    @functools.wraps(main)
    def command(*arguments: Any) -> None:
        _configure_process()
        try:
            main(*arguments)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            _fail(error, explain_error(error), getattr(error, "exit_code", 2))
        except OSError as error:
            if error.errno is None:  # not from the operating system
                raise
            _fail(error, _describe_os_error(error), 1)
        except Stopped as stopped:
            report_failure(str(stopped))
            sys.exit(stopped.exit_code)
        except KeyboardInterrupt:
            report_failure(
                "interrupted: finished work is saved, and the same command continues from there"
            )
            sys.exit(130)

    return command


def parse_options(schema: type[T], usage: str) -> T:
    """Parse the `key=value` arguments of a command that needs neither Hydra nor torch.

    Args:
        schema: A dataclass with the keys, their types and defaults.
        usage: Printed by ``--help``, which ends the process.

    Raises:
        UserError: if an argument has no ``=`` or a value is not YAML.
        OmegaConfBaseException: if a key is unknown or a value has the wrong type.
    """
    arguments = trust.take_from_arguments(sys.argv[1:])
    if {"-h", "--help"} & set(arguments):
        print(usage)
        sys.exit(0)
    for argument in arguments:
        if "=" not in argument:
            raise UserError(
                f"the argument is {argument}, but options are written key=value: see --help"
            )
    try:
        values = OmegaConf.from_cli(arguments)
    except YAMLError as error:
        raise UserError(
            f"the arguments are {' '.join(arguments)}, but a value is not YAML "
            f"({' '.join(str(error).split())}): quote it"
        ) from error
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    assert isinstance(options, schema)
    logging.basicConfig(format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(ConsoleFilter())
    logging.getLogger("distill").setLevel(logging.INFO)
    return options


def _configure_process() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.captureWarnings(True)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them


def _fail(error: Exception, message: str, exit_code: int) -> None:
    if SHOW_TRACEBACK:
        raise error
    report_failure(message)
    sys.exit(exit_code)


def _describe_os_error(error: OSError) -> str:
    path = error.filename or "the disk"
    return (
        f"{path} cannot be used ({error.strerror}), but the run must read and write it: "
        "correct that, or choose another place with hydra.run.dir (runs) or DISTILL_CACHE (cache)"
    )
