"""Serving of text classification, with one row of logits per text; see serving.py."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from distill.tasks.comparison import Comparison, NotComparableError
from distill.tasks.serving import Serving

if TYPE_CHECKING:
    from distill.tasks.batch import Batch

EXAMPLE = """from transformers import pipeline

classify = pipeline("text-classification", model="path/of/this/folder"{options})
print(classify({request}, truncation=True))"""


class TextClassification(Serving):
    """Requests are texts or pairs of texts; the pipeline returns a logit for each label."""

    pipeline = "text-classification"
    proof = "classify"
    example = EXAMPLE

    def proof_requests(
        self, cells: list[list[str]], batches: Sequence["Batch"], tokenizer: Any
    ) -> list[Any]:
        """The texts alone: the pipeline tokenizes them."""
        return cells

    def compare(
        self,
        answers: Sequence[dict[str, Any]],
        batches: Sequence["Batch"],
        logits: Iterable[Any],
        model_config: Any,
    ) -> Comparison:
        """Compare logits by the name of their label, which also checks the order of the names."""
        names = list(self.names) or [
            model_config.id2label[label_id] for label_id in range(model_config.num_labels)
        ]
        if set(answers[0]["logits"]) != set(names):
            raise NotComparableError(
                f"its labels are {', '.join(sorted(answers[0]['logits']))}, "
                f"and the student's are {', '.join(sorted(names))}"
            )
        export_NC = torch.tensor([[answer["logits"][name] for name in names] for answer in answers])
        return self.compare_rows(export_NC, torch.cat(list(logits)))
