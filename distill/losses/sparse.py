"""A teacher's distribution over a large vocabulary as a few tokens of it: drawn without bias, or the likeliest ones.

    KL(p || q) = sum_v p_v log p_v - sum_v p_v log q_v = -H(p) + E_{v ~ p}[-log q_v]

Its gradient, q - p, is linear in p: whatever weights w have the expectation p give the whole KL's gradient in expectation.

N = rows, V = vocabulary, K = tokens that are kept of a row, M = those of all rows.
"""

import numpy as np
import torch
from torch import Tensor

BITS = 6  # of a stored number that hold a count, less one; the other 18 hold the token
BYTES = 3  # of that number
DRAWS = 1 << BITS  # the most that can be counted
TOKENS = 1 << 8 * BYTES - BITS  # the largest vocabulary that can be stored


def sample_counts(
    logits_NV: Tensor, temperature: float, draws: int, offset_N: Tensor
) -> tuple[Tensor, Tensor]:
    """How often each token comes in `draws` draws from softmax(logits / T), (N, V), and the entropy of that in nats, (N,).

    The draws of a row are evenly spaced on its cumulated distribution, the first at `offset_N` / draws, uniform in [0, 1): a count
    has the expectation draws * p, and differs from that by less than 1 (systematic sampling, Madow and Madow 1944). Drawn on their
    own (Anshumann et al. 2025, "Sparse Logit Sampling"), the likely tokens' counts would vary a lot.
    """
    log_p = (logits_NV.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    cumulated = p.cumsum(-1).clamp(max=1)
    cumulated[:, -1] = 1
    passed = (draws * cumulated + offset_N.double()[:, None]).floor().clamp(max=draws)
    return passed.diff(prepend=torch.zeros_like(passed[:, :1])).int(), -(
        p * log_p.nan_to_num(neginf=0)
    ).sum(-1).float()


def encode_counts(counts_NV: Tensor, draws: int) -> Tensor:
    """The tokens that were drawn and their counts, (N, draws) numbers of 24 bits, -1 behind a row's last one."""
    row_M, token_M = counts_NV.nonzero(as_tuple=True)
    place_M = torch.arange(len(row_M), device=row_M.device) - torch.searchsorted(row_M, row_M)
    codes = torch.full((len(counts_NV), draws), -1, dtype=torch.int32, device=row_M.device)
    codes[row_M, place_M] = ((token_M << BITS) + counts_NV[row_M, token_M] - 1).int()
    return codes


def pack_counts(codes: np.ndarray) -> np.ndarray:
    """The codes that are not -1, row by row, as bytes, (3 * M,)."""
    return np.ascontiguousarray(
        codes[codes >= 0].astype("<i4").view(np.uint8).reshape(-1, 4)[:, :BYTES]
    ).reshape(-1)


def unpack_counts(content: np.ndarray, rows: int) -> tuple[Tensor, Tensor]:
    """Bytes of :func:`packed` -> tokens (N, K) and their shares of the draws (N, K), 0 behind a row's last one.

    No ends of rows are stored: the counts of each add up to the same number.
    """
    codes_M = np.pad(content.reshape(-1, BYTES), ((0, 0), (0, 4 - BYTES))).view("<i4")[:, 0]
    counts_M = (codes_M & DRAWS - 1) + 1
    ends_M = counts_M.cumsum()
    draws = ends_M[-1] // rows
    row_M = (ends_M - 1) // draws
    place_M = np.arange(len(row_M)) - np.searchsorted(row_M, row_M)
    ids_NK, shares_NK = (
        np.zeros((rows, place_M.max() + 1), np.int64),
        np.zeros((rows, place_M.max() + 1), np.float32),
    )
    ids_NK[row_M, place_M], shares_NK[row_M, place_M] = codes_M >> BITS, counts_M / draws
    return torch.from_numpy(ids_NK), torch.from_numpy(shares_NK)


def top_k(logits_NV: Tensor, temperature: float, kept: int) -> tuple[Tensor, Tensor]:
    """The tokens of highest probability and their shares of it at temperature T, both (N, K): the rest counts as impossible."""
    log_p, ids_NK = (
        (logits_NV.float() / temperature)
        .log_softmax(-1)
        .topk(min(kept, logits_NV.shape[-1]), sorted=True)
    )
    return ids_NK.int(), log_p.softmax(-1)
