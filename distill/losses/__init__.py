"""Losses as pure functions of tensors.

| file | contents |
|---|---|
| `divergences.py` | losses of logits, hidden states and attention; all are exported here |
| `chunked.py` | the loss of a language model, computed without storing all logits |
| `chunk_loss.py` | the loss of one chunk and its gradient, by a kernel or by autograd |
| `chunk_sizes.py` | how many rows of logits are in memory at once |
| `products.py` | products of bfloat16 and float16 factors with a float32 result |
| `fused.py` | which losses a GPU computes in one kernel, and whether it does so correctly |
| `kernels.py` | that kernel, in Triton |
| `spans.py` | losses between models of different tokenizers, over spans of the same bytes |
| `sparse.py` | a teacher's distribution as a few of its tokens |

`loss.divergence` in a recipe is the name of a function of this package, or the dotted path of
another function with the arguments `(student_NC, teacher_NC, temperature)`.
"""

from distill.losses.divergences import (
    ANY_OF_C,
    IGNORED,
    MAX_LOGIT,
    NUMBERS,
    ONE_OF_C,
    binary_cross_entropy,
    cross_entropy,
    distillation,
    forward_kl,
    hidden_cosine,
    hidden_mse,
    jensen_shannon,
    logit_mse,
    mean_over,
    relation_kl,
    reverse_kl,
    sigmoid_kl,
    skew_kl,
    sparse_kl,
    squared_error,
    total_variation,
)
from distill.losses.spans import span_kl, uld

__all__ = [
    "ANY_OF_C",
    "IGNORED",
    "MAX_LOGIT",
    "NUMBERS",
    "ONE_OF_C",
    "binary_cross_entropy",
    "cross_entropy",
    "distillation",
    "forward_kl",
    "hidden_cosine",
    "hidden_mse",
    "jensen_shannon",
    "logit_mse",
    "mean_over",
    "relation_kl",
    "reverse_kl",
    "sigmoid_kl",
    "skew_kl",
    "span_kl",
    "sparse_kl",
    "squared_error",
    "total_variation",
    "uld",
]
