"""A teacher's outputs for all examples, computed once and cached.

| file | contents |
|---|---|
| `selection.py` | the recipe's `teacher.outputs` -> `TeacherOutputs` |
| `outputs.py` | `TeacherOutputs`; all logits, or the inputs of the teacher's head |
| `sparse_outputs.py` | a few tokens of the distribution: sampled, or the most likely |
| `quantized_teacher.py` | an online teacher with fewer bits per weight, and its error |
| `label_check.py` | a teacher's outputs compared with the labels |
| `class_order.py` | whether classes agree with labels, in their order or another |
| `assignment.py` | scores -> the permutation with the largest sum |
| `teacher_completions.py` | training examples whose completions the teacher writes |
| `output_cache.py` | examples -> a file of their teacher outputs, in the store |
"""

from distill.teacher_outputs.label_check import Origin, check_labels, choose_examples
from distill.teacher_outputs.output_cache import (
    OUTPUTS_FILE,
    check_disk_space,
    on_device,
    write_outputs,
)
from distill.teacher_outputs.outputs import HiddenStateOutputs, LogitOutputs, TeacherOutputs
from distill.teacher_outputs.quantized_teacher import quantize_teacher
from distill.teacher_outputs.selection import build_outputs, check_outputs
from distill.teacher_outputs.sparse_outputs import SampledOutputs, TopKOutputs
from distill.teacher_outputs.teacher_completions import TeacherCompletions

__all__ = [
    "OUTPUTS_FILE",
    "HiddenStateOutputs",
    "LogitOutputs",
    "Origin",
    "SampledOutputs",
    "TeacherCompletions",
    "TeacherOutputs",
    "TopKOutputs",
    "build_outputs",
    "check_disk_space",
    "check_labels",
    "check_outputs",
    "choose_examples",
    "on_device",
    "quantize_teacher",
    "write_outputs",
]
