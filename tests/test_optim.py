"""LARS is its formula, and each parameter moves as the row says."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from simsiam.config.methods import METHODS, Method
from simsiam.model.average import WeightAverage
from simsiam.model.optimizers import (
    LARS,
    build_optimizer,
    constant_decay_schedule,
    set_lr,
    update_weights,
)
from simsiam.model.siamese import build

SMALL = {"backbone": "resnet10", "width": 4, "image_size": 16}


def row(name: str, **cells) -> Method:
    return replace(
        METHODS[name], **{"dim": 8, "proj_hidden": 8, "pred_dim": 4, "prototypes": 5} | cells
    )


@pytest.mark.parametrize("adapt", [True, False])
def test_lars_is_the_formula_of_its_authors(adapt):
    """u = g + decay w; u <- 0.001 |w| / |u| u where adapted; v <- 0.9 v + u; w <- w - lr v."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    lars = LARS([{"params": [w], "adapt": adapt}], lr=0.0, momentum=0.9, weight_decay=0.01)
    by_hand, v = w.detach().clone(), torch.zeros(4, 3, dtype=torch.float64)
    for lr in (0.5, 2.0, 1.0):
        w.grad = torch.randn(4, 3, dtype=torch.float64)
        kept = w.grad.clone()
        u = w.grad + 0.01 * by_hand
        if adapt:
            u = u * 0.001 * by_hand.norm() / u.norm()
        v = 0.9 * v + u
        by_hand = by_hand - lr * v
        lars.param_groups[0]["lr"] = lr
        lars.step()
        torch.testing.assert_close(w.detach(), by_hand)
        assert torch.equal(w.grad, kept), "the gradient is left for the monitors"


def test_lars_adapts_neither_a_weight_at_zero_nor_a_gradient_of_zero():
    w, still = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    w.grad, still.grad = torch.ones(3), torch.zeros(3)
    LARS([{"params": [w, still]}], lr=0.5, momentum=0.9, weight_decay=0.0).step()
    assert torch.equal(w.detach(), torch.full((3,), -0.5)) and torch.equal(
        still.detach(), torch.ones(3)
    )


def test_biases_and_norms_are_excluded_where_the_row_says_so():
    for name in ("byol", "simclr", "barlow_twins", "vicreg"):
        model = build(row(name), **SMALL)
        groups = build_optimizer(model, model.method).param_groups
        assert sum(len(g["params"]) for g in groups) == sum(
            p.requires_grad for p in model.parameters()
        )
        for g in groups:
            out = "excluded" in g["name"]
            assert all((p.ndim == 1) == out for p in g["params"])
            assert (g["weight_decay"], g["adapt"]) == ((0.0, False) if out else (1e-6, True))
    for name in ("simsiam", "moco_v2", "swav"):
        groups = build_optimizer(build(row(name), **SMALL), row(name)).param_groups
        assert not any("excluded" in g["name"] for g in groups)
    swav = build_optimizer(build(row("swav"), **SMALL), row("swav"))
    assert isinstance(swav, LARS) and all(g["adapt"] for g in swav.param_groups), (
        "SwAV adapts every parameter"
    )


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_prototypes_rest_and_then_move(name):
    """SwAV drops their gradients in the first steps, so they have no momentum yet either."""
    model = build(row("swav", freeze_prototypes=2, optimizer=name), **SMALL)
    optimizer, weight = build_optimizer(model, model.method), model.criterion.prototypes.weight
    before = weight.detach().clone()
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        lr = set_lr(optimizer, step, peak_lr=1.0, steps=10, warmup_steps=0)
        assert (lr["criterion"] > 0) == (step == 2) and lr["encoder"] > 0
        update_weights(optimizer)
        assert torch.equal(weight.detach(), before) == (step < 2)
    # The first step of a new optimizer of torch (LARS: of the formula) from the same weights.
    decay, rate = 1e-6, lr["criterion"]
    update = torch.ones_like(before) + decay * before
    if name == "lars":
        expected = before - rate * 1e-3 * before.norm() / update.norm() * update
    else:
        expected = before.clone().requires_grad_()
        expected.grad = torch.ones_like(before)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
        kind([expected], lr=rate, weight_decay=decay).step()
    torch.testing.assert_close(weight.detach(), expected.detach())


def test_adamw_is_torchs():
    method = row(
        "simsiam", optimizer="adamw", base_lr=1e-3, weight_decay=0.05, predictor_lr="cosine"
    )
    ours, theirs = (build(method, **SMALL) for _ in range(2))
    optimizer = build_optimizer(ours, method)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05
    )
    for step in range(3):
        torch.manual_seed(step)
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        set_lr(optimizer, step, peak_lr=1e-3, steps=10**9, warmup_steps=0)
        optimizer.step()
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q)


def test_a_run_of_other_length_begins_alike_with_constant_decay():
    short, long = ([constant_decay_schedule(s, n, 5) for s in range(n)] for n in (100, 300))
    assert short[:80] == long[:80] == [0.2, 0.4, 0.6, 0.8] + [1.0] * 76
    assert short[90] == pytest.approx(0.5) and short[-1] == pytest.approx(0.05)
    model = build(row("simsiam", lr_schedule="constant_decay"), **SMALL)
    optimizer = build_optimizer(model, model.method)
    lr = set_lr(optimizer, 90, peak_lr=2.0, steps=100, warmup_steps=5)
    assert lr == {"encoder": pytest.approx(1.0), "predictor": 2.0}


def test_the_predictor_has_a_weight_decay_of_its_own():
    method = row("simsiam", predictor_weight_decay=0.0, exclude="bias_and_norm")
    groups = build_optimizer(build(method, **SMALL), method).param_groups
    decay = {group["name"]: group["weight_decay"] for group in groups}
    assert decay == {
        "encoder": method.weight_decay,
        "encoder, excluded": 0.0,
        "predictor": 0.0,
        "predictor, excluded": 0.0,
    }


def test_cut_init_changes_the_size_of_weights_and_nothing_that_batch_norm_sees():
    """Draganov et al., 2025: z is the same, and the gradient is as much larger as z's weights."""
    x = torch.randn(16, 3, 16, 16, dtype=torch.float64)
    models = [build(row("simsiam", cut_init=c), **SMALL).double() for c in (1.0, 4.0)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eps = 1e-200
    plain, cut = models
    torch.testing.assert_close(cut.f(x), plain.f(x))
    for p, q in zip(plain.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(q, p / 4 if p.ndim > 1 else p)
    for model in models:
        (model.f(x) ** 3).sum().backward()
    one, other = (model.backbone.conv1.weight.grad for model in models)
    torch.testing.assert_close(other, 4 * one)


def test_an_average_of_weights_is_their_mean_at_first():
    """Then the average moves exponentially; running statistics of batch norm do as well."""
    model = build("simsiam", backbone="resnet10", width=4, image_size=16)
    average = WeightAverage(model, 0.6)
    first, running = model.backbone.conv1.weight, model.projector[1].running_mean
    expected: list = [0.0, 0.0]
    for step in range(5):
        with torch.no_grad():
            for value in (first, running):
                value.copy_(torch.randn(value.shape))
        model.projector[1].num_batches_tracked += 1
        average.update(model, step)
        keep = [0, 1 / 2, 0.6, 0.6, 0.6][step]
        expected = [keep * old + (1 - keep) * new for old, new in zip(expected, (first, running))]
    torch.testing.assert_close(average.backbone.conv1.weight, expected[0])
    torch.testing.assert_close(average.projector[1].running_mean, expected[1])
    assert average.projector[1].num_batches_tracked == 5
    assert not any(p.requires_grad for p in average.parameters())
    assert average.state_dict().keys() < model.state_dict().keys()
