"""The house: imports follow one arrow, help needs no torch, and what a newcomer reads stays short."""

import ast
import subprocess
import sys
from pathlib import Path

from mutations import MUTATIONS

import simsiam

ROOT = Path(simsiam.__file__).parent
# A module imports only what stands before it.
ARROW = [
    "errors", "files", "bar", "columns", "methods", "figure3", "recipes", "protocols", "shapes", "decode",
    "shards", "images", "workers", "catalog",
    "sources", "choose", "index", "views", "processes", "batch_norm", "precision", "backbones", "heads", "releases",
    "checkpoints", "optim", "criteria", "targets", "siamese", "memory", "monitors", "signals", "features", "knn", "run",
    "convert", "batches", "label_free", "progress", "disk_cache", "prepare", "step", "pretrain", "evaluate.frozen",
    "evaluate.scores",
    "evaluate.knn", "evaluate.linear", "evaluate.few_label", "evaluate.label_free", "evaluate.finetune",
    "evaluate.tuned", "evaluate", "inspect",
    "plan", "shard", "preview", "detectron2", "transfer", "transfer.schedules",
    "transfer.annotations", "transfer.metrics", "transfer.detector", "transfer.training", "transfer.scenes",
    "transfer.pictures", "transfer.transfer", "embeddings", "embeddings.embed", "embeddings.page", "embeddings.search",
    "embeddings.neighbors", "embeddings.duplicates", "embeddings.cluster", "embeddings.outliers", "embeddings.probe",
    "card", "export", "compare", "report", "demo", "laboratory.claims", "laboratory.scales", "laboratory.experiments",
    "laboratory.plan", "laboratory.measure", "laboratory.drawing", "laboratory.pages", "laboratory.detectors",
    "laboratory.reproduce", "laboratory", "bench", "cli", "__main__", "__init__",
]  # fmt: skip


def name_of(path: Path) -> str:
    """A file's module without the package's name: "run", "evaluate" for evaluate/__init__.py, "evaluate.knn"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("simsiam."):
            owner = node.module.partition(".")[2]
            inside = {f"{owner}.{alias.name}".strip(".") for alias in node.names}
            found |= inside & FILES.keys() or {owner or "__init__"}
        assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path} imports from '.'"
    return found - {"__init__"}


def test_imports_follow_the_arrow():
    assert FILES.keys() == set(ARROW)
    for module in ARROW:
        late = imported(FILES[module]) - set(ARROW[: ARROW.index(module)])
        assert not late, f"{module} imports {late}, which stand after it"


def test_importing_and_helping_load_no_torch():
    code = (
        "import sys, simsiam, simsiam.cli\n"
        "simsiam.cli.build_parser().format_help()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_newcomer_reads_is_short():
    assert sum(len((ROOT / f"{m}.py").read_text().splitlines()) for m in ("siamese", "methods", "pretrain")) <= 400


def test_the_stop_gradient_stands_in_exactly_one_place():
    text = "".join((ROOT / f"{m}.py").read_text() for m in ("heads", "criteria", "targets", "siamese"))
    assert text.count("detach(") == 1


def test_mutations_name_one_place_each_and_a_test_that_is_there():
    for x in MUTATIONS:
        assert (ROOT / x.file).read_text().count(x.old) == 1, x
        path, _, test = x.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (Path(__file__).parent / path).read_text(), x


def test_public_names_exist():
    for name in simsiam.__all__:
        assert getattr(simsiam, name).__doc__ if name != "METHODS" else simsiam.METHODS
