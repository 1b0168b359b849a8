"""Whatever the source, image i is the same RGB picture with the same label, and a broken file costs only itself."""

import importlib.util
import json
import os
import pickle
import struct
import warnings
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from simsiam import images as module
from simsiam.errors import UsageError, WorkFailed
from simsiam.images import Images, Unreadable, hold_out, in_memory, measure_sizes, open_source, spread

DATA = Path(__file__).parents[2] / "shared" / "data"


def picture(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(array, kind="PNG", **options):
    file = BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(file, kind, **options)
    return file.getvalue()


def tree(root, *paths, size=(8, 8)):
    """Write a PNG at each path, the i-th one drawn from seed i."""
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encode(picture(i, *size)))
    return root


def one(tmp_path, data, name="image.png"):
    """The images of a folder that holds one file."""
    (tmp_path / name).write_bytes(data)
    return open_source(tmp_path).train


def parquet(path, arrays, labels=None, names=None, layout="struct", image="image", label="label"):
    blobs = [encode(array) if isinstance(array, np.ndarray) else array for array in arrays]
    if layout == "struct":
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        column = pa.array([{"bytes": blob, "path": None} for blob in blobs], kind)
    else:
        column = pa.array(blobs, pa.binary())
    table = pa.table({"caption": ["?"] * len(blobs), image: column})
    features = {image: {"_type": "Image"}, "caption": {"_type": "Value"}}
    if labels is not None:
        table = table.append_column(label, pa.array(labels, pa.int64()))
        features[label] = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value"}
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


# Names


def test_a_wrong_source_is_one_line_with_a_hint(tmp_path):
    with pytest.raises(UsageError) as error:
        open_source("cifra10")
    assert "did you mean 'cifar10'" in one_line(error)
    with pytest.raises(UsageError) as error:
        open_source(tmp_path / "no\nwhere")
    assert "a folder of images" in one_line(error) and "Parquet" in one_line(error)
    with pytest.raises(UsageError):
        open_source("")
    (tmp_path / "one.png").write_bytes(encode(picture(0)))
    with pytest.raises(UsageError) as error:
        open_source(tmp_path / "one.png")
    assert "is one file: give a folder" in one_line(error)


@pytest.mark.skipif(importlib.util.find_spec("simsiam.shapes") is None, reason="simsiam.shapes is not there yet")
def test_shapes():
    source = open_source("shapes")
    assert source.name == "shapes"
    for split in (source.train, source.val, source.test):
        assert split.pixels.shape == (len(split), 3, 32, 32) and split.pixels.dtype == torch.uint8
        assert split.labels.dtype == np.int64 and len(split.labels) == len(split)
        assert set(split.labels.tolist()) == set(range(len(split.classes)))
    assert source.val.keys[3] == "val#3"


def test_no_network_is_one_line_that_says_what_else_to_give(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("Temporary failure\nin name resolution")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setenv("SIMSIAM_DATA", str(tmp_path / "data"))
    for name in ("cifar10", "cifar100", "stl10"):
        with pytest.raises(WorkFailed) as error:
            open_source(name)
        line = one_line(error)
        assert name in line and str(tmp_path / "data") in line and "Temporary failure in name" in line
        assert "local Parquet file or a folder" in line


def test_torchvision_arrays_become_channels_first(tmp_path, monkeypatch):
    class Cifar:
        def __init__(self, root, train, download):
            assert root == str(tmp_path) and download
            self.data = np.stack([picture(i) for i in range(4 if train else 2)])
            self.targets, self.classes = [1, 0, 1, 0][: len(self.data)], ["cat", "dog"]

    class Stl:
        def __init__(self, root, split, download):
            self.data = np.stack([picture(i) for i in range(3)]).transpose(0, 3, 1, 2)
            self.labels = np.full(3, -1) if split == "unlabeled" else np.array([0, 1, 1], np.uint8)
            self.classes = ["cat", "dog"]

    monkeypatch.setenv("SIMSIAM_DATA", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Cifar)
    monkeypatch.setattr("torchvision.datasets.STL10", Stl)

    cifar = open_source("cifar10")
    assert (len(cifar.train), cifar.val, len(cifar.test)) == (4, None, 2)
    assert cifar.train.labels.tolist() == [1, 0, 1, 0] and cifar.train.classes == ("cat", "dog")
    stl = open_source("stl10")
    assert stl.train.labels is None and stl.train.classes == () and stl.val.labels.tolist() == [0, 1, 1]
    for split in (cifar.train, cifar.test, stl.train, stl.val, stl.test):
        assert all(same(split.read(i), picture(i)) for i in range(len(split)))
        assert split.size(0) == (8, 8)


# Folders


def test_a_flat_folder_has_no_labels_and_a_bytewise_order(tmp_path):
    names = ["b.png", "B.PNG", "a/z.png", "a-.png", "é.png", "a.JPeG"]
    tree(tmp_path / "My photos!", *names)
    source = open_source(tmp_path / "My photos!")
    assert source.name == "My-photos"
    assert (
        list(source.train.keys)
        == sorted(names, key=str.encode)
        == ["B.PNG", "a-.png", "a.JPeG", "a/z.png", *names[::4]]
    )
    assert source.train.labels is None and source.train.classes == () and source.val is None and source.test is None
    for i, name in enumerate(source.train.keys):
        assert same(source.train.read(i), picture(names.index(name)))


def test_first_level_folders_are_the_classes(tmp_path):
    tree(tmp_path, "dog/deep/1.png", "cat/2.png", "cat/1.png", "ant/x/y/1.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no image")
    images = open_source(tmp_path).train
    assert images.classes == ("ant", "cat", "dog") and images.labels.tolist() == [0, 1, 1, 2]
    assert images.labels.dtype == np.int64
    tree(tmp_path, "stray.png")  # one image outside of every class, and there are no classes
    assert open_source(tmp_path).train.labels is None


def test_one_folder_is_no_class(tmp_path):
    assert open_source(tree(tmp_path, "all/1.png", "all/2.png")).train.labels is None


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_splits_share_the_classes_of_train(tmp_path, val):
    tree(
        tmp_path,
        "train/cat/1.png",
        "train/dog/1.png",
        "train/emu/1.png",
        f"{val}/dog/1.png",
        "test/1.png",
        "misc/1.png",
    )
    source = open_source(tmp_path)
    assert list(source.train.keys) == ["train/cat/1.png", "train/dog/1.png", "train/emu/1.png"]
    assert list(source.val.keys) == [f"{val}/dog/1.png"]
    assert source.val.labels.tolist() == [1] and source.val.classes == source.train.classes == ("cat", "dog", "emu")
    assert source.test.labels is None and same(source.test.read(0), picture(4))


def test_a_class_that_train_lacks_is_one_line(tmp_path):
    tree(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/dogs/1.png")
    with pytest.raises(UsageError) as error:
        open_source(tmp_path)
    assert "val" in one_line(error) and "'dogs'" in one_line(error) and "did you mean 'dog'" in one_line(error)


def test_without_train_everything_is_train(tmp_path):
    source = open_source(tree(tmp_path, "val/1.png", "test/1.png"))
    assert source.train.classes == ("test", "val") and source.test is None


def test_hidden_names_are_skipped(tmp_path):
    tree(tmp_path, "a/1.png", "a/.2.png", ".b/3.png", "c/._1.png", "c/1.png")
    assert list(open_source(tmp_path).train.keys) == ["a/1.png", "c/1.png"]


def test_links_are_followed_and_loops_end(tmp_path):
    tree(tmp_path, "elsewhere/2.png", "photos/dog/1.png")
    photos = tmp_path / "photos"
    (photos / "cat").symlink_to(tmp_path / "elsewhere")
    (photos / "dog" / "up").symlink_to(photos)
    (photos / "dog" / "self").symlink_to(photos / "dog" / "self")
    (photos / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    images = open_source(photos).train
    assert list(images.keys) == ["cat/2.png", "dog/1.png", "dog/gone.png"] and images.labels.tolist() == [0, 1, 1]
    with pytest.raises(Unreadable, match=r"^No such file or directory$"):
        images.read(2)


def test_a_folder_without_an_image_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="no image in"):
        open_source(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "jpg").write_text("")
    with pytest.raises(UsageError) as error:
        open_source(tmp_path)
    assert ".jpg" in one_line(error)
    tree(tmp_path, "train/1.png")
    (tmp_path / "val").mkdir()
    with pytest.raises(UsageError, match=r"no image in .*val"):
        open_source(tmp_path)


def test_a_file_name_that_is_not_utf8_is_one_line(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    with pytest.raises(UsageError) as error:
        open_source(tmp_path)
    assert r"caf\xe9" in one_line(error) and "rename" in one_line(error)


# Parquet


@pytest.mark.parametrize("layout", ["struct", "binary"])
def test_parquet_shards_are_one_split_in_name_order(tmp_path, layout):
    for shard in (1, 0):
        arrays = [picture(10 * shard + i) for i in range(3)]
        parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", arrays, [2, 0, shard], list("abc"), layout, "img")
    parquet(tmp_path / "validation-00000-of-00001.parquet", [picture(20)], [2], list("abc"), layout, "img")
    parquet(tmp_path / "test-00000-of-00001.parquet", [picture(30)], [-1], list("abc"), layout, "img")
    (tmp_path / "._train-00000-of-00002.parquet").write_text("what macOS leaves behind")
    source = open_source(tmp_path)
    assert list(source.train.keys) == [f"train#{i}" for i in range(6)]
    assert source.train.labels.tolist() == [2, 0, 0, 2, 0, 1] and source.train.classes == ("a", "b", "c")
    for i, seed in enumerate([0, 1, 2, 10, 11, 12]):
        assert same(source.train.read(i), picture(seed))
    assert source.val.labels.tolist() == [2] and same(source.val.read(0), picture(20))
    assert source.test.labels is None and source.test.classes == ()  # -1: Hugging Face's hidden label


def test_parquet_without_metadata(tmp_path):
    parquet(tmp_path / "photos.parquet", [picture(i) for i in range(4)], [7, 3, 7, 5])
    source = open_source(tmp_path / "photos.parquet")
    assert source.name == "photos" and source.val is None
    assert source.train.classes == ("3", "5", "7") and source.train.labels.tolist() == [2, 0, 2, 1]
    parquet(tmp_path / "photos.parquet", [picture(0), picture(1)], [7, None])
    assert open_source(tmp_path / "photos.parquet").train.labels is None
    parquet(tmp_path / "photos.parquet", [picture(0), picture(1)], [0, 1], label="year")
    assert open_source(tmp_path / "photos.parquet").train.labels is None


def test_a_class_label_of_any_name_comes_first(tmp_path):
    parquet(tmp_path / "data" / "train.parquet", [picture(0), picture(1)], [1, 0], ["cat", "dog"], label="species")
    images = open_source(tmp_path).train
    assert images.labels.tolist() == [1, 0] and images.classes == ("cat", "dog")


def test_of_several_columns_the_right_one_is_taken(tmp_path):
    columns = {"thumbnail": [b"", b""], "photo": [encode(picture(0)), encode(picture(1))]}
    columns |= {"label": [0, 5], "coarse_label": [1, 0], "fine_label": [1, 2]}
    features = {"coarse_label": ["pets", "cars"], "fine_label": ["cat", "dog", "car"]}  # CIFAR-100's two levels
    about = {name: {"_type": "ClassLabel", "names": names} for name, names in features.items()} | {
        "photo": {"_type": "Image"}
    }
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": about}})})
    pq.write_table(table, tmp_path / "x.parquet")
    images = open_source(tmp_path).train
    assert images.labels.tolist() == [1, 2] and images.classes == ("cat", "dog", "car")
    assert same(images.read(1), picture(1))
    pq.write_table(table.drop_columns(["fine_label", "label"]), tmp_path / "x.parquet")
    assert open_source(tmp_path).train.classes == ("pets", "cars")


def test_a_test_shard_alone_is_what_there_is_to_learn_from(tmp_path):
    parquet(tmp_path / "test-00000-of-00001.parquet", [picture(0)])
    source = open_source(tmp_path / "test-00000-of-00001.parquet")
    assert len(source.train) == 1 and source.test is None


def test_wrong_parquet_is_one_line(tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), path)
    with pytest.raises(UsageError) as error:
        open_source(path)
    assert "text, label" in one_line(error)
    parquet(path, [picture(0)], [0], ["cat", "dog"])
    parquet(tmp_path / "test.parquet", [picture(0)], [0], ["dog", "cat"])
    with pytest.raises(UsageError, match="disagree about the class names"):
        open_source(tmp_path)
    parquet(tmp_path / "test.parquet", [picture(0)], [2], ["cat", "dog"])
    with pytest.raises(UsageError) as error:
        open_source(tmp_path)
    assert "test" in one_line(error) and "'2'" in one_line(error)
    parquet(path, [], [])
    with pytest.raises(UsageError, match="no row"):
        open_source(path)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(WorkFailed) as error:
        open_source(path)
    assert str(path) in one_line(error)


def test_a_row_without_an_image_is_unreadable(tmp_path):
    parquet(tmp_path / "x.parquet", [picture(0), None, b""])
    images, left_out = in_memory(open_source(tmp_path).train, 10**6)
    assert list(images.keys) == ["train#0"] and [key for key, _ in left_out] == ["train#1", "train#2"]


@pytest.mark.skipif(not (DATA / "cifar10-jpeg").is_dir(), reason="no shared CIFAR-10 (JPEG) beside the project")
def test_cifar10_jpeg():
    source = open_source(DATA / "cifar10-jpeg")
    assert (len(source.train), source.val, len(source.test)) == (50_000, None, 10_000)
    assert len(source.train.classes) == 10 and list(source.train.classes) == sorted(source.train.classes)
    assert np.bincount(source.train.labels).tolist() == [5_000] * 10
    some = source.train.take(spread(50_000, 500))
    decoded, left_out = in_memory(some, 500 * 32 * 32 * 3)
    assert left_out == [] and decoded.pixels.shape == (500, 3, 32, 32) and list(decoded.keys) == list(some.keys)
    for i in range(500):
        plain = Image.open(BytesIO(some.encoded[i])).convert("RGB")
        assert same(decoded.pixels[i].permute(1, 2, 0), plain) and same(decoded.read(i), plain)


# Decoding


def test_every_mode_becomes_rgb(tmp_path):
    rgb = Image.fromarray(picture(0))
    gray = np.asarray(rgb.convert("L"))
    assert same(one(tmp_path, encode(gray)).read(0), np.stack([gray] * 3, -1))
    palette = rgb.quantize(16)
    assert same(one(tmp_path, encode(palette, transparency=bytes(range(16)))).read(0), palette.convert("RGB"))
    rgba = np.concatenate([picture(0), np.full((8, 8, 1), 200, np.uint8)], -1)
    assert same(one(tmp_path, encode(rgba)).read(0), picture(0))
    gray_alpha = Image.fromarray(gray).convert("LA")
    assert same(one(tmp_path, encode(gray_alpha)).read(0), np.stack([gray] * 3, -1))
    bits = rgb.convert("1")
    assert same(one(tmp_path, encode(bits)).read(0), bits.convert("RGB"))
    red = one(tmp_path, encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).read(0)
    assert red.mode == "RGB" and np.abs(np.asarray(red).astype(int) - (255, 0, 0)).max() < 10


@pytest.mark.parametrize("kind, name", [("PNG", "x.png"), ("TIFF", "x.tif"), ("PPM", "x.pgm")])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, kind, name):
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    image = one(tmp_path, encode(Image.fromarray(deep), kind), name).read(0)
    assert image.mode == "RGB" and same(image, np.stack([deep >> 8] * 3, -1))


def test_32_bit_gray_is_scaled_as_16_bits(tmp_path):
    deep = np.array([[-5, 0, 300], [40_000, 65_535, 70_000]], np.int32)
    image = one(tmp_path, encode(Image.fromarray(deep), "TIFF"), "x.tif").read(0)
    assert same(np.asarray(image)[..., 0], [[0, 0, 1], [156, 255, 255]])


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera stood on its right side: turn clockwise
    images = one(tmp_path, encode(picture(0, 4, 8), exif=exif))
    assert same(images.read(0), np.rot90(picture(0, 4, 8), -1))
    assert images.size(0) == (4, 8)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow says so too
def test_broken_exif_does_not_cost_the_image(tmp_path):
    images = one(tmp_path, encode(picture(0), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken"))
    assert same(images.read(0), picture(0))
    images = one(tmp_path, encode(picture(0), exif=b"Exif\0\0no header"))
    assert same(images.read(0), picture(0))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    images = one(tmp_path, encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x.gif")
    assert same(images.read(0), frames[0])


def broken_files():
    png, jpeg = encode(picture(0, 64, 64)), encode(picture(0, 64, 64), "JPEG")
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    return {
        "empty": b"",
        "text": b"<html>404</html>",
        "truncated png": png[: len(png) // 2],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "header only": png[:33],
        "damaged png": png[:200] + bytes(100) + png[300:],
        "bad ppm": b"P6\n8 x8\n255\n" + bytes(192),
        "bomb": bomb,
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
    }


@pytest.mark.parametrize("what", broken_files())
def test_a_broken_file_is_unreadable_for_a_short_reason(tmp_path, what):
    images = one(tmp_path, broken_files()[what])
    with pytest.raises(Unreadable) as error:
        images.read(0)
    expected = {"empty": "empty", "text": "not one of JPEG", "postscript": "not one of JPEG", "bomb": "bomb"}
    assert expected.get(what, "") in one_line(error)
    assert 0 < len(str(error.value)) <= 200 and "0x" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_the_size_limit_is_ours_and_pillows(tmp_path, monkeypatch):
    images = one(tmp_path, encode(picture(0)))
    monkeypatch.setattr(module, "MAX_PIXELS", 64)
    images.read(0)
    monkeypatch.setattr(module, "MAX_PIXELS", 63)
    with pytest.raises(Unreadable, match="8x8 is more than 63 pixels"):
        images.read(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow warns above 50 and refuses above 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Unreadable, match="decompression bomb"):
            images.read(0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damage_anywhere_is_unreadable_or_an_image(tmp_path):
    """No file makes `read` raise anything else: 2,000 mutants of seven formats."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(picture(0))
    seeds = [encode(small, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM")]
    seeds += [encode(small.quantize(8)), encode(small, "TIFF")]
    mutants = []
    for i in range(2000):
        data = bytearray(seeds[i % len(seeds)])
        data[rng.integers(len(data))] = rng.integers(256)
        data[rng.integers(min(40, len(data)))] = rng.choice([0, 255])
        mutants.append(bytes(data[: rng.integers(1, len(data) + 1)] if i % 3 == 0 else data))
    parquet(tmp_path / "x.parquet", mutants)
    images = open_source(tmp_path).train
    read = 0
    for i in range(len(images)):
        with suppress(Unreadable):
            read += images.read(i).mode == "RGB"
    assert 100 < read < 1900


def test_a_position_out_of_range_is_a_mistake_not_a_broken_image(tmp_path):
    with pytest.raises(IndexError):
        one(tmp_path, encode(picture(0))).read(1)


# In memory


def test_broken_files_are_dropped_and_listed_while_the_good_ones_stay(tmp_path):
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(6)]
    tree(tmp_path, *names)
    bad = {"cat/0.png": b"", "cat/4.png": b"junk", "dog/1.png": encode(picture(7))[:60]}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dog" / "5.png").unlink()
    images = open_source(tmp_path).train
    decoded, left_out = in_memory(images, 10**6, threads=2)
    good = [name for name in names[:-1] if name not in bad]
    assert list(decoded.keys) == good and decoded.pixels.shape == (8, 3, 8, 8) and decoded.encoded is None
    assert decoded.labels.tolist() == [0] * 4 + [1] * 4 and decoded.classes == ("cat", "dog")
    assert dict(left_out).keys() == bad.keys() and all(reason for _, reason in left_out)
    for i, name in enumerate(good):
        assert same(decoded.pixels[i].permute(1, 2, 0), picture(names.index(name)))
    assert in_memory(decoded, 0) == (decoded, [])


def test_what_cannot_be_one_tensor_is_left_to_be_streamed(tmp_path):
    images = open_source(tree(tmp_path, *(f"{i:04}.png" for i in range(300)))).train
    assert in_memory(images, 300 * 8 * 8 * 3 - 1) == (images, [])
    assert in_memory(images, 300 * 8 * 8 * 3)[0].pixels.shape == (300, 3, 8, 8)
    odd = int(np.setdiff1d(np.arange(300), spread(300, 200))[-1])  # one that the sample of sizes does not see
    (tmp_path / images.keys[odd]).write_bytes(encode(picture(0, 9, 8)))
    assert in_memory(images, 10**9) == (images, [])
    (tmp_path / images.keys[0]).write_bytes(encode(picture(0, 9, 8)))
    assert in_memory(images, 10**9) == (images, [])
    empty = images.take([])
    assert in_memory(empty, 10**9) == (empty, [])


def test_one_readable_image_among_many_is_found(tmp_path):
    images = open_source(tree(tmp_path, *(f"{i:04}.png" for i in range(250)))).train
    lucky = int(np.setdiff1d(np.arange(250), spread(250, 200))[0])
    for i, key in enumerate(images.keys):
        if i != lucky:
            (tmp_path / key).write_bytes(b"junk")
    decoded, left_out = in_memory(images, 10**6)
    assert list(decoded.keys) == [images.keys[lucky]] and len(left_out) == 249
    assert same(decoded.read(0), picture(lucky))


def test_no_readable_image_is_one_line(tmp_path):
    tree(tmp_path, "a.png", "b.png")
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"junk")
    with pytest.raises(WorkFailed) as error:
        in_memory(open_source(tmp_path).train, 10**6)
    assert "none of the 2 images" in one_line(error) and "'a.png'" in one_line(error)


# Choosing


def kinds(tmp_path):
    """The same six images as a folder, as Parquet and as pixels."""
    folder = open_source(tree(tmp_path / "folder", *(f"{c}/{i}.png" for c in "ab" for i in range(3)))).train
    parquet(tmp_path / "rows" / "x.parquet", [picture(i) for i in range(6)], [0, 0, 0, 1, 1, 1], ["a", "b"])
    rows = open_source(tmp_path / "rows").train
    return {"folder": folder, "parquet": rows, "pixels": in_memory(rows, 10**6)[0]}


def agree(images, seeds):
    assert len(images) == len(seeds) == len(images.labels)
    assert images.labels.tolist() == [seed // 3 for seed in seeds] and images.classes == ("a", "b")
    for i, seed in enumerate(seeds):
        assert same(images.read(i), picture(seed)) and images.size(i) == (8, 8)
    assert images.pixels is None or len(images.pixels) == len(seeds)


def test_take_and_pickle_agree_on_every_kind(tmp_path):
    for images in kinds(tmp_path).values():
        agree(images, [0, 1, 2, 3, 4, 5])
        agree(images.take([4, 0, 0, 5]).take([3, 1, 0]), [5, 0, 4])
        agree(images.take(np.arange(6) % 2 == 1), [1, 3, 5])
        agree(images.take(slice(4, None)), [4, 5])
        agree(pickle.loads(pickle.dumps(images.take([5, 2]))), [5, 2])
        assert list(images.take([2, 1]).keys) == [images.keys[2], images.keys[1]]
        with pytest.raises(IndexError):
            images.take([6])


def test_a_forked_worker_reads_the_same_images(tmp_path):
    class Bytes(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return torch.from_numpy(np.array(self.images.read(i)))

    for images in kinds(tmp_path).values():
        batch = next(iter(torch.utils.data.DataLoader(Bytes(images), 6, num_workers=1, multiprocessing_context="fork")))
        assert same(batch, np.stack([picture(i) for i in range(6)]))


def test_spread():
    assert spread(10, None).tolist() == spread(10, 10).tolist() == spread(10, 99).tolist() == list(range(10))
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8] and spread(10, 0).tolist() == [] and spread(0, 3).tolist() == []
    for n, limit in ((1000, 999), (1000, 7), (7, 3), (50_000, 501)):
        steps = np.diff(spread(n, limit))
        assert len(steps) == limit - 1 and steps.min() >= n // limit and steps.max() <= n // limit + 1
    assert np.bincount(np.repeat(np.arange(10), 50)[spread(500, 100)]).tolist() == [10] * 10


def labeled(labels):
    labels = np.asarray(labels)
    return Images(module._numbered("train", len(labels)), labels=labels, classes=tuple("abc"))


def test_hold_out_is_stratified_disjoint_and_fixed():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [500, 300, 200]))
    images = labeled(labels)
    rest, held = hold_out(images, 100)
    assert np.bincount(held.labels).tolist() == [50, 30, 20] and np.bincount(rest.labels).tolist() == [450, 270, 180]
    assert sorted([*rest.keys, *held.keys]) == sorted(images.keys)
    positions = [int(key.split("#")[1]) for key in held.keys]
    assert positions == sorted(positions) and held.labels.tolist() == labels[positions].tolist()
    assert list(hold_out(images, 100)[1].keys) == list(held.keys) != list(hold_out(images, 100, seed=1)[1].keys)
    assert positions != list(spread(1000, 100))
    for count in (1, 7, 333, 999):
        rest, held = hold_out(images, count)
        assert len(held) == count and len(rest) == 1000 - count
        assert np.abs(np.bincount(held.labels, minlength=3) - count * np.array([0.5, 0.3, 0.2])).max() < 1


def test_hold_out_without_labels_and_out_of_bounds():
    images = Images(module._numbered("train", 20))
    rest, held = hold_out(images, 5)
    assert len(set(held.keys)) == 5 and not set(held.keys) & set(rest.keys) and len(rest) == 15
    for count in (0, 20, -1):
        with pytest.raises(UsageError) as error:
            hold_out(images, count)
        assert "1 to 19" in one_line(error)


def test_sizes_are_measured_from_headers(tmp_path):
    tree(tmp_path, "a.png", "b.png", size=(4, 6))
    tree(tmp_path, "c.png", size=(9, 5))
    (tmp_path / "b.png").write_bytes(b"junk")
    png = (tmp_path / "c.png").read_bytes()
    (tmp_path / "c.png").write_bytes(png[: len(png) // 2])  # its pixels are lost, its size is not
    images = open_source(tmp_path).train
    sizes = measure_sizes(images)
    assert sizes.tolist() == [[4, 6], [9, 5]] and sizes.dtype == np.int64
    assert measure_sizes(images, 1).tolist() == [[4, 6]]
    assert measure_sizes(images.take([1])).shape == (0, 2)
