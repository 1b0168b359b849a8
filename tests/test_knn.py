"""The weighted kNN equals a brute-force reference written here."""

import math

import pytest
import torch

from simsiam.knn import knn_scores, knn_top1


@pytest.mark.parametrize("k", [1, 7, 50])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_votes_equal_brute_force(k, chunk):
    torch.manual_seed(k)
    bank, queries = torch.randn(50, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    labels = torch.randint(0, 4, (50,))
    scores = knn_scores(bank, labels, queries, classes=4, k=k, tau=0.1, chunk=chunk)
    for query, row in zip(queries, scores):
        cosines = [(torch.dot(query, b) / query.norm() / b.norm()).item() for b in bank]
        votes = [0.0] * 4
        for i in sorted(range(50), key=lambda i: -cosines[i])[:k]:
            votes[labels[i]] += math.exp(cosines[i] / 0.1)
        assert row.tolist() == pytest.approx(votes, rel=1e-9)


def test_accuracy_is_percent_and_k_is_capped_for_small_sets():
    """Ten images of a class of 2 among 18 of a class of 1: with k = 200 the majority would always win."""
    bank = torch.cat([torch.tensor([[1.0, 0.1]]).repeat(18, 1), torch.tensor([[0.1, 1.0]]).repeat(4, 1)])
    labels = torch.tensor([0] * 18 + [1] * 4)
    queries, truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    assert knn_top1(bank, labels, queries, truth, classes=2) == 100.0
    assert knn_top1(bank, labels, queries, 1 - truth, classes=2) == 0.0
