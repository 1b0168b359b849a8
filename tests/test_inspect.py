"""The index agrees with decoding and inspects no file twice; `inspect` accepts any packing."""

import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from hashlib import blake2b
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY
from PIL import Image

from simsiam.config.recipes import Recipe
from simsiam.data.decode import Unreadable
from simsiam.data.images import from_arrays
from simsiam.errors import UsageError, WorkFailed
from simsiam.sources import file_index as module
from simsiam.sources.file_index import INSPECTION_SCHEMA, inspect_images, load_index
from simsiam.sources.open_source import Source, open_source
from simsiam.training import inspect as verb
from simsiam.training import speed as speed_module
from simsiam.training.plan import plan
from simsiam.utils.files import atomic_write

inspect = verb.inspect
SPEED = {"prepared": 0.001, "trained": 0.01, "gpu": False, "device": "a machine", "load": 0.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture
def quick(monkeypatch):
    """Training is not timed: the numbers are given."""
    monkeypatch.setattr(
        speed_module, "measure_speed", lambda recipe, images, *, resident: dict(SPEED)
    )


def encode(seed=0, kind="PNG", size=(12, 8), mode="RGB", **options):
    """The bytes of a picture, drawn from the seed; size is (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def write(root, files):
    for name, data in files.items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    return root


def indexed(root, channels=3):
    return load_index([root], open_source([root], channels), channels).table


def array(values, **how):
    file = BytesIO()
    np.save(file, values, **how)
    return file.getvalue()


def bomb():
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def odd_files():
    """Good files of every kind, and broken ones: their names say which."""
    jpeg, png, size = encode(1, "JPEG", size=(64, 64)), encode(2, size=(64, 64)), (40, 40)
    good = {
        "plain.jpg": jpeg,
        "plain.png": png,
        "gray.jpg": encode(3, "JPEG", mode="L"),
        "cmyk.jpg": encode(4, "JPEG", mode="CMYK"),
        "palette.png": encode(5, mode="P"),
        "alpha.png": encode(6, mode="RGBA"),
        "deep.png": encode(7, mode="I;16"),
        "bits.png": encode(8, mode="1"),
        "progressive.jpg": encode(9, "JPEG", progressive=True),
        "frames.gif": encode(10, "GIF"),
        "new.webp": encode(11, "WEBP"),
        "old.bmp": encode(12, "BMP"),
        "scan.tif": encode(13, "TIFF"),
        "raw.ppm": encode(14, "PPM"),
        "lies.jpg": encode(15),
        "lies.PNG": encode(16, "JPEG"),
        "camera.jpg": jpeg + bytes(100),
        "padded.png": png + b"\n",
        "nine.npy": array(np.ones((9, 9, 3), np.uint8)),
        "thumbnail.jpg": encode(17, "JPEG", exif=b"Exif\0\0" + encode(18, "JPEG")),
    }
    broken = {
        "empty.jpg": b"",
        "page.jpg": b"<html>404</html>",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "almost.jpg": jpeg[:-300],
        "half.png": png[: len(png) // 2],
        "header.png": png[:33],
        "bomb.png": bomb(),
        "no pixels.png": png[:33] + png[-12:-4],
        "half.gif": encode(20, "GIF", size=size)[:-900],
        "half.bmp": encode(21, "BMP", size=size)[:-99],
        "half.webp": encode(22, "WEBP", size=size)[:200],
        "half.tif": encode(23, "TIFF", size=size)[:300],
        "half.ppm": encode(24, "PPM", size=size)[:-99],
        "short.npy": array(np.ones((9, 9, 3), np.uint8))[:-1],
        "object.npy": array(np.array([{}]), allow_pickle=True),
        "floats.npy": array(np.full((9, 9, 3), 7.5)),
        "five.npy": array(np.ones((9, 9, 5), np.uint8)),
    }
    return {f"good {name}": data for name, data in good.items()} | {
        f"bad {name}": data for name, data in broken.items()
    }


def pets():
    """Two splits with classes; a occurs three times, b in both splits, and two files are empty."""
    a, b = encode(100, "JPEG"), encode(101)
    files = {
        f"train/{'cat' if i % 3 else 'dog'}/{i}.jpg": encode(i, "JPEG", (20 + i, 40))
        for i in range(20)
    }
    files |= {
        "train/cat/a.jpg": a,
        "train/cat/a again.jpg": a,
        "train/dog/a.png": a,
        "train/dog/b.png": b,
    }
    files |= {
        "val/dog/b.png": b,
        "val/cat/0.png": encode(102),
        "train/cat/e1.jpg": b"",
        "train/cat/e2.jpg": b"",
    }
    return files


# --- the index ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_file_is_readable_if_and_only_if_it_decodes(tmp_path, channels):
    root = write(tmp_path / "odd", odd_files())
    (root / "bad link.png").symlink_to(tmp_path / "nowhere")
    images = open_source([root], channels).train
    table = indexed(root, channels)
    assert [os.fsdecode(key) for key in table["key"].to_pylist()] == list(images.keys)
    for i, (reason, height, width) in enumerate(
        zip(*(table[c].to_pylist() for c in ("reason", "height", "width")))
    ):
        try:
            assert (height, width) == images.read(i).shape[:2] and reason == "", images.keys[i]
        except Unreadable as error:
            assert reason == str(error), images.keys[i]
    if channels == 3:
        assert [
            key for key, reason in zip(images.keys, table["reason"].to_pylist()) if reason
        ] == sorted(key for key in images.keys if key.startswith("bad"))


def test_names_that_lie_are_told_and_others_are_not(tmp_path):
    table = indexed(write(tmp_path / "odd", odd_files()))
    liars = table.filter(table["misnamed"])
    assert liars["key"].to_pylist() == [b"good lies.PNG", b"good lies.jpg"]
    assert liars["format"].to_pylist() == ["JPEG", "PNG"]


def test_what_has_not_changed_is_not_looked_at_again(tmp_path, cache, monkeypatch):
    root = write(tmp_path / "pets", pets())
    seen = []
    monkeypatch.setattr(
        module,
        "inspect_images",
        lambda images, rows: (
            seen.extend(images.keys[i] for i in rows) or inspect_images(images, rows)
        ),
    )
    first = load_index([root], open_source(root))
    assert sorted(seen) == sorted(pets())
    broken = ["train/cat/e1.jpg", "train/cat/e2.jpg"]  # looked at every time: a reason may pass
    first.get_or_measure("something measured", lambda: 42)

    seen.clear()
    again = load_index([root], open_source(root))
    assert (
        seen == broken
        and again.table.equals(first.table)
        and again.facts == {"something measured": 42}
    )

    (root / "train/dog/0.jpg").rename(root / "train/dog/zero.jpg")  # gone, and come
    write(root, {"val/dog/new.png": encode(200)})
    before = (root / "train/dog/3.jpg").stat()
    write(root, {"train/dog/3.jpg": encode(3, "JPEG", (23, 40))})  # the same bytes, at another time
    write(
        root, {"train/dog/6.jpg": (root / "train/dog/6.jpg").read_bytes() + b"x"}
    )  # the same time, another size
    os.utime(root / "train/dog/3.jpg", ns=(0, before.st_mtime_ns + 1))
    os.utime(
        root / "train/dog/6.jpg",
        ns=(
            0,
            int(first.table["mtime"][first.table["key"].index(b"train/dog/6.jpg").as_py()].as_py()),
        ),
    )
    seen.clear()
    changed = load_index([root], open_source(root))
    assert sorted(seen) == sorted(
        [*broken, "train/dog/zero.jpg", "val/dog/new.png", "train/dog/3.jpg", "train/dog/6.jpg"]
    )
    assert changed.facts == {}

    for file in cache.iterdir():
        file.unlink()
    assert changed.table.equals(indexed(root)), "what is pieced together is what is made anew"
    assert len(list(cache.iterdir())) == 1, "nothing else is left in the cache"


def test_channels_and_orders_have_an_index_of_their_own(tmp_path):
    write(tmp_path, {"a.png": encode(1), "b.png": encode(2)})
    for order in (["a.png", "b.png"], ["b.png", "a.png"], ["b.png"]):
        (tmp_path / "list.txt").write_text("\n".join(order))
        assert indexed(tmp_path / "list.txt")["key"].to_pylist() == [
            name.encode() for name in order
        ]
    assert indexed(tmp_path / "list.txt", 5)["reason"].to_pylist() != [""]
    assert indexed(tmp_path / "list.txt", 3)["reason"].to_pylist() == [""]


def test_many_processes_see_what_one_sees(tmp_path, monkeypatch, cache):
    root = write(tmp_path / "pets", pets())
    one = indexed(root)
    (next(cache.iterdir())).unlink()
    monkeypatch.setattr(module, "INSPECTION_CHUNK", 3)
    monkeypatch.setattr("simsiam.data.storage.STATUS_CHUNK", 5)
    monkeypatch.setattr("simsiam.utils.workers.CPU_CORES", 3)
    assert indexed(root).equals(one)


@pytest.mark.skipif(
    sys.platform != "linux", reason="the test's own `look` reaches only forked processes"
)
def test_a_killed_process_is_one_line_and_what_was_seen_is_kept(tmp_path, monkeypatch):
    root = write(tmp_path / "many", {f"{i:02}.png": encode(i) for i in range(40)})
    monkeypatch.setattr(module, "INSPECTION_CHUNK", 4)
    with monkeypatch.context() as patch:
        patch.setattr(
            module,
            "inspect_images",
            lambda images, rows: os._exit(9) if 22 in rows else inspect_images(images, rows),
        )
        with pytest.raises(WorkFailed, match="killed"):
            indexed(root)
    seen = []
    monkeypatch.setattr(
        module,
        "_inspect_rows",
        lambda parts, rows: seen.extend(rows) or [inspect_images(parts[0], rows)],
    )
    assert (
        indexed(root)["digest"].to_pylist()
        == inspect_images(open_source(root).train, np.arange(40))["digest"].to_pylist()
    )
    assert seen == list(range(20, 40))


def test_a_damaged_or_foreign_cache_is_rebuilt(tmp_path, cache):
    root = write(tmp_path / "pets", pets())
    whole = indexed(root)
    file = next(cache.iterdir())
    data = file.read_bytes()
    other = BytesIO()
    with pa.ipc.new_file(other, INSPECTION_SCHEMA) as writer:
        writer.write_table(INSPECTION_SCHEMA.empty_table())
    for damaged in (
        b"",
        b"ARROW1",
        data[:100],
        data[: len(data) // 2],
        data[:-8],
        bytes(len(data)),
        other.getvalue(),
    ):
        file.write_bytes(damaged)
        assert indexed(root).equals(whole)
        assert file.read_bytes() == data
    rng = np.random.default_rng(0)
    for at in rng.integers(len(data), size=60):
        file.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        assert len(indexed(root)) == len(whole)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    root = write(tmp_path / "pets", pets())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "file"))
    index = load_index([root], open_source(root))
    assert len(index.table) == len(pets()) and index.get_or_measure("x", lambda: 1) == 1


def test_the_cache_is_where_the_user_wants_it(tmp_path, monkeypatch):
    root = write(tmp_path / "pets", pets())
    monkeypatch.delenv("SIMSIAM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    indexed(root)
    monkeypatch.delenv("XDG_CACHE_HOME")
    indexed(root)
    for place in ("xdg/simsiam/index", "home/.cache/simsiam/index"):
        assert [path.suffix for path in (tmp_path / place).iterdir()] == [".arrow"]


# --- the facts ------------------------------------------------------------------------------------


def packed(tmp_path):
    """The pets as a folder, a zip, a tar and Parquet."""
    files = dict(sorted(pets().items()))
    yield write(tmp_path / "pets", files)
    with zipfile.ZipFile(tmp_path / "pets.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    yield tmp_path / "pets.zip"
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    yield tmp_path / "pets.tar"
    metadata = {
        "info": {
            "features": {
                "image": {"_type": "Image"},
                "label": {"_type": "ClassLabel", "names": ["cat", "dog"]},
            }
        }
    }
    (tmp_path / "rows").mkdir()
    for split in ("train", "val"):
        part = {name: data for name, data in files.items() if name.startswith(split)}
        table = pa.table(
            {"image": list(part.values()), "label": [int("dog" in name) for name in part]}
        )
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(metadata)}),
            tmp_path / "rows" / f"{split}.parquet",
        )
    yield tmp_path / "rows"


def test_the_facts_do_not_depend_on_how_images_are_packed(tmp_path, quick):
    folder, *others = packed(tmp_path)
    expected = inspect(folder)
    for source in others:
        facts = inspect([source])
        if source.is_dir():  # rows of Parquet have numbers instead of names, so none is misnamed
            expected["formats"]["misnamed"] = []
            for split in ("train", "val"):
                for i, name in enumerate(name for name in sorted(pets()) if name.startswith(split)):
                    expected = json.loads(
                        json.dumps(expected).replace(f'"{name}"', f'"{split}#{i}"')
                    )
        assert facts | {"source": "", "notes": []} == expected | {"source": "", "notes": []}


def test_another_archive_of_the_same_name_is_noticed(tmp_path):
    path = tmp_path / "x.zip"
    for time, extra, seeds in (
        (1, "", (1, 2)),
        (2, "", (3, 4)),
        (2, "longer", (5, 6)),
    ):  # a later time, or a larger file
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("notes.txt", extra)
            for i, seed in enumerate(seeds):
                archive.writestr(
                    f"{i}.bmp", encode(seed, "BMP")
                )  # the same number of bytes for any seed
        os.utime(path, (time, time))
        assert (
            indexed(path)["digest"].to_pylist()
            == inspect_images(open_source(path).train, np.arange(2))["digest"].to_pylist()
        )


def test_copies_are_found_within_and_across_splits(tmp_path, quick):
    facts = inspect(write(tmp_path / "pets", pets()))
    assert facts["duplicates"] == {
        "copies": 3,
        "groups": [
            ["train/cat/a again.jpg", "train/cat/a.jpg", "train/dog/a.png"],
            ["train/dog/b.png", "val/dog/b.png"],
        ],
        "shared": [["train", "val", 1]],
    }  # two empty files are not copies of an image
    assert facts["formats"]["misnamed"] == [["train/dog/a.png", "JPEG"]]


def test_counts_sizes_and_labels(tmp_path, quick):
    files = pets()
    facts = inspect(write(tmp_path / "pets", files))
    assert facts["images"] == {
        "count": 28,
        "bytes": sum(map(len, files.values())),
        "splits": {"train": 26, "val": 2},
    }
    good = [Image.open(BytesIO(data)) for data in files.values() if data]
    shorter, longer = (np.array([side(image.size) for image in good]) for side in (min, max))
    assert facts["sizes"]["shorter_side"] == [min(shorter), int(np.median(shorter)), max(shorter)]
    assert (
        facts["sizes"]["longer_to_shorter"][2] == round(max(longer / shorter), 2)
        and facts["sizes"]["all"] is None
    )
    assert facts["formats"]["counts"] == {
        kind: sum(image.format == kind for image in good) for kind in ("JPEG", "PNG")
    }
    cats = sum(name.startswith("train/cat") for name in files)
    assert facts["labels"] == {
        "splits": ["train", "val"],
        "counted_in": "train",
        "classes": {"cat": cats, "dog": 26 - cats},
    }
    same = inspect(write(tmp_path / "same", {f"{i}.png": encode(i) for i in range(20)}))
    assert (
        same["sizes"]["all"] == [8, 12]
        and same["labels"] == {}
        and same["unreadable"] == {"files": []}
    )


def test_colors_are_those_of_the_pixels(tmp_path, quick):
    root = write(tmp_path / "small", {f"{i}.png": encode(i, size=(32, 32)) for i in range(30)})
    pixels = np.stack([np.asarray(Image.open(path)) for path in root.iterdir()]) / 255
    colors = inspect(root)["colors"]
    assert colors["measured"]
    assert np.allclose(colors["mean"], pixels.mean((0, 1, 2)), atol=1e-4)
    assert np.allclose(colors["std"], pixels.std((0, 1, 2)), atol=1e-4)


def test_the_time_is_that_of_all_epochs(tmp_path, monkeypatch):
    root = write(
        tmp_path / "small",
        {f"{i:02}.png": encode(i, size=(32, 32)) for i in range(37)} | {"bad.png": b""},
    )
    write(root, {"other.png": encode(size=(32, 33))})  # two sizes: not kept in memory
    for gpu, resident, expected in (
        (False, True, 0.001 + 0.01),
        (True, True, 0.001 + 0.01),
        (False, False, 0.001 / 4 + 0.01),
        (True, False, 0.01),
    ):
        (root / "other.png").unlink() if resident and (root / "other.png").exists() else None
        if not resident:
            write(root, {"other.png": encode(size=(32, 33))})

        def speed(recipe, images, *, resident, gpu=gpu, expected=resident):
            assert (
                resident == expected
                and recipe.batch_size == 16
                and "bad.png" not in list(images.keys)
            )
            return SPEED | {"gpu": gpu}

        monkeypatch.setattr(speed_module, "measure_speed", speed)
        monkeypatch.setattr(verb, "CPU_CORES", 4)
        # A measurement on another machine is not used.
        monkeypatch.setattr(speed_module.platform, "node", lambda gpu=gpu: str(gpu))
        time = inspect(root)["time"]
        assert time["images_per_epoch"] == 32 and time["epochs"] == 200
        assert time["seconds"] == pytest.approx(32 * 200 * expected, rel=1e-3)
        monkeypatch.setattr(speed_module, "measure_speed", None)
        assert inspect(root)["time"] == time, "the speed is measured once"


def test_the_time_leaves_out_labeled_images_that_are_held_out(tmp_path, monkeypatch):
    """Of 34 images 3 are not trained on: one batch of 16 an epoch, not two."""
    files = {f"{kind}/{i}.png": encode(i, size=(32, 32)) for kind in "ab" for i in range(17)}
    monkeypatch.setattr(speed_module, "measure_speed", lambda *a, **k: SPEED)
    folder = write(tmp_path / "photos", files)
    assert inspect(folder)["time"]["images_per_epoch"] == 16
    assert inspect(folder, no_labels=True)["time"]["images_per_epoch"] == 32


def test_a_measurement_on_a_busy_machine_is_said_and_made_again(tmp_path, monkeypatch, capsys):
    files = {f"{i}.png": encode(i, size=(32, 32)) for i in range(40)}
    folder, loads = write(tmp_path / "photos", files), [1.5, 0.1, 0.9]
    monkeypatch.setattr(
        speed_module, "measure_speed", lambda *a, **k: SPEED | {"load": loads.pop(0)}
    )
    for busy in (True, False, False):
        assert (inspect(folder)["time"]["load"] > 0.5) == busy
        assert ("the machine was busy" in capsys.readouterr().out) == busy
    assert loads == [0.9]  # the second measurement is kept
    plan(folder)  # and used
    assert loads == [0.9]


@pytest.mark.parametrize("resident", [True, False])
def test_the_speed_is_measured_with_real_steps(tmp_path, resident):
    images = open_source(
        write(tmp_path / "small", {f"{i}.png": encode(i, size=(32, 32)) for i in range(40)})
    ).train
    recipe = Recipe().replace(**TINY | {"image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3})
    speed = speed_module.measure_speed(recipe, images, resident=resident)
    assert 0 < speed["prepared"] < 10 and 0 < speed["trained"] < 10 and speed["device"]


def test_images_that_cannot_be_trained_on_are_described(tmp_path, capsys, monkeypatch, quick):
    import torch

    facts = inspect(write(tmp_path / "few", {f"{i}.png": encode(i) for i in range(5)}))
    assert "5 readable images" in facts["time"]["unknown"] and facts["colors"]
    facts = inspect(write(tmp_path / "none", {f"{i}.png": b"" for i in range(20)}))
    assert "can be read" in facts["time"]["unknown"] and len(facts["unreadable"]["files"]) == 20
    assert (
        facts["sizes"] == {}
        and facts["formats"]["counts"] == {}
        and facts["duplicates"]["copies"] == 0
    )

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.undo()
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("simsiam.data.batches.make_training_views", full)
    facts = inspect(write(tmp_path / "many", {f"{i}.png": encode(i) for i in range(20)}))
    assert "batches of 16 do not fit" in facts["time"]["unknown"]
    assert capsys.readouterr().out.count("unknown: ") == 4  # three times, and the sizes of no image


# --- the facts as text ----------------------------------------------------------------------------


def test_text_and_json_agree_in_80_columns(tmp_path, capsys, quick):
    hostile = os.fsdecode(b"train/cat/caf\xe9 \x1b[31m\n" + b"long" * 30 + b".png")
    root = write(
        tmp_path / "pets", pets() | {hostile: b"", "train/dog/two-\twords.jpg": encode(300)}
    )
    facts = inspect(root, out=tmp_path / "facts.json")
    text = capsys.readouterr().out
    assert json.loads((tmp_path / "facts.json").read_text()) == facts
    assert text.isprintable() is False and all(
        line.isprintable() and len(line) <= 80 for line in text.splitlines()
    )

    printed, name = {}, ""
    for line in text.splitlines():  # the first column has the names of the facts
        name = line[:12].strip() or name
        printed[name] = f"{printed.get(name, '')} {line[12:].strip()}".strip()
    assert list(printed) == list(facts)[2:]  # not the source and the notes
    least, median, most = facts["sizes"]["shorter_side"]
    (few, many), device = (
        sorted(facts["labels"]["classes"].items(), key=lambda pair: pair[1]),
        facts["time"]["device"],
    )
    expected = {
        "images": [f"{facts['images']['count']} in", "28 train, 2 val"],
        "sizes": [f"{least} to {most} px, median {median}"],
        "formats": [
            "JPEG",
            "PNG",
            "2 files with the extension of another format",
            "a.png is JPEG",
            r"two-\twords.jpg is PNG",
        ],
        "labels": [
            "2 classes, in train and val: cat, dog",
            f"{few[1]} ({few[0]}) to {many[1]} ({many[0]})",
        ],
        "duplicates": [
            "3 copies",
            "train/dog/b.png = val/dog/b.png",
            "groups with files in both train and val: 1",
        ],
        "unreadable": ["3 files", r"caf\udce9 \x1b[31m\nlong", "e1.jpg: an empty file"],
        "recipe": [facts["recipe"]["chosen"], *facts["recipe"]["because"]],
        "colors": [f"{value:.4f}" for value in facts["colors"]["mean"] + facts["colors"]["std"]],
        "time": [
            f"{facts['time']['epochs']} epochs of {facts['time']['images_per_epoch']} images",
            f"on {device}",
        ],
    }
    for name, parts in expected.items():
        for part in parts:
            assert part in printed[name], (name, part)


def test_a_long_list_of_problems_is_cut_short(tmp_path, capsys, quick):
    inspect(
        write(
            tmp_path / "bad",
            {f"{i:02}.png": b"" for i in range(12)} | {f"{i}.jpg": encode(1) for i in range(9)},
        )
    )
    text = capsys.readouterr().out
    assert "00.png: an empty file" in text and "03.png" not in text and "and 9 more" in text
    assert "0.jpg = 1.jpg = 2.jpg = 6 more" in " ".join(text.split())


def test_pixels_and_published_colors(tmp_path, capsys, monkeypatch, quick):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 3, 32, 32), dtype=np.uint8)
    pixels[3] = pixels[50]
    parts = (
        from_arrays("train", pixels[:50], np.arange(50) % 2, "ab"),
        None,
        from_arrays("test", pixels[50:]),
    )
    monkeypatch.setattr(verb, "open_source", lambda *_, **__: Source("cifar10", *parts))
    for _ in range(2):
        facts = inspect("cifar10")
        assert facts["duplicates"]["shared"] == [["train", "test", 1]]
        assert facts["images"] == {
            "count": 70,
            "bytes": pixels.nbytes,
            "splits": {"train": 50, "test": 20},
        }
        assert facts["sizes"]["all"] == [32, 32] and facts["labels"]["splits"] == ["train"]
        assert facts["duplicates"]["groups"] == [["train#3", "test#0"]]
        assert (
            facts["colors"]["mean"] == [0.4914, 0.4822, 0.4465] and not facts["colors"]["measured"]
        )
        text = capsys.readouterr().out
        assert "70 decoded images" in text and "as published" in text
        pixels[7] = 0  # another version of a program may draw other images
    black = load_index(["cifar10"], Source("cifar10", *parts)).table["digest"][7].as_py()
    assert black == blake2b(bytes(3 * 32 * 32), digest_size=16).digest()


def test_wrong_requests_are_one_line(tmp_path):
    write(tmp_path, {"a.png": encode()})
    for out in (tmp_path, tmp_path / "nowhere" / "facts.json"):
        with pytest.raises(UsageError, match="--out"):
            inspect(tmp_path, out=out)
    with pytest.raises(UsageError, match="channels is 0"):
        inspect(tmp_path, channels=0)


def test_a_second_inspect_loads_no_torch_and_prints_the_same(tmp_path, capsys, quick):
    root = write(tmp_path / "pets", pets() | {"train/cat/\u732b.jpg": b""})
    inspect(root)
    first = capsys.readouterr().out
    code = (
        "import sys; from simsiam.training.inspect import inspect; inspect(sys.argv[1]); "
        "assert 'torch' not in sys.modules"
    )
    # What a terminal cannot show is escaped.
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout == first.encode("ascii", "backslashreplace").decode()
        and r"\u732b" in done.stdout
    )


def test_a_file_is_complete_or_unchanged(tmp_path):
    path = tmp_path / "facts.json"
    with atomic_write(path) as part:
        part.write_text("all")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomic_write(path) as part:
        part.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "all" and list(tmp_path.iterdir()) == [path]


def test_a_long_training_names_shorter_ways():
    facts = {"epochs": 200, "images_per_epoch": 1472, "device": "2 cores", "load": 0.0}
    rates = dict.fromkeys(("images_per_second", "prepared_per_second", "trained_per_second"), 2.0)
    long, short = (
        verb.FACT_FORMATTERS["time"](facts | rates | {"seconds": seconds})
        for seconds in (44 * 3600, 2 * 3600)
    )
    assert any("simsiam adapt" in line for line in long) and len(short) == len(long) - 2
    assert all(len(line) <= 68 for line in long)  # beside the name of the fact, of 80 columns
