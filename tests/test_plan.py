"""Steps and sizes of a plan are those of the run, and its other numbers follow from the speed."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import TINY
from test_sources import one_line

from simsiam.commands.main import main
from simsiam.config.recipes import Recipe
from simsiam.errors import UsageError
from simsiam.model.siamese import build
from simsiam.runs.compose import compose_recipe
from simsiam.sources.open_source import open_source
from simsiam.sources.write_shards import write_shards
from simsiam.training.launch import pretrain
from simsiam.training.plan import estimate_memory, model_costs, plan
from simsiam.training.prepare import prepare_data
from simsiam.training.speed import measure_speed

SPEED = {"prepared": 0.001, "trained": 0.004, "gpu": False, "device": "a device", "load": 0.0}


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """Replace the measurement of the speed, which takes seconds."""
    monkeypatch.setattr("simsiam.training.plan.kept_speed", lambda *_, **__: SPEED)


@pytest.mark.parametrize("method", ["simsiam", "byol"])
def test_a_run_takes_what_was_planned(tmp_path, method):
    settings = TINY | {
        "method": method,
        "width": 8,
        "dim": 64,
        "epochs": 4,
        "limit": 64,
        "save_every": 2,
        "holdout": 0,
    }
    settings |= {"warmup_epochs": 0} if method == "byol" else {}
    facts = plan("shapes", **settings)
    run = pretrain("shapes", out=tmp_path / "run", **settings, knn_every=99)
    summary = json.loads((run / "summary.json").read_text())
    assert (
        (facts["steps"]["total"], facts["steps"]["epochs"])
        == (summary["steps"], summary["epochs"])
        == (8, 4)
    )
    kept = list((run / "checkpoints").glob("*.pt"))
    assert (
        len(kept) == 4 and facts["storage"]["checkpoints"] == 5
    )  # without held-out labels there is no best.pt
    size = (run / "checkpoints" / "last.pt").stat().st_size
    assert facts["storage"]["checkpoint_bytes"] == pytest.approx(size, rel=0.02)
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    weights = sum(t.nbytes for t in state["model"].values())
    momenta = sum(
        t.nbytes
        for s in state["optimizer"]["state"].values()
        for t in s.values()
        if torch.is_tensor(t)
    )
    assert (
        facts["memory"]["weights_bytes"] == weights
        and facts["memory"]["optimizer_bytes"] == momenta
    )


def test_images_that_are_held_out_are_no_steps(capsys):
    settings = TINY | {"limit": 64, "holdout": 6}  # `shapes` has a split `val` to monitor with
    recipe, source, _ = compose_recipe("shapes", None, settings)
    facts = plan("shapes", **settings)
    assert facts["steps"]["per_epoch"] == len(prepare_data(recipe, source).train) // 32 == 1
    assert "6 of the images are not trained on" in capsys.readouterr().out


def test_more_images_held_out_than_there_are_is_one_line():
    words = {k: v for k, v in TINY.items() if k != "epochs"} | {"limit": 64, "holdout": 64}
    for command in (plan, partial(pretrain, minutes=1, out="run")):
        with pytest.raises(UsageError, match="cannot hold out 64 of 64 images: give 1 to 63"):
            command("shapes", **words)


def test_more_classes_than_outputs_are_one_line():
    recipe, source, _ = compose_recipe("shapes", None, TINY | {"method": "supervised", "dim": 2})
    with pytest.raises(UsageError, match="at most dim = 2 classes; shapes has 10 classes"):
        measure_speed(recipe, source.train, resident=True, seconds=0)


def test_time_and_reading_follow_from_the_rate():
    settings = TINY | {"limit": None}
    one = plan("shapes", **settings, images=64_000)
    assert one["images"]["resident"] is False and one["steps"]["samples"] == 2 * 64_000
    cores = one["time"]["cores"]
    rate = 1 / (SPEED["prepared"] / cores + SPEED["trained"])  # on a CPU both take the same cores
    assert one["time"]["images_per_second"] == pytest.approx(rate, abs=0.1)
    assert one["time"]["seconds"] == pytest.approx(128_000 / rate, rel=1e-3)
    assert one["reading"]["bytes_per_second"] == pytest.approx(rate * 3 * 32 * 32, rel=1e-3)
    assert one["storage"]["images_bytes"] == 64_000 * 3 * 32 * 32
    eight = plan("shapes", **settings, images=64_000, gpus=8)
    assert eight["time"]["seconds"] == pytest.approx(one["time"]["seconds"] / (8 * 0.9), rel=1e-3)
    assert eight["memory"]["activations_bytes"] == one["memory"]["activations_bytes"] // 8
    assert eight["memory"]["gradients_bytes"] == 2 * one["memory"]["gradients_bytes"]
    assert any("0.9 x 8" in line for line in eight["assumed"]["lines"])
    few = plan("shapes", **settings)
    assert few["images"]["resident"] and few["reading"]["bytes_per_second"] == 0


def test_activations_are_what_autograd_keeps():
    """They are counted in another way: by the tensors saved in the graph of a real step."""
    recipe = Recipe().replace(**TINY | {"image_size": 32})
    facts, flops = model_costs(recipe, "float32")
    model = build(recipe.method, backbone="resnet10", image_size=32, width=4)
    x = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved, todo, visited = {}, [model(*x).loss.grad_fn], set()
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
                        saved[tensor.untyped_storage().data_ptr()] = (
                            tensor.untyped_storage().nbytes()
                        )
    assert facts["activations_per_image"] == pytest.approx(sum(saved.values()) / 4, rel=0.02)
    assert flops > 0
    half = model_costs(recipe, "bfloat16")[0]["activations_per_image"]
    assert 0.4 < half / facts["activations_per_image"] < 0.8


def test_eta_and_shards_take_memory(tmp_path):
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


def test_a_bench_file_gives_the_speed_of_another_machine(tmp_path):
    file = tmp_path / "gpu.json"
    step = {"what": "training", "limit": {"of": "FLOP/s", "machine": 9e14, "achieved": 1e14}}
    slow = {"what": "small", "limit": {"achieved": 1e12}}
    views = {"ways": {"simsiam, what workers do of it": {"rate": 50.0}}}
    report = {"cases": {"step-a": step, "step-b": slow, "views-224": views}, "device_type": "cuda",
              "device": "a GPU", "precision": "bfloat16"}  # fmt: skip
    file.write_text(json.dumps(report))
    settings = TINY | {"limit": None}
    facts = plan("shapes", **settings, images=10**6, bench=file, cores=4)
    flops = model_costs(Recipe().replace(**settings, image_size=32), "bfloat16")[1]
    assert facts["time"]["trained_per_second"] == pytest.approx(1e14 / flops, rel=0.01)
    assert facts["time"]["images_per_second"] == pytest.approx(
        200, rel=0.01
    )  # the 4 cores are slower than the GPU
    assert facts["time"]["cores_to_keep_up"] == pytest.approx(1e14 / flops / 50, rel=0.01)
    assert facts["memory"]["precision"] == "bfloat16"
    cores = tmp_path / "cores.json"
    cores.write_text(
        json.dumps(
            report | {"cases": {"views-224": views}, "device": "a CPU", "device_type": "cpu"}
        )
    )
    file.write_text(json.dumps(report | {"cases": {"step-a": step}}))
    both = plan(
        "shapes", **settings | {"batch_size": 2**20}, images=10**7, bench=[file, cores], cores=4
    )
    assert both["time"]["prepared_per_second"] == 200 and both["time"]["device"] == "a GPU"
    assert "images are prepared on cores like those of a CPU" in both["assumed"]["lines"]
    for text in ("{", "{}", json.dumps(report | {"cases": {"views-224": views}}), "[]"):
        file.write_text(text)
        with pytest.raises(UsageError, match="found no bench file with a training step"):
            plan("shapes", **settings, bench=file)


def test_a_wrong_request_is_one_line(tmp_path, capsys):
    for settings, message in [
        ({"gpus": 0}, "gpus is 0"),
        ({"images": -1}, "images is -1"),
        ({"gpus": 3}, "divided evenly"),
        ({"images": 5}, "only 5 images"),
        ({"bench": tmp_path / "none"}, "cannot read"),
        ({"out": tmp_path}, "--out"),
    ]:
        with pytest.raises(UsageError, match=message) as error:
            plan("shapes", **TINY | {"limit": None} | settings)
        one_line(error)
    assert main(["plan", "shapes", "--limit", "600", "--out", str(tmp_path / "x.json")]) == 0
    text, facts = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"\n{name} " in "\n" + text for name in facts)


def test_flops_are_counted_without_a_word_where_triton_is_missing():
    code = (
        "import sys\nsys.modules['triton'] = None\nimport torch\n"
        "from simsiam.utils.flops import count_flops\n"
        "with count_flops() as counter:\n    torch.ones(2, 3) @ torch.ones(3, 5)\n"
        "print(counter.get_total_flops())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("60\n", "")
