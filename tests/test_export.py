"""An export has the same features in the format's own library, or it is not written.

Model cards and comparisons contain what the run folders contain.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch
import yaml
from conftest import QUICK
from safetensors.torch import load_file, save_file

import simsiam
from simsiam.commands.main import main
from simsiam.config.recipes import Recipe
from simsiam.exports import detectron2
from simsiam.exports.export import FORMATS, export
from simsiam.model.backbones import create_backbone
from simsiam.model.encoder import Encoder
from simsiam.pages.compare import compare
from simsiam.runs.checkpoints.convert import convert
from simsiam.runs.encoder import build_backbone
from simsiam.runs.recipe_file import write_recipe
from simsiam.runs.run_folder import Run

NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return simsiam.pretrain("shapes", out=tmp_path_factory.mktemp("runs") / "run", **QUICK)


def test_onnx_runtime_tells_nobody_that_it_is_used(trained, tmp_path):
    """Its telemetry makes a name for this machine, and asks its maker's server a second later."""
    needs("onnx")
    code = (
        "import sys, time\n"
        "from simsiam.exports.export import export\n"
        "export(sys.argv[1], format='onnx', out=sys.argv[2])\n"
        "time.sleep(3)\n"
    )
    # It is off where it finds signs of continuous integration.
    env = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH")}
    env |= {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-c", code, str(trained), str(tmp_path / "out")]
    subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True)
    written = {path.name for path in (tmp_path / "home").rglob("*")} | set(os.listdir(tmp_path))
    assert not any("device" in name.lower() or "onnxruntime" in name.lower() for name in written)
    assert set(os.listdir(tmp_path)) == {"home", "out"}


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """A run folder as if a standard ResNet-18 had been trained."""
    words = {
        "backbone": "resnet18",
        "image_size": 72,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.25),
    }
    run = Run.create(tmp_path_factory.mktemp("runs") / "standard", Recipe().replace(**words))
    torch.manual_seed(0)
    network = build_backbone(run.recipe).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # make it different from its initial state
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    run.finish(network.state_dict(), {"verdict": "healthy", "steps": 7})
    return run.path


def features(run, x):
    with torch.no_grad():
        return simsiam.load(run)(x)


def needs(format: str) -> None:
    for package in NEEDS.get(format, ()):
        pytest.importorskip(package)


@pytest.mark.parametrize("format", ["safetensors", "torch_export", "onnx", "huggingface"])
def test_a_narrow_network_has_formats_too(format, trained, tmp_path, capsys):
    needs(format)
    assert main(["export", str(trained), "--format", format, "--out", str(tmp_path / "out")]) == 0
    assert "largest difference to the features of the run: " in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    recipe = Run(trained).recipe
    assert config["center_crop"] == recipe.image_size and config["mean"] == list(recipe.mean)


@pytest.mark.parametrize("format", ["torchvision", "timm", "huggingface"])
def test_a_standard_network_is_that_of_the_library(format, standard, tmp_path):
    """The library is called here directly, to check that `export` compares the right things."""
    folder = export(standard, format=format, out=tmp_path / "out").path
    x = torch.randn(2, 3, 72, 72)
    if format == "torchvision":
        import torchvision

        model = torchvision.models.resnet18()
        state = torch.load(folder / "backbone.pth", weights_only=True)
        keys = model.load_state_dict(state, strict=False)
        assert set(keys.missing_keys) == {"fc.weight", "fc.bias"} and not keys.unexpected_keys
        model.fc = torch.nn.Identity()
    else:
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        known = timm.data.resolve_model_data_config(model)
        assert list(known["mean"]) == [0.5, 0.4, 0.3] and list(known["input_size"]) == [3, 72, 72]
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), features(standard, x), atol=1e-5)


def names_in_detectron2(depth: int) -> set[str]:
    """The names of a ResNet's tensors according to detectron2's documentation.

    There is a stem, res2 to res5 consist of blocks, and each convolution has a norm inside.
    """
    norm = [f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    convolutions = ["stem.conv1"]
    for stage, count in zip((2, 3, 4, 5), blocks, strict=True):
        for block in range(count):
            convolutions += [
                f"res{stage}.{block}.conv{n}" for n in (1, 2, 3)[: 2 if depth == 18 else 3]
            ]
        if stage > 2 or depth == 50:  # where the block before it is narrower
            convolutions.append(f"res{stage}.0.shortcut")
    return {f"{name}.{part}" for name in convolutions for part in ["weight", *norm]}


@pytest.mark.parametrize("depth", [18, 50])
def test_detectron2_finds_every_tensor_under_its_own_name_and_reads_rgb(depth, standard, tmp_path):
    words = Run(standard).recipe.to_dict() | {"backbone": f"resnet{depth}"}
    run = Run.create(tmp_path / "run", Recipe.from_dict(words))
    torch.manual_seed(0)
    network = build_backbone(run.recipe)
    run.finish(network.state_dict(), {"verdict": "healthy", "steps": 7})
    folder = export(run.path, format="detectron2").path
    checkpoint = pickle.loads((folder / "backbone.pkl").read_bytes())
    assert checkpoint["matching_heuristics"] is True and isinstance(checkpoint["__author__"], str)
    weights = checkpoint["model"]
    assert weights.keys() == names_in_detectron2(depth)
    stem, last = weights["stem.conv1.weight"], weights["res5.0.conv2.norm.running_var"]
    assert torch.equal(torch.from_numpy(stem), network.conv1.weight)  # the order of channels stays
    assert torch.equal(torch.from_numpy(last), network.layer4[0].bn2.running_var)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    section = config["MODEL"]
    assert config["INPUT"]["FORMAT"] == "RGB" and section["RESNETS"]["STRIDE_IN_1X1"] is False
    assert section["PIXEL_MEAN"] == [127.5, 102.0, 76.5]
    assert section["PIXEL_STD"] == [51.0, 76.5, 63.75]
    assert section["RESNETS"]["DEPTH"] == depth
    assert section["RESNETS"].get("RES2_OUT_CHANNELS", 256) == {18: 64, 50: 256}[depth]


def test_names_that_detectron2_lacks_are_not_kept(standard, tmp_path, monkeypatch, capsys):
    correct = detectron2.detectron2_name
    monkeypatch.setattr(
        detectron2, "detectron2_name", lambda name: correct(name).replace("res5", "layer4")
    )
    assert (
        main(["export", str(standard), "--format", "detectron2", "--out", str(tmp_path / "out")])
        == 1
    )
    assert "looks for a tensor res5.0.shortcut.weight" in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )


def test_an_upload_is_a_run_to_start_from(standard, tmp_path):
    folder = export(standard, format="huggingface", out=tmp_path / "out", license="cc-by-4.0").path
    x = torch.randn(2, 3, 72, 72)
    assert torch.equal(features(folder, x), features(standard, x))
    again = simsiam.load(convert(folder, out=tmp_path / "again"))
    assert again.transform == simsiam.load(standard).transform and torch.equal(
        features(folder, x), again(x).detach()
    )
    heading, text = (folder / "README.md").read_text().split("---\n")[1:3]
    assert (
        yaml.safe_load(heading)["license"] == "cc-by-4.0"
        and "healthy" in text
        and "Nothing yet" in text
    )


def test_an_upload_names_no_folder_of_this_machine(trained, tmp_path):
    run = Run(shutil.copytree(trained, tmp_path / "run"))
    home = "/home/a person"
    sources = [f"{home}/photos", "https://key@host/shards/?key=1"]
    write_recipe(run.path, run.recipe.replace(source=sources, init=f"{home}/runs/first"))
    folder = export(run.path, format="huggingface", out=tmp_path / "out").path
    recipe = Run(folder).recipe
    assert recipe.source == ("photos", "https://host/shards/") and recipe.init == "first"
    for path in folder.iterdir():
        assert not any(word in path.read_bytes() for word in (b"a person", b"key@", b"key=1"))


@pytest.fixture(scope="module")
def with_head(standard, trained, tmp_path_factory):
    """Runs with a head: of a standard network, of patches, and of networks beside patches."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(1)
    patches = filled(create_backbone("patches/16", image_size=32))
    recipe = Recipe().replace(
        backbone="patches/16", image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    alone = Run.create(root / "patches", recipe)
    alone.finish(patches.state_dict(), {"verdict": "too early", "steps": 0})
    alone.write_head(Encoder(patches, random_head(patches.dim)))
    both = Run(shutil.copytree(trained, root / "both"))
    network = simsiam.load(both.path)
    heads = random_head(network.dim), random_head(patches.dim)
    both.write_head(Encoder(network, heads[0], patches, heads[1]), patches="patches/16")
    mean = Run(shutil.copytree(trained, root / "mean"))
    encoder = Encoder(simsiam.load(mean.path), None, patches, heads[1], patches_weight=2.0)
    mean.write_head(encoder, patches="patches/16")
    timms = Recipe().replace(
        backbone="timm/test_efficientnet", image_size=64, mean=(0.5,) * 3, std=(0.25,) * 3,
        eval_interpolation="bicubic", eval_resize=70,
    )  # fmt: skip
    timm = Run.create(root / "timm", timms)
    network = build_backbone(timms.resolve())
    timm.finish(network.state_dict(), {"verdict": "too early", "steps": 0})
    timm.write_head(Encoder(network, random_head(network.dim)))
    torchvision = Run(shutil.copytree(standard, root / "torchvision"))
    network = simsiam.load(torchvision.path)
    torchvision.write_head(Encoder(network, random_head(network.dim)))
    runs = {"patches": alone, "both": both, "mean": mean, "timm": timm, "torchvision": torchvision}
    return {name: run.path for name, run in runs.items()}


def random_head(dim, out=12):
    head = torch.nn.Linear(dim, out)
    torch.nn.init.normal_(head.weight), torch.nn.init.normal_(head.bias)
    return head


def filled(patches):
    for parameter in patches.parameters():
        torch.nn.init.normal_(parameter)
    return patches


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *product(
            ("both", "mean", "patches"), ("safetensors", "torch_export", "onnx", "huggingface")
        ),
        *(("timm", format) for format in ("timm", "huggingface")),
        *(("torchvision", format) for format in ("torchvision", "timm", "huggingface")),
    ],
)
def test_an_encoder_is_exported_with_its_head(name, format, with_head, tmp_path):
    """What was written is loaded here without `export`, by the library where there is one."""
    needs(format)
    folder = export(with_head[name], format=format, out=tmp_path / "out").path
    size = Run(with_head[name]).recipe.image_size
    x, loaded = torch.randn(3, 3, size, size), []
    x[1] = 0  # a flat image: many responses of patches are exactly zero
    if format == "torchvision":
        import torchvision

        model = torchvision.models.resnet18(num_classes=12)
        model.load_state_dict(torch.load(folder / "backbone.pth", weights_only=True))
        loaded.append(model)
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "backbone.onnx")
        loaded.append(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]))
    if format == "torch_export":
        loaded.append(torch.export.load(folder / "backbone.pt2").module())
    if (folder / "config.json").exists():
        import timm

        loaded.append(timm.create_model(f"local-dir:{folder}", pretrained=True))
        known = timm.data.resolve_model_data_config(loaded[0])
        recipe = Run(with_head[name]).recipe
        assert known["interpolation"] == recipe.eval_interpolation
    if format == "huggingface":
        loaded.append(simsiam.load(folder))
        assert (folder / "config.json").exists() == (name in ("timm", "torchvision"))
    if format == "safetensors":
        state = load_file(folder / "backbone.safetensors")
        assert {"head.weight", "head.bias"} <= state.keys() or name == "mean"
        assert any(key.startswith("patches.") for key in state) == (name in ("both", "mean"))
        assert ("patches_weight" in state) == (name == "mean")
    expected = features(with_head[name], x)
    for model in loaded:
        if isinstance(model, torch.nn.Module) and format != "torch_export":
            model.eval()
        with torch.no_grad():
            h = model(x)
        bound = 1e-5 if format == "onnx" else 1e-4
        assert (h - expected).abs().max() <= bound * max(1, expected.abs().max())
    assert loaded or format == "safetensors"


@pytest.mark.parametrize("name", ["both", "mean"])
def test_a_network_beside_patches_comes_back_from_its_export(name, with_head, tmp_path):
    folder = export(with_head[name], format="huggingface", out=tmp_path / "out").path
    again = convert(folder, out=tmp_path / "again")
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(features(again, x), features(with_head[name], x))


@pytest.mark.parametrize("format", ["timm", "torchvision"])
def test_a_format_without_a_second_branch_says_which_have_one(format, with_head, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", str(with_head["both"]), "--format", format, "--out", out]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "cannot hold the second branch" in error
    assert "use one of huggingface, onnx, safetensors, torch_export" in error


def test_detectron2_gets_the_backbone_alone_and_it_is_said(with_head, tmp_path, capsys):
    run, out = str(with_head["torchvision"]), str(tmp_path / "out")
    assert main(["export", run, "--format", "detectron2", "--out", out]) == 0
    assert "head.safetensors is left out: detectron2 has the backbone" in capsys.readouterr().out


def test_a_wrong_head_is_not_kept(with_head, tmp_path, monkeypatch):
    kind = FORMATS["torchvision"]

    def damaged(network, run, folder):
        network = simsiam.load(run.path)
        network.head.bias.data[0] += 1
        kind.write(network, run, folder)

    monkeypatch.setitem(FORMATS, "torchvision", kind._replace(write=damaged))
    with pytest.raises(simsiam.WorkFailed, match="not kept"):
        export(with_head["torchvision"], format="torchvision", out=tmp_path / "out")


def test_a_classifier_that_is_not_linear_cannot_be_a_head():
    from simsiam.exports.timm import find_classifier

    assert find_classifier("resnet18", 512) == "fc"
    assert find_classifier("convnext_atto", 320) == "head.fc"
    with pytest.raises(simsiam.UsageError, match="has no linear classifier to hold the head"):
        find_classifier("deit_tiny_distilled_patch16_224", 192)


def test_a_card_names_the_head_and_the_origin_of_the_weights(with_head, tmp_path):
    run = Run(shutil.copytree(with_head["both"], tmp_path / "run"))
    origin = {"weights": "lite0", "origin": "a package", "license": "apache-2.0", "sha256": "0"}
    run.write("origin.json", origin)
    folder = export(run.path, format="huggingface", out=tmp_path / "out").path
    heading, text = (folder / "README.md").read_text().split("---\n")[1:3]
    assert yaml.safe_load(heading)["license"] == "apache-2.0"
    assert "| second branch | patches/16" in text and "| weights | a package |" in text
    assert "Made from the weights lite0, whose license is: apache-2.0." in text
    assert "| head | a linear map, 32 -> 12" in text
    again = Run(convert(folder, out=tmp_path / "again"))
    assert again.has_head and again.json("origin.json")["license"] == "apache-2.0"
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(features(again.path, x), features(run.path, x))


def test_a_card_has_the_results(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    record = {
        "protocol": "knn", "name": "k 20", "features": "h", "source": "a|b", "checkpoint": "last",
        "top1": 61.25, "interval": [60.0, 62.5], "n": 2000,
    }  # fmt: skip
    (run / "evaluations" / "knn.json").write_text(json.dumps([record]))
    text = (export(run, format="huggingface").path / "README.md").read_text()
    assert (
        "| knn | k 20 | h | a\\|b | last | 61.2 | 60.0 to 62.5 | 2000 |" in text
        and "has not said" in text
    )


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_wrong_export_is_not_kept(format, trained, standard, tmp_path, monkeypatch, capsys):
    """One weight is changed before writing."""
    needs(format)
    kind = FORMATS[format]

    def damaged(network, run, folder):
        other = simsiam.load(run.path)
        next(p for p in other.parameters() if p.ndim == 4).data.flatten()[0] += 1
        kind.write(other, run, folder)

    monkeypatch.setitem(FORMATS, format, kind._replace(write=damaged))
    run = standard if format in ("timm", "torchvision", "detectron2") else trained
    assert main(["export", str(run), "--format", format, "--out", str(tmp_path / "out")]) == 1
    assert "not kept: features of the exported file are off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--format onxn", "unknown format 'onxn': did you mean 'onnx'?"),
        ("--format torchvision", "torchvision has no resnet10 of width 4 with a small stem"),
        ("--format timm", "timm has no resnet10 of width 4"),
        ("--format detectron2", "detectron2 has no resnet10 of width 4"),
        ("--format safetensors --push a/b", "belong to format huggingface"),
    ],
)
def test_what_cannot_be_exported_is_one_line(words, text, trained, tmp_path, capsys):
    assert main(["export", str(trained), *words.split(), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert text in error and "\n" not in error and not list(tmp_path.iterdir())


def test_an_export_is_not_written_over(trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert (
        main(["export", str(trained), "--format", "safetensors", "--out", str(tmp_path / "out")])
        == 2
    )
    assert "not written over" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_only_verified_exports_are_pushed_and_only_on_request(trained, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []
    monkeypatch.setattr(
        hub.HfApi, "create_repo", lambda self, name, **how: calls.append((name, how))
    )
    monkeypatch.setattr(
        hub.HfApi, "upload_folder", lambda self, repo_id, folder_path: calls.append(folder_path)
    )
    export(trained, format="huggingface", out=tmp_path / "one")
    assert not calls
    path = export(trained, format="huggingface", out=tmp_path / "two", push="me/it").path
    assert calls == [("me/it", {"private": True, "exist_ok": True}), path]
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(path))
    again = simsiam.pretrain(
        "shapes", out=tmp_path / "again", **QUICK | {"init": "hf-hub:me/it", "base_lr": 0.0}
    )
    monkeypatch.setattr(hub.HfApi, "upload_folder", lambda self, **how: 1 / 0)
    with pytest.raises(
        simsiam.WorkFailed, match="is written, but not pushed to me/it: division by zero"
    ):
        export(trained, format="huggingface", out=tmp_path / "three", push="me/it")
    theirs, ours = (
        load_file(again / "backbone.safetensors"),
        load_file(trained / "backbone.safetensors"),
    )
    assert torch.equal(theirs["conv1.weight"], ours["conv1.weight"])


def test_compare_shows_what_differs_and_only_that(trained, tmp_path, capsys):
    other = shutil.copytree(trained, tmp_path / "other")
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["method"]["dim"], recipe["method"]["views"][0]["blur"] = 99, 0.25
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for run, top1 in ((trained, 40.0), (other, 42.5)):
        record = {
            "protocol": "knn",
            "name": "k 5",
            "features": "h",
            "checkpoint": "last",
            "source": "s",
            "top1": top1,
        }
        (run / "evaluations" / "knn.json").write_text(json.dumps([record]))
    found = compare([trained, other])
    blur = Run(trained).recipe.method.views[0].blur
    assert found["recipe"] == {"method.dim": [16, 99], "method.views.0.blur": [blur, 0.25]}
    assert found["environment"] == {} and found["results"]["knn k 5, h, last, s"] == [40.0, 42.5]
    out = capsys.readouterr().out
    assert "+2.5" in out and "environment: the same" in out
    assert main(["compare", str(trained)]) == 2 and main(["compare", str(trained), "nowhere"]) == 2


def test_a_damaged_weights_file_is_no_run(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    save_file({"conv1.weight": torch.zeros(1)}, run / "backbone.safetensors")
    assert main(["export", str(run), "--format", "safetensors"]) == 2
    assert "does not fit the recipe" in capsys.readouterr().err and not (run / "exports").exists()
