"""The LightningModule that trains a student.

| file | contents |
|---|---|
| `distillation.py` | one training step: batch -> logits -> rows -> loss; validation; checkpoints |
| `optimization.py` | optimizer, schedule, gradient clipping, and logging of steps |
"""

from distill.module.distillation import Distillation, eval_mode, resolve_divergence

__all__ = ["Distillation", "eval_mode", "resolve_divergence"]
