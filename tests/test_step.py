"""The gradients of a step are those of Algorithm 1. Tests of a GPU are skipped without one."""

from copy import deepcopy
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import QUICK, TINY

from simsiam.config.methods import METHODS
from simsiam.config.recipes import Recipe
from simsiam.data.batches import iter_batches
from simsiam.data.images import from_arrays
from simsiam.model.optimizers import build_optimizer, set_lr
from simsiam.model.precision import Compute, pick_device
from simsiam.model.siamese import build
from simsiam.monitoring.nearest_neighbors import knn_scores
from simsiam.runs.run_folder import Run
from simsiam.training import step
from simsiam.training.launch import pretrain, resume
from simsiam.training.step import GradientStep, compile_backbone

CPU = torch.device("cpu")
GPU = torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Every row, small, and the targets that are no row of their own.
SMALL = {
    "dim": 16,
    "proj_hidden": 16,
    "pred_dim": 8,
    "queue": 64,
    "prototypes": 12,
    "freeze_prototypes": 2,
}
ROWS = {name: replace(row, **SMALL) for name, row in METHODS.items()}
ROWS |= {
    "alternation": replace(ROWS["simsiam"], target="alternation", target_steps=3),
    "moving_average": replace(ROWS["simsiam"], target="moving_average", target_decay=0.8),
    "expectation": replace(ROWS["simsiam"], target="expectation", target_views=3),
}


def model_of(row):
    model = build(row, backbone="resnet10", image_size=16, width=8)
    model.begin(images=40, labels=torch.arange(40) % 10, steps=10, per_epoch=5)
    return model


def given(row, at, device):
    rng = torch.Generator().manual_seed(at)
    views = [torch.randn(16, 3, 16, 16, generator=rng).to(device) for _ in range(row.view_count)]
    return views, torch.randperm(40, generator=rng)[:16].to(device)


@pytest.mark.parametrize("name", ROWS)
def test_gradients_are_those_of_the_weighted_loss_and_nothing_is_held_on_to(name):
    model = model_of(ROWS[name])
    other, (views, index) = deepcopy(model), given(ROWS[name], 0, CPU)
    gradients = GradientStep(model, Compute(CPU, "float32"))
    for _ in range(2):  # what was there before is replaced
        output = gradients(views, index, 0.5)
    other(*views, index=index)  # batch norm has seen the batch twice
    loss = other(*views, index=index).loss
    wanted = torch.autograd.grad(
        0.5 * loss, [w for w in other.parameters() if w.requires_grad], allow_unused=True
    )
    got = [w.grad for w in model.parameters() if w.requires_grad]
    assert all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(got, wanted, strict=True)
    )
    assert output.loss == loss.detach()
    assert not any(x.requires_grad for x in [output.loss, *chain(*output[1:])])


def test_a_compiled_backbone_is_the_same_one(monkeypatch):
    """It trains the model's own weights, under the names that checkpoints know."""
    model = model_of(ROWS["simsiam"])
    names, used = list(model.state_dict()), []

    class Fast(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

        def forward(self, x):
            used.append(x)
            return self._orig_mod(x)

    monkeypatch.setattr(torch, "compile", Fast)
    monkeypatch.setattr(step, "compile_works", lambda device: True)
    fast = compile_backbone(model)
    GradientStep(fast, Compute(CPU, "float32"))(*given(ROWS["simsiam"], 0, CPU))
    assert len(used) == 2 and list(model.state_dict()) == names
    assert all(w.grad is not None for w in model.parameters())
    model(*given(ROWS["simsiam"], 0, CPU)[0])
    assert len(used) == 2  # who measures the model itself compiles nothing anew


def test_where_nothing_compiles_the_model_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(step, "compile_works", lambda device: False)
    model = model_of(ROWS["simsiam"])
    assert compile_backbone(model) is model


# --- with a GPU ---


@on_gpu
@pytest.mark.parametrize("name", ROWS)
def test_a_graph_is_the_step_that_it_recorded(name):
    """Ten steps with and without the graph give the same loss, gradients and state."""
    pick_device("cuda")  # cuDNN chooses kernels as in a run
    models = [model_of(ROWS[name]).to(GPU).to(memory_format=torch.channels_last) for _ in range(2)]
    graphed, plain = (GradientStep(model, Compute(GPU, "float32")) for model in models)
    optimizers, plain.warmup_calls_left = (
        [build_optimizer(model, ROWS[name]) for model in models],
        -1,
    )
    for at in range(10):
        models[0].load_state_dict(models[1].state_dict())  # rounding would grow from step to step
        optimizers[0].load_state_dict(optimizers[1].state_dict())
        outputs = []
        for model, gradients, optimizer in zip(models, (graphed, plain), optimizers):
            set_lr(optimizer, at, peak_lr=0.1, steps=10, warmup_steps=0)
            views, index = given(ROWS[name], at, GPU)
            outputs.append(gradients(views, index))
            optimizer.step()
            model.after_step(outputs[-1], at, index)
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-4, atol=1e-5)
        for key, value in models[0].state_dict().items():
            torch.testing.assert_close(
                value, models[1].state_dict()[key], rtol=1e-3, atol=1e-4, msg=key
            )
    assert graphed.graph is not None and plain.graph is None


@on_gpu
def test_views_and_their_order_are_the_processors():
    images = from_arrays(
        "train", np.random.default_rng(0).integers(0, 256, (90, 3, 32, 32), dtype=np.uint8)
    )
    recipe = Recipe().replace(image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=30)
    for ours, theirs in zip(
        iter_batches(images, recipe, 0, 7, GPU),
        iter_batches(images, recipe, 0, 7, CPU),
        strict=True,
    ):
        assert ours.step == theirs.step and ours.index.equal(theirs.index)
        for a, b in zip(ours.views, theirs.views, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=2e-3)


@on_gpu
@pytest.mark.parametrize("words", [{}, {"compile": True}], ids=["eager", "compiled"])
def test_on_a_gpu_a_run_goes_on_bit_for_bit(words, tmp_path):
    words |= TINY | {"epochs": 1, "steps": 12, "width": 16, "knn_every": 9, "save_seconds": 0.0}
    whole = Run(pretrain("shapes", out=tmp_path / "whole", device="cuda", **words))
    with pytest.MonkeyPatch.context() as patch:
        save = Run.save

        def killed(self, name, state):
            save(self, name, state)
            if state["step"] == 7:
                raise KeyboardInterrupt

        patch.setattr(Run, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain("shapes", out=tmp_path / "part", device="cuda", **words)
    part = Run(resume(tmp_path / "part"))
    a, b = whole.checkpoint()["model"], part.checkpoint()["model"]
    assert all(torch.equal(a[key], b[key]) for key in a)
    losses = [
        [(line["step"], line["loss"]) for line in run.metrics() if "loss" in line]
        for run in (whole, part)
    ]
    assert losses[0] == losses[1]


@on_gpu
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_is_measured_on_a_gpu(name, tmp_path):
    words = QUICK | {
        "dim": 16,
        "proj_hidden": 16,
        "equal_terms": True,
        "device": "cuda",
        "method": name,
    }
    words.pop("pred_dim")
    run = Run(pretrain("shapes", out=tmp_path / "run", **words))
    assert run.json("summary.json")["steps"] == 3


@on_gpu
def test_neighbors_are_the_processors():
    rng = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(2000, 16, generator=rng), torch.randn(300, 16, generator=rng)
    labels = torch.randint(0, 10, (2000,), generator=rng)
    on_cpu = knn_scores(bank, labels, queries, classes=10, k=20)
    on_gpu = knn_scores(bank.to(GPU), labels.to(GPU), queries.to(GPU), classes=10, k=20)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
