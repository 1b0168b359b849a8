"""Embedding files: the same file after any crash, and results that equal those of NumPy."""

import base64
import csv
import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUICK
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.data.images import load_into_memory
from simsiam.embeddings import embed as module
from simsiam.embeddings import search
from simsiam.embeddings.cluster import cluster
from simsiam.embeddings.embed import embed
from simsiam.embeddings.neighbors import neighbors
from simsiam.embeddings.outliers import outliers
from simsiam.embeddings.probe import probe, read_labels
from simsiam.embeddings.search import search_neighbors
from simsiam.embeddings.table import read_embeddings
from simsiam.errors import UsageError, printable
from simsiam.model.precision import Compute
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run
from simsiam.sources import shapes
from simsiam.sources.open_source import open_source
from simsiam.sources.write_shards import write_shards
from simsiam.utils.files import check_writable

EVIL = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes, 40 images; one is broken, the name of one contains HTML."""
    root = tmp_path_factory.mktemp("data") / "few"
    pixels, labels = shapes.draw_split("test")
    indices = np.concatenate([np.flatnonzero(labels == c)[:13] for c in range(3)])
    for i in indices:
        path = root / shapes.CLASSES[labels[i]] / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i].transpose(1, 2, 0)).save(path)
    path.rename(path.with_name(EVIL))
    (root / shapes.CLASSES[0] / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simsiam.pretrain("shapes", out=tmp_path_factory.mktemp("runs") / "run", **QUICK)


@pytest.fixture(scope="module")
def file(run, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "few.parquet"
    return embed(run, folder, out=out, device="cpu", precision="float32")


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_holds_the_feature_that_the_loaded_backbone_computes(run, folder, file):
    encoder, images = simsiam.load(run), read_embeddings(file)
    assert len(images) == 39 and images.vectors.shape == (39, encoder.dim)
    for i in (0, 20, 38):
        with torch.no_grad():
            h = encoder(encoder.transform(Image.open(folder / images.paths[i])))[0]
        assert torch.allclose(images.vectors[i], h, atol=1e-5)
        assert images.labels[i] == images.paths[i].split("/")[0]
        assert Image.open(io.BytesIO(images.thumbnails[i])).size == (32, 32)
    assert [path.rpartition("/")[2] for path, _ in images.metadata["unreadable"]] == ["broken.png"]
    assert images.paths == sorted(images.paths)
    assert images.find(EVIL) == images.find(f"{shapes.CLASSES[2]}/{EVIL}")


def test_killed_and_started_again_it_is_the_same_file(run, folder, file, tmp_path, monkeypatch):
    """SIGKILL in the middle, parts of 8 images: finished parts stay, and nothing else is left."""
    out = tmp_path / "again.parquet"
    code = """if True:
        import sys, time
        from simsiam.embeddings import embed as module
        module.PART_SIZE, embed_part = 8, module.embed_part
        def slow(*arguments):
            parts = list(module.Path(sys.argv[3]).parent.glob("*/0*.parquet"))
            time.sleep(0.5 * (len(parts) > 1))
            return embed_part(*arguments)
        module.embed_part = slow
        run, folder, out = sys.argv[1:]
        module.embed(run, folder, out=out, device="cpu", precision="float32")
    """
    process = subprocess.Popen([sys.executable, "-c", code, str(run), str(folder), str(out)])
    parts = tmp_path / "again.parquet.parts"
    while len(list(parts.glob("0*.parquet"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = sorted(parts.glob("0*.parquet"))
    assert not out.exists() and 2 <= len(finished) < 5
    monkeypatch.setattr(module, "PART_SIZE", 8)
    sizes, embed_part = [], module.embed_part

    def recording(network, images, *arguments):
        sizes.append(len(images))
        return embed_part(network, images, *arguments)

    monkeypatch.setattr(module, "embed_part", recording)
    assert embed(run, folder, out=out, device="cpu", precision="float32") == out
    assert len(sizes) == 5 - len(finished) and not parts.exists()
    fresh = embed(run, folder, out=tmp_path / "fresh.parquet", device="cpu", precision="float32")
    assert out.read_bytes() == fresh.read_bytes()
    assert torch.allclose(read_embeddings(out).vectors, read_embeddings(file).vectors, atol=1e-5)


def test_all_formats_hold_the_same_rows(run, folder, file, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_SIZE", 8)
    monkeypatch.setattr(module, "PARTS_PER_FILE", 2)
    shards = embed(run, folder, out=tmp_path / "shards", device="cpu", precision="float32")
    assert len(list(shards.iterdir())) == 3
    one, many = read_embeddings(file), read_embeddings(shards)
    assert (one.paths, one.labels, one.metadata) == (many.paths, many.labels, many.metadata)
    array = np.load(embed(run, folder, out=tmp_path / "h.npy", device="cpu", precision="float32"))
    assert array.tobytes() == many.vectors.numpy().tobytes()
    rows = [(row["path"], row["label"]) for row in rows_of(tmp_path / "h.csv")]
    assert rows == list(zip(one.paths, one.labels))


def test_a_limit_takes_evenly_spaced_images_of_every_split_and_class(run, tmp_path):
    root = tmp_path / "data"
    for split, count in (("train", 12), ("test", 4)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(root / split / name / f"{i:02}.png")
    images = read_embeddings(embed(run, root, out=tmp_path / "some.parquet", limit=8))
    assert images.paths == [
        *(f"train/{name}/{i:02}.png" for name in "ab" for i in (0, 4, 8)),
        *(f"test/{name}/00.png" for name in "ab"),
    ]
    assert images.labels == [*"aaabbbab"]
    without = read_embeddings(embed(run, root, out=tmp_path / "x.parquet", no_labels=True))
    assert without.labels is None and len(without) == 32
    few = read_embeddings(embed(run, root, out=tmp_path / "y.parquet", limit=8, no_labels=True))
    assert few.paths[:2] == ["train/a/00.png", "train/a/04.png"] and len(few) == 8


def test_the_progress_bar_moves_by_at_most_64_images(run, folder, monkeypatch):
    """Also where an image cannot be read, and where images lie in shards or in memory."""
    files = open_source(folder).train
    shards = open_source(write_shards(folder, out="shards", per_shard=9)).train
    network, transform = simsiam.load(run), eval_transform(Run(run).recipe)
    for chunk in (64, 16):
        monkeypatch.setattr(module, "CHUNK_SIZE", chunk)
        for images in (files, shards, load_into_memory(files, 2**20)[0]):
            steps = list[int]()
            compute = Compute.pick("cpu", "float32")
            part = module.embed_part(network, images, transform, compute, True, steps.append)
            assert sum(steps) == len(images) and max(steps) <= chunk <= 64
            expected = [printable(key) for key in images.keys if "broken" not in key]
            assert part["path"].to_pylist() == expected


def test_the_parts_of_another_job_are_not_used(run, folder, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "x.parquet"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "embed_part", stop)
        embed(run, folder, out=out)
    assert main(["embed", str(run), "shapes", "--out", str(out)]) == 2
    assert "parts of another job" in capsys.readouterr().err and not out.exists()


def test_neighbors_are_those_of_plain_cosines(file, folder, run, tmp_path):
    images = read_embeddings(file)
    h = images.vectors.numpy().astype(np.float64)
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    cosine = unit @ unit[5]
    order = [i for i in np.argsort(-cosine, kind="stable") if i != 5][:4]
    nearest = neighbors(file, images.paths[5], k=4, html=tmp_path / "near.html")
    assert [x.cosine for x in nearest] == pytest.approx(cosine[order], abs=1e-5)
    assert nearest[0].path != images.paths[5]
    assert len(neighbors(file, images.paths[5], k=1000)) == 38
    copy = shutil.copy(folder / images.paths[5], tmp_path / "another name.png")
    (first,) = neighbors(file, str(copy), k=1, html=tmp_path / "near.html")
    assert (tmp_path / "near.html").read_text().count(
        "<img "
    ) == 2  # the query from outside as well
    assert first.path == images.paths[5] and first.cosine == pytest.approx(1, abs=1e-5)
    everything = neighbors(file, images.paths[5], k=1000, html=tmp_path / "near.html")
    page = (tmp_path / "near.html").read_text()
    assert page.count("<img ") == len(everything) + 1
    assert "<img src=x" not in page and "&lt;img src=x" in page
    assert "http" not in page


def test_neighbors_are_the_nearest_rows_and_never_the_row_itself():
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    x[10:13] = x[0]  # equal rows
    unit = (x / x.norm(dim=1, keepdim=True)).double()
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    cosine, index = search_neighbors(x, 4)
    assert torch.allclose(
        cosine.double(), cosines.sort(dim=1, descending=True).values[:, :4], atol=1e-6
    )
    assert torch.allclose(cosine.double(), cosines.gather(1, index), atol=1e-6)
    assert not (index == torch.arange(30)[:, None]).any() and {10, 11, 12} <= set(index[0].tolist())


def test_faiss_finds_the_same_neighbors(monkeypatch):
    pytest.importorskip("faiss")
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    exact = search_neighbors(x, 5)
    monkeypatch.setattr(search, "FAISS_THRESHOLD", 100)
    cosine, index = search_neighbors(x, 5)
    assert torch.equal(index, exact[1]) and torch.allclose(cosine, exact[0], atol=1e-5)


def blobs(tmp_path, labels: bool = True):
    """A file that another program wrote: three separated classes, and one image far from all."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    centers = np.eye(8)[:3] * 10
    h = np.concatenate(
        [centers[i % 3] + rng.normal(size=8) for i in range(60)] + [np.eye(8)[7] * 12]
    ).astype("f4")
    path = tmp_path / "blobs.parquet"
    columns = {
        "path": pa.array([f"d/{i}.jpg" for i in range(61)]),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(h), 8),
    }
    if labels:
        columns["label"] = pa.array(["abc"[i % 3] for i in range(60)] + [None])
    pq.write_table(pa.table(columns), path)
    return path


def test_clusters_and_outliers_of_well_separated_classes(tmp_path):
    file = blobs(tmp_path)
    result = cluster(file, clusters=4, out=tmp_path / "c.csv")
    assert result.nmi == pytest.approx(1)
    assert np.bincount(result.assignments).tolist() == [20, 20, 20, 1]
    rows = rows_of(tmp_path / "c.csv")
    assert [int(row["cluster"]) for row in rows] == result.assignments.tolist()
    first = outliers(file, out=tmp_path / "o.csv")
    assert first[0].path == "d/60.jpg" and first[0].distance > 2 * first[1].distance
    assert [row["path"] for row in rows_of(tmp_path / "o.csv")] == [x.path for x in first]


def test_a_few_labels_give_labels_for_all_images_and_an_accuracy(tmp_path, capsys):
    file, labels = blobs(tmp_path), tmp_path / "labels.csv"
    labels.write_text("path,label\n" + "".join(f"d/{i}.jpg,{'abc'[i % 3]}\n" for i in range(15)))
    assert main(["probe", str(file), str(labels), "--out", str(tmp_path / "all.csv")]) == 0
    rows = rows_of(tmp_path / "all.csv")
    assert [row["predicted"] for row in rows[:60]] == ["abc"[i % 3] for i in range(60)]
    assert [row["label"] for row in rows] == ["abc"[i % 3] for i in range(15)] + [""] * 46
    assert all(1 / 3 < float(row["confidence"]) <= 1 for row in rows)
    assert "cross-validated accuracy 100.0 %, 80 to 100" in capsys.readouterr().out
    wrong = [("abc"[i % 3] if i > 5 else "abc"[(i + 1) % 3]) for i in range(15)]  # 6 of 15
    labels.write_text("path,label\n" + "".join(f"{i}.jpg,{wrong[i]}\n" for i in range(15)))
    result = probe(file, labels, out=tmp_path / "all.csv")
    assert result.correct < 13  # the accuracy on images left out, not that of the fit itself
    assert result.confidence.mean() < 0.8
    labels.write_text("path,label\nd/0.jpg,a\nd/1.jpg,b\n")
    assert probe(file, labels, out=tmp_path / "all.csv").correct is None


def test_labels_from_a_spreadsheet_may_have_spaces_and_capitals(file, tmp_path):
    images, labels = read_embeddings(file), tmp_path / "labels.csv"
    lines = ["\ufeff Path ,LABEL,note"]
    for i, label in enumerate(("cat", "cat ", " cat", "dog", "dog\u00a0", " dog\t")):
        lines.append(f"{' ' * (i % 2)}{images.paths[i]},{label},")
    labels.write_text("\r\n".join(lines), encoding="utf-8")
    result = probe(file, labels, out=tmp_path / "all.csv")
    assert result.classes == ["cat", "dog"]
    assert result.labels == dict(enumerate(["cat"] * 3 + ["dog"] * 3))
    labels.write_text(f"path,label\n{images.paths[0]},  \n")
    with pytest.raises(UsageError, match="labels no image"):
        read_labels(labels, images)
    labels.write_text("")
    with pytest.raises(UsageError, match="has no column 'path'"):
        read_labels(labels, images)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_labels_as_spreadsheets_of_all_countries_write_them(separator, encoding, file, tmp_path):
    """Labels stay texts: 007 and 7 are two classes."""
    images, table = read_embeddings(file), tmp_path / "labels.csv"
    labels = ["007", "7", "a, b; c", "Blüte"]
    with open(table, "w", newline="", encoding=encoding) as to:
        writer = csv.writer(to, delimiter=separator)
        writer.writerows([("path", "label"), *zip(images.paths, labels)])
    if encoding == "cp1252":
        with pytest.raises(UsageError, match="is not a text in UTF-8: save it as CSV in UTF-8"):
            read_labels(table, images)
    else:
        assert read_labels(table, images) == dict(enumerate(labels))


def test_probe_reads_the_table_that_it_wrote_with_more_labels(tmp_path, capsys):
    file, labels, out = blobs(tmp_path), tmp_path / "labels.csv", tmp_path / "all.csv"
    labels.write_text("path,label\n" + "".join(f"d/{i}.jpg,{'abc'[i % 3]}\n" for i in range(6)))
    first = probe(file, labels, out=out)
    assert main(["probe", str(file), str(out), "--out", str(tmp_path / "same.csv")]) == 0
    assert "6 labels of 3 classes: a, b, c; 55 images have no label" in capsys.readouterr().out
    assert (tmp_path / "same.csv").read_text() == out.read_text()
    rows = [list(row.values()) for row in rows_of(out)]
    for i in range(6, 15):
        rows[i][1] = f" {'abc'[i % 3]} "  # spreadsheets and people leave spaces
    rows[20][1] = "  "
    with open(tmp_path / "more.csv", "w", newline="") as filled:
        writer = csv.writer(filled)
        writer.writerow(["path", "label", "predicted", "confidence"])
        writer.writerows([*rows, ["", "", "", ""], []])
    second = probe(file, tmp_path / "more.csv", out=tmp_path / "again.csv")
    assert len(first.labels) == 6 and second.classes == ["a", "b", "c"]
    assert second.labels == {i: "abc"[i % 3] for i in range(15)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n,a\n", "line 2: the label 'a' has no path"),
        ("path,label\nd/1.jpg,\nd/2.jpg,\n", "labels no image: fill in the column label of a few"),
        ("path,label\n", "labels no image"),
        ("path,class\nd/1.jpg,a\n", "has no column 'label': its first line is path,label"),
        ("path|label\nd/1.jpg|a\n", "has no column 'path': its first line is path,label"),
        ("path,label\nd/1.jpg,a\n1.jpg,b\n", "line 3: 1.jpg already has another label, 'a'"),
    ],
)
def test_what_is_wrong_in_a_table_of_labels_is_named(text, message, tmp_path):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        probe(blobs(tmp_path), tmp_path / "labels.csv", out=tmp_path / "o.csv")


@pytest.mark.parametrize(
    ("verb", "text"),
    [
        ("neighbors {file} nothing.png", "no image nothing.png among the 39 embedded"),
        ("neighbors {file} {broken}", "cannot be read"),
        ("neighbors {file} 0.png --k 0", "k is 0; it is at least 1"),
        ("neighbors nowhere.parquet x", "nowhere.parquet does not exist"),
        ("neighbors {csv} x", "is not a Parquet file of `simsiam embed`"),
        ("duplicates {blobs}", "no thumbnails"),
        ("duplicates {file} --threshold nan", "threshold is nan"),
        ("cluster {blobs} --out o.csv --html o.html", "no thumbnails"),
        ("outliers {blobs} --out o.csv --html o.html", "no thumbnails"),
        ("cluster {file} --clusters 1 --out o.csv", "clusters is 1"),
        ("cluster {file} --clusters 99 --out o.csv", "clusters is 99, and there are 39 images"),
        ("outliers {file} --k 0 --out o.csv", "k is 0"),
        ("probe {file} {csv} --out o.csv", "has no column 'path': its first line is path,label"),
        ("probe {file} {one} --out o.csv", "has one label, 'y'"),
        ("probe {file} nowhere.csv --out o.csv", "cannot be read"),
        ("embed {run} shapes --out x.txt", "ends in .txt: give a .parquet"),
        ("embed nowhere shapes --out x.parquet", "nowhere is not a run folder"),
        ("embed {run} nothing --out x.parquet", "no such file or folder: nothing"),
        ("embed {run} shapes --out x.parquet --limit 0", "limit is 0; it is at least 1"),
        ("embed {run} shapes --out {file}", "not overwritten"),
        ("embed {run} shapes --out {one_npy}", "one.csv exists and is not overwritten"),
        ("probe {file} {one} --out {one}", "one.csv exists, and this command may read it"),
        ("probe {file} {one} --out {file}", "exists, and this command may read it"),
        ("cluster {file} --out {file}", "exists, and this command may read it"),
        ("cluster {file} --html {file}", "exists, and this command may read it"),
        ("outliers {file} --out {file}", "exists, and this command may read it"),
        ("duplicates {file} --html {file}", "exists, and this command may read it"),
        ("duplicates {file} --source {folder} --out {broken}", "and this command may read it"),
        ("neighbors {file} 0.png --html {file}", "exists, and this command may read it"),
        ("neighbors {file} {broken} --html {broken}", "exists, and this command may read it"),
        ("search {folder} 0.png --html {broken}", "exists, and this command may read it"),
        (
            "probe {file} {one} --out nowhere/o.csv",
            "there is no folder nowhere to write o.csv into",
        ),
        ("neighbors {file} 0.png --html nowhere/o.html", "there is no folder nowhere"),
        ("duplicates {file} --out o.csv --html nowhere/o.html", "there is no folder nowhere"),
        ("cluster {file} --out o.csv --html {folder}", "is a folder: give the name of a file"),
        ("outliers {file} --html o.html --out nowhere/o.csv", "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(verb, text, run, folder, file, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.csv").write_text("name,label\nx,y\n")
    path = read_embeddings(file).paths[0]
    (tmp_path / "in" / "one.csv").write_text(f"path,label\n{path},y\n")
    names = {
        "file": file,
        "run": run,
        "folder": folder,
        "blobs": blobs(tmp_path / "in"),
        "csv": tmp_path / "in" / "bad.csv",
        "one": tmp_path / "in" / "one.csv",
        "one_npy": tmp_path / "in" / "one.npy",
        "broken": folder / shapes.CLASSES[0] / "broken.png",
    }
    before = {name: names[name].read_bytes() for name in ("file", "one", "broken")}
    code = main([word.format(**names) for word in verb.split()])
    error = capsys.readouterr().err.strip()
    assert code in (1, 2) and text in error and "\n" not in error, error
    assert not list(module.Path.cwd().iterdir())
    assert {name: names[name].read_bytes() for name in before} == before


def test_a_file_in_a_folder_of_inputs_is_kept_unless_it_is_a_table_or_a_page(tmp_path):
    given = tmp_path / "features"
    given.mkdir()
    for name in ("embeddings-00000-of-00001.parquet", "clusters.csv", "page.html"):
        (given / name).touch()
    check_writable(given / "clusters.csv", given / "page.html", given / "new.tsv", inputs=[given])
    (tmp_path / "link.csv").symlink_to(given / "embeddings-00000-of-00001.parquet")
    for out, inputs in (
        (given / "embeddings-00000-of-00001.parquet", given),
        (tmp_path / "link.csv", given / "embeddings-00000-of-00001.parquet"),
    ):
        with pytest.raises(UsageError, match="exists, and this command may read it"):
            check_writable(out, inputs=[inputs, "x" * 5000])


def test_metadata_names_the_run_the_source_and_the_preprocessing(run, file):
    metadata = json.loads(pq.read_schema(file).metadata[b"simsiam"])
    assert metadata["run"] == str(run.absolute()) and metadata["source"] == "few"
    assert metadata["transform"]["size"] == 32


def test_fiftyone_gets_paths_vectors_and_labels(run, folder, file, tmp_path, capsys):
    """As FiftyOne 1.22 exports its type LegacyFiftyOneDataset; it loads such a folder."""
    words = {"format": "fiftyone", "device": "cpu", "precision": "float32"}
    out, images = embed(run, folder, out=tmp_path / "fiftyone", **words), read_embeddings(file)
    fields = json.loads((out / "metadata.json").read_text())["sample_fields"]
    samples = json.loads((out / "samples.json").read_text())["samples"]
    assert [sample["path"] for sample in samples] == list(images.paths)
    for i, sample in enumerate(samples):
        assert sample.keys() <= fields.keys()
        assert sample["filepath"] == str((folder / images.paths[i]).absolute())
        assert sample["label"] == {"_cls": "Classification", "label": images.labels[i]}
        packed = base64.b64decode(sample["features"]["$binary"]["base64"])
        vector = np.load(io.BytesIO(zlib.decompress(packed)), allow_pickle=False)
        assert vector.dtype == np.float32 and np.allclose(vector, images.vectors[i], atol=1e-4)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, "a")
    out = embed(run, tmp_path / "a.tar", out=tmp_path / "thumbnails", **words)
    samples = json.loads((out / "samples.json").read_text())["samples"]
    assert [sample["filepath"] for sample in samples[:2]] == [
        "data/000000000.jpg",
        "data/000000001.jpg",
    ]
    assert all((out / sample["filepath"]).is_file() for sample in samples)
    assert f"{len(samples)} of {len(samples)} images are no files" in capsys.readouterr().err


def test_tensorboards_projector_gets_vectors_names_and_a_sprite(run, folder, file, tmp_path):
    from google.protobuf.text_format import Parse
    from tensorboard.plugins.projector import ProjectorConfig

    out = embed(
        run,
        folder,
        out=tmp_path / "projector",
        format="tensorboard",
        device="cpu",
        precision="float32",
    )
    config = Parse((out / "projector_config.pbtxt").read_text(), ProjectorConfig()).embeddings[0]
    vectors = np.loadtxt(out / config.tensor_path, delimiter="\t")
    images = read_embeddings(file)
    assert np.allclose(vectors, images.vectors, atol=1e-4)
    lines = (out / config.metadata_path).read_text().splitlines()
    assert lines[0] == "path\tlabel" and len(lines) == 1 + len(images)
    assert lines[8].split("\t") == [images.paths[7], images.labels[7]]
    sprite, side = Image.open(out / config.sprite.image_path), config.sprite.single_image_dim[0]
    assert sprite.size == (7 * side, 7 * side)  # 39 images in seven rows of seven
    shown = np.asarray(sprite)[side : 2 * side, :side]
    expected = Image.fromarray(images.thumbnail(7)).resize((side, side))
    assert np.abs(shown.astype(int) - np.asarray(expected)).mean() < 3
    with pytest.raises(UsageError, match="an --out without an ending"):
        embed(run, folder, out=tmp_path / "x.parquet", format="tensorboard")
    with pytest.raises(UsageError, match="format"):
        embed(run, folder, out=tmp_path / "x", format="tensorbord")


def test_pages_link_to_the_originals_and_say_their_size(run, folder, tmp_path):
    own = tmp_path / "own photos"
    shutil.copytree(folder, own)
    image = next(own.glob("*/0*.png"))
    Image.open(image).resize((48, 48)).save(image.with_name("a copy#1.png"))
    file = embed(run, own, out=tmp_path / "own.parquet", device="cpu", precision="float32")
    page = tmp_path / "copies.html"
    simsiam.duplicates(file, html=page)
    text = page.read_text()
    assert f'<a href="./own%20photos/{image.parent.name}/a%20copy%231.png">' in text
    assert "48 × 48, PNG, " in text
    for verb, words in ((outliers, {"k": 3}), (cluster, {"clusters": 2})):
        verb(file, html=page, **words)
        assert '<a href="./own%20photos/' in page.read_text()
    neighbors(file, image.name, html=page)
    assert '<a href="./own%20photos/' in page.read_text()
