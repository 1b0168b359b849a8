"""Each D(p, t) is its paper's formula, has the right gradient, and sees every process's images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from simsiam.config.methods import METHODS, Method
from simsiam.model.losses import (
    CRITERIA,
    barlow_twins,
    cross_entropy,
    info_nce,
    negative_cosine,
    nt_xent,
    sinkhorn,
    vicreg,
)


def vectors(n=6, d=4, seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, n, d, dtype=torch.float64)


def built(criterion, **cells):
    torch.manual_seed(0)
    target = "labels" if criterion == "classification" else "shared"
    small = {"dim": 4, "queue": 5, "prototypes": 3}
    method = Method(name="tested", criterion=criterion, target=target, **small | cells)
    return CRITERIA[criterion](method).double()


def test_cross_entropy_is_section_4_5():
    p, t = vectors()
    by_hand = 0.0
    for p_i, t_i in zip(p, t):
        q, r = t_i.exp() / t_i.exp().sum(), p_i.exp() / p_i.exp().sum()
        by_hand -= (q * r.log()).sum() / len(p)
    torch.testing.assert_close(cross_entropy(p, t), by_hand)


def full_nt_xent(z1, z2, tau):
    """SimCLR's equation 1 and algorithm 1: 2N x 2N similarities without the diagonal."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n, s, total = len(z1), z @ z.T / tau, 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        total -= s[i, j] - torch.logsumexp(
            torch.stack([s[i, k] for k in range(2 * n) if k != i]), 0
        )
    return total / (2 * n)


def test_directed_nt_xent_averages_to_the_full_loss():
    z1, z2 = vectors()
    both = (nt_xent(z1, z2, tau=0.3) + nt_xent(z2, z1, tau=0.3)) / 2
    torch.testing.assert_close(both, full_nt_xent(z1, z2, 0.3))


def test_with_a_predictor_the_negatives_of_the_same_view_are_predictions():
    """Section 6.2 leaves it open; here image 0 is classified among all t and the other p."""
    p, t = vectors()
    unit_p, unit_t = F.normalize(p, dim=1), F.normalize(t, dim=1)
    by_hand = []
    for i in range(len(p)):
        candidates = [
            unit_t[i],
            *(unit_t[k] for k in range(6) if k != i),
            *(unit_p[k] for k in range(6) if k != i),
        ]
        logits = torch.stack([unit_p[i] @ c for c in candidates]) / 0.5
        by_hand.append(-logits.log_softmax(0)[0])
    torch.testing.assert_close(nt_xent(p, t, tau=0.5), torch.stack(by_hand).mean())


def test_info_nce_is_the_cross_entropy_of_the_positive_against_the_queue():
    p, t = vectors()
    queue = F.normalize(vectors(n=9, seed=1)[0], dim=1)
    unit_p, unit_t = F.normalize(p, dim=1), F.normalize(t, dim=1)
    by_hand = [
        -torch.cat([unit_t[i : i + 1], queue]).matmul(unit_p[i]).div(0.2).log_softmax(0)[0]
        for i in range(6)
    ]
    torch.testing.assert_close(info_nce(p, t, queue, tau=0.2), torch.stack(by_hand).mean())


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_queue_holds_the_latest_targets_in_order(size):
    """Batches smaller than the queue of 5, and larger."""
    d = built("info_nce")
    seen = list(d.queue.clone())
    for step in range(4):
        new = vectors(n=size, seed=step)[0]
        d.after_step([new[:1], new[1:]])  # the keys of two views, one after the other
        seen += list(F.normalize(new, dim=1))
        torch.testing.assert_close(d.queue, torch.stack(seen[-5:]), rtol=1e-12, atol=0)
    assert seen[0].norm().item() == pytest.approx(1), "before there are targets, random directions"


def test_the_queue_moves_after_the_step_and_not_before():
    d = built("info_nce")
    before = d.queue.clone()
    p, t = vectors()
    assert d(p, t) == d(p, t) and torch.equal(d.queue, before)


def test_sinkhorn_codes_are_balanced():
    scores = torch.randn(12, 4, dtype=torch.float64)
    codes = sinkhorn(scores, epsilon=0.3, iterations=200)
    torch.testing.assert_close(codes.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64))


def test_sinkhorn_codes_are_the_optimal_transport():
    """Solve SwAV's equation 3, max <Q, scores> + epsilon H(Q) over balanced Q, by its dual."""
    rng, epsilon = np.random.default_rng(0), 0.4
    scores = rng.normal(size=(8, 3))

    def plan(potentials):
        return np.exp((scores + potentials[:8, None] + potentials[None, 8:]) / epsilon - 1)

    def dual(potentials):
        q = plan(potentials)
        value = epsilon * q.sum() - potentials[:8].sum() - potentials[8:].sum() * 8 / 3
        return value, np.concatenate([q.sum(1) - 1, q.sum(0) - 8 / 3])

    solved = minimize(dual, np.zeros(11), jac=True, method="BFGS", options={"gtol": 1e-10})
    ours = sinkhorn(torch.from_numpy(scores), epsilon=epsilon, iterations=500)
    np.testing.assert_allclose(ours.numpy(), plan(solved.x), atol=1e-6)


def test_swapped_prediction_is_the_cross_entropy_with_the_other_views_code():
    d = built("swapped", tau=0.2, sinkhorn_epsilon=0.1)
    p, t = vectors()
    c = F.normalize(d.prototypes.weight, dim=1)
    code = sinkhorn(F.normalize(t, dim=1) @ c.T, epsilon=0.1, iterations=3)
    torch.testing.assert_close(d.encode_target(t), code)
    by_hand = -(code * (F.normalize(p, dim=1) @ c.T / 0.2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(d(p, code), by_hand)


def test_prototypes_are_normalized_inside_or_outside_the_gradient():
    """Inside (footnote 8), their length has no gradient; outside, each step sets it to 1."""
    p, t = vectors()
    inside, outside = built("swapped"), built("swapped", prototype_norm="outside")
    for d in (inside, outside):
        d(p, d.encode_target(t).detach()).backward()
    radial = [
        (d.prototypes.weight.grad * d.prototypes.weight).sum(1).abs().max()
        for d in (inside, outside)
    ]
    assert radial[0] < 1e-12 < radial[1]
    for d, kept in ((inside, False), (outside, True)):
        with torch.no_grad():
            d.prototypes.weight.mul_(3)
        d.after_step([])
        assert torch.allclose(d.prototypes.weight.norm(dim=1), torch.ones(3).double()) == kept


def test_barlow_twins_is_equations_1_and_2_with_the_batch_norm_of_its_code():
    p, t = vectors(n=9)
    bn, total = torch.nn.BatchNorm1d(4, affine=False).double(), 0.0
    c = bn(p).T @ bn(t) / 9
    for i in range(4):
        for j in range(4):
            total += (1 - c[i, j]) ** 2 if i == j else 5e-3 * c[i, j] ** 2
    torch.testing.assert_close(barlow_twins(p, t, weight=5e-3), total)


def test_barlow_twins_is_invariant_to_affine_maps_of_each_channel():
    p, t = vectors(n=9) * 1e4  # far above batch norm's eps
    scale, shift = torch.rand(2, 4, dtype=torch.float64) * 5 + 0.1
    torch.testing.assert_close(
        barlow_twins(p * scale + shift, t, weight=0.1), barlow_twins(p, t, weight=0.1)
    )
    torch.testing.assert_close(
        barlow_twins(p, t * scale - shift, weight=0.1), barlow_twins(p, t, weight=0.1)
    )


def test_vicreg_is_its_algorithm_1():
    p, t = vectors(n=9)
    total = 25 * ((p - t) ** 2).mean()
    for z in (p, t):
        std = (z.var(0) + 1e-4).sqrt()
        c = torch.cov(z.T)
        off = sum(c[i, j] ** 2 for i in range(4) for j in range(4) if i != j)
        total = total + 15 * (1 - std).clamp(min=0).mean() + 2 * off / 4
    torch.testing.assert_close(vicreg(p, t, invariance=25, variance=15, covariance=2), total)


@pytest.mark.parametrize("name", CRITERIA)
def test_gradcheck(name):
    d = built(name)
    p, t = (v.requires_grad_() for v in vectors())
    if name == "classification":
        assert torch.autograd.gradcheck(lambda p: d(p, torch.arange(6) % 4), (p,))
    else:
        assert torch.autograd.gradcheck(lambda p, t: d(p, d.encode_target(t)), (p, t))


@pytest.mark.parametrize("name", CRITERIA)
def test_half_precision_stays_outside(name):
    """Under autocast the loss of bfloat16 projections is what float32 gives for them."""
    d = built(name).float()
    p, t = (v.bfloat16() for v in vectors(n=32).mul(3))
    t = torch.arange(32) % 4 if name == "classification" else t
    with torch.autocast("cpu", torch.bfloat16):
        under = d(p, d.encode_target(t))
    labels = name == "classification"
    exact = d(p.float(), t if labels else d.encode_target(t.float()))
    assert under.dtype == torch.float32 and torch.equal(under, exact)
    assert (
        d.double()(p.double(), t if labels else d.encode_target(t.double())).dtype == torch.float64
    )


@pytest.mark.parametrize(
    "name", ["cosine", "nt_xent", "info_nce", "barlow_twins", "vicreg", "classification"]
)
def test_unrelated_views_cost_about_what_the_criterion_says(name):
    n, d = 256, 256
    criterion = built(name, dim=d, queue=512)
    p, t = vectors(n, d)
    t = torch.randint(d, (n,)) if name == "classification" else t
    p = p * 0.01 if name == "classification" else p
    unrelated, least = criterion.loss_range(n)
    assert (
        criterion(p, t).item() == pytest.approx(unrelated, rel=0.15, abs=0.05)
        and least < unrelated / 2
    )
    if name in ("cosine", "barlow_twins", "vicreg"):
        assert least - 1e-6 <= criterion(p, p).item() < unrelated - 0.7 * (unrelated - least)


def test_cosine_needs_no_other_process():
    p, t = vectors()
    halves = [negative_cosine(p[i : i + 3], t[i : i + 3]) for i in (0, 3)]
    torch.testing.assert_close(sum(halves) / 2, negative_cosine(p, t))


def test_byols_loss_scale_is_its_sum_over_both_pairs():
    """Equation 2, 2 - 2 cos, summed over both directions: 4 + 4 times the mean of D."""
    (p1, t2), (p2, t1) = vectors(), vectors(seed=1)
    total = sum(
        (F.normalize(p, dim=1) - F.normalize(t, dim=1)).square().sum(1).mean()
        for p, t in ((p1, t2), (p2, t1))
    )
    mean = (negative_cosine(p1, t2) + negative_cosine(p2, t1)) / 2
    torch.testing.assert_close(4 + METHODS["byol"].loss_scale * mean, total)
