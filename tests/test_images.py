"""Images by position: selected, pickled, forked or decoded, they stay the same in every storage."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from test_decode import encode, npy, picture, same
from test_sources import files_below, parquet, tarred, tree, zipped

from simsiam.config.recipes import Recipe
from simsiam.data.batches import iter_batches
from simsiam.data.decode import Unreadable
from simsiam.data.images import (
    Images,
    evenly_spaced,
    from_arrays,
    hold_out,
    load_into_memory,
    measure_sizes,
    sample,
)
from simsiam.data.storage import NO_BYTES, PixelArray, Storage, numbered_keys
from simsiam.errors import UsageError, WorkFailed
from simsiam.sources.file_index import load_index
from simsiam.sources.open_source import Source, open_source
from simsiam.sources.write_shards import write_shards


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# In memory


def test_broken_files_are_dropped_and_listed_while_the_good_ones_stay(tmp_path):
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(6)]
    tree(tmp_path, *names)
    bad = {"cat/0.png": b"", "cat/4.png": b"junk", "dog/1.png": encode(picture(7))[:60]}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dog" / "5.png").unlink()
    images = open_source(tmp_path).train
    decoded, left_out = load_into_memory(images, 10**6, threads=2)
    good = [name for name in names[:-1] if name not in bad]
    assert list(decoded.keys) == good and decoded.pixels.shape == (8, 3, 8, 8)
    assert isinstance(decoded.storage, PixelArray)
    assert decoded.labels.tolist() == [0] * 4 + [1] * 4 and decoded.classes == ("cat", "dog")
    assert dict(left_out).keys() == bad.keys() and all(reason for _, reason in left_out)
    for i, name in enumerate(good):
        assert same(decoded.read(i), picture(names.index(name)))
    assert load_into_memory(decoded, 0) == (decoded, [])


def test_what_cannot_be_one_array_is_left_to_be_streamed(tmp_path):
    images = open_source(tree(tmp_path, *(f"{i:04}.png" for i in range(300)))).train
    assert load_into_memory(images, 300 * 8 * 8 * 3 - 1) == (images, [])
    assert load_into_memory(images, 300 * 8 * 8 * 3)[0].pixels.shape == (300, 3, 8, 8)
    odd = int(
        np.setdiff1d(np.arange(300), evenly_spaced(300, 200))[-1]
    )  # one that the sample of sizes does not see
    (tmp_path / images.keys[odd]).write_bytes(encode(picture(0, 9, 8)))
    assert load_into_memory(images, 10**9) == (images, [])
    (tmp_path / images.keys[0]).write_bytes(encode(picture(0, 9, 8)))
    assert load_into_memory(images, 10**9) == (images, [])
    empty = images.take([])
    assert load_into_memory(empty, 10**9) == (empty, [])


def test_one_readable_image_among_many_is_found(tmp_path):
    images = open_source(tree(tmp_path, *(f"{i:04}.png" for i in range(250)))).train
    lucky = int(np.setdiff1d(np.arange(250), evenly_spaced(250, 200))[0])
    for i, key in enumerate(images.keys):
        if i != lucky:
            (tmp_path / key).write_bytes(b"junk")
    decoded, left_out = load_into_memory(images, 10**6)
    assert list(decoded.keys) == [images.keys[lucky]] and len(left_out) == 249
    assert same(decoded.read(0), picture(lucky))


def test_no_readable_image_is_one_line(tmp_path):
    tree(tmp_path, "a.png", "b.png")
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"junk")
    with pytest.raises(WorkFailed) as error:
        load_into_memory(open_source(tmp_path).train, 10**6)
    assert "none of the 2 images" in one_line(error) and "a.png: not one of" in one_line(error)


def test_a_row_without_an_image_is_unreadable(tmp_path, monkeypatch):
    parquet(tmp_path / "x.parquet", [picture(0), None, b""])
    images, left_out = load_into_memory(open_source(tmp_path).train, 10**6)
    assert list(images.keys) == ["train#0"]
    assert left_out == [("train#1", NO_BYTES), ("train#2", "an empty file")]
    monkeypatch.setattr("simsiam.sources.open_source.MAX_RESIDENT_BYTES", 0)
    with pytest.raises(Unreadable, match="needs the bytes of image files, not only their paths"):
        open_source(tmp_path).train.read(1)  # read in place


@pytest.mark.parametrize("channels", [1, 5, 16])
def test_any_number_of_channels_in_memory(tmp_path, channels):
    for i in range(3):
        (tmp_path / f"{i}.npy").write_bytes(npy(picture(i, 8, 6, channels).transpose(2, 0, 1)))
    images, left_out = load_into_memory(open_source(tmp_path, channels).train, 3 * channels * 48)
    assert (
        images.pixels.shape == (3, channels, 8, 6)
        and left_out == []
        and images.channels == channels
    )
    assert all(same(images.read(i), picture(i, 8, 6, channels)) for i in range(3))


def test_upright_images_lie_in_memory_and_turned_ones_are_streamed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(picture(i, 8, 6), exif=exif))
    images = open_source(tmp_path).train
    assert load_into_memory(images, 10**6) == (
        images,
        [],
    )  # their headers give another size than their pixels
    assert images.read_header(0)[:2] == (8, 6) and images.read(0).shape == (6, 8, 3)


# Choosing


def kinds(tmp_path):
    """The same six images in every storage."""
    folder = tree(tmp_path / "folder", *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    parquet(
        tmp_path / "rows" / "x.parquet",
        [picture(i) for i in range(6)],
        [0, 0, 0, 1, 1, 1],
        ["a", "b"],
    )
    (tmp_path / "list.txt").write_text(
        "".join(f"folder/{c}/{i}.png\t{c}\n" for c in "ab" for i in range(3))
    )
    sources = [
        folder,
        [folder, folder / "a"],
        tmp_path / "list.txt",
        tmp_path / "rows",
        zipped(tmp_path / "files.zip", files_below(folder)),
        tarred(tmp_path / "files.tar", files_below(folder)),
    ]
    found = [open_source(source).train for source in sources]
    return [*found, load_into_memory(found[-1], 10**6)[0]]


def agree(images, seeds):
    assert len(images) == len(seeds) == len(images.labels)
    assert images.labels.tolist() == [seed // 3 for seed in seeds] and images.classes == ("a", "b")
    for i, seed in enumerate(seeds):
        assert same(images.read(i), picture(seed)) and images.read_header(i)[:2] == (8, 8)
    assert images.pixels is None or len(images.pixels) == len(seeds)


def test_take_and_pickle_agree_on_every_kind(tmp_path):
    for images in kinds(tmp_path):
        agree(images, [0, 1, 2, 3, 4, 5])
        agree(images.take([4, 0, 0, 5]).take([3, 1, 0]), [5, 0, 4])
        agree(images.take(np.arange(6) % 2 == 1), [1, 3, 5])
        agree(images.take(slice(4, None)), [4, 5])
        agree(pickle.loads(pickle.dumps(images.take([5, 2]))), [5, 2])
        assert list(images.take([2, 1]).keys) == [images.keys[2], images.keys[1]]
        for mistake in (images.read, lambda i, images=images: images.take([i])):
            with pytest.raises(IndexError):  # not an unreadable image
                mistake(6)


class Nested(Storage):
    """A new kind of storage: the three members that a kind must define, and nothing else."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def take(self, indices):
        return Nested([self.files[i] for i in np.arange(len(self))[indices]])

    def file(self, i):
        return self.files[i]


def test_a_new_kind_of_storage_is_one_class(tmp_path, monkeypatch):
    """It is indexed, selected, decoded into memory, augmented and written as shards."""
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    files = Nested([encode(picture(i)) for i in range(6)])
    labels = np.repeat([0, 1], 3)
    images = Images(numbered_keys("train", 6), files, labels, ("a", "b"))
    agree(images, range(6))
    agree(images.take([5, 2]), [5, 2])
    agree(load_into_memory(images, 10**6)[0], range(6))
    assert (
        images.prefetch(np.arange(3)) is images and measure_sizes(images).tolist() == [[8, 8]] * 6
    )
    table = load_index(["new"], Source("new", images)).table
    assert table["reason"].to_pylist() == [""] * 6 and len(set(table["digest"].to_pylist())) == 6
    monkeypatch.setattr(
        "simsiam.sources.write_shards.open_source", lambda *_, **__: Source("", images)
    )
    agree(open_source(write_shards("new", out=tmp_path / "shards")).train, range(6))
    recipe = Recipe(image_size=8, batch_size=3, mean=(0.5,) * 3, std=(0.25,) * 3, workers=0)
    decoded = load_into_memory(open_source(tmp_path / "shards").train, 10**6)[0]
    seen = [
        [batch.index.tolist() for batch in iter_batches(kind, recipe, 0, 2, torch.device("cpu"))]
        for kind in (images, decoded)
    ]
    assert seen[0] == seen[1] and sorted(np.ravel(seen[0])) == list(range(6))


def test_a_forked_worker_reads_the_same_images(tmp_path):
    class Bytes(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return torch.from_numpy(np.array(self.images.read(i)))

    for images in kinds(tmp_path):
        batch = next(
            iter(
                torch.utils.data.DataLoader(
                    Bytes(images), 6, num_workers=1, multiprocessing_context="fork"
                )
            )
        )
        assert same(batch, np.stack([picture(i) for i in range(6)]))


def test_spread():
    assert (
        evenly_spaced(10, None).tolist()
        == evenly_spaced(10, 10).tolist()
        == evenly_spaced(10, 99).tolist()
        == list(range(10))
    )
    assert (
        evenly_spaced(10, 5).tolist() == [0, 2, 4, 6, 8]
        and evenly_spaced(10, 0).tolist() == []
        and evenly_spaced(0, 3).tolist() == []
    )
    for n, limit in ((1000, 999), (1000, 7), (7, 3), (50_000, 501)):
        steps = np.diff(evenly_spaced(n, limit))
        assert (
            len(steps) == limit - 1 and steps.min() >= n // limit and steps.max() <= n // limit + 1
        )
    assert np.bincount(np.repeat(np.arange(10), 50)[evenly_spaced(500, 100)]).tolist() == [10] * 10


def labeled(labels):
    return from_arrays("train", np.zeros((len(labels), 1, 1, 1), np.uint8), labels, "abc")


def unlabeled(count):
    return from_arrays("train", np.zeros((count, 1, 1, 1), np.uint8))


def test_a_sample_is_spread_and_keeps_the_proportions():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [500, 300, 200]))
    some = sample(labeled(labels), 100)
    positions = [int(key.split("#")[1]) for key in some.keys]
    assert np.bincount(some.labels).tolist() == [50, 30, 20] and positions == sorted(positions)
    assert list(sample(unlabeled(10), 5).keys) == [f"train#{i}" for i in (0, 2, 4, 6, 8)]
    assert len(sample(labeled(labels), None)) == len(sample(labeled(labels), 5000)) == 1000


def test_hold_out_is_stratified_disjoint_and_fixed():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [500, 300, 200]))
    images = labeled(labels)
    rest, held = hold_out(images, 100)
    assert np.bincount(held.labels).tolist() == [50, 30, 20] and np.bincount(
        rest.labels
    ).tolist() == [450, 270, 180]
    assert sorted([*rest.keys, *held.keys]) == sorted(images.keys)
    positions = [int(key.split("#")[1]) for key in held.keys]
    assert positions == sorted(positions) and held.labels.tolist() == labels[positions].tolist()
    assert (
        list(hold_out(images, 100)[1].keys)
        == list(held.keys)
        != list(hold_out(images, 100, seed=1)[1].keys)
    )
    assert positions != list(evenly_spaced(1000, 100))
    for count in (1, 7, 333, 999):
        rest, held = hold_out(images, count)
        assert len(held) == count and len(rest) == 1000 - count
        assert (
            np.abs(np.bincount(held.labels, minlength=3) - count * np.array([0.5, 0.3, 0.2])).max()
            < 1
        )


def test_hold_out_without_labels_and_out_of_bounds():
    images = unlabeled(20)
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
