"""The supervised part of the loss, with a factor for each class where the recipe has them."""

from typing import Any

import torch
from torch import Tensor, nn

from distill.tasks.base import Task


class LabelLoss(nn.Module):
    """Loss of each row against its label, (N,).

    Args:
        task: bound to its labels.
        class_weights: `loss.class_weights` of the recipe; the weights are in no checkpoint.
    """

    def __init__(self, task: Task, class_weights: Any) -> None:
        super().__init__()
        self.task = task
        weights = task.class_weights(class_weights, None)
        self.weights_C: Tensor | None
        self.register_buffer(
            "weights_C", None if weights is None else torch.tensor(weights), persistent=False
        )

    def forward(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        if self.weights_C is None:
            return self.task.label_loss(logits_NC, labels)
        weights_C = self.weights_C.to(logits_NC.device)  # FSDP may leave it on the CPU
        return self.task.weighted_label_loss(logits_NC, labels, weights_C)
