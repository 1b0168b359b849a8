"""Each signal equals its definition, computed here in float64 with NumPy.

It also distinguishes a collapse from a spread.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.monitoring.signals import (
    alignment,
    nearest_neighbors,
    neighbor_stability,
    rankme,
    spectrum_auc,
    uniformity,
    view_retrieval,
)


def normal(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def two_views(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Views with so much noise that some find each other and some do not."""
    return normal(n, d), normal(n, d) + normal(n, d, 1)


def signs(n: int, d: int) -> Tensor:
    """Float32 rows of ±1. Cosines are multiples of 2 / d without rounding, and many of them tie."""
    return normal(n, d).sign().float()


def unit(h: Tensor) -> np.ndarray:
    x = h.double().numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# (N, d): tall, wide and not a multiple of any chunk.
SHAPES = [(61, 8), (20, 33)]


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_rankme_is_the_entropy_of_the_singular_values(n, d):
    h = normal(n, d) * torch.logspace(0, -3, d, dtype=torch.float64) + 1  # not centered
    share = np.linalg.svd(h.numpy(), compute_uv=False)
    share = share / share.sum()
    assert rankme(h) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)), rel=1e-12)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_spectrum_auc_averages_the_cumulative_spectrum(n, d):
    h = normal(n, d) * torch.logspace(0, -3, d, dtype=torch.float64) + 1
    sigma = np.linalg.svd(unit(h) - unit(h).mean(0), compute_uv=False)
    sigma = np.pad(sigma, (0, d - len(sigma)))
    cumulative = [sigma[:j].sum() / sigma.sum() for j in range(1, d + 1)]
    assert spectrum_auc(h) == pytest.approx(np.mean(cumulative), rel=1e-12)


def test_the_spectrum_of_a_spread():
    h = normal(20_000, 32, dtype=torch.float32)
    assert rankme(h) == pytest.approx(32, rel=0.01)
    assert spectrum_auc(h) == pytest.approx(33 / 64, rel=0.02)
    rows = torch.linalg.qr(normal(32, 32)).Q
    assert rankme(rows) == pytest.approx(32, rel=1e-12)
    assert spectrum_auc(rows) == pytest.approx(
        1 / 2 + 1 / 32, rel=1e-12
    )  # centering takes one of 32 equal values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_spectrum_of_a_collapse(dtype):
    v, c = normal(1, 32, dtype=dtype), normal(500, 1, 1, dtype)
    point, ray, line = v.expand(500, -1), c.abs() * v, c * v
    for h in (point, ray, line, 0 * line):
        assert rankme(h) == pytest.approx(1, abs=0.01)
        assert spectrum_auc(h) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_view_retrieval_counts_the_views_that_find_each_other(chunk):
    a, b = two_views(61, 8)
    found = [max(range(61), key=lambda j: row[j]) == i for i, row in enumerate(unit(a) @ unit(b).T)]
    assert 10 < sum(found) < 50
    assert view_retrieval(a, b, chunk=chunk) == pytest.approx(100 * sum(found) / 61, rel=1e-6)
    h = signs(61, 6)  # 64 rows are possible, so some occur once
    rows = [tuple(row) for row in h.tolist()]
    alone = sum(rows.count(row) == 1 for row in rows)
    assert 10 < alone < 50
    assert view_retrieval(h, h, chunk=chunk) == pytest.approx(100 * alone / 61, rel=1e-6)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_tie_is_a_miss(chunk):
    q = torch.linalg.qr(normal(32, 32, dtype=torch.float32)).Q
    assert view_retrieval(q, q, chunk=chunk) == 100
    twice = torch.cat([q[:31], q[:1]])
    assert view_retrieval(twice, twice, chunk=chunk) == pytest.approx(100 * 30 / 32)
    ray = normal(60, 1, dtype=torch.float32).abs() * q[:1]
    for constant in (q[:1].expand(60, -1), ray, 0 * ray):
        assert view_retrieval(constant, constant, chunk=chunk) == 0


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("h", [normal(61, 8), signs(61, 16)], ids=["apart", "tied"])
def test_neighbors_equal_a_stable_sort(h, chunk):
    cosine = unit(h) @ unit(h).T
    np.fill_diagonal(cosine, -2)
    wanted = np.argsort(-cosine, axis=1, kind="stable")
    for k in (1, 10, 60):
        found = nearest_neighbors(h, k, chunk=chunk)
        assert found.dtype == torch.int64 and found.tolist() == wanted[:, :k].tolist()
    assert nearest_neighbors(h, 100).shape == (61, 60)


def test_neighbors_in_a_collapse_are_the_first_rows():
    ray = normal(9, 1, dtype=torch.float32).abs() * normal(1, 32, 1, torch.float32)
    assert nearest_neighbors(ray, 2).tolist() == [[1, 2], [0, 2]] + [[0, 1]] * 7


def test_neighbor_stability_compares_sets():
    before = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    now = torch.tensor([[3, 1, 2], [3, 4, 5], [4, 5, 6], [4, 2, 0]])  # 3, 1, 0 and 2 of 3
    assert neighbor_stability(before, now) == pytest.approx(100 * 6 / 12)
    assert neighbor_stability(before, before) == 100
    before, now = (
        nearest_neighbors(normal(300, 8), 7),
        nearest_neighbors(normal(300, 8) + normal(300, 8, 1), 7),
    )
    kept = [len(set(b) & set(n)) / 7 for b, n in zip(before.tolist(), now.tolist())]
    assert neighbor_stability(before, now) == pytest.approx(100 * np.mean(kept), rel=1e-12)


@pytest.mark.parametrize("alpha", [1, 2, 3.5])
def test_alignment_is_a_mean_distance(alpha):
    a, b = two_views(61, 8)
    wanted = np.mean([math.dist(x, y) ** alpha for x, y in zip(unit(a), unit(b))])
    assert alignment(a, b, alpha) == pytest.approx(wanted, rel=1e-12)
    assert alignment(a, a, alpha) == 0
    assert alignment(a, -a, alpha) == pytest.approx(2**alpha, rel=1e-12)
    assert alignment(a, b) == pytest.approx(
        2 - 2 * F.cosine_similarity(a, b).mean().item(), rel=1e-12
    )


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("t", [1, 2, 50_000])
def test_uniformity_is_over_all_pairs(t, chunk):
    h = unit(normal(61, 8))
    pairs = [-t * math.dist(x, y) ** 2 for i, x in enumerate(h) for y in h[:i]]
    top = max(pairs)
    wanted = top + math.log(np.mean([math.exp(p - top) for p in pairs]))
    assert uniformity(normal(61, 8), t, chunk=chunk) == pytest.approx(wanted, rel=1e-9)


def test_uniformity_of_a_point_a_sphere_and_a_basis():
    assert uniformity(normal(1, 8).expand(50, -1)) == pytest.approx(0, abs=1e-9)
    assert uniformity(torch.eye(16)) == pytest.approx(-4, abs=1e-6)
    for d in (3, 32):  # exp(2t cos) averages 0F1(; d / 2; t²) over the sphere, here as its series
        mean = sum(
            4**k / math.factorial(k) * math.gamma(d / 2) / math.gamma(d / 2 + k) for k in range(20)
        )
        assert uniformity(normal(3000, d)) == pytest.approx(-4 + math.log(mean), abs=0.01)


def test_no_signal_depends_on_a_rotation_and_only_rankme_on_the_norms():
    a, b = two_views(61, 8)
    q, c = torch.linalg.qr(normal(8, 8, 2)).Q, normal(61, 1, 3).abs() + 0.1
    kept = nearest_neighbors(a)
    signals = [spectrum_auc, uniformity, lambda h: view_retrieval(h, b), lambda h: alignment(h, b)]
    for signal in signals:
        assert signal(c * a) == pytest.approx(signal(a), rel=1e-9)
    assert torch.equal(nearest_neighbors(c * a), kept) and torch.equal(
        nearest_neighbors(a @ q), kept
    )
    for signal in [rankme, *signals[:2]]:
        assert signal(a @ q) == pytest.approx(signal(a), rel=1e-9)
    for signal in (view_retrieval, alignment):
        assert signal(a @ q, b @ q) == pytest.approx(signal(a, b), rel=1e-9)
    assert (
        rankme(3 * a) == pytest.approx(rankme(a), rel=1e-12)
        and abs(rankme(c * a) - rankme(a)) > 0.01
    )


def test_lower_precision_is_computed_in_float32():
    a, b = (x.bfloat16() for x in two_views(61, 8))
    for signal in (rankme, spectrum_auc, uniformity):
        assert signal(a) == signal(a.float())
    for signal in (view_retrieval, alignment):
        assert signal(a, b) == signal(a.float(), b.float())
    assert torch.equal(nearest_neighbors(a), nearest_neighbors(a.float()))
