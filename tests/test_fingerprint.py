"""Changed images are noticed when a job goes on, in every kind of source; moved ones are not."""

import os
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import QUICK
from source_changes import CHANGES, KINDS, change_source

import simsiam
from simsiam.commands.main import main
from simsiam.embeddings import embed as embedding
from simsiam.runs.run_folder import Run, read_checkpoint
from simsiam.sources import write_shards
from simsiam.sources.open_source import open_source

COUNT = 48
SETTINGS = QUICK | {"limit": None, "steps": 2, "save_seconds": 0}


def fingerprint_of(path: Path) -> dict[str, str]:
    from simsiam.sources.fingerprint import fingerprint_source

    return fingerprint_source(open_source(str(path)), [str(path)])


def changes(before: dict[str, str], now: dict[str, str]) -> str:
    from simsiam.sources.fingerprint import describe_changes

    return describe_changes(before, now)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_seen_and_a_move_is_none(kind, change, tmp_path):
    path, happen, harmless = change_source(kind, change, tmp_path, random.Random(0), COUNT)
    before = fingerprint_of(path)
    now = fingerprint_of(happen())
    assert bool(changes(before, now)) == (not harmless), changes(before, now)
    if change == "touched":
        assert before["times"] != now["times"]


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "removed": "train 47 images in place of train 48",
        "renamed": "other names, or another order",
        "relabeled": "other labels",
        "all redrawn": "other content",
    }.items(),
)
def test_what_has_changed_is_said(change, words, tmp_path):
    path, happen, _ = change_source("list", change, tmp_path, random.Random(0), COUNT)
    before = fingerprint_of(path)
    assert changes(before, fingerprint_of(happen())) == words


def test_of_many_images_a_sample_is_read_and_new_times_are_said(tmp_path, monkeypatch):
    from simsiam.sources import fingerprint

    monkeypatch.setattr(fingerprint, "SAMPLE_IMAGES", 8)
    path, happen, _ = change_source("list", "touched", tmp_path, random.Random(0), COUNT)
    before = fingerprint_of(path)
    assert before["sampled"] == "8 of 48"
    now = fingerprint_of(happen())
    [line] = fingerprint.compare_sources(before, now, advice="", accept=False)
    assert "other times" in line and "8 of 48" in line
    assert not fingerprint.compare_sources(before, before, advice="", accept=False)


def test_large_images_are_sampled_by_their_bytes(tmp_path, monkeypatch):
    from simsiam.sources import fingerprint

    path, _, _ = change_source("list", "touched", tmp_path, random.Random(0), COUNT)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 5000)  # an image has 822
    assert fingerprint_of(path)["sampled"] == "6 of 48"


# --- resume ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A source and a run of it."""
    work = tmp_path_factory.mktemp("trained")
    path, *_ = change_source("folder", "removed", work, random.Random(0), COUNT)
    return path, simsiam.pretrain(str(path), out=work / "run", **SETTINGS)


def copied(trained, tmp_path) -> tuple[Path, Path]:
    """The source as it was, at its place, and a copy of the run."""
    path, run = trained
    if not (kept := path.with_name("kept")).exists():
        shutil.copytree(path, kept)
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(kept, path)
    return path, Path(shutil.copytree(run, tmp_path / "run"))


def test_a_run_notices_changed_images_and_goes_on_if_told(trained, tmp_path, capsys):
    here, run = copied(trained, tmp_path)
    assert main(["resume", str(run)]) == 0
    assert "changed" not in capsys.readouterr().err
    victim = sorted(here.rglob("*.png"))[7]
    before = victim.read_bytes()
    other = sorted(here.rglob("*.png"))[9]
    victim.write_bytes(other.read_bytes())
    checkpoint = (run / "checkpoints" / "last.pt").read_bytes()
    assert main(["resume", str(run)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the images have changed: other content; " in line
    assert f"simsiam resume {run} --accept-changed-source" in line
    assert (run / "checkpoints" / "last.pt").read_bytes() == checkpoint
    assert main(["resume", str(run), "--accept-changed-source"]) == 0
    assert "accepted: other content" in capsys.readouterr().err
    assert main(["resume", str(run)]) == 0  # these are now the images of the run
    victim.write_bytes(before)
    assert main(["resume", str(run)]) == 2


def test_a_run_with_fewer_images_goes_on_if_told(trained, tmp_path, capsys):
    here, run = copied(trained, tmp_path)
    for path in sorted(here.rglob("*.png"))[:5]:
        path.unlink()
    assert main(["resume", str(run)]) == 2
    assert "train 43 images in place of train 48" in capsys.readouterr().err
    assert main(["resume", str(run), "--accept-changed-source"]) == 0
    assert Run(run).checkpoint()["images"] == 43


def test_a_run_whose_images_have_moved_goes_on(trained, tmp_path, capsys):
    here, run = copied(trained, tmp_path)
    there = here.rename(tmp_path / "there")
    for path in there.rglob("*.png"):
        os.utime(path)
    assert main(["resume", str(run)]) == 2
    assert "--source PLACE" in capsys.readouterr().err
    assert main(["resume", str(run), "--source", str(there)]) == 0
    assert "changed" not in capsys.readouterr().err
    assert main(["resume", str(run)]) == 0 and main(["report", str(run)]) == 0


def test_a_run_without_a_fingerprint_goes_on_with_a_line(trained, tmp_path, capsys):
    import torch

    _, run = copied(trained, tmp_path)
    for path in (run / "checkpoints").glob("*.pt"):
        state = read_checkpoint(path)
        state.pop("fingerprint", None)
        torch.save(state, path)
    assert main(["resume", str(run)]) == 0
    error = capsys.readouterr().err
    assert error.count("whether the images have changed is not known") == 1
    assert main(["resume", str(run)]) == 0
    assert "not known" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [{"target": "moving_average"}, {"method": "deepcluster", "dim": 3, "equal_terms": True}],
)
def test_what_is_kept_of_each_image_is_not_moved_to_others(trained, tmp_path, capsys, settings):
    path, _ = copied(trained, tmp_path / "trained")
    here = shutil.copytree(path, tmp_path / "here")
    run = simsiam.pretrain(str(here), out=tmp_path / "run", **SETTINGS | settings)
    next(here.rglob("*.png")).unlink()
    assert main(["resume", str(run), "--accept-changed-source"]) == 2
    assert "of each image, so this run cannot go on" in capsys.readouterr().err


# --- embed and shard ---


class Killed(BaseException):
    """Stands for SIGKILL after the first part."""


def embed(run: Path, source: Path, out: Path, *more: str) -> int:
    return main(["embed", str(run), str(source), "--out", str(out), *more])


def kill_after_one(monkeypatch, module, name):
    """Let a function be called once; the second call kills the process."""
    true, calls = getattr(module, name), []

    def once(*arguments):
        if calls:
            raise Killed
        calls.append(0)
        return true(*arguments)

    monkeypatch.setattr(module, name, once)


@pytest.mark.parametrize("change", ["redrawn", "all redrawn", "removed", "relabeled", "moved"])
def test_parts_of_other_images_are_not_used_by_embed(
    change, trained, tmp_path, monkeypatch, capsys
):
    _, run = trained
    path, happen, harmless = change_source(
        "folder of bmp", change, tmp_path, random.Random(1), COUNT
    )
    monkeypatch.setattr(embedding, "PART_SIZE", 16)
    with monkeypatch.context() as patch:
        kill_after_one(patch, embedding, "embed_part")
        with pytest.raises(Killed):
            embed(run, path, tmp_path / "e.parquet")
    assert (tmp_path / "e.parquet.parts" / "000000.parquet").exists()
    path = happen()
    code = embed(run, path, tmp_path / "e.parquet")
    line = capsys.readouterr().err
    if not harmless:
        assert code == 2 and "the images have changed: " in line
        assert "--accept-changed-source" in line and not (tmp_path / "e.parquet").exists()
        code = embed(run, path, tmp_path / "e.parquet", "--accept-changed-source")
    assert code == 0 and embed(run, path, tmp_path / "fresh.parquet") == 0
    tables = [pq.read_table(tmp_path / name) for name in ("e.parquet", "fresh.parquet")]
    assert tables[0].equals(tables[1])
    assert not (tmp_path / "e.parquet.parts").exists()


def test_images_that_change_while_they_are_embedded_are_noticed(
    trained, tmp_path, monkeypatch, capsys
):
    _, run = trained
    path, happen, _ = change_source("list", "all redrawn", tmp_path, random.Random(1), COUNT)
    monkeypatch.setattr(embedding, "PART_SIZE", 16)
    true = embedding.embed_part

    def change_after_one(*arguments):
        table = true(*arguments)
        happen() if not table["path"][0].as_py().endswith("0000.bmp") else None
        return table

    monkeypatch.setattr(embedding, "embed_part", change_after_one)
    assert embed(run, path, tmp_path / "e.parquet") == 2
    assert "the images have changed: other content" in capsys.readouterr().err
    monkeypatch.setattr(embedding, "embed_part", true)
    assert embed(run, path, tmp_path / "e.parquet") == 2
    assert embed(run, path, tmp_path / "e.parquet", "--accept-changed-source") == 0
    assert embed(run, path, tmp_path / "fresh.parquet") == 0
    assert pq.read_table(tmp_path / "e.parquet").equals(pq.read_table(tmp_path / "fresh.parquet"))


@pytest.mark.parametrize("change", ["redrawn", "removed", "touched"])
def test_shards_of_other_images_are_not_used(change, tmp_path, monkeypatch, capsys):
    path, happen, harmless = change_source("folder of bmp", change, tmp_path, random.Random(1), 40)
    monkeypatch.setattr(
        write_shards, "parallel_map_with_progress", lambda f, jobs, _: [f(*job) for job in jobs]
    )
    command = ["shard", str(path), "--per-shard", "16", "--out", "shards"]
    with monkeypatch.context() as patch:
        kill_after_one(patch, write_shards, "_write_tar")
        with pytest.raises(Killed):
            main(command)
    happen()
    code = main(command)
    if not harmless:
        assert code == 2 and "the images have changed: " in capsys.readouterr().err
        code = main([*command, "--accept-changed-source"])
    assert code == 0 and main([*command[:-1], "fresh"]) == 0
    for file in Path("fresh").glob("*.tar"):
        assert (Path("shards") / file.name).read_bytes() == file.read_bytes()


def test_parts_with_other_paths_are_not_used(trained, tmp_path, monkeypatch, capsys):
    """The paths in a list of absolute paths change when the images move."""
    _, run = trained
    path, happen, _ = change_source("absolute list", "moved", tmp_path, random.Random(1), COUNT)
    monkeypatch.setattr(embedding, "PART_SIZE", 16)
    with monkeypatch.context() as patch:
        kill_after_one(patch, embedding, "embed_part")
        with pytest.raises(Killed):
            embed(run, path, tmp_path / "e.parquet")
    path = happen()
    assert embed(run, path, tmp_path / "e.parquet") == 2
    assert "e.parquet.parts holds the parts of another job" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "e.parquet.parts")
    assert embed(run, path, tmp_path / "e.parquet") == 0
    paths = pq.read_table(tmp_path / "e.parquet")["path"].to_pylist()
    assert all(str(path.parent) in name for name in paths)
