"""Wrong input of every kind is refused in one sentence, or accepted; see tests/bad_input.py."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import bad_input

# Readers of damaged files leave them to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LIMITS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def check(kind, examples):
    function, strategies = bad_input.KINDS[kind]

    @settings(max_examples=examples, derandomize=True, phases=[Phase.generate], **LIMITS)
    @given(st.tuples(*strategies))
    def law(arguments):
        assert function(*arguments) in ("accepted", "refused")

    law()


@pytest.mark.parametrize("kind", bad_input.KINDS)
def test_input_is_accepted_or_refused_in_a_sentence(kind):
    check(kind, examples=3)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", bad_input.KINDS)
def test_much_input_is_accepted_or_refused_in_a_sentence(kind):
    check(kind, examples=500)


def test_what_is_damaged_was_accepted_before():
    assert bad_input.try_recipe("tiny", []) == "accepted"
    assert bad_input.try_command_line([]) == "accepted"
    assert bad_input.try_damaged_recipe("language", lambda content: content) == "accepted"
    assert bad_input.try_damaged_data("csv.gz", "number", lambda content: content) == "accepted"
    assert bad_input.try_settings({}, "several labels") == "accepted"
    assert bad_input.try_config("llama", {}) == "accepted"


@pytest.mark.parametrize("word", ["recipe=tiny,tiny", "seed=1,2"])
def test_several_values_without_a_sweep_are_one_sentence(word):
    assert bad_input.try_command_line([word]) == "refused"


@pytest.mark.parametrize("error", [TypeError("x"), RecursionError(), KeyError("x")], ids=repr)
def test_a_traceback_breaks_the_law(error):
    def use():
        raise error

    with pytest.raises(bad_input.BrokenLawError, match=type(error).__name__):
        bad_input.answer(use)
