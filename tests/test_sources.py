"""In every kind of source, image i is the same picture with the same label as in the folder."""

import json
import os
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_decode import encode, npy, picture, same

from simsiam.data.decode import Unreadable, decode_image
from simsiam.data.images import evenly_spaced, load_into_memory
from simsiam.errors import UsageError, WorkFailed
from simsiam.sources.open_source import open_source


def tree(root, *paths, size=(8, 8)):
    """Write a PNG at each path, the i-th one drawn from seed i."""
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encode(picture(i, *size)))
    return root


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
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def files_below(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def zipped(path, files, how=zipfile.ZIP_DEFLATED, zip64=False):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in files.items():
            with archive.open(name, "w", force_zip64=zip64) as member:
                member.write(data)
    return path


def tarred(path, files, kind=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in files.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return path


def is_the_same(a, b, prefix=""):
    """Check for the same splits, images, order and labels; keys differ by a prefix."""
    assert a.splits.keys() == b.splits.keys()
    for one, other in zip(a.splits.values(), b.splits.values(), strict=True):
        assert (
            list(one.keys) == [prefix + key for key in other.keys] and one.classes == other.classes
        )
        assert (one.labels is None) == (other.labels is None) and same(one.labels, other.labels)
        for i in range(len(one)):
            assert same(one.read(i), other.read(i)) and one.read_header(i) == other.read_header(i)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(source, kind=UsageError, **options):
    with pytest.raises(kind) as error:
        open_source(source, **options)
    return one_line(error)


# Names


def test_a_wrong_source_is_one_line_with_a_hint(tmp_path, monkeypatch):
    assert "did you mean cifar10?" in refused("cifra10")
    line = refused(tmp_path / "no\nwhere")
    assert all(kind in line for kind in ("a folder of images", "Parquet", ".zip or .tar", ".txt"))
    refused("")
    tree(tmp_path, "Photos/1.png")
    monkeypatch.chdir(tmp_path)
    assert refused("photo") == "no such file or folder: photo; did you mean Photos?"
    assert refused("./photoz/") == "no such file or folder: ./photoz; did you mean ./Photos?"
    assert refused("CIFAR-10") == "no such file or folder: CIFAR-10; did you mean cifar10?"
    line = refused(tmp_path / "nowhere" / "deep" / "folder")
    assert line.startswith(f"no such file or folder: {tmp_path}/nowhere; give shapes, cifar10, ")
    line = "Photos/1.png is a file and no folder: leave out the / at the end"
    assert refused("Photos/1.png/") == line
    assert refused([]) == "no source is given"
    (tmp_path / "notes.doc").write_text("")
    assert "notes.doc is not a source: give shapes, cifar10" in refused(tmp_path / "notes.doc")
    (tmp_path / "photos.tar.gz").write_bytes(b"")
    assert "unpack it, or pack it as .zip or .tar" in refused(tmp_path / "photos.tar.gz")


def test_shapes():
    source = open_source("shapes")
    assert source.name == "shapes"
    for split in source.splits.values():
        assert split.pixels.shape == (len(split), 3, 32, 32) and split.pixels.dtype == np.uint8
        assert split.labels.dtype == np.int64 and len(split.labels) == len(split)
        assert set(split.labels.tolist()) == set(range(len(split.classes)))
    assert source.val.keys[3] == "val#3"
    assert refused("shapes", channels=5) == "the images of shapes have 3 channels, not 5"


def test_no_network_is_one_line_that_says_what_else_to_give(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("Temporary failure\nin name resolution")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setenv("SIMSIAM_DATA", str(tmp_path / "data"))
    for name in ("cifar10", "cifar100", "stl10"):
        line = refused(name, WorkFailed)
        assert (
            name in line and str(tmp_path / "data") in line and "Temporary failure in name" in line
        )
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
    assert (
        stl.train.labels is None
        and stl.train.classes == ()
        and stl.val.labels.tolist() == [0, 1, 1]
    )
    for split in (cifar.train, cifar.test, stl.train, stl.val, stl.test):
        assert all(same(split.read(i), picture(i)) for i in range(len(split)))
        assert split.read_header(0)[:2] == (8, 8)


# Folders


def test_a_flat_folder_has_no_labels_and_a_bytewise_order(tmp_path):
    names = ["b.png", "B.PNG", "a/z.png", "a-.png", "é.png", "a.JPeG"]
    source = open_source(tree(tmp_path / "My photos!", *names))
    assert source.name == "My-photos"
    assert (
        list(source.train.keys)
        == sorted(names, key=str.encode)
        == ["B.PNG", "a-.png", "a.JPeG", "a/z.png", *names[::4]]
    )
    assert (
        source.train.labels is None
        and source.train.classes == ()
        and source.val is None
        and source.test is None
    )
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
    assert source.val.labels.tolist() == [1] and source.val.classes == source.train.classes == (
        "cat",
        "dog",
        "emu",
    )
    assert source.test.labels is None and same(source.test.read(0), picture(4))


def test_a_class_that_train_lacks_is_one_line(tmp_path):
    line = refused(tree(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/dogs/1.png"))
    assert "val" in line and "'dogs'" in line and "did you mean 'dog'" in line


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
    (photos / "dog" / "other.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "elsewhere" / "back").symlink_to(photos / "dog")
    images = open_source(photos).train
    assert list(images.keys) == ["cat/2.png", "dog/1.png", "dog/gone.png", "dog/other.png"]
    assert images.labels.tolist() == [0, 1, 1, 1] and same(images.read(3), picture(0))
    with pytest.raises(Unreadable, match=r"^No such file or directory$"):
        images.read(2)


def test_what_a_link_leads_to_keeps_its_own_name(tmp_path):
    """The real path is preferred to a link's; of two links to the outside, the first in order."""
    tree(tmp_path, "photos/cat/1.png", "photos/dog/deep/1.png", "outside/1.png")
    photos = tmp_path / "photos"
    (photos / "best").symlink_to(photos / "cat")
    (photos / "cat" / "friend").symlink_to(photos / "dog" / "deep")
    for link in "zyx":
        (photos / link).symlink_to(tmp_path / "outside")
    assert list(open_source(photos).train.keys) == ["cat/1.png", "dog/deep/1.png", "x/1.png"]


def test_a_folder_without_an_image_is_one_line(tmp_path):
    assert "no image in" in refused(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "jpg").write_text("")
    assert ".jpg" in refused(tmp_path)


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def scandir(path, scandir=os.scandir):
        if not isinstance(path, int) and os.fsencode(path).endswith(b"/b/"):
            raise PermissionError(13, "Permission denied", path)  # root may read every folder
        return scandir(path)

    monkeypatch.setattr("os.scandir", scandir)
    assert refused(tree(tmp_path, "a/1.png", "b/1.png"), WorkFailed).endswith(
        "b/: Permission denied"
    )


def test_file_names_of_any_bytes(tmp_path):
    names = [b"b\xff/1.png", b"caf\xe9\n\x1b[31m.png", b"caf\xe9/x y\t.PNG", b"\xe2\x80\xae.png"]
    for i, name in enumerate(names):
        path = os.path.join(os.fsencode(tmp_path), name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(encode(picture(i)))
        except OSError:
            pytest.skip("this file system takes only UTF-8")
    images = open_source(tmp_path).train
    assert [os.fsencode(key) for key in images.keys] == sorted(names)
    assert all(
        same(images.read(i), picture(names.index(name))) for i, name in enumerate(sorted(names))
    )
    os.remove(os.path.join(os.fsencode(tmp_path), names[1]))
    os.remove(os.path.join(os.fsencode(tmp_path), names[3]))
    labeled = open_source(tmp_path).train
    assert labeled.classes == (
        os.fsdecode(b"b\xff"),
        os.fsdecode(b"caf\xe9"),
    ) and labeled.labels.tolist() == [0, 1]


def test_many_names_are_as_few(tmp_path, monkeypatch):
    """They are gathered in chunks; the borders of these are nowhere to be seen."""
    paths = [f"{folder}/{i}.png" for folder in "ab" for i in range(7)]
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    for chunk in (1, 2, 7, 14, 99):
        monkeypatch.setattr("simsiam.sources.open_source.NAME_CHUNK", chunk)
        assert list(open_source(tmp_path).train.keys) == paths


def test_several_folders_and_files_equal_the_folder_that_holds_them(tmp_path):
    tree(tmp_path / "all", "a/cat/1.png", "a/dog/1.png", "a-b/cat/2.png", "a-b/emu/1.png")
    folders = [tmp_path / "all" / "a-b", tmp_path / "all" / "a"]
    source = open_source(folders)
    assert source.name == "all" and source.train.classes == ("cat", "dog", "emu")
    assert list(source.train.keys) == [
        "a-b/cat/2.png",
        "a-b/emu/1.png",
        "a/cat/1.png",
        "a/dog/1.png",
    ]
    assert source.train.labels.tolist() == [0, 2, 0, 1]
    plain = open_source(tmp_path / "all").train
    for images in (source.train, open_source([*folders, folders[0]]).train):
        assert list(images.keys) == list(plain.keys)
        assert all(same(images.read(i), plain.read(i)) for i in range(4))
    inside = open_source(
        [tmp_path / "all" / "a", tmp_path / "all", tmp_path / "all" / "a" / "cat" / "1.png"]
    )
    assert (
        sorted(inside.train.keys) == sorted(plain.keys) and inside.train.labels is not None
    )  # no image twice
    files = [tmp_path / "all" / key for key in plain.keys]
    alone = open_source(files[::-1])
    assert list(alone.train.keys) == list(plain.keys) and alone.train.labels is None
    mixed = open_source([folders[1], files[0]]).train
    assert (
        list(mixed.keys) == ["a-b/cat/2.png", "a/cat/1.png", "a/dog/1.png"] and mixed.labels is None
    )
    one = open_source(files[0])
    assert (
        one.name == "2"
        and list(one.train.keys) == ["2.png"]
        and same(one.train.read(0), picture(2))
    )


def test_folders_on_several_drives_are_one_line(tmp_path, monkeypatch):
    def fail(paths):
        raise ValueError("Paths don't have the same drive")

    tree(tmp_path, "a/1.png", "b/1.png")
    monkeypatch.setattr(os.path, "commonpath", fail)
    assert "are on different drives" in refused([tmp_path / "a", tmp_path / "b"])


def test_what_cannot_be_several_is_one_line(tmp_path):
    tree(tmp_path, "a/1.png")
    (tmp_path / "list.txt").write_text("a/1.png")
    (tmp_path / "empty").mkdir()
    for other in ("cifar10", tmp_path / "list.txt", tmp_path / "gone", tmp_path / "gone.png"):
        assert "is neither a folder nor an image file: only these can be combined" in refused(
            [tmp_path / "a", other]
        )
    assert "no image in" in refused([tmp_path / "empty", tmp_path / "empty"])


# Lists


def test_a_list_is_read_in_its_order(tmp_path, monkeypatch):
    tree(tmp_path, "data/b.png", "elsewhere/a.png", "data/x y.png")
    listed = tmp_path / "data" / "my list.txt"
    listed.write_bytes(
        f"\ufeffx y.png\r\n\n{tmp_path}/elsewhere/a.png\n../data/b.png\nb.png".encode()
    )
    monkeypatch.chdir(tmp_path)
    for path in (listed, "data/my list.txt"):
        source = open_source(path)
        assert source.name == "my-list" and source.val is None and source.train.labels is None
        assert list(source.train.keys) == [
            "x y.png",
            f"{tmp_path}/elsewhere/a.png",
            "../data/b.png",
            "b.png",
        ]
        assert [
            same(source.train.read(i), picture(seed)) for i, seed in enumerate((2, 1, 0, 0))
        ] == [True] * 4


def test_a_list_may_give_labels(tmp_path):
    tree(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "l.txt").write_bytes(b"1.png\tdog\n3.png\tc\xe9\tt \n2.png\tdog\n")
    images = open_source(tmp_path / "l.txt").train
    assert images.classes == (os.fsdecode(b"c\xe9\tt"), "dog") and images.labels.tolist() == [
        1,
        0,
        1,
    ]
    (tmp_path / "l.txt").write_text("1.png\tdog\n3.png\n2.png\tcat\n")
    assert open_source(tmp_path / "l.txt").train.labels is None  # one has none
    (tmp_path / "l.txt").write_text("1.png\tdog\n3.png\tdog\n")
    assert open_source(tmp_path / "l.txt").train.labels is None  # it says nothing


def test_a_list_of_any_bytes(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"caf\xe9\x1b.png\n\0\nno such\n")
    images = open_source(tmp_path / "l.txt").train
    assert [os.fsencode(key) for key in images.keys] == [b"caf\xe9\x1b.png", b"\0", b"no such"]
    for i in range(3):
        with pytest.raises(Unreadable):
            images.read(i)
    (tmp_path / "l.txt").write_bytes(b"\n \n")
    assert "lists no image" in refused(tmp_path / "l.txt")
    (tmp_path / "d.txt").symlink_to(tmp_path / "l.txt")
    (tmp_path / "l.txt").unlink()
    refused(tmp_path / "d.txt")


def test_a_list_may_be_in_utf16_or_have_spaces_before_its_labels(tmp_path):
    tree(tmp_path, "1.png", "2 é.png", "3.PNG")
    text = "1.png\r\n2 é.png\r\n3.PNG\r\n"
    for encoding in ("utf-16", "utf-8-sig", "utf-8"):  # as Windows PowerShell and editors write it
        (tmp_path / "l.txt").write_bytes(text.encode(encoding))
        images = open_source(tmp_path / "l.txt").train
        assert list(images.keys) == ["1.png", "2 é.png", "3.PNG"] and images.labels is None
        assert all(same(images.read(i), picture(i)) for i in range(3))
    (tmp_path / "b.txt").write_bytes(b"\xfe\xff" + text.encode("utf-16-be"))
    assert list(open_source(tmp_path / "b.txt").train.keys) == ["1.png", "2 é.png", "3.PNG"]
    for data in (text.encode("utf-16-le"), text.encode("utf-16") + b"\n", text.encode("utf-32")):
        (tmp_path / "l.txt").write_bytes(data)
        assert "seems to be UTF-16 or UTF-32; save it as UTF-8" in refused(tmp_path / "l.txt")
    (tmp_path / "l.txt").write_text("1.png 0\n2 é.png   tabby cat \n3.PNG\t 0\n")  # as for Caffe
    images = open_source(tmp_path / "l.txt").train
    assert list(images.keys) == ["1.png", "2 é.png", "3.PNG"]
    assert images.classes == ("0", "tabby cat") and images.labels.tolist() == [0, 1, 0]
    (tmp_path / "l.txt").write_text("1.png \n2 é.png\n")  # a space at the end
    assert list(open_source(tmp_path / "l.txt").train.keys) == ["1.png", "2 é.png"]


def test_a_place_without_images_is_one_line_that_counts_what_is_there(tmp_path):
    for name in ("a.mov", "b/c.mov", "b/d.zip", "e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert refused(tmp_path).endswith(
        "; the files there: 2 .mov (videos), 1 .zip, 1 without extension"
    )


# Archives


LAYOUTS = {
    "flat": ("b.png", "B.PNG", "a-.png", "é.jpeg"),
    "classes": ("dog/deep/1.png", "cat/2.png", "cat/1.png"),
    "splits": ("train/cat/1.png", "train/dog/1.png", "Val/dog/1.png", "test/1.png", "misc/1.png"),
    "long": (f"{'x' * 60}/{'y' * 60}/1.png", f"{'x' * 60}/2.png", f"z/{'é' * 110}.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "set/", "set/images/"])
def test_an_archive_equals_the_folder_in_it(tmp_path, layout, prefix):
    folder = tree(tmp_path / "folder", *LAYOUTS[layout])
    (folder / "._a.png").write_bytes(b"what macOS leaves behind")
    (folder / "readme.txt").write_text("no image")
    files = {prefix + name: data for name, data in files_below(folder).items()}
    archives = [
        zipped(tmp_path / "my set.zip", files),
        zipped(tmp_path / "stored.ZIP", files, zipfile.ZIP_STORED),
        zipped(tmp_path / "64.zip", files, zip64=True),
        tarred(tmp_path / "gnu.tar", files),
        tarred(tmp_path / "pax.tar", files, tarfile.PAX_FORMAT),
        tarred(tmp_path / "dots.tar", {f"./{name}": data for name, data in files.items()}),
        tarred(tmp_path / "reversed.tar", dict(reversed(files.items()))),
    ]
    assert open_source(archives[0]).name == "my-set"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for archive in archives:
        is_the_same(open_source(archive), open_source(folder), prefix)
    assert before == {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")
    }  # read in place


def test_train_around_everything_is_a_split_not_a_wrapping(tmp_path):
    tree(tmp_path / "f", "train/all/cat/1.png", "train/all/dog/1.png")  # one class, so none
    is_the_same(
        open_source(zipped(tmp_path / "a.zip", files_below(tmp_path / "f"))),
        open_source(tmp_path / "f"),
    )


def test_an_archive_gives_only_its_visible_regular_files(tmp_path):
    data = encode(picture(0))

    def member(name, kind, **more):
        info = tarfile.TarInfo(name)
        info.type = kind
        for key, value in more.items():
            setattr(info, key, value)
        return info

    sparse = member(
        "p.png", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,8", "GNU.sparse.size": "8"}
    )
    files = {
        "a.png": data,
        "../../x.png": data,
        "a/../y.png": data,
        "/abs.png": data,
        "d.png/b.png": data,
        member("s.png", tarfile.SYMTYPE, linkname="a.png"): b"",
        member("l.png", tarfile.LNKTYPE, linkname="a.png"): b"",
        member("f.png", tarfile.FIFOTYPE): b"",
        member("d.png", tarfile.DIRTYPE): b"",
        member("g.png", tarfile.GNUTYPE_SPARSE): b"",
        sparse: data,
    }
    tarred(tmp_path / "a.tar", files, tarfile.PAX_FORMAT)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in files.items():
            if isinstance(name, str):
                archive.writestr(name, content)
        archive.writestr("d.png/", b"")
        link = zipfile.ZipInfo("s.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "a.png")
    for archive in (tmp_path / "a.tar", tmp_path / "a.zip"):
        images = open_source(archive).train
        assert list(images.keys) == ["a.png", "abs.png", "d.png/b.png"]
        assert all(same(images.read(i), picture(0)) for i in range(3))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_members_with_one_name_the_last_counts_as_if_unpacked(tmp_path):
    with (
        tarfile.open(tmp_path / "a.tar", "w") as tar,
        zipfile.ZipFile(tmp_path / "a.zip", "w") as archive,
    ):
        for seed in (1, 2, 0):
            info = tarfile.TarInfo("a.png")
            info.size = len(encode(picture(seed)))
            tar.addfile(info, BytesIO(encode(picture(seed))))
            archive.writestr("a.png", encode(picture(seed)))
    for path in (tmp_path / "a.tar", tmp_path / "a.zip"):
        images = open_source(path).train
        assert len(images) == 1 and same(images.read(0), picture(0))


def test_names_of_any_bytes_in_a_tar(tmp_path):
    names = [os.fsdecode(b"caf\xe9\n.png"), os.fsdecode(b"\xff/1.png")]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        images = open_source(
            tarred(tmp_path / "a.tar", {name: encode(picture(0)) for name in names}, kind)
        ).train
        assert list(images.keys) == names and same(images.read(1), picture(0))


def test_a_zip_that_lies_costs_only_the_liar(tmp_path):
    files = {f"{i}.png": encode(picture(i, 64, 64)) for i in range(5)}
    data = bytearray(zipped(tmp_path / "a.zip", files).read_bytes())
    entries, at = [], 0
    while (at := data.find(b"PK\1\2", at + 1)) > 0:  # the central directory
        entries.append(at)
    size = len(files["1.png"])
    struct.pack_into(
        "<I", data, entries[1] + 24, size - 1
    )  # it becomes more than it says: a bomb would
    struct.pack_into("<I", data, entries[2] + 24, size + 9)  # less
    struct.pack_into("<I", data, entries[3] + 42, 7)  # it begins elsewhere
    struct.pack_into("<II", data, entries[4] + 20, 2**31, 2**31)  # longer than the archive
    (tmp_path / "a.zip").write_bytes(data)
    images = open_source(tmp_path / "a.zip").train
    assert same(images.read(0), picture(0, 64, 64))
    for i, word in enumerate(
        ("damaged here", "damaged here", "damaged here", "bytes in the archive; at most"), 1
    ):
        with pytest.raises(Unreadable, match=word) as error:
            images.read(i)
        one_line(error)


def test_a_damaged_member_of_a_zip_that_is_no_image_costs_no_image(tmp_path):
    """Its first bytes are asked for, because its name does not say what it is."""
    files = {"1.png": encode(picture(1)), "README": b"text " * 99, "LICENSE": b"text " * 99}
    data = bytearray(zipped(tmp_path / "a.zip", files).read_bytes())
    data[data.index(b"README") + 6] = 0xFF  # where its content begins
    data[data.index(b"LICENSE")] = 0  # the name before its content, not that in the directory
    (tmp_path / "a.zip").write_bytes(data)
    source = open_source(tmp_path / "a.zip")
    assert list(source.train.keys) == ["1.png"] and same(source.train.read(0), picture(1))
    assert source.passed_over == {"without extension": 2}


def test_names_in_a_zip_may_be_in_utf_8_without_a_flag(tmp_path):
    """As macOS writes them; other names without it are in the characters of DOS."""
    folder = tree(tmp_path / "photos", "café/1.png", "thé/2.png")
    path = zipped(tmp_path / "a.zip", files_below(folder))
    data = bytearray(path.read_bytes())
    for magic, place in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        for at in (data.index(magic), data.rindex(magic)):
            assert data[at + place] == 8
            data[at + place] = 0
    path.write_bytes(data)
    is_the_same(open_source(path), open_source(folder))
    data = zipped(path, {"cafX.png": encode(picture(0))}).read_bytes()
    path.write_bytes(data.replace(b"cafX", b"caf\x82"))
    assert list(open_source(path).train.keys) == ["café.png"]


def test_an_archive_that_cannot_be_read_is_one_line(tmp_path):
    files = {"1.png": encode(picture(0)), "2.png": encode(picture(1))}
    whole = zipped(tmp_path / "a.zip", files).read_bytes()
    at = whole.index(b"PK\1\2")
    (tmp_path / "a.zip").write_bytes(whole[: at + 8] + b"\1" + whole[at + 9 :])
    assert refused(tmp_path / "a.zip").endswith(
        "a.zip is encrypted or compressed with a method that is not supported: unpack it"
    )
    assert "encrypted or compressed" in refused(zipped(tmp_path / "a.zip", files, zipfile.ZIP_LZMA))
    (tmp_path / "a.zip").write_bytes(whole[:at])
    assert "cannot read" in refused(tmp_path / "a.zip", WorkFailed)
    (tmp_path / "a.zip").write_bytes(whole[: at + 42] + b"\xf0\xff\xff\xff" + whole[at + 46 :])
    assert "cannot read" in refused(tmp_path / "a.zip", WorkFailed)
    tar = tarred(tmp_path / "a.tar", files).read_bytes()
    for data in (b"", b"junk" * 999, tar[:600], tar[:512] + bytes(range(256)) * 8):
        (tmp_path / "a.tar").write_bytes(data)
        assert "cannot read" in refused(tmp_path / "a.tar", WorkFailed)
    for path in (
        zipped(tmp_path / "none.zip", {"a.txt": b""}),
        tarred(tmp_path / "none.tar", {"a.txt": b""}),
    ):
        assert "no image in" in refused(path)


def test_an_archive_that_goes_away_or_shrinks_is_unreadable(tmp_path):
    for path in (
        zipped(tmp_path / "a.zip", {"1.png": encode(picture(0))}),
        tarred(tmp_path / "a.tar", {"1.png": b"ab"}),
    ):
        images = open_source(path).train
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(Unreadable, match="damaged here"):
            images.read(0)
        path.unlink()
        with pytest.raises(Unreadable, match="No such file"):
            images.read(0)


# Channels


def test_channels_are_those_asked_for(tmp_path):
    five = [picture(i, 20, 30, 5) for i in range(3)]
    for i, array in enumerate(five):
        (tmp_path / f"{i}.npy").write_bytes(npy(array if i else array.transpose(2, 0, 1)))
    zipped(tmp_path / "a.zip", files_below(tmp_path))
    for source in (tmp_path, tmp_path / "a.zip"):
        images = open_source(source, channels=5).train
        assert all(
            same(images.read(i), five[i]) and images.read_header(i) == (20, 30, "NPY")
            for i in range(3)
        )
        with pytest.raises(Unreadable, match="give --channels 5"):
            open_source(source).train.read(0)
    tree(tmp_path / "photos", "1.png")
    assert same(
        open_source(tmp_path / "photos", channels=1).train.read(0),
        decode_image(encode(picture(0)), 1),
    )


# Parquet


@pytest.mark.parametrize("layout", ["struct", "binary"])
def test_parquet_shards_are_one_split_in_name_order(tmp_path, layout):
    for shard in (1, 0):
        arrays = [picture(10 * shard + i) for i in range(3)]
        parquet(
            tmp_path / f"train-0000{shard}-of-00002.parquet",
            arrays,
            [2, 0, shard],
            list("abc"),
            layout,
            "img",
        )
    parquet(
        tmp_path / "validation-00000-of-00001.parquet",
        [picture(20)],
        [2],
        list("abc"),
        layout,
        "img",
    )
    parquet(
        tmp_path / "test-00000-of-00001.parquet", [picture(30)], [-1], list("abc"), layout, "img"
    )
    (tmp_path / "._train-00000-of-00002.parquet").write_text("what macOS leaves behind")
    source = open_source(tmp_path)
    assert list(source.train.keys) == [f"train#{i}" for i in range(6)]
    assert source.train.labels.tolist() == [2, 0, 0, 2, 0, 1] and source.train.classes == (
        "a",
        "b",
        "c",
    )
    for i, seed in enumerate([0, 1, 2, 10, 11, 12]):
        assert same(source.train.read(i), picture(seed))
    assert source.val.labels.tolist() == [2] and same(source.val.read(0), picture(20))
    assert (
        source.test.labels is None and source.test.classes == ()
    )  # -1: Hugging Face's hidden label


def test_parquet_without_metadata(tmp_path):
    parquet(tmp_path / "photos.parquet", [picture(i) for i in range(4)], [7, 3, 7, 5])
    source = open_source(tmp_path / "photos.parquet")
    assert source.name == "photos" and source.val is None
    assert source.train.classes == ("3", "5", "7") and source.train.labels.tolist() == [2, 0, 2, 1]
    parquet(tmp_path / "photos.parquet", [picture(0), picture(1)], [7, None])
    assert open_source(tmp_path / "photos.parquet").train.labels is None
    parquet(tmp_path / "photos.parquet", [picture(0), picture(1)], [0, 1], label="year")
    assert open_source(tmp_path / "photos.parquet").train.labels is None


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        (["dog", " cat", "dog ", "cat"], ("cat", "dog"), [1, 0, 1, 0]),
        ([10.0, 2.0, 10.0, 2.5], ("2", "10", "2.5"), [1, 0, 1, 2]),
        ([True, False, True, True], ("false", "true"), [1, 0, 1, 1]),
        (pa.array(["b", "a", "b", "b"]).dictionary_encode(), ("a", "b"), [1, 0, 1, 1]),
        (pa.array(["10", "9", "x", "9"], pa.large_string()), ("9", "10", "x"), [1, 0, 2, 0]),
        (["a", None, "b", "a"], (), None),
        (["a", "", "b", "a"], (), None),
        ([1.0, float("nan"), 2.0, 1.0], (), None),
    ],
)
def test_labels_of_parquet_may_be_texts_floats_and_booleans(
    tmp_path, monkeypatch, values, classes, labels, in_memory
):
    if not in_memory:
        monkeypatch.setattr("simsiam.sources.open_source.MAX_RESIDENT_BYTES", 0)
    rows = [{"bytes": encode(picture(i)), "path": None} for i in range(4)]
    pq.write_table(pa.table({"image": rows, "label": values}), tmp_path / "train.parquet")
    images = open_source(tmp_path).train
    assert images.classes == classes
    assert images.labels is None if labels is None else images.labels.tolist() == labels


@pytest.mark.parametrize("in_memory", [True, False])
def test_files_of_parquet_may_have_labels_of_several_types(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr("simsiam.sources.open_source.MAX_RESIDENT_BYTES", 0)
    for i, values in enumerate(([10, 2], [2.0, 10.0], ["cat", "2"])):
        rows = [encode(picture(2 * i)), encode(picture(2 * i + 1))]
        pq.write_table(pa.table({"image": rows, "label": values}), tmp_path / f"{i}.parquet")
    images = open_source(tmp_path).train
    assert images.classes == ("2", "10", "cat") and images.labels.tolist() == [1, 0, 0, 1, 2, 0]
    assert same(images.read(5), picture(5))
    parquet(tmp_path / "0.parquet", [picture(0)], [0], ["cat", "dog"])
    assert ("class names" if in_memory else "other columns or class names") in refused(tmp_path)
    assert not in_memory or len(open_source(tmp_path, no_labels=True).train) == 5


def test_tables_beside_images_are_no_shards(tmp_path):
    pq.write_table(pa.table({"file_name": ["a.png"]}), tmp_path / "metadata.parquet")
    assert "no column of image files" in refused(tmp_path)
    tree(tmp_path, "a.png", "b.png")
    source = open_source(tmp_path)
    assert list(source.train.keys) == ["a.png", "b.png"]
    assert source.passed_over == {".parquet": 1}


def test_splits_of_parquet_with_texts_share_their_classes(tmp_path):
    for split, values in (("train", ["b", "a", "c"]), ("test", ["c", "b", "c"])):
        rows = [encode(picture(i)) for i in range(3)]
        pq.write_table(pa.table({"image": rows, "class": values}), tmp_path / f"{split}.parquet")
    source = open_source(tmp_path)
    assert source.train.classes == source.test.classes == ("a", "b", "c")
    assert source.test.labels.tolist() == [2, 1, 2]


@pytest.mark.parametrize("described", [True, False])
def test_masks_before_images_are_passed_over_and_named(tmp_path, described):
    blobs = {
        name: [encode(picture(seed + i)) for i in range(2)]
        for seed, name in enumerate(("mask", "image", "depth"))
    }
    columns = {
        name: [{"bytes": blob, "path": None} for blob in column] for name, column in blobs.items()
    }
    table = pa.table(columns | {"label": [["a"], ["b", "c"]], "caption": ["?", "!"]})
    if described:
        features = {name: {"_type": "Image"} for name in columns}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, tmp_path / "train.parquet")
    source = open_source(tmp_path)
    assert same(source.train.read(0), picture(1)) and source.train.labels is None
    assert source.notes == ("columns that are used: image.bytes; not used: mask, depth, label",)


def test_a_class_label_of_any_name_comes_first(tmp_path):
    parquet(
        tmp_path / "data" / "train.parquet",
        [picture(0), picture(1)],
        [1, 0],
        ["cat", "dog"],
        label="species",
    )
    images = open_source(tmp_path).train
    assert images.labels.tolist() == [1, 0] and images.classes == ("cat", "dog")


def test_of_several_columns_the_right_one_is_taken(tmp_path):
    columns = {"thumbnail": [b"", b""], "photo": [encode(picture(0)), encode(picture(1))]}
    columns |= {"label": [0, 5], "coarse_label": [1, 0], "fine_label": [1, 2]}
    features = {
        "coarse_label": ["pets", "cars"],
        "fine_label": ["cat", "dog", "car"],
    }  # CIFAR-100's two levels
    about = {name: {"_type": "ClassLabel", "names": names} for name, names in features.items()} | {
        "photo": {"_type": "Image"}
    }
    table = pa.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": about}})}
    )
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
    assert "text, label" in refused(path)
    parquet(path, [picture(0)], [0], ["cat", "dog"])
    parquet(tmp_path / "test.parquet", [picture(0)], [0], ["dog", "cat"])
    assert "disagree about the class names" in refused(tmp_path)
    parquet(tmp_path / "test.parquet", [picture(0)], [2], ["cat", "dog"])
    line = refused(tmp_path)
    assert "test" in line and "'2'" in line
    parquet(path, [], [])
    assert "no row" in refused(path)
    path.write_bytes(b"PAR1 not really")
    assert str(path) in refused(path, WorkFailed)


def test_cifar10_jpeg(shared):
    source = open_source(shared / "data" / "cifar10-jpeg")
    assert (len(source.train), source.val, len(source.test)) == (50_000, None, 10_000)
    assert len(source.train.classes) == 10 and list(source.train.classes) == sorted(
        source.train.classes
    )
    assert np.bincount(source.train.labels).tolist() == [5_000] * 10
    some = source.train.take(evenly_spaced(50_000, 500))
    decoded, left_out = load_into_memory(some, 500 * 32 * 32 * 3)
    assert (
        left_out == []
        and decoded.pixels.shape == (500, 3, 32, 32)
        and list(decoded.keys) == list(some.keys)
    )
    for i in range(500):
        plain = Image.open(BytesIO(some.file(i))).convert("RGB")
        assert same(decoded.pixels[i].transpose(1, 2, 0), plain) and same(decoded.read(i), plain)


def test_opening_and_reading_loads_no_torch(tmp_path):
    tree(tmp_path, "a/1.png", "b/1.png")
    code = "import sys\nfrom simsiam.sources.open_source import open_source\n"
    code += "open_source(sys.argv[1]).train.read(0)\n"
    subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules", str(tmp_path)],
        check=True,
    )
