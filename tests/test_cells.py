"""Every row and every cell trains, and its state survives a stop."""

import importlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import QUICK

import simsiam
from simsiam.config.methods import METHODS
from simsiam.data.batches import iter_batches, steps_per_epoch
from simsiam.data.images import hold_out, sample
from simsiam.errors import Stopped, UsageError
from simsiam.model.optimizers import set_lr
from simsiam.monitoring.gauges import effective_rank
from simsiam.runs.compose import compose_recipe
from simsiam.runs.run_folder import Run
from simsiam.training.prepare import build_training_setup, initialize_eta

TEACHER = Path(tempfile.mkdtemp()) / "teacher"
WIDTH = 8 * QUICK["width"]  # of its features


@pytest.fixture(scope="module", autouse=True)
def teacher():
    yield simsiam.pretrain("shapes", out=TEACHER, **QUICK)
    shutil.rmtree(TEACHER.parent)


def needed(row) -> dict[str, object]:
    """The settings without which a row cannot begin: a teacher, whose features have a width."""
    return {"teacher": str(TEACHER), "dim": WIDTH} if row.target == "teacher" else {}


@pytest.mark.parametrize("name", METHODS)
def test_every_row_trains_three_steps_on_shapes(name):
    row = METHODS[name]
    words = QUICK | {"base_lr": row.base_lr, "dim": 16} | needed(row)
    run = simsiam.pretrain("shapes", method=name, **words)
    losses = [line["loss"] for line in Run(run).metrics()]
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())
    method = Run(run).recipe.method
    assert method.optimizer == row.optimizer and method.name == name
    assert (
        method.views == row.views or name == "simsiam"
    )  # whose views are the recipe's, chosen for shapes


CELLS = [
    {"stop_gradient": False}, {"predictor": "none"}, {"predictor": "none", "pairs": "asymmetric"},
    {"predictor": "fixed"}, {"predictor_lr": "cosine"}, {"predictor_lr_scale": 10.0},
    {"head_bn": ()}, {"head_bn": ("proj_hidden",)},
    {"head_bn": ("proj_hidden", "proj_out", "pred_hidden", "pred_out")}, {"output_bn_affine": True},
    {"output_bias": False}, {"criterion": "cross_entropy"}, {"criterion": "nt_xent"},
    {"criterion": "info_nce", "queue": 64}, {"criterion": "swapped", "prototypes": 20},
    {"criterion": "barlow_twins"}, {"criterion": "vicreg"}, {"pairs": "asymmetric"},
    {"pairs": "asymmetric_2x"}, {"target": "momentum"},
    {"target": "momentum", "target_schedule": "cosine", "target_decay": 0.9},
    {"target": "alternation"}, {"target": "alternation", "target_steps": 2},
    {"target": "alternation", "target_steps": 0}, {"target": "moving_average", "predictor": "none"},
    {"target": "moving_average", "stop_gradient": False},
    {"target": "expectation", "target_views": 3},
    {"target": "expectation", "target_views": 2, "stop_gradient": False},
    {"target": "expectation", "target_views": 2, "pairs": "asymmetric_2x"},
    {"dim": 8, "pred_dim": 2}, {"batch_size": 32, "warmup_epochs": 1, "epochs": 2, "steps": None},
    {"optimizer": "lars"}, {"optimizer": "adamw"},
    {"optimizer": "lars", "exclude": "bias_and_norm"},
    {"optimizer": "sgd", "exclude": "bias_and_norm"}, {"bn": "joint"}, {"bn": "split"},
    {"target": "momentum", "bn": "joint"}, {"target": "momentum", "bn": "split"},
    {"method": "simclr", "predictor": "mlp"},
    {"method": "simclr", "predictor": "mlp", "stop_gradient": True},
    {"method": "swav", "predictor": "mlp", "prototypes": 20},
    {"method": "swav", "stop_gradient": False},
    {"method": "swav", "prototype_norm": "outside", "freeze_prototypes": 1,
     "sinkhorn_iterations": 1},
    {"method": "byol", "target": "shared", "predictor_lr_scale": 10.0},
    *({"method": name, "equal_terms": True} | needed(row) for name, row in METHODS.items()),
    {"method": "instance_discrimination", "target_fresh": True},
    {"target": "teacher"} | needed(METHODS["distillation"]),
    {"interpolation": "bicubic"}, {"num_views": 3}, {"num_views": 3, "pairs": "asymmetric"},
    {"num_views": 3, "target": "moving_average", "predictor": "none"},
    {"num_views": 3, "criterion": "nt_xent"}, {"cut_init": 9.0},
    {"small_crops": 2, "small_crop_size": 8}, {"small_crops": 1, "num_views": 3},
    {"small_crops": 2, "method": "swav", "prototypes": 20}, {"small_crops": 1, "bn": "split"},
    {"predictor": "direct"}, {"predictor": "direct", "direct_power": 1.0, "iso_loss": True},
    {"lr_schedule": "constant_decay", "predictor_lr": "cosine", "predictor_weight_decay": 0.0},
]  # fmt: skip


@pytest.mark.parametrize(
    "cells",
    CELLS,  # the path of the teacher differs between the processes of the tests
    ids=lambda cells: " ".join(f"{k}={v}" for k, v in cells.items() if k != "teacher"),
)
def test_every_cell_trains_three_steps_on_shapes(cells):
    recipe, source, _ = compose_recipe(
        "shapes", None, QUICK | {"dim": 16, "precision": "float32"} | cells
    )
    model, optimizer, compute = build_training_setup(recipe)
    images, _ = hold_out(sample(source.train, 70), 6)
    per_epoch = steps_per_epoch(len(images), recipe.batch_size)
    model.begin(
        images=len(images), labels=torch.from_numpy(images.labels), steps=3, per_epoch=per_epoch
    )
    initialize_eta(model, images, recipe, compute, resumed=False)
    before = [p.clone() for p in model.parameters()]
    for batch in iter_batches(images, recipe, 0, 3, compute.device):
        set_lr(
            optimizer,
            batch.step,
            peak_lr=recipe.peak_lr,
            steps=3,
            warmup_steps=recipe.method.warmup_epochs,
        )
        out = model(*batch.views, index=batch.index)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.after_step(out, batch.step, batch.index)
        assert out.loss.isfinite()
    assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters()))


def test_eta_starts_with_one_pass_over_every_image():
    """52 images in batches of 16: the last batch overlaps. The model itself does not change."""
    words = QUICK | {"target": "moving_average", "predictor": "none", "precision": "float32"}
    recipe, source, _ = compose_recipe("shapes", None, words)
    model, _, compute = build_training_setup(recipe)
    images = sample(source.train, 52)
    model.begin(images=len(images))
    before = {k: v.clone() for k, v in model.state_dict().items() if k != "target.eta"}
    initialize_eta(model, images, recipe, compute, resumed=False)
    torch.testing.assert_close(model.target.eta.norm(dim=1), torch.ones(52))
    assert len(model.target.eta.unique(dim=0)) == 52
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("words", [{"method": "distillation"}, {"teacher": "patches"}])
def test_a_teacher_and_its_target_go_together(words):
    with pytest.raises(UsageError, match="--teacher WEIGHTS go together"):
        compose_recipe("shapes", None, QUICK | words)


def test_a_teacher_decides_the_width_of_the_predictions():
    words = QUICK | needed(METHODS["distillation"]) | {"method": "distillation"}
    del words["dim"]
    recipe, _, _ = compose_recipe("shapes", None, words)
    assert recipe.method.dim == WIDTH
    with pytest.raises(UsageError, match="leave --dim out"):
        compose_recipe("shapes", None, words | {"dim": 7})


def test_more_clusters_than_images_are_refused_before_training():
    with pytest.raises(UsageError, match=r"finds 10000 clusters .* use --dim"):
        simsiam.pretrain("shapes", **QUICK | {"method": "deepcluster", "dim": 10000})


STATEFUL = [
    {"target": "moving_average", "predictor": "none"}, {"target": "alternation", "target_steps": 4},
    {"method": "byol", "base_lr": 1.0}, {"method": "moco_v2_plus", "queue": 100},
    {"method": "swav", "base_lr": 1.0}, {"method": "instance_discrimination", "queue": 30},
    {"method": "deepcluster"}, {"method": "distillation"} | needed(METHODS["distillation"]),
]  # fmt: skip


@pytest.mark.parametrize("cells", STATEFUL, ids=lambda cells: next(iter(cells.values())))
def test_what_targets_remember_survives_a_resume_bit_for_bit(cells, monkeypatch, capfd):
    words = QUICK | {"dim": 16, "steps": 6} | cells
    whole = simsiam.pretrain("shapes", out="whole", **words)
    kept = Run(whole).recipe.method.target in ("moving_average", "teacher")
    assert ("eta      " in capfd.readouterr().err) == kept
    module = importlib.import_module("simsiam.training.pretrain")
    real, signals = module.compute_gauges, [signal.SIGTERM]
    monkeypatch.setattr(
        module,
        "compute_gauges",
        lambda out: (signals and os.kill(os.getpid(), signals.pop()), real(out))[1],
    )
    with pytest.raises(Stopped, match="stopped at step 2"):
        simsiam.pretrain("shapes", out="half", **words)
    simsiam.resume("half")
    one, other = (Run(run).checkpoint()["model"] for run in (whole, "half"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert [line["loss"] for line in Run(whole).metrics()] == [
        line["loss"] for line in Run("half").metrics()
    ]


def test_a_memory_bank_begins_with_random_vectors():
    """As in the code of instance discrimination; whatever the network's projections are."""
    words = QUICK | {"method": "instance_discrimination", "dim": 64, "precision": "float32"}
    recipe, source, _ = compose_recipe("shapes", None, words)
    model, _, compute = build_training_setup(recipe)
    images = sample(source.train, 300)
    model.begin(images=300)
    initialize_eta(model, images, recipe, compute, resumed=False)
    eta = model.target.eta.clone()
    torch.testing.assert_close(eta.norm(dim=1), torch.ones(300))
    assert effective_rank(eta) > 45  # of vectors of the network it is below 10
    initialize_eta(model, images, recipe.replace(seed=1), compute, resumed=False)
    assert not torch.equal(model.target.eta, eta)
    initialize_eta(model, images, recipe, compute, resumed=True)
    assert not torch.equal(model.target.eta, eta)
