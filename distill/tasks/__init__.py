"""Tasks; a recipe names one as `task._target_: distill.tasks.<class>`.

| file | contents |
|---|---|
| `base.py` | :class:`Task`, the interface of a task |
| `text_reading.py` | its part that reads text columns: texts, or messages |
| `batch.py` | :class:`Batch`, the input of models and loss |
| `words.py` | texts -> token ids word by word, where words do not depend on each other |
| `collation.py` | encoded examples -> padded tensors |
| `classification.py` | one class per text |
| `multi_label.py` | any number of classes per text |
| `regression.py` | a number per text |
| `language.py` | the next token |
| `windows.py` | texts -> tokens -> windows of a language model |
| `messages.py` | cells of a column of messages -> conversations in one form |
| `chat_template.py` | conversations -> text, and where the assistant's parts lie in it |
| `conversations.py` | conversations -> windows and requests |
| `labels.py` | cells of a label column -> label names |
| `class_metrics.py` | metrics of classifiers from counts |
| `class_weights.py` | factors of the supervised loss by class |
| `serving.py` | the interface that export and evaluation use, with defaults |
| `text_classes.py`, `generation.py` | its implementations for classifiers and language models |
| `comparison.py` | how an export's predictions compare with the student's |
| `trial.py` | calls the functions of a task once, before training |
| `special_tokens.py` | special tokens of trained tokenizers |

A custom task is a subclass of `Task` under any dotted path.
"""

from distill.tasks.base import Task, build_task
from distill.tasks.batch import Batch, sum_per_example
from distill.tasks.classification import SingleLabelClassification
from distill.tasks.labels import Labels
from distill.tasks.language import CausalLanguageModelling
from distill.tasks.multi_label import MultiLabelClassification
from distill.tasks.regression import Regression
from distill.tasks.special_tokens import CLASSIFICATION_TOKENS, LANGUAGE_TOKENS

__all__ = [
    "CLASSIFICATION_TOKENS",
    "LANGUAGE_TOKENS",
    "Batch",
    "CausalLanguageModelling",
    "Labels",
    "MultiLabelClassification",
    "Regression",
    "SingleLabelClassification",
    "Task",
    "build_task",
    "sum_per_example",
]
