"""The code on the pages runs: Python page by page, and each command, in a prepared folder.

Commands and calls are those of the pages. SMALL adds settings to them, so that they take seconds.
A line that cannot run here has its reason in CANNOT_RUN.
"""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
from conftest import flags
from PIL import Image
from test_annotations import CAR, voc, xml
from test_transfer import BRIEF

import simsiam
from simsiam.commands.main import main
from simsiam.detection.scenes import write_scenes
from simsiam.sources.shapes import draw_split

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SHELL, SHOWN = ("", "sh", "bash"), ("text", "yaml", "json", "html", "mermaid")

# What is added to a command, or to a call in Python, unless the page says it itself.
TRAINING = {"limit": 64, "steps": 2, "batch_size": 16, "backbone": "resnet10", "width": 8}
SMALL = {
    "adapt": {"limit": 30},
    "build": {"width": 8},
    "evaluate": {
        "limit": 2000, "draws": 1, "baselines": False, "finetune_epochs": 1, "linear_epochs": 1,
    },
    "pretrain": TRAINING,
    "reproduce": {"plan": True},
    "search": {"encoder": "patches"},
    "transfer": BRIEF,
}  # fmt: skip
SHORT = {"adapt": {"minutes": 0.4}, "torchrun": {"nproc-per-node": 2}}  # instead of the page's

# Beginnings of lines that are not run, and why.
CANNOT_RUN = {
    "pip install": "installs packages",
    "uv tool install": "installs packages",
    "make ": "sets up an environment",
    "py -m venv": "for Windows",
    r".venv\Scripts\activate": "for Windows",
    "ruff ": "`make lint` runs it",
    "mypy": "`make lint` runs it",
    "pytest": "runs these tests",
    "python tests/": "takes minutes to hours; `make test-all` runs most of them",
    "docs/two_hosts.sh": "needs root and network namespaces",
    "SIMSIAM_TEST_SYSTEM=win32": "trains for minutes",
    "torchrun --nnodes": "several machines",
    "srun torchrun": "SLURM",
    "simsiam demo": "takes four minutes; tests/test_install.py runs it",
    "simsiam explore photos/": "downloads weights",
    "simsiam pretrain cifar10": "downloads CIFAR-10",
    "simsiam pretrain s3://": "needs an object store",
    "simsiam transfer RUN cells/ --init ResNet18_Weights": "downloads weights",
}
# Those that take a few seconds are run for every commit, the others by `make test-all`.
QUICK_PAGES = {
    *("docs/add_a_method.md", "docs/duplicates.md", "docs/own_loop.md", "docs/systems.md"),
    "docs/understand/stop_gradient.md",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read_blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each code block of a page."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(language, textwrap.dedent(text)) for _, language, text in found]


def read_commands(text: str) -> list[str]:
    """The commands of a shell block: variables are replaced; a here-document is one command."""
    commands, variables = list[str](), dict[str, str]()
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        command = re.sub(r"(^|\s)#.*", "", line).strip()
        if set_here := re.fullmatch(r'([A-Z]+)="(.*)"', command):
            variables[set_here[1]] = set_here[2]
        elif command.endswith("<<'EOF'"):
            commands.append(command + "\n" + "\n".join(iter(lines.__next__, "EOF")))
        elif command:
            for name, value in variables.items():
                command = command.replace(f"${name} ", f"{value} ")
            commands.append(" ".join(command.split()))
    return commands


def can_run(command: str) -> bool:
    return not any(map(command.startswith, CANNOT_RUN))


def is_known(command: str) -> bool:
    starts = r"simsiam( |$)|python -m simsiam |torchrun .*-m simsiam |python - <<"
    return re.match(starts, command) is not None


def make_small(verb: str, words: list[str]) -> list[str]:
    """The arguments of a command, with those of the tables."""
    for table, kept in ((SMALL, words), (SHORT, [])):
        settings = table.get(verb, {})
        added = {n: v for n, v in settings.items() if "--" + n.replace("_", "-") not in kept}
        words = words + flags(**added)
    return words


def run_command(command: str) -> None:
    """Run one command, in this process where that is possible."""
    if command.startswith("python - <<"):
        exec(command.partition("\n")[2], {})
        return
    words = shlex.split(command)
    at = words.index("simsiam") + 1
    before, arguments = words[: at - 1], words[at:]
    if arguments:
        arguments = [arguments[0], *make_small(arguments[0], arguments[1:])]
    if "--out" in arguments:  # make room
        out = Path(arguments[arguments.index("--out") + 1])
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    if before[:1] == ["torchrun"]:
        options = make_small("torchrun", before[1:-1])
        launch = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "simsiam"]
        subprocess.run([*launch, *arguments], check=True, timeout=600)
    elif arguments[:1] == ["explore"]:
        serve([*arguments, "--no-browser"])
    else:
        assert main(arguments) == 0, command


def serve(arguments: list[str]) -> None:
    """Run a command that serves pages; stop it once it has said that it does."""
    command = [sys.executable, "-m", "simsiam", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address, state = process.stdout.readline(), process.stdout.readline()
        process.terminate()
    assert address.startswith("http://127.0.0.1:") and "Ctrl-C ends" in state


@contextlib.contextmanager
def small_calls():
    """Calls of the package in Python are made small too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SMALL.keys() & set(simsiam.__all__):
            patch.setattr(
                simsiam, name, partial(getattr(simsiam, name), **SMALL[name]), raising=False
            )
        yield


@pytest.fixture
def own_rows():
    """Take back what a page adds to the tables of the package."""
    tables = (simsiam.METHODS, simsiam.CRITERIA, simsiam.TARGETS)
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with everything that the pages name."""
    folder = tmp_path_factory.mktemp("prepared")
    pixels, _ = draw_split("train")
    images = [Image.fromarray(x.transpose(1, 2, 0)).resize((64, 64)) for x in pixels[:48]]
    for source in ("photos", "other"):
        for i, image in enumerate(images):
            path = folder / source / ("cat", "dog")[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    for name in ("query.jpg", "photo.jpg", "dog.jpg"):
        images[0].save(folder / name)
    labels = "path,label\n" + "".join(f"{i}.jpg,{('cat', 'dog')[i % 2]}\n" for i in range(12))
    for name in ("labels.csv", "photos.labels.csv"):
        (folder / name).write_text(labels)
    write_scenes(folder / "coco", {"train2017": 24, "val2017": 4})
    for file in (folder / "coco" / "annotations").iterdir():
        file.rename(file.with_name(f"instances_{file.name}"))
    names = [str(i) for i in range(28)]
    for name in ("cells", "VOCdevkit/VOC2007", "VOCdevkit/VOC2012"):
        splits = {"trainval": names[:24], "test": names[24:]}
        voc(folder / name, dict.fromkeys(names, xml([CAR])), splits)
    for bench in ROOT.glob("results/bench*.json"):
        (folder / "results").mkdir(exist_ok=True)
        shutil.copy(bench, folder / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        simsiam.pretrain("shapes", out="RUN", **TRAINING)
        simsiam.embed("RUN", "photos/", out="photos.parquet")
    return folder


def test_each_line_runs_or_is_listed_with_a_reason():
    lines = {
        (name_of(page), command)
        for page in PAGES
        for language, text in read_blocks(page)
        if language in SHELL
        for command in read_commands(text)
    }
    unknown = {line for line in lines if can_run(line[1]) and not is_known(line[1])}
    assert not unknown, "run them, list them in CANNOT_RUN, or make the block ```text"
    unused = {start for start in CANNOT_RUN if not any(line.startswith(start) for _, line in lines)}
    assert not unused, "CANNOT_RUN lists lines that no page has"
    quick = {name_of(page) for page in filter(runs_something, PAGES)}
    assert quick >= QUICK_PAGES, "QUICK_PAGES lists pages that run nothing"
    languages = {language for page in PAGES for language, _ in read_blocks(page)}
    assert languages <= {*SHELL, *SHOWN, "python"}, "say here whether blocks of it are run"


def runs_something(page: Path) -> bool:
    return any(
        language == "python" or (language in SHELL and any(map(can_run, read_commands(text))))
        for language, text in read_blocks(page)
    )


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, id=name_of(page), marks=() if name_of(page) in QUICK_PAGES else pytest.mark.long
        )
        for page in filter(runs_something, PAGES)
    ],
)
def test_the_code_of_a_page_runs(page, prepared, own_rows):
    shutil.copytree(prepared, ".", dirs_exist_ok=True)
    names = {"__name__": "__main__"}
    for language, text in read_blocks(page):
        if language == "python":
            with small_calls():
                exec(compile(text, name_of(page), "exec"), names)
        elif language in SHELL:
            for command in filter(can_run, read_commands(text)):
                print("$", command)
                run_command(command)
