"""The LightningModule that trains a student.

| file | contents |
|---|---|
| `distillation.py` | one training step: batch -> logits -> rows -> loss; validation; checkpoints |
| `loss_functions.py` | divergence and terms that a recipe names, checked |
| `span_losses.py` | the loss of a batch whose teacher has another tokenizer |
| `label_loss.py` | the supervised part of the loss, with class weights |
| `student_state.py` | the student in a checkpoint: its structure, and what is trained |
| `sharded_module.py` | sharded copies of student and teacher for FSDP |
| `optimization.py` | optimizer, schedule, gradient clipping, and logging of steps |
| `low_bit_optimizer.py` | AdamW with moments of 8 bits |
| `step_losses.py` | the losses of optimizer steps, kept on the device; the first not finite |
"""

from distill.models import eval_mode
from distill.module.distillation import Distillation
from distill.module.loss_functions import resolve_divergence

__all__ = ["Distillation", "eval_mode", "resolve_divergence"]
