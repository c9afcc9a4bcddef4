import inspect
import subprocess
import sys

import pytest

from distill import targets
from distill.errors import UserError
from tests.unit import targets_to_find as places

HERE = places.__name__


@pytest.mark.parametrize("name", ["Plain", "Inherits", "Fields", "function"])
def test_the_arguments_read_from_source_are_those_of_the_signature(name):
    assert targets.parameters(f"{HERE}.{name}") == list(inspect.signature(getattr(places, name)).parameters)


def test_an_import_is_followed():
    assert targets.parameters(f"{HERE}.Loss") == list(inspect.signature(places.Loss).parameters)


def test_what_only_running_can_tell_is_left_to_running():
    assert targets.parameters(f"{HERE}.Anything") is None
    targets.check("callbacks.any", {"_target_": f"{HERE}.Anything", "whatever": 1})


def test_build_calls_the_class_with_the_keys_beside_it():
    assert targets.build({"_target_": f"{HERE}.Fields", "size": 3}).size == 3


@pytest.mark.parametrize("path", [f"{HERE}.Plian", "no.such.Module", "nodots"])
def test_a_path_that_leads_nowhere_is_refused(path):
    with pytest.raises(UserError):
        targets.check("task", {"_target_": path})


def test_checking_a_task_does_not_import_torch():
    path = "distill.tasks.SingleLabelClassification"
    code = f"import sys; from distill import targets; targets.parameters({path!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
