"""A checkpoint of any known layout becomes the same model; one that is incomplete is refused.

The layouts are made from a model of this package by renaming it in the other direction, written
here by hand.
"""

import argparse
import builtins
import copy
import itertools
import os
import pathlib
import pickle
import re
import subprocess
from collections import Counter
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from simsiam import Run, build, load
from simsiam.config.recipes import Recipe
from simsiam.errors import UsageError, WorkFailed
from simsiam.model.backbones import RESNETS, create_backbone
from simsiam.runs.checkpoints import foreign_checkpoints as checkpoints
from simsiam.runs.checkpoints import published_weights as releases
from simsiam.runs.checkpoints.convert import convert, format_conversion
from simsiam.runs.checkpoints.foreign_checkpoints import convert_state_dict
from simsiam.runs.checkpoints.published_weights import Release, find_release
from simsiam.runs.encoder import eval_transform
from simsiam.runs.weight_files import read_state_dict
from simsiam.runs.weights import open_weights
from simsiam.utils.checksums import file_sha256

SMALL = {"dim": 12, "proj_hidden": 10, "pred_dim": 6}


def trained(stem="large", network="resnet10", **cells):
    """A small model in which every parameter and statistic differs from its initial value."""
    method = Recipe().replace(**SMALL | cells).method
    model = build(method, backbone=network, width=4, stem=stem)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1:
            tensor.normal_(0, 0.1, generator=generator)
    return model


def biased(state, fc, bn, noise=0.3):
    """Add a bias before a batch norm, and shift the running mean by it."""
    state[f"{fc}.bias"] = (
        torch.randn(state[f"{bn}.running_mean"].shape).to(state[f"{bn}.running_mean"]) * noise
    )
    state[f"{bn}.running_mean"] = state[f"{bn}.running_mean"] + state[f"{fc}.bias"]


def renamed(state, *rules):
    """Rename by rules of a pattern and its replacement; the first that matches counts."""

    def rename(name):
        for pattern, to in rules:
            if re.match(pattern, name):
                return re.sub(f"^{pattern}", to, name)
        return name

    return {rename(name): tensor.clone() for name, tensor in state.items()}


def authors(state):
    state = renamed(
        state,
        ("backbone", "module.encoder"),
        ("projector", "module.encoder.fc"),
        ("predictor", "module.predictor"),
    )
    biased(state, "module.encoder.fc.6", "module.encoder.fc.7")
    return {
        "epoch": 100,
        "arch": "resnet50",
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    }


def moco(state):
    query = renamed(state, ("backbone", "module.encoder_q"), ("projector", "module.encoder_q.fc"))
    key = renamed(query, ("module.encoder_q", "module.encoder_k"))
    queue = {
        "module.queue": torch.zeros(12, 8),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    return {"state_dict": query | key | queue}


def lightly(state):
    children = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    numbers = [(rf"backbone\.{child}\.", f"backbone.{i}.") for i, child in enumerate(children)]
    heads = ("projector", "projection_head.layers"), ("predictor", "prediction_head.layers")
    return {"state_dict": renamed(state, *numbers, *heads), "pytorch-lightning_version": "2.0"}


def lightly_older(state):
    nested = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2.0", "7": "2.1"}
    heads = [(rf"projector\.{i}\.", f"projection_mlp.{to}.") for i, to in nested.items()]
    heads += [
        (r"predictor\.0\.", "prediction_mlp.0.0."),
        (r"predictor\.1\.", "prediction_mlp.0.1."),
    ]
    heads += [(r"predictor\.3\.", "prediction_mlp.1.")]
    return renamed(state, *heads)


def mmselfsup(state):
    parts = {"0": "fc0", "1": "bn0", "3": "fc1", "4": "bn1", "6": "fc2", "7": "bn2"}
    heads = [(rf"projector\.{i}\.", f"neck.{to}.") for i, to in parts.items()]
    heads += [(rf"predictor\.{i}\.", f"head.predictor.{to}.") for i, to in parts.items()]
    return {"meta": {"epoch": 100}, "state_dict": renamed(state, *heads)}


def solo_learn(state):
    state = {name: tensor.clone() for name, tensor in state.items()}
    biased(state, "projector.6", "projector.7")
    return {
        "state_dict": state
        | {"classifier.weight": torch.zeros(10, 32), "classifier.bias": torch.zeros(10)}
    }


def solo_learn_older(state):
    return {"state_dict": renamed(solo_learn(state)["state_dict"], ("backbone", "encoder"))}


def patrick_hua(state):
    """A projector of two layers: layer2 is in the checkpoint, freshly initialized, but unused."""
    parts = {"0": "layer1.0", "1": "layer1.1", "3": "layer3.0", "4": "layer3.1"}
    rules = [(rf"projector\.{i}\.", f"projector.{to}.") for i, to in parts.items()]
    rules += [
        (r"predictor\.0\.", "predictor.layer1.0."),
        (r"predictor\.1\.", "predictor.layer1.1."),
    ]
    rules += [(r"predictor\.3\.", "predictor.layer2."), (r"(backbone.*)downsample", r"\1shortcut")]
    state = renamed(state, *rules)
    for fc, bn in (
        ("projector.layer1.0", "projector.layer1.1"),
        ("projector.layer3.0", "projector.layer3.1"),
    ):
        biased(state, fc, bn)
    biased(state, "predictor.layer1.0", "predictor.layer1.1")
    idle = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10)).to(
        state["projector.layer1.0.weight"].dtype
    )
    state |= {f"projector.layer2.{name}": tensor for name, tensor in idle.state_dict().items()}
    return {
        "epoch": 800,
        "state_dict": state | renamed(state, ("backbone", "encoder.0"), ("projector", "encoder.1")),
    }


def torchvision(state):
    backbone = {
        k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")
    }
    return backbone | {"fc.weight": torch.zeros(1000, 32), "fc.bias": torch.zeros(1000)}


MOCO = {"predictor": "none", "head_bn": (), "proj_layers": 2}
HUA = {"proj_layers": 2, "output_bn_affine": True, "stem": "small"}
# The function that makes the layout, the settings of the model, the program, and the names left
# over, counted by their first part.
LAYOUTS = {
    "authors": (authors, {}, "the authors' SimSiam", {}),
    "moco": (moco, MOCO, "MoCo", {"encoder_k": 76, "queue": 1, "queue_ptr": 1}),
    "lightly": (lightly, {}, "lightly", {}),
    "lightly_older": (lightly_older, {}, "lightly", {}),
    "mmselfsup": (mmselfsup, {}, "mmselfsup", {}),
    "solo_learn": (solo_learn, {"stem": "small"}, "solo-learn", {"classifier": 2}),
    "solo_learn_older": (solo_learn_older, {}, "solo-learn", {"classifier": 2}),
    "patrick_hua": (patrick_hua, HUA, "PatrickHua's SimSiam", {"projector": 7, "encoder": 7}),
    "torchvision": (torchvision, {}, "torchvision or timm", {"fc": 2}),
}
layouts = pytest.mark.parametrize("name", LAYOUTS)


def outputs(model, train):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 40, 40, dtype=next(model.parameters()).dtype)
    out = copy.deepcopy(model).train(train)(*x)
    return torch.cat(
        [t.flatten() for t in (out.loss, *out.features, *out.projections, *out.predictions)]
    )


@layouts
def test_a_layout_comes_back_as_the_same_model(name, tmp_path):
    export, cells, program, left = LAYOUTS[name]
    exact, single = (torch.float64, 1e-12), (torch.float32, 1e-6)
    for (dtype, bound), train in ((exact, True), (exact, False), (single, False)):
        model = trained(**cells).to(dtype)
        torch.save(export(model.state_dict()), tmp_path / "theirs.pt")
        run = Run(convert(tmp_path / "theirs.pt", out=tmp_path / f"run-{dtype}-{train}"))
        state = run.checkpoint()["model"]
        if name == "torchvision":  # which has no heads to bring back
            assert run.recipe.method.name == "none" and all(
                key.startswith("backbone.") for key in state
            )
            state = model.state_dict() | state
            run.recipe = run.recipe.replace(**SMALL)
        back = build(
            run.recipe.method,
            backbone=run.recipe.backbone,
            width=run.recipe.width,
            stem=run.recipe.stem,
        )
        back.to(dtype).load_state_dict(state)
        torch.testing.assert_close(
            outputs(back, train), outputs(model, train), rtol=bound, atol=bound
        )

    encoder, x = load(run.path), torch.randn(2, 3, 40, 40)
    assert torch.equal(encoder(x), model.backbone.eval()(x))
    assert (encoder.transform.size, encoder.transform.mean[0]) == (
        32 if cells.get("stem") == "small" else 224,
        0.485,
    )
    report = run.json("converted.json")
    assert report["layout"] == program
    assert Counter(name.split(".")[0] for name in report["left_over"]) == left
    tensors, _ = read_state_dict(tmp_path / "theirs.pt")
    assert report["placed"] + len(report["left_over"]) == len(tensors)
    assert all(part in format_conversion(run.path) for part in left)


@layouts
def test_the_contract_of_a_run_folder_holds(name, tmp_path, shared):
    spec = spec_from_file_location("check_run", shared / "check_run.py")
    check_run = module_from_spec(spec)
    spec.loader.exec_module(check_run)
    export, cells, *_ = LAYOUTS[name]
    torch.save(export(trained(**cells).state_dict()), tmp_path / "theirs.pt")
    assert list(check_run.breaches(convert(tmp_path / "theirs.pt", out="run"))) == []


@layouts
def test_no_tensor_can_be_missing_misshapen_extra_or_infinite(name, monkeypatch):
    """Each tensor is tried by itself; of the backbone, only every fourth, to save time."""
    monkeypatch.setattr(checkpoints, "create_backbone", cache(create_backbone))  # to save time
    export, cells, *_ = LAYOUTS[name]
    content = export(trained(**cells).state_dict())
    tensors = content.get("state_dict", content)
    left = convert_state_dict(tensors).unused_keys
    reordered = dict(reversed(tensors.items()))  # the order does not matter
    assert convert_state_dict(reordered).method == convert_state_dict(tensors).method
    used = [key for key in tensors if key.removeprefix("module.") not in left]
    heads = [
        key for key in used if not re.search("conv|bn|layer[1-4]|downsample", key) or ".fc." in key
    ]

    def refused(changed):
        with pytest.raises(UsageError) as error:
            convert_state_dict(changed)
        assert "\n" not in str(error.value)

    for key in {*used[::4], *heads}:
        if key.endswith("num_batches_tracked"):
            continue  # torch fills it in for old files
        # Without this bias, solo-learn's layout is that of this package's checkpoints.
        if not (name.startswith("solo") and key == "projector.6.bias"):
            refused({k: v for k, v in tensors.items() if k != key})
        wider = torch.cat([tensors[key], tensors[key][:1]])
        refused(tensors | {key: wider})
        refused(tensors | {key: tensors[key] * float("nan")})
    layout = convert_state_dict(tensors).layout
    wrapper = "module." if name in ("authors", "moco") else ""
    inside = [*layout.heads.values(), f"{layout.backbone}layer1.", f"{layout.backbone}bn1."]
    if name != "lightly":  # whose backbone has numbers for names
        for prefix, shape in itertools.product(inside, ((3,), (3, 3))):
            refused(tensors | {f"{wrapper}{prefix}more.weight": torch.zeros(shape)})
    if name == "patrick_hua":  # where both copies would have to have it
        return
    beside, token = f"{layout.backbone}more.weight", f"{layout.backbone}dist_token"
    found = convert_state_dict(tensors | {f"{wrapper}{beside}": torch.zeros(3, 3)})
    assert set(found.unused_keys) == {beside, *left}
    refused(tensors | {f"{wrapper}{token}": torch.zeros(1, 1, 3)})  # of another network


@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer4.0.conv1", "layer4.0.bn1", "conv1"])
def test_an_incomplete_backbone_is_not_passed_over_for_its_slow_copy(name):
    tensors = moco(trained(**MOCO).state_dict())["state_dict"]
    del tensors[f"module.encoder_q.{name}.weight"]
    with pytest.raises(UsageError, match=rf"{name}.weight of resnet10.* is missing|no ResNet as"):
        convert_state_dict(tensors)


def test_a_bias_before_a_batch_norm_is_absorbed(tmp_path):
    """Compared with modules of torch that keep the bias."""
    torch.save(authors(trained().state_dict()), tmp_path / "theirs.pt")
    run = Run(convert(tmp_path / "theirs.pt", out="run"))
    assert run.json("converted.json")["absorbed"] == ["encoder.fc.6.bias"]
    layers = [
        nn.Linear(32, 10, bias=False),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, 10, bias=False),
    ]
    layers += [nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 12), nn.BatchNorm1d(12, affine=False)]
    theirs, _ = read_state_dict(tmp_path / "theirs.pt")
    fc = nn.Sequential(*layers).eval()
    fc.load_state_dict(
        {k.removeprefix("module.encoder.fc."): v for k, v in theirs.items() if ".fc." in k}
    )
    ours = build(run.recipe.method, backbone="resnet10", width=4).eval()
    ours.load_state_dict(run.checkpoint()["model"])
    h = torch.randn(8, 32)
    torch.testing.assert_close(ours.projector(h), fc(h), rtol=1e-6, atol=1e-6)
    assert ours.projector[7].running_mean.sub(fc[7].running_mean).abs().max() > 0.1


def test_lightlys_sequence_of_children_and_timms_names_are_the_same_network():
    """Compared with the networks of the libraries."""
    x = torch.randn(2, 3, 64, 64)
    theirs = [nn.Sequential(*list(models.resnet18().children())[:-1], nn.Flatten())]
    if find_spec("timm"):
        theirs.append(import_module("timm").create_model("resnet18", num_classes=0))
    for network in theirs:
        save_file(network.state_dict(), "theirs.safetensors")
        bare = create_backbone("resnet18", image_size=224)
        bare.load_state_dict(load(open_weights("theirs.safetensors")).state_dict())
        assert torch.equal(bare.eval()(x), network.eval()(x))


@pytest.mark.parametrize("stem", ["small", "large"])
def test_depth_width_and_stem_are_read_from_the_shapes(stem):
    for network in RESNETS:
        state = create_backbone(network, image_size=32, width=2, stem=stem).state_dict()
        assert convert_state_dict(state).settings == {"backbone": network, "width": 2, "stem": stem}


def test_a_network_that_is_no_resnet_goes_by_its_name(tmp_path):
    theirs = models.mobilenet_v3_small()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(UsageError, match="no ResNet"):
        convert(tmp_path / "theirs.pt", out="run")
    run = convert(
        tmp_path / "theirs.pt",
        out="run",
        backbone="mobilenet_v3_small",
        image_size=64,
        mean=[0.5] * 3,
        std=[1] * 3,
    )
    assert Run(run).json("converted.json")["left_over"] == [
        "classifier.3.weight",
        "classifier.3.bias",
    ]
    x = torch.randn(2, 3, 64, 64)
    theirs.classifier[3] = nn.Identity()
    assert torch.equal(load(run)(x), theirs.eval()(x)) and load(run).transform.mean == (
        0.5,
        0.5,
        0.5,
    )
    with pytest.raises(UsageError, match="resnet10, not a resnet18"):
        convert_state_dict(torchvision(trained().state_dict()), "resnet18")


def test_copies_must_agree():
    tensors = patrick_hua(trained(**HUA).state_dict())["state_dict"]
    tensors["encoder.0.conv1.weight"] += 1
    with pytest.raises(
        UsageError, match=r"backbone\.conv1\.weight and encoder\.0\.conv1\.weight are one tensor"
    ):
        convert_state_dict(tensors)


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damaged():
    """Files that are no checkpoint of a model, and the message for each."""
    whole = torchvision(trained().state_dict())
    torch.save({"state_dict": whole, "hook": Code()}, "code.pt")
    yield "code.pt", r"carries code \(\w+.mkdir\): none of it was run"
    for protocol in (2, 4):
        with open(f"pickle{protocol}.pt", "wb") as file:
            pickle.dump({"state_dict": Code()}, file, protocol=protocol)
        yield f"pickle{protocol}.pt", "carries code|no checkpoint that can be read"
    torch.save(whole, "cut.pt")
    with open("cut.pt", "rb+") as file:
        file.truncate(9_000)
    yield "cut.pt", "no checkpoint that can be read"
    for name, content in (
        ("empty.pt", b""),
        ("text.pt", b"hello world"),
        ("text.safetensors", b"hello world"),
    ):
        with open(name, "wb") as file:
            file.write(content)
        yield name, "no checkpoint that can be read"
    torch.save({"epoch": 3, "optimizer": {"state": {}}}, "optimizer.pt")
    yield "optimizer.pt", "holds no state dict, only epoch, optimizer"
    torch.save(models.resnet18(), "whole.pt")
    yield (
        "whole.pt",
        r"holds no state dict, only .*objects of torchvision.models.resnet.ResNet, .*; save "
        r"model.state_dict\(\)",
    )
    torch.save(torch.zeros(3), "tensor.pt")
    yield "tensor.pt", "holds no state dict, only Tensor"
    torch.save({"conv.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}, "strange.pt")
    yield (
        "strange.pt",
        "no ResNet as the authors' SimSiam, MoCo, .* store it; its tensors are in conv, fc; "
        "name other",
    )
    names = [f"backbone.{i}" for i in range(6)] + ["projection_head.0", "prediction_head.0"]
    torch.save({f"{name}.weight": torch.zeros(3) for name in names}, "generator.pt")
    yield (
        "generator.pt",
        "are children 0, 1, 2, 3, 4, 5 of a Sequential, and a ResNet's are 0, 1, 4",
    )
    yield "nowhere.pt", "unknown checkpoint 'nowhere.pt'"
    yield "simsiam_resnet50_100e", "did you mean 'simsiam_resnet50_100ep'"
    yield "ResNet50_Weights.IMAGENET1K_V3", "torchvision has no classifier's weights"
    os.mkdir("folder")
    yield "folder", "folder is not a run folder, and has no weights that can be read"


def test_what_is_no_checkpoint_gets_one_line_and_runs_nothing():
    for name, message in damaged():
        with pytest.raises(UsageError, match=message) as error:
            convert(name, out="run")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not os.path.exists("executed") and not os.path.exists("run")


def test_a_release_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    published = tmp_path / "checkpoint_0099.pth.tar"
    torch.save(authors(trained(network="resnet50").state_dict()), published)
    digest = file_sha256(published)

    def publish(digits):
        url, settings = published.as_uri(), {"epochs": 100, "batch_size": 256}
        release = Release(url, digits, settings, "CC BY-NC 4.0")
        monkeypatch.setitem(releases.RELEASES, "simsiam_resnet50_100ep", release)

    publish("0" * 8)
    with pytest.raises(WorkFailed, match=r"cannot be downloaded from file://.*invalid hash"):
        convert("simsiam_resnet50_100ep", out="run")
    assert not list((tmp_path / "cache").rglob("*.*"))
    publish(digest[:8])
    run = Run(convert("simsiam_resnet50_100ep", out="run"))
    assert (run.recipe.epochs, run.recipe.batch_size, run.recipe.image_size) == (100, 256, 224)
    assert run.json("converted.json")["sha256"] == digest and "CC BY-NC 4.0" in format_conversion(
        run.path
    )
    published.unlink()
    convert("simsiam_resnet50_100ep", out="from the cache")
    (cached,) = (tmp_path / "cache").rglob("*.tar")
    cached.write_bytes(b"")
    with pytest.raises(WorkFailed, match="is damaged: its sha256 does not start with"):
        convert("simsiam_resnet50_100ep", out="again")
    cached.unlink()
    with pytest.raises(WorkFailed, match="cannot be downloaded"):
        convert("simsiam_resnet50_100ep", out="again")


def test_every_classifier_of_torchvision_is_known_by_name():
    for network in models.list_models(module=models):
        for weights in models.get_model_weights(network):
            release = find_release(f"{type(weights).__name__}.{weights.name}")
            assert release.settings["backbone"] == network and release.url == weights.url
            assert len(release.sha256_prefix) >= 8 and release.sha256_prefix in release.url
            recipe, preset = Recipe().replace(**release.settings).resolve(), weights.transforms()
            transform = eval_transform(recipe)
            assert [transform.resize, transform.size] == [*preset.resize_size, *preset.crop_size]
            assert transform.interpolation == preset.interpolation.value


def test_a_backbone_can_start_from_any_of_them(tmp_path):
    model = trained()
    state = model.backbone.state_dict()
    torch.save(authors(model.state_dict()), tmp_path / "theirs.pt")
    save_file(state, tmp_path / "backbone.safetensors")
    run = convert(tmp_path / "theirs.pt", out=tmp_path / "run")
    for path in (
        tmp_path / "theirs.pt",
        tmp_path / "backbone.safetensors",
        run,
        run / "checkpoints" / "last.pt",
    ):
        loaded = load(open_weights(path, backbone="resnet10"), head=False).state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
    for path in (run, tmp_path / "theirs.pt"):
        with pytest.raises(UsageError, match="resnet10"):
            open_weights(path, backbone="resnet50")


# --- prefixes, wrappers and what else is in a file ---


def same_backbone(path, model, **options):
    """Convert a file, and compare its features with those of a model; return the run."""
    run = Run(convert(path, out=f"{path}.run", image_size=40, **options))
    x = torch.randn(2, 3, 40, 40)
    assert torch.equal(load(run.path)(x), model.backbone.eval()(x))
    return run


@pytest.mark.parametrize(
    "prefix",
    [
        "model.", "module._orig_mod.", "backbone.", "student.", "teacher.", "encoder.",
        "_orig_mod.module.model.", "model.backbone.", "online_network.net.", "a.b.c.",
        "_feature_blocks.", "encoder_k.",
    ],
)  # fmt: skip
def test_any_prefix_is_taken_off_and_what_is_beside_is_left_over(prefix):
    model = trained()
    state = {prefix + name: tensor for name, tensor in torchvision(model.state_dict()).items()}
    beside = {
        "loss.center": torch.zeros(1, 7),
        "n_averaged": torch.tensor(3),
        "queue": torch.ones(2),
    }
    torch.save({"state_dict": state | beside}, "theirs.ckpt")
    run = same_backbone("theirs.ckpt", model)
    report = run.json("converted.json")
    short = re.sub(r"(module|_orig_mod)\.", "", prefix)
    assert set(report["left_over"]) == {f"{short}fc.weight", f"{short}fc.bias", *beside}
    assert (f"the prefix {short} was taken off" in report["notes"]) == bool(short)
    assert run.recipe.method.name == "none"


def test_an_averaged_model_and_wrappers_in_the_middle_of_names():
    model = trained()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save(averaged.state_dict(), "averaged.pt")
    run = same_backbone("averaged.pt", model)
    assert run.json("converted.json")["left_over"] == ["n_averaged"]
    assert run.recipe.method.predictor == "mlp", "the heads are placed as well"
    inner = renamed(model.state_dict(), ("backbone", "backbone._orig_mod"))
    torch.save({"state_dict": renamed(inner, ("predictor", "predictor.module"))}, "inner.pt")
    assert same_backbone("inner.pt", model).recipe.method.predictor == "mlp"


def test_the_state_dict_is_found_in_a_nested_checkpoint():
    model, other = (torchvision(trained(dim=d).state_dict()) for d in (12, 12))
    other = {name: tensor + 1 for name, tensor in other.items()}
    optimizer = {"state": {0: {"momentum": torch.zeros(9)}}, "param_groups": []}
    cases = {
        "classy_state_dict.base_model.model.trunk": {
            "classy_state_dict": {"base_model": {"model": {"trunk": model, "heads": {}}}},
        },
        "model.state_dict": {"model": {"state_dict": model}, "ema": other},
        "student": {"student": model, "dino_loss": {"center": torch.zeros(1, 5)}},
        "teacher": {"student": other, "teacher": model},
        "state_dict": {"state_dict": model, "state_dict_ema": other, "step": torch.tensor(3)},
        "model": {"model": model, "model_ema": other},
        "": model | {"optimizer": optimizer, "best": {"top1": torch.tensor(3.0)}},
        "largest": {"center": {"c": torch.zeros(1)}, "largest": model},
    }
    for keys, content in cases.items():
        torch.save(content | {"optimizer": optimizer, "epoch": 3}, "nested.pt")
        tensors, set_aside = read_state_dict(pathlib.Path("nested.pt"))
        assert tensors.keys() == model.keys(), keys
        assert all(torch.equal(tensors[name], model[name]) for name in model), keys
        assert {"optimizer", "epoch"} <= set(set_aside)
        assert keys.split(".")[0] not in set_aside


def exclude_bias_and_norm(p):
    """A function that an optimizer of others keeps, as those of Barlow Twins and VICReg do."""


class Settings(dict):
    """A dictionary of another program."""


class Popen:
    def __reduce__(self):
        return subprocess.Popen, (["touch", "executed"],)


class Eval:
    def __reduce__(self):
        return builtins.eval, ("open('executed', 'w')",)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_other_programs_are_neither_run_nor_in_the_way(zipped):
    model = trained()
    others = {
        "args": argparse.Namespace(lr=0.05, items=3, values=4),
        "path": pathlib.PurePosixPath("/data/imagenet"),
        "settings": Settings(lr=0.1),
        "filter": {"weight_decay_filter": exclude_bias_and_norm},
        "hook": Popen(),
        "lambda": Eval(),
    }
    numbers = {"best_acc1": np.float64(71.2), "epoch": np.int64(3), "history": np.arange(5.0)}
    content = {"state_dict": torchvision(model.state_dict())} | others | numbers
    torch.save(content, "theirs.pt", _use_new_zipfile_serialization=zipped)
    run = same_backbone("theirs.pt", model)
    report = run.json("converted.json")
    assert set(report["set_aside"]) == {*others, *numbers}
    (note,) = (note for note in report["notes"] if note.startswith("objects of other programs"))
    named = set(note.partition("not loaded: ")[2].split(", "))
    for name in ("argparse.Namespace", "builtins.eval", f"{__name__}.Settings"):
        assert name in named
    assert any(name.endswith(".Popen") for name in named)  # Python 2 had it in another module
    assert f"{__name__}.exclude_bias_and_norm" in named and "numpy" not in note
    assert not os.path.exists("executed")


def test_a_state_dict_of_numpy_arrays_is_one():
    model = trained()
    state = {name: tensor.numpy() for name, tensor in torchvision(model.state_dict()).items()}
    state["conv1.weight"] = state["conv1.weight"].astype(">f4")
    torch.save({"state_dict": state, "names": np.array(["a"], object)}, "arrays.pt")
    same_backbone("arrays.pt", model)


# --- full checkpoints of other methods, as their programs write them ---


def optimizer_with_filters():
    group = {"lr": 0.1, "weight_decay_filter": exclude_bias_and_norm, "params": [0, 1]}
    return {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [group]}


def mlp(*layers):
    return nn.Sequential(*layers)


def swav_head():
    return mlp(nn.Linear(32, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 12))


def barlow_head():
    layers = [nn.Linear(32, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU()]
    return mlp(*layers, nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(),
               nn.Linear(10, 12, bias=False))  # fmt: skip


def vicreg_head():
    layers = [nn.Linear(32, 10), nn.BatchNorm1d(10), nn.ReLU()]
    return mlp(*layers, nn.Linear(10, 10), nn.BatchNorm1d(10), nn.ReLU(),
               nn.Linear(10, 12, bias=False))  # fmt: skip


def moco_v3_head():
    layers = [nn.Linear(32, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU()]
    return mlp(*layers, nn.Linear(10, 12, bias=False), nn.BatchNorm1d(12, affine=False))


def simclr_head():
    return mlp(nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 12))


def under(prefix, module):
    return {prefix + name: tensor.clone() for name, tensor in module.state_dict().items()}


def swav(backbone, head):
    state = under("module.", backbone) | under("module.projection_head.", head)
    state["module.prototypes.weight"] = torch.zeros(7, 12)
    return {"epoch": 800, "state_dict": state, "optimizer": {}}


def moco_v3(backbone, head):
    states = {}
    for encoder in ("base_encoder", "momentum_encoder"):
        states |= under(f"module.{encoder}.", backbone) | under(f"module.{encoder}.fc.", head)
    predictor = mlp(nn.Linear(12, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(),
                    nn.Linear(10, 12, bias=False))  # fmt: skip
    states |= under("module.predictor.", predictor)
    return {"epoch": 300, "arch": "resnet50", "state_dict": states, "scaler": {"scale": 1.0}}


def barlow(backbone, head):
    state = under("module.backbone.", backbone) | under("module.projector.", head)
    state |= under("module.bn.", nn.BatchNorm1d(12, affine=False))
    return {"epoch": 1000, "model": state, "optimizer": optimizer_with_filters()}


def vicreg(backbone, head):
    state = under("module.backbone.", backbone) | under("module.projector.", head)
    return {"epoch": 1000, "model": state, "optimizer": optimizer_with_filters()}


def lightly_simclr(backbone, head):
    state = under("backbone.", backbone) | under("projection_head.layers.", head)
    return {"state_dict": state | under("backbone_momentum.", backbone), "hparams_name": None}


def solo_simclr(backbone, head):
    state = under("backbone.", backbone) | under("projector.", head)
    return {"state_dict": state | under("classifier.", nn.Linear(32, 10))}


def mmselfsup_simclr(backbone, head):
    names = {"0": "fc0", "2": "fc1"}
    neck = {f"neck.{names[k[0]]}{k[1:]}": x for k, x in head.state_dict().items()}
    return {"meta": {}, "state_dict": under("backbone.", backbone) | neck}


# The function that makes the layout, the head, the program, the name of the method, and what is
# left over, counted by the first part of the names.
METHODS_OF_OTHERS = {
    "swav": (swav, swav_head, "SwAV", "swav", {"prototypes": 1}),
    "moco_v3": (moco_v3, moco_v3_head, "MoCo v3", "none", {"momentum_encoder": 82, "predictor": 7}),
    "barlow": (barlow, barlow_head, "Barlow Twins", "barlow_twins", {"bn": 3}),
    "vicreg": (vicreg, vicreg_head, "solo-learn or VICReg", "none", {}),
    "lightly": (lightly_simclr, simclr_head, "lightly", "none", {"backbone_momentum": 72}),
    "solo": (solo_simclr, simclr_head, "solo-learn or VICReg", "none", {"classifier": 2}),
    "mmselfsup": (mmselfsup_simclr, simclr_head, "mmselfsup", "none", {}),
}


@pytest.mark.parametrize("name", METHODS_OF_OTHERS)
def test_backbone_and_projector_of_other_methods_are_placed(name):
    make, make_head, program, method, left = METHODS_OF_OTHERS[name]
    model = trained()
    head = make_head()
    with torch.no_grad():
        for tensor in [*head.parameters(), *(b for n, b in head.named_buffers() if "mean" in n)]:
            tensor.normal_()
    torch.save(make(model.backbone, head), "theirs.pt")
    run = same_backbone("theirs.pt", model)
    report = run.json("converted.json")
    assert (report["layout"], run.recipe.method.name) == (program, method)
    assert Counter(key.split(".")[0] for key in report["left_over"]) == left
    ours = build(run.recipe.method, backbone="resnet10", width=4).eval()
    state = run.checkpoint()["model"]
    assert not any(key.startswith("predictor") for key in state)
    ours.load_state_dict(ours.state_dict() | state)
    h = torch.randn(8, 32)
    torch.testing.assert_close(ours.projector(h), head.eval()(h), rtol=1e-5, atol=1e-5)
    assert "projector of" in format_conversion(run.path)


def timm_vit(name="test_vit", **options):
    timm = import_module("timm")
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **options).eval()


def dino(network):
    """Student and teacher under their names, a head that no method here has, and the arguments."""
    head = {
        "head.mlp.0.weight": torch.zeros(16, 64), "head.mlp.0.bias": torch.zeros(16),
        "head.mlp.2.weight": torch.zeros(8, 16), "head.mlp.2.bias": torch.zeros(8),
        "head.last_layer.weight_g": torch.ones(9, 1), "head.last_layer.weight_v": torch.ones(9, 8),
    }  # fmt: skip
    teacher = under("backbone.", network) | head
    student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
    return {
        "student": student, "teacher": teacher, "optimizer": {}, "epoch": 100,
        "args": argparse.Namespace(arch="vit_small"), "dino_loss": {"center": torch.zeros(1, 9)},
    }  # fmt: skip


def test_of_dino_the_teacher_is_taken_resnet_or_vit():
    model, x = trained(), torch.randn(2, 3, 160, 160)
    torch.save(dino(model.backbone), "resnet.pth")
    report = same_backbone("resnet.pth", model).json("converted.json")
    assert report["layout"] == "DINO" and len(report["left_over"]) == 6
    assert {"student", "args", "dino_loss"} <= set(report["set_aside"])
    network = timm_vit()
    torch.save(dino(network), "vit.pth")
    with pytest.raises(UsageError, match="name other networks by --backbone"):
        convert("vit.pth", out="run")
    run = convert("vit.pth", out="run", backbone="timm/test_vit")
    with torch.no_grad():
        assert torch.equal(load(run)(x), network(x)) and Run(run).recipe.image_size == 160
    prefixed = {"model": under("student.backbone.", trained(stem="small").backbone)
                | under("teacher.backbone.", model.backbone)}  # fmt: skip
    torch.save(prefixed, "dinov2.pth")
    report = same_backbone("dinov2.pth", model).json("converted.json")
    assert any("that under teacher.backbone. is taken, not student.b" in n for n in report["notes"])


def moco_v3_vit(network, width):
    head = mlp(nn.Linear(width, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU(),
               nn.Linear(10, 12, bias=False), nn.BatchNorm1d(12, affine=False))  # fmt: skip
    state = {}
    for encoder in ("base_encoder", "momentum_encoder"):
        state |= under(f"module.{encoder}.", network) | under(f"module.{encoder}.head.", head)
    state |= under("module.predictor.", mlp(nn.Linear(12, 10, bias=False), nn.BatchNorm1d(10)))
    return {"arch": "vit_base", "state_dict": state}


def test_a_vit_of_moco_v3_but_not_its_small_one_which_has_other_attention():
    network, x = timm_vit(), torch.randn(2, 3, 160, 160)
    torch.save(moco_v3_vit(network, network.num_features), "theirs.pth")
    run = convert("theirs.pth", out="run", backbone="timm/test_vit")
    with torch.no_grad():
        assert torch.equal(load(run)(x), network(x))
    assert Run(run).recipe.method.proj_layers == 2
    with torch.device("meta"):
        small = timm_vit("vit_small_patch16_224")
        state = moco_v3_vit(small, 384)["state_dict"]
    with pytest.raises(UsageError, match=r"has 12 attention heads and .* has 6"):
        convert_state_dict(state, "timm/vit_small_patch16_224")


def test_a_decoder_is_beside_a_vit_and_other_tokens_are_not():
    network, x = timm_vit(), torch.randn(2, 3, 160, 160)
    width, state = network.num_features, network.state_dict()
    decoder = {
        "mask_token": torch.zeros(1, 1, width), "decoder_pos_embed": torch.zeros(1, 101, 9),
        "decoder_blocks.0.norm1.weight": torch.zeros(9),
    }  # fmt: skip
    torch.save({"model": state | decoder}, "mae.pth")
    run = convert("mae.pth", out="run", backbone="timm/test_vit")
    with torch.no_grad():
        assert torch.equal(load(run)(x), network(x))
    assert set(Run(run).json("converted.json")["left_over"]) == decoder.keys()
    for token in ("dist_token", "reg_token"):
        torch.save(state | {token: torch.zeros(1, 1, width)}, "tokens.pth")
        with pytest.raises(UsageError, match=f"{token} has no place in timm/test_vit for images"):
            convert("tokens.pth", out="other", backbone="timm/test_vit")


def test_a_projector_of_an_unknown_form_is_left_over_with_the_reason():
    model = trained()
    odd = mlp(nn.Linear(32, 10), nn.Linear(10, 9), nn.BatchNorm1d(9), nn.Linear(9, 12))
    torch.save(
        {"state_dict": under("backbone.", model.backbone) | under("projector.", odd)}, "o.pt"
    )
    report = same_backbone("o.pt", model).json("converted.json")
    assert len(report["left_over"]) == len(odd.state_dict())
    assert any("projector is left over: no method has such heads" in n for n in report["notes"])


def test_a_sequence_of_children_may_go_on_after_a_resnet():
    network = models.resnet18().eval()
    theirs = nn.Sequential(*list(network.children())[:-1], nn.Flatten(), nn.Linear(512, 3))
    torch.save(under("model.", theirs), "children.pt")
    run = convert("children.pt", out="run")
    network.fc, x = nn.Identity(), torch.randn(2, 3, 224, 224)
    assert torch.equal(load(run)(x), network(x))
    assert Run(run).json("converted.json")["left_over"] == ["model.10.weight", "model.10.bias"]


def test_the_channels_are_read_and_their_statistics_are_asked_for():
    for name in ("resnet10", "timm/test_vit"):
        torch.manual_seed(0)
        width = {"width": 4} if name == "resnet10" else {}
        network = create_backbone(name, image_size=96, channels=2, **width).eval()
        save_file(network.state_dict(), "two.safetensors")
        backbone = None if name == "resnet10" else name
        with pytest.raises(UsageError, match="of its 2 channels: `simsiam convert` takes them"):
            convert("two.safetensors", out="run", backbone=backbone)
        settings = {"mean": [0.5, 0.4], "std": [0.2, 0.3], "image_size": 96, "backbone": backbone}
        encoder, x = (
            load(convert("two.safetensors", out=name, **settings)),
            torch.randn(1, 2, 96, 96),
        )
        with torch.no_grad():
            assert torch.equal(encoder(x), network(x))
