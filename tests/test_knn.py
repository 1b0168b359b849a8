"""The weighted kNN equals a brute-force reference, with ties and with any division of queries."""

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simsiam.monitoring import nearest_neighbors as knn
from simsiam.monitoring.nearest_neighbors import knn_scores, knn_top1


def brute_force(bank, labels, queries, *, classes, k, tau):
    """Votes relative to the largest weight: dot products in float64, and a stable sort."""
    rows = []
    for query in queries.double():
        cosines = [(torch.dot(query, b) / query.norm() / b.norm()).item() for b in bank.double()]
        order, votes = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k], [0.0] * classes
        for i in order:
            votes[labels[i]] += math.exp((cosines[i] - cosines[order[0]]) / tau)
        rows.append(votes)
    return rows


def data(kind: str, dtype=torch.float32):
    """Random rows; rows half of which are duplicates; or corners of a cube, most of which tie."""
    torch.manual_seed(0)
    if kind == "corners":  # in 16 dimensions their norm is 4, so every cosine is exact
        bank, queries = (torch.randint(0, 2, (n, 16)).to(dtype) * 2 - 1 for n in (150, 12))
    else:
        bank, queries = torch.randn(150, 24, dtype=dtype), torch.randn(12, 24, dtype=dtype)
    if kind == "duplicates":
        places = random.Random(0).sample(range(150), 150)
        bank[places[:75]] = bank[places[75:]]
    return bank, torch.randint(0, 4, (150,)), queries


@pytest.mark.parametrize("k", [1, 7, 50, 150, 900])
@pytest.mark.parametrize("kind", ["random", "duplicates", "corners"])
def test_votes_equal_brute_force(k, kind):
    bank, labels, queries = data(kind)
    expected = torch.tensor(brute_force(bank, labels, queries, classes=4, k=k, tau=0.1))
    for chunk in (1, 5, 12, None):
        scores = knn_scores(bank, labels, queries, classes=4, k=k, tau=0.1, chunk=chunk)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_of_equal_rows_the_first_ones_vote():
    """All rows of the bank are one point with different labels: the first k rows vote."""
    scores = knn_scores(torch.ones(30, 3), torch.arange(30), torch.ones(2, 3), classes=30, k=9)
    assert scores.tolist() == [[1.0] * 9 + [0.0] * 21] * 2


def test_a_small_tau_does_not_overflow():
    bank, labels, queries = data("random")
    scores = knn_scores(bank, labels, queries, classes=4, k=20, tau=0.001)
    assert scores.isfinite().all()
    assert torch.equal(
        scores.argmax(1), knn_scores(bank, labels, queries, classes=4, k=1).argmax(1)
    )


@pytest.mark.parametrize("kind", ["random", "corners"])
def test_similarities_stay_within_the_bytes_that_are_stated(kind, monkeypatch):
    """As many queries are taken at once as fit, and nothing as large as the bank is allocated."""
    bank, labels, queries = data(kind)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() != bank.data_ptr():
                    largest = max(largest, tensor.numel() * tensor.element_size())
            return out

    monkeypatch.setattr(knn, "MAX_SIMILARITY_BYTES", 150 * 4 * 11)  # 11 of the 12 queries
    with Watch():
        knn_scores(bank, labels, queries, classes=4, k=7)
    # 11 queries and one extra row, see iter_nearest.
    assert largest == 150 * 4 * 12 < bank.numel() * bank.element_size()


def test_accuracy_is_percent_and_k_is_capped_for_small_sets():
    """18 images of one class and 4 of the other: with k = 200 the majority would always win."""
    bank = torch.cat(
        [torch.tensor([[1.0, 0.1]]).repeat(18, 1), torch.tensor([[0.1, 1.0]]).repeat(4, 1)]
    )
    labels = torch.tensor([0] * 18 + [1] * 4)
    queries, truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    assert knn_top1(bank, labels, queries, truth, classes=2) == 100.0
    assert knn_top1(bank, labels, queries, 1 - truth, classes=2) == 0.0
