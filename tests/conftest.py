import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# The key of the user who runs the tests; not that in their own home.
os.environ["SIMSIAM_STATE"] = tempfile.mkdtemp(prefix="simsiam-state-")
atexit.register(shutil.rmtree, os.environ["SIMSIAM_STATE"], ignore_errors=True)
# Their attacks and faults are made with what only POSIX systems have: pipes in the file system,
# limits of processes, SIGKILL and forks.
POSIX_ALONE = ("disk_errors", "faults", "hostile_files", "links", "read_files", "run_files")
collect_ignore = [f"test_{name}.py" for name in POSIX_ALONE] if os.name == "nt" else []
SHARED = Path(__file__).parents[2] / "shared"

# A run small enough for a test: 16 steps an epoch, 12 k parameters.
TINY = {
    "backbone": "resnet10", "width": 4, "dim": 16, "proj_hidden": 16, "pred_dim": 4, "base_lr": 1.0,
    "limit": 512, "batch_size": 32, "log_every": 1, "epochs": 2,
}  # fmt: skip
# Three steps and nothing measured.
QUICK = TINY | {
    "limit": 64,
    "batch_size": 16,
    "steps": 3,
    "holdout": 0,
    "save_every": 9,
    "knn_every": 9,
}


def flags(**words) -> list[str]:
    """The same words as flags of the command line."""
    found = []
    for name, value in words.items():
        found.append("--" + ("no-" if value is False else "") + name.replace("_", "-"))
        found += [] if isinstance(value, bool) else [str(value)]
    return found


@pytest.fixture
def shared():
    """A folder with data and a checker of run folders; it exists only where this was developed."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared folder beside the repository")
    return SHARED


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path_factory, monkeypatch):
    """Runs are made in the working directory by default."""
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    os.environ["COLUMNS"] = "80"
    yield
    monkeypatch.undo()  # leaves the folder, and patched functions of os
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not path:
        pytest.skip("needs chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=arguments, timeout=120_000)
        yield browser
        browser.close()
