"""N processes compute what one does, whatever their shares; a killed process costs nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUICK, TINY, flags
from equality import CASES, LIMIT, compared
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.config.recipes import Recipe
from simsiam.data import batches as module
from simsiam.data.batches import iter_batches
from simsiam.data.images import from_arrays
from simsiam.distributed.process_group import local_slice
from simsiam.distributed.sync_batch_norm import convert_sync_batchnorm
from simsiam.errors import UsageError
from simsiam.model.targets import TARGETS
from simsiam.runs.compose import compose_recipe
from simsiam.runs.run_folder import Run, choose_run_path
from simsiam.training.prepare import build_training_setup

PROTOCOLS = ("knn", "label_free")
TIMES = {"images_per_second", "data_wait"}


@pytest.fixture(scope="module")
def distances():
    """Return the distances of two processes with 7 and 5 images, computed once for all methods."""
    return compared((7, 5), list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_several_processes_compute_what_one_does(name, distances):
    assert all(distance <= LIMIT for distance in distances[name].values()), distances[name]


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_the_shares_of_a_batch_are_the_batch(kind, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 20, 20), dtype=np.uint8)
    images = from_arrays("train", pixels)
    if kind == "streamed":
        monkeypatch.setattr(module, "_resident_batches", module._streamed_batches)
    recipe = Recipe().replace(
        image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=11, workers=0
    )

    def first_batch(rows: slice):
        monkeypatch.setattr(module, "local_slice", lambda n: rows)
        return next(iter_batches(images, recipe, 3, 4, torch.device("cpu")))

    whole = first_batch(slice(0, 11))
    parts = [first_batch(slice(*ends)) for ends in ((0, 4), (4, 8), (8, 11))]
    assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
    for view in range(2):
        assert torch.equal(torch.cat([part.views[view] for part in parts]), whole.views[view])


def test_alone_a_share_is_everything():
    assert local_slice(7) == slice(0, 7)


def test_timms_batch_norms_keep_their_activation():
    """timm's BatchNormAct2d is a normalization and an activation in one module."""
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), BatchNormAct2d(4), torch.nn.BatchNorm2d(4)
    )
    names, x = list(plain.state_dict()), torch.randn(5, 3, 6, 6)
    expected = plain(x)
    convert_sync_batchnorm(plain, torch.device("cpu"))
    assert torch.equal(plain(x), expected) and list(plain.state_dict()) == names
    assert all("SyncBatchNorm" in str(layer) for layer in plain[1:])


def test_under_torchrun_a_run_of_the_same_recipe_is_gone_on_with(tmp_path, monkeypatch):
    recipe = Recipe().replace(image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3).resolve()
    path = Run.create(tmp_path / "run", recipe).path
    with pytest.raises(UsageError, match="not written over"):
        choose_run_path(path, "", recipe)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert choose_run_path(path, "", recipe) == path
    with pytest.raises(UsageError, match="another recipe"):
        choose_run_path(path, "", recipe.replace(seed=1))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UsageError, match="give --out"):
        choose_run_path(None, "new", recipe)


def test_one_process_decides_the_precision_of_all(monkeypatch):
    monkeypatch.setattr("simsiam.training.prepare.broadcast", {"float32": "bfloat16"}.__getitem__)
    recipe, _, _ = compose_recipe("shapes", None, QUICK | {"precision": "float32"})
    assert build_training_setup(recipe).compute.precision == "bfloat16"


def test_other_verbs_are_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["compare", "a", "b"]) == 2
    assert capsys.readouterr().err.startswith("simsiam, process 1: compare runs in one process")


# --- whole programs -------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SETTINGS = TINY | {"precision": "bfloat16", "save_seconds": 0.05, "knn_every": 2}


def torchrun(*arguments: str) -> subprocess.Popen:
    options = {
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    return subprocess.Popen([*TORCHRUN, *arguments], text=True, **options)


def pretraining(run: Path, *, restarts: int = 0) -> subprocess.Popen:
    return torchrun(
        f"--max-restarts={restarts}",
        "-m",
        "simsiam",
        "pretrain",
        "shapes",
        "--out",
        str(run),
        *flags(**SETTINGS),
    )


def ended(process: subprocess.Popen) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def hit(process: subprocess.Popen, run: Path, signum: int) -> None:
    """Send a signal to the second process of a run, a few steps into it."""
    while len(Run(run).metrics() if (run / "recipe.yaml").exists() else []) < 9:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    agent = process.pid
    os.kill(int(Path(f"/proc/{agent}/task/{agent}/children").read_text().split()[1]), signum)


def lines(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in Run(run).metrics()]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """An undisturbed run of two processes."""
    run = tmp_path_factory.mktemp("calm") / "run"
    ended(pretraining(run))
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    return run


def test_a_killed_process_costs_no_step(calm, tmp_path):
    """torchrun restarts all processes, and the result is the undisturbed run's, bit for bit."""
    process = pretraining(tmp_path / "run", restarts=1)
    hit(process, tmp_path / "run", signal.SIGKILL)
    assert "from     step " in ended(process)
    assert [line["step"] for line in lines(calm)] == list(range(1, 33))
    assert lines(tmp_path / "run") == lines(calm)
    one, other = (Run(run).checkpoint()["model"] for run in (tmp_path / "run", calm))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_told_to_stop_one_stops_all_and_another_number_goes_on(calm, tmp_path, capfd):
    process = pretraining(tmp_path / "run")
    hit(process, tmp_path / "run", signal.SIGTERM)
    output, _ = process.communicate()
    assert output.count("stopped at step") == 2 and process.returncode != 0
    step = Run(tmp_path / "run").checkpoint()["step"]
    assert 9 <= step < 32 and lines(tmp_path / "run") == lines(calm)[:step]
    simsiam.resume(tmp_path / "run")
    assert "processes is 1 now and was 2" in capfd.readouterr().err
    mine, theirs = ([line["loss"] for line in lines(run)] for run in (tmp_path / "run", calm))
    assert len(mine) == 32 and mine[step] == pytest.approx(
        theirs[step], abs=0.02
    )  # of the same images and views


def test_evaluated_and_embedded_by_two(calm, tmp_path):
    """Each process takes its share of the images; the files are those of one process."""
    names = "import sys, simsiam; _, run, out = sys.argv"
    code = f"{names}; simsiam.evaluate(run, protocols={PROTOCOLS}); simsiam.embed(run, out=out)"
    (tmp_path / "both.py").write_text(code)
    two, one = (shutil.copytree(calm, tmp_path / name) for name in ("two", "one"))
    ended(torchrun(str(tmp_path / "both.py"), str(two), str(tmp_path / "two.parquet")))
    simsiam.evaluate(one, protocols=PROTOCOLS)
    simsiam.embed(one, out=tmp_path / "one.parquet")
    for mine, theirs in zip(Run(two).evaluations(), Run(one).evaluations(), strict=True):
        assert (
            mine["n"] == theirs["n"]
            if "top1" in mine
            else mine["rankme"] == pytest.approx(theirs["rankme"], rel=1e-3)
        )
        assert mine.get("top1", 0) == pytest.approx(theirs.get("top1", 0), abs=0.3)
    tables = [pq.read_table(tmp_path / name) for name in ("two.parquet", "one.parquet")]
    assert tables[0]["path"] == tables[1]["path"] and tables[0]["label"] == tables[1]["label"]
    vectors = [np.stack(table["vector"].to_pylist()) for table in tables]
    np.testing.assert_allclose(*vectors, atol=1e-5)


def test_two_processes_fine_tune_and_one_draws_the_curve(calm, tmp_path):
    code = "import sys, simsiam; simsiam.evaluate(sys.argv[1], protocols=['finetune'], limit=64, "
    (tmp_path / "both.py").write_text(code + "finetune_epochs=2)")
    run = shutil.copytree(calm, tmp_path / "run")
    ended(torchrun(str(tmp_path / "both.py"), str(run)))
    (record,) = Run(run).evaluations()
    assert len(record["val_top1"][0]) == 2
    (curve,) = run.rglob("curve*.png")
    assert Image.open(curve).size == (1400, 900)


def test_several_processes_start_from_a_file_of_weights(calm, tmp_path, monkeypatch):
    """The first process makes its run folder in the cache; the others wait for it."""
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    weights = str(calm / "backbone.safetensors")
    network = {name: value for name, value in SETTINGS.items() if name in ("backbone", "width")}
    settings = {k: v for k, v in SETTINGS.items() if k not in network} | {"steps": 1}
    arguments = ["shapes", "--init", weights, "--out", str(tmp_path / "run"), *flags(**settings)]
    process = torchrun("-m", "simsiam", "pretrain", *arguments)
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert Run(tmp_path / "run").json("summary.json")["steps"] == 1


def test_two_processes_train_towards_every_target(tmp_path):
    """From the command to the end and once more, with rows of eta that the processes share."""
    (tmp_path / "each.py").write_text(
        "import sys, simsiam\n"
        "from simsiam.model.targets import TARGETS\n"
        "rows = {\n"
        "    'labels': {'method': 'supervised', 'dim': 12},\n"
        "    'kmeans': {'method': 'deepcluster', 'dim': 12},\n"
        "    'teacher': {'method': 'distillation', 'dim': 32},\n"
        "}\n"
        "rows['teacher']['teacher'] = f'{sys.argv[1]}/shared'\n"
        "for name in TARGETS:\n"
        f"    settings = {QUICK | {'save_seconds': 0}!r} | rows.get(name, {{'target': name}})\n"
        "    run = simsiam.pretrain('shapes', out=f'{sys.argv[1]}/{name}', **settings)\n"
        "    simsiam.resume(run)\n"
    )
    ended(torchrun(str(tmp_path / "each.py"), str(tmp_path)))
    for name in TARGETS:
        assert Run(tmp_path / name).json("summary.json")["steps"] == QUICK["steps"]
    eta = Run(tmp_path / "moving_average").checkpoint()["model"]["target.eta"]
    assert torch.allclose(eta.norm(dim=1), torch.ones(QUICK["limit"]), atol=1e-5)


def test_a_run_of_two_processes_that_diverges_says_so(tmp_path):
    """The good weights come back, also where the processes share the rows of eta."""
    settings = QUICK | {"target": "moving_average", "base_lr": 1e30, "save_seconds": 0}
    arguments = ["shapes", "--out", str(tmp_path / "run"), *flags(**settings)]
    output, _ = torchrun("-m", "simsiam", "pretrain", *arguments).communicate()
    assert output.count("diverged: loss and weights") == 2, output
    assert Run(tmp_path / "run").json("summary.json")["verdict"] == "diverged"


@pytest.mark.skipif(
    not Path("/proc/self/cwd").exists(), reason="needs a path that each process has"
)
def test_every_process_compares_its_images(tmp_path):
    """Each process is a machine of its own here: its home, and its copy of the images."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3)).astype(np.uint8)
    for rank in "01":
        (tmp_path / rank / "photos").mkdir(parents=True)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / rank / "photos" / f"{i:02}.bmp")
    settings = QUICK | {"limit": None, "save_seconds": 0}
    (tmp_path / "both.py").write_text(
        "import os, sys, simsiam\n"
        "from pathlib import Path\n"
        "rank = os.environ['RANK']\n"
        "os.chdir(Path(sys.argv[1], rank))\n"
        "os.environ['SIMSIAM_STATE'] = f'{os.getcwd()}/state'\n"
        f"run = simsiam.pretrain('/proc/self/cwd/photos', out='{tmp_path}/run', **{settings!r})\n"
        "simsiam.resume(run)\n"
        "if rank == '1':\n"
        "    Path('photos/03.bmp').write_bytes(Path('photos/04.bmp').read_bytes())\n"
        "try:\n"
        "    simsiam.resume(run)\n"
        "except simsiam.errors.UsageError as error:\n"
        "    print(f'process {rank}: {error}')\n"
    )
    output = ended(torchrun(str(tmp_path / "both.py"), str(tmp_path)))
    for rank in "01":
        line = f"process {rank}: the processes do not see the same images"
        assert f"{line}; on another process: other content" in output
    assert [path.name for path in (tmp_path / "0" / "state").glob("*.txt")] == ["run_key.txt"]
    assert not (tmp_path / "1" / "state").exists()  # the first process decides
