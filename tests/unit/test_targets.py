import inspect
import subprocess
import sys

import pytest

from distill.errors import UserError
from distill.recipe import targets
from tests.unit import targets_to_find as places

HERE = places.__name__


@pytest.mark.parametrize("name", ["Plain", "Inherits", "Fields", "function"])
def test_the_arguments_read_from_source_are_those_of_the_signature(name):
    arguments = inspect.signature(getattr(places, name)).parameters
    required = [key for key, parameter in arguments.items() if parameter.default is parameter.empty]
    assert targets.read_signature(f"{HERE}.{name}") == (list(arguments), required)


def test_an_import_is_followed():
    assert targets.read_signature(f"{HERE}.Loss").names == list(
        inspect.signature(places.Loss).parameters
    )


def test_what_only_running_can_tell_is_left_to_running():
    assert targets.read_signature(f"{HERE}.Anything") is None
    targets.check_target("callbacks.any", {"_target_": f"{HERE}.Anything", "whatever": 1})


def test_build_calls_the_class_with_the_keys_beside_it():
    assert targets.instantiate("task", {"_target_": f"{HERE}.Fields", "size": 3}, object).size == 3


@pytest.mark.parametrize("path", [f"{HERE}.Plian", "no.such.Module", "nodots"])
def test_a_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(UserError):
        targets.check_target("task", {"_target_": path})


def test_checking_a_task_does_not_import_torch():
    path = "distill.tasks.SingleLabelClassification"
    code = f"from distill.recipe import targets; targets.read_signature({path!r})"
    code += "; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_argument_is_named():
    with pytest.raises(UserError, match=r"callbacks\.plain\.first is not given"):
        targets.check_target("callbacks.plain", {"_target_": f"{HERE}.Plain", "second": 1})


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, ZeroDivisionError])
def test_a_constructor_that_raises_is_one_sentence(error, monkeypatch):
    class Refuses:
        def __init__(self, **_):
            raise error("no such thing")

    monkeypatch.setattr(places, "Plain", Refuses)
    with pytest.raises(UserError, match="no such thing"):
        targets.instantiate("task", {"_target_": f"{HERE}.Plain", "first": "x"}, Refuses)


def test_only_subclasses_of_the_base_are_called():
    with pytest.raises(UserError, match=r"task is .*Plain.*no subclass of"):
        targets.instantiate("task", {"_target_": f"{HERE}.Plain", "first": 1}, dict)


def test_a_function_must_accept_the_arguments():
    assert targets.import_function("loss.divergence", f"{HERE}.function", "x", "y")
    with pytest.raises(UserError, match=r"loss\.divergence is .*function"):
        targets.import_function("loss.divergence", f"{HERE}.function", "x")
    with pytest.raises(UserError, match=r"data\.source is .*Plain"):
        targets.import_function("data.source", f"{HERE}.Plain", "x")
