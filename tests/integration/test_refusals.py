"""Bad input from the command line: exit code 2, one sentence, no traceback, nothing left behind."""

import pytest

from distill.recipe import config, help
from tests.grids import sampled
from tests.integration.commands import assert_one_sentence, call

BEFORE_TORCH = [
    ([], ["recipe", "tiny"]),
    (["recipe=tinny"], ["recipe is tinny", "did you mean tiny?"]),
    (["recipe=nowhere.yaml"], ["recipe is nowhere.yaml"]),
    (["recipe=tiny", "loss.alhpa=0.1"], ["loss.alhpa", "did you mean alpha?"]),
    (["recipe=tiny", "optimizer.lrr=1"], ["optimizer.lrr", "did you mean lr?"]),
    (["recipe=tiny", "+gamma=1"], ["gamma"]),
    (["recipe=tiny", "loss.alpha=1.5"], ["loss.alpha is 1.5"]),
    (["recipe=tiny", "optimizer.lr=fast"], ["optimizer.lr", "'fast'"]),
    (["recipe=tiny", "task.max_lenght=3"], ["task.max_lenght", "did you mean max_length?"]),
    (
        ["recipe=tiny", "task._target_=distill.tasks.Clasification"],
        ["Clasification", "did you mean"],
    ),
    (["recipe=tiny", "loss.divergence=forward"], ["distill.losses", "did you mean forward_kl"]),
    (
        ["recipe=tiny", "loss.terms.a._target_=distill.terms.HiddenState"],
        ["did you mean HiddenStates?"],
    ),
    (["recipe=tiny", "teacher=null"], ["student.layers is [0, 2]"]),
    (["recipe=tiny", "nonsense"], ["nonsense"]),
    (["-m", "recipe=tiny", "loss.alpha=2,3"], ["loss.alpha is 2"]),
]


@pytest.mark.parametrize(
    ("arguments", "words"), sampled(BEFORE_TORCH, rest="slow"), ids=lambda value: " ".join(value)
)
def test_a_wrong_recipe_is_answered_before_torch_is_loaded(arguments, words, tmp_path):
    # the current folder comes first on the path
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code, _, err = call("train", *arguments, cwd=tmp_path)
    assert code == 2, err
    assert_one_sentence(err, *words)
    assert not list(tmp_path.glob("runs/tiny/*"))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("teacher.config.hiden_size=3", ["hiden_size", "hidden_size"]),
        pytest.param("student.layers=[0,9]", ["student.layers", "9"], marks=pytest.mark.slow),
    ],
)
def test_what_only_data_and_models_can_tell_is_answered_as_shortly(argument, words, tmp_path):
    code, _, err = call("train", "recipe=tiny", argument, cwd=tmp_path)
    assert code == 2, err
    assert_one_sentence(err, *words)
    assert not (tmp_path / "runs").exists()


NOISY = """
import logging
import warnings

from lightning.pytorch.callbacks import Callback
from transformers import GenerationConfig

from distill.errors import UserError


class Noisy(Callback):
    def on_fit_start(self, trainer, module):
        GenerationConfig(temperature=0.5)  # transformers logs that it has no effect
        warnings.warn("a warning")
        logging.getLogger(__name__).warning("a line of the user's own code")
        raise UserError("thing is 1, but it must be 2: set it")
"""


def test_lines_of_libraries_are_in_the_log_of_the_run_and_not_on_the_terminal(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    code, out, err = call(
        *("train", "recipe=tiny", "+callbacks.noisy._target_=noisy.Noisy", "hydra.run.dir=run"),
        "teacher.finetune.epochs=0.1",
        cwd=tmp_path,
    )
    assert code == 2, err
    log = (tmp_path / "run" / "train.log").read_text()
    for line in ("generation flags", "a warning"):
        assert line in log
        assert line not in out + err
    assert "a line of the user's own code" in err
    assert "Error" not in err and "Warning" not in err
    lines = [line for line in err.splitlines() if "%|" in line or "it/s" in line]
    assert lines == []


def test_a_refusal_takes_nothing_away_from_a_folder_that_was_there(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, _, err = call("train", "recipe=tiny", "loss.alpha=2", "hydra.run.dir=mine", cwd=tmp_path)
    assert code == 2, err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_help_lists_recipes_and_keys(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code, out, err = call("train", "--help", cwd=tmp_path)
    assert code == 0, err
    assert all(word in out for word in ("bert_to_distil", "tiny", "alpha: 0.5", "max_steps: null"))
    assert help.field_docs(config.Trainer)["max_steps"] in out


def test_the_traceback_is_there_for_those_who_ask(tmp_path):
    code, _, err = call(
        "train", "recipe=tiny", "loss.alpha=1.5", cwd=tmp_path, HYDRA_FULL_ERROR="1"
    )
    assert code == 1
    assert "Traceback" in err
    assert "loss.alpha is 1.5" in err
