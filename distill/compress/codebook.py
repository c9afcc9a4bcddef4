"""Codebooks: the 2^bits values that represent weights with the least squared error (k-means).

Weights are sorted once, with their running sums: an iteration of Lloyd's algorithm then costs K
binary searches, whatever the number of weights.

Shapes: G = groups that have a codebook each, S = weights in a group, K = 2^bits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.remote_code.modeling import look_up

__all__ = ["assign", "fit_centroids", "nearest_centroid", "refine_centroids"]

ITERATIONS = 25  # iterations of Lloyd's algorithm
_FLOAT16_MAX = torch.finfo(torch.float16).max


def fit_centroids(weight_GS: Tensor, bits: int, sparse: bool = False) -> Tensor:
    """Fit a codebook to each group of weights.

    Lloyd's algorithm runs twice, from an affine grid and from quantiles. Of both results and the
    grid itself, the one with the smallest error is returned. A group with at most K distinct values
    gets exactly these values.

    Args:
        weight_GS: the weights, by group.
        bits: bits per quantized weight.
        sparse: whether to exclude zeros.

    Returns:
        Centroids (G, K) in ascending order, in float32 but with float16 values.
    """
    weights = SortedWeights.of(weight_GS, sparse)
    grid_GK, quantiles_GK = weights.linear(2**bits), weights.quantiles(2**bits)
    starts = (grid_GK, lloyd(weights, grid_GK), lloyd(weights, quantiles_GK))
    candidates = [_round_to_half(centroids_GK) for centroids_GK in starts]
    errors = torch.stack([weights.error(centroids_GK) for centroids_GK in candidates])
    best_G = errors.nan_to_num(nan=float("inf")).argmin(0)
    best_1GK = best_G[None, :, None].expand(1, -1, 2**bits)
    return weights.exact_or(torch.stack(candidates).gather(0, best_1GK)[0])


def refine_centroids(
    weight_GS: Tensor, centroids_GK: Tensor, sparse: bool = False, iterations: int = 3
) -> Tensor:
    """Update codebooks for weights that have changed a little, by a few of Lloyd's iterations."""
    return _round_to_half(lloyd(SortedWeights.of(weight_GS, sparse), centroids_GK, iterations))


def assign(weight_GS: Tensor, centroids_GK: Tensor) -> Tensor:
    """The index of the nearest centroid of each weight, (G, S) in int32."""
    if len(centroids_GK) == 1:
        return torch.bucketize(weight_GS, _midpoints(centroids_GK)[0], out_int32=True)
    return torch.searchsorted(_midpoints(centroids_GK), weight_GS.contiguous(), out_int32=True)


def nearest_centroid(weight_GS: Tensor, centroids_GK: Tensor, sparse: bool = False) -> Tensor:
    """The value of the nearest centroid of each weight, (G, S); if `sparse`, zeros stay 0."""
    value_GS = look_up(assign(weight_GS, centroids_GK), centroids_GK)
    return value_GS.masked_fill_(weight_GS == 0, 0.0) if sparse else value_GS


def _midpoints(centroids_GK: Tensor) -> Tensor:
    """The boundaries between neighboring centroids, (G, K - 1)."""
    return (centroids_GK[:, 1:] + centroids_GK[:, :-1]) / 2


def _round_to_half(centroids_GK: Tensor) -> Tensor:
    """Float16 values in float32, with 0 for -0."""
    return centroids_GK.float().clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().float() + 0.0


def lloyd(weights: "SortedWeights", centroids_GK: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Move each centroid to the mean of the weights nearest to it, `iterations` times.

    A centroid without weights does not move.
    """
    centroids_GK = centroids_GK.double()
    for _ in range(iterations):
        total_GK, count_GK = weights.clusters(centroids_GK)
        centroids_GK = torch.where(count_GK > 0, total_GK / count_GK, centroids_GK)
    return centroids_GK


@dataclass(frozen=True)
class SortedWeights:
    """The weights of each group in ascending order.

    Args:
        weights: (G, S).
        sums: (G, S + 1), cumulative: entry i is the sum of the first i weights.
        start: (G, 1), the index of the first excluded zero.
        stop: (G, 1), the index after the last excluded zero; `start` if none is excluded.
    """

    weights: Tensor
    sums: Tensor
    start: Tensor
    stop: Tensor

    @classmethod
    def of(cls, weight_GS: Tensor, sparse: bool) -> "SortedWeights":
        """Sort the weights of each group; if `sparse`, exclude zeros."""
        weight_GS = _sort_rows(weight_GS.detach().float())
        zero_G1 = weight_GS.new_zeros(len(weight_GS), 1)
        start_G1 = torch.searchsorted(weight_GS, zero_G1)
        stop_G1 = torch.searchsorted(weight_GS, zero_G1, right=True) if sparse else start_G1
        return cls(weight_GS, pad(weight_GS.double().cumsum(1), (1, 0)), start_G1, stop_G1)

    def clusters(self, centroids_GK: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and number of the weights nearest to each centroid, both (G, K)."""
        inner = torch.searchsorted(self.weights, _midpoints(centroids_GK).float())
        first = torch.zeros_like(inner[:, :1])
        last = torch.full_like(first, self.weights.shape[1])
        edges = torch.cat([first, inner, last], 1)
        zeros = (edges.clamp(max=self.stop) - self.start).clamp(min=0)
        return self.sums.gather(1, edges).diff(), (edges - zeros).diff()

    def error(self, centroids_GK: Tensor) -> Tensor:
        """The squared error of each group less the sum of its squared weights, (G,)."""
        total_GK, count_GK = self.clusters(centroids_GK)
        return (centroids_GK.double() * (centroids_GK * count_GK - 2 * total_GK)).sum(1)

    def linear(self, count: int) -> Tensor:
        """Equally spaced values from the lowest to the highest weight and including 0, (G, K)."""
        low = self.weights[:, :1].double().clamp(max=0)
        high = self.weights[:, -1:].double().clamp(min=0)
        scale = ((high - low) / (count - 1)).clamp(min=torch.finfo(torch.float32).smallest_normal)
        return (torch.arange(count, device=low.device) - torch.round(-low / scale)) * scale

    def quantiles(self, count: int) -> Tensor:
        """The medians of `count` bins with equally many weights, (G, K)."""
        size, zeros_G1 = self.weights.shape[1], self.stop - self.start
        shares = (torch.arange(count, device=self.weights.device) + 0.5) / count
        indices = (shares * (size - zeros_G1)).long()
        indices = indices + torch.where(indices >= self.start, zeros_G1, 0)
        return self.weights.gather(1, indices.clamp(max=size - 1)).double()

    def exact_or(self, centroids_GK: Tensor) -> Tensor:
        """Use the distinct values of a group as its centroids where there are at most K.

        The last value is repeated. Other groups get their row of `centroids_GK`.
        """
        count = centroids_GK.shape[1]
        new_GS = pad(self.weights.diff() != 0, (1, 0), value=True)
        if (new_GS.sum(1) > count + 1).all():  # + 1: excluded zeros are one of the values
            return centroids_GK
        indices = torch.arange(new_GS.shape[1], device=new_GS.device)
        counted_GS = new_GS & ((indices < self.start) | (indices >= self.stop))
        rank_GS = counted_GS.cumsum(1)
        ranks_K = torch.arange(1, count + 1, device=new_GS.device)
        first_GK = torch.searchsorted(rank_GS, ranks_K.expand(len(rank_GS), -1).contiguous())
        exact_GK = self.weights.gather(1, first_GK.clamp(max=rank_GS.shape[1] - 1))
        return torch.where(rank_GS[:, -1:] <= count, _round_to_half(exact_GK), centroids_GK)


def _sort_rows(weight_GS: Tensor) -> Tensor:
    """Sort each row; on a CPU with numpy, which is 20 times faster."""
    if weight_GS.device.type != "cpu":
        return weight_GS.sort(1).values
    return torch.from_numpy(np.sort(weight_GS.numpy(), axis=1))
