"""The documentation site: it builds without a warning and works from files, without a network."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("zensical")
    folder = tmp_path_factory.mktemp("site")
    config = (ROOT / "mkdocs.yml").read_text("utf-8").replace("[src]", f"[{ROOT / 'src'}]")
    (folder / "mkdocs.yml").write_text(config, "utf-8")
    script = ROOT / "docs" / "prepare_site.py"
    subprocess.run([sys.executable, script, folder / "build" / "docs"], check=True)
    zensical = shutil.which("zensical", path=Path(sys.executable).parent)
    build = [zensical, "build", "--strict"]
    result = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0 and "No issues found" in result.stderr, result.stdout
    return folder / "site"


@pytest.fixture
def tab(browser):
    tab = browser.new_page(viewport={"width": 390, "height": 900})
    tab.requests, tab.errors = [], []
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    yield tab
    tab.close()


def test_search_finds_a_page_without_a_network(site, tab):
    tab.set_viewport_size({"width": 1440, "height": 900})
    tab.goto((site / "index.html").as_uri())
    tab.keyboard.press("Control+k")
    tab.keyboard.type("stop-gradient")
    tab.get_by_text("Why the").first.wait_for()
    assert not tab.errors
    assert [url for url in tab.requests if not url.startswith(("file:", "blob:", "data:"))] == []


def test_every_page_fits_a_phone_and_shows_all_its_pictures(site, tab):
    pages = sorted(site.glob("**/*.html"))
    assert len(pages) > 60
    for page in pages:
        tab.goto(page.as_uri())
        width, missing = tab.evaluate(
            """() => [document.documentElement.scrollWidth, [...document.images]
                .filter((image) => image.complete && !image.naturalWidth).map((i) => i.src)]"""
        )
        assert width <= 390 and not missing, (page.relative_to(site), width, missing)
