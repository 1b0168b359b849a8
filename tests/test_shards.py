"""Shards have the images of the folder, each used once an epoch; damage is reported in one line."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_decode import encode, picture, same
from test_sources import is_the_same, one_line, parquet, refused, tarred, tree

from simsiam.config.recipes import Recipe
from simsiam.data import shards
from simsiam.data.batches import batch_indices, interleaved_indices, iter_batches, steps_per_epoch
from simsiam.data.decode import Unreadable
from simsiam.data.storage import Blocks
from simsiam.errors import UsageError, WorkFailed
from simsiam.sources import catalog
from simsiam.sources import open_source as sources
from simsiam.sources import shapes as drawn
from simsiam.sources.catalog import CATALOG_FILE
from simsiam.sources.file_index import load_index
from simsiam.sources.open_source import open_source
from simsiam.sources.write_shards import format_shard_summary, write_shards
from simsiam.training.launch import pretrain
from simsiam.training.prepare import prepare_data
from simsiam.utils.files import start_or_continue_job

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of a few images, and Parquet that is not read at once."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 2**14)  # of four images
    monkeypatch.setattr("simsiam.sources.write_shards.BLOCK_BYTES", 2**12)
    monkeypatch.setattr(sources, "MAX_RESIDENT_BYTES", 0)


@pytest.fixture
def photos(tmp_path):
    """Make a folder of 60 images of two classes and many sizes; one name is not UTF-8."""
    folder = tmp_path / "photos"
    for i in range(60):
        tree(folder / ("cat", "dog")[i % 2], f"{i:03}.png", size=(20 + i % 5, 24))
        (folder / ("cat", "dog")[i % 2] / f"{i:03}.png").write_bytes(
            encode(picture(i, 20 + i % 5, 24))
        )
    os.rename(os.fsencode(folder / "cat" / "000.png"), os.fsencode(folder / "cat") + b"/\xff0.png")
    return folder


def bytes_below(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def recipe(**words) -> Recipe:
    base = {"image_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3, "batch_size": 8}
    return Recipe().replace(**base | words)


# What is written, and what is read


def test_shards_of_a_folder_are_the_folder(photos, tmp_path):
    """Same images, order, labels, class names and keys; tars with and without their catalog."""
    folder = open_source(photos)
    out = write_shards(photos, out=tmp_path / "tars", per_shard=17)
    assert sorted(path.name for path in out.iterdir()) == [
        CATALOG_FILE,
        *(f"train-{n:06}.tar" for n in range(4)),
    ]
    is_the_same(open_source(out), folder)
    (out / CATALOG_FILE).unlink()
    os.utime(out / "train-000000.tar", ns=(1, 1))  # or what is kept in the cache would do
    is_the_same(open_source(out), folder)
    rows = open_source(
        write_shards(photos, out=tmp_path / "rows", format="parquet", per_shard=17)
    ).train
    assert (
        rows.labels.tolist() == folder.train.labels.tolist()
        and rows.classes == folder.train.classes
    )
    assert len(rows.blocks) > 4 and all(same(rows.read(i), folder.train.read(i)) for i in range(60))
    assert list(rows.keys)[:2] == ["train#0", "train#1"]


def test_all_splits_and_decoded_images_come_along(tmp_path, monkeypatch):
    draw = drawn.draw_split
    monkeypatch.setattr(drawn, "draw_split", lambda split: tuple(part[:30] for part in draw(split)))
    out = write_shards("shapes", out=tmp_path / "out", per_shard=20)
    source, shapes = open_source(out), open_source("shapes")
    assert (
        source.splits.keys() == shapes.splits.keys()
        and source.train.classes == shapes.train.classes
    )
    for one, other in zip(source.splits.values(), shapes.splits.values(), strict=True):
        assert list(one.keys) == list(other.keys) and same(one.labels, other.labels)
        assert same(one.read(len(one) - 1), other.read(len(one) - 1))


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_the_bytes_are_a_function_of_the_images(photos, tmp_path, format):
    once, again = (
        write_shards(photos, out=tmp_path / name, format=format, per_shard=25)
        for name in ("once", "again")
    )
    assert bytes_below(once) == bytes_below(again)


def test_webdataset_reads_what_is_written(photos, tmp_path):
    """The rules of WebDataset: consecutive files with one name up to the first dot are a sample."""
    out, folder, n = (
        write_shards(photos, out=tmp_path / "out", per_shard=17),
        open_source(photos).train,
        0,
    )
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            members = [
                (info.name.split(".", 1), archive.extractfile(info).read()) for info in archive
            ]
        for (key, ending), data in members:
            if ending == "png":
                assert data == Path(folder.file(n)).read_bytes() and (int(key), ending) == (
                    n,
                    "png",
                )
                sample = {e: d for (k, e), d in members if k == key}
                assert int(sample["cls"]) == folder.labels[n]
                assert json.loads(sample["json"])["class"] == folder.classes[folder.labels[n]]
                n += 1
    assert n == 60


def test_killed_and_started_anew_it_is_the_same_folder(photos, tmp_path):
    whole, out = write_shards(photos, out=tmp_path / "whole", per_shard=4), tmp_path / "out"
    code = (
        "import sys, time\nfrom simsiam.sources import write_shards as m\n"
        "readable = m._iter_readable\n"
        "def slow(*a):\n    for x in readable(*a):\n        time.sleep(0.05)\n        yield x\n"
        "m._iter_readable = slow\nm.write_shards(sys.argv[1], out=sys.argv[2], per_shard=4)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(photos), str(out)], start_new_session=True
    )
    work = tmp_path / "out.parts"
    while len(list(work.glob("whole/*.tar"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in work.glob("whole/*.tar")}
    assert 3 <= len(done) < 15 and not out.exists()
    with pytest.raises(UsageError, match="parts of another job"):
        write_shards(photos, out=out, per_shard=5)
    write_shards(photos, out=out, per_shard=4)
    assert bytes_below(out) == bytes_below(whole) and not work.exists()
    assert all((out / path.name).stat().st_mtime_ns == when for path, when in done.items())
    with pytest.raises(UsageError, match="exists and is not written over"):
        write_shards(photos, out=out)


def test_what_cannot_be_read_is_left_out_and_listed(photos, tmp_path):
    (photos / "dog" / "001.png").write_bytes(b"junk")
    (photos / "dog" / "003.png").unlink()
    os.symlink("nowhere", photos / "dog" / "003.png")
    out = write_shards(photos, out=tmp_path / "out", per_shard=17)
    lines = (out / "left_out.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["dog/001.png", "dog/003.png"]
    assert len(open_source(out).train) == 58 and "2 images cannot be read" in format_shard_summary(
        out
    )
    for path in photos.rglob("*.png"):
        path.unlink()
        path.write_bytes(b"junk")
    with pytest.raises(WorkFailed, match="none of the 60 images"):
        write_shards(photos, out=tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


def test_a_wrong_request_is_one_line(photos, tmp_path):
    for words, said in [
        ({"format": "rar"}, "unknown format 'rar'"),
        ({"per_shard": 0}, "at least 1"),
    ]:
        with pytest.raises(UsageError, match=said):
            write_shards(photos, out=tmp_path / "out", **words)
    assert "no .parquet or .tar at memory://nowhere" in refused("memory://nowhere")
    assert "cannot be opened" in refused("gopher://x/y")


@pytest.mark.parametrize("max_resident_bytes", [0, 2**30])
def test_a_split_of_parquet_may_have_no_labels(tmp_path, monkeypatch, max_resident_bytes):
    monkeypatch.setattr(sources, "MAX_RESIDENT_BYTES", max_resident_bytes)
    photos = tree(tmp_path / "photos", "train/cat/1.png", "train/dog/2.png", "test/3.png")
    source = open_source(write_shards(photos, out=tmp_path / "rows", format="parquet"))
    assert source.train.classes == ("cat", "dog") and source.train.labels.tolist() == [0, 1]
    assert source.test.labels is None and len(source.test) == 1
    assert same(source.test.read(0), open_source(photos).test.read(0))


# Elsewhere


@pytest.fixture
def memory(photos, tmp_path):
    """The shards in fsspec's store in memory."""
    import fsspec

    system = fsspec.filesystem("memory")
    for format in ("tar", "parquet"):
        folder = write_shards(photos, out=tmp_path / format, format=format, per_shard=17)
        system.put(f"{folder}/", f"/{format}/", recursive=True)
    yield system
    system.store.clear()


def test_a_url_is_a_folder(photos, memory, tmp_path):
    """Also `file://`; with the catalog that lies there, or without."""
    folder = open_source(photos)
    is_the_same(open_source("memory://tar"), folder)
    is_the_same(open_source(f"file://{tmp_path}/tar"), folder)
    rows = open_source("memory://parquet").train
    assert rows.labels.tolist() == folder.train.labels.tolist()
    assert all(same(rows.read(i), folder.train.read(i)) for i in range(60))
    memory.rm(f"/tar/{CATALOG_FILE}")
    memory.pipe(
        "/tar/train-000003.tar", (tmp_path / "tar" / "train-000003.tar").read_bytes()
    )  # another time
    is_the_same(open_source("memory://tar"), folder)
    assert len(open_source("memory://tar/train-000000.tar").train) == 17


def test_shards_on_a_web_server_which_lists_names_without_sizes(photos, memory):
    """As fsspec does it; and listing the URL of a file would download it."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Web(MemoryFileSystem):
        protocol, sizes, listed, is_down = "web", True, [], False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("web://", "memory://"))

        def ls(self, path, detail=True, **options):
            self.listed.append(path)
            return [entry | {"size": None} for entry in super().ls(path, True, **options)]

        def info(self, path, **options):
            if self.is_down:
                raise FileNotFoundError(path) from ConnectionError("no route")
            entry = super().info(path, **options)
            return entry if self.sizes else entry | {"size": None}

    fsspec.register_implementation("web", Web, clobber=True)
    folder = open_source(photos)
    is_the_same(open_source("web://tar"), folder)
    assert len(open_source("web://parquet").train) == 60
    Web.listed.clear()
    for shard in ("tar/train-000000.tar", "parquet/train-00000-of-00004.parquet"):
        assert len(open_source(f"web://{shard}").train) == 17
    assert not Web.listed
    Web.sizes = False
    for place in ("tar", "tar/train-000000.tar", "parquet"):
        assert "the server does not say how large it is" in refused(f"web://{place}")
    Web.is_down = True
    line = refused("web://tar/train-000000.tar", WorkFailed)
    assert line == "cannot read web://tar/train-000000.tar: ConnectionError: no route"


def test_what_vanishes_stops_the_work_in_one_line(photos, memory, tmp_path):
    r = recipe()
    for place, vanish in [
        ("memory://tar", lambda: memory.rm("/tar", recursive=True)),
        (str(tmp_path / "tar"), lambda: [p.unlink() for p in (tmp_path / "tar").iterdir()]),
        ("memory://parquet", lambda: memory.rm("/parquet", recursive=True)),
    ]:
        images = open_source(place).train
        vanish()
        for workers in (0, 2) if place == "memory://tar" else (0,):
            with pytest.raises(WorkFailed) as error:
                list(iter_batches(images, r.replace(workers=workers), 0, 2, CPU))
            assert "cannot read" in one_line(error) and "train-0" in str(error.value)


# The order


def test_interleaving_is_a_permutation_of_blocks_and_within_them():
    rng = np.random.default_rng(0)
    blocks = Blocks(np.append(0, np.cumsum(rng.integers(1, 9, 40))))
    n = int(blocks.offsets[-1])
    for seed, epoch in [(0, 0), (0, 1), (7, 0)]:
        sequence = interleaved_indices(seed, epoch, blocks, np.arange(n))
        assert sorted(sequence) == list(range(n))
        block = blocks.block_of(sequence)
        assert (
            len(np.flatnonzero(np.diff(block))) == len(blocks) - 1
        )  # each block stands in one piece
        assert (np.diff(block[np.flatnonzero(np.diff(block))]) != 1).any()
        assert (np.diff(sequence)[np.diff(block) == 0] != 1).any()
        some = rng.permutation(n)[:11]
        assert interleaved_indices(seed, epoch, blocks, some).tolist() == sequence[some].tolist()
    orders = [
        tuple(interleaved_indices(*key, blocks, np.arange(n))) for key in [(0, 0), (0, 1), (1, 0)]
    ]
    assert (
        len(set(orders)) == len({tuple(blocks.block_of(np.array(order))) for order in orders}) == 3
    )


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_each_image_is_seen_once_an_epoch(photos, tmp_path, format):
    """By 1, 2 or 3 processes with any number of workers, however the positions are divided."""
    images = open_source(
        write_shards(photos, out=tmp_path / "out", format=format, per_shard=17)
    ).train
    assert len(images.blocks) > 8
    r = recipe(batch_size=7)
    per_epoch = steps_per_epoch(60, 7)
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        whole = np.stack([batch_indices(step, r, images) for step in steps])
        assert max(Counter(whole.ravel().tolist()).values()) == 1 and whole.size == 56
        for shares in ([slice(0, 4), slice(4, 7)], [slice(r, None, 3) for r in range(3)]):
            for mine in shares:
                assert same(
                    np.stack([batch_indices(step, r, images, mine) for step in steps]),
                    whole[:, mine],
                )
        for workers in (0, 2) if epoch else (0,):
            made = list(
                iter_batches(images, r.replace(workers=workers), steps.start, steps.stop, CPU)
            )
            assert same(torch.stack([batch.index for batch in made]), whole)
    assert not same(whole, np.stack([batch_indices(step, r, images) for step in range(per_epoch)]))


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_a_step_is_the_same_whatever_ran_before_and_whoever_makes_it(photos, tmp_path, format):
    """Exact resume in the middle of a shard, bit for bit; a chosen part of the images too."""
    images = open_source(
        write_shards(photos, out=tmp_path / "out", format=format, per_shard=17)
    ).train
    for some in (images, images.take(np.delete(np.arange(60), [3, 30, 31]))):
        straight = list(iter_batches(some, recipe(workers=2), 0, 12, CPU))
        for workers, start in [(0, 5), (3, 10)]:
            for batch in iter_batches(some, recipe(workers=workers), start, 12, CPU):
                known = straight[batch.step]
                assert torch.equal(batch.index, known.index)
                assert all(torch.equal(a, b) for a, b in zip(batch.views, known.views, strict=True))


def test_the_images_of_shards_are_those_of_the_folder_in_a_batch(photos, tmp_path):
    """Shuffled, shards and the folder they were made of are one source to the bit."""
    out = write_shards(photos, out=tmp_path / "out", per_shard=17)
    r = recipe(order="shuffled", workers=0)
    for one, other in zip(
        *(iter_batches(open_source(place).train, r, 0, 9, CPU) for place in (photos, out))
    ):
        assert torch.equal(one.index, other.index) and torch.equal(one.views[1], other.views[1])


@pytest.mark.parametrize("workers", [1, 3])
def test_each_block_is_read_about_once_an_epoch(photos, tmp_path, monkeypatch, workers):
    """By the worker of its positions; by two if a part of the sequence ends inside it."""
    images = open_source(write_shards(photos, out=tmp_path / "out", per_shard=17)).train
    r, read = recipe(batch_size=6), []
    monkeypatch.setattr(
        shards,
        "read_ranges",
        lambda spans, real=shards.read_ranges: read.extend(spans) or real(spans),
    )
    near = [images] * workers
    for step in range(10):
        for worker, mine in enumerate(np.array_split(np.arange(6), workers)):
            index = batch_indices(step, r, images, slice(mine[0], mine[-1] + 1))
            near[worker] = near[worker].prefetch(index)
            assert len(near[worker].storage.loaded_blocks) <= len(mine)
            for i in index:
                near[worker].read(i)
    assert len(images.blocks) <= len(read) <= len(images.blocks) + 6 and len(set(read)) == len(
        images.blocks
    )


def test_a_batch_comes_from_many_blocks():
    """What a sorted set needs: of 512 images, the neighbors in storage are a few, as by chance."""
    blocks = Blocks(np.arange(0, 100_001, 40))

    class Fake:
        def __len__(self):
            return 100_000

    Fake.blocks = blocks
    r, fake = recipe(batch_size=512), Fake()
    distinct = [
        len(set(blocks.block_of(batch_indices(step, r, fake)).tolist()))
        for step in range(0, 195, 10)
    ]
    assert min(distinct) > 480


# Damage, and hostile input


def test_broken_images_are_quarantined_and_replaced(photos, tmp_path):
    for name in ("dog/001.png", "dog/005.png"):
        data = (photos / name).read_bytes()
        (photos / name).write_bytes(data[: len(data) // 2])  # the header is whole
    images = open_source(write_shards(photos, out=tmp_path / "out", per_shard=17)).train
    found = [
        key
        for batch in iter_batches(images, recipe(workers=2), 0, 7, CPU)
        for key, _ in batch.skipped
    ]
    seen = np.concatenate([batch_indices(step, recipe(), images) for step in range(7)])
    expected = [images.keys[i] for i in seen if images.keys[i] in ("dog/001.png", "dog/005.png")]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("cut", [0.5, 0.31, 0.02])
def test_a_truncated_shard_is_one_line_that_says_what_is_lost(photos, tmp_path, cut):
    out = write_shards(photos, out=tmp_path / "out", per_shard=20)
    path = out / "train-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with tarfile.open(
        fileobj=io.BytesIO(data)
    ) as archive:  # by offsets: those that end before the cut
        whole = sum(
            i.name.endswith(".png") and i.offset_data + i.size <= len(data) * cut for i in archive
        )
    source = open_source(out)
    assert len(source.train) == 40 + whole
    (name, first), (again, second) = source.damage
    assert name == again == "train-000001.tar"
    assert "its 20 images" in first and "lost" in first
    assert (
        f"the {whole} images before it" in second
        and "lost" in second
        and "\n" not in first + second
    )
    assert source.notes == tuple(map(": ".join, source.damage))  # every command says its notes
    r = recipe(limit=None, holdout=0, cache_gib=0.0)
    assert prepare_data(r, source).unreadable[:2] == list(source.damage)
    assert all(
        same(source.train.read(i), open_source(photos).train.read(i)) for i in range(20 + whole)
    )


def test_a_shard_cut_after_it_was_cataloged_costs_the_images_behind_the_cut(photos, tmp_path):
    out = write_shards(photos, out=tmp_path / "out", per_shard=20)
    images = open_source(out).train
    os.truncate(out / "train-000002.tar", (out / "train-000002.tar").stat().st_size // 2)
    near = images.prefetch(np.arange(60))
    for reader in (images, near):
        with pytest.raises(Unreadable, match=r"train-000002.tar is damaged here"):
            reader.read(59)
        assert same(reader.read(41), open_source(photos).train.read(41))


def test_what_a_tar_may_not_hold_is_ignored_in_one_line(tmp_path):
    path, png = tmp_path / "set" / "a.tar", encode(picture(1))
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name, kind in [
            ("../up.png", tarfile.REGTYPE),
            ("/etc/abs.png", tarfile.REGTYPE),
            ("x/../../y.png", b"0"),
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("dev.png", tarfile.CHRTYPE),
            ("dir.png", tarfile.DIRTYPE),
            ("notes.txt", tarfile.REGTYPE),
            (".hidden.png", b"0"),
            ("a.b.png", tarfile.REGTYPE),
            ("c\n\x1b[31m.png", tarfile.REGTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = len(png) if kind in (tarfile.REGTYPE, b"0") else 0
            archive.addfile(info, io.BytesIO(png))
    source = open_source(tmp_path / "set")
    assert list(source.train.keys) == [
        "a.tar/etc/abs.png",
        "a.tar/a.b.png",
        "a.tar/c\n\x1b[31m.png",
    ]
    assert source.damage == (
        ("a.tar", "5 links, devices, too large files or paths that lead outside are ignored"),
    )
    assert same(source.train.read(0), picture(1))


@pytest.mark.parametrize("what", ["size", "negative", "long name", "json", "junk", "empty"])
def test_lying_tars_are_one_line(tmp_path, what):
    folder = tmp_path / "set"
    folder.mkdir()
    tarred(
        folder / "a.tar",
        {"1.png": encode(picture(1)), "1.cls": b"7", "2.png": encode(picture(2)), "2.cls": b"9"},
    )
    data = bytearray((folder / "a.tar").read_bytes())
    at = data.index(b"2.png")

    def header(changes):
        for start, text in changes.items():
            data[at + start : at + start + len(text)] = text
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])

    if what == "size":
        header({124: b"77777777777\0"})
    elif what == "negative":
        header({124: b"\xff" * 10 + b"\xf0\x00"})
    elif what == "long name":
        header({124: b"00100000000\0", 156: b"L"})
    elif what == "json":
        tarred(
            folder / "a.tar",
            {
                "1.png": encode(picture(1)),
                "1.json": b"[" * 10**5,
                "3.png": encode(picture(3)),
                "3.json": b'{"path": "\\ud800", "label": "x"}',
                "2.png": b"",
                "2.cls": b"9" * 9999,
            },
        )
        data = bytearray((folder / "a.tar").read_bytes())
    elif what == "junk":
        data = bytearray(os.urandom(99) * 50)
    else:
        data = bytearray()
    (folder / "a.tar").write_bytes(data)
    if what in ("junk", "empty"):
        assert "no image in" in refused(folder) and "damaged" in refused(folder)
        return
    source = open_source(folder)
    assert same(source.train.read(0), picture(1))
    assert what == "json" or (
        len(source.train) == 1 and "what follows is lost" in source.damage[0][1]
    )


def test_splits_take_some_of_the_shards_of_a_catalog(photos, tmp_path, monkeypatch):
    """Without a scan, and as a scan finds them; the others are not lost, however they are."""
    out = write_shards(photos, out=tmp_path / "out", per_shard=20)
    os.truncate(out / "train-000000.tar", 1000)
    for names, classes in [(("train-000001", "train-000002"), 2), (("train-000002",), 0)]:
        splits = [f"train={name}.tar" for name in names]
        with monkeypatch.context() as patch:
            patch.setattr(catalog, "_build_catalog", lambda *_: pytest.fail("it was scanned"))
            found = open_source(out, splits=splits)
        assert len(found.train) == 20 * len(names) and len(found.train.classes) == classes
        assert found.damage == () and "left out: train-000000.tar" in found.notes[0]
        os.rename(out / CATALOG_FILE, tmp_path / CATALOG_FILE)
        os.utime(out / "train-000002.tar", ns=(classes, classes))  # or the cache would do
        scanned = open_source(out, splits=splits)
        is_the_same(found, scanned)
        assert found.only_class == scanned.only_class
        os.rename(tmp_path / CATALOG_FILE, out / CATALOG_FILE)
    (out / "train-000001.tar").unlink()
    os.utime(out / "train-000002.tar", ns=(9, 9))
    assert "train-000001.tar: is not there" in open_source(out, splits=splits).notes[1]


def test_a_lying_catalog_is_not_believed(photos, tmp_path):
    out = write_shards(photos, out=tmp_path / "out", per_shard=20)
    folder, path = open_source(photos), out / CATALOG_FILE
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        found, tables = reader.schema, [pa.table(reader.get_batch(i)) for i in range(3)]
    for n, (column, values) in enumerate(
        [
            ("start", [-1] * 20),
            ("start", [2**50] * 20),
            ("size", [2**40] * 20),
            ("label", [9] * 20),
            ("size", [-5] * 20),
        ]
    ):
        lie = tables[1].set_column(
            found.get_field_index(column), column, pa.array(values, pa.int64())
        )
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, found) as writer:
            for table in (tables[0], lie, tables[2]):
                writer.write_table(table.combine_chunks())
        os.utime(out / "train-000001.tar", ns=(n, n))  # so that what is kept does not count
        source = open_source(out)
        is_the_same(source, folder)
        assert source.damage == ((CATALOG_FILE, "is damaged, and the shards were scanned instead"),)
    path.write_bytes(path.read_bytes()[:-100])
    os.utime(out / "train-000001.tar", ns=(99, 99))
    is_the_same(open_source(out), folder)


def test_damaged_parquet_costs_its_row_group(photos, tmp_path):
    out = write_shards(photos, out=tmp_path / "out", format="parquet", per_shard=30)
    images = open_source(out).train
    path = out / "train-00000-of-00002.parquet"
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36  # the header of the first page
    path.write_bytes(data)
    with pytest.raises(Unreadable, match="row group 0 of train-00000-of-00002"):
        images.read(0)
    assert same(images.prefetch(np.arange(60)).read(59), open_source(photos).train.read(59))
    parquet(out / "train-00002.parquet", [picture(0)], [0], ["x", "y"], image="other")
    assert "other columns or class names" in refused(out)


POOL = pa.proxy_memory_pool(pa.default_memory_pool())  # outlives whatever was allocated from it


def test_a_footer_that_lies_about_rows_or_columns(photos, tmp_path):
    path = (
        write_shards(photos, out=tmp_path / "out", format="parquet")
        / "train-00000-of-00001.parquet"
    )
    images = open_source(path.parent).train
    starts = [np.append(images.storage.locations.starts[0], 60)]  # one more than the row group has
    lying = shards.Shards(
        replace(images.storage.locations, starts=starts, sizes=[np.ones(61, np.int64)])
    )
    for reader in (lying, lying.prefetch(np.arange(61))):
        assert reader.file(59) == images.file(59)
        with pytest.raises(Unreadable, match="rows, and its footer has more"):
            reader.file(60)
    for said in (
        b"\xff",
        b"{",
        b"[" * 10**5,
        b"[]",
        b'{"info": 3}',
        b'{"info": {"features": {"label": {"names": 3}}}}',
    ):
        pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": said}), path)
        assert len(open_source(path.parent).train) == 60


def test_parquet_that_unpacks_to_gigabytes_is_refused_or_read_a_block_at_a_time(
    tmp_path, monkeypatch
):
    """A few bytes: a MiB of zeros with zstd; 300 equal images; a footer with a false row count."""
    monkeypatch.setattr(sources, "MAX_RESIDENT_BYTES", 2**24)
    for name, rows, per_group in [("bomb", 17, 17), ("blocks", 17, 1), ("same", 300, 300)]:
        image = os.urandom(2**20) if name == "same" else bytes(2**20)
        table = pa.table(
            {"image": pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([image]))}
        )
        table = table if name == "same" else table.cast(pa.schema({"image": pa.binary()}))
        how = {
            "use_dictionary": name == "same",
            "dictionary_pagesize_limit": 2**30,
            "row_group_size": per_group,
        }
        pq.write_table(
            table, tmp_path / f"{name}.parquet", compression="zstd", store_schema=False, **how
        )
        assert (tmp_path / f"{name}.parquet").stat().st_size < 2**21
    before = pa.default_memory_pool()
    pa.set_memory_pool(POOL)
    said = refused(tmp_path / "bomb.parquet")
    assert "row group 0 of bomb.parquet, " in said and "unpacks to 17,82" in said
    assert "at most 16,777,216: write it with smaller row groups" in said
    blocks, same_one = (
        open_source(tmp_path / f"{name}.parquet").train for name in ("blocks", "same")
    )
    assert len(blocks.blocks) == 17 and same_one.blocks is None and len(same_one) == 300
    for images in (blocks.prefetch(np.arange(1)), same_one):
        with pytest.raises(Unreadable, match="not one of"):
            images.read(0)
    pa.set_memory_pool(before)
    assert POOL.max_memory() < 2**25
    pq.write_table(
        pa.table({"image": [b""] * 10**5}), tmp_path / "rows.parquet", compression="zstd"
    )
    assert "rows.parquet claims to hold 100,000 rows in" in refused(tmp_path / "rows.parquet")


def test_labels_are_numbers_words_or_folders(tmp_path):
    png = encode(picture(0))
    for name, files, classes, labels in [
        (
            "cls",
            {
                f"{i}.{e}": png if e == "png" else b" %d\n" % label
                for i, label in enumerate((10, 2, 10))
                for e in ("png", "cls")
            },
            ("2", "10"),
            [1, 0, 1],
        ),
        (
            "json",
            {
                f"{i}.{e}": png if e == "png" else json.dumps({"label": label}).encode()
                for i, label in enumerate(("b", "a"))
                for e in ("json", "png")
            },
            ("a", "b"),
            [1, 0],
        ),
        (
            "folders",
            {"dog/1.png": png, "cat/1.png": png, "cat/2.png": png},
            ("cat", "dog"),
            [1, 0, 0],
        ),
        (
            "scalars",
            {
                f"{i}.{e}": png if e == "png" else json.dumps({key: label}).encode()
                for i, (key, label) in enumerate(
                    [("class", 1), ("label", 2.0), ("class", " x "), ("category", True)]
                )
                for e in ("json", "png")
            },
            ("1", "2", "true", "x"),
            [0, 1, 3, 2],
        ),
        ("none", {"1.png": png, "2.png": png, "2.cls": b"1"}, (), None),
    ]:
        (tmp_path / name).mkdir()
        tarred(tmp_path / name / "0.tar", files)
        images = open_source(tmp_path / name).train
        assert images.classes == classes and (
            images.labels is None if labels is None else images.labels.tolist() == labels
        )


def test_hidden_members_do_not_part_the_files_of_a_sample(tmp_path):
    """As macOS writes them between the others; folders pass them over too."""
    files = {}
    for i in range(4):
        files |= {f"._{i}.png": b"x", f"{i}.png": encode(picture(i)), ".cache/x": b"x"}
        files |= {f"._{i}.cls": b"9", f"{i}.cls": b"%d" % (i % 2)}
    source = open_source(tarred(tmp_path / "0.tar", files).parent)
    assert source.train.classes == ("0", "1") and source.train.labels.tolist() == [0, 1, 0, 1]
    assert source.notes == ()


@pytest.mark.parametrize(
    "metadata",
    [
        {"cls": [b"cat\n", b"dog"]},
        {"json": [b'{"label": "cat"}', b'{"label": "dog"}']},
        {"json": [b'{"class": "cat"}', b'{"class": "dog"}'], "txt": [b"a cat", b"a dog"]},
    ],
)
def test_one_tar_in_the_layout_of_webdataset_is_the_folder_of_this_tar(tmp_path, metadata):
    files = {}
    for i in range(4):
        files[f"{i}.png"] = encode(picture(i))
        files |= {f"{i}.{extension}": data[i % 2] for extension, data in metadata.items()}
    path = tarred(tmp_path / "train-0.tar", files)
    one, folder = open_source(path), open_source(tmp_path)
    assert one.train.classes == folder.train.classes == ("cat", "dog")
    assert one.train.labels.tolist() == folder.train.labels.tolist() == [0, 1, 0, 1]
    assert list(one.train.keys) == list(folder.train.keys)


def test_one_tar_of_photographs_is_an_archive(tmp_path):
    """Also with sidecars as a phone's backup writes them."""
    files = {f"{folder}/{i}.png": encode(picture(i)) for folder in ("a", "b") for i in range(2)}
    files |= {f"{name}.json": b'{"title": "x"}' for name in files} | {
        "a/0.txt": b"x",
        "a/1.json": b"{}",
    }
    images = open_source(tarred(tmp_path / "photos.tar", files)).train
    assert list(images.keys) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert images.classes == ("a", "b")


def test_tars_beside_photographs_are_no_shards(photos, tmp_path):
    tarred(photos / "backup.tar", {"1.png": b""})
    assert len(open_source(photos).train) == 60 and open_source(photos).train.blocks is None


# With the rest of the house


def test_inspect_and_pretrain_take_shards(photos, tmp_path):
    out = write_shards(photos, out=tmp_path / "out", per_shard=17)
    index = load_index([out], open_source(out))
    assert (
        index.table["bytes"].to_pylist()
        == load_index([photos], open_source(photos)).table["bytes"].to_pylist()
    )
    assert index.table["digest"].equals(load_index([photos], open_source(photos)).table["digest"])
    words = {
        "backbone": "resnet10",
        "width": 4,
        "dim": 16,
        "proj_hidden": 16,
        "pred_dim": 4,
        "image_size": 16,
        "batch_size": 8,
        "epochs": 1,
        "knn_every": 9,
        "holdout": 0,
        "workers": 2,
    }
    run = pretrain(out, out=tmp_path / "run", **words)
    assert json.loads((run / "summary.json").read_text())["steps"] == 7


def test_a_part_that_a_worker_of_a_killed_process_finishes_meanwhile_is_no_error(
    tmp_path, monkeypatch
):
    """Workers outlive a killed process: the part is gone between the listing and the deletion."""
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: [self / "x.tar.1.part"])
    (tmp_path / "job.json").write_text('{\n  "a": 1\n}')
    start_or_continue_job(tmp_path, {"a": 1})
