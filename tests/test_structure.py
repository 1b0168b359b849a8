"""The house: imports follow one arrow, help needs no torch, and what a newcomer reads stays short."""

import ast
import subprocess
import sys
from pathlib import Path

import simsiam

ROOT = Path(simsiam.__file__).parent
# A module imports only what stands before it.
ARROW = [
    "errors", "methods", "recipes", "shapes", "images", "views", "precision", "backbones", "heads", "releases",
    "checkpoints", "criteria", "targets", "siamese", "optim", "monitors", "features", "knn", "run", "convert",
    "batches", "progress", "prepare", "pretrain", "demo", "cli", "__main__", "__init__",
]  # fmt: skip


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "simsiam":
            found |= {alias.name for alias in node.names if (ROOT / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simsiam."):
            found.add(node.module.split(".")[1])
    return found


def test_imports_follow_the_arrow():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ARROW)
    for module in ARROW:
        late = imported(ROOT / f"{module}.py") - set(ARROW[: ARROW.index(module)])
        assert not late, f"{module} imports {late}, which stand after it"


def test_importing_and_helping_load_no_torch():
    code = (
        "import sys, simsiam, simsiam.cli\n"
        "simsiam.cli.build_parser().format_help()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_newcomer_reads_is_short():
    assert sum(len((ROOT / f"{m}.py").read_text().splitlines()) for m in ("siamese", "methods", "pretrain")) <= 350


def test_public_names_exist():
    for name in simsiam.__all__:
        assert getattr(simsiam, name).__doc__ if name != "METHODS" else simsiam.METHODS
