"""A teacher's distribution over a large vocabulary as a few tokens: sampled, or the most likely.

    KL(p || q) = sum_v p_v log p_v - sum_v p_v log q_v = -H(p) + E_{v ~ p}[-log q_v]

The gradient with respect to the student's logits, q - p, is linear in p. So random weights with
expectation p give an unbiased estimate of the gradient of the full KL.

N = rows, V = vocabulary, K = stored tokens of a row, M = stored tokens of all rows.
"""

import numpy as np
import torch
from torch import Tensor

BITS = 6  # bits of a stored integer that hold the count minus 1; the other 18 hold the token
BYTES = 3  # bytes of a stored integer
DRAWS = 1 << BITS  # largest count
TOKENS = 1 << 8 * BYTES - BITS  # largest vocabulary


def sample_counts(
    logits_NV: Tensor, temperature: float, draws: int, offset_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw tokens from softmax(logits / T) by systematic sampling (Madow and Madow 1944).

    The draws of a row are evenly spaced on its cumulative distribution. A count has the expectation
    draws * p and differs from it by less than 1; counts of independent draws (Anshumann et al.
    2025, "Sparse Logit Sampling") have a far larger variance for likely tokens.

    Args:
        logits_NV: Logits.
        temperature: T.
        draws: Draws per row, at most DRAWS.
        offset_N: Position of the first draw in units of 1 / draws, uniform in [0, 1).

    Returns:
        Counts, (N, V), int32, and the entropy of the distribution, (N,), float32, in nats.
    """
    log_p = (logits_NV.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    cumulative = p.cumsum(-1).clamp(max=1)
    cumulative[:, -1] = 1
    passed = (draws * cumulative + offset_N.double()[:, None]).floor().clamp(max=draws)
    counts = passed.diff(prepend=torch.zeros_like(passed[:, :1])).int()
    return counts, -(p * log_p.nan_to_num(neginf=0)).sum(-1).float()


def encode_counts(counts_NV: Tensor, draws: int) -> Tensor:
    """The drawn tokens with their counts as 24-bit integers, padded with -1, (N, draws)."""
    row_M, token_M = counts_NV.nonzero(as_tuple=True)
    place_M = torch.arange(len(row_M), device=row_M.device) - torch.searchsorted(row_M, row_M)
    encoded = torch.full((len(counts_NV), draws), -1, dtype=torch.int32, device=row_M.device)
    encoded[row_M, place_M] = ((token_M << BITS) + counts_NV[row_M, token_M] - 1).int()
    return encoded


def pack_counts(encoded: np.ndarray) -> np.ndarray:
    """The bytes of encoded counts without padding, row by row, (3 * M,)."""
    return np.ascontiguousarray(
        encoded[encoded >= 0].astype("<i4").view(np.uint8).reshape(-1, 4)[:, :BYTES]
    ).reshape(-1)


def unpack_counts(content: np.ndarray, rows: int) -> tuple[Tensor, Tensor]:
    """Invert :func:`pack_counts`.

    The ends of rows are not stored: the counts of each row have the same sum.

    Args:
        content: Bytes, (3 * M,).
        rows: N.

    Returns:
        Tokens, (N, K), and their counts divided by the draws, (N, K), padded with 0.
    """
    encoded_M = np.pad(content.reshape(-1, BYTES), ((0, 0), (0, 4 - BYTES))).view("<i4")[:, 0]
    counts_M = (encoded_M & DRAWS - 1) + 1
    ends_M = counts_M.cumsum()
    draws = ends_M[-1] // rows
    row_M = (ends_M - 1) // draws
    place_M = np.arange(len(row_M)) - np.searchsorted(row_M, row_M)
    shape = rows, place_M.max() + 1
    ids_NK, probs_NK = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    ids_NK[row_M, place_M], probs_NK[row_M, place_M] = encoded_M >> BITS, counts_M / draws
    return torch.from_numpy(ids_NK), torch.from_numpy(probs_NK)


def top_k(logits_NV: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely tokens and their probabilities at temperature T, both (N, k).

    The probabilities are normalized: all other tokens have probability 0.
    """
    log_p, ids_NK = (
        (logits_NV.float() / temperature)
        .log_softmax(-1)
        .topk(min(k, logits_NV.shape[-1]), sorted=True)
    )
    return ids_NK.int(), log_p.softmax(-1)
