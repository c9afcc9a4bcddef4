"""`key=value` command lines of the smaller commands -> a typed dataclass, without Hydra and without torch."""

import logging
import sys
from typing import TypeVar

from omegaconf import OmegaConf
from yaml import YAMLError

from distill.errors import UserError

T = TypeVar("T")


def read(schema: type[T], usage: str) -> T:
    """The options given to this command; `--help` prints the usage and ends. Unknown keys and wrong types are refused."""
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
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    assert isinstance(options, schema)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("distill").setLevel(logging.INFO)
    return options
