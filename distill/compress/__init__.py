"""Compression as functions of weights and statistics, independent of a trainer.

The callbacks in `distill/callbacks` apply them during training.

| file | contents |
|---|---|
| `schedule.py` | the share of a technique's target at each training step |
| `observe.py` | statistics of module inputs, accumulated during training |
| `layer_patterns.py` | patterns of names in a recipe -> layers of a student |
| `structure.py` | neurons, attention heads and blocks as slices of parameters, and their removal |
| `widths.py` | widths of a pruned student -> the keys of its config |
| `proofs.py` | what a family must fulfill before a technique changes it |
| `importance.py` | which neurons, heads and blocks to remove |
| `low_rank.py` | a weight -> two factors |
| `scores.py`, `masks.py` | which individual weights to prune |
| `quantizable.py` | which layers are quantized |
| `quantizer.py`, `codebook.py` | weight -> quantized weight: linear, nf4, codebook |
| `groups.py` | the recipe's `group`: which weights share a scale |
| `fake_quant.py` | layers that quantize their weights and inputs while they train |
| `tokenizer_trim.py` | a tokenizer and a model without some of their tokens |
| `restore.py` | the structure of a compressed student, restored before its checkpoint is loaded |
"""

from distill.compress.quantizer import QuantSpec, fake_quantize_weight, quantize_weight
from distill.compress.restore import restore_structure, strip_quantization
from distill.compress.schedule import Schedule

__all__ = [
    "QuantSpec",
    "Schedule",
    "fake_quantize_weight",
    "quantize_weight",
    "restore_structure",
    "strip_quantization",
]
