"""Gauges measure what the paper says, and the verdict distinguishes the failures."""

import math
from dataclasses import replace

import pytest
import torch

from simsiam.config.methods import METHODS
from simsiam.model.siamese import build
from simsiam.monitoring.gauges import effective_rank, mean_squared_cosine, z_std
from simsiam.monitoring.verdict import REMEDIES, judge_run


def test_isotropic_gaussian_has_std_one_over_sqrt_d():
    """Footnote 3."""
    torch.manual_seed(0)
    for d in (64, 512):
        z = torch.randn(4096, d)
        assert z_std(z).item() * math.sqrt(d) == pytest.approx(1, abs=0.01)


def test_a_constant_has_no_std_and_a_line_has_all_of_it():
    torch.manual_seed(0)
    v, sign = torch.randn(64), torch.tensor([1.0, -1.0]).repeat(128)[:, None]
    assert z_std(v.expand(256, -1)).item() == pytest.approx(0, abs=1e-6)
    # The collapse that z_std does not see: two antipodal points.
    assert z_std(sign * v).item() * 8 == pytest.approx(
        (v.abs() / v.norm()).mean().item() * 8, rel=1e-5
    )
    assert mean_squared_cosine(sign * v).item() == pytest.approx(1, abs=1e-5)
    assert effective_rank(sign * v).item() == pytest.approx(1, abs=1e-3)


def test_a_balanced_code_of_signs_reads_as_healthy_but_for_its_rank():
    """z = s * v with entries of equal size and s = ±1: z_std * sqrt(d) = 2 sqrt(q (1 - q))."""
    for share in (0.5, 0.9):
        s = torch.where(torch.arange(1000) < 1000 * share, 1.0, -1.0)[:, None]
        z = s * torch.ones(1, 16)
        assert z_std(z).item() * 4 == pytest.approx(2 * math.sqrt(share * (1 - share)), rel=1e-4)
        assert effective_rank(z).item() == pytest.approx(1, abs=1e-3)


def test_effective_rank_counts_directions():
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(40, 40))
    for rank in (1, 3, 10):
        z = torch.randn(5000, rank) @ q[:rank]
        assert effective_rank(z).item() == pytest.approx(rank, rel=0.02)
    assert effective_rank(torch.ones(8, 5)).item() == 1
    wide = z[:100].repeat(1, 10)  # N < d: read from the Gram matrix
    assert effective_rank(wide).item() == pytest.approx(effective_rank(z[:100]).item(), rel=1e-3)


def test_squared_cosine_is_the_mean_over_pairs():
    torch.manual_seed(0)
    z = torch.randn(20, 7, dtype=torch.float64)
    pairs = [
        torch.cosine_similarity(a, b, dim=0) ** 2
        for i, a in enumerate(z)
        for j, b in enumerate(z)
        if i != j
    ]
    assert mean_squared_cosine(z).item() == pytest.approx(
        torch.stack(pairs).mean().item(), rel=1e-9
    )


@pytest.mark.parametrize(
    ("word", "loss", "std", "rank"),
    [
        ("healthy", -0.9, 0.95, 20.0),
        ("collapsed", -1.0, 0.02, 20.0),
        ("collapsed", -1.0, 0.99, 1.0),  # rank one: the std alone shows nothing
        ("partial collapse", -0.95, 0.4, 20.0),
        ("partial collapse", -0.95, 0.95, 2.9),
        ("not converging", -0.05, 0.95, 20.0),
    ],
)
def test_verdicts(word, loss, std, rank):
    lines = [
        {"step": s, "loss": loss, "z_std_sqrt_d": std, "z_rank": rank} for s in range(0, 1000, 10)
    ]
    assert judge_run(lines, 1000) == (word, REMEDIES[word])
    assert judge_run(lines, 100).verdict == "too early"
    assert judge_run(lines, 1000, diverged=True).verdict == "diverged"


def test_clusters_are_judged_by_h_and_by_the_second_halves_of_epochs():
    """Logits say nothing about h, and the loss of a new classifier nothing about the clusters."""

    def judge(second_half: float, h_rank: float) -> str:
        lines = [
            {
                "step": step, "epoch": step / 100, "z_std_sqrt_d": 0.01, "z_rank": 1.0,
                "loss": 4.0 if 0 < step % 100 < 50 else second_half, "h_rank": h_rank,
            }
            for step in range(1, 241)  # ends in the first half of an epoch
        ]  # fmt: skip
        return judge_run(lines, 240, high_loss_threshold=3.8, clusters=True).verdict

    assert judge(3.5, 4.0) == "healthy"
    assert judge(3.9, 4.0) == "not converging"
    assert judge(3.5, 2.5) == "partial collapse"
    assert judge(3.5, 1.5) == "collapsed"
    short = {"step": 200, "epoch": 0.1, "loss": 3.9, "h_rank": 4.0, "z_std_sqrt_d": 0.9}
    assert judge_run([short], 200, high_loss_threshold=3.8, clusters=True).verdict == (
        "not converging"
    )


def test_one_noisy_batch_decides_nothing():
    lines = [
        {"step": s, "loss": -0.9, "z_std_sqrt_d": 0.9, "z_rank": 20.0} for s in range(0, 1000, 10)
    ]
    lines[-1] = lines[-1] | {"z_rank": 1.0}
    assert judge_run(lines, 1000).verdict == "healthy"


def test_each_criterion_defines_a_high_loss():
    """The threshold is a quarter of the way from unrelated views to the minimum.

    If the targets are fixed, the verdict depends on the loss alone.
    """
    lines = [
        {"step": s, "loss": 4.0, "z_std_sqrt_d": 0.9, "z_rank": 20.0} for s in range(0, 1000, 10)
    ]
    assert judge_run(lines, 1000, high_loss_threshold=3.0).verdict == "not converging"
    assert (
        judge_run(lines, 1000, high_loss_threshold=5.0).verdict
        == judge_run(lines, 1000, high_loss_threshold=None).verdict
        == "healthy"
    )
    flat = [line | {"z_std_sqrt_d": 0.01, "z_rank": 1.0} for line in lines]
    assert judge_run(flat, 1000, high_loss_threshold=5.0).verdict == "collapsed"
    assert judge_run(flat, 1000, high_loss_threshold=5.0, fixed_target=True).verdict == "healthy"
    assert (
        judge_run(flat, 1000, high_loss_threshold=3.0, fixed_target=True).verdict
        == "not converging"
    )
    small = {"backbone": "resnet10", "width": 4, "image_size": 16}
    high = {
        name: build(replace(row, dim=16), **small).high_loss_threshold(128)
        for name, row in METHODS.items()
    }
    assert high["simsiam"] == -0.25 and high["byol"] == -1.0
    assert high["swav"] == pytest.approx(0.98 * math.log(3000))
    assert high["deepcluster"] == pytest.approx(0.98 * math.log(16))
    assert high["supervised"] == pytest.approx(0.75 * math.log(16))
    assert high["simclr"] == pytest.approx(
        0.75 * math.log(255) + 0.25 * math.log1p(254 * math.exp(-10))
    )
    assert high["moco_v2_plus"] == 2 * high["moco_v2"]


def test_every_remedy_is_one_line():
    assert all(text and "\n" not in text for text in REMEDIES.values())
