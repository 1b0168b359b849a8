"""The structure: imports go one way, help loads no torch, and what a newcomer reads is short."""

import ast
import subprocess
import sys
from pathlib import Path

from mutations import MUTATIONS

import simsiam

ROOT = Path(simsiam.__file__).parent
# A package imports only packages that stand before it, and itself.
ARROW = [
    "errors", "utils", "config", "distributed", "data", "sources", "model", "monitoring", "runs",
    "exports", "training", "evaluation", "embeddings", "pages", "detection", "laboratory",
    "commands",
]  # fmt: skip
MAX_PACKAGES, MAX_MODULES = 16, 12


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it, as "package.module"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("simsiam."):
            owner = node.module.partition(".")[2]
            names |= {
                f"{owner}.{alias.name}" if owner in ALL_PACKAGES else owner for alias in node.names
            }
        elif isinstance(node, ast.Import):
            names |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("simsiam.")}
        assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path} imports from '.'"
    return names - {""}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")}
# With the packages inside of packages, such as "runs.checkpoints".
ALL_PACKAGES = {dotted(path.parent) for path in ROOT.rglob("*/__init__.py")}
MODULES = {dotted(path): path for path in ROOT.rglob("*.py") if path.parent != ROOT}


def reachable(package: str) -> set[str]:
    """Every module that importing the package's modules can import."""
    found = {name for name in MODULES if name.startswith(f"{package}.")}
    waiting = list(found)
    while waiting:
        new = imports(MODULES[name]) - found if (name := waiting.pop()) in MODULES else set()
        found |= new
        waiting += new
    return found


def test_packages_import_only_what_stands_below_them():
    assert set(ARROW) - {"errors"} == PACKAGES
    for name, path in MODULES.items():
        package = name.partition(".")[0]
        late = {
            other
            for other in imports(path)
            if other.partition(".")[0] not in ARROW[: ARROW.index(package) + 1]
        }
        assert not late, f"{name} imports {late}, which stand above it"


def test_packages_are_few_and_small_and_say_what_they_own():
    assert len(PACKAGES) <= MAX_PACKAGES
    for package in ALL_PACKAGES:
        folder = ROOT.joinpath(*package.split("."))
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert package == "commands" or len(modules) <= MAX_MODULES, package
        doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert doc and len(doc.split()) >= 20, f"{package} does not say what it owns"
    assert not PACKAGES & set(simsiam.__all__)


def test_the_model_never_sees_where_images_come_from():
    assert not {name for name in reachable("model") if name.startswith(("data.", "sources."))}
    assert not {
        name
        for package in ("data", "sources")
        for name in reachable(package)
        if name.startswith("model.")
    }


def test_what_shows_runs_and_embeddings_imports_nothing_that_trains():
    trains = ("training.", "evaluation.", "detection.", "laboratory.")
    assert not {name for name in reachable("pages") if name.startswith(trains)}


def test_what_depends_on_the_system_is_in_one_module():
    """`mypy --platform` of `make lint` checks the names of the standard library."""
    modules = {"fcntl", "msvcrt", "winreg", "resource", "pwd", "grp", "termios", "ctypes"}
    for name, path in MODULES.items():
        if name == "utils.system":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
            imported = {alias.name for alias in names} & modules
            assert not imported, f"{name} imports {imported}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/proc", "/dev/", "/sys/")), name
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.platform", "os.name"):
                raise AssertionError(f"{name}, line {node.lineno} asks for the system")


def test_text_files_are_utf_8_on_every_system():
    """Python's default encoding is another one on Windows."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            call, place = ast.unparse(node.func), f"{name}, line {node.lineno}"
            words = {word.arg: word.value for word in node.keywords}
            method = call.rpartition(".")[2]
            if method in ("read_text", "write_text") and call != method:
                positions = {"read_text": 1, "write_text": 2}[method]
                assert "encoding" in words or len(node.args) >= positions, place
            if call in ("open", "os.fdopen"):
                mode = node.args[1] if len(node.args) > 1 else words.get("mode")
                mode = ast.literal_eval(mode) if mode else "r"
                assert "b" in mode or "encoding" in words, place
            if words.get("text") is not None and call.startswith("subprocess"):
                raise AssertionError(f"{place}: give encoding=, not text=True")


def test_importing_and_helping_load_no_torch():
    code = (
        "import sys, simsiam, simsiam.commands.main\n"
        "simsiam.commands.main.build_parser().format_help()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_newcomer_reads_is_short():
    assert (
        sum(
            len((ROOT / f"{m}.py").read_text().splitlines())
            for m in ("model/siamese", "config/methods", "training/pretrain")
        )
        <= 400
    )


def test_the_stop_gradient_stands_in_exactly_one_place():
    text = "".join(path.read_text() for path in (ROOT / "model").rglob("*.py"))
    assert text.count("detach(") == 1


def test_mutations_name_one_place_each_and_a_test_that_is_there():
    for x in MUTATIONS:
        assert (ROOT / x.file).read_text().count(x.old) == 1, x
        path, _, test = x.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (Path(__file__).parent / path).read_text(), x


def test_public_names_exist():
    for name in simsiam.__all__:
        assert getattr(simsiam, name).__doc__ if name != "METHODS" else simsiam.METHODS
