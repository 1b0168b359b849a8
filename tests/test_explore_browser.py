"""explore in Chromium: search, label by keyboard, export, kill -9, two tabs, hostile names."""

import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import QUICK
from PIL import Image
from test_explore import EVIL, draw

import simsiam
from simsiam.embeddings.embed import embed
from simsiam.embeddings.probe import probe
from simsiam.embeddings.table import read_embeddings
from simsiam.runs.weights import open_weights

AXE = Path(__file__).parent / "axe.min.js"
IMAGENETTE = Path(__file__).parents[2] / "shared" / "data" / "imagenette224.tar"
HAND_OVER = """([kind, bytes]) => {
  const data = new DataTransfer(), given = { bubbles: true, cancelable: true };
  data.items.add(new File([new Uint8Array(bytes)], "outside.jpg", { type: "image/jpeg" }));
  dispatchEvent(kind === "drop" ? new DragEvent(kind, { ...given, dataTransfer: data })
    : new ClipboardEvent(kind, { ...given, clipboardData: data }));
}"""
EXACT = {"device": "cpu", "precision": "float32"}


def start(file, *words):
    """Starts the command; returns the process and the address that it printed first."""
    command = [sys.executable, "-m", "simsiam", "explore", str(file), "--no-browser", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    address = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", address), address
    assert "labels" in process.stdout.readline()
    return process, address


def open_tab(browser, address, events, without_webgl=False):
    tab = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    if without_webgl:
        tab.add_init_script(
            "const get = HTMLCanvasElement.prototype.getContext;"
            "HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {"
            "  return kind === 'webgl2' ? null : get.call(this, kind, ...rest);"
            "};"
        )
    tab.set_default_timeout(60_000)
    tab.on("console", lambda m: None if "GPU stall" in m.text else events.append(m.text))
    tab.on("pageerror", lambda error: events.append(str(error)))
    tab.on("dialog", lambda dialog: (events.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda r: r.url.startswith((address, "blob:")) or events.append(r.url))
    tab.goto(address)
    tab.wait_for_selector(".tile")
    return tab


def make_drawn(tmp_path, count, copies):
    """Drawings, some of which are there twice; the names begin with the class."""
    run = simsiam.pretrain("shapes", out=tmp_path / "run", **QUICK)
    folder = draw(tmp_path / "photos", count, copies=copies)
    next(folder.glob("*[a-z]-0070.png")).rename(folder / EVIL)
    return embed(run, folder, out=tmp_path / "all.parquet", **EXACT), folder


def make_photos(tmp_path, count, copies):
    """Photographs of Imagenette in the same way."""
    folder, names = tmp_path / "photos", []
    folder.mkdir()
    with tarfile.open(IMAGENETTE) as archive:
        for member in archive:
            kind = Path(member.name).parent.name
            if member.isfile() and member.name.startswith("train/") and len(names) < count:
                if sum(name.startswith(kind) for name in names) >= -(-count // 10):
                    continue
                names.append(f"{kind}-{len(names):04}.jpg")
                (folder / names[-1]).write_bytes(archive.extractfile(member).read())
    for i in range(copies):
        with Image.open(folder / names[i * len(names) // copies]) as image:
            image.resize((150, 150)).save(folder / f"copy-{i:04}.jpg", quality=80)
    lite0 = open_weights("lite0")
    return embed(lite0, folder, out=tmp_path / "all.parquet", no_labels=True, **EXACT), folder


def class_of(tab):
    """The class of the image that is asked about, by its file name."""
    return tab.locator(".question .name").inner_text().split("-")[0]


def work(browser, tmp_path, made, per_class, copies):
    """What a person does; returns what went wrong in the browser."""
    (file, folder), events = made, []
    count = len(read_embeddings(file))
    found = Counter(name.split("-")[0] for name in os.listdir(folder) if "-" in name)
    kinds = {kind for kind, n in found.items() if n > per_class} - {"copy"}
    process, address = start(file)
    try:
        tab = open_tab(browser, address, events)
        # search by an outside picture
        outside = (folder / "copy-0001.jpg").read_bytes()
        tab.locator("input[type=file]").set_input_files(
            {"name": "outside.jpg", "mimeType": "image/jpeg", "buffer": outside}
        )
        row = read_embeddings(file).find("copy-0001.jpg")
        for event in ("", "drop", "paste"):  # the first has chosen a file
            if event:
                tab.evaluate(HAND_OVER, [event, list(outside)])
            tab.wait_for_selector(".query")
            assert tab.locator(".panel .tile").first.get_attribute("data-row") == str(row)
            tab.click(".query button:text('Clear')")
            tab.wait_for_selector(".query", state="detached")
        # label by keyboard
        tab.click("#tab-label")
        classes, done = [], Counter()
        for _ in range(count):
            tab.wait_for_function("document.querySelector('.question .name')?.textContent")
            name = class_of(tab)
            known = name in kinds and done[name] < per_class
            if not known:
                tab.keyboard.press("s")
                continue
            if name not in classes:
                tab.keyboard.press("n")
                tab.keyboard.type(name)
                tab.keyboard.press("Enter")
                classes.append(name)
            before = tab.locator(".question .name").inner_text()
            tab.keyboard.press("1234567890"[classes.index(name)])
            done[name] += 1
            tab.wait_for_function(
                "name => document.querySelector('.question .name').textContent !== name", arg=before
            )
            if len(classes) == len(kinds) and min(done.values()) == per_class:
                break
        assert len(classes) == len(kinds) == 10 and min(done.values()) == per_class, done
        total = sum(done.values())
        tab.wait_for_function(
            "n => window.explore && document.querySelector('.progress-line').textContent"
            ".startsWith(`Labeled ${n} of`) "
            "&& document.querySelector('.progress-line').textContent.includes('accuracy')"
            "&& !document.querySelector('.progress-line').textContent.includes('learning')",
            arg=total,
        )
        # a second tab loses nothing, and sees what the first one did
        other = open_tab(browser, address, events)
        other.click("#tab-label")
        other.wait_for_selector(".classes button")
        other.keyboard.press("1")
        tab.wait_for_function(
            "n => document.querySelector('.progress-line').textContent"
            ".startsWith(`Labeled ${n} of`)",
            arg=total + 1,
        )
        tab.keyboard.press("z")
        other.wait_for_function(
            "n => document.querySelector('.progress-line').textContent"
            ".startsWith(`Labeled ${n} of`) && "
            "!document.querySelector('.progress-line').textContent.includes('learning')",
            arg=total,
        )
        # export: the predictions are those of the command line
        tab.click("#tab-take")
        with tab.expect_download() as download:
            tab.click("button[aria-label='Save images.csv']")
        text = Path(download.value.path()).read_text(encoding="utf-8")
        found = {row["path"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
        labels = file.with_suffix(".labels.csv")
        result = probe(file, labels, out=tmp_path / "probe.csv")
        with open(tmp_path / "probe.csv", newline="") as table:
            expected = {row["path"]: row for row in csv.DictReader(table)}
        assert len(result.labels) == total and len(found) == len(expected)
        for path, wanted in expected.items():
            assert found[path]["predicted"] == wanted["predicted"], path
            assert found[path]["label"] == wanted["label"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        tab.context.close()
        other.context.close()
        events = [event for event in events if "ERR_CONNECTION_" not in event]  # it was killed
        again, address = start(file)
        process = again
        tab = open_tab(browser, address, events)
        tab.click("#tab-label")
        assert tab.locator(".progress-line").inner_text().startswith(f"Labeled {total} of")
        check_lasso(tab, count)
        check_decisions_are_kept(tab, file)
        check_copies_by_keys(tab, file, copies)
        check_script(tab, file, folder, tmp_path)
        check_with_axe(tab, ("light", "dark") if count > 1000 else ("light",))
        tab.context.close()
        tab = open_tab(browser, address, events, without_webgl=True)
        assert "Drawn without WebGL" in tab.locator(".map-side").inner_text()
        tab.context.close()
    finally:
        process.kill()
        process.wait()
    return events


def check_with_axe(tab, schemes):
    """Names, roles and contrast of every page, in light and dark."""
    tab.evaluate(
        AXE.read_text(encoding="utf-8")
    )  # tests/axe.min.js: npm's axe-core 4.14.1, MPL-2.0
    for scheme in schemes:
        tab.emulate_media(color_scheme=scheme)
        for name in ("browse", "label", "clean", "take"):
            tab.click(f"#tab-{name}")
            found = tab.evaluate("axe.run().then((result) => result.violations)")
            shown = [(v["id"], v["nodes"][0]["html"][:120]) for v in found]
            assert not found, (scheme, name, shown)
        if scheme == "light":
            tab.click("#tab-browse")
            tab.locator(".panel .tile").first.click()
            assert tab.locator("dialog img.full").bounding_box()["height"] > 200
            tab.click("dialog button:text('Next')")
            tab.keyboard.press("Enter")  # the button keeps the focus
            third = tab.locator(".panel .tile").nth(2).get_attribute("title")
            assert tab.locator("dialog b").inner_text() == third
            found = tab.evaluate("axe.run('dialog').then((result) => result.violations)")
            assert not found, [(v["id"], v["nodes"][0]["html"][:120]) for v in found]
            tab.keyboard.press("Escape")


def check_lasso(tab, count):
    """A line around the whole map selects all images; Escape selects none."""
    box = tab.locator(".overlay").bounding_box()
    right, bottom = box["x"] + box["width"] - 3, box["y"] + box["height"] - 3
    tab.keyboard.down("Shift")
    tab.mouse.move(box["x"] + 3, box["y"] + 3)
    tab.mouse.down()
    for x, y in ((right, box["y"] + 3), (right, bottom), (box["x"] + 3, bottom)):
        tab.mouse.move(x, y)
    tab.mouse.up()
    tab.keyboard.up("Shift")
    tab.wait_for_selector(".selected-box:not(.hidden)")
    assert tab.locator(".selected-box h2").inner_text() == f"{count:,} images selected"
    tab.keyboard.press("Escape")
    tab.wait_for_selector(".selected-box", state="hidden")


def check_decisions_are_kept(tab, file):
    """Keeping the best of all other groups changes no decision; Z takes all of it back."""

    def wait_for(text):
        tab.wait_for_function(
            "text => document.querySelector('.panel p').textContent.includes(text)", arg=text
        )

    def decide(group, image, decision):
        wait_for(f"Group {group} of")
        for expected in ({"keep": "drop", "drop": "keep"}[decision], decision):
            tab.locator(".copies .decision").nth(image).click()  # the first takes the proposal
            tab.wait_for_selector(f".copies figure:nth-child({image + 1}).{expected}")
        return tab.locator(".copies .name").all_inner_texts()

    tab.click("#tab-clean")
    tab.wait_for_selector(".copies figure")
    first = decide(1, 1, "keep")
    tab.keyboard.press("ArrowRight")
    second = decide(2, 0, "drop")
    tab.click("button:text('Keep the best in all groups that are not decided')")
    tab.wait_for_selector("#status:text('best image is dropped: 1.')")
    with open(file.with_suffix(".decisions.csv"), newline="") as table:
        decisions = {row["path"]: row["decision"] for row in csv.DictReader(table)}
    assert [decisions.get(name) for name in first[:2]] == ["keep", "keep"]
    assert [decisions.get(name) for name in second[:2]] == ["drop", None]
    tab.keyboard.press("ArrowLeft")
    for _ in range(5):
        tab.keyboard.press("z")
    wait_for("Group 1 of")
    wait_for(" 0 decided · 0 images to drop")


def check_copies_by_keys(tab, file, copies):
    """Review of the copies takes only keys; the decisions are on the disk."""
    tab.click("#tab-clean")
    tab.wait_for_selector(".copies figure")
    groups = int(re.search(r"of (\d+)", tab.locator(".panel p").first.inner_text())[1])
    for number in range(1, groups + 1):
        tab.wait_for_function(
            "n => document.querySelector('.panel p').textContent.startsWith(`Group ${n} of`)",
            arg=number,
        )
        tab.keyboard.press("Enter")
    tab.wait_for_function(
        "() => document.querySelector('.panel p').textContent.includes('all are decided')"
    )
    with open(file.with_suffix(".decisions.csv"), newline="") as table:
        decisions = {row["path"]: row["decision"] for row in csv.DictReader(table)}
    assert {f"copy-{i:04}.jpg" for i in range(copies)} <= {
        p for p, d in decisions.items() if d == "drop"
    }


def check_script(tab, file, folder, tmp_path):
    """The script leaves what is to be kept, in a copy of the folder."""
    tab.click("#tab-take")
    with tab.expect_download() as download:
        tab.click("button[aria-label='Save drop.sh']")
    with tab.expect_download():
        tab.click("button[aria-label='Save source.txt']")
    tab.wait_for_selector("text=Move source.txt into the folder of the images")
    shutil.copytree(folder, tmp_path / "again")
    script = ["sh", str(download.value.path()), str(tmp_path / "again"), "--yes"]
    subprocess.run(script, check=True, capture_output=True)
    with open(file.with_suffix(".decisions.csv"), newline="") as table:
        dropped = {row["path"] for row in csv.DictReader(table) if row["decision"] == "drop"}
    assert set(os.listdir(tmp_path / "again")) == set(os.listdir(folder)) - dropped


def test_a_person_searches_labels_exports_and_loses_nothing(browser, tmp_path):
    made = make_drawn(tmp_path, 80, copies=4)
    assert not (events := work(browser, tmp_path, made, per_class=2, copies=4)), events


@pytest.mark.long
def test_two_thousand_images_with_five_labels_a_class(browser, tmp_path):
    made = make_drawn(tmp_path, 2000, copies=100)
    assert not (events := work(browser, tmp_path, made, per_class=5, copies=100)), events


@pytest.mark.long
@pytest.mark.skipif(not IMAGENETTE.exists(), reason="Imagenette is not beside this project")
def test_two_thousand_photographs(browser, tmp_path):
    made = make_photos(tmp_path, 2000, copies=100)
    assert not (events := work(browser, tmp_path, made, per_class=5, copies=100)), events
