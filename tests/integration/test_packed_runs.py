"""Runs with `data.packing`: the same steps as without, resumed with the same bytes, refusals."""

import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from distill import student, teacher
from distill.errors import UserError
from distill.stages import Stages
from distill.train import train
from distill.training import checkpoints
from distill.training.loggers import Tracker
from tests.worlds import LLAMA, few, tiny

SHORT = {"max_steps": 6, "validations": 2, "accumulate": 2, "checkpoint": {"steps": 1}}


class Plug(BaseException):
    """Pulled."""


def trained(made, packing, folder):
    """The weights after the student stage."""
    run = replace(made.run, data=replace(made.run.data, packing=packing))
    prepared = teacher.with_outputs(run, made.prepared, made.model().eval())
    with Stages()("student"):
        student.train_student(run, prepared, made.model().eval(), [], folder, Tracker(run, folder))
    return load_file(folder / "student/model.safetensors")


@pytest.mark.parametrize("outputs", ["online", "top_k"])
def test_a_packed_run_takes_the_steps_of_a_padded_one_and_resumes_with_the_same_bytes(
    outputs, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    made = few(**LLAMA | {"teacher": LLAMA["teacher"] | {"outputs": outputs}, "trainer": SHORT})
    padded, packed = (trained(made, packing, tmp_path / str(packing)) for packing in (False, True))
    assert "packing" in caplog.text
    seen = checkpoints.PerBatchSeed.on_train_batch_start

    def pulled(self, trainer, *rest):
        if trainer.global_step == 3:
            raise Plug
        seen(self, trainer, *rest)

    with monkeypatch.context() as patch, pytest.raises(Plug):
        patch.setattr(checkpoints.PerBatchSeed, "on_train_batch_start", pulled)
        trained(made, True, tmp_path / "cut")
    resumed = trained(made, True, tmp_path / "cut")
    for name, tensor in packed.items():
        torch.testing.assert_close(tensor, padded[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(resumed[name], tensor)


def test_a_classifier_and_a_family_that_mixes_examples_are_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="data.packing is true.*SingleLabelClassification"):
        train(tiny(data={"source": "distill.corpora.generated", "packing": True}), tmp_path / "a")
    bloom = {"model_type": "bloom", "hidden_size": 16, "n_layer": 2, "n_head": 2}
    run = tiny(
        **LLAMA | {"teacher": {"config": bloom}, "data": {"label": None, "packing": True}},
        student={"layers": [0]},
    )
    with pytest.raises(UserError, match="data.packing is true.*bloom"):
        train(run, tmp_path / "b")
