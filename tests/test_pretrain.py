"""Pretraining end to end: the run folder keeps its contract, and a killed run continues exactly."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import QUICK, TINY, flags
from PIL import Image

import simsiam
from simsiam.errors import Stopped, UsageError, WorkFailed
from simsiam.model.average import WeightAverage
from simsiam.runs.run_folder import Run
from simsiam.runs.weights import open_weights
from simsiam.sources.own_marks import is_named
from simsiam.training.prepare import build_training_setup
from simsiam.training.pretrain import Pretraining

TIMES = {"images_per_second", "data_wait"}


def lines(run) -> list[dict]:
    """metrics.jsonl without the numbers that differ between any two runs."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in Run(run).metrics()]


def assert_same_run(a, b):
    assert lines(a) == lines(b)
    one, other = Run(a).checkpoint(), Run(b).checkpoint()
    assert one["step"] == other["step"] and one["knn"] == other["knn"]
    assert all(torch.equal(one["model"][k], other["model"][k]) for k in one["model"])
    for i, of_one in one["optimizer"]["state"].items():
        assert torch.equal(
            of_one["momentum_buffer"], other["optimizer"]["state"][i]["momentum_buffer"]
        )
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]


def spawn(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "simsiam", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run on shapes, shared by the tests that only read it."""
    return simsiam.pretrain("shapes", out=tmp_path_factory.mktemp("finished") / "run", **TINY)


def test_the_run_folder_keeps_its_contract(finished, shared):
    checked = subprocess.run(
        [sys.executable, shared / "check_run.py", finished], capture_output=True, text=True
    )
    assert checked.stdout.strip() == "contract holds", checked.stdout
    assert any((finished / "tensorboard").iterdir())
    about = json.loads((finished / "environment.json").read_text())
    assert {
        "versions",
        "commit",
        "device",
        "processes",
        "threads",
        "seed",
        "start",
        "end",
    } <= about.keys()
    assert about["end"] is not None


def test_a_commit_is_dirty_where_the_package_differs_and_only_there(tmp_path, monkeypatch):
    module = importlib.import_module("simsiam.runs.environment")
    code = tmp_path / "src" / "simsiam" / "runs" / "environment.py"
    code.parent.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(code))
    assert module.git_commit() is None

    def git(*words: str) -> str:
        how = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(how, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "page.md").touch()
    code.touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert module.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "page.md").write_text("written beside the code")
    assert module.git_commit() == git("rev-parse", "HEAD")
    code.write_text("a = 1")
    assert module.git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_the_backbone_is_the_last_checkpoints(finished):
    encoder = simsiam.load(finished)
    model = simsiam.build(Run(finished).recipe.method, backbone="resnet10", width=4, image_size=32)
    model.load_state_dict(Run(finished).checkpoint()["model"])
    x = encoder.transform([Image.new("RGB", (32, 32), color) for color in ("red", "gray")])
    assert x.shape == (2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(x), model.backbone.eval()(x))
    assert encoder(x).shape == (2, encoder.dim)


def test_the_recipe_repeats_the_run(finished, tmp_path):
    again = simsiam.pretrain(recipe=str(finished / "recipe.yaml"), out=tmp_path / "again")
    assert_same_run(finished, again)


def test_training_lowers_the_loss_and_logs_both_learning_rates(finished):
    found = lines(finished)
    assert [line["step"] for line in found] == list(range(1, 33))
    assert found[-1]["loss"] < found[0]["loss"] - 0.05
    assert found[0]["lr"] == 1.0 * 32 / 256
    assert (
        found[-1]["lr"] < 0.01
        and found[-1]["lr_predictor"] == found[0]["lr_predictor"] == 2 * 1.0 * 32 / 256
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_killed_at_any_step_a_run_goes_on_bit_for_bit(precision, tmp_path):
    words = TINY | {"precision": precision, "knn_every": 2, "epochs": 3, "save_seconds": 0.05}
    whole = simsiam.pretrain("shapes", out=tmp_path / "whole", **words)
    killed = tmp_path / "killed"
    process = spawn("pretrain", "shapes", "--out", str(killed), *flags(**words))
    last = killed / "checkpoints" / "last.pt"  # on a slow disk it comes after several steps
    while not last.exists() or len(Run(killed).metrics()) < 19:  # in the middle of epoch 2
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert 0 < Run(killed).checkpoint()["step"] < 48
    with open(killed / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 19, "lo\xff')  # a line that a crash tore
    simsiam.resume(killed)
    assert_same_run(whole, killed)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_in_good_order(signum, tmp_path, finished):
    run = tmp_path / "run"
    process = spawn("pretrain", "shapes", "--out", str(run), *flags(**TINY))
    while len(Run(run).metrics() if (run / "recipe.yaml").exists() else []) < 5:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signum)
    _, said = process.communicate()
    assert (
        process.returncode == 128 + signum and "simsiam resume" in said and "Traceback" not in said
    )
    step = Run(run).checkpoint()["step"]
    assert 5 <= step < 32 and Run(run).metrics()[-1]["step"] == step
    assert (run / "summary.json").exists() and (run / "backbone.safetensors").exists()
    simsiam.resume(run)
    assert_same_run(finished, run)


def test_a_resume_elsewhere_says_what_changes_the_bits(finished, tmp_path, monkeypatch, capfd):
    copy = shutil.copytree(finished, tmp_path / "copy")
    state = Run(copy).checkpoint()
    state["environment"]["threads"] = 99
    Run(copy).save("last", state)
    simsiam.resume(copy)
    assert "threads is" in capfd.readouterr().err


def test_extending_a_run_says_what_happens_to_the_schedule(finished, tmp_path, capfd):
    copy = shutil.copytree(finished, tmp_path / "copy")
    simsiam.resume(copy, epochs=3)
    assert "epochs   2 -> 3: the schedule is stretched" in capfd.readouterr().err
    assert Run(copy).recipe.epochs == 3 and lines(copy)[-1]["step"] == 48
    with pytest.raises(UsageError, match="only be extended"):
        simsiam.resume(copy, epochs=2)


def test_an_existing_run_is_never_written_over(finished, tmp_path):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match="not written over"):
        simsiam.pretrain("shapes", out=finished, **TINY)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_recipe_is_refused(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace("base_lr: 1.0", "base_lr: 0.5"))
    with pytest.raises(UsageError, match="another recipe"):
        simsiam.resume(copy)
    (copy / "recipe.yaml").write_text(text)
    last = copy / "checkpoints" / "last.pt"
    last.with_name("previous.pt").unlink()
    for damaged in (last.read_bytes()[:5000], b"", b"hello", b"\x80\x04\x95", bytes(100)):
        last.write_bytes(damaged)
        with pytest.raises(UsageError, match="is damaged") as error:
            simsiam.resume(copy)
        assert "\n" not in str(error.value)
    last.unlink()
    with pytest.raises(UsageError, match=r"no checkpoints/last.pt to continue from"):
        simsiam.resume(copy)
    assert lines(copy) == lines(finished)


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    simsiam.resume(copy)
    assert_same_run(finished, copy)
    for name in ("summary.json", "recipe.yaml"):
        assert (copy / name).read_text() == (finished / name).read_text()


def test_an_extension_that_fails_leaves_the_run_as_it_was(photographs, tmp_path):
    source = shutil.copytree(photographs, tmp_path / "source")
    run = simsiam.pretrain(
        str(source), out=tmp_path / "run", **TINY | {"batch_size": 16, "workers": 0}
    )
    shutil.rmtree(source)
    with pytest.raises(UsageError, match="no such file or folder"):
        simsiam.resume(run, epochs=5)
    assert Run(run).recipe.epochs == 2


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(photographs, tmp_path):
    """Other images than the run's are no images that the user has named for it."""
    settings = TINY | {"batch_size": 16, "workers": 0, "epochs": 1}
    run = simsiam.pretrain(str(photographs), out=tmp_path / "run", **settings)
    other = shutil.copytree(photographs, tmp_path / "other")
    next(path for path in sorted(other.rglob("*")) if path.is_file()).unlink()
    before = (run / "recipe.yaml").read_bytes()
    with pytest.raises(UsageError, match="images have changed"):
        simsiam.resume(run, epochs=5, source=str(other))
    assert (run / "recipe.yaml").read_bytes() == before
    assert not is_named(run, "source", [str(other)])


def test_a_warm_up_of_all_steps_is_said(tmp_path, capfd):
    words = QUICK | {"method": "byol", "equal_terms": True, "warmup_epochs": 1}
    simsiam.pretrain("shapes", out=tmp_path / "run", **words)
    assert "all steps are warm-up" in capfd.readouterr().err


def test_clusters_of_a_network_that_diverged_are_no_traceback(tmp_path):
    words = {"method": "deepcluster", "dim": 12, "base_lr": 1e30, "precision": "float32"}
    words |= {"limit": 64, "epochs": 3, "steps": None, "log_every": 50}
    with pytest.raises(WorkFailed, match="diverged"):
        simsiam.pretrain("shapes", out=tmp_path / "run", **QUICK | words)


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tmp_path):
    with pytest.raises(
        WorkFailed,
        match=r"diverged: loss and weights were finite at step \d+ and are no longer at step \d+",
    ):
        simsiam.pretrain(
            "shapes", out=tmp_path / "run", **TINY | {"base_lr": 1e30, "precision": "float32"}
        )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["verdict"] == "diverged"
    assert all(v.isfinite().all() for v in Run(tmp_path / "run").checkpoint()["model"].values())


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Sixty photographs of several sizes, two of them broken, in two folders of classes."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(60):
        path = root / ("cat" if i % 2 else "dog") / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)).save(path)
    (root / "cat" / "truncated.jpg").write_bytes(path.read_bytes()[:500])
    (root / "dog" / "empty.png").write_bytes(b"")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_with_broken_files_trains_and_lists_them(photographs, workers, tmp_path, shared):
    run = simsiam.pretrain(
        str(photographs), out=tmp_path / "run", **TINY | {"batch_size": 16, "workers": workers}
    )
    listed = (run / "quarantine.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == ["cat/truncated.jpg", "dog/empty.png"]
    assert json.loads((run / "summary.json").read_text())["unreadable"] == 2
    checked = subprocess.run(
        [sys.executable, shared / "check_run.py", run], capture_output=True, text=True
    )
    assert checked.stdout.strip() == "contract holds", checked.stdout


def test_a_streamed_run_is_the_same_with_any_number_of_workers_and_after_a_resume(
    photographs, tmp_path
):
    words = TINY | {"batch_size": 16, "epochs": 3}
    one, two = (
        simsiam.pretrain(str(photographs), out=tmp_path / str(n), workers=n, **words)
        for n in (0, 2)
    )
    assert lines(one) == lines(two)
    half = simsiam.pretrain(
        str(photographs), out=tmp_path / "half", workers=1, **words | {"steps": 4}
    )
    yaml = (half / "recipe.yaml").read_text()
    assert "steps: 4" in yaml
    assert (
        lines(one)[0]["loss"] == lines(half)[0]["loss"]
    )  # the same first batch, before the schedules part


def test_without_labels_there_is_no_knn_and_the_run_is_fine(photographs, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photographs.rglob("*.jpg"):
        shutil.copy(path, flat)
    run = simsiam.pretrain(
        str(flat), out=tmp_path / "run", **TINY | {"batch_size": 16, "workers": 0}
    )
    assert "knn_top1" not in json.loads((run / "summary.json").read_text())
    assert not (run / "checkpoints" / "best.pt").exists()


def five_channels(root):
    """Forty 20-px images of five channels, of two sizes: too odd for Pillow, and not one array."""
    rng = np.random.default_rng(0)
    for i in range(40):
        np.save(root / f"{i:02}.npy", rng.integers(0, 256, (20, 20 + i % 2, 5), dtype=np.uint8))
    return root, {"channels": 5}


def zipped(root):
    """Forty PNGs of one size in two folders of a .zip: read in place, then held in memory."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(root / "pictures.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(40):
            file = BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
            archive.writestr(f"pictures/{'ab'[i % 2]}/{i:02}.png", file.getvalue())
    return root / "pictures.zip", {}


@pytest.mark.parametrize("make", [five_channels, zipped])
def test_other_shapes_of_data_train_and_resume_exactly(make, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    source, words = make(tmp_path / "data")
    words |= TINY | {"batch_size": 8, "epochs": 5, "workers": 0, "holdout": 0}
    whole = simsiam.pretrain(source, out=tmp_path / "whole", **words)
    assert Run(whole).metrics()[-1]["step"] == 25

    module, calls = importlib.import_module("simsiam.training.pretrain"), []
    real = module.compute_gauges

    def stopping(output):
        calls.append(output.loss)
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(output)

    monkeypatch.setattr(module, "compute_gauges", stopping)
    with pytest.raises(Stopped, match="stopped at step 14 of 25"):
        simsiam.pretrain(source, out=tmp_path / "half", **words)
    assert_same_run(simsiam.resume(tmp_path / "half"), whole)
    encoder = simsiam.load(whole)
    image = np.zeros((30, 30, words.get("channels", 3)), np.uint8)
    assert encoder(encoder.transform(image)).shape == (1, encoder.dim)


def test_more_broken_files_than_allowed_stop_the_run(photographs, tmp_path):
    """Two of sixty-one are broken: 3 % of them."""
    words = TINY | {"batch_size": 16, "workers": 0}
    with pytest.raises(
        WorkFailed,
        match=r"[12] of \d\d images cannot be read, more than --max-unreadable 0.02 allows",
    ):
        simsiam.pretrain(str(photographs), out=tmp_path / "run", **words, max_unreadable=0.02)
    assert (tmp_path / "run" / "quarantine.txt").read_text()
    simsiam.pretrain(
        str(photographs), out=tmp_path / "fine", **words | {"epochs": 1}, max_unreadable=0.1
    )


def test_stopped_is_raised_to_python(tmp_path, monkeypatch):
    module = importlib.import_module("simsiam.training.pretrain")
    real = module.compute_gauges
    signals = [signal.SIGTERM]  # one: the second would be obeyed at once
    monkeypatch.setattr(
        module,
        "compute_gauges",
        lambda out: (signals and os.kill(os.getpid(), signals.pop()), real(out))[1],
    )
    with pytest.raises(
        Stopped, match="stopped at step 2 of 32"
    ):  # the step after the signal is the last
        simsiam.pretrain("shapes", out=tmp_path / "run", **TINY)


def test_a_signal_in_the_last_step_ends_what_would_follow_the_finished_run(tmp_path, monkeypatch):
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell's background job does not have
    module = importlib.import_module("simsiam.training.pretrain")
    real = module.knn_monitor
    monkeypatch.setattr(
        module,
        "knn_monitor",
        lambda *a, **k: (os.kill(os.getpid(), signal.SIGINT), real(*a, **k))[1],
    )
    with pytest.raises(KeyboardInterrupt):
        simsiam.pretrain("shapes", out=tmp_path / "run", **TINY | {"steps": 3})
    assert Run(tmp_path / "run").json("summary.json")["steps"] == 3


def test_init_starts_from_another_runs_backbone(finished, tmp_path):
    run = simsiam.pretrain(
        "shapes", out=tmp_path / "run", init=str(finished), **TINY | {"steps": 1, "base_lr": 1e-12}
    )
    ours, theirs = (simsiam.load(r).conv1.weight for r in (run, finished))
    assert Run(run).recipe.init == str(finished.resolve())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    with pytest.raises(UsageError, match="does not fit"):
        simsiam.pretrain(
            "shapes", out=tmp_path / "other", init=str(finished), **TINY | {"width": 8}
        )


def test_averaged_weights_are_handed_over_and_resumed_bit_for_bit(tmp_path, monkeypatch):
    """Training itself is not changed; evaluation, embedding and exports read these weights."""
    words = QUICK | {"steps": 6, "knn_every": 1, "save_seconds": 0, "precision": "float32"}
    plain = simsiam.pretrain("shapes", out=tmp_path / "plain", **words)
    words["average_weights"] = 0.5
    whole = simsiam.pretrain("shapes", out=tmp_path / "whole", **words)
    seen, update = [], WeightAverage.update

    def stop(self, model, step):
        if step == 4 and not any(weight is None for weight in seen):
            seen.append(None)
            raise WorkFailed("power cut")
        update(self, model, step)
        seen.append(model.backbone.conv1.weight.detach().clone())

    monkeypatch.setattr(WeightAverage, "update", stop)
    with pytest.raises(WorkFailed):
        simsiam.pretrain("shapes", out=tmp_path / "cut", **words)
    simsiam.resume(tmp_path / "cut")
    assert_same_run(whole, tmp_path / "cut")
    state, without = Run(whole).checkpoint(), Run(plain).checkpoint()
    assert without.keys() | {"trained"} == state.keys()
    for name, tensor in state["trained"].items():
        assert torch.equal(tensor, without["model"][name])
    seen = [weight for weight in seen if weight is not None]
    by_hand = seen[0]
    for step, weight in enumerate(seen[1:], 1):
        by_hand = torch.lerp(by_hand, weight, 1 - min(0.5, step / (step + 1)))
    torch.testing.assert_close(state["model"]["backbone.conv1.weight"], by_hand)
    assert torch.equal(simsiam.load(whole).conv1.weight, state["model"]["backbone.conv1.weight"])
    assert not torch.equal(simsiam.load(whole).conv1.weight, simsiam.load(plain).conv1.weight)
    ranks = [[line.get("h_rankme") for line in Run(run).metrics()] for run in (whole, plain)]
    assert any(ranks[0]) and ranks[0] != ranks[1]


def test_a_run_beside_patches_begins_with_their_cosines_and_changes_only_the_network(
    tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(40):
        pixels = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels.resize((28, 28)).save(tmp_path / "photos" / f"{i}.png")
    photos = str(tmp_path / "photos")
    words = {k: v for k, v in QUICK.items() if k != "limit"}
    words |= {"init": "patches", "batch_size": 16, "steps": 4, "save_seconds": 0}
    words |= {"precision": "float32", "image_size": 32}
    whole = simsiam.pretrain(photos, out=tmp_path / "whole", **words)
    recipe = Run(whole).recipe
    assert recipe.backbone == f"patches/24+{QUICK['backbone']}" and recipe.init == "patches"

    encoder = simsiam.load(open_weights("patches", source=photos))
    x = torch.rand(8, 3, 24, 24)
    start = build_training_setup(recipe.replace(image_size=24)).model.backbone.eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    h = start((x - mean) / std)
    torch.testing.assert_close(cosines(h), cosines(encoder(x)), rtol=1e-3, atol=1e-3)
    before, after = start.state_dict(), simsiam.load(whole).state_dict()
    changed = {name.partition(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"network", "gate"}
    assert not torch.equal(before["network.conv1.weight"], after["network.conv1.weight"])

    true = Pretraining.train_step

    def stop(self, *arguments):
        if self.step == 2:
            raise WorkFailed("power cut")
        return true(self, *arguments)

    monkeypatch.setattr(Pretraining, "train_step", stop)
    with pytest.raises(WorkFailed):
        simsiam.pretrain(photos, out=tmp_path / "cut", **words)
    monkeypatch.undo()
    simsiam.resume(tmp_path / "cut")
    assert_same_run(whole, tmp_path / "cut")


def cosines(h):
    h = torch.nn.functional.normalize(h, dim=1)
    return h @ h.T
