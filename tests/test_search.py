"""Search: the answers are those of a fresh embedding, and only what has changed is embedded."""

import os
import shutil
import socket
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUICK
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.embeddings import kept_embedding, search_source
from simsiam.embeddings.embed import embed
from simsiam.embeddings.kept_embedding import SourceEncoder, SourceImages, keep_embedding
from simsiam.embeddings.neighbors import format_neighbors, neighbors
from simsiam.embeddings.table import read_embeddings
from simsiam.model.encoder import Encoder
from simsiam.model.precision import Compute
from simsiam.runs.checkpoints.published_weights import offline_if_unreachable
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source

CPU = {"device": "cpu", "precision": "float32"}


def draw(path: Path, seed: int) -> Path:
    """A picture of colored clouds."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two folders of 30 pictures each."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for i in range(60):
        draw(root / "ab"[i % 2] / f"{i:02}.png", i)
    return root


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    return simsiam.pretrain(pictures, out=tmp_path_factory.mktemp("runs") / "run", **QUICK)


@pytest.fixture
def photos(pictures, tmp_path, monkeypatch):
    """A copy that a test may change, and an empty cache."""
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(pictures, tmp_path / "photos"))


@pytest.fixture
def embedded(monkeypatch):
    """The names of the images that were embedded."""
    names, embed_images = [], kept_embedding.embed_images

    def recording(network, images, *arguments):
        names.extend(images.keys)
        return embed_images(network, images, *arguments)

    monkeypatch.setattr(kept_embedding, "embed_images", recording)
    return names


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def assert_same(found, expected) -> None:
    assert [(x.path, x.label) for x in found] == [(x.path, x.label) for x in expected]
    assert [x.cosine for x in found] == pytest.approx([x.cosine for x in expected], abs=1e-5)


def test_after_a_change_only_new_images_are_embedded_and_answers_are_fresh(
    run, photos, tmp_path, embedded, monkeypatch, capsys
):
    simsiam.search(photos, "04.png", encoder=run, **CPU)
    assert len(embedded) == 60
    assert "60 images embedded, 0 removed, 0 unchanged" in capsys.readouterr().err
    embedded.clear()
    with monkeypatch.context() as patch:  # nothing has changed: the network is not even loaded
        patch.setattr(kept_embedding, "load", None)
        simsiam.search(photos, "04.png", encoder=run, **CPU)
    assert embedded == [] and capsys.readouterr().err == ""

    for i in range(10, 20):
        (photos / "ab"[i % 2] / f"{i:02}.png").unlink()
        draw(photos / "b" / "new" / f"{i}.png", 100 + i)
    draw(photos / "a" / "02.png", 500)  # another content
    os.utime(photos / "b" / "03.png")  # another time
    before = files_below(photos)
    found = simsiam.search(photos, "04.png", encoder=run, k=60, **CPU)
    changed = ["a/02.png", "b/03.png", *(f"b/new/{i}.png" for i in range(10, 20))]
    assert sorted(embedded) == changed
    assert "12 images embedded, 10 removed, 48 unchanged" in capsys.readouterr().err
    assert files_below(photos) == before
    file = embed(run, photos, out=tmp_path / "fresh.parquet", **CPU)
    assert_same(found, neighbors(file, "04.png", k=60))
    for query in ("a/02.png", "b/new/13.png"):
        found = simsiam.search(photos, query, encoder=run, k=60, **CPU)
        assert_same(found, neighbors(file, query, k=60))
    assert len(found) == 59 and found[0].label in ("a", "b")
    (kept,) = (tmp_path / "cache" / "search").rglob("*.parquet")
    assert b"b/11.png" not in kept.read_bytes() and kept.parent.stat().st_mode & 0o77 == 0


def test_a_query_is_a_name_a_path_or_another_file(run, photos, tmp_path, capsys):
    answers = {
        query: simsiam.search(photos, query, encoder=run, k=3, **CPU)
        for query in ("04.png", "a/04.png", str(photos / "a" / "04.png"))
    }
    assert len({tuple(answer) for answer in answers.values()}) == 1
    assert "a/04.png" not in [x.path for x in answers["04.png"]]
    copy = shutil.copy(photos / "a" / "04.png", tmp_path / "<copy>.png")
    page = tmp_path / "page.html"
    found = simsiam.search(photos, copy, encoder=run, k=3, html=page, **CPU)
    assert found[0].path == "a/04.png" and found[0].cosine == pytest.approx(1, abs=1e-5)
    text = page.read_text()
    assert text.count("<img ") == 4 and "&lt;copy&gt;.png" in text and "<copy>" not in text
    os.chdir(photos.parent)
    inside = simsiam.search("photos", "photos/a/04.png", encoder=run, k=3, **CPU)
    assert_same(inside, answers["04.png"])
    names = simsiam.search(photos, "04.png", encoder=run, no_labels=True, **CPU)
    assert not any(x.label for x in names)
    assert main(["search", "photos", str(copy), "--encoder", str(run), "--k", "2"]) == 0
    assert capsys.readouterr().out.split()[1:3] == ["a/04.png", "(a)"]


def test_unreadable_images_are_reported_and_embedded_once_they_can_be_read(
    run, photos, embedded, capsys
):
    (photos / "b" / "bad\x1b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for _ in range(2):
        simsiam.search(photos, "04.png", encoder=run, **CPU)
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "cannot" in x]
        assert line.startswith("1 of 61 images cannot be read; the first, b/bad\\x1b.png: ")
    embedded.clear()
    draw(photos / "b" / "bad\x1b.png", 7)
    assert len(simsiam.search(photos, "04.png", encoder=run, k=99, **CPU)) == 60
    assert embedded == ["b/bad\x1b.png"]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_entry_is_made_again_with_one_line(damage, run, photos, tmp_path, capsys):
    expected = simsiam.search(photos, "04.png", encoder=run, **CPU)
    (kept,) = (tmp_path / "cache" / "search").rglob("*.parquet")
    data = bytearray(kept.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 3] ^= 255
    kept.write_bytes(data)
    capsys.readouterr()
    assert_same(simsiam.search(photos, "04.png", encoder=run, **CPU), expected)
    lines = capsys.readouterr().err.splitlines()
    assert "is damaged and is made again" in lines[0] and "60 images embedded" in lines[1]
    assert_same(simsiam.search(photos, "04.png", encoder=run, **CPU), expected)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("changed", [0, 40])
def test_what_an_interrupted_search_has_embedded_is_kept(
    changed, run, photos, embedded, monkeypatch
):
    """Also of images that have changed since the search before."""
    if changed:
        simsiam.search(photos, "04.png", encoder=run, **CPU)
        embedded.clear()
        for i in range(changed):
            draw(photos / "ab"[i % 2] / f"{i:02}.png", 100 + i)
    count = changed or 60
    monkeypatch.setattr(kept_embedding, "PART_SIZE", 16)
    recording = kept_embedding.embed_images

    def stop_after_two_parts(*arguments):
        if len(embedded) >= 32:
            raise KeyboardInterrupt
        return recording(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept_embedding, "embed_images", stop_after_two_parts)
        simsiam.search(photos, "04.png", encoder=run, **CPU)
    found = simsiam.search(photos, "04.png", encoder=run, k=99, **CPU)
    assert len(embedded) == len(set(embedded)) == count and len(found) == 59
    assert [x.path for x in simsiam.search(photos, "04.png", encoder=run, k=99, **CPU)] == [
        x.path for x in found
    ]
    assert len(embedded) == count


def test_of_two_searches_at_once_the_second_waits_and_embeds_nothing(run, photos, monkeypatch):
    command = [sys.executable, "-m", "simsiam", "search", str(photos), "04.png", "--k", "60"]
    command += ["--encoder", str(run), "--device", "cpu", "--precision", "float32"]
    started, embed_images = [], kept_embedding.embed_images

    def start_another(*arguments):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes))
        first = started[0].stderr
        assert "folders are used as labels" in first.readline()
        assert "another process is embedding" in first.readline()
        return embed_images(*arguments)

    monkeypatch.setattr(kept_embedding, "embed_images", start_another)
    found = simsiam.search(photos, "04.png", encoder=run, k=60, **CPU)
    output, errors = started[0].communicate()
    assert started[0].returncode == 0 and errors == ""
    assert output == format_neighbors(found) + "\n"


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(
    run, photos, tmp_path, monkeypatch, capsys
):
    expected = simsiam.search(photos, "04.png", encoder=run, **CPU)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    capsys.readouterr()
    for lines in (["60 images embedded, 0 removed, 0 unchanged"], []):
        assert_same(simsiam.search(photos, "04.png", encoder=run, **CPU), expected)
        first, *others = capsys.readouterr().err.splitlines()
        (folder,) = (tmp_path / "temporary").iterdir()
        assert "cannot be written to" in first and f"{folder} is used instead" in first
        assert others == lines and folder.stat().st_mode & 0o77 == 0
    assert os.environ["SIMSIAM_CACHE"] == str(tmp_path / "file" / "cache")
    folder.chmod(0o777)  # anybody could have put something there
    assert_same(simsiam.search(photos, "04.png", encoder=run, **CPU), expected)
    assert f"{folder} is used" not in capsys.readouterr().err


def test_a_head_makes_it_another_encoder(run, photos, tmp_path, embedded):
    """The kept features of the backbone alone are not those of the encoder with a head."""
    with_head = Path(shutil.copytree(run, tmp_path / "with_head"))
    simsiam.search(photos, "04.png", encoder=with_head, **CPU)
    write_head(with_head, seed=0)
    found = simsiam.search(photos, "04.png", encoder=with_head, k=60, **CPU)
    file = embed(with_head, photos, out=tmp_path / "fresh.parquet", **CPU)
    assert_same(found, neighbors(file, "04.png", k=60))
    assert len(embedded) == 120
    simsiam.search(photos, "04.png", encoder=run, **CPU)  # what with_head was at first
    assert len(embedded) == 120


def write_head(run: Path, seed: int) -> None:
    backbone = simsiam.load(run, head=False)
    torch.manual_seed(seed)
    Run(run).write_head(Encoder(backbone, torch.nn.Linear(backbone.dim, 8)))


# --- encoders that are learned from the images ----------------------------------------------------


@pytest.fixture
def learner(run, tmp_path):
    """A stand-in for an encoder that is learned from the images: another head each time."""
    learned = []

    def learn(path: Path) -> None:
        shutil.copytree(run, path)
        write_head(path, seed=len(learned))
        learned.append(Path(shutil.copytree(path, tmp_path / f"learned-{len(learned)}")))

    return SimpleNamespace(calls=learned, encoder=SourceEncoder("stand-in", learn=learn))


def keep(photos: Path, learner: SimpleNamespace, relearn: float = 0.1):
    images = SourceImages([photos], open_source(photos))
    compute = Compute.pick("cpu", "float32")
    with keep_embedding(images, learner.encoder, compute, channels=3, relearn=relearn) as kept:
        return kept


def test_it_is_learned_again_once_a_tenth_of_the_images_is_new(
    learner, photos, tmp_path, embedded, capsys
):
    first = keep(photos, learner)
    embedded.clear()
    for i in range(6):
        draw(photos / "a" / f"new-{i}.png", 200 + i)
    (photos / "b" / "07.png").unlink()
    kept = keep(photos, learner)  # 6 of 65 are new
    assert len(learner.calls) == 1 and len(embedded) == 6
    assert torch.equal(kept.vectors[kept.paths.index("a/00.png")], first.vectors[0])
    draw(photos / "a" / "new-6.png", 206)
    assert len(keep(photos, learner, relearn=0.5)) == 66 and len(learner.calls) == 1
    embedded.clear()
    capsys.readouterr()
    kept = keep(photos, learner)  # 7 of 66
    assert len(learner.calls) == 2 and len(embedded) == len(kept) == 66
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("7 of 66 images are new: stand-in is learned again, and all images")
    file = embed(learner.calls[1], photos, out=tmp_path / "fresh.parquet", **CPU)
    assert torch.allclose(kept.vectors, read_embeddings(file).vectors, atol=1e-5)
    keep(photos, learner)
    assert len(learner.calls) == 2


def test_a_learned_encoder_that_is_damaged_is_learned_again(learner, photos, tmp_path, capsys):
    keep(photos, learner)
    (head,) = (tmp_path / "cache" / "search").rglob("head.safetensors")
    head.write_bytes(head.read_bytes()[:-9])
    capsys.readouterr()
    assert len(keep(photos, learner)) == 60 and len(learner.calls) == 2
    assert "is damaged and is made again" in capsys.readouterr().err.splitlines()[0]


# --- images in archives and shards ----------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))


def test_members_of_an_archive_are_embedded_again_if_the_archive_has_changed(
    run, pictures, tmp_path, embedded, monkeypatch
):
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    files = {path.name: path.read_bytes() for path in pictures.rglob("*.png")}
    write_tar(tmp_path / "photos.tar", files)
    for _ in range(2):
        simsiam.search(tmp_path / "photos.tar", "04.png", encoder=run, **CPU)
        assert len(embedded) == 60
    write_tar(tmp_path / "photos.tar", files | {"more.png": files["04.png"]})
    (first, *_) = simsiam.search(tmp_path / "photos.tar", "04.png", encoder=run, **CPU)
    assert len(embedded) == 121 and first.path == "more.png"


def test_images_of_one_name_in_two_shards_keep_their_own_features(
    run, pictures, tmp_path, embedded, monkeypatch
):
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        pictures_of_shard = sorted(pictures.rglob("*.png"))[3 * shard : 3 * shard + 3]
        members = {}
        for i, path in enumerate(pictures_of_shard):
            pixels = BytesIO()
            Image.open(path).save(pixels, "BMP")  # all of one size
            data = b"x" * len(pixels.getvalue()) if shard == i == 0 else pixels.getvalue()
            members |= {f"{i}.bmp": data, f"{i}.json": b'{"path": "same.bmp"}'}
        write_tar(shards / f"{shard}.tar", members)
    source = open_source(shards)
    compute = Compute.pick("cpu", "float32")
    for _ in range(2):
        images = SourceImages([shards], source)
        encoder = SourceEncoder("x", run)
        with keep_embedding(images, encoder, compute, channels=3, relearn=1) as kept:
            pass
        assert kept.paths == ["same.bmp"] * 5  # the first one cannot be read
        fresh = embed(run, shards, out=tmp_path / f"{len(kept.metadata)}.parquet", **CPU)
        assert torch.allclose(kept.vectors, read_embeddings(fresh).vectors, atol=1e-5)
        os.unlink(fresh)
    assert len(np.unique(kept.vectors.numpy().round(4), axis=0)) == 5
    assert len(embedded) == 7  # the first one twice


# --- which encoder --------------------------------------------------------------------------------


def test_without_network_and_packages_the_first_command_answers(
    run, photos, learner, monkeypatch, capsys
):
    def refuse(name, **_):
        raise simsiam.UsageError(f"no {name}")

    monkeypatch.setattr(search_source, "open_weights", refuse)
    monkeypatch.setattr(
        search_source, "fit_patches_run", lambda *_, out, **__: learner.encoder.learn(out)
    )
    assert main(["search", str(photos), "04.png", "--k", "3"]) == 0
    output, lines = capsys.readouterr()
    assert len(output.splitlines()) == 3
    first, second, third = search_source.DEFAULT_ENCODERS
    assert lines.splitlines()[:2] == [
        f"{second} is used, because {first} is not available: no {first}",
        f"{third} is used, because {second} is not available: no {second}",
    ]
    assert (second, third) == ("lite0", "patches") and len(learner.calls) == 1
    assert main(["search", str(photos), "04.png", "--encoder", "lite0"]) == 2
    assert "no lite0" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with offline_if_unreachable():
            assert not constants.HF_HUB_OFFLINE
    with offline_if_unreachable():  # nobody listens there any more
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{photos} 04.png --encoder {run} --k 0", "k is 0; it is at least 1"),
        ("{photos} 04.png --encoder {run} --relearn 2", "relearn is 2.0; it lies between 0 and 1"),
        ("{photos} 04.png --encoder {run} --channels 1", "channels is 1, and"),
        ("{photos} 04.png --encoder {run} --html nowhere/x.html", "there is no folder nowhere"),
        ("{photos} 04.png --backbone resnet18", "--backbone resnet18 belongs to a file of weights"),
        (
            "{photos} none.png --encoder {run}",
            "no image none.png: it is neither a file nor the path",
        ),
        ("{photos} {photos}/text.png --encoder {run}", "text.png cannot be read"),
        ("nowhere 04.png --encoder {run}", "no such file or folder: nowhere"),
        ("{photos}/few 04.png --encoder patches", "patches cannot be learned from these images"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, message, run, photos, capsys):
    (photos / "text.png").write_text("text")
    draw(photos / "few" / "04.png", 4)
    words = [word.format(photos=photos, run=run) for word in arguments.split()]
    assert main(["search", *words]) in (1, 2)
    (*_, error) = capsys.readouterr().err.strip().splitlines()
    assert message in error


def test_a_wrong_query_is_refused_before_anything_is_embedded(run, photos, embedded):
    for query in ("none.png", "c/04.png", "04"):
        with pytest.raises(simsiam.UsageError, match="neither a file nor the path or name"):
            simsiam.search(photos, query, encoder=run, **CPU)
    assert embedded == []


def test_other_images_than_rgb_get_patches(photos, monkeypatch):
    def learn(source, channels, *, out, **_):
        assert channels == 1
        shutil.copytree(gray, out)

    gray = simsiam.pretrain(photos, out="gray", **QUICK, channels=1)
    monkeypatch.setattr(search_source, "fit_patches_run", learn)
    assert len(simsiam.search(photos, "04.png", channels=1, k=3, **CPU)) == 3
