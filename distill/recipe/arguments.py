"""The command line of `distill.train` as the user types it -> arguments that Hydra accepts.

Hydra's grammar knows ASCII only outside of quotes, its flags must come first, and it cannot set a
key of a section that is null.
"""

import re
from typing import Any

from distill.errors import UserError
from distill.recipe.schema import is_optional_section, types_along
from distill.recipe.targets import did_you_mean

__all__ = ["HELP_FLAGS", "INFO_FLAGS", "empty_sections", "flags_first", "quote", "quote_non_ascii"]

HELP_FLAGS = ("--help", "-h")
_CHOICES = {  # values of flags that have one
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--package": (),
}
_SHORT = {"-c": "--cfg", "-i": "--info", "-p": "--package"}
# a command with one of these needs no recipe
INFO_FLAGS = (
    *HELP_FLAGS,
    *("--hydra-help", "--version", "--info", "-i"),
    *("--cfg", "-c", "--shell-completion", "-sc"),
)
_FLAGS = (*INFO_FLAGS, "--package", "-p", "--resolve", "--run", "-r", "--multirun", "-m")
_QUOTED = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
# a quoted text, a character of the grammar, or anything else
_NESTED = re.compile(rf"{_QUOTED}|[\[\]{{}},:()]|[^\[\]{{}},:()'\"]+|.")
_CHOICES_OF_SWEEP = re.compile(rf"{_QUOTED}|,|[^,'\"]+|.")


def flags_first(arguments: list[str]) -> list[str]:
    """Move flags and their values before the keys.

    Raises:
        UserError: if a flag is unknown or lacks its value.
    """
    flags: list[str] = []
    keys: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            keys.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if flag not in _FLAGS:
            raise UserError(
                f"the argument is {argument}, but there is no such flag: "
                f"{did_you_mean(flag, [name for name in _FLAGS if name.startswith('--')])}"
            )
        flags.append(flag)
        choices = _CHOICES.get(_SHORT.get(flag, flag))
        if choices is not None:
            value = value if equals else next(rest, "")
            _check_flag_value(flag, value, choices)
            flags.append(value)
    return [*flags, *keys]


def _check_flag_value(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if not value or (choices and value not in choices):
        raise UserError(
            f"the value of {flag} is {value or 'not given'}, but it must be "
            f"{' or '.join(choices) or 'the name of a section'}: write {flag} "
            f"{choices[0] if choices else 'loss'}"
        )


def quote(text: str) -> str:
    """Quote a value for Hydra's command line, where a backslash is special before a quote only."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"


def quote_non_ascii(argument: str) -> str:
    """Quote the texts of a value with letters beyond ASCII, unless they are quoted already.

    Raises:
        UserError: if the key has such letters, which cannot be quoted.
    """
    key, equals, value = argument.partition("=")
    if not key.isascii():
        raise UserError(
            f"the argument is {argument}, but keys on the command line are written in ASCII: "
            "set it in the recipe"
        )
    if value.isascii():
        return argument
    is_nested = value.startswith(("[", "{")) or value.endswith(")")
    pattern = _NESTED if is_nested else _CHOICES_OF_SWEEP
    return key + equals + "".join(map(_quote_part, pattern.findall(value)))


def _quote_part(part: str) -> str:
    return part if part.isascii() or part[0] in "'\"" else quote(part.strip())


def empty_sections(arguments: list[str]) -> dict[str, Any]:
    """Empty sections for the keys that the arguments set in sections that may be null."""
    sections: dict[str, Any] = {}
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        names, types = key.split("."), types_along(key)
        depth = len(names) if value.startswith("{") else len(names) - 1
        for count, kind in enumerate(types[:depth], 1):
            if is_optional_section(kind):
                section = sections
                for name in names[:count]:
                    section = section.setdefault(name, {})
    return sections
