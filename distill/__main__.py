"""The `distill` command: `distill train recipe=tiny` is `python -m distill.train recipe=tiny`."""

import sys
from importlib import import_module

import distill
from distill.cli import cli_command
from distill.errors import UserError
from distill.processes.exits import run_and_exit

COMMANDS = {
    "train": "distill a model: distill train recipe=NAME [key=value ...]",
    "evaluate": "measure models: distill evaluate run=FOLDER [key=value ...]",
    "export": "write a model in another format: distill export run=FOLDER [key=value ...]",
}
HELP = f"""Knowledge distillation of Transformers models.

{chr(10).join(f"  {name:10}{text}" for name, text in COMMANDS.items())}

distill COMMAND --help describes the keys of a command; distill --version prints the version."""


@cli_command
def command() -> None:
    """Run the subcommand that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(HELP)
    elif name == "--version":
        print(distill.__version__)
    elif name in COMMANDS:
        sys.argv[:2] = [f"distill {name}"]
        import_module(f"distill.{name}").main()
    else:
        raise UserError(
            f"the command is {name}, but it must be one of {', '.join(COMMANDS)}: "
            "see distill --help"
        )


def main() -> None:
    """The entry of the installed script."""
    run_and_exit(command)


if __name__ == "__main__":
    main()
