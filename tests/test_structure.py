"""The structure: imports go one way, help loads no torch, and what a newcomer reads is short."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from mutations import MUTATIONS

import simsiam

ROOT = Path(simsiam.__file__).parent
# A package imports only packages that stand before it, and itself.
ARROW = [
    "errors", "utils", "config", "distributed", "data", "sources", "model", "monitoring", "runs",
    "exports", "training", "evaluation", "embeddings", "pages", "explore", "detection",
    "laboratory", "commands",
]  # fmt: skip
MAX_PACKAGES, MAX_MODULES = 17, 12


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
    for package in ("pages", "explore"):
        assert not {name for name in reachable(package) if name.startswith(trains)}, package


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
        <= 475
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


# --- one door for each kind of file ---------------------------------------------------------------

# What reads or writes a file, and the modules in which it may be called: the doors.
WRITERS = {"utils.files", "utils.names", "utils.system"}
DOORS = {
    "open for writing": WRITERS,
    "open for reading": {
        "utils.read_files", "data.decode", "data.remote_files", "data.shards", "sources.listing",
        "sources.catalog", "runs.weight_files",
    },
    "os.open": {"utils.system"},
    "FileIO": {"utils.system"},
    "Path.read_text": {"utils.read_files", "utils.system"},
    "Path.read_bytes": {"utils.read_files"},
    "json.loads of a file": {"utils.typed_json"},
    "json.load": set(),
    "yaml.load": {"runs.recipe_file"},
    "Image.open": {"data.decode"},
    "np.load": {"data.decode", "sources.disk_cache"},
    "shutil.copyfile": set(),
    "np.memmap": {"sources.disk_cache"},
    "pickle.load": set(),
    "torch.load": {"runs.weight_files"},
    "safe_open": {"runs.weight_files"},
    "load_file": set(),
    "zipfile.ZipFile": {"sources.listing", "runs.weight_files"},
    "tarfile.open": {"sources.listing", "sources.catalog", "sources.write_shards"},
    "pq.": {"data.parquet_files"},
    "pa.memory_map": {"data.arrow_files"},
    "pa.OSFile": {"data.arrow_files"},
    "pa.ipc.open_file": {"data.arrow_files"},
}  # fmt: skip
PARQUET_WRITERS = ("pq.write_table", "pq.ParquetWriter")  # into what atomic_write opened
# Modules in which calls are right though they are no doors.
ALLOWED = {
    # They write into, and read from, a folder that atomic_folder has just made.
    "exports.detectron2": {
        "open for writing", "Path.read_text", "Path.read_bytes", "pickle.load", "yaml.load",
    },
    "exports.export": {"open for writing"},
    "embeddings.other_tools": {"open for writing"},
    "utils.checksums": {"open for writing"},
    "exports.huggingface": {"open for writing"},
    "exports.safetensors": {"load_file"},
    "exports.timm": {"open for writing"},
    "exports.torchvision": {"open for writing", "torch.load"},
    # The loop of a user of another library, on files that were opened through a door before.
    "laboratory.time_to_accuracy.plain_loop": {"Image.open"},
    # They use files that they have made a moment before.
    "laboratory.bench_cases": {"open for writing"},
    "detection.scenes": {"open for writing"},
    # The files of the package.
    "laboratory.experiment_page": {"Path.read_text", "json.loads of a file"},
    "pages.report": {"Path.read_text"},
    "explore.server": {"Path.read_bytes"},
    # The null device.
    "commands.main": {"os.open"},
    "data.decoder_process": {"os.open"},
    # A file in the cache, in a folder of its own.
    "sources.catalog": {"open for writing"},
    # A text that `read_text` has read.
    "runs.checkpoints.published_weights": {"yaml.load"},
    # Into what atomic_write opened, in a function of its own.
    "runs.weight_files": {"open for writing"},
}  # fmt: skip


def names_of_parts(function: ast.AST) -> set[str]:
    """The names that `with atomic_write(...) as NAME` binds."""
    return {
        item.optional_vars.id
        for node in ast.walk(function)
        if isinstance(node, ast.With)
        for item in node.items
        if isinstance(item.optional_vars, ast.Name)
        and ast.unparse(item.context_expr).startswith(("atomic_write(", "atomic_folder("))
    }


def open_mode(call: ast.Call) -> str | None:
    """The mode of `open(path, mode)` or `path.open(mode)`; None for another call."""
    name = ast.unparse(call.func)
    words = {word.arg: word.value for word in call.keywords}
    if name in ("open", "io.open"):
        mode = words.get("mode", call.args[1] if len(call.args) > 1 else ast.Constant("r"))
        return mode.value if isinstance(mode, ast.Constant) else "w"
    if not name.endswith(".open"):
        return None
    modes = [a.value for a in (*call.args, *words.values()) if isinstance(a, ast.Constant)]
    return next((mode for mode in modes if re.fullmatch("[rwax][bt+]*", str(mode))), None)


def kind_of_access(call: ast.Call, parts: set[str]) -> str | None:
    """How a call reads or writes a file; None if not, or if it writes what atomic_write opened."""
    name, mode = ast.unparse(call.func), open_mode(call)
    owner, _, last = name.rpartition(".")
    door = next((d for d in DOORS if name == d or (d[-1] == "." and name.startswith(d))), None)
    into_part = {owner, ast.unparse(call.args[0]) if call.args else ""} & parts
    reads_file = any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in ("read_text", "read_bytes", "read")
        for node in ast.walk(call)
        if node is not call
    )
    if door in ("tarfile.open", "Image.open"):
        return door
    if (mode and set("wax+") & set(mode)) or (owner and last in ("write_text", "write_bytes")):
        return None if into_part else "open for writing"
    if mode:
        return "open for reading"
    if owner and last in ("read_text", "read_bytes"):
        return None if owner.endswith("storage") else f"Path.{last}"
    if name == "json.loads":
        return "json.loads of a file" if reads_file else None
    if door is None:
        return {"yaml.safe_load": "yaml.load", "pickle.loads": "pickle.load"}.get(name)
    writes = name in PARQUET_WRITERS or (name == "pa.OSFile" and len(call.args) > 1)
    return None if writes else door


def accesses(path: Path) -> set[str]:
    """The kinds in which a module reads and writes files."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    parts = names_of_parts(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (kind := kind_of_access(node, parts)):
            found.add(kind)
    return found


def test_every_kind_of_file_is_read_and_written_through_one_door():
    """Only the doors check that a file is regular, bounded, complete, and no link out of a run."""
    wrong = {}
    for name, path in MODULES.items():
        found = {kind for kind in accesses(path) if name not in DOORS[kind]}
        if found := found - ALLOWED.get(name, set()):
            wrong[name] = found
    assert not wrong


def test_the_lists_of_the_doors_name_only_what_is_there():
    for name, kinds in ALLOWED.items():
        assert kinds <= accesses(MODULES[name]), f"{name}: {kinds - accesses(MODULES[name])}"


def test_the_search_for_doors_finds_what_it_looks_for():
    for text, kind in {
        "open(path)": "open for reading",
        "open(path, 'rb')": "open for reading",
        "open(path, mode='ab')": "open for writing",
        "open(path, 'rb+')": "open for writing",
        "path.open('w')": "open for writing",
        "path.open('rb')": "open for reading",
        "path.write_text(x)": "open for writing",
        "(a / b).write_bytes(x)": "open for writing",
        "path.read_text('utf-8')": "Path.read_text",
        "json.loads(path.read_text())": "json.loads of a file",
        "json.loads(read_text(path))": "json.loads of a file",
        "json.loads(text)": None,
        "json.load(file)": "json.load",
        "Image.open(x)": "Image.open",
        "pq.read_table(x)": "pq.",
        "FileIO(path, 'wb')": "FileIO",
        "torch.load(x)": "torch.load",
        "np.load(x)": "np.load",
        "open(part, 'wb')": None,
        "part.write_bytes(x)": None,
        "read_text(path)": None,
        "loaded.storage.read_bytes(i)": None,
    }.items():
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert kind_of_access(call, {"part"}) == kind, text
