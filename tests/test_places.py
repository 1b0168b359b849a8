"""The place of a run: other runs beside it, images that moved, little shared memory, odd images."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, flags
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import simsiam
from simsiam.commands.main import main
from simsiam.data import batches, transform
from simsiam.data.transform import Transform
from simsiam.errors import UsageError, WorkFailed
from simsiam.pages.compare import compare
from simsiam.runs.run_folder import Run, reserved_run_path

SMALL = QUICK | {"image_size": 32, "device": "cpu", "workers": 0}
del SMALL["limit"]


def photos(folder, count=32, size=(40, 36)):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / f"{i:03}.png")
    return folder


# --- names of runs --------------------------------------------------------------------------------


def test_runs_that_start_together_get_different_folders():
    with ThreadPoolExecutor(8) as pool:
        contexts = [reserved_run_path(None, "photos", None) for _ in range(8)]
        paths = list(pool.map(lambda context: context.__enter__(), contexts))
    assert sorted(map(str, paths)) == sorted(f"runs/photos-{i}" for i in range(1, 9))
    (paths[0] / "recipe.yaml").touch()
    for context in contexts:
        context.__exit__(None, None, None)
    assert [path.exists() for path in paths] == [True] + 7 * [False]  # the others are empty


def test_a_wrong_request_leaves_no_folder(tmp_path, capsys):
    photos(tmp_path / "photos", 8)
    assert main(["pretrain", str(tmp_path / "photos"), *flags(**SMALL)]) == 2
    assert "take a smaller --batch-size" in capsys.readouterr().err
    assert not Path("runs").exists()


# --- moved images ---------------------------------------------------------------------------------


def test_a_run_goes_on_when_its_images_have_moved(tmp_path, capsys):
    """Bit for bit: the place of the images is no part of the science."""
    here, there = photos(tmp_path / "here"), tmp_path / "there"

    run = simsiam.pretrain(here, out=tmp_path / "run", **SMALL | {"steps": None, "epochs": 1})
    here.rename(there)
    assert main(["resume", str(run)]) == 2
    line = capsys.readouterr().err
    assert "no such file or folder" in line and "`simsiam resume RUN --source PLACE`" in line
    assert main(["embed", str(run), "--out", "a.parquet"]) == 2
    assert "if they have moved" in capsys.readouterr().err
    simsiam.resume(run, source=there)
    assert tuple(Run(run).recipe.source) == (str(there),)
    assert main(["embed", str(run), "--out", "a.parquet"]) == 0


def test_a_stopped_run_is_the_same_at_the_new_place(tmp_path):
    here, there = photos(tmp_path / "here"), photos(tmp_path / "there")
    settings = SMALL | {"steps": None, "epochs": 1}
    first = simsiam.pretrain(here, out=tmp_path / "first", **settings)
    second = Path(shutil.copytree(first, tmp_path / "second"))
    for run, place in ((first, None), (second, there)):
        simsiam.resume(run, epochs=2, source=place)
    a, b = (torch.load(run / "checkpoints" / "last.pt")["model"] for run in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- shared memory --------------------------------------------------------------------------------


def test_too_little_shared_memory_is_said_before_workers_hang(tmp_path, monkeypatch):
    source = photos(tmp_path / "photos")
    settings = SMALL | {"workers": 2, "cache_gib": 0}
    views = 2 * 16 * 3 * 32 * 32  # bytes of the views of a batch
    free = 2 * 3 * views - 1
    monkeypatch.setattr(batches, "free_shared_memory", lambda: free)
    with pytest.raises(WorkFailed, match=r"2 data workers need 0\.6 MiB of.*shm-size"):
        simsiam.pretrain(source, out=tmp_path / "run", **settings)
    free += 1
    simsiam.pretrain(source, out=tmp_path / "other", **settings)
    free = 0
    simsiam.pretrain(source, out=tmp_path / "alone", **SMALL)  # without workers


# --- thin images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 6000), (6000, 1), (3, 2000), (64, 1025)])
def test_of_a_thin_image_only_the_center_is_resized(shape, monkeypatch):
    sizes, original = [], TF.resize

    def resize(pixels, *arguments, **words):
        sizes.append(pixels.shape[-2:].numel())
        return original(pixels, *arguments, **words)

    monkeypatch.setattr(transform.TF, "resize", resize)
    image = torch.randint(0, 256, (1, 3, *shape), dtype=torch.uint8)
    crop = Transform(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert crop.crop(image).shape == (1, 3, 32, 32)
    assert sizes == [16 * min(shape) ** 2]


def test_the_center_of_a_thin_image_is_that_of_the_whole(monkeypatch):
    x = torch.linspace(0, 12, 640).sin()[None, :] * torch.linspace(-1, 1, 20)[:, None]
    image = (127 + 100 * x).byte().expand(1, 3, -1, -1)
    crop = Transform(size=64, mean=(0.5,) * 3, std=(0.5,) * 3, shorter_side=80)
    center = crop.crop(image)
    monkeypatch.setattr(transform, "MAX_ASPECT", 1000)
    assert (center.int() - crop.crop(image).int()).abs().max() <= 1


# --- few images, no labels ------------------------------------------------------------------------


def test_evaluate_measures_what_the_labels_allow(tmp_path, capsys):
    source = tmp_path / "classes"
    source.mkdir()
    for name, count in (("a rare", 1), ("many", 20), ("some", 12)):
        photos(source / name, count)
    run = simsiam.pretrain(source, out=tmp_path / "run", **SMALL)
    capsys.readouterr()
    records = simsiam.evaluate(run, baselines=False)
    assert {record["protocol"] for record in records} == {"knn", "linear", "label_free"}
    assert "few_label is left out: class 'a rare' has no training image" in capsys.readouterr().out
    with pytest.raises(UsageError, match="class 'a rare' has no training image"):
        simsiam.evaluate(run, protocols=["few_label"])
    (record,) = simsiam.evaluate(run, photos(tmp_path / "unlabeled"))
    assert record["protocol"] == "label_free"
    assert "unlabeled has no labels: only label_free" in capsys.readouterr().out
    with pytest.raises(UsageError, match="has one class, 'many', so there is no accuracy"):
        simsiam.evaluate(run, only_class(source, tmp_path))


def only_class(source, folder):
    (folder / "one").mkdir()
    return Path(shutil.copytree(source / "many", folder / "one" / "many")).parent


def test_compare_shows_what_unlabeled_runs_have(tmp_path):
    source = photos(tmp_path / "photos")
    runs = [simsiam.pretrain(source, out=tmp_path / f"{i}", seed=i, **SMALL) for i in range(2)]
    for run in runs:
        simsiam.evaluate(run, protocols=["label_free"])
    results = compare(runs)["results"]
    assert all(any(value is not None for value in row) for row in results.values())
    rows = [name for name in results if name.startswith("label_free")]
    assert {name.rpartition(": ")[2] for name in rows} == {
        "rankme", "spectrum_auc", "alignment", "uniformity", "view_retrieval"
    }  # fmt: skip


# --- output ---------------------------------------------------------------------------------------


def test_a_reader_that_ends_is_no_error(tmp_path):
    command = f"{sys.executable} -m simsiam methods | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.strip() in ("141", "0") and done.stderr == ""


def test_the_recipe_line_has_the_size_that_a_flag_gives(tmp_path, capsys):
    source = photos(tmp_path / "photos", size=(300, 280))
    assert (
        main(["pretrain", str(source), "--out", "run", *flags(**SMALL | {"image_size": 48})]) == 0
    )
    error = capsys.readouterr().err
    assert "folder: resnet10, small stem, views of 48 px, crops from 20% of the area" in error
