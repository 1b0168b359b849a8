"""explore without a browser: what the server refuses, labels that last, scripts that only move."""

import csv
import io
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUICK
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.embeddings.embed import embed
from simsiam.embeddings.kept_embedding import SourceEncoder
from simsiam.embeddings.probe import probe
from simsiam.embeddings.table import read_embeddings
from simsiam.errors import UsageError, WorkFailed
from simsiam.explore.arrangement import arrange, find_clusters
from simsiam.explore.explore import explore, find_embedding
from simsiam.explore.path_table import PathTable
from simsiam.explore.queue import Teacher
from simsiam.explore.server import make_app
from simsiam.explore.session import Session
from simsiam.pages.embedding_gallery import is_embedding
from simsiam.sources import shapes
from simsiam.sources.open_source import open_source

TestClient = pytest.importorskip("starlette.testclient").TestClient
TOKEN, PORT = "token-of-the-test", 4321
HOST = f"http://127.0.0.1:{PORT}"
EVIL = "<img src=x onerror=alert(1)>'; rm -rf $HOME; '`id`.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simsiam.pretrain("shapes", out=tmp_path_factory.mktemp("runs") / "run", **QUICK)


def draw(root, count, copies=0):
    """Draws images into one folder; the first ones also as smaller JPEGs, which are copies."""
    root.mkdir()
    pixels, labels = shapes.draw_split("test")
    for i in range(count):
        image = Image.fromarray(pixels[i].transpose(1, 2, 0)).resize((96, 96), 0)
        image.save(root / f"{shapes.CLASSES[labels[i]]}-{i:04}.png")
        if i < copies:
            image.resize((64, 64)).save(root / f"copy-{i:04}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = draw(tmp_path_factory.mktemp("data") / "photos", 60, copies=6)
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(deep).save(root / "sixteen.png")
    next(root.glob("*-0059.png")).rename(root / EVIL)
    return root


@pytest.fixture(scope="module")
def file(run, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "photos.parquet"
    return embed(run, folder, out=out, device="cpu", precision="float32")


@pytest.fixture
def session(file, tmp_path):
    copy = tmp_path / "photos.parquet"
    shutil.copy(file, copy)
    session = Session(copy, read_embeddings(copy))
    yield session
    session.close()


def finish(session):
    """Waits for the predictions."""
    session._fitter.submit(lambda: None).result()


@pytest.fixture
def client(session):
    with TestClient(make_app(session, TOKEN, PORT), base_url=HOST) as client:
        client.headers["origin"] = HOST
        yield client


def get(client, path, **headers):
    return client.get(f"/{TOKEN}/{path}", headers=headers)


def post(client, path, body):
    return client.post(f"/{TOKEN}/{path}", json=body)


# --- what is refused ------------------------------------------------------------------------------


def test_only_the_whole_address_from_the_page_itself_is_answered(client):
    assert get(client, "").status_code == get(client, "state").status_code == 200
    for path in ("", "/", "/state", f"/{TOKEN}", "/token-of-the-tesT/", f"/{TOKEN[:-1]}/state"):
        assert client.get(path or "/x").status_code == 403, path
    for host in ("evil.example", f"evil.example:{PORT}", "127.0.0.1:80", "127.0.0.1", ""):
        answer = get(client, "state", host=host, origin=f"http://{host}")
        assert answer.status_code == 403, host
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{PORT}", "http://127.0.0.1"):
        assert get(client, "state", origin=origin).status_code == 403, origin
        answer = client.post(f"/{TOKEN}/undo", json={"what": "labels"}, headers={"origin": origin})
        assert answer.status_code == 403, origin
    for site in ("cross-site", "same-site"):
        assert get(client, "thumbnails/0", **{"sec-fetch-site": site}).status_code == 403
    del client.headers["origin"]
    assert get(client, "state").status_code == 200
    assert post(client, "undo", {"what": "labels"}).status_code == 403


def test_no_text_of_the_browser_becomes_a_path(client, folder):
    for path in (
        "images/../../../../etc/passwd", "images/%2e%2e%2fetc%2fpasswd", "images/-1", "images/999",
        "images/1e0", "../state", "..%2fserver.py", "explore.html.py",
        "server.py", "page/page.css", "thumbnails/67", f"images/{folder}",
    ):  # fmt: skip
        assert get(client, path).status_code in (403, 404), path
    for body in ({"rows": [999], "label": "x"}, {"rows": [-1], "label": "x"}):
        assert post(client, "label", body).status_code == 404
    for body in ({"rows": ["0"], "label": "x"}, {"rows": [0]}, [], "x", {"rows": [0], "label": 1}):
        assert post(client, "label", body).status_code == 400
    assert post(client, "search", {"name": str(folder / EVIL)}).status_code == 400
    assert post(client, "export", {"kind": "../x", "rows": []}).status_code == 400
    assert post(client, "decide", {"decisions": [[0, "delete"]]}).status_code == 400


def test_every_answer_forbids_inline_scripts_and_other_origins(client):
    for path in ("", "main.js", "state", "thumbnails/0", "images/0", "images/999", "nothing"):
        headers = get(client, path).headers
        policy = headers["content-security-policy"]
        assert "script-src 'self'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff", path
    page = get(client, "").text
    assert "<style" not in page and " style=" not in page and "onclick" not in page


# --- images ---------------------------------------------------------------------------------------


def test_an_original_comes_in_full_size_and_a_form_that_browsers_show(client, session):
    images = session.images
    for name, size in ((EVIL, (96, 96)), ("sixteen.png", (32, 32))):
        answer = get(client, f"images/{images.find(name)}")
        shown = Image.open(io.BytesIO(answer.content))
        assert answer.headers["content-type"] == "image/jpeg"
        assert (shown.format, shown.size) == ("JPEG", size)
    facts = get(client, f"facts/{images.find('copy-0000.jpg')}").json()
    assert (facts["width"], facts["format"], facts["error"]) == (64, "JPEG", "")


def test_an_image_that_is_gone_says_so_and_root_finds_it_again(file, folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    name = "sixteen.png"
    (moved / name).unlink()
    session = Session(file, read_embeddings(file), str(moved))
    with TestClient(make_app(session, TOKEN, PORT), base_url=HOST) as client:
        answer = get(client, f"images/{session.images.find(name)}")
        assert answer.status_code == 404 and "no image of the source has this name" in answer.text
        assert get(client, "images/0").status_code == 200
    session.close()
    session = Session(file, read_embeddings(file), str(tmp_path / "nowhere"))
    assert "nowhere" in session.originals.missing
    session.close()


def test_search_by_row_and_outside_picture(client, session, folder):
    x = session.images.vectors
    cosine = (x @ x[3]) / x.norm(dim=1) / x[3].norm()
    expected = [i for i in cosine.sort(descending=True, stable=True).indices.tolist() if i != 3]
    by_row = post(client, "search", {"row": 3}).json()
    assert by_row["rows"] == expected[: len(by_row["rows"])]
    name = session.images.paths[3]
    url = f"/{TOKEN}/search-image"
    outside = client.post(url, content=(folder / name).read_bytes()).json()
    assert outside["rows"][0] == 3 and outside["row"] is None
    assert outside["cosines"][3] == pytest.approx(1, abs=2e-3)
    assert client.post(url, content=b"<svg onload=alert(1)>").status_code == 500


# --- labels ---------------------------------------------------------------------------------------


def test_a_file_of_another_form_is_refused_each_time_and_never_overwritten(session):
    session.label([0], "a")
    foreign = "path,label,who\nx.png,a,me\n"
    session.labels.file.write_text(foreign)
    for _ in range(2):
        with pytest.raises(UsageError, match="move it away"):
            session.label([1], "b")
    assert session.labels.file.read_text() == foreign and session.labeled_rows() == {0: "a"}


def test_labels_by_file_name_count_once_and_those_of_other_images_do_not(file, folder, tmp_path):
    moved = tmp_path / "photos.parquet"
    table = pq.read_table(file)
    paths = [f"deep/{path}" for path in table["path"].to_pylist()]
    pq.write_table(table.set_column(0, "path", pa.array(paths)), moved)
    (tmp_path / "photos.labels.csv").write_text(
        f"path,label\n{Path(paths[2]).name},old\ngone.png,old\n"
    )
    session = Session(moved, read_embeddings(moved))
    assert session.progress()["labeled"] == 1 and session.labeled_rows() == {2: "old"}
    session.label([2], "new")
    assert session.labeled_rows() == {2: "new"}
    session.label([2], "")
    assert session.labeled_rows() == {}
    session.close()


def test_an_image_that_shares_its_path_has_no_label_and_gives_its_label_to_no_other(file, tmp_path):
    """The page shows what `simsiam probe` reads: a name that several images have names none."""
    table = pq.read_table(file)
    paths = table["path"].to_pylist()
    paths[:4] = ["same.png", "same.png", "x/two.png", "y/two.png"]
    copy = tmp_path / "photos.parquet"
    pq.write_table(table.set_column(0, "path", pa.array(paths)), copy)
    for column in ("label", "decision"):
        text = f"path,{column}\nsame.png,keep\ntwo.png,keep\nx/two.png,drop\n{paths[5]},drop\n"
        (tmp_path / f"photos.{column}s.csv").write_text(text)
    session = Session(copy, read_embeddings(copy))
    with pytest.raises(UsageError, match=r"2 images are named same\.png: they have the same path"):
        session.images.find("same.png")
    with TestClient(make_app(session, TOKEN, PORT), base_url=HOST) as client:
        client.headers["origin"] = HOST
        state = get(client, "state").json()
        assert sorted(state["labels"]) == sorted(state["decisions"]) == [[2, "drop"], [5, "drop"]]
        table = post(client, "export", {"kind": "images.csv", "rows": [0, 1, 2]}).text
        rows = list(csv.DictReader(io.StringIO(table, newline="")))
        assert [row["label"] for row in rows] == [row["decision"] for row in rows]
        assert [row["label"] for row in rows] == ["", "", "drop"]
        for what, body, count in (
            ("label", {"rows": [1, 4], "label": "a"}, "1 of these 2"),
            ("decide", {"decisions": [[1, "drop"]]}, "1 of these 1"),
        ):
            answer = post(client, what, body)
            assert answer.status_code == 400 and f"{count} images share their path" in answer.text
        labels, decisions = session.labels.values, session.decisions.values
        assert labels["same.png"] == decisions["same.png"] == "keep" and labels[paths[4]] == "a"
    session.close()


def test_the_order_of_the_classes_is_kept(client, session):
    words = {"rows": [0], "label": "cat", "classes": ["dog", "cat"]}
    assert post(client, "label", words).json()["classes"] == ["dog", "cat"]
    post(client, "label", {"rows": [1], "label": "ant"})
    assert get(client, "state").json()["classes"] == ["dog", "cat", "ant"]


def label_by_name(client, session, rows):
    for row in rows:
        label = session.images.paths[row].split("-")[0]
        assert post(client, "label", {"rows": [row], "label": label}).status_code == 200


def test_predictions_are_those_of_the_verb_probe(client, session, tmp_path):
    names = shapes.CLASSES[:3]
    rows = [i for i, path in enumerate(session.images.paths) if path.split("-")[0] in names][:12]
    label_by_name(client, session, [*rows[::2], *rows[::-2]])
    finish(session)
    result = probe(session.file, session.labels.file, out=tmp_path / "all.csv")
    assert list(session.labeled_rows()) == list(result.labels)  # their order decides the folds
    assert session.result.correct == result.correct
    found = get(client, "predictions").json()
    assert found["classes"] == result.classes
    assert found["predicted"] == result.predicted.tolist()
    assert found["confidence"] == np.round(100 * result.confidence).astype(int).tolist()
    progress = get(client, "state").json()["progress"]
    assert progress["labeled"] == len(rows) and 0 <= progress["low"] < progress["high"] <= 100


def test_every_label_is_on_the_disk_and_undo_takes_it_back(client, session, file):
    post(client, "label", {"rows": [0, 1], "label": "  cat \n <b>dog "})
    post(client, "label", {"rows": [1, 2], "label": "=SUM(A1)"})
    again = Session(session.file, session.images)
    expected = {0: "cat <b>dog", 1: "=SUM(A1)", 2: "=SUM(A1)"}
    assert again.labeled_rows() == session.labeled_rows() == expected
    again.close()
    post(client, "undo", {"what": "labels"})
    post(client, "undo", {"what": "labels"})
    post(client, "undo", {"what": "labels"})
    assert session.labels.file.read_bytes() == b"path,label\r\n"
    assert PathTable(session.labels.file, "label").values == {}
    assert post(client, "label", {"rows": [0], "label": "x" * 101}).status_code == 400


def test_what_another_program_writes_meanwhile_is_kept(session):
    session.label([0], "a")
    with open(session.labels.file, "a", newline="") as table:
        table.write(f"{session.images.paths[5]},b\r\n")
    session.label([1], "c")
    assert session.labeled_rows() == {0: "a", 1: "c", 5: "b"}


def test_a_file_with_other_columns_is_not_overwritten(session, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("path,label,predicted\nx,y,z\n")
    with pytest.raises(UsageError, match="move it away"):
        PathTable(other, "label")


def test_labels_that_cannot_be_written_are_not_shown(session, monkeypatch):
    session.label([0], "a")

    def refuse(*_):
        raise WorkFailed("cannot write: no space")

    monkeypatch.setattr("simsiam.explore.path_table.write_csv", refuse)
    with pytest.raises(WorkFailed):
        session.label([1], "b")
    with pytest.raises(WorkFailed):
        session.undo(session.labels)
    assert session.labeled_rows() == {0: "a"} and session.labels.undo_count == 1


def test_the_queue_covers_regions_and_then_asks_what_is_unsure():
    rng = np.random.default_rng(0)
    centers = 5 * rng.normal(size=(6, 16))
    x = torch.from_numpy(np.repeat(centers, 20, 0) + rng.normal(size=(120, 16))).float()
    teacher = Teacher(x)
    first = teacher.choose([], None, 6)
    assert len({i // 20 for i in first}) == 6
    assert not set(teacher.choose(first, None, 12)) & set(first)
    confidence = np.ones(120)
    confidence[40:60] = 0.3
    assert teacher.choose(first, confidence, 1)[0] // 20 == 2
    assert teacher.choose(list(range(120)), None) == []


def test_clusters_and_the_map_of_more_images_than_are_arranged(monkeypatch):
    x = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    whole = find_clusters(x)
    for name in ("MAX_ARRANGED", "MAX_CLUSTERED"):
        monkeypatch.setattr(f"simsiam.explore.arrangement.{name}", 60)
    name, xy = arrange(x)
    assert "60 images, the others beside them" in name and xy.shape == (90, 2)
    assert np.isfinite(xy).all() and len(find_clusters(x)) == 90
    from simsiam.embeddings.cluster import center_and_normalize, kmeans

    assert (whole == kmeans(center_and_normalize(x).numpy(), 10, 0).assignments).all()


# --- cleaning up ----------------------------------------------------------------------------------


def wait_for(work):
    for _ in range(600):
        if (found := work()) is not None:
            return found
        time.sleep(0.1)
    raise AssertionError("it takes more than a minute")


def test_the_script_leaves_the_proposed_copies_and_changes_nothing_without_yes(
    client, session, folder, tmp_path
):
    groups = wait_for(lambda: post(client, "copies", {"threshold": 0.28}).json())
    names = [[session.images.paths[row] for row in group["rows"]] for group in groups]
    expected = {f"copy-{i:04}.jpg" for i in range(6)}
    assert expected <= {name for group in names for name in group[1:]}
    assert all(group["reason"] == "the most pixels" for group in groups[:1])
    decisions = [(r, "drop" if i else "keep") for g in groups for i, r in enumerate(g["rows"])]
    evil = session.images.find(EVIL)
    decisions += [(evil, "drop")]
    assert post(client, "decide", {"decisions": decisions}).status_code == 200
    script = tmp_path / "drop.sh"
    script.write_bytes(post(client, "export", {"kind": "drop.sh", "rows": []}).content)
    copy = tmp_path / "the copy"
    shutil.copytree(folder, copy)
    before = sorted(os.listdir(copy))
    dropped = {session.images.paths[row] for row, value in decisions if value == "drop"}

    def run_script(*words):
        return subprocess.run(["sh", script, copy, *words], capture_output=True, text=True)

    done = run_script()
    assert done.returncode == 0 and "nothing was changed" in done.stdout and EVIL in done.stdout
    assert sorted(os.listdir(copy)) == before
    assert run_script("--no").returncode == 2
    assert run_script("--yes").returncode == 0
    assert set(os.listdir(copy)) == set(before) - dropped
    assert set(os.listdir(tmp_path / "the copy-dropped")) == dropped
    again = run_script("--yes")
    assert again.returncode == 0 and again.stdout.count("not there") == len(dropped)
    shutil.copytree(folder, tmp_path / "other")
    words = ["sh", str(script), ".", "--yes"]
    subprocess.run(words, check=True, capture_output=True, cwd=tmp_path / "other")
    assert set(os.listdir(tmp_path / "other-dropped")) == dropped
    text = post(client, "export", {"kind": "dropped.txt", "rows": []}).text
    assert set(text.splitlines()) == dropped


def test_after_a_clean_up_the_next_session_saves_what_is_left(file, folder, tmp_path):
    """What has no file any more is left out and counted; if nothing is left, that is an error."""
    rest = tmp_path / "photos"
    shutil.copytree(folder, rest)
    images = read_embeddings(file)
    (tmp_path / "photos.decisions.csv").write_text(
        f"path,decision\n{images.paths[3]},drop\n{images.paths[4]},drop\n"
    )
    (tmp_path / "photos.labels.csv").write_text(
        f"path,label\n{images.paths[3]},a\n{images.paths[4]},b\n"
    )

    def save(*kinds):
        session = Session(tmp_path / "photos.parquet", images, str(rest))
        with TestClient(make_app(session, TOKEN, PORT), base_url=HOST) as client:
            client.headers["origin"] = HOST
            answers = [post(client, "export", {"kind": kind, "rows": []}) for kind in kinds]
        session.close()
        return answers

    (rest / images.paths[3]).unlink()
    for answer in save("drop.sh", "dropped.txt", "folders-by-label.sh"):
        assert answer.status_code == 200 and answer.headers["left-out"] == "1"
        assert images.paths[4] in answer.text and images.paths[3] not in answer.text
        assert "left out: 1" in answer.text or answer.text == f"{images.paths[4]}\n"
    (rest / images.paths[4]).unlink()
    for answer in save("drop.sh", "dropped.txt", "folders-by-label.sh"):
        assert answer.status_code == 400 and "none of 2 images has a file" in answer.text
    kept = save("source.txt")[0]
    assert kept.headers["left-out"] == "0" and len(kept.text.splitlines()) == len(images) - 2


def test_a_list_is_a_source_and_a_table_and_folders_hold_the_labels(
    client, session, folder, tmp_path
):
    session.label([0, 1], "a/b")
    session.decide({2: "drop"})
    listed = tmp_path / "source.txt"
    listed.write_bytes(post(client, "export", {"kind": "source.txt", "rows": [0, 1, 2]}).content)
    copy = tmp_path / "source"
    shutil.copytree(folder, copy)
    shutil.move(listed, copy / "source.txt")
    opened = open_source(str(copy / "source.txt"), 3)
    assert sum(map(len, opened.splits.values())) == 2
    table = post(client, "export", {"kind": "images.csv", "rows": [0, 2]}).text
    rows = list(csv.DictReader(io.StringIO(table, newline="")))
    assert [row["label"] for row in rows] == ["a/b", ""] and rows[1]["decision"] == "drop"
    script = tmp_path / "folders.sh"
    kind = {"kind": "folders-by-label.sh", "rows": []}
    script.write_bytes(post(client, "export", kind).content)
    subprocess.run(["sh", script, copy, "--yes"], check=True, capture_output=True)
    assert len(os.listdir(tmp_path / "source-sorted" / "a_b")) == 2
    assert post(client, "export", {**kind, "kind": "folders-by-prediction.sh"}).status_code == 400


def test_outliers_come_farthest_first(client, session):
    found = wait_for(lambda: get(client, "outliers").json())
    distances = [group["distances"][0] for group in found]
    assert distances == sorted(distances, reverse=True)
    expected = simsiam.outliers(session.file)[0].path
    assert session.images.paths[found[0]["rows"][0]] == expected


# --- the command ----------------------------------------------------------------------------------


def test_mistakes_get_one_line_and_the_address_comes_first(file, capsys):
    for port in (-1, 65536):
        with pytest.raises(UsageError, match="port"):
            explore(file, port=port, browser=False)
    with pytest.raises(UsageError, match="does not exist"):
        explore("nothing.parquet", browser=False)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("http://127.0.0.1:") and len(first.split("/")[3]) >= 32


def test_a_run_is_embedded_first_and_another_one_of_that_name_is_refused(run, folder, tmp_path):
    made = find_embedding(run)
    assert made.name == "run.parquet" and len(read_embeddings(made)) > 0
    assert find_embedding(run) == made
    other = tmp_path / "run"
    shutil.copytree(run, other)
    with pytest.raises(UsageError, match="other images"):
        find_embedding(other)


@pytest.fixture
def own_encoder(run, monkeypatch):
    """Sources are embedded by the run of these tests."""
    encoder = SourceEncoder("run", run)
    monkeypatch.setattr("simsiam.explore.explore.choose_encoder", lambda *_: encoder)


def make_shards(folder, root):
    """One Parquet file and one tar of images."""
    files = sorted(folder.glob("[a-z]*.png"))[:8]
    column = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    for name in ("parquet", "tar"):
        (root / name).mkdir(parents=True)
    pq.write_table(pa.table({"image": column}), root / "parquet" / "photos.parquet")
    with tarfile.open(root / "tar" / "photos.tar", "w") as archive:
        for file in files:
            archive.add(file, file.name)
    return len(files)


def test_shards_are_images_and_are_never_replaced_by_their_embedding(
    own_encoder, folder, file, tmp_path, monkeypatch
):
    count = make_shards(folder, tmp_path)
    assert is_embedding(file) and is_embedding("nothing.parquet")
    for name in ("parquet", "parquet/photos.parquet", "tar"):
        assert not is_embedding(tmp_path / name)
    with pytest.raises(UsageError, match="has no column 'path', only image"):
        simsiam.report(tmp_path / "parquet" / "photos.parquet")
    assert len(read_embeddings(find_embedding(tmp_path / "tar"))) == count
    monkeypatch.chdir(tmp_path / "parquet")
    with pytest.raises(UsageError, match="among the shards of this folder"):
        find_embedding(".")
    before = Path("photos.parquet").read_bytes()
    made = find_embedding("photos.parquet")
    assert made.name == "photos-embedding.parquet" and len(read_embeddings(made)) == count
    assert find_embedding("photos.parquet") == made
    assert Path("photos.parquet").read_bytes() == before


def test_a_dot_is_the_folder_of_an_embedding_or_of_images(
    own_encoder, run, folder, tmp_path, monkeypatch
):
    """Labels are beside the embedding, in the same file each time."""
    out = embed(run, folder, out=tmp_path / "features", device="cpu")
    monkeypatch.chdir(out)
    assert find_embedding(".") == out
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    monkeypatch.chdir(photos)
    assert find_embedding(".").absolute() == photos / "photos.parquet"
    assert find_embedding(".").absolute() == photos / "photos.parquet"
    monkeypatch.chdir(tmp_path)
    assert find_embedding("photos") == photos / "photos.parquet"
    other = tmp_path / "other"  # with an embedding of its name, of images elsewhere
    embed(run, folder, out=other / "other.parquet", device="cpu")
    monkeypatch.chdir(other)
    assert find_embedding(".") == other


def test_no_labels_and_splits_count_for_what_is_embedded_and_no_other_embedding_is_taken(
    own_encoder, folder, tmp_path, capsys
):
    source = tmp_path / "drawings"
    for kind in "ab":
        (source / kind).mkdir(parents=True)
        for i, path in enumerate(sorted(folder.glob("copy-*.jpg"))):
            shutil.copy(path, source / kind / f"{i}.jpg")
    made = find_embedding(source, no_labels=True, splits=["train=a", "test=b"])
    images = read_embeddings(made)
    assert images.labels is None and images.metadata["splits"] == ["train=a", "test=b"]
    assert find_embedding(source, no_labels=True, splits=["train=a", "test=b"]) == made
    for other in ({"no_labels": True}, {"splits": ["train=a", "test=b"]}, {}):
        with pytest.raises(UsageError, match="with another --no-labels or --splits"):
            find_embedding(source, **other)
    assert main(["explore", str(made), "--no-browser", "--no-labels"]) == 2
    assert "--no-labels and --splits are for images" in capsys.readouterr().err
    made.unlink()
    assert set(read_embeddings(find_embedding(source)).labels) == {"a", "b"}
