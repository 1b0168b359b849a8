"""Transfer: a record says how its numbers came about, a stopped one goes on bit for bit, no test object chooses."""

import json
import os
import shutil
import signal
from hashlib import sha256

import numpy as np
import pytest
import torch
from conftest import QUICK, flags
from torch import nn

import simsiam
from simsiam.model.precision import Compute
from simsiam.commands.main import main
from simsiam.detection import scenes, transfer
from simsiam.detection import train_detector as training
from simsiam.detection.annotations import open_annotated
from simsiam.detection.schedules import SCHEDULES, Schedule, auto_schedule
from simsiam.detection.train_detector import (
    StepDataset,
    detect_objects,
    update_bn_stats,
)
from simsiam.errors import Stopped, UsageError, WorkFailed
from simsiam.pages.report import summarize_run
from simsiam.runs.run_folder import Run, TrainingFolder

pytest.importorskip("pycocotools")
CPU = Compute(torch.device("cpu"), "float32")
BRIEF = {"steps": 4, "batch_size": 2, "warmup_steps": 0, "regions": 8, "proposals": 40, "test_proposals": 10,
         "region_size": 4, "precise_bn": 1, "precision": "float32", "device": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return simsiam.pretrain("shapes", recipe="shapes", out=path, **QUICK)


@pytest.fixture
def run(pretrained, tmp_path):
    return shutil.copytree(pretrained, tmp_path / "run")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets") / "drawn"
    scenes.write_scenes(folder, {"train": 8, "val": 3, "test": 4})
    return folder


def test_a_record_says_how_its_numbers_came_about(run, source):
    record = simsiam.transfer(run, source, task="segmentation", **BRIEF)
    (kept,) = Run(run).transfers()
    assert (
        [kept]
        == json.loads(json.dumps([record]))
        == Run(run).read_records("transfers/segmentation.json")
    )
    assert (
        set(record["metrics"]) == {"voc_box", "coco_box", "coco_mask"}
        and record["tested_by"] == "coco_mask"
    )
    for values in record["metrics"].values():
        assert values["metric"] and all(0 <= values[key] <= 100 for key in ("AP", "AP50", "AP75"))
    assert (
        record["parameters"]["steps"] == 4 and record["chosen"] == {"lr": 0.01} and record["n"] == 4
    )
    assert (
        record["train"] == "train and val"
        and record["train_images"] == 11
        and record["init"]["backbone_sha256"]
    )
    out = run / "transfers" / record["folder"]
    assert (run / "transfers" / record["picture"]).is_file() and (out / "last.pt").is_file()
    lines = TrainingFolder(out).metrics()
    assert (
        lines[-1]["step"] == 4
        and {"loss", "loss_mask", "lr", "grad_norm", "images_per_second"} <= lines[-1].keys()
    )
    assert not list(run.rglob("*.part"))
    assert summarize_run(Run(run))["transfers"][0]["shown"].startswith("data:image/webp")
    again = simsiam.transfer(
        run, source, task="segmentation", **BRIEF
    )  # nothing left to do but to look again
    assert again["metrics"] == record["metrics"] and len(Run(run).transfers()) == 1
    simsiam.transfer(run, source, task="segmentation", seed=1, **BRIEF)
    assert len(Run(run).transfers()) == 2


def test_stopped_it_goes_on_bit_for_bit(run, source, tmp_path, monkeypatch):
    whole = simsiam.transfer(shutil.copytree(run, tmp_path / "other"), source, **BRIEF)
    sow = training.seed_step

    def stopping(seed, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        sow(seed, step)

    monkeypatch.setattr(training, "seed_step", stopping)
    with pytest.raises(Stopped, match="stopped at step 2 of 4"):
        simsiam.transfer(run, source, **BRIEF)
    monkeypatch.setattr(training, "seed_step", sow)
    torch.rand(7)  # whatever else draws numbers
    parts = simsiam.transfer(run, source, **BRIEF)
    outs = [path / "transfers" / parts["folder"] for path in (run, tmp_path / "other")]
    ends = [torch.load(out / "last.pt", weights_only=True) for out in outs]
    assert all(
        torch.equal(a, b)
        for a, b in zip(ends[0]["model"].values(), ends[1]["model"].values(), strict=True)
    )
    assert parts["metrics"] == whole["metrics"]
    assert [line["step"] for line in TrainingFolder(outs[0]).metrics()] == [1, 4]


def test_the_lr_is_the_best_on_val_and_a_diverged_one_is_out(run, source, monkeypatch):
    aps = iter([30.0, 50.0])
    seen = []
    monkeypatch.setattr(
        transfer, "validation_ap", lambda model, val, *rest: (seen.append(len(val)), next(aps))[1]
    )
    record = simsiam.transfer(run, source, lr=[0.01, 1e30, 0.002], **BRIEF)
    searched = {"0.01": 30.0, "1e+30": None, "0.002": 50.0}
    assert record["chosen"] == {"lr": 0.002, "judged_on": "val", "searched": searched} and seen == [
        3,
        3,
    ]
    with pytest.raises(WorkFailed, match="diverged with every lr of 1e\\+30, 1e\\+31"):
        simsiam.transfer(run, source, lr=[1e30, 1e31], **BRIEF)


def test_starts_differ_in_the_backbone_alone(run, tmp_path):
    """A run, its own checkpoint file and random weights give the same heads; the first two the same backbone."""
    folder, how = Run(run), Schedule.from_settings({"anchors": (16, 32)})
    kinds = [
        ("run", None, False),
        ("file", str(run / "checkpoints" / "last.pt"), False),
        ("scratch", None, True),
    ]
    states = {}
    for name, init, scratch in kinds:
        model = transfer.Initialization(folder, init, scratch).build_model(
            3, how, masks=False, seed=5
        )
        states[name] = model.state_dict()
    new = [
        key
        for key in states["run"]
        if key.startswith(("rpn.", "roi_heads.box_predictor", "roi_heads.box_head.1"))
    ]
    old = [key for key in states["run"] if key not in new]
    assert new and all(torch.equal(states["run"][key], states["scratch"][key]) for key in new)
    assert all(torch.equal(states["run"][key], states["file"][key]) for key in states["run"])
    assert (
        not torch.equal(
            states["run"]["backbone.conv1.weight"], states["scratch"]["backbone.conv1.weight"]
        )
        and old
    )
    before = Run(run).checkpoint()["model"]
    assert torch.equal(
        states["run"]["roi_heads.box_head.0.0.conv2.weight"],
        before["backbone.layer4.0.conv2.weight"],
    )


def test_preprocessing_comes_with_the_weights(run, tmp_path, monkeypatch):
    """Published weights bring their own mean and std; here the download is a local file."""
    from torchvision.models import resnet18

    words = QUICK | {"backbone": "resnet18", "width": 64, "stem": "large", "limit": 32, "steps": 1}
    big = simsiam.pretrain("shapes", recipe="shapes", out=tmp_path / "r18", **words)
    torch.manual_seed(3)
    network = resnet18()
    file = tmp_path / "resnet18.pth"
    torch.save(network.state_dict(), file)
    monkeypatch.setattr("simsiam.runs.published_weights.fetch", lambda name, release: file)
    start = transfer.Initialization(Run(big), "ResNet18_Weights.IMAGENET1K_V1", False)
    assert (
        start.mean == (0.485, 0.456, 0.406)
        and start.description["from"] == "ResNet18_Weights.IMAGENET1K_V1"
    )
    model = start.build_model(2, Schedule(), masks=False, seed=0)
    assert torch.equal(model.backbone.conv1.weight, network.conv1.weight)
    assert transfer.Initialization(Run(run), None, False).mean == Run(run).recipe.mean


@pytest.mark.parametrize(
    "words, error",
    [
        ({"task": "detektion"}, "did you mean 'detection'"),
        ({"schedule": "voc7"}, "did you mean 'voc07'"),
        ({"anker": (1,)}, "unknown setting 'anker'"),
        ({"init": "x", "from_scratch": True}, "contradict"),
        ({"stride": 4}, "stride is 4; it is 8 or 16"),
        ({"stride": 8}, "stride 4 at conv4 already"),
        ({"architecture": "fpn", "anchors": (1, 2)}, "fpn takes 5 anchors"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_requests_are_one_line_and_leave_nothing(run, source, words, error):
    with pytest.raises(UsageError, match=error):
        simsiam.transfer(run, source, **BRIEF | words)
    assert not list((run / "transfers").glob("*")) if (run / "transfers").exists() else True


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["nowhere"], "there is no folder nowhere"),
        (["."], "is no source of annotated images"),
        (["shapes", "--lr", "high"], "lr is 'high'; it takes a number"),
        (["shapes", "--sceed", "1"], "did you mean '--seed'?"),
    ],
)
def test_wrong_usage_is_one_line(run, arguments, text, capsys):
    assert main(["transfer", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_boxes_alone_make_no_segmentation(run, tmp_path):
    from test_annotations import CAR, voc, xml

    folder = voc(tmp_path / "voc", {f"{i}": xml([CAR]) for i in range(20)}, {})
    with pytest.raises(UsageError, match="no masks in train: --task detection needs only boxes"):
        simsiam.transfer(run, folder, task="segmentation", **BRIEF)
    record = simsiam.transfer(run, folder, **BRIEF | {"steps": 1})
    assert (
        record["tested_by"] == "voc_box"
        and record["test"] == "a fifth of train"
        and record["n"] == 4
    )


def test_who_learns_chooses_and_is_tested(source):
    opened = open_annotated(source)
    parts = transfer.split_source(opened)
    keys = {
        name: set(getattr(parts, name).images.keys)
        for name in ("train", "search_train", "val", "test")
    }
    assert (
        keys["train"] == keys["search_train"] | keys["val"]
        and not keys["search_train"] & keys["val"]
    )
    assert not keys["train"] & keys["test"]


def test_averages_are_the_plain_mean_over_batches(run, source):
    part = open_annotated(source).splits["train"]
    how = Schedule.from_settings(
        {k: v for k, v in BRIEF.items() if k not in ("device", "precision")} | {"precise_bn": 3}
    )
    model = (
        transfer.Initialization(Run(run), None, False)
        .build_model(5, how, masks=False, seed=0)
        .train()
    )
    seen = []
    model.backbone.conv1.register_forward_hook(lambda m, x, out: seen.append(out.mean((0, 2, 3))))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    weights = [p.clone() for p in model.parameters()]
    with torch.random.fork_rng():
        update_bn_stats(model, StepDataset(part, 2, 0, False, slice(2)), how, CPU)
    assert (
        torch.allclose(model.backbone.bn1.running_mean, torch.stack(seen).mean(0), atol=1e-6)
        and len(seen) == 3
    )
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters())) and {
        m.momentum for m in norms
    } == {0.1}


def test_what_is_found_is_in_pixels_of_the_image(source):
    """A detector that says what is there is perfect, whatever size it looks at."""

    class Oracle(nn.Module):
        def forward(self, images):
            i, self.at = self.at, self.at + 1
            boxes = torch.from_numpy(part.objects[i].boxes)
            labels = torch.from_numpy(part.objects[i].labels) + 1
            return [{"boxes": boxes, "labels": labels, "scores": torch.ones(len(boxes))}]

    part = open_annotated(source).splits["test"]
    oracle = Oracle()
    oracle.at = 0
    found, kept, skipped = detect_objects(oracle, part, CPU)
    record = transfer.compute_metrics(found, part.objects, part.classes, "detection")
    assert (
        record["voc_box"]["AP"] == record["coco_box"]["AP"] == pytest.approx(100)
        and not skipped
        and len(kept) == 4
    )


def test_an_unreadable_image_costs_itself(run, source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "set")
    for split in ("train", "test"):
        file = folder / split / "0001.png"
        file.write_bytes(file.read_bytes()[:300])  # its header is whole
    record = simsiam.transfer(run, folder, **BRIEF | {"steps": 12})
    assert record["n"] == 3 and record["unreadable"] == 2


def test_scenes_are_frozen_and_masks_lie_in_their_boxes():
    rng = np.random.Generator(np.random.Philox(key=[0, scenes.HEIGHT]))
    pixels, kinds, masks = scenes.draw_scene(rng)
    assert sha256(pixels.tobytes()).hexdigest()[:16] == "27c99b82d781b0b1" and pixels.shape == (
        96,
        128,
    )
    assert len(kinds) == len(masks) and not sum(mask.astype(int) for mask in masks).max() > 1
    x, y, w, h = scenes.coco_annotation(masks[0])["bbox"]
    assert (
        masks[0][y : y + h, x : x + w].sum() == masks[0].sum()
        and masks[0][y].any()
        and masks[0][:, x].any()
    )


def test_schedules_are_the_papers():
    voc, coco = (
        Schedule.from_settings(SCHEDULES["voc0712"]()),
        Schedule.from_settings(SCHEDULES["coco"]()),
    )
    assert [
        voc.lr_factor(step) for step in (0, 50, 100, 17_999, 18_000, 21_999, 22_000)
    ] == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])
    assert [coco.lr_factor(step) for step in (59_999, 60_000, 80_000)] == pytest.approx(
        [1, 0.1, 0.01]
    )
    assert (voc.steps, voc.batch_size, voc.lr, voc.test_side, coco.steps) == (
        24_000,
        16,
        (0.02,),
        800,
        90_000,
    )
    assert (
        voc.train_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
        and coco.train_sides[0] == 640
    )


def test_few_images_take_a_short_schedule_and_anchors_from_their_boxes():
    words, _ = auto_schedule(292, 480, (40.0, 190.0), "large")
    how = Schedule.from_settings(words)
    assert (
        how.test_side == 240
        and how.anchors == (16, 32, 64, 128)
        and how.stride == 8
        and how.steps < 1000
    )
    with_masks = Schedule.from_settings(
        auto_schedule(292, 480, (40.0, 190.0), "large", masks=True)[0]
    )
    assert how.regions > with_masks.regions and how.region_size < with_masks.region_size
    assert "stride" not in auto_schedule(292, 480, (40.0, 190.0), "small")[0]
    assert (
        Schedule.from_settings(auto_schedule(5011, 375, (40.0, 190.0), "large")[0]).test_side == 800
    )


def test_the_shares_of_a_batch_are_the_batch(source):
    part = open_annotated(source).splits["train"]
    whole = StepDataset(part, 5, 0, True, slice(5))[3]
    shares = [StepDataset(part, 5, 0, True, mine)[3] for mine in (slice(0, 3), slice(3, 5))]
    for key in ("boxes", "masks"):
        for one, other in zip(
            whole.targets, [t for some in shares for t in some.targets], strict=True
        ):
            assert torch.equal(one[key], other[key])
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.images, shares[0].images + shares[1].images, strict=True)
    )


def test_two_processes_make_one_detector(run, source):
    """Of three images one process has two; parameters and statistics are the same on both, or the run would fail."""
    from test_processes import ended, torchrun

    words = BRIEF | {"batch_size": 3, "task": "segmentation"}
    said = ended(torchrun("-m", "simsiam", "transfer", str(run), str(source), *flags(**words)))
    (record,) = Run(run).transfers()
    assert record["processes"] == 2 and record["n"] == 4 and said.count("AP50 of ") == 1
    lines = TrainingFolder(run / "transfers" / record["folder"]).metrics()
    assert [line["step"] for line in lines] == [1, 4] and not list(run.rglob("*.part"))
