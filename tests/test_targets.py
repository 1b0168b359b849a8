"""Targets: each computes what section 5 says, and is SimSiam with its neutral setting."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from threadpoolctl import threadpool_info, threadpool_limits

from simsiam.config.methods import METHODS, Method
from simsiam.errors import UsageError
from simsiam.model.losses import CRITERIA, Criterion
from simsiam.model.optimizers import build_optimizer, cosine_schedule, set_lr
from simsiam.model.siamese import build
from simsiam.model.targets import eta_bytes
from simsiam.training.prepare import cluster_features

SMALL = {"backbone": "resnet10", "width": 4, "image_size": 16}
N, IMAGES = 8, 24  # a batch; an epoch is three


def small(**cells) -> Method:
    return Method(
        name="simsiam", **{"dim": 12, "proj_hidden": 10, "pred_dim": 6, "base_lr": 4.0} | cells
    )


def batch(step: int, views: int = 2) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The views of a step and the positions of its images."""
    generator = torch.Generator().manual_seed(step)
    return list(torch.randn(views, N, 3, 16, 16, generator=generator)), torch.arange(
        N
    ) + N * step % IMAGES


def train(method: Method, steps: int = 8, dtype: torch.dtype = torch.float32):
    """Losses of some steps of SGD, and the model after them."""
    model = build(method, **SMALL).to(dtype)
    model.begin(images=IMAGES, steps=steps, per_epoch=3)
    optimizer, losses = build_optimizer(model, method), []
    for step in range(steps):
        x, index = batch(step, method.view_count)
        set_lr(optimizer, step, peak_lr=method.base_lr * N / 256, steps=steps, warmup_steps=0)
        out = model(*(view.to(dtype) for view in x), index=index)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.after_step(out, step, index)
        losses.append(out.loss.item())
    return losses, model


def same(one, other) -> bool:
    """Equal losses and weights, to the last bit."""
    weights = [dict(model.named_parameters()) for _, model in (one, other)]
    encoder = [k for k in weights[0] if not k.startswith("target")]
    return one[0] == other[0] and all(torch.equal(weights[0][k], weights[1][k]) for k in encoder)


def test_training_moves_the_loss():
    """Without this, equal trajectories would say little."""
    losses, _ = train(small())
    assert max(losses) - min(losses) > 0.05


@pytest.mark.parametrize(
    "cells",
    [
        {"target": "momentum", "target_decay": 0.0},
        {"target": "alternation", "target_steps": 1},
        {"target": "expectation", "target_views": 1},
    ],
)
def test_neutral_targets_are_simsiam_bit_for_bit(cells):
    assert same(train(small(**cells)), train(small()))


@pytest.mark.parametrize(
    "cells",
    [
        {"target": "momentum", "target_decay": 0.5},
        {"target": "alternation", "target_steps": 2},
        {"target": "expectation", "target_views": 2},
    ],
)
def test_and_others_are_not(cells):
    assert not same(train(small(**cells)), train(small()))


def test_momentum_is_an_exponential_average_in_training_mode():
    """theta' <- m theta' + (1 - m) theta after each step, and z' with the batch's statistics."""
    method = small(target="momentum", target_decay=0.7)
    expected = [p.clone() for p in build(method, **SMALL).f.parameters()]
    model = build(method, **SMALL)
    out = model(*batch(0)[0])
    for step in range(3):
        with torch.no_grad():
            for p in model.f.parameters():
                p.add_(torch.randn_like(p))  # what an optimizer may do
        model.after_step(out, step)
        expected = [0.7 * e + 0.3 * p for e, p in zip(expected, model.f.parameters())]
    for mine, by_hand in zip(model.target.copy.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, by_hand)
    x, _ = batch(9)
    alone = deepcopy(model.target.copy).train()
    for t, view in zip(model(*x).targets, x):
        assert torch.equal(t, alone(view))


def test_byols_momentum_rises_to_one_on_a_cosine():
    model = build(small(target="momentum", target_decay=0.9, target_schedule="cosine"), **SMALL)
    with pytest.raises(UsageError, match=r"call model\.begin"):
        model.target.momentum_at(0)
    model.begin(steps=100)
    with pytest.raises(UsageError, match=r"give it to model\.after_step"):
        model.after_step(model(*batch(0)[0]))
    assert model.target.momentum_at(0) == pytest.approx(0.9)
    assert [model.target.momentum_at(s) for s in (25, 99)] == [
        pytest.approx(1 - 0.1 * cosine_schedule(s, 100)) for s in (25, 99)
    ]
    assert model.target.momentum_at(99) > 0.9999


@pytest.mark.parametrize("k", [2, 3])
def test_alternation_equals_targets_cached_ahead(k):
    """Section 5.2: compute eta for both views of k batches, then take k steps on them."""
    method = small(target="alternation", target_steps=k)
    by_copy = train(method)
    model = build(small(), **SMALL)
    optimizer, losses = build_optimizer(model, method), []
    for step in range(8):
        if step % k == 0:
            ahead = deepcopy(model.f)
            with torch.no_grad():
                cache = {s: [ahead(view) for view in batch(s)[0]] for s in range(step, step + k)}
        set_lr(optimizer, step, peak_lr=method.base_lr * N / 256, steps=8, warmup_steps=0)
        p = [model.predictor(model.f(view)) for view in batch(step)[0]]
        loss = (
            sum(-F.cosine_similarity(p[i], cache[step][j]).mean() for i, j in ((0, 1), (1, 0))) / 2
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert same(by_copy, (losses, model))


def test_a_block_of_an_epoch():
    assert same(
        train(small(target="alternation", target_steps=0)),
        train(small(target="alternation", target_steps=3)),
    )


def test_moving_average_without_memory_is_simsiam_without_a_predictor():
    """m = 0: t is the other view's z, and D does not see its length (footnote 5)."""
    moving = train(
        small(predictor="none", target="moving_average", target_decay=0.0), dtype=torch.float64
    )
    plain = train(small(predictor="none"), dtype=torch.float64)
    torch.testing.assert_close(moving[0], plain[0], rtol=1e-9, atol=0)
    for mine, theirs in zip(moving[1].parameters(), plain[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_moving_average_is_updated_and_then_minimized():
    """Section 5.2: t = m eta + (1 - m) z, and eta becomes the mean t of the pair's views."""
    method = small(predictor="none", target="moving_average", target_decay=0.8)
    model = build(method, **SMALL)
    model.begin(images=IMAGES)
    model.target.set_eta(torch.randn(IMAGES, 12), torch.arange(IMAGES))
    eta = {i: row.clone() for i, row in enumerate(model.target.eta)}
    assert all(row.norm().item() == pytest.approx(1) for row in eta.values())
    for step in range(5):
        x, index = batch(step)
        out = model(*x, index=index)
        assert torch.equal(model.target.eta, torch.stack(list(eta.values()))), "forward is pure"
        z = [F.normalize(z, dim=1) for z in out.projections]
        for row, i in enumerate(index.tolist()):
            t = [0.8 * eta[i] + 0.2 * view[row] for view in z]
            torch.testing.assert_close(torch.stack([v[row] for v in out.targets]), torch.stack(t))
            eta[i] = F.normalize(t[0] + t[1], dim=0).detach()
        model.after_step(out, step, index)
        torch.testing.assert_close(model.target.eta, torch.stack(list(eta.values())))
        eta = dict(enumerate(model.target.eta.clone()))


def test_memory_of_eta():
    assert eta_bytes(METHODS["simsiam"], 10**6) == 0
    assert eta_bytes(small(target="moving_average", dim=2048), 1_281_167) == 1_281_167 * 2048 * 4
    model = build(small(target="moving_average"), **SMALL)
    model.begin(images=100)
    assert model.target.eta.nbytes == eta_bytes(model.method, 100)


def test_a_memory_bank_is_instance_discrimination():
    """Wu et al., 2018, in plain loops: the bank before the step, and negatives drawn from it."""
    cells = {"predictor": "none", "pairs": "single", "criterion": "info_nce", "tau": 0.07}
    method = small(target="moving_average", target_decay=0.5, target_fresh=False, queue=10, **cells)
    model = build(method, **SMALL)
    model.begin(images=IMAGES)
    bank = F.normalize(torch.randn(IMAGES, 12), dim=1)
    model.target.set_eta(bank, torch.arange(IMAGES))
    negatives = model.criterion.queue.clone()  # of the first step: random directions
    for step in range(3):
        (x,), index = batch(step, views=1)
        out = model(x, index=index)
        v = F.normalize(out.projections[0], dim=1)
        by_hand = 0.0
        for n, i in enumerate(index.tolist()):
            scores = torch.stack([v[n] @ bank[i], *(v[n] @ other for other in negatives)]) / 0.07
            by_hand = by_hand - scores.log_softmax(0)[0] / N
        torch.testing.assert_close(out.loss, by_hand)
        weight = model.projector[0].weight
        torch.testing.assert_close(
            *(
                torch.autograd.grad(loss, weight, retain_graph=True)[0]
                for loss in (out.loss, by_hand)
            )
        )
        model.after_step(out, step, index)
        bank[index] = F.normalize((bank[index] + v.detach()) / 2, dim=1)
        torch.testing.assert_close(model.target.eta, bank)
        negatives = model.criterion.queue.clone()
        rows = torch.cdist(negatives, bank).argmin(1)
        torch.testing.assert_close(negatives, bank[rows])
        assert len(rows.unique()) > 3


def test_a_teachers_features_are_constant_targets():
    model = build(small(predictor="none", pairs="single", target="teacher"), **SMALL)
    model.begin(images=IMAGES)
    features = torch.randn(IMAGES, 12)
    model.target.set_eta(features, torch.arange(IMAGES))
    before = set(model.state_dict())
    for step in range(2):
        (x,), index = batch(step, views=1)
        out = model(x, index=index)
        cosine = F.cosine_similarity(out.predictions[0], features[index])
        torch.testing.assert_close(out.loss, -cosine.mean())
        model.after_step(out, step, index)
        torch.testing.assert_close(model.target.eta, F.normalize(features, dim=1))
    assert set(model.state_dict()) == before and not any("eta" in key for key in before)


@pytest.mark.parametrize(
    "cells", [{"predictor": "mlp"}, {"head_bn": ("proj_out",)}, {"output_bias": False}]
)
def test_the_classifier_of_clusters_is_the_last_layer_and_has_a_bias(cells):
    """It begins anew in each epoch (DeepCluster, 3.3); other heads are refused before the run."""
    row = {"target": "kmeans", "pairs": "single", "criterion": "classification"}
    row |= {"predictor": "none", "head_bn": ()} | cells
    with pytest.raises(UsageError, match="target kmeans begins a new classifier"):
        small(**row)


def test_clusters_count_alike():
    """The weighted loss is that of images drawn uniformly over the clusters (DeepCluster, 3.3)."""
    cells = {"predictor": "none", "pairs": "single", "criterion": "classification"}
    model = build(small(target="kmeans", head_bn=("proj_hidden",), **cells), **SMALL)
    model.begin(images=IMAGES)
    labels = torch.tensor([0] * 12 + [1] * 8 + [2] * 4)
    model.target.labels.copy_(labels)
    model.criterion.balance(labels)
    x, index = torch.randn(IMAGES, 3, 16, 16), torch.arange(IMAGES)
    out = model(x, index=index)
    losses = F.cross_entropy(out.predictions[0], labels, reduction="none")
    torch.testing.assert_close(
        out.loss, torch.stack([losses[labels == k].mean() for k in range(3)]).mean()
    )


def test_clusters_are_those_of_the_features():
    centers, kinds = torch.randn(5, 40) * 20, torch.arange(400) % 5
    found = cluster_features((centers[kinds] + torch.randn(400, 40)).numpy(), 5, seed=0)
    assert normalized_mutual_info_score(kinds.numpy(), found) == 1


def test_clusters_are_of_the_leading_directions():
    """Of 128 dimensions 8 are whitened, as 256 of 4096 in DeepCluster; noise decides nothing."""
    kinds = torch.arange(400) % 5
    signal = F.one_hot(kinds, 128).float() * 4
    found = cluster_features((signal + torch.randn(400, 128) * 0.5).numpy(), 5, seed=0)
    assert normalized_mutual_info_score(kinds.numpy(), found) > 0.95
    narrow = cluster_features(torch.randn(50, 4).numpy(), 3, seed=0)
    assert set(narrow) == {0, 1, 2}


def test_clusters_are_the_same_on_any_machine_and_for_any_seed(monkeypatch):
    """The sums of several threads would depend on time; there may be fewer images than clusters."""
    threads, fit = [], KMeans.fit

    def counted(self, x):
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "openmp"]
        threads.append({pool["num_threads"] for pool in pools})
        return fit(self, x)

    monkeypatch.setattr(KMeans, "fit", counted)
    with threadpool_limits(2, user_api="openmp"):
        found = cluster_features(torch.randn(6, 12).numpy(), 9, seed=2**32 + 5)
    assert set(found) == set(range(6))
    assert threads == [{1}]


def test_eta_moves_with_the_model():
    model = build(small(target="moving_average"), **SMALL)
    model.begin(images=8, labels=None, steps=1, per_epoch=1)
    assert model.to("meta").target.eta.device.type == "meta"


def test_expectation_is_the_minimizer_of_etas_problem():
    """Equation 9: at the mean over views the gradient of equation 5 is zero."""
    model = build(small(target="expectation", target_views=4), **SMALL).double()
    x, _ = batch(0, views=5)
    out = model(*(view.double() for view in x))
    z = [model.f(view.double()).detach() for view in x]
    for t, views in zip(out.targets, ((0, 2, 3, 4), (1, 2, 3, 4)), strict=True):
        eta = t.clone().requires_grad_()
        problem = sum((z[view] - eta).square().sum() for view in views)
        (gradient,) = torch.autograd.grad(problem, eta)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    assert len(out.projections) == 5 and len(out.predictions) == len(out.targets) == 2


def test_one_predicting_view_of_several_is_the_expectation():
    """FastSiam with pairs asymmetric is equation 9 with one view less in the mean."""
    cells = {"pairs": "asymmetric"}
    assert same(
        train(small(num_views=4, **cells)),
        train(small(target="expectation", target_views=3, **cells)),
    )


def test_each_view_predicts_the_mean_of_the_others():
    """FastSiam (Pototzky et al., 2022, equation 2), in plain loops over images and views."""
    model = build(small(num_views=3), **SMALL)
    x, _ = batch(0, views=3)
    out = model(*x)
    z, p = out.projections, out.predictions
    by_hand = 0.0
    for i, (a, b) in enumerate([(1, 2), (0, 2), (0, 1)]):
        for n in range(N):
            t = (z[a][n] + z[b][n]).detach() / 2
            by_hand = by_hand - p[i][n] @ t / (p[i][n].norm() * t.norm()) / (3 * N)
    torch.testing.assert_close(out.loss, by_hand)
    weight = model.predictor[-1].weight
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (out.loss, by_hand))
    )
    momentum = build(small(num_views=3, target="momentum"), **SMALL)
    copies = [momentum.target.copy(view) for view in x]
    expected = [(copies[a] + copies[b]) / 2 for a, b in [(0, 1), (0, 2), (1, 2)]]
    for ours, theirs in zip(momentum(*x).targets, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["simsiam", "swav"])
def test_small_crops_predict_every_target_and_give_none(name):
    """Multi-crop (SwAV, section 3.2), as SwAV's code sums it: over targets and other views."""
    cells = {"dim": 12, "proj_hidden": 10, "pred_dim": 6, "prototypes": 7, "small_crops": 2}
    model = build(replace(METHODS[name], **cells), **SMALL)
    x = batch(0, views=2)[0] + [view[..., :8, :8] for view in batch(1, views=2)[0]]
    out = model(*x)
    if name == "swav":  # one batch for all crops of a size, and one for all features
        h = [model.backbone(torch.cat(views)) for views in (x[:2], x[2:])]
        z = model.projector(torch.cat(h)).chunk(4)
    else:
        z = [model.projector(model.backbone(view)) for view in x]
    p = [model.predictor(view) for view in z]
    by_hand = torch.zeros(())
    for i in (0, 1):
        t = model.criterion.encode_target(z[i]).detach()
        for v in set(range(4)) - {i}:
            by_hand = by_hand + model.criterion(p[v], t) / (2 * 3)
    torch.testing.assert_close(out.loss, by_hand)
    weight = model.backbone.conv1.weight
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (out.loss, by_hand))
    )
    assert len(out.targets) == 2 and len(out.predictions) == 4
    assert [view for _, views in model.terms for view in views if view > 1] == []


def test_labels_are_targets():
    model = build(METHODS["supervised"], **SMALL)
    with pytest.raises(UsageError, match=r"call model\.begin with labels"):
        model(batch(0)[0][0], index=torch.arange(N))
    labels = torch.randint(10, (IMAGES,))
    model.begin(labels=labels)
    (x, _), index = batch(1)
    out = model(x, index=index)
    by_hand = F.cross_entropy(model.projector(model.backbone(x)), labels[index])
    torch.testing.assert_close(out.loss, by_hand)
    assert out.projections[0].shape == (N, 1000)


def test_a_copy_starts_from_the_weights_at_the_start_of_the_run():
    """`init` loads other weights into the backbone after it was built."""
    model = build(small(target="momentum"), **SMALL)
    with torch.no_grad():
        model.backbone.conv1.weight.add_(1)
    model.begin(images=IMAGES)
    assert torch.equal(model.target.copy[0].conv1.weight, model.backbone.conv1.weight)


def test_split_statistics_are_an_eighths_and_the_copys_company_differs():
    """MoCo: with the same grouping on both sides, batch norm would reveal a query's key."""
    method = small(predictor="none", target="momentum", bn="split", head_bn=("proj_hidden",))
    model = build(method, **SMALL).double()
    x = [torch.randn(16, 3, 16, 16, dtype=torch.float64) for _ in range(2)]
    out = model(*x)
    f = deepcopy(model.f)
    for view, z, t in zip(x, out.projections, out.targets):
        torch.testing.assert_close(z[2:4], f(view[2:4]))
        torch.testing.assert_close(t[[1, 9]], f(view[[1, 9]]))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_direct_predictor_is_computed_from_the_correlations(power):
    """Wang et al., 2021, in NumPy: W = (F / |F|) ** power + epsilon I, F a moving average."""
    method = small(predictor="direct", direct_power=power)
    model, f = build(method, **SMALL), np.zeros((12, 12))
    assert torch.equal(model.predictor.weight, 0.1 * torch.eye(12))
    for step in range(3):
        x, index = batch(step)
        out = model(*x, index=index)
        p = [z.detach().numpy() @ model.predictor.weight.numpy() for z in out.projections]
        np.testing.assert_allclose(out.predictions[0].detach(), p[0], rtol=1e-4, atol=1e-6)
        model.after_step(out, step, index)
        z = torch.cat(out.projections).detach().double().numpy()
        f = 0.3 * f + 0.7 * z.T @ z / len(z)
        s, u = np.linalg.eigh(f)
        w = u @ np.diag((s / s.max()).clip(0) ** power + 0.1) @ u.T
        np.testing.assert_allclose(model.predictor.weight, w, atol=2e-3)
    assert not list(model.predictor.parameters())


def test_a_direct_predictor_that_never_learns_is_finite():
    model = build(small(predictor="direct", direct_decay=1.0), **SMALL)
    x, index = batch(0)
    model.after_step(model(*x, index=index), 0, index)
    torch.testing.assert_close(model.predictor.weight, 0.1 * torch.eye(12))


def test_iso_loss_is_the_gradient_of_its_equation():
    """Halvagal et al., 2023: |z1 - sg(z2 + z1 - W z1)| ** 2 / 2 has the gradient W z1 - z2."""
    method = small(predictor="direct", iso_loss=True, pairs="asymmetric", criterion="square")
    CRITERIA["square"] = type(
        "Square", (Criterion,), {"forward": lambda self, p, t: (p - t).square().sum() / 2}
    )
    try:
        model = build(method, **SMALL).double()
        model.predictor.weight.copy_(torch.randn(12, 12))
        x, _ = batch(0)
        out = model(*(view.double() for view in x))
        z1, z2 = out.projections
        w = model.predictor.weight
        by_hand = (z1 - (z2 + z1 - z1 @ w).detach()).square().sum() / 2
        torch.testing.assert_close(out.loss, by_hand)
        weight = model.projector[0].weight
        torch.testing.assert_close(
            *(torch.autograd.grad(y, weight, retain_graph=True)[0] for y in (out.loss, by_hand))
        )
    finally:
        del CRITERIA["square"]
