"""Commands: the subcommands of `distill`, exit codes, and what is not printed."""

import importlib.metadata
import os
import subprocess
import sys
import textwrap
import tomllib

import pytest

import distill
from distill import __main__ as command
from distill.cli import cli_command
from distill.errors import RunFailed, Stopped, UserError
from tests.processes import ROOT


def called(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of `distill` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["distill", *arguments])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    code = 0
    try:
        command.main()
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_subcommands(arguments, monkeypatch, capsys):
    code, out, err = called(monkeypatch, capsys, *arguments)
    assert (code, err) == (0, "")
    assert all(f"\n  {name} " in out for name in ("train", "evaluate", "export"))


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    expected = importlib.metadata.version("distill")
    assert called(monkeypatch, capsys, "--version") == (0, f"{expected}\n", "")
    assert distill.__version__ == expected


def test_another_subcommand_is_one_sentence(monkeypatch, capsys):
    code, out, err = called(monkeypatch, capsys, "trian", "recipe=tiny")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("distill: the command is trian, ") and "train, evaluate, export" in err


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_a_subcommand_gets_the_other_arguments(name, monkeypatch, capsys):
    code, out, _ = called(monkeypatch, capsys, name, "--help")
    assert code == 0 and f"distill {name} run=" in out.replace(f"distill.{name}", f"distill {name}")
    code, _, err = called(monkeypatch, capsys, name, "nonsense=1")
    assert code == 2 and err.startswith("distill: nonsense is given")


def test_the_installed_script_is_this_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"distill": f"{command.__name__}:main"}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a is b, but c: d"), 2, "a is b, but c: d"),
        (RunFailed("a is b, but c: d"), 1, "a is b, but c: d"),
        (OSError(28, "No space left on device", "/full"), 1, "/full cannot be used (No space"),
        (Stopped("ended by SIGTERM: continue", 75), 75, "ended by SIGTERM: continue"),
        (KeyboardInterrupt(), 130, "interrupted: "),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(error, code, message, monkeypatch, capsys):
    @cli_command
    def fails():
        raise error

    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as exit:
        fails()
    err = capsys.readouterr().err
    assert (exit.value.code, err.count("\n")) == (code, 1)
    assert err.startswith(f"distill: {message}")


def printed(body):
    """Stdout and stderr of a new process that runs `body` as a command of a user."""
    program = "from distill.cli import cli_command\n@cli_command\ndef main():\n"
    program += textwrap.indent(textwrap.dedent(body), "    ") + "\nmain()\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", None)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout, done.stderr


def test_a_refused_recipe_imports_no_torch():
    out, err = printed(
        """
        import sys
        from distill import __main__
        sys.argv = ["distill", "train", "recipe=tiny", "trainer.devicess=2"]
        try:
            __main__.main()
        finally:
            print("torch" in sys.modules)
        """
    )
    assert out == "False\n" and "trainer.devicess" in err


@pytest.mark.slow
def test_torchao_prints_nothing():
    pytest.importorskip("torchao")
    assert printed("import torchao.quantization; from transformers import BertModel") == ("", "")
