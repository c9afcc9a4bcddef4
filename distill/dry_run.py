"""Dry run: what training and export would refuse, found before the teacher is trained.

Teacher and student are built on the meta device, from their configs and without weights, and go
through the checks of the stages after the teacher. A student that is named is loaded once.
"""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import models, packing, student, teacher_outputs
from distill.callbacks.compression import compressions, prefix_with_key
from distill.errors import RunFailed, UserError
from distill.models import adapters, frozen_weights
from distill.models.random_models import from_config
from distill.models.tiny_models import tiny_config
from distill.module import Distillation
from distill.module.distillation import PARTS
from distill.prepare import Prepared, end_of_replies
from distill.processes import ranks
from distill.recipe import capabilities, config
from distill.tasks.trial import check_monitors, try_task

log = logging.getLogger(__name__)

_SHRINKING = ("structure", "factors", "vocabulary")  # stages of techniques that remove parameters


@dataclass(frozen=True)
class DryRun:
    """The checks of a recipe and its data, before any model is loaded.

    Args:
        run: the recipe.
        prepared: its data and tokenizer.
        callbacks: its callbacks, bound to the data.
        steps: optimizer steps of the student's training.
    """

    run: config.Run
    prepared: Prepared
    callbacks: list[Callback]
    steps: int

    def check(self) -> None:
        """Go through the checks that need no weights.

        Raises:
            UserError: if training or export would refuse the recipe.
        """
        run = self.run
        with ranks.single_process(), _silent_log():  # only rank zero is here
            teacher = self._teacher()
            if teacher is not None and run.teacher is not None:
                with _skip_if_impossible("teacher.outputs"):
                    self._check_outputs(run.teacher, teacher)
                    self._check_end(run.teacher, teacher)
                read = self.prepared.for_teacher()
                self._check_runs("teacher", run.teacher.config, teacher, read)
            self._check_task()
            self._check_streaming()
            with _skip_if_impossible("student"):
                trained = self._student(teacher)
                self._check_runs("student", run.student.config, trained, self.prepared)
                self._check_format(trained)
                self._check_packing(trained, teacher)
                self._check_training(trained, teacher)
                if teacher is not None:
                    self._check_smaller(trained, teacher)
                if run.student.lora is not None:
                    adapters.attach(trained, run.student.lora)

    def _check_runs(
        self,
        role: str,
        spec: dict[str, Any] | None,
        model: PreTrainedModel,
        prepared: Prepared,
    ) -> None:
        """Run a random model on a text of the greatest length."""
        with _skip_if_impossible(f"{role}.config"):
            if spec is not None:
                models.check_length(model, prepared.task.max_length, role)
                models.check_runs(model, spec, prepared.task, role, prepared.tokenizer)

    def _check_outputs(self, spec: config.Teacher, teacher: PreTrainedModel) -> None:
        """Check the form of the teacher's outputs on a narrow model of its config."""
        read = self.prepared.for_teacher()
        teacher_outputs.check_outputs(spec, read.task)
        if spec.offload:
            models.blocks(teacher)
        if spec.quantize is not None:
            frozen_weights.quantizable_layers(teacher, spec.quantize)
        if spec.outputs in ("cached", "online", "base") or not self.run.loss.needs_teacher:
            return
        narrow = from_config(tiny_config(teacher.config)[0], read.task)
        tokens, loss = models.vocabulary_size(read.tokenizer), self.run.loss
        teacher_outputs.build_outputs(
            spec, narrow, read.task, loss.temperature, tokens, self.run.seed
        )

    def _check_end(self, spec: config.Teacher, teacher: PreTrainedModel) -> None:
        """Check that replies in the data end as the teacher's; fine-tuning would teach it."""
        if spec.finetune is None and not spec.writes and self.run.loss.needs_teacher:
            read = self.prepared.for_teacher()
            models.check_end(teacher, end_of_replies(read), read.tokenizer)

    def _check_task(self) -> None:
        """Call the functions of the task, and find metrics that callbacks monitor in vain."""
        made, loss = self.prepared, self.run.loss
        with _skip_if_impossible("task"):
            examples = made.examples["train"]
            first = [examples[index] for index in range(min(3, len(examples)))]
            metrics = try_task(made.task, first, made.tokenizer.pad_token_id)
            check_monitors(self.callbacks, metrics, [*PARTS, *loss.terms])

    def _check_streaming(self) -> None:
        """Check that no technique needs all texts."""
        for technique in compressions(self.callbacks):
            if self.prepared.stream is not None and technique.stage == "vocabulary":
                raise UserError(
                    f"data.streaming is true, but {technique.name} needs the texts of the whole "
                    "training split: leave it out, or set data.streaming=false"
                )

    def _check_packing(self, trained: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Check that the task, and the models that read training batches, need no padding."""
        task, spec = self.prepared.task, self.run.teacher
        if not self.run.data.packing:
            return
        if not (task.selects_positions and task.predicts_tokens):
            raise UserError(
                f"data.packing is true, but {type(task).__name__} does not predict the tokens of "
                "a language model: set data.packing=false"
            )
        models.check_packing(trained.config)
        if spec is not None and teacher is not None and (spec.outputs == "online" or spec.finetune):
            models.check_packing(teacher.config)

    def _teacher(self) -> PreTrainedModel | None:
        spec = self.run.local_teacher
        with _skip_if_impossible("teacher"):
            if spec is not None:
                read = self.prepared.for_teacher()
                return models.skeleton(
                    spec.model, spec.config, read.task, "teacher", read.tokenizer
                )
        return None

    def _student(self, teacher: PreTrainedModel | None) -> PreTrainedModel:
        with models.without_weights():
            built, _ = student.build_student(self.run.student, self.prepared, teacher)
        return built

    def _check_format(self, trained: PreTrainedModel) -> None:
        with _skip_if_impossible("export.format"):
            quantized = student.quantized_tensors(trained, self.callbacks)
            packing.check_format(self.run.export, trained, self.prepared.tokenizer, *quantized)

    def _check_training(self, trained: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """The loss with its terms, and the techniques, on a student that is never trained."""
        run, techniques = self.run, copy.deepcopy(compressions(self.callbacks))
        online = run.teacher is not None and run.teacher.outputs == "online"
        weights = self.prepared.class_weights
        loss = replace(run.loss, chunk=0, class_weights=weights)  # a chunk would run the student
        with _skip_if_impossible("loss"):
            module = Distillation(
                self.prepared.task,
                trained,
                teacher if online else None,
                loss,
                run.optimizer,
                self.steps,
            )
            trainer: Any = SimpleNamespace(
                max_steps=self.steps, callbacks=techniques, optimizers=[], world_size=1
            )
            module.trainer = trainer
            for technique in techniques:
                with _skip_if_impossible(technique.name), prefix_with_key(technique.name):
                    technique.prepare(module)
            for _, term in module.named_terms():
                term.detach()

    def _check_smaller(self, trained: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Check by arithmetic that the export will take fewer bytes than the teacher."""
        settings, spec = self.run.export, self.run.teacher
        shrinks = any(each.stage in _SHRINKING for each in compressions(self.callbacks))
        if settings.format is None or not settings.smaller or shrinks or spec is None:
            return
        size = stored_bytes(trained, settings)
        limit = None
        if spec.finetune is None and spec.model is not None:
            limit = file_bytes(Path(models.resolve_path(spec.model, "teacher.model")))
        limit = limit or sum(tensor.nbytes for tensor in stored_tensors(teacher))
        if size is not None and size >= limit:
            raise UserError(
                f"export.smaller is true, but the student's weights take {size:,} bytes as "
                f"{settings.format} in {settings.stored_dtype}, and its teacher's {limit:,}: "
                "set export.smaller=false to allow it, train a smaller student, or set "
                "export.format=packed and export.quantize=weights"
            )


def stored_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors of a model that are saved, tied ones once."""
    saved = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    return [*model.parameters(), *buffers]


def stored_bytes(model: PreTrainedModel, settings: config.Export) -> int | None:
    """The least number of bytes that the weights of a model take in an export.

    Returns:
        Without the headers of files; None if it depends on the trained weights.
    """
    runtime = settings.format in capabilities.RUNTIMES
    if settings.format != "dense" and (not runtime or settings.quantize is not None):
        return None
    tensors = _used_tensors(model) if runtime else stored_tensors(model)
    if tensors is None:
        return None
    size = getattr(torch, settings.stored_dtype).itemsize
    return sum(
        tensor.numel() * (size if tensor.is_floating_point() else tensor.itemsize)
        for tensor in tensors
    )


@torch.no_grad()
def _used_tensors(model: PreTrainedModel) -> Iterable[Tensor] | None:
    """The parameters of the modules that a forward pass runs; None if it needs weights."""
    used: dict[int, Tensor] = {}

    def add(module: nn.Module, _: Any) -> None:
        used.update({id(each): each for each in module.parameters(recurse=False)})

    handles = [module.register_forward_pre_hook(add) for module in model.modules()]
    try:
        tokens = torch.ones(1, 4, dtype=torch.long, device=model.device)
        models.logits(model, {"input_ids": tokens, "attention_mask": tokens})
    except Exception:  # noqa: BLE001 its size is checked when it is written
        return None
    finally:
        for handle in handles:
            handle.remove()
    return used.values()


def file_bytes(folder: Path) -> int | None:
    """Bytes of the tensors in a folder's safetensors files, without headers; None without any."""
    sizes = []
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        sizes.append(file.stat().st_size - 8 - header)
    return sum(sizes) or None


@contextmanager
def _silent_log() -> Iterator[None]:
    """Log nothing but skipped checks: the stages log the same when they run."""
    logger = logging.getLogger("distill")
    levels = logger.level, log.level
    log.setLevel(logger.getEffectiveLevel())
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(levels[0])
        log.setLevel(levels[1])


@contextmanager
def _skip_if_impossible(part: str) -> Iterator[None]:
    """Leave a check to its stage where it needs the values of weights."""
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:  # noqa: BLE001 a dry run stops no run that may work
        log.debug("%s is checked when it is built: %s", part, error)
