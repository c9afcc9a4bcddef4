"""What to remove, how to round, and how to write less: functions of weights and of statistics, which know no trainer.

| file | what it owns |
|---|---|
| `schedule.py` | how far a technique has come at each step |
| `observe.py` | what passes through modules in training -> a statistic of each |
| `structure.py` | neurons, heads and blocks as slices of parameters: masked, removed, declared in the config |
| `importance.py` | which of them matter least |
| `low_rank.py` | a matrix as the product of two |
| `scores.py`, `masks.py` | which single weights go |
| `quantize.py`, `codebook.py` | weight -> codes on a grid, or in a codebook |
| `quantized.py` | layers that compute with quantized weights while their latent weights train |
| `vocabulary.py` | a tokenizer and a model without some tokens |
| `rebuild.py` | a fresh student -> the form that a checkpoint describes |
"""
