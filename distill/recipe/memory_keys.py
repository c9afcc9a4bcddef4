"""Checks of the keys that save memory: `lora`, `quantize`, `offload`, `outputs=base`."""

from distill.errors import UserError
from distill.recipe.config import Run, Student, Teacher, Trainer

__all__ = ["check_memory_keys"]


def check_memory_keys(run: Run) -> None:
    """UserError if the keys that save memory exclude each other."""
    student, lora = run.student, run.student.lora
    if run.export.format == "lora" and (lora is None or student.model is None):
        missing = "student.lora" if lora is None else "student.model"
        raise UserError(
            f"export.format is lora, but {missing} is null, and an adapter belongs to a model that "
            f"has a name: set {missing}, or export.format=dense"
        )
    if run.export.format == "lora" and lora is not None and lora.quantize is not None:
        raise UserError(
            f"export.format is lora, but student.lora.quantize is {lora.quantize}, and the adapter "
            "fits weights of 4 bits, not those of its model: set export.format=dense"
        )
    quantized = {
        "student.lora.quantize": lora and lora.quantize,
        "teacher.quantize": run.teacher and run.teacher.quantize,
    }
    for key, value in quantized.items():
        if value and run.trainer.strategy == "fsdp":
            raise UserError(
                f"{key} is {value}, but trainer.strategy=fsdp shards weights of ordinary types "
                f"only: set trainer.strategy=ddp, or leave {key} out"
            )
    if run.teacher is not None and run.teacher.offload:
        _check_offload(run.teacher.outputs, run.trainer)
    if run.teacher is not None and run.teacher.outputs == "base":
        if run.trainer.compile:
            raise UserError(
                "trainer.compile is true, but teacher.outputs=base runs each block as two "
                "functions: leave trainer.compile out"
            )
        _check_base(run.student, run.teacher)


def _check_offload(outputs: str, trainer: Trainer) -> None:
    """Check that the weights of a teacher's blocks can be elsewhere between their forwards."""
    reasons = {
        "teacher.outputs=base": (outputs == "base", "trains beside the teacher's own weights"),
        "trainer.strategy=fsdp": (trainer.strategy == "fsdp", "shards the teacher already"),
        "trainer.compile=true": (trainer.compile, "compiles blocks whose weights stay in place"),
    }
    for key, (is_set, reason) in reasons.items():
        if is_set:
            raise UserError(f"teacher.offload is true, but {key} {reason}: leave one of them out")


def _check_base(student: Student, teacher: Teacher) -> None:
    """Check that the student without its adapter can be the teacher."""
    name = "teacher.outputs is base, but"
    if student.lora is None:
        raise UserError(
            f"{name} student.lora is null, and without an adapter the student has no base: "
            "set student.lora.rank, or teacher.outputs=online"
        )
    if student.model is None or student.model != teacher.model:
        raise UserError(
            f"{name} teacher.model is {teacher.model or 'null'} and student.model is "
            f"{student.model or 'null'}: name the same model, or set teacher.outputs=online"
        )
    if teacher.finetune is not None:
        raise UserError(
            f"{name} teacher.finetune is set, and the student starts from the weights before it: "
            "leave teacher.finetune out"
        )
