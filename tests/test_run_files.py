"""The files of a run: checked when they are read, with checksums, on the disk when it matters."""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import QUICK
from PIL import Image
from torch import nn

import simsiam
from simsiam.commands.main import main
from simsiam.errors import UsageError, say_once
from simsiam.model.encoder import Encoder
from simsiam.runs.run_folder import Run, read_checkpoint
from simsiam.runs.weight_files import ChecksumError, load_metadata, load_weights, save_weights
from simsiam.utils.checksums import (
    CHECKSUM_KEY,
    file_sha256,
    read_with_checksum,
    seal,
    write_with_checksum,
)
from simsiam.utils.files import atomic_folder
from simsiam.utils.typed_json import parse_json, read_json, to_json

SAVING = QUICK | {"save_seconds": 0, "device": "cpu", "precision": "float32"}
ESCAPE = "\x1b[2J"
RECORD = {
    "protocol": "detection, fpn, 4 steps", "task": "detection", "source": "shapes", "test": "test",
    "init": {"from": "the run"}, "chosen": {"lr": 0.01}, "tested_by": "voc_box", "n": 4,
    "metrics": {"voc_box": {"AP": 1.0, "AP50": 2.0, "AP75": 0.5, "AP50_of_class": {"a": 2.0}}},
    "folder": "a", "picture": "a/picture.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps with an evaluation."""
    run = simsiam.pretrain("shapes", out=tmp_path_factory.mktemp("finished") / "run", **SAVING)
    record = {"protocol": "knn", "name": "k 5", "features": "h", "top1": 50.0, "top5": None}
    record |= {"n": 10, "interval": [40.0, 60.0], "source": "shapes", "checkpoint": "last"}
    Run(run).write("evaluations/knn.json", [record])
    return run


@pytest.fixture
def run(finished, tmp_path):
    say_once.cache_clear()
    return shutil.copytree(finished, tmp_path / "run")


def one_line(arguments, capfd) -> str:
    """Run a command that fails; return its error, which is one line."""
    capfd.readouterr()
    code = main([str(argument) for argument in arguments])
    error = capfd.readouterr().err.strip().splitlines()
    assert code in (1, 2) and error[-1].startswith("simsiam: "), (code, error)
    assert all(line.isprintable() for line in error)
    return error[-1]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# --- types ---

WRONG = {
    "summary.json": [
        {"verdict": 3}, {"knn_top1": "high"}, {"knn_top1": {"best": 3}}, {"features": {}},
        {"features": [{"features": "end"}]}, {"steps": None}, {"end": [1]}, [], None, "x",
    ],
    "environment.json": [{"versions": []}, {"start": 3}, {"versions": {"torch": None}}, 7],
    "adapt.json": [{"candidates": [3]}, {"candidates": [{"score": 1.0}]}, {"candidates": "x"}],
    "evaluations/knn.json": [
        {}, [3], [{"name": "k 5"}], [{"protocol": "knn", "top1": "high", "n": 3}],
        [{"protocol": "knn", "top1": 50.0, "interval": [1]}], [{"protocol": ["knn"]}],
        [{"protocol": "knn", "measured": 3}],
    ],
    "transfers/detection.json": [
        [{"protocol": "x", "metrics": {"voc_box": 3}}], [{"protocol": "x", "init": "here"}],
        [{"protocol": "x", "chosen": [1]}], [{"protocol": "x", "picture": {}}],
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, found in WRONG.items() for content in found]
)
def test_a_value_of_another_type_is_one_line(name, content, run, capfd):
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    line = one_line(["report", run, "--no-map"], capfd)
    assert f"{name} is damaged: " in line and line.endswith("restore the file, or move it away")


def test_nesting_huge_numbers_and_half_characters_are_one_line_or_harmless(tmp_path):
    deep = "[" * 20_000 + "]" * 20_000
    for text in (f'{{"a": {deep}}}', '{"a": ' + "9" * 400 + "}", '{"a": ' + "9" * 9000 + "}"):
        with pytest.raises(UsageError, match="x is damaged: ") as error:
            parse_json(text, dict[str, object], "x")
        assert len(str(error.value)) < 300
    (tmp_path / "a.json").write_text(r'{"name": "caf\udce9", "emoji": "\ud83d\ude00"}')
    assert read_json(tmp_path / "a.json", dict[str, str]) == {"name": "caf\udce9", "emoji": "😀"}


def test_records_of_older_versions_lack_keys_and_are_shown(run, capfd):
    (run / "evaluations" / "knn.json").write_text('[{"protocol": "knn", "top1": 51.5}]')
    (run / "transfers").mkdir()
    (run / "transfers" / "detection.json").write_text('[{"protocol": "detection"}]')
    assert main(["report", str(run), "--no-map"]) == 0
    assert main(["compare", str(run), str(run)]) == 0
    assert "51.5" in capfd.readouterr().out
    assert main(["export", str(run), "--format", "huggingface", "--out", "card"]) == 0


def page_runs(page: Path) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])["runs"]


def texts(value) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in texts(part)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def test_no_control_character_reaches_terminal_or_page(run, capfd):
    evil = f"a\nb{ESCAPE}"
    name = "evaluations/knn.json"
    record = Run(run).read_records(name)[0] | {
        "name": evil,
        evil: evil,
        "parameters": {evil: [evil]},
    }
    Run(run).write(name, [record])
    (run / "transfers").mkdir()
    Run(run).write("transfers/detection.json", [RECORD | {"source": evil, "init": {"from": evil}}])
    Run(run).write("environment.json", Run(run).json("environment.json") | {"device": evil})
    summary = Run(run).json("summary.json")
    Run(run).write("summary.json", summary | {"verdict": evil, "remedy": evil})
    page = simsiam.report(run, images=False)
    shown = texts(page_runs(page))
    assert any("a\\nb\\x1b[2J" in text for text in shown)
    assert all(text.isprintable() for text in shown)
    assert main(["compare", str(run), str(run)]) == 0
    said = capfd.readouterr()
    assert ESCAPE not in said.out + said.err and "a\\nb" in said.out
    simsiam.export(run, format="huggingface", out="card")
    assert ESCAPE not in Path("card/README.md").read_text()


def test_a_record_names_no_picture_outside_of_the_run(run, tmp_path, capfd):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(secret)
    (run / "transfers").mkdir()
    os.symlink(secret, run / "transfers" / "link.png")
    Image.new("RGB", (8, 8)).save(run / "transfers" / "own.png")
    for name in (str(secret), "../../secret.png", "link.png", "a/../../../secret.png", "\0", "."):
        Run(run).write("transfers/detection.json", [RECORD | {"picture": name}])
        (record,) = page_runs(simsiam.report(run, images=False))[0]["transfers"]
        assert record["shown"] is None, name
        assert "no picture of detection" in capfd.readouterr().err, name
        say_once.cache_clear()
    Run(run).write("transfers/detection.json", [RECORD | {"picture": "own.png"}])
    (record,) = page_runs(simsiam.report(run, images=False))[0]["transfers"]
    assert record["shown"].startswith("data:image/webp")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "x"}, {"images": None}, {"environment": 3}, {"environment": {"versions": []}},
        {"seconds": "long"}, {"knn": {"last": "high"}}, {"metrics": {"bytes": 3}}, {"format": "1"},
        {"recipe": []}, {"model": [1]}, {"optimizer": {"state": 3}}, {"start": 7},
        {"knn": {"last": 50.0, "best": 50.0}}, {"knn": {"other": 50.0}},
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_type_is_one_line(change, run, capfd):
    for name in ("last", "previous"):
        path = run / "checkpoints" / f"{name}.pt"
        torch.save(read_checkpoint(path) | change, path)
    one_line(["resume", run], capfd)


@pytest.mark.parametrize("name", ["knn", "step", "images", "seconds", "environment"])
def test_a_checkpoint_without_a_part_is_one_line(name, run, capfd):
    for path in (run / "checkpoints" / "last.pt", run / "checkpoints" / "previous.pt"):
        state = read_checkpoint(path)
        del state[name]
        torch.save(state, path)
    one_line(["resume", run], capfd)


def test_a_recipe_without_views_is_one_line(run, capfd):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"method": recipe["method"] | {"views": []}})
    )
    assert "views is empty" in one_line(["resume", run], capfd)


def test_a_long_value_is_cut_in_the_line(run, capfd):
    Run(run).write("loggers.json", {"loggers": [], "id": "x" * 5000})
    line = one_line(["resume", run], capfd)
    assert "loggers.json is damaged: id is 'xxx" in line and len(line) < 1000


def test_weights_of_other_types_are_set_aside_by_name(run, tmp_path, capfd):
    weights = simsiam.load(run, head=False).state_dict()
    name = next(iter(weights))
    for value in (
        weights[name].to(torch.float8_e4m3fn),
        torch.complex(weights[name], weights[name]).conj(),
        torch.zeros(3, dtype=torch.uint16),
    ):
        torch.save({"state_dict": weights | {name: value}}, tmp_path / "a.pt")
        line = one_line(["convert", tmp_path / "a.pt", "--out", tmp_path / "made"], capfd)
        assert f"set aside because of their types: {name} (" in line
    negative = torch.complex(weights[name], -weights[name]).conj().imag  # stored as its negative
    assert negative.is_neg()
    state = weights | {name: negative, "rope": torch.zeros(2, dtype=torch.complex64)}
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    made = simsiam.convert(tmp_path / "a.pt", out=tmp_path / "made")
    assert torch.equal(simsiam.load(made).state_dict()[name], weights[name])
    assert "rope" in Run(made).json("converted.json")["set_aside"]


@pytest.mark.parametrize(
    "metadata",
    [
        b"[]", b"3", b"{", b'{"unreadable": 3}', b'{"unreadable": [["a"]]}', b'{"run": ["a"]}',
        b'{"sources": "a", "channels": "3", "splits": 1}', b"[" * 9000, b"\xff\xfe",
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["report", "neighbors", "duplicates"])
def test_the_metadata_of_an_embedding_are_checked(verb, metadata, tmp_path, capfd):
    columns = {
        "path": [f"{i}.png" for i in range(9)],
        "vector": pa.array(list(np.eye(9, dtype=np.float32)), pa.list_(pa.float32(), 9)),
        "thumbnail": [b"x"] * 9,
    }
    table = pa.table(columns).replace_schema_metadata({b"simsiam": metadata})
    pq.write_table(table, tmp_path / "e.parquet")
    arguments = [verb, tmp_path / "e.parquet", *(["0.png"] if verb == "neighbors" else [])]
    assert "e.parquet: its description is damaged" in one_line(arguments, capfd)


# --- checksums ---


def test_a_changed_value_of_a_json_file_is_seen(run, capfd):
    for name in ("summary.json", "environment.json", "evaluations/knn.json"):
        path = run / name
        text = path.read_text()
        assert f'"{CHECKSUM_KEY}": "' in text
        digit = re.search(r"\d(?=[,.\s])", text).start()  # of a value
        flip(path, digit)
        line = one_line(["report", run, "--no-map"], capfd)
        assert f"{name} is damaged: its content does not match its checksum" in line
        path.write_text(re.sub(rf',\s*"{CHECKSUM_KEY}": "\w+"', "", path.read_text()))
        assert (
            main(["report", str(run), "--no-map"]) == 0
        )  # changed by hand, or of an older version
        path.write_text(text)


def test_spaces_and_the_order_of_keys_do_not_matter(tmp_path):
    content = {"b": 1.5, "a": [1, {"c": None}]}
    (tmp_path / "a.json").write_text(json.dumps(json.loads(to_json(content)), sort_keys=True))
    assert read_json(tmp_path / "a.json", dict[str, object]) == content


def test_a_damaged_name_of_a_checksum_is_no_new_key(tmp_path):
    for content in ({"b": 1.5, "a": [1]}, {}, {"a": "1a2b3c4d"}):
        (tmp_path / "a.json").write_text(to_json(content).replace(CHECKSUM_KEY, "crc72"))
        assert read_json(tmp_path / "a.json", dict[str, object]) == content
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert read_json(tmp_path / "a.json", dict[str, object]) == content


def test_every_line_of_the_metrics_has_one_more_key_and_a_damaged_one_is_left_out(run, capfd):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for line in lines:
        record = json.loads(line)
        assert list(record)[-1] == CHECKSUM_KEY
        assert seal({k: v for k, v in record.items() if k != CHECKSUM_KEY}) == record
    records = Run(run).metrics()
    assert not capfd.readouterr().err and CHECKSUM_KEY not in records[0]
    changed = lines[1].replace('"epoch": ', '"epoch": 1')
    path.write_text("\n".join([lines[0], changed, *lines[2:]]) + "\n")
    assert Run(run).metrics() == [records[0], *records[2:]]
    said = capfd.readouterr().err
    assert "1 of 3 lines are damaged or cut short, and are left out (line 2)" in said
    path.write_text("".join(json.dumps(record) + "\n" for record in records))  # an older version's
    assert Run(run).metrics() == records


def test_a_changed_quarantine_is_seen(run, tmp_path, capfd):
    Run(run).quarantine([("a.png", "truncated"), ("b\udcff.png", "empty")])
    assert len(Run(run).read_quarantine()) == 2
    sums = run / "quarantine.txt.sha256"
    assert sums.read_text() == f"{file_sha256(run / 'quarantine.txt')}  quarantine.txt\n"
    text = sums.read_bytes()
    for damaged in (run / "quarantine.txt", sums):
        for place in range(damaged.stat().st_size):
            flip(damaged, place)
            assert "quarantine.txt.sha256" in one_line(["report", run, "--no-map"], capfd)
            flip(damaged, place)
    assert sums.read_bytes() == text
    flip(run / "quarantine.txt", 0)
    sums.unlink()
    assert main(["report", str(run), "--no-map"]) == 0  # of an older version


def test_a_file_matches_its_checksum_whenever_the_process_is_killed(tmp_path, monkeypatch):
    """The process stops after each renaming in turn."""
    path, real = tmp_path / "a.txt", os.replace
    write_with_checksum(path, b"one")
    for last in range(3):
        left = [last]

        def stop(*paths, left=left, real=real, **words):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            real(*paths, **words)

        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_with_checksum(path, f"two {last}".encode())
        monkeypatch.undo()
        assert read_with_checksum(path) in (b"one", b"two 1", b"two 2")
    assert read_with_checksum(path) == b"two 2"


def test_the_metadata_of_weights_have_a_checksum(run, tmp_path):
    Run(run).write_head(Encoder(simsiam.load(run, head=False), nn.Linear(32, 32)))
    for name, word in (("backbone.safetensors", b"bilinear"), ("head.safetensors", b"backbone")):
        path = run / name
        load_metadata(path)
        flip(path, path.read_bytes().index(word))
        with pytest.raises(ChecksumError, match="metadata"):
            load_weights(path)
        with pytest.raises(UsageError, match="metadata"):
            simsiam.load(run)
        flip(path, path.read_bytes().index(word[1:]) - 1)
    save_weights({"w": torch.zeros(3)}, tmp_path / "a.safetensors", {"a": "b"})
    assert load_metadata(tmp_path / "a.safetensors")["a"] == "b"


def test_an_export_has_the_checksums_of_its_files(run):
    out = simsiam.export(run, format="safetensors").path
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True
    )
    names = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert done.returncode == 0 and names == {"backbone.safetensors", "preprocessing.json"}


def test_a_page_has_the_checksum_of_its_data(run):
    text = simsiam.report(run, images=False).read_text()
    data = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert f'data-crc32="{zlib.crc32(data.encode()):08x}"' in text


# --- recipe.yaml ---


def test_an_edited_recipe_is_compared_with_its_copy_in_the_checkpoint(run, capfd):
    path = run / "recipe.yaml"
    text = path.read_text()
    for verb in (["report", run, "--no-map"], ["export", run, "--format", "safetensors"]):
        path.write_text(text.replace("read_timeout: 600.0", "read_timeout: 60.0"))
        say_once.cache_clear()
        capfd.readouterr()
        assert main([str(word) for word in verb]) == 0
        said = capfd.readouterr().err
        assert (
            "recipe.yaml was changed after last.pt was saved: read_timeout was 600.0 and is 60.0"
            in said
        )
    path.write_text(re.sub(r"  dim: \d+", "  dim: 8", text))
    assert "method.dim was 16 and is 8" in one_line(["resume", run], capfd)
    path.write_text(text)
    say_once.cache_clear()
    capfd.readouterr()
    assert main(["report", str(run), "--no-map"]) == 0
    assert "note" not in capfd.readouterr().err


# --- power cuts ---


def watch_disk(monkeypatch) -> list[str]:
    """Record, in order, which files are synced and which appear under their name."""
    events, real_sync, real_replace = [], os.fsync, os.replace

    def sync(descriptor):
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_sync(descriptor)

    def replace(source, target, **words):
        events.append(f"name {Path(target).name}")
        real_replace(source, target, **words)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    return events


def test_the_metrics_are_on_the_disk_before_the_checkpoint_that_assumes_them(tmp_path, monkeypatch):
    events = watch_disk(monkeypatch)
    run = simsiam.pretrain("shapes", out=tmp_path / "run", **SAVING)
    for i, event in enumerate(events):
        if event == "name last.pt":
            before = events[:i][::-1]
            last = before.index("name last.pt") if "name last.pt" in before else len(before)
            assert "sync metrics.jsonl" in before[:last], events
    data = (run / "metrics.jsonl").read_bytes()
    for name in ("last", "previous"):
        extent = Run(run).checkpoint(name)["metrics"]
        part = data[: extent["bytes"]]
        assert extent["crc32"] == f"{zlib.crc32(part):08x}" and extent["lines"] == part.count(b"\n")
    assert Run(run).checkpoint("last")["metrics"]["bytes"] == len(data)


@pytest.mark.parametrize("harm", ["cut", "gone", "changed"])
def test_resume_says_what_the_metrics_lack(harm, run, capfd):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    content = {
        "cut": "".join(lines[:2])[:-9],
        "gone": "",
        "changed": lines[0] + lines[1].replace('"lr": ', '"lr": 1') + lines[2],
    }[harm]
    path.write_text(content)
    simsiam.resume(run)
    said = " ".join(capfd.readouterr().err.split())
    count, step = {"cut": (1, 1), "gone": (0, 0), "changed": (2, 3)}[harm]
    assert f"it has {count} of 3 lines, the last one of step {step}" in said
    say_once.cache_clear()
    simsiam.resume(run)  # the checkpoint knows now how long the file is
    assert "it has" not in capfd.readouterr().err


def test_a_checkpoint_without_the_length_of_the_metrics_continues(run, capfd):
    for name in ("last", "previous"):
        path = run / "checkpoints" / f"{name}.pt"
        state = read_checkpoint(path)
        del state["metrics"]
        torch.save(state, path)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().split("\n")[0] + "\n")
    simsiam.resume(run)
    assert "note" not in capfd.readouterr().err


def test_an_exported_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = watch_disk(monkeypatch)
    with atomic_folder(tmp_path / "out") as part:
        (part / "a").write_bytes(b"a")
        (part / "in").mkdir()
        (part / "in" / "b").write_bytes(b"b")
    named = events.index("name out")
    assert {"sync a", "sync b", "sync in"} <= set(events[:named])


# --- the campaign ---


@pytest.mark.long
def test_a_small_campaign(tmp_path):
    script = Path(__file__).parent / "stress" / "run_files.py"
    done = subprocess.run(
        [sys.executable, script, "--types", "60", "--flips", "40", "--seed", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "100 trials, 0 wrong" in done.stdout, done.stdout + done.stderr


@pytest.mark.long
def test_a_small_campaign_of_power_cuts(tmp_path):
    if sys.platform != "linux" or os.geteuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("mounts a file system")
    script = Path(__file__).parent / "stress" / "campaign.py"
    command = f"{script} --kills 0 --full 0 --corruptions 0 --cuts 6 --only pretrain export"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "6 of 6 trials were made" in done.stdout, done.stdout
