"""Installation: the wheel and the sdist hold what they need, and are the same when built again.

The long tests build both, install them in fresh environments and run commands there.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import QUICK, flags
from PIL import Image

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# What an sdist holds besides src.
TOP_FILES = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}


def run(*command: object, **environment: str) -> str:
    """Run a command without this checkout on its path, and return what it prints."""
    hidden = ("PYTHONPATH", "SOURCE_DATE_EPOCH")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**variables, "PYTHONUTF8": "1", **environment},
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


# --- the settings ---


def test_all_names_every_extra_but_dev():
    section = PYPROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = ", section, re.MULTILINE)
    assert f'all = ["simsiam[{",".join(sorted({*extras} - {"all", "dev"}))}]"]\n' in section


@pytest.mark.parametrize("built", ["1.2.3", None])
def test_the_version_is_what_the_build_wrote(built):
    """A checkout that was never built has the version that a build without a tag would have."""
    fallback = re.search('fallback-version = "(.*?)"', PYPROJECT)[1]
    code = (
        "import sys, types\n"
        f"module = {built!r} and types.SimpleNamespace(__version__={built!r})\n"
        "sys.modules['simsiam._version'] = module\n"
        "import simsiam\n"
        "print(simsiam.__version__)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert printed.stdout.decode().strip() == (built or fallback)


def test_the_citation_has_the_version_of_the_changelog():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
    assert f"\nversion: {newest}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


# --- the files ---


def left_out(folder: str, names: list[str]) -> set[str]:
    """What a copy of the checkout needs not have: environments, runs, and what a build wrote."""
    at_the_top = {".venv", "runs", "dist"} if Path(folder) == ROOT else set()
    return {*names} & (at_the_top | {"__pycache__", "_version.py"})


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> list[Path]:
    """Two folders with a wheel and an sdist, built from two copies of the checkout."""
    folders = []
    for variables in ({}, {"TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"}):
        folder = tmp_path_factory.mktemp("build")
        copy = shutil.copytree(
            ROOT, folder / "copy", ignore=left_out, copy_function=shutil.copy, symlinks=True
        )  # with the modes of files, but not with their times
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", copy, **variables)
        folders.append(folder / "dist")
    return folders


@pytest.fixture
def wheel(builds) -> Path:
    return next(builds[0].glob("*.whl"))


@pytest.fixture
def sdist(builds) -> Path:
    return next(builds[0].glob("*.tar.gz"))


def package_files() -> set[str]:
    """The files of the package in the checkout, and the one that the build writes."""
    package = ROOT / "src" / "simsiam"
    files = {path for path in package.rglob("*") if path.is_file()} | {package / "_version.py"}
    return {
        path.relative_to(package.parent).as_posix()
        for path in files
        if "__pycache__" not in path.parts
    }


@pytest.mark.long
def test_building_again_gives_the_same_bytes(builds):
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in builds
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 2


@pytest.mark.long
def test_the_wheel_and_the_sdist_hold_the_package_and_no_more(wheel, sdist):
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert names - about == package_files()
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert files == {f"src/{name}" for name in package_files()} | TOP_FILES


@pytest.mark.long
def test_the_readme_of_the_wheel_has_no_links_into_the_repository(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(name).decode()
    assert "simsiam search photos/ query.jpg" in text and "](https://arxiv.org/" in text
    assert re.findall(r"\]\((?!https:)[^)]*\)", text) == []


# --- fresh environments ---


def install(file: Path, folder: Path) -> Path:
    """Install a wheel or an sdist in a new environment that borrows third-party packages.

    They come from the environment of the tests, after the new one's own packages. Its .pth
    files are not read there, so an editable installation of this checkout is not seen.
    """
    venv.create(folder, symlinks=os.name != "nt")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / Path(sys.executable).name
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(own, "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", file)
    where = run(python, "-c", "import simsiam; print(simsiam.__file__)").strip()
    assert Path(where).is_relative_to(own)
    return programs


@pytest.mark.long
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_commands_work_where_it_is_installed(kind, tmp_path, request):
    """In an empty folder outside of any repository, with a folder of photographs."""
    file = request.getfixturevalue(kind)
    program = install(file, tmp_path / "environment") / "simsiam"
    Path("photos").mkdir()
    for i in range(24):
        Image.linear_gradient("L").rotate(15 * i).convert("RGB").save(f"photos/{i}.jpg")

    version = file.name.removesuffix(".tar.gz").split("-")[1]
    assert run(program, "--version") == f"simsiam {version}\n"
    assert "pretrain" in run(program, "--help")
    assert "24" in run(program, "inspect", "photos")
    run(program, "pretrain", "photos", "--out", "run", *flags(**QUICK))
    run(program, "report", "run", "--out", "report.html")
    assert "<style>" in Path("report.html").read_text(encoding="utf-8")
    run(program, "embed", "run", "photos", "--out", "photos.parquet")
    assert "8.jpg" in run(program, "search", "photos", "photos/7.jpg", "--encoder", "run")
    assert "wrote" in run(program, "reproduce", "figure3", "--out", "results")
    assert "supervised, all labels" in run(program, "demo", "--out", "demo")
