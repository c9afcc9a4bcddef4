"""The kinds of problem, as `task._target_` names them."""

from distill.tasks.base import Batch, Task, sum_per_example
from distill.tasks.classification import (
    MultiLabelClassification,
    Regression,
    SingleLabelClassification,
)
from distill.tasks.language import CausalLanguageModelling

__all__ = [
    "Batch",
    "CausalLanguageModelling",
    "MultiLabelClassification",
    "Regression",
    "SingleLabelClassification",
    "Task",
    "sum_per_example",
]
