"""The rows of METHODS: gradients flow where they say, no encoder pass is wasted, settings agree."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK

import simsiam
from simsiam.config import figure3
from simsiam.config.method import EQUAL_TERMS, Method
from simsiam.config.methods import METHODS
from simsiam.config.recipes import Recipe
from simsiam.errors import UsageError
from simsiam.model.siamese import build
from simsiam.runs.compose import compose_recipe
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source

HERE = Path(__file__).parents[1]
SMALL = {"backbone": "resnet10", "width": 4, "image_size": 16}
NARROW = {"dim": 12, "proj_hidden": 10, "pred_dim": 6, "queue": 40, "prototypes": 7}
N = 16


def small(name: str, **cells) -> Method:
    return replace(METHODS[name], **NARROW | cells)


def begin(method: Method, dtype: torch.dtype = torch.float64):
    """A model, one batch of views for it, and the positions of the images."""
    torch.manual_seed(0)
    model = build(method, **SMALL).to(dtype)
    model.begin(images=N, labels=torch.arange(N) % 10, steps=10, per_epoch=5)
    return model, list(torch.randn(method.view_count, N, 3, 16, 16, dtype=dtype)), torch.arange(N)


# --- what a row is ---


def test_the_plus_of_moco_is_its_symmetry():
    """The difference between two rows is the difference between two methods."""
    one, plus = (asdict(METHODS[name]) for name in ("moco_v2", "moco_v2_plus"))
    assert {k for k in one if one[k] != plus[k]} == {"name", "pairs", "loss_scale"}


def test_the_constant_lr_of_the_predictor_is_simsiams_alone():
    assert [name for name, row in METHODS.items() if row.predictor_lr == "constant"] == ["simsiam"]


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_comes_through_the_target_only_when_asked(name):
    """With stop-gradient the gradient is that for constant targets; without, it is another one."""
    row = small(name)
    rows = (
        [row]
        if row.target in ("momentum", "teacher", "kmeans", "labels") or not row.target_fresh
        else [row, replace(row, stop_gradient=not row.stop_gradient)]
    )
    for method in rows:
        model, x, index = begin(method)
        weights = [p for p in model.parameters() if p.requires_grad]
        out = model(*x, index=index)
        ours = torch.autograd.grad(out.loss, weights, retain_graph=True, allow_unused=True)
        p = dict(zip(model.predicted_views, out.predictions))
        groups = sorted({views for _, views in model.terms})
        t = {views: x.detach() for views, x in zip(groups, out.targets, strict=True)}
        terms = [model.criterion(p[i], t[views]) for i, views in model.terms]
        constant = method.loss_scale * sum(terms) / len(terms)
        theirs = torch.autograd.grad(constant, weights, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(out.loss, constant)
        equal = all(
            torch.allclose(a, b, rtol=1e-9, atol=1e-12)
            for a, b in zip(ours, theirs)
            if a is not None
        )
        assert equal == method.stop_gradient
        assert all(t.requires_grad != method.stop_gradient for t in out.targets)
        out.loss.backward()
        assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())


# Batches that pass through an encoder in a step: those of the trained encoder and of the copy.
PASSES = {
    "simsiam": 2, "byol": 2 + 2, "simclr": 2, "moco_v2": 1 + 1, "moco_v2_plus": 2 + 2, "swav": 2,
    "barlow_twins": 2, "vicreg": 2, "distillation": 1, "deepcluster": 1,
    "instance_discrimination": 1, "supervised": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        *((small(name), PASSES[name]) for name in METHODS),
        (small("simsiam", pairs="asymmetric"), 2),
        (small("simsiam", pairs="asymmetric_2x"), 4),
        (small("byol", pairs="asymmetric_2x"), 2 + 2),
        (small("simsiam", target="alternation", target_steps=10), 2 + 2),
        (small("simsiam", target="alternation", target_steps=10, pairs="asymmetric"), 1 + 1),
        (small("simsiam", target="moving_average"), 2),
        (small("simsiam", target="expectation", target_views=4), 5),
        (small("simsiam", num_views=4), 4),
        (small("byol", num_views=3), 3 + 3),
        (small("byol", small_crops=3), 2 + 3 + 2),
        (small("distillation", small_crops=2), 3),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else str(value),
)
def test_no_row_wastes_encoder_passes(method, passes):
    model, x, index = begin(method, torch.float32)
    counts = []
    copy = [model.target.copy[0]] if method.target in ("momentum", "alternation") else []
    for encoder in [model.backbone, *copy]:
        encoder.register_forward_hook(lambda module, inputs, h: counts.append(len(h)))
    model(*x, index=index)
    assert sum(counts) == passes * N


def test_joint_statistics_are_of_all_views_in_one_call():
    model, x, _ = begin(small("simclr"))
    joint = model.f(torch.cat(x)).chunk(2)
    for z, expected in zip(model(*x).projections, joint):
        torch.testing.assert_close(z, expected)
    assert not torch.allclose(model.f(x[0]), joint[0])


def test_simclr_is_nt_xent_of_its_projections():
    """The row's loss, computed by the model, is SimCLR's loss over 2N images."""
    model, x, _ = begin(small("simclr"))
    z = F.normalize(torch.cat(model(*x).projections), dim=1)
    logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    full = F.cross_entropy(logits, torch.arange(2 * N).roll(N))
    torch.testing.assert_close(model(*x).loss, full)


def test_queued_keys_are_the_second_views_and_in_the_plus_both():
    for name in ("moco_v2", "moco_v2_plus"):
        model, x, index = begin(small(name))
        out = model(*x, index=index)
        model.after_step(out, 0, index)
        keys = torch.cat(out.targets)
        torch.testing.assert_close(model.criterion.queue[-len(keys) :], F.normalize(keys, dim=1))
        assert len(keys) == N * (1 + (name == "moco_v2_plus"))
    assert len(out.targets) == 2


def test_too_few_views_are_refused():
    model, x, _ = begin(small("simsiam", pairs="asymmetric_2x"))
    with pytest.raises(UsageError, match="simsiam takes 4 views of each image, not 2"):
        model(*x[:2])


# --- settings that contradict each other, and equal terms ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "momentum", "stop_gradient": False}, "a second encoder gets no gradient"),
        ({"target": "alternation", "stop_gradient": False}, "a second encoder gets no gradient"),
        (
            {"queue": 4096},
            "queue has no effect here: it belongs to criterion info_nce, not to cosine",
        ),
        (
            {"tau": 0.5},
            "tau has no effect here: it belongs to criterion nt_xent or info_nce or swapped",
        ),
        (
            {"target_views": 4},
            "target_views has no effect here: it belongs to target expectation, not to shared",
        ),
        (
            {"target": "expectation", "target_views": 0},
            "target_views is 0; it lies between 1 and 1000",
        ),
        ({"target_decay": 0.5}, "belongs to target momentum or moving_average, not to shared"),
        ({"target": "moving_average", "target_schedule": "cosine"}, "belongs to target momentum"),
        (
            {"target": "momentum", "target_decay": 1.5},
            "target_decay is 1.5; it lies between 0 and 1",
        ),
        (
            {"method": "barlow_twins", "pairs": "asymmetric_2x"},
            "barlow_twins is symmetric already",
        ),
        ({"target": "labels"}, "criterion classification goes together with target labels"),
        (
            {"method": "supervised", "criterion": "cosine"},
            "criterion classification goes together with target labels",
        ),
        ({"pairs": "single"}, "use other pairs, or target moving_average or teacher"),
        ({"num_views": 4, "pairs": "asymmetric_2x"}, "use pairs symmetric"),
        ({"num_views": 4, "target": "expectation"}, "which averages targets"),
        ({"method": "swav", "num_views": 3}, "which averages targets"),
        ({"small_crop_size": 16}, "small_crop_size has no effect here: give small_crops"),
        ({"small_crops": 2, "small_crop_scale": (0.3, 0.1)}, "the smaller one first"),
        ({"crop_max": 0.1}, "crop_max must not be smaller"),
        ({"method": "swav", "target": "moving_average"}, "the targets of swapped are codes"),
        ({"bn": "split", "batch_size": 8}, "8 parts need 16 images"),
        ({"method": "moco_v3"}, "unknown method 'moco_v3': did you mean 'moco_v2'"),
        ({"method": "byol", "epochs": 5}, "warmup_epochs is 10 and epochs 5"),
    ],
)
def test_contradictions_are_refused_in_one_line(settings, message):
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        Recipe().replace(**settings)
    assert "\n" not in str(error.value)


def test_an_unknown_criterion_is_refused_before_anything_is_made():
    with pytest.raises(UsageError, match="unknown criterion 'cosin': did you mean 'cosine'"):
        simsiam.pretrain("shapes", criterion="cosin", **QUICK)
    assert not list(Path().iterdir())


def test_harmless_cells_are_not():
    Recipe().replace(predictor="none", predictor_lr="cosine", pred_dim=9)
    Recipe().replace(
        method="byol", target="shared", predictor_lr_scale=10.0
    )  # footnote 2; its target_decay is not used


def test_supervised_needs_labels_that_fit(tmp_path):
    with pytest.raises(UsageError, match="at most dim = 4 classes; shapes has 10 classes"):
        simsiam.pretrain("shapes", method="supervised", **QUICK | {"dim": 4})
    source = open_source("shapes")
    unlabeled = replace(source, train=replace(source.train, labels=None))
    from simsiam.training.prepare import prepare_data

    with pytest.raises(UsageError, match="has no labels"):
        prepare_data(compose_recipe("shapes", None, QUICK | {"method": "supervised"})[0], unlabeled)


def test_equal_terms_are_those_of_the_recipe_at_hand():
    """Appendix D trains SimCLR with SimSiam's CIFAR setting, not with its ImageNet one."""
    ours = Recipe().replace(base_lr=0.03, weight_decay=5e-4, blur=0.0)
    theirs = ours.replace(method="simclr", equal_terms=True).method
    assert (theirs.criterion, theirs.dim, theirs.bn) == ("nt_xent", 128, "joint")
    for cell in EQUAL_TERMS:
        assert getattr(theirs, cell) == getattr(ours.method, cell)
    own = ours.replace(method="simclr").method
    assert own.optimizer == "lars" and own.views[0].blur == 0.5
    again = Recipe(method=METHODS["byol"]).replace(equal_terms=True, base_lr=0.7).method
    assert (again.optimizer, again.base_lr, again.views) == ("sgd", 0.7, METHODS["simsiam"].views)


# --- pages ---


def test_the_readmes_table_and_the_drawing_are_current():
    """`simsiam methods --format markdown` and `--format svg > docs/figure3.svg` write them."""
    assert figure3.format_methods_markdown() in (HERE / "README.md").read_text()
    assert (HERE / "docs" / "figure3.svg").read_text() == figure3.draw_methods_svg() + "\n"
    assert all(
        name in figure3.format_methods_table(80) and f">{name}<" in figure3.draw_methods_svg()
        for name in METHODS
    )


@pytest.mark.parametrize("width", [80, 120, 1000])
def test_the_table_of_methods_fits_the_terminal(width):
    lines = figure3.format_methods_table(width).splitlines()
    assert max(map(len, lines)) <= width
    for row in METHODS.values():
        shown = "  ".join(line for line in lines if line.split("  ")[0] == row.name)
        assert all(cell in shown for cell in figure3.table_cells(row))


def test_the_page_add_a_method_runs(monkeypatch):
    page = (HERE / "docs" / "add_a_method.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert len([line for line in code.splitlines() if line.strip()]) < 25
    from simsiam.model.losses import CRITERIA

    before = set(METHODS), set(CRITERIA)
    real = simsiam.pretrain
    monkeypatch.setattr(
        simsiam, "pretrain", lambda *a, **settings: real(*a, **QUICK | settings), raising=False
    )
    try:
        names = {}
        exec(code, names)
        assert Run(names["run"]).recipe.method.name in METHODS.keys() - before[0]
        assert len(Run(names["run"]).metrics()) == 3
    finally:
        for name in METHODS.keys() - before[0]:
            del METHODS[name]
        for name in CRITERIA.keys() - before[1]:
            del CRITERIA[name]


# Settings of short runs, besides those of a row.
SHORT_RUNS = {
    "distillation": {"teacher": "lite0", "batch_size": 64, "limit": 2000},
    # A classifier that begins anew in each epoch has to learn fast, without h losing its rank.
    "deepcluster": {
        "equal_terms": True, "dim": 50, "proj_layers": 2, "proj_hidden": 256,
        "head_bn": ("proj_hidden",), "optimizer": "adamw", "base_lr": 0.016, "weight_decay": 0.01,
    },
    # The memory bank is random at first: few images are seen often, and the head has batch norm.
    "instance_discrimination": {
        "equal_terms": True, "proj_layers": 2, "head_bn": ("proj_hidden", "proj_out"),
        "tau": 0.3, "target_decay": 0.0, "queue": 512, "limit": 1000,
    },
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", SHORT_RUNS)
def test_a_row_is_healthy_after_200_steps_on_shapes(name, tmp_path):
    """With the recipe of `shapes`; the quick siblings are in test_cells.py and test_monitors.py."""
    words = {"method": name, "steps": 200, "knn_every": 100, "device": "cpu"} | SHORT_RUNS[name]
    run = Run(simsiam.pretrain("shapes", out=tmp_path / "run", logger="none", **words))
    summary = run.json("summary.json")
    assert summary["verdict"] == "healthy", summary["remedy"]
    assert summary["knn_top1"]["last"] > 50
