"""weight -> the 2^bits values that stand for it with the least squared error: k-means in one dimension.

G = groups that have a codebook each, S = their size, K = 2^bits. With the weights sorted, and their running sums, an iteration of
Lloyd's algorithm costs K searches, whatever the size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.remote_code.modeling import look_up

ITERATIONS = 25
LARGEST = torch.finfo(torch.float16).max


def fit_centroids(weight_GS: Tensor, bits: int, sparse: bool = False) -> Tensor:
    """The codebook of each group, (G, K), ascending, in float32 but of float16 values. `sparse`: zeros are not to be represented.

    Lloyd's algorithm from the affine linear grid and from the quantiles: of both, and of that grid, whatever errs least. A group of
    at most K values has them as its codebook.
    """
    weights = Sorted.of(weight_GS, sparse)
    grid_GK, quantiles_GK = weights.linear(2**bits), weights.quantiles(2**bits)
    found = [
        stored(start) for start in (grid_GK, lloyd(weights, grid_GK), lloyd(weights, quantiles_GK))
    ]
    errors = torch.stack([weights.error(each) for each in found])
    best_G = errors.nan_to_num(nan=float("inf")).argmin(0)
    best_GK = torch.stack(found).gather(0, best_G[None, :, None].expand(1, -1, 2**bits))[0]
    return weights.few(2**bits, best_GK)


def refine_centroids(
    weight_GS: Tensor, centroids_GK: Tensor, sparse: bool = False, iterations: int = 3
) -> Tensor:
    """The codebooks a few iterations of Lloyd's algorithm further on, for weights that have moved a little."""
    return stored(lloyd(Sorted.of(weight_GS, sparse), centroids_GK, iterations))


def assign(weight_GS: Tensor, centroids_GK: Tensor) -> Tensor:
    """The number of the nearest centroid, (G, S) in int32."""
    if len(centroids_GK) == 1:
        return torch.bucketize(weight_GS, middles(centroids_GK)[0], out_int32=True)
    return torch.searchsorted(middles(centroids_GK), weight_GS.contiguous(), out_int32=True)


def nearest_centroid(weight_GS: Tensor, centroids_GK: Tensor, sparse: bool = False) -> Tensor:
    """The nearest centroid, (G, S); `sparse`: zeros stay zero."""
    value_GS = look_up(assign(weight_GS, centroids_GK), centroids_GK)
    return value_GS.masked_fill_(weight_GS == 0, 0.0) if sparse else value_GS


def middles(centroids_GK: Tensor) -> Tensor:
    """Where one centroid's part ends and the next one's begins, (G, K - 1)."""
    return (centroids_GK[:, 1:] + centroids_GK[:, :-1]) / 2


def stored(centroids_GK: Tensor) -> Tensor:
    """Rounded to float16 values; -0 as 0."""
    return centroids_GK.float().clamp(-LARGEST, LARGEST).half().float() + 0.0


def lloyd(weights: "Sorted", centroids_GK: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Centroids move to the mean of what is nearest to them, again and again; one that has nothing stays."""
    centroids_GK = centroids_GK.double()
    for _ in range(iterations):
        total_GK, count_GK = weights.clusters(centroids_GK)
        centroids_GK = torch.where(count_GK > 0, total_GK / count_GK, centroids_GK)
    return centroids_GK


@dataclass(frozen=True)
class Sorted:
    """The weights of each group in ascending order, their running sums, and the places [start, stop) of the zeros that do not count."""

    weights: Tensor  # (G, S)
    sums: Tensor  # (G, S + 1): that of the first i
    start: Tensor  # (G, 1)
    stop: Tensor  # (G, 1)

    @classmethod
    def of(cls, weight_GS: Tensor, sparse: bool) -> "Sorted":
        weight_GS = ascending(weight_GS.detach().float())
        zero_G1 = weight_GS.new_zeros(len(weight_GS), 1)
        start_G1 = torch.searchsorted(weight_GS, zero_G1)
        stop_G1 = torch.searchsorted(weight_GS, zero_G1, right=True) if sparse else start_G1
        return cls(weight_GS, pad(weight_GS.double().cumsum(1), (1, 0)), start_G1, stop_G1)

    def clusters(self, centroids_GK: Tensor) -> tuple[Tensor, Tensor]:
        """(sum_GK, count_GK) of the weights nearest to each centroid."""
        cuts = torch.searchsorted(self.weights, middles(centroids_GK).float())
        edges = torch.cat(
            [
                torch.zeros_like(cuts[:, :1]),
                cuts,
                torch.full_like(cuts[:, :1], self.weights.shape[1]),
            ],
            1,
        )
        zeros = (edges.clamp(max=self.stop) - self.start).clamp(min=0)
        return self.sums.gather(1, edges).diff(), (edges - zeros).diff()

    def error(self, centroids_GK: Tensor) -> Tensor:
        """The squared error of each group, (G,), less the sum of its squared weights."""
        total_GK, count_GK = self.clusters(centroids_GK)
        return (centroids_GK.double() * (centroids_GK * count_GK - 2 * total_GK)).sum(1)

    def linear(self, count: int) -> Tensor:
        """Equally spaced from the lowest to the highest weight, with 0 on the grid: (G, K)."""
        low, high = (
            self.weights[:, :1].double().clamp(max=0),
            self.weights[:, -1:].double().clamp(min=0),
        )
        scale = ((high - low) / (count - 1)).clamp(min=torch.finfo(torch.float32).smallest_normal)
        return (torch.arange(count, device=low.device) - torch.round(-low / scale)) * scale

    def quantiles(self, count: int) -> Tensor:
        """The middles of `count` parts of equally many weights: (G, K)."""
        size, zeros_G1 = self.weights.shape[1], self.stop - self.start
        shares = (torch.arange(count, device=self.weights.device) + 0.5) / count
        places = (shares * (size - zeros_G1)).long()
        places = places + torch.where(places >= self.start, zeros_G1, 0)
        return self.weights.gather(1, places.clamp(max=size - 1)).double()

    def few(self, count: int, otherwise_GK: Tensor) -> Tensor:
        """The values themselves in groups that have at most `count`, the last one repeated; elsewhere what is given."""
        new_GS = pad(self.weights.diff() != 0, (1, 0), value=True)
        if (new_GS.sum(1) > count + 1).all():  # one more: zeros may not count
            return otherwise_GK
        places = torch.arange(new_GS.shape[1], device=new_GS.device)
        rank_GS = (new_GS & ((places < self.start) | (places >= self.stop))).cumsum(1)
        first_GK = torch.searchsorted(
            rank_GS,
            torch.arange(1, count + 1, device=new_GS.device).expand(len(rank_GS), -1).contiguous(),
        )
        exact_GK = stored(self.weights.gather(1, first_GK.clamp(max=rank_GS.shape[1] - 1)))
        return torch.where(rank_GS[:, -1:] <= count, exact_GK, otherwise_GK)


def ascending(weight_GS: Tensor) -> Tensor:
    """Each row sorted; on a CPU by numpy, which is twenty times faster at it."""
    if weight_GS.device.type != "cpu":
        return weight_GS.sort(1).values
    return torch.from_numpy(np.sort(weight_GS.numpy(), axis=1))
