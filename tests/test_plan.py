"""A plan against what then happens: steps and sizes are those of a run, and its arithmetic is what it says it is."""

import json

import pytest
import torch
from conftest import TINY
from test_sources import one_line

from simsiam.commands.main import main
from simsiam.config.recipes import Recipe
from simsiam.errors import UsageError
from simsiam.model.siamese import build
from simsiam.sources.open_source import open_source
from simsiam.sources.write_shards import write_shards
from simsiam.training.plan import estimate_memory, model_costs, plan
from simsiam.training.pretrain import pretrain

SPEED = {"prepared": 0.001, "trained": 0.004, "gpu": False, "device": "a device"}


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """Instead of a probe, which takes seconds."""
    monkeypatch.setattr("simsiam.training.plan.measure_speed", lambda *_, **__: SPEED)


@pytest.mark.parametrize("method", ["simsiam", "byol"])
def test_a_plan_is_what_then_happens(tmp_path, method):
    words = TINY | {
        "method": method,
        "width": 8,
        "dim": 64,
        "epochs": 4,
        "limit": 64,
        "save_every": 2,
        "holdout": 0,
    }
    words |= {"warmup_epochs": 0} if method == "byol" else {}
    found = plan("shapes", **words)
    run = pretrain("shapes", out=tmp_path / "run", **words, knn_every=99)
    summary = json.loads((run / "summary.json").read_text())
    assert (
        (found["steps"]["total"], found["steps"]["epochs"])
        == (summary["steps"], summary["epochs"])
        == (8, 4)
    )
    kept = list((run / "checkpoints").glob("*.pt"))
    assert (
        len(kept) == 4 and found["storage"]["checkpoints"] == 5
    )  # without labels held out there is no best.pt
    size = (run / "checkpoints" / "last.pt").stat().st_size
    assert found["storage"]["checkpoint_bytes"] == pytest.approx(size, rel=0.02)
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    weights = sum(t.nbytes for t in state["model"].values())
    momenta = sum(
        t.nbytes
        for s in state["optimizer"]["state"].values()
        for t in s.values()
        if torch.is_tensor(t)
    )
    assert (
        found["memory"]["weights_bytes"] == weights
        and found["memory"]["optimizer_bytes"] == momenta
    )


def test_time_and_reading_follow_from_the_rate():
    words = TINY | {"limit": None}
    one = plan("shapes", **words, images=6400)
    assert one["images"]["resident"] is False and one["steps"]["samples"] == 2 * 6400
    cores = one["time"]["cores"]
    rate = 1 / (SPEED["prepared"] / cores + SPEED["trained"])  # on a CPU both take the same cores
    assert one["time"]["images_per_second"] == pytest.approx(rate, abs=0.1)
    assert one["time"]["seconds"] == pytest.approx(12800 / rate, rel=1e-3)
    assert one["reading"]["bytes_per_second"] == pytest.approx(rate * 3 * 32 * 32, rel=1e-3)
    assert one["storage"]["images_bytes"] == 6400 * 3 * 32 * 32
    eight = plan("shapes", **words, images=6400, gpus=8)
    assert eight["time"]["seconds"] == pytest.approx(one["time"]["seconds"] / (8 * 0.9), rel=1e-3)
    assert eight["memory"]["activations_bytes"] == one["memory"]["activations_bytes"] // 8
    assert eight["memory"]["gradients_bytes"] == 2 * one["memory"]["gradients_bytes"]
    assert any("0.9 x 8" in line for line in eight["assumed"]["lines"])
    few = plan("shapes", **words)
    assert few["images"]["resident"] and few["reading"]["bytes_per_second"] == 0


def test_activations_are_what_autograd_keeps():
    """Counted otherwise: by the graph's own saved tensors, for a network without batch norm's shared buffers."""
    recipe = Recipe().replace(**TINY | {"image_size": 32})
    found, flops = model_costs(recipe, "float32")
    model = build(recipe.method, backbone="resnet10", image_size=32, width=4)
    x = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    seen, todo, own = (
        {},
        [model(*x).loss.grad_fn],
        {p.data_ptr() for p in (*model.parameters(), *model.buffers())},
    )
    visited = set()
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        todo += [after for after, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                for tensor in value if isinstance(value, tuple | list) else [value]:
                    if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in own:
                        seen[tensor.untyped_storage().data_ptr()] = (
                            tensor.untyped_storage().nbytes()
                        )
    assert found["activations_per_image"] == pytest.approx(sum(seen.values()) / 4, rel=0.02)
    assert flops > 0
    half = model_costs(recipe, "bfloat16")[0]["activations_per_image"]
    assert 0.4 < half / found["activations_per_image"] < 0.8


def test_eta_and_shards_have_their_share(tmp_path):
    train = open_source(write_shards("shapes", out=tmp_path / "out", per_shard=1000)).train
    recipe = Recipe().replace(**TINY, image_size=32)
    plain = estimate_memory(recipe, train, 10**6, 1, "float32")
    moving = recipe.replace(target="moving_average", predictor="none")
    eta = estimate_memory(moving, train, 10**6, 1, "float32")
    assert eta["weights_bytes"] > 10**6 * 16 * 4 and eta["checkpoint_bytes"] > 10**6 * 16 * 4
    assert 32 * 2**22 >= plain["shards_bytes"] > 0
    assert (
        estimate_memory(recipe.replace(order="shuffled"), train, 10**6, 1, "float32")[
            "shards_bytes"
        ]
        == 0
    )


def test_a_bench_file_speaks_for_another_machine(tmp_path):
    file = tmp_path / "gpu.json"
    step = {"what": "training", "limit": {"of": "FLOP/s", "machine": 9e14, "achieved": 1e14}}
    slow = {"what": "small", "limit": {"achieved": 1e12}}
    views = {"ways": {"simsiam, what workers do of it": {"rate": 50.0}}}
    report = {"cases": {"step-a": step, "step-b": slow, "views-224": views}, "device_type": "cuda",
              "device": "a GPU", "precision": "bfloat16"}  # fmt: skip
    file.write_text(json.dumps(report))
    words = TINY | {"limit": None}
    found = plan("shapes", **words, images=10**6, bench=file, cores=4)
    flops = model_costs(Recipe().replace(**words, image_size=32), "bfloat16")[1]
    assert found["time"]["trained_per_second"] == pytest.approx(1e14 / flops, rel=0.01)
    assert found["time"]["images_per_second"] == pytest.approx(
        200, rel=0.01
    )  # 4 cores are the slower part
    assert found["time"]["cores_to_keep_up"] == pytest.approx(1e14 / flops / 50, rel=0.01)
    assert found["memory"]["precision"] == "bfloat16"
    cores = tmp_path / "cores.json"
    cores.write_text(
        json.dumps(
            report | {"cases": {"views-224": views}, "device": "a CPU", "device_type": "cpu"}
        )
    )
    file.write_text(json.dumps(report | {"cases": {"step-a": step}}))
    both = plan(
        "shapes", **words | {"batch_size": 2**20}, images=10**7, bench=[file, cores], cores=4
    )
    assert both["time"]["prepared_per_second"] == 200 and both["time"]["device"] == "a GPU"
    assert "images are prepared by cores like those of a CPU" in both["assumed"]["lines"]
    for text in ("{", "{}", json.dumps(report | {"cases": {"views-224": views}}), "[]"):
        file.write_text(text)
        with pytest.raises(UsageError, match="no bench file with a training step"):
            plan("shapes", **words, bench=file)


def test_a_wrong_request_is_one_line(tmp_path, capsys):
    for words, said in [
        ({"gpus": 0}, "gpus is 0"), ({"images": -1}, "images is -1"), ({"gpus": 3}, "shared out evenly"),
        ({"images": 5}, "only 5 images"), ({"bench": tmp_path / "none"}, "cannot read"), ({"out": tmp_path}, "--out"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=said) as error:
            plan("shapes", **TINY | {"limit": None} | words)
        one_line(error)
    assert main(["plan", "shapes", "--limit", "600", "--out", str(tmp_path / "x.json")]) == 0
    said, facts = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert max(map(len, said.splitlines())) <= 80
    assert all(f"\n{name} " in "\n" + said for name in facts)
