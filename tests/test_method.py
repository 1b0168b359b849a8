"""The method is Algorithm 1, its heads are section 3's, its optimization is appendix A's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simsiam.config.methods import METHODS, Method
from simsiam.config.recipes import Recipe
from simsiam.errors import UsageError
from simsiam.model.backbones import RESNETS, create_backbone
from simsiam.model.heads import build_predictor, build_projector, mlp
from simsiam.model.losses import negative_cosine
from simsiam.model.optimizers import build_optimizer, cosine_schedule, set_lr
from simsiam.model.siamese import build

SMALL = {"backbone": "resnet10", "width": 4, "image_size": 16}


def small(**cells) -> Method:
    return Method(name="simsiam", **{"dim": 12, "proj_hidden": 10, "pred_dim": 6} | cells)


def two_views(n=6):
    return (torch.randn(n, 3, 16, 16, dtype=torch.float64) for _ in range(2))


def algorithm_1(model, x1, x2):
    """Compute the loss as the paper's pseudocode does, line by line."""

    def D(p, z):
        z = z.detach()  # stop gradient
        p = p / p.norm(dim=1, keepdim=True)
        z = z / z.norm(dim=1, keepdim=True)
        return -(p * z).sum(dim=1).mean()

    def f(x):
        return model.projector(model.backbone(x))

    h = model.predictor
    z1, z2 = f(x1), f(x2)
    p1, p2 = h(z1), h(z2)
    return D(p1, z2) / 2 + D(p2, z1) / 2


def loss_and_gradients(model, compute):
    model.zero_grad()
    loss = compute()
    loss.backward()
    return loss.item(), {
        k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    "cells", [{}, {"output_bn_affine": True}, {"proj_layers": 2}, {"head_bn": ("pred_hidden",)}]
)
def test_simsiam_is_algorithm_1(cells):
    torch.manual_seed(0)
    model = build(small(**cells), **SMALL).double()
    x1, x2 = two_views()
    ours, our_gradients = loss_and_gradients(model, lambda: model(x1, x2).loss)
    theirs, their_gradients = loss_and_gradients(model, lambda: algorithm_1(model, x1, x2))
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert our_gradients.keys() == their_gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(
            gradient, their_gradients[name], rtol=1e-10, atol=1e-14, msg=name
        )


def test_stop_gradient_changes_the_encoder_and_not_the_loss():
    torch.manual_seed(0)
    x1, x2 = two_views()
    with_it, without = (build(small(stop_gradient=on), **SMALL).double() for on in (True, False))
    loss, gradients = loss_and_gradients(with_it, lambda: with_it(x1, x2).loss)
    same_loss, others = loss_and_gradients(without, lambda: without(x1, x2).loss)
    assert loss == same_loss
    for name in (
        n for n in gradients if gradients[n].any()
    ):  # a residual branch starts behind a zero: no gradient yet
        same = torch.allclose(gradients[name], others[name], rtol=1e-6, atol=0)
        assert same == name.startswith("predictor"), name


def test_stop_gradient_halves_the_gradient_where_there_is_no_predictor():
    """Section 4.2: for the symmetric loss the direction is the same, so Table 1a must collapse."""
    torch.manual_seed(0)
    x1, x2 = two_views()
    with_it, without = (
        build(small(predictor="none", stop_gradient=on), **SMALL).double() for on in (True, False)
    )
    _, half = loss_and_gradients(with_it, lambda: with_it(x1, x2).loss)
    _, whole = loss_and_gradients(without, lambda: without(x1, x2).loss)
    for name in half:
        torch.testing.assert_close(2 * half[name], whole[name], rtol=1e-9, atol=1e-13)


def test_targets_are_the_projections_without_gradient():
    model = build(small(), **SMALL).double()
    out = model(*two_views())
    assert all(
        p.requires_grad and z.requires_grad for p, z in zip(out.predictions, out.projections)
    )
    assert not any(t.requires_grad for t in out.targets)
    assert all(torch.equal(t, z) for t, z in zip(out.targets, out.projections))


def test_asymmetric_loss_is_the_first_half():
    torch.manual_seed(0)
    x1, x2 = two_views()
    model = build(small(pairs="asymmetric"), **SMALL).double()
    out = model(x1, x2)
    assert out.loss.item() == pytest.approx(
        negative_cosine(out.predictions[0], out.projections[1]).item(), rel=1e-12
    )


def test_batch_norm_statistics_are_each_views_own():
    """Encoding both views in one call would give other numbers."""
    torch.manual_seed(0)
    model = build(small(), **SMALL).double()
    x1, x2 = two_views()
    alone = model(x1, x1).projections[0]
    together = model.projector(model.backbone(torch.cat([x1, 3 * x2])))[:6]
    torch.testing.assert_close(model(x1, 3 * x2).projections[0], alone)
    assert not torch.allclose(together, alone)


def test_distance_of_unit_vectors_is_two_plus_two_d():
    p, z = torch.randn(2, 32, 9, dtype=torch.float64)
    squared = (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(1).mean()
    torch.testing.assert_close(squared, 2 + 2 * negative_cosine(p, z))


def test_criterion_is_computed_in_at_least_float32():
    p, z = torch.randn(2, 64, 512).bfloat16()
    assert negative_cosine(p, z).dtype == torch.float32
    assert negative_cosine(p.double(), z.double()).dtype == torch.float64
    torch.testing.assert_close(
        negative_cosine(p, z).double(), negative_cosine(p.double(), z.double())
    )


# --- heads ----------------------------------------------------------------------------------------


def layers(head):
    return [type(m).__name__ for m in head]


def test_heads_of_the_paper():
    f, h = build_projector(METHODS["simsiam"], 512), build_predictor(METHODS["simsiam"])
    assert [m.weight.shape for m in f if isinstance(m, nn.Linear)] == [
        (2048, 512),
        (2048, 2048),
        (2048, 2048),
    ]
    assert [m.weight.shape for m in h if isinstance(m, nn.Linear)] == [(512, 2048), (2048, 512)]
    assert layers(f) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert layers(h) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [m.affine for m in f if isinstance(m, nn.BatchNorm1d)] == [True, True, False]


def test_dim_leaves_the_hidden_width():
    f = build_projector(Method(name="simsiam", dim=256, proj_layers=2), 512)
    assert [m.weight.shape for m in f if isinstance(m, nn.Linear)] == [(2048, 512), (256, 2048)]


@pytest.mark.parametrize("hidden_bn", [True, False])
@pytest.mark.parametrize("out_bn", [True, False])
def test_a_layer_has_a_bias_exactly_where_no_batch_norm_follows(hidden_bn, out_bn):
    head = list(mlp([3, 4, 5, 6], hidden_bn=hidden_bn, out_bn=out_bn))
    for layer, after in zip(head, [*head[1:], None]):
        if isinstance(layer, nn.Linear):
            assert (layer.bias is None) == isinstance(after, nn.BatchNorm1d)
    without = mlp([3, 4, 5, 6], hidden_bn=hidden_bn, out_bn=out_bn, out_bias=False)
    assert [m.bias is None for m in without if isinstance(m, nn.Linear)] == [
        hidden_bn,
        hidden_bn,
        True,
    ]


def test_predictor_cells():
    assert isinstance(build_predictor(small(predictor="none")), nn.Identity)
    assert not any(p.requires_grad for p in build_predictor(small(predictor="fixed")).parameters())
    assert isinstance(
        build_predictor(small(head_bn=("pred_hidden", "pred_out")))[-1], nn.BatchNorm1d
    )
    with pytest.raises(UsageError, match="proj_out"):
        build_projector(small(output_bn_affine=True, head_bn=("pred_hidden",)), 8)


# --- backbones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_full_width_resnets_are_torchvisions(name):
    import torchvision

    ours = create_backbone(name, image_size=224)
    theirs = torchvision.models.get_model(name)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0)
    assert ours.dim == ours(x).shape[1]


@pytest.mark.parametrize("name", RESNETS)
def test_last_norm_of_every_block_starts_at_zero(name):
    model = create_backbone(name, image_size=32, width=8)
    blocks = [m for m in model.modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    assert len(blocks) == sum(RESNETS[name][1])
    for block in blocks:
        last = block.bn3 if hasattr(block, "bn3") else block.bn2
        assert last.weight.abs().max() == 0


def test_the_stem_follows_the_image_size():
    assert create_backbone("resnet18", image_size=32).conv1.kernel_size == (3, 3)
    assert create_backbone("resnet18", image_size=128).conv1.kernel_size == (7, 7)
    assert create_backbone("resnet18", image_size=32)(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    assert create_backbone("resnet10", image_size=32, width=16).dim == 128


def test_any_torchvision_classifier_by_name():
    model = create_backbone("mobilenet_v3_small", image_size=64)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, model.dim)
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        create_backbone("resnet_18", image_size=32)


# --- optimization ---------------------------------------------------------------------------------


def test_lr_and_weight_decay_of_each_group_are_the_formulae():
    recipe = Recipe().replace(
        base_lr=0.03, weight_decay=5e-4, batch_size=512, predictor_lr_scale=10.0
    )
    model = build(small(base_lr=0.03, weight_decay=5e-4, predictor_lr_scale=10.0), **SMALL)
    optimizer = build_optimizer(model, model.method)
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    assert all(g["weight_decay"] == 5e-4 and g["momentum"] == 0.9 for g in groups.values())
    steps, warmup = 1000, 100
    for step in (0, 50, 99, 100, 550, 999):
        set_lr(optimizer, step, peak_lr=recipe.peak_lr, steps=steps, warmup_steps=warmup)
        rise, fall = (
            (step + 1) / warmup,
            (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2,
        )
        expected = 0.03 * 512 / 256 * (rise if step < warmup else fall)
        assert groups["encoder"]["lr"] == pytest.approx(expected, rel=1e-12)
        assert groups["predictor"]["lr"] == pytest.approx(
            10 * 0.03 * 512 / 256, rel=1e-12
        )  # no warm-up either


def test_predictor_lr_follows_the_encoder_on_request():
    model = build(small(predictor_lr="cosine"), **SMALL)
    optimizer = build_optimizer(model, model.method)
    lr = set_lr(optimizer, 700, peak_lr=0.1, steps=1000, warmup_steps=10)
    assert lr["predictor"] == lr["encoder"] == pytest.approx(0.1 * cosine_schedule(700, 1000, 10))


def test_a_fixed_predictor_is_in_no_group():
    model = build(small(predictor="fixed"), **SMALL)
    assert [g["name"] for g in build_optimizer(model, model.method).param_groups] == ["encoder"]


def test_initialization_is_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = build(small(), **SMALL, seed=3).state_dict()
    state = torch.get_rng_state()
    second = build(small(), **SMALL, seed=3).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(
        first["backbone.conv1.weight"], build(small(), **SMALL, seed=4).backbone.conv1.weight
    )
