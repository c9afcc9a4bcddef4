"""Bad input from the command line: exit code 2, one sentence, no traceback, nothing left behind."""

import pytest

from distill.recipe import config, help
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


@pytest.mark.parametrize(("arguments", "words"), BEFORE_TORCH, ids=lambda value: " ".join(value))
def test_a_wrong_recipe_is_answered_before_torch_is_loaded(arguments, words, tmp_path):
    # the current folder comes first on the path
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code, _, err = call("train", *arguments, cwd=tmp_path)
    assert code == 2, err
    assert_one_sentence(err, *words)
    assert not list(tmp_path.glob("runs/tiny/*"))


def test_what_only_data_and_models_can_tell_is_answered_as_shortly(tmp_path):
    code, _, err = call("train", "recipe=tiny", "teacher.config.hiden_size=3", cwd=tmp_path)
    assert code == 2, err
    assert_one_sentence(err, "hiden_size", "hidden_size")


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
