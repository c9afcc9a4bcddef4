"""A few tokens in place of a distribution: unbiased, and so is the gradient."""

import math

import numpy as np
import pytest
import torch

from distill import losses
from distill.losses import sparse

N, V = 9, 400
DRAWS = (1, 7, 50, 64)


def logits(seed, scale=3.0, rows=N, classes=V):
    return scale * torch.randn(
        rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def uniform(seed, rows=N):
    return torch.from_numpy(np.random.default_rng(seed).random(rows))


def shares(at, draws, temperature, offset):
    counts, entropy = sparse.sample_counts(at, temperature, draws, offset)
    return counts / draws, entropy


def gradient(loss, student):
    student = student.detach().requires_grad_()
    return torch.autograd.grad(loss(student).sum(), student)[0]


def full_gradient(student, teacher, temperature):
    return gradient(lambda at: losses.forward_kl(at, teacher, temperature), student)


def sparse_gradient(student, teacher, temperature, draws, offset):
    counts, entropy = sparse.sample_counts(teacher, temperature, draws, offset)
    ids, weights = sparse.unpack_counts(
        sparse.pack_counts(sparse.encode_counts(counts, draws).numpy()), len(student)
    )
    return gradient(lambda at: losses.sparse_kl(at, temperature, ids, weights, entropy), student)


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_counts_are_within_one_of_their_expectation_and_add_up(draws, temperature):
    counts, entropy = sparse.sample_counts(logits(1), temperature, draws, uniform(0))
    p = (logits(1) / temperature).softmax(-1)
    assert (counts - draws * p).abs().max() < 1 + 1e-9
    assert counts.sum(-1).eq(draws).all()
    torch.testing.assert_close(entropy, torch.distributions.Categorical(probs=p).entropy().float())


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mean_over_all_offsets_is_the_distribution(draws, temperature):
    """By quadrature: a step function of the offset, averaged over a grid."""
    grid = 2000
    mean = (
        sum(
            shares(logits(2), draws, temperature, torch.full((N,), (place + 0.5) / grid))[0]
            for place in range(grid)
        )
        / grid
    )
    torch.testing.assert_close(
        mean.double(), (logits(2) / temperature).softmax(-1), rtol=0, atol=2 / (grid * draws)
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_expected_gradient_is_that_of_the_full_kl(temperature):
    """The error of the mean over seeds falls as 1 / sqrt(seeds): there is no bias."""
    student, teacher, seeds = logits(3), logits(4), 900
    right = full_gradient(student, teacher, temperature)
    drawn = [
        sparse_gradient(student, teacher, temperature, 20, uniform(seed)) for seed in range(seeds)
    ]
    spread = torch.stack([each - right for each in drawn]).square().sum((1, 2)).mean().sqrt()
    for count in (30, seeds):
        error = (torch.stack(drawn[:count]).mean(0) - right).norm()
        assert error < 1.5 * spread / math.sqrt(count)
    assert spread / math.sqrt(seeds) < 0.05 * right.norm()


def test_the_likeliest_tokens_alone_are_biased():
    """The law above fails for them, so that it is no trivial one."""
    student, teacher = logits(3), logits(4, scale=1.5)
    ids, weights = sparse.top_k(teacher, 1.0, 20)
    entropy = torch.special.entr(weights).sum(-1)
    biased = gradient(lambda at: losses.sparse_kl(at, 1.0, ids.long(), weights, entropy), student)
    right = full_gradient(student, teacher, 1.0)
    mean = torch.stack(
        [sparse_gradient(student, teacher, 1.0, 20, uniform(seed)) for seed in range(300)]
    ).mean(0)
    assert (biased - right).norm() > 5 * (mean - right).norm()


def test_the_value_is_the_kl_on_average():
    student, teacher = logits(5), logits(6)
    values = []
    for seed in range(600):
        counts, entropy = sparse.sample_counts(teacher, 2.0, 30, uniform(seed))
        ids, weights = sparse.unpack_counts(
            sparse.pack_counts(sparse.encode_counts(counts, 30).numpy()), N
        )
        values.append(losses.sparse_kl(student, 2.0, ids, weights, entropy))
    values = torch.stack(values)
    error = values.mean(0) - losses.forward_kl(student, teacher, 2.0)
    assert (error.abs() < 5 * values.std(0) / math.sqrt(len(values))).all()


def test_with_all_tokens_it_is_the_kl():
    student, teacher = logits(7, classes=30), logits(8, classes=30)
    ids, weights = sparse.top_k(teacher, 2.0, 99)
    value = losses.sparse_kl(student, 2.0, ids.long(), weights, torch.special.entr(weights).sum(-1))
    torch.testing.assert_close(
        value, losses.forward_kl(student, teacher, 2.0), rtol=1e-5, atol=1e-6
    )


def test_top_k_gives_the_likeliest_tokens_normalized():
    ids, weights = sparse.top_k(logits(9), 2.0, 5)
    p = (logits(9) / 2).softmax(-1)
    assert torch.equal(ids.long(), p.topk(5).indices)
    torch.testing.assert_close(
        weights.double(),
        p.topk(5).values / p.topk(5).values.sum(-1, keepdim=True),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("draws", DRAWS)
def test_unpacking_inverts_packing(draws):
    counts, _ = sparse.sample_counts(logits(10), 2.0, draws, uniform(1))
    content = sparse.pack_counts(sparse.encode_counts(counts, draws).numpy())
    assert len(content) == sparse.BYTES * counts.count_nonzero()
    ids, weights = sparse.unpack_counts(content, N)
    assert ids.shape[1] == counts.count_nonzero(-1).max()
    found = torch.zeros(N, V).scatter_add(1, ids, weights)
    torch.testing.assert_close(found, counts / draws, rtol=1e-6, atol=0)


def test_the_largest_token_and_the_largest_count_fit():
    codes = torch.tensor(
        [[(sparse.TOKENS - 1 << sparse.BITS) + sparse.DRAWS - 1]], dtype=torch.int32
    )
    ids, weights = sparse.unpack_counts(sparse.pack_counts(codes.numpy()), 1)
    assert (ids.item(), weights.item()) == (sparse.TOKENS - 1, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_certainty_masked_tokens_and_the_ends_of_the_offset_are_no_special_cases(dtype):
    at = torch.tensor([[-math.inf, 5.0, -math.inf], [1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    for offset in (0.0, np.nextafter(1, 0)):
        counts, entropy = sparse.sample_counts(
            at, 1.0, 50, torch.full((3,), offset, dtype=torch.float64)
        )
        assert counts[:2].tolist() == [[0, 50, 0], [50, 0, 0]]
        assert sorted(counts[2].tolist()) == [16, 17, 17]
        torch.testing.assert_close(entropy, torch.tensor([0, 0, math.log(3)]))


def test_systematic_draws_vary_less_than_independent_ones():
    """At p = 0.6, 50 independent draws have a variance of 50 * 0.6 * 0.4 = 12."""
    at = torch.tensor([[0.6, 0.3, 0.1]]).log()
    counts = torch.stack(
        [sparse.sample_counts(at, 1.0, 50, uniform(seed, 1))[0][0] for seed in range(200)]
    ).double()
    assert counts.std(0).max() < 0.6
