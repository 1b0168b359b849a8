"""The page shows what run folders contain and which images are similar; no name becomes markup."""

import base64
import json
import re
import shutil
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.config.recipes import Recipe
from simsiam.data.images import from_arrays
from simsiam.errors import UsageError
from simsiam.pages.image_map import NUM_NEIGHBORS, cluster_features, project_to_2d
from simsiam.pages.report import MAX_CURVE_POINTS, extract_curves, render_report, report
from simsiam.pages.thumbnails import build_gallery, encode_gallery
from simsiam.runs.encoder import build_backbone
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source

HOSTILE = "<img src=x onerror=alert(1)>.jpg"
IMAGES_PER_CLASS = 14


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Red and blue noise; the names of a class, a file and the folder look like markup."""
    folder, rng = tmp_path_factory.mktemp("a") / "<photos>", np.random.default_rng(0)
    for name, color in (("<!--red<script>", (200, 60, 60)), ("blue", (60, 60, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(IMAGES_PER_CLASS):
            noise = (np.array(color) + rng.integers(-50, 50, (40, 44, 3))).astype(np.uint8)
            Image.fromarray(noise).save(
                folder / name / (HOSTILE if i == 3 else f"{i:02}.png"), quality=95
            )
    return folder


def run_folder(path, source, **settings) -> Run:
    """The folder of a finished run on the source, with its initial weights."""
    defaults = {
        "backbone": "resnet10",
        "width": 4,
        "image_size": 32,
        "mean": [0.4] * 3,
        "std": [0.2] * 3,
        "dim": 16,
    }
    recipe = Recipe().replace(source=[str(source)], **defaults | settings).resolve()
    run = Run.create(path, recipe)
    torch.manual_seed(run.recipe.seed)
    steps = [
        {"step": s, "epoch": s / 10, "loss": -s / 100, "z_rank": 3.5, "lr": 0.1}
        for s in range(1, 100)
    ]
    lines = [
        *steps,
        {"step": 100, "epoch": 10.0, "loss": float("nan"), "knn_top1": 61.5, "knn_top1_z": 60.0},
    ]
    run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run.write("environment.json", {"versions": {"torch": "2"}, "command": ["simsiam", "pretrain"]})
    record = {
        "protocol": "knn",
        "name": "k 5",
        "features": "h",
        "top1": 71.43,
        "top5": None,
        "n": 28,
    }
    run.write(
        "evaluations/knn.json",
        json.dumps([record | {"interval": [52.9, 84.7], "source": "photos"}]),
    )
    remedy = "Nothing </script><script>alert(2)</script> to fix."
    run.finish(
        build_backbone(run.recipe).state_dict(),
        {"verdict": "healthy", "remedy": remedy, "steps": 100},
    )
    return run


def page_data(path) -> dict:
    """The data that a page contains."""
    return json.loads(
        re.search(
            r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S
        )[1]
    )


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("b") / "<i>run", photos)


@pytest.fixture(scope="module")
def page(run):
    return report(run.path)


def rank_by_cosine(run: Run, folder, names) -> np.ndarray:
    """For each image the others by decreasing cosine of the backbone's features: (N, N - 1)."""
    encoder = simsiam.load(run.path)
    with torch.no_grad():
        rows = [
            encoder(encoder.transform(Image.open(folder / name)))[0].double().numpy()
            for name in names
        ]
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in rows] for a in rows])
    np.fill_diagonal(cosine, -2)
    return np.argsort(-cosine, axis=1)[:, :-1]


# --- what the page contains -----------------------------------------------------------------------


def test_the_page_shows_what_the_run_folder_contains(run, page):
    (shown,) = page_data(page)["runs"]
    assert page == run.path / "report.html" and shown["recipe"] == run.recipe.to_dict()
    assert shown["summary"] == run.json("summary.json") and shown["results"] == run.evaluations()
    assert shown["curves"]["loss"][:2] == [-0.01, -0.02] and shown["curves"]["loss"][-1] is None
    assert (
        shown["curves"]["knn_top1"] == [None] * 99 + [61.5]
        and "lr_predictor" not in shown["curves"]
    )


def test_no_data_ends_the_element_it_is_stored_in():
    data = {"a": "</script><!-- {js} {data} -->", "b": [float("nan"), 1.5], "c": "\udc80\u2028"}
    text = render_report(data)
    assert text.count("</script") == 2 and text.count("<!--") == 0
    assert json.loads(re.search(r'id="data">(.*?)</script>', text)[1]) == data | {"b": [None, 1.5]}


def test_the_script_makes_no_markup_and_no_requests():
    script = render_report({})
    for name in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "fetch(",
        "XMLHttp",
        "http:",
    ):
        assert name not in script.replace("http://www.w3.org/2000/svg", ""), name
    assert "default-src 'none'" in script and "unsafe" not in script


def test_a_long_run_keeps_its_ends_and_all_measurements():
    lines = [{"step": s, "epoch": s / 100, "loss": -1 / s} for s in range(1, 9001)]
    for line in lines[776::777]:
        line["knn_top1"] = line["step"] / 100
    columns = extract_curves(lines)
    assert [v for v in columns["knn_top1"] if v is not None] == [
        s / 100 for s in range(777, 9001, 777)
    ]
    assert (
        columns["step"][0] == 1
        and columns["step"][-1] == 9000
        and columns["step"] == sorted(columns["step"])
    )
    assert MAX_CURVE_POINTS <= len(columns["step"]) <= MAX_CURVE_POINTS + 12


def test_neighbors_are_the_most_similar_others(run, page, photos):
    data = page_data(page)
    names, neighbors = data["galleries"][0]["names"], np.array(data["runs"][0]["map"]["neighbors"])
    assert sorted(names) == sorted(str(path.relative_to(photos)) for path in photos.rglob("*.*"))
    assert np.array_equal(neighbors, rank_by_cosine(run, photos, names)[:, :NUM_NEIGHBORS])


@pytest.mark.parametrize(
    ("x", "groups"), [(np.zeros((40, 7)), 1), (np.arange(5.0)[:, None], 3), (np.eye(6), 6)]
)
def test_a_map_of_collapsed_or_few_images_is_finite(x, groups):
    _, xy = project_to_2d(x)
    assert xy.shape == (len(x), 2) and np.isfinite(xy).all() and xy.min() >= 0 and xy.max() <= 1
    assert (
        len(set(cluster_features(torch.from_numpy(x), 0))) == groups
    )  # numbers are below, at or above the mean


def test_similar_images_are_close_together():
    x = np.random.default_rng(0).normal(size=(60, 8)) + 30 * np.eye(8)[np.arange(60) % 3]
    _, xy = project_to_2d(x)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2) + 9 * np.eye(60)
    assert (distance.argmin(1) % 3 == np.arange(60) % 3).all()


def test_thumbnails_are_the_images_in_order_and_fit_the_space():
    rng = np.random.default_rng(0)
    pixels = (
        np.repeat(rng.integers(0, 256, (300, 3, 1, 1)), 32 * 32, 2)
        .reshape(300, 3, 32, 32)
        .astype(np.uint8)
    )
    gallery = encode_gallery(build_gallery(from_arrays("train", pixels)), 10**6)
    sheet = np.asarray(
        Image.open(BytesIO(base64.b64decode(gallery["sheets"][0].partition(",")[2]))).convert("RGB")
    )
    assert (gallery["side"], gallery["across"], gallery["pixelated"], gallery["labels"]) == (
        32,
        60,
        True,
        None,
    )
    for i in (0, 59, 60, 299):
        cell = sheet[
            32 * (i // 60) + 12 : 32 * (i // 60) + 20, 32 * (i % 60) + 12 : 32 * (i % 60) + 20
        ]
        assert np.abs(cell.mean((0, 1)) - pixels[i, :, 0, 0]).max() < 12
    noise = build_gallery(
        from_arrays("train", rng.integers(0, 256, (300, 3, 32, 32), dtype=np.uint8))
    )
    size = len(encode_gallery(noise, 10**9)["sheets"][0]) * 3 / 4
    assert len(encode_gallery(noise, round(0.6 * size))["sheets"][0]) * 3 / 4 <= 0.6 * size + 100


def test_the_page_says_what_it_cannot_show(photos, tmp_path, capsys):
    moved = run_folder(tmp_path / "moved", tmp_path / "<gone>")
    unfinished = run_folder(tmp_path / "unfinished", photos)
    (unfinished.path / "backbone.safetensors").unlink()
    data = page_data(report([moved.path, unfinished.path], out=tmp_path / "page.html"))
    no_images, no_map = [run["missing"] for run in data["runs"]]
    assert no_images.startswith("no images: the images of this run cannot be opened: no such file")
    assert "no map: " in no_map and "simsiam resume" in no_map
    assert [bool(run["views"]) for run in data["runs"]] == [False, True]
    assert data["galleries"] == [] and no_images in capsys.readouterr().out
    assert page_data(report(moved.path, images=False))["runs"][0]["missing"] is None


def test_an_embedding_has_the_map_that_its_run_has(run, page, photos, tmp_path, capsys):
    """Names, clusters and neighbors are those of the run's page; what is missing is one line."""
    file = simsiam.embed(run.path, photos, out=tmp_path / "<b>.parquet", precision="float32")
    data, expected = page_data(report(file)), page_data(page)
    assert (tmp_path / "<b>-report.html").exists()
    (shown,), (of_run,) = data["runs"], expected["runs"]
    for key in ("names", "labels", "classes"):
        assert data["galleries"][0][key] == expected["galleries"][0][key]
    for key in ("x", "y", "cosines"):
        assert np.allclose(shown["map"][key], of_run["map"][key], atol=0.01)
    assert shown["map"]["clusters"] == of_run["map"]["clusters"]
    assert shown["embedding"] == {"images": 28, "dim": 32, "source": "photos"}
    assert "no verdict, curves, results, views and recipe" in shown["missing"]
    without = page_data(report(file, limit=9, no_labels=True))
    assert without["galleries"][0]["labels"] is None and len(without["galleries"][0]["names"]) == 9
    folder = simsiam.embed(run.path, photos, out=tmp_path / "folder", precision="float32")
    assert main(["report", str(folder)]) == 0 and (folder / "report.html").exists()
    assert page_data(report(run.path, no_labels=True))["galleries"][0]["labels"] is None
    report(run.path)
    capsys.readouterr()
    few = simsiam.embed(run.path, photos, out=tmp_path / "few.parquet", limit=4)
    assert page_data(report(few))["runs"][0]["missing"].startswith("no map: a map needs at least 5")
    assert "no map: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "page.txt"], "page.txt: give the name of a file ending in .html"),
        (["--out", "nowhere/page.html"], "there is no folder nowhere"),
        (["--limit", "2"], "limit is 2; it lies between 5 and 20000"),
        (["elsewhere"], "elsewhere is not a run folder"),
    ],
)
def test_a_wrong_request_is_one_line(run, options, message, capsys):
    before = sorted(run.path.rglob("*"))
    assert main(["report", str(run.path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and sorted(run.path.rglob("*")) == before


def test_damaged_evaluations_are_named(photos, tmp_path):
    run = run_folder(tmp_path / "run", photos)
    run.write("evaluations/linear.json", '{"top1": 3}')
    with pytest.raises(UsageError, match=r"linear.json is damaged: its content should be"):
        report(run.path, images=False)


# --- what a reader does with it -------------------------------------------------------------------


@pytest.fixture
def visit(browser):
    """Opens a page; at the end there were no requests, script errors, messages or dialogs."""
    events, contexts = [], []

    def visit(path, width=1440):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, accept_downloads=True
        )
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(120_000)
        tab.on("console", lambda message: events.append(message.text))
        tab.on("pageerror", lambda error: events.append(str(error)))
        tab.on("dialog", lambda dialog: (events.append(dialog.message), dialog.dismiss()))
        tab.on(
            "request",
            lambda r: None if r.url.startswith(("data:", "blob:")) else events.append(r.url),
        )
        tab.goto(path.as_uri())
        assert events.pop(0) == path.as_uri()
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert not events


def on_screen(tab, data):
    """Where each image's point is on the map's canvas in pixels, and where the canvas is."""
    canvas = tab.locator(".plot canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    xy = np.array([data["runs"][0]["map"]["x"], data["runs"][0]["map"]["y"]]).T
    low, high = xy.min(0), xy.max(0)
    scale = (min(box["width"], box["height"]) - 40) / (high - low).max()
    return (xy - (low + high) / 2) * scale + [
        box["x"] + box["width"] / 2,
        box["y"] + box["height"] / 2,
    ]


def most_isolated(points) -> int:
    """The image whose point is farthest from all others."""
    return int(
        (np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(len(points)))
        .min(1)
        .argmax()
    )


def downloaded(tab) -> list[str]:
    with tab.expect_download() as download:
        tab.locator("#download").click()
    return download.value.path().read_text().splitlines()


def test_hover_shows_the_image_and_click_its_neighbors(visit, run, page, photos):
    data = page_data(page)
    names = data["galleries"][0]["names"]
    for i in (
        most_isolated(on_screen(visit(page), data)),
        next(i for i, name in enumerate(names) if HOSTILE in name),
    ):
        tab = visit(page)
        points = on_screen(tab, data)
        tab.mouse.move(*points[i])
        tip = tab.locator(".tip")
        tip.wait_for()
        assert names[i] in tip.inner_text()
        tab.evaluate("loadSheet(data.galleries[0], 0).then(() => 0)")  # decoded and drawn
        color = np.asarray(
            Image.open(BytesIO(tip.locator("canvas").screenshot())).convert("RGB")
        ).mean((0, 1))
        assert (color[0] > color[2]) == ("red" in names[i])
        tab.mouse.click(*points[i])
        tiles = tab.locator("aside .tile").evaluate_all(
            "tiles => tiles.map(t => Number(t.dataset.image))"
        )
        assert tiles == rank_by_cosine(run, photos, names)[i, :NUM_NEIGHBORS].tolist()
        assert names[i] in tab.locator("aside").inner_text()
        tab.locator("aside .tile").first.click()
        assert names[tiles[0]] in tab.locator("aside").inner_text()


def test_pictures_react_to_the_pointer(visit, page):
    tab, data = visit(page), page_data(page)
    points = on_screen(tab, data)
    tab.get_by_role("button", name="Pictures").click()
    two_frames = "new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame))"
    tab.evaluate(f"{two_frames}.then(() => 0)")
    tab.mouse.move(*points[0])
    box = tab.locator(".plot canvas").first.bounding_box()
    cells = ((points - [box["x"], box["y"]]) // 30).tolist()
    assert data["galleries"][0]["names"][cells.index(cells[0])] in tab.locator(".tip").inner_text()


def test_search_filters_and_downloads_the_matches(visit, page):
    tab, data = visit(page), page_data(page)
    names = data["galleries"][0]["names"]
    tab.get_by_role("searchbox").fill("BLUE/0")
    wanted = [name for name in names if name.startswith("blue/0")]
    assert tab.locator("#match-count").inner_text() == f"{len(wanted)} of {len(names)}"
    tab.get_by_role("button", name="Select matches").click()
    assert downloaded(tab) == wanted and len(wanted) == 9
    points = on_screen(tab, data)
    hidden = [i for i, name in enumerate(names) if name not in wanted]
    shown = np.array([i for i, name in enumerate(names) if name in wanted])
    far = max(hidden, key=lambda i: np.linalg.norm(points[shown] - points[i], axis=1).min())
    tab.mouse.move(*points[far])
    assert tab.locator(".tip").is_hidden()


def test_a_region_is_selected_by_dragging(visit, page, photos, tmp_path):
    tab, data = visit(page), page_data(page)
    points, names = on_screen(tab, data), data["galleries"][0]["names"]
    corner, xs = points.min(0) - 5, np.sort(points[:, 0])
    cut = 4 + np.diff(xs)[4:10].argmax()
    right = (xs[cut] + xs[cut + 1]) / 2  # between two points of a group
    tab.mouse.move(*corner)
    tab.mouse.down()
    tab.mouse.move(right, points[:, 1].max() + 5, steps=3)
    tab.mouse.up()
    wanted = [name for name, (x, _) in zip(names, points, strict=True) if x <= right]
    listed = downloaded(tab)
    assert listed == wanted and 0 < len(wanted) < len(names)
    copy = shutil.copytree(photos, tmp_path / "copy")
    (copy / "selection.txt").write_text("\n".join(listed))
    train = open_source(copy / "selection.txt").train  # the downloaded list is a source
    assert [train.read(i).shape for i in range(len(train))] == [(40, 44, 3)] * len(wanted)
    tab.get_by_role("button", name="Clear").click()
    assert tab.locator("#selection").is_hidden()


@pytest.mark.parametrize("width", [1440, 390])
def test_names_are_text_and_the_page_fits(visit, page, width):
    tab = visit(page, width)
    assert "healthy" in tab.locator(".verdict").inner_text()
    assert "Nothing </script><script>alert(2)</script> to fix." in tab.locator("#page").inner_text()
    assert tab.locator("[onerror]").count() == 0 and tab.locator("script").count() == 2
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.locator(".accuracies").inner_text().count("71.4\n52.9–84.7") == 1
    tab.locator("#curves svg").first.hover()
    tab.get_by_text("epoch 4.5").first.wait_for()


def test_an_unfinished_run_has_a_page(visit, tmp_path):
    recipe = Recipe().replace(image_size=32, mean=[0.5] * 3, std=[0.25] * 3)
    run = Run.create(tmp_path / "run", recipe.resolve())
    tab = visit(report(run.path, images=False))
    assert (
        tab.locator(".verdict").inner_text() == "unfinished" and tab.locator("section").count() == 1
    )


def test_one_strange_record_leaves_no_page_blank(visit, photos, tmp_path):
    """Records that lack keys, lines without an epoch, and what a newer version may write."""
    run = run_folder(tmp_path / "run", photos)
    (run.path / "transfers").mkdir()
    records = [
        {"protocol": "detection, a", "metrics": {"voc_box": {"AP": 1.0}}},
        {"protocol": "detection, b", "init": {}, "metrics": {"new": {}}, "n": None},
    ]
    (run.path / "transfers" / "detection.json").write_text(json.dumps(records[:1]))
    (run.path / "evaluations" / "linear.json").write_text('[{"protocol": "linear", "top1": 12.5}]')
    run.write("metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    run.write("summary.json", {"features": [], "knn_top1": None, "start": None})
    tab = visit(report(run.path, images=False))
    text = tab.locator("body").inner_text()
    assert "detection, a" in text and "12.5" in text and "simsiam resume continues it" in text


def test_a_part_that_fails_leaves_the_others(visit, run, tmp_path):
    page = tmp_path / "page.html"
    data = page_data(report(run.path, images=False))
    data["runs"][0]["results"] = [{"protocol": "knn", "top1": "high"}]  # as no run folder can have
    page.write_text(render_report(data))
    text = visit(page).locator("body").inner_text()
    assert (
        "This part of the page cannot be shown" in text and "healthy" in text and "backbone" in text
    )


def test_a_damaged_page_says_so(browser, run, tmp_path):
    page = report(run.path, images=False, out=tmp_path / "page.html")
    page.write_text(page.read_text().replace('"top1":71.43', '"top1":71.53'))
    tab = browser.new_page()
    tab.goto(page.as_uri())
    assert tab.locator("body").inner_text().strip().startswith("This page is damaged")
    tab.close()


def test_the_encoders_that_adapt_compared_are_a_table(visit, tmp_path):
    """There are no numbers of a training, because there was none."""
    recipe = Recipe().replace(image_size=32, mean=[0.5] * 3, std=[0.25] * 3)
    run = Run.create(tmp_path / "run", recipe.resolve())
    first = {"candidate": "a <b>", "score": 0.5, "view_retrieval": 40.0, "taken": True}
    other = first | {"candidate": "c", "gain": 0.012, "error": 0.03, "taken": False}
    run.write("adapt.json", {"chosen": "a <b>", "candidates": [first, other]})
    run.write("summary.json", {"verdict": "healthy", "steps": 0, "images_per_second": 0.0})
    tab = visit(report(run.path, images=False))
    rows = [line.split("\t") for line in tab.locator("#candidates tr").all_inner_texts()]
    assert rows[0] == ["encoder", "score", "views found, %", "gain ± error", "taken"]
    assert rows[1:] == [
        ["a <b>", "0.5", "40.0", "", "yes"],
        ["c", "0.5", "40.0", "0.012 ± 0.03", "no"],
    ]
    assert "images per second" not in tab.locator("#verdict").inner_text()


def test_an_embedding_is_shown_beside_a_run(visit, run, photos, tmp_path):
    file = simsiam.embed(run.path, photos, out=tmp_path / "photos.parquet", limit=20)
    tab = visit(report(file))
    assert tab.locator(".verdict").inner_text() == "embedding"
    assert "an embedding has no verdict" in tab.locator("#verdict").inner_text()
    sections = tab.locator("section").evaluate_all("parts => parts.map((part) => part.id)")
    assert sections == ["map", "neighbors"] and tab.locator("#neighbors .tile").count() > 20
    path = report([file, run.path], out=tmp_path / "both.html")
    assert [x["map"]["gallery"] for x in page_data(path)["runs"]] == [1, 0]
    tab = visit(path)
    assert "Comparison of 2 runs and embeddings" in tab.locator("h1").inner_text()
    assert tab.locator(".verdict").all_inner_texts() == ["embedding", "healthy"]
    assert tab.locator("#recipe dt").count() > 20  # of the run alone


def test_images_without_a_label_have_no_class_in_common(visit, run, photos, tmp_path):
    file = simsiam.embed(run.path, photos, out=tmp_path / "photos.parquet", precision="float32")
    table = pq.read_table(file)
    given = [label if i % 3 else None for i, label in enumerate(table["label"].to_pylist())]
    table = table.set_column(table.column_names.index("label"), "label", pa.array(given))
    pq.write_table(table, file)
    path = report(file)
    data = page_data(path)
    ((gallery,), shown) = data["galleries"], data["runs"][0]["map"]
    assert max(shown["clusters"]) + 1 == len({*given} - {None})
    rows = enumerate(shown["neighbors"])
    same = [given[i] == given[j] for i, row in rows if given[i] for j in row]
    tab = visit(path)
    share = tab.locator("#neighbors small", has_text="On average").inner_text()
    assert float(share.split()[2]) == pytest.approx(100 * np.mean(same), abs=0.06)
    for title in tab.locator("#neighbors .tile.same").evaluate_all("x => x.map((y) => y.title)"):
        assert "(no label)" not in title
    assert "(no label)" in gallery["classes"]
    assert tab.locator(".keys button").count() == len({*given})


def test_several_runs_are_compared(visit, run, photos, tmp_path):
    other = run_folder(tmp_path / "other", photos, seed=7, base_lr=0.2)
    path = report([run.path, other.path], out=tmp_path / "both.html", limit=20)
    data = page_data(path)
    assert len(data["galleries"]) == 1 and len(data["galleries"][0]["names"]) == 20
    assert data["runs"][0]["map"]["neighbors"] != data["runs"][1]["map"]["neighbors"]
    tab = visit(path)
    differing = tab.locator("#recipe .card").first.locator(".differs").all_inner_texts()
    assert [line.split() for line in differing] == [["seed", "0", "7"], ["base_lr", "0.05", "0.2"]]
    headings = [
        [
            text.strip()
            for text in tab.locator("#recipe table").nth(n).locator("th").all_text_contents()
        ]
        for n in (0, 1)
    ]
    assert headings == [["", "<i>run", "other"]] * 2
    assert tab.locator(".verdict").count() == 2 and tab.locator("#curves .curve.second").count() > 0
