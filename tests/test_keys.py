"""Keys in the URL of a source stay in its run: nothing that is shown or given away has them."""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUICK
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.errors import printable
from simsiam.runs.run_folder import Run

KEYS = ("hunter2", "s3cr3t")
URL = "memory://me:hunter2@host/photos?token=s3cr3t"


@pytest.fixture(scope="module")
def url():
    """Shards at a URL with a password and a token."""
    rows = []
    for i in range(64):
        file = io.BytesIO()
        Image.fromarray(np.full((12, 12, 3), 3 * i, np.uint8)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    file = io.BytesIO()
    pq.write_table(pa.table({"image": rows, "label": [i % 2 for i in range(64)]}), file)
    place = f"{MemoryFileSystem._strip_protocol(URL)}/train.parquet"
    MemoryFileSystem().pipe(place, file.getvalue())
    yield URL
    MemoryFileSystem.store.clear()


def with_keys(folder: Path) -> set[str]:
    """The files in a folder that hold a key."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix()
        for path in files
        if any(key.encode() in path.read_bytes() for key in KEYS)
    }


def test_only_the_recipe_and_the_checkpoints_have_the_keys(url, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["simsiam", "pretrain", url])
    run = simsiam.pretrain(url, **QUICK | {"workers": 0, "save_seconds": 0})
    assert main(["evaluate", str(run), "--protocol", "knn", "label_free"]) == 0
    assert main(["embed", str(run), "--out", "e.parquet"]) == 0
    assert main(["report", str(run)]) == main(["compare", str(run), str(run)]) == 0
    assert main(["inspect", url, "--out", "facts.json"]) == 0
    assert main(["shard", url, "--out", "shards"]) == 0
    assert main(["export", str(run), "--format", "huggingface", "--out", "hub"]) == 0
    checkpoints = {f"checkpoints/{path.name}" for path in (run / "checkpoints").glob("*.pt")}
    assert with_keys(run) == {"recipe.yaml", *checkpoints}
    assert with_keys(tmp_path) == {f"{run}/{name}" for name in with_keys(run)}
    printed = "".join(capfd.readouterr())
    assert not any(key in printed + str(run) for key in KEYS), printed
    assert (run / "environment.json").read_text().count("memory://host/photos") == 1
    assert "memory://host/photos" in (tmp_path / "hub" / "recipe.yaml").read_text()
    assert Run(run).recipe.source == (url,)
    assert main(["resume", str(run)]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect {}", "shard {} --out s", "pretrain {} --out new", "embed {run} {} --out e.parquet",
        "evaluate {run} {}", "resume {run} --source {}", "report {run} --source {}", "plan {}",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "place",
    [
        "ftp://me:hunter2@127.0.0.1:9/photos?token=s3cr3t",
        "memory://me:hunter2@host/none?token=s3cr3t#s3cr3t",
        "nothing://me:hunter2@host/a.tar?token=s3cr3t",
        "simplecache::memory://hunter2@host/x y?a=s3cr3t",
    ],
)
def test_no_error_shows_a_key(arguments, place, url, tmp_path, capfd, shapes_run):
    words = [word.replace("{run}", str(shapes_run)) for word in arguments.split()]
    code = main([place if word == "{}" else word for word in words])
    printed = "".join(capfd.readouterr())
    assert code in (0, 1, 2) and printed
    assert not any(key in printed for key in KEYS), printed


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory):
    return simsiam.pretrain("shapes", out=tmp_path_factory.mktemp("shapes") / "run", **QUICK)


@pytest.mark.parametrize(
    ("text", "shown"),
    {
        "cannot read s3://k:hunter2@b/x.tar: none": "cannot read s3://b/x.tar: none",
        "'https://b/x?sig=s3cr3t' is damaged: do this": "'https://b/x' is damaged: do this",
        "https://b/a b?k=s3cr3t and ftp://hunter2@c/d": "https://b/a b and ftp://c/d",
        "hf://datasets/a/b@main/x.parquet": "hf://datasets/a/b@main/x.parquet",
        "is it there? me@home #1": "is it there? me@home #1",
    }.items(),
)
def test_texts_for_people_have_no_keys(text, shown):
    assert printable(text) == shown
