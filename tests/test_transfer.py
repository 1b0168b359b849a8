"""Transfer: complete records, bit-for-bit resume, and no choice that depends on test objects."""

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
from simsiam.commands.main import main
from simsiam.detection import scenes, transfer
from simsiam.detection import train_detector as training
from simsiam.detection.annotations import open_annotated
from simsiam.detection.initialization import Initialization
from simsiam.detection.metrics import compute_metrics
from simsiam.detection.schedules import SCHEDULES, Schedule, auto_schedule
from simsiam.detection.splits import split_source
from simsiam.detection.train_detector import StepDataset, detect_objects, update_bn_stats
from simsiam.errors import Stopped, UsageError, WorkFailed
from simsiam.model.precision import Compute
from simsiam.pages.report import summarize_run
from simsiam.runs.run_folder import Run, TrainingFolder

pytest.importorskip("pycocotools")
CPU = Compute(torch.device("cpu"), "float32")
BRIEF = {
    "steps": 4, "batch_size": 2, "warmup_steps": 0, "regions": 8, "proposals": 40,
    "test_proposals": 10, "region_size": 4, "precise_bn": 1, "precision": "float32",
    "device": "cpu",
}  # fmt: skip


RECORD_KEYS = [
    "protocol", "task", "source", "train", "test", "val", "classes", "train_images", "test_images",
    "init", "seed", "network", "precision", "processes", "parameters", "chosen", "tested_by",
    "metrics", "n", "unreadable", "faults", "folder", "picture", "asked", "environment", "measured",
    "training_seconds",
]  # fmt: skip


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


def test_a_record_says_how_its_numbers_were_made(run, source):
    record = simsiam.transfer(run, source, task="segmentation", **BRIEF)
    (saved,) = Run(run).transfers()
    assert saved == json.loads(json.dumps(record)) == record
    assert [saved] == Run(run).read_records("transfers/segmentation.json")
    assert list(record) == RECORD_KEYS
    assert set(record["metrics"]) == {"voc_box", "coco_box", "coco_mask"}
    assert record["tested_by"] == "coco_mask"
    for values in record["metrics"].values():
        assert values["metric"] and all(0 <= values[key] <= 100 for key in ("AP", "AP50", "AP75"))
    assert record["parameters"]["steps"] == 4 and record["chosen"] == {"lr": 0.01}
    assert record["train"] == "train and val" and record["train_images"] == 11
    assert record["n"] == 4 and record["init"]["backbone_sha256"]
    out = run / "transfers" / record["folder"]
    assert (run / "transfers" / record["picture"]).is_file() and (out / "last.pt").is_file()
    lines = TrainingFolder(out).metrics()
    names = {"loss", "loss_mask", "lr", "grad_norm", "images_per_second"}
    assert lines[-1]["step"] == 4 and names <= lines[-1].keys()
    assert not list(run.rglob("*.part"))
    assert summarize_run(Run(run))["transfers"][0]["shown"].startswith("data:image/webp")
    again = simsiam.transfer(run, source, task="segmentation", **BRIEF)  # only tests again
    assert again["metrics"] == record["metrics"] and len(Run(run).transfers()) == 1
    simsiam.transfer(run, source, task="segmentation", seed=1, **BRIEF)
    assert len(Run(run).transfers()) == 2


def test_a_stopped_transfer_continues_bit_for_bit(run, source, tmp_path, monkeypatch):
    uninterrupted = simsiam.transfer(shutil.copytree(run, tmp_path / "other"), source, **BRIEF)
    seed_step = training.seed_step

    def stopping(seed, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        seed_step(seed, step)

    monkeypatch.setattr(training, "seed_step", stopping)
    with pytest.raises(Stopped, match="stopped at step 2 of 4"):
        simsiam.transfer(run, source, **BRIEF)
    monkeypatch.setattr(training, "seed_step", seed_step)
    torch.rand(7)  # other code that draws random numbers
    resumed = simsiam.transfer(run, source, **BRIEF)
    outs = [path / "transfers" / resumed["folder"] for path in (run, tmp_path / "other")]
    ends = [torch.load(out / "last.pt", weights_only=True) for out in outs]
    assert all(
        torch.equal(a, b)
        for a, b in zip(ends[0]["model"].values(), ends[1]["model"].values(), strict=True)
    )
    assert resumed["metrics"] == uninterrupted["metrics"]
    assert [line["step"] for line in TrainingFolder(outs[0]).metrics()] == [1, 4]


def test_a_detector_of_other_annotations_is_not_taken_for_one_of_these(run, source, tmp_path):
    source = shutil.copytree(source, tmp_path / "moved")
    simsiam.transfer(run, source, **BRIEF)
    for file in (source / "annotations").iterdir():
        content = json.loads(file.read_text())
        for box in content["annotations"]:
            box["bbox"][2] -= 1
        file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="holds a training with train_digest"):
        simsiam.transfer(run, source, **BRIEF)


def test_the_lr_is_the_best_on_val_and_never_a_diverged_one(run, source, monkeypatch):
    aps, sizes = iter([30.0, 50.0]), []

    def validation_ap(model, val, *rest):
        sizes.append(len(val))
        return next(aps)

    monkeypatch.setattr(transfer, "validation_ap", validation_ap)
    record = simsiam.transfer(run, source, lr=[0.01, 1e30, 0.002], **BRIEF)
    searched = {"0.01": 30.0, "1e+30": None, "0.002": 50.0}
    assert record["chosen"] == {"lr": 0.002, "judged_on": "val", "searched": searched}
    assert sizes == [3, 3]
    with pytest.raises(WorkFailed, match="diverged with every lr of 1e\\+30, 1e\\+31"):
        simsiam.transfer(run, source, lr=[1e30, 1e31], **BRIEF)


def test_initializations_differ_in_the_backbone_alone(run, tmp_path):
    """Run, checkpoint and random weights give the same heads; the first two share a backbone."""
    folder, schedule = Run(run), Schedule.from_settings({"anchors": (16, 32)})
    kinds = [
        ("run", None, False),
        ("file", str(run / "checkpoints" / "last.pt"), False),
        ("scratch", None, True),
    ]
    states = {}
    for name, init, scratch in kinds:
        origin = Initialization(folder, init, scratch)
        model = origin.build_model(3, schedule, masks=False, seed=5)
        states[name] = model.state_dict()
    heads = ("rpn.", "roi_heads.box_predictor", "roi_heads.box_head.1")
    new = [key for key in states["run"] if key.startswith(heads)]
    old = [key for key in states["run"] if key not in new]
    assert new and all(torch.equal(states["run"][key], states["scratch"][key]) for key in new)
    assert all(torch.equal(states["run"][key], states["file"][key]) for key in states["run"])
    first, other = (states[name]["backbone.conv1.weight"] for name in ("run", "scratch"))
    assert not torch.equal(first, other) and old
    pretrained_weight = Run(run).checkpoint()["model"]["backbone.layer4.0.conv2.weight"]
    assert torch.equal(states["run"]["roi_heads.box_head.0.0.conv2.weight"], pretrained_weight)


def test_preprocessing_comes_with_the_weights(run, tmp_path, monkeypatch):
    """Published weights come with their own mean and std; the download is a local file here."""
    from torchvision.models import resnet18

    settings = QUICK | {
        "backbone": "resnet18",
        "width": 64,
        "stem": "large",
        "limit": 32,
        "steps": 1,
    }
    big = simsiam.pretrain("shapes", recipe="shapes", out=tmp_path / "r18", **settings)
    torch.manual_seed(3)
    network = resnet18()
    file = tmp_path / "resnet18.pth"
    torch.save(network.state_dict(), file)
    monkeypatch.setattr(
        "simsiam.runs.checkpoints.published_weights.fetch", lambda name, release: file
    )
    origin = Initialization(Run(big), "ResNet18_Weights.IMAGENET1K_V1", False)
    assert origin.mean == (0.485, 0.456, 0.406)
    assert origin.description["from"] == "ResNet18_Weights.IMAGENET1K_V1"
    model = origin.build_model(2, Schedule(), masks=False, seed=0)
    assert torch.equal(model.backbone.conv1.weight, network.conv1.weight)
    assert Initialization(Run(run), None, False).mean == Run(run).recipe.mean


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"task": "detektion"}, "did you mean 'detection'"),
        ({"schedule": "voc7"}, "did you mean 'voc07'"),
        ({"anker": (1,)}, "unknown setting 'anker'"),
        ({"init": "x", "from_scratch": True}, "contradict"),
        ({"stride": 4}, "stride is 4; it is 8 or 16"),
        ({"stride": 8}, "conv4 has stride 4 already"),
        ({"architecture": "fpn", "anchors": (1, 2)}, "fpn takes 5 anchors"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_requests_are_one_line_and_leave_nothing(run, source, settings, error):
    with pytest.raises(UsageError, match=error):
        simsiam.transfer(run, source, **BRIEF | settings)
    assert not list((run / "transfers").glob("*")) if (run / "transfers").exists() else True


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["nowhere"], "there is no folder nowhere"),
        (["."], "is not a source of annotated images"),
        (["shapes", "--lr", "high"], "lr is 'high'; it takes a number"),
        (["shapes", "--sceed", "1"], "did you mean '--seed'?"),
    ],
)
def test_wrong_usage_is_one_line(run, arguments, text, capsys):
    assert main(["transfer", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_segmentation_needs_masks(run, tmp_path):
    from test_annotations import CAR, voc, xml

    folder = voc(tmp_path / "voc", {f"{i}": xml([CAR]) for i in range(20)}, {})
    with pytest.raises(UsageError, match="no masks in train: --task detection needs only boxes"):
        simsiam.transfer(run, folder, task="segmentation", **BRIEF)
    record = simsiam.transfer(run, folder, **BRIEF | {"steps": 1})
    assert record["tested_by"] == "voc_box"
    assert record["test"] == "a fifth of train" and record["n"] == 4


def test_training_lr_search_and_test_use_separate_images(source):
    splits = split_source(open_annotated(source))
    names = ("train", "search_train", "val", "test")
    keys = {name: set(getattr(splits, name).images.keys) for name in names}
    assert keys["train"] == keys["search_train"] | keys["val"]
    assert not keys["search_train"] & keys["val"]
    assert not keys["train"] & keys["test"]


def test_averages_are_the_plain_mean_over_batches(run, source):
    train = open_annotated(source).splits["train"]
    settings = {k: v for k, v in BRIEF.items() if k not in ("device", "precision")}
    schedule = Schedule.from_settings(settings | {"precise_bn": 3})
    origin = Initialization(Run(run), None, False)
    model = origin.build_model(5, schedule, masks=False, seed=0).train()
    means = []
    model.backbone.conv1.register_forward_hook(lambda m, x, out: means.append(out.mean((0, 2, 3))))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    weights = [p.clone() for p in model.parameters()]
    with torch.random.fork_rng():
        update_bn_stats(model, StepDataset(train, 2, 0, False, slice(2)), schedule, CPU)
    mean = torch.stack(means).mean(0)
    assert torch.allclose(model.backbone.bn1.running_mean, mean, atol=1e-6) and len(means) == 3
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    assert {m.momentum for m in norms} == {0.1}


def test_detections_are_in_pixels_of_the_image(source):
    """A detector that returns the annotated objects scores 100, whatever size it works at."""

    class Oracle(nn.Module):
        def forward(self, images):
            i, self.at = self.at, self.at + 1
            boxes = torch.from_numpy(test.objects[i].boxes)
            labels = torch.from_numpy(test.objects[i].labels) + 1
            return [{"boxes": boxes, "labels": labels, "scores": torch.ones(len(boxes))}]

    test = open_annotated(source).splits["test"]
    oracle = Oracle()
    oracle.at = 0
    predictions, rows, skipped = detect_objects(oracle, test, CPU)
    metrics = compute_metrics(predictions, test.objects, test.classes, "detection")
    assert metrics["voc_box"]["AP"] == metrics["coco_box"]["AP"] == pytest.approx(100)
    assert not skipped and len(rows) == 4


def test_an_unreadable_image_costs_only_itself(run, source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "set")
    for split in ("train", "test"):
        file = folder / split / "0001.png"
        file.write_bytes(file.read_bytes()[:300])  # its header is complete
    record = simsiam.transfer(run, folder, **BRIEF | {"steps": 12})
    assert record["n"] == 3 and record["unreadable"] == 2


def test_scenes_never_change_and_masks_lie_in_their_boxes():
    rng = np.random.Generator(np.random.Philox(key=[0, scenes.HEIGHT]))
    pixels, labels, masks = scenes.draw_scene(rng)
    assert sha256(pixels.tobytes()).hexdigest()[:16] == "27c99b82d781b0b1"
    assert pixels.shape == (96, 128)
    assert len(labels) == len(masks) and not sum(mask.astype(int) for mask in masks).max() > 1
    x, y, w, h = scenes.coco_annotation(masks[0])["bbox"]
    assert masks[0][y : y + h, x : x + w].sum() == masks[0].sum()
    assert masks[0][y].any() and masks[0][:, x].any()


def test_schedules_are_the_papers():
    voc, coco = (Schedule.from_settings(SCHEDULES[name]()) for name in ("voc0712", "coco"))
    factors = [voc.lr_factor(step) for step in (0, 50, 100, 17_999, 18_000, 21_999, 22_000)]
    assert factors == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])
    factors = [coco.lr_factor(step) for step in (59_999, 60_000, 80_000)]
    assert factors == pytest.approx([1, 0.1, 0.01])
    assert (voc.steps, voc.batch_size, voc.lr, voc.test_side) == (24_000, 16, (0.02,), 800)
    assert voc.train_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert coco.steps == 90_000 and coco.train_sides[0] == 640


def test_few_images_take_a_short_schedule_and_anchors_from_their_boxes():
    def schedule(*arguments, masks=False):
        return Schedule.from_settings(auto_schedule(*arguments, masks=masks)[0])

    sides = (40.0, 190.0)
    boxes = schedule(292, 480, sides, "large")
    assert boxes.test_side == 240 and boxes.anchors == (16, 32, 64, 128)
    assert boxes.stride == 8 and boxes.steps < 1000
    masks = schedule(292, 480, sides, "large", masks=True)
    assert boxes.regions > masks.regions and boxes.region_size < masks.region_size
    assert "stride" not in auto_schedule(292, 480, sides, "small")[0]
    assert schedule(5011, 375, sides, "large").test_side == 800


def test_the_parts_of_a_batch_are_the_batch(source):
    train = open_annotated(source).splits["train"]
    batch, first, second = (
        StepDataset(train, 5, 0, True, images)[3] for images in (slice(5), slice(0, 3), slice(3, 5))
    )
    for key in ("boxes", "masks"):
        for target, part in zip(batch.targets, first.targets + second.targets, strict=True):
            assert torch.equal(target[key], part[key])
    for image, part in zip(batch.images, first.images + second.images, strict=True):
        assert torch.equal(image, part)


def test_two_processes_make_one_detector(run, source):
    """One process has two of three images; the run fails if parameters or statistics differ."""
    from test_processes import ended, torchrun

    settings = BRIEF | {"batch_size": 3, "task": "segmentation"}
    command = ("-m", "simsiam", "transfer", str(run), str(source), *flags(**settings))
    output = ended(torchrun(*command))
    (record,) = Run(run).transfers()
    assert record["processes"] == 2 and record["n"] == 4 and output.count("AP50 of ") == 1
    lines = TrainingFolder(run / "transfers" / record["folder"]).metrics()
    assert [line["step"] for line in lines] == [1, 4] and not list(run.rglob("*.part"))
