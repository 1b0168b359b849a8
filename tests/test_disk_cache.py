"""The disk cache changes only the time, not one bit of a batch, whatever happens to its file."""

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simsiam.config.recipes import Recipe
from simsiam.data import storage
from simsiam.data.batches import iter_batches, min_decode_side
from simsiam.sources.disk_cache import DiskCache, with_disk_cache
from simsiam.sources.open_source import open_source
from simsiam.training.prepare import prepare_data

CPU = torch.device("cpu")
N = 40
GIB = 2**30


def recipe(folder: Path, **words) -> Recipe:
    how = {
        "image_size": 16,
        "batch_size": 8,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "holdout": 0,
        "workers": 0,
    }
    return Recipe().replace(source=(str(folder),), **how | {"disk_cache_gib": 1.0} | words)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pixels"


@pytest.fixture
def photos(tmp_path):
    """Make JPEGs that are decoded at 1/2 or 1/4, small PNGs, an unreadable file; sizes differ."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for i in range(N):
        height, width = rng.integers(100, 300, 2)
        soft = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
            (int(width), int(height))
        )
        soft.save(folder / f"{i:02d}.{'png' if i % 4 == 0 else 'jpg'}")
    (folder / "07.jpg").write_bytes((folder / "07.jpg").read_bytes()[:300])
    return folder


def seen(r: Recipe, steps: int = 10) -> list:
    """Two epochs: which images, which views, and what was skipped, as plain values."""
    data = prepare_data(r, open_source(r.source))
    made = iter_batches(data.train, r, 0, steps, CPU)
    return [(b.index.tolist(), [v.numpy().tobytes() for v in b.views], b.skipped) for b in made]


def decoded_in_training(r: Recipe, monkeypatch) -> set[str]:
    """The files that two epochs decode, beside those that writing the cache does."""
    data, found = prepare_data(r, open_source(r.source)), set()

    def decode(file, *more):
        found.add(Path(file).name)
        return storage.decode_image.plain(file, *more)

    decode.plain = storage.decode_image
    with monkeypatch.context() as patch:
        patch.setattr(storage, "decode_image", decode)
        list(iter_batches(data.train, r, 0, 10, CPU))
    return found


def packed(photos: Path, kind: str) -> Path:
    if kind == "folder":
        return photos
    with tarfile.open(photos.with_suffix(".tar"), "w") as tar:
        tar.add(photos, "photos")
    return photos.with_suffix(".tar")


@pytest.mark.parametrize(("kind", "workers"), [("folder", 0), ("folder", 2), ("tar", 0)])
def test_batches_are_the_same_to_the_bit_and_nothing_is_decoded_twice(
    photos, kept, kind, workers, monkeypatch
):
    source = packed(photos, kind)
    plain = seen(recipe(source, disk_cache_gib=0, workers=workers))
    assert not kept.exists() and any(skipped for *_, skipped in plain)
    for _ in ("written", "found"):
        assert seen(recipe(source, workers=workers)) == plain
    if kind == "folder":
        assert decoded_in_training(recipe(source), monkeypatch) == {"07.jpg"}


def test_pixels_decoded_for_another_size_are_not_taken(photos):
    source = open_source(str(photos))
    train, least = source.train, min_decode_side(recipe(photos))
    images = with_disk_cache(train, [str(photos)], train, least, GIB)
    for i in (0, 1):
        for other in (0, least, 3 * least):
            assert np.array_equal(images.read(i, other), train.read(i, other))
    assert images.read(1, least).shape != images.read(1).shape, "or the test would show nothing"


def test_the_file_is_bounded_and_the_rest_is_decoded(photos, kept, monkeypatch):
    bound = 200_000
    r = recipe(photos, disk_cache_gib=bound / GIB)
    assert seen(r) == seen(recipe(photos, disk_cache_gib=0))
    (file,) = kept.glob("*.npy")
    assert 0.7 * bound < file.stat().st_size <= bound
    assert len({"07.jpg"}) < len(decoded_in_training(r, monkeypatch)) < N


def test_what_changes_is_decoded_anew_and_the_old_file_goes(photos, kept):
    def name(r):
        seen(r, 1)
        (file,) = kept.glob("*.npy")
        return file.name

    names = [name(recipe(photos))]
    assert name(recipe(photos)) == names[0] == name(recipe(photos, seed=1, epochs=3))
    names += [
        name(recipe(photos, crop_min=0.5)),
        name(recipe(photos, limit=30)),
        name(recipe(photos, holdout=5, limit=30)),
    ]
    Image.new("RGB", (150, 150), "red").save(photos / "03.jpg")
    r = recipe(photos)
    names.append(name(r))
    assert seen(r) == seen(recipe(photos, disk_cache_gib=0))
    assert len(set(names)) == 4  # no labels, so nothing is held out
    other = photos.rename(photos.with_name("others"))
    seen(recipe(other), 1)
    assert len(list(kept.glob("*.npy"))) == 2, "each source has its own"


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_noticed_said_once_and_costs_only_time(photos, kept, workers, capfd):
    r = recipe(photos, workers=workers)
    plain = seen(r)
    (file,) = kept.glob("*.npy")
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :: 1000] = bytes(255 - x for x in data[len(data) // 2 :: 1000])
    file.write_bytes(data)
    capfd.readouterr()
    assert seen(r) == plain
    assert capfd.readouterr().err.count("was damaged and is deleted") == 1 and not file.exists()
    assert seen(r) == plain and file.exists()


@pytest.mark.parametrize(
    "harm",
    [lambda data: data[:-1], lambda data: data[:100], lambda data: b"", lambda data: b"x" * 999],
)
def test_a_file_that_is_not_whole_is_written_anew(photos, kept, harm):
    plain = seen(recipe(photos))
    (file,) = kept.glob("*.npy")
    good = file.read_bytes()
    file.write_bytes(harm(good))
    (kept / f"{file.name}.simsiam-{2**22 + 1}.part").touch()  # left by a process that was killed
    assert seen(recipe(photos)) == plain and file.read_bytes() == good
    assert sorted(path.name for path in kept.iterdir()) == sorted([file.name, "lock"])


def test_a_full_disk_costs_a_line(photos, kept, capfd):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, before[1])
    )  # more is refused, as on a full disk
    try:
        found = seen(recipe(photos))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr().err.count("decoded images are not cached on disk: cannot write") == 1
    assert [path.name for path in kept.iterdir()] == ["lock"] and found == seen(
        recipe(photos, disk_cache_gib=0)
    )


def test_a_process_that_is_not_forked_maps_the_file_itself(photos, kept):
    r = recipe(photos)
    train = prepare_data(r, open_source(r.source)).train
    assert isinstance(train.storage, DiskCache)
    min_side = train.storage.min_side
    sent = pickle.dumps(train)
    assert len(sent) < 20_000
    again = pickle.loads(sent)
    assert len(again.storage.pixel_file) == N - 1 and np.array_equal(
        again.read(3, min_side), train.read(3, min_side)
    )
    next(kept.glob("*.npy")).unlink()
    assert np.array_equal(pickle.loads(sent).read(3, min_side), train.read(3, min_side)), (
        "then it decodes"
    )


def test_images_taken_from_it_keep_their_pixels(photos, monkeypatch):
    r = recipe(photos)
    train = prepare_data(r, open_source(r.source)).train
    some = train.take(np.array([30, 2, 11])).take([2, 0])
    monkeypatch.delattr(storage, "decode_image")
    min_side = train.storage.min_side
    assert np.array_equal(some.read(0, min_side), train.read(11, min_side))
    assert np.array_equal(some.read(1, min_side), train.read(30, min_side))
