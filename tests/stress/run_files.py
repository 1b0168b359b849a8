"""Give the files of runs other types, and flip their bits; check that nothing bad happens.

    python tests/stress/run_files.py --types 5000 --flips 1000 --out results/faults/run_files

types  A value, a key or a row of the JSON or YAML in a run folder, in a checkpoint, in the metadata
       of an embedding or in annotations (also XML) gets another type, is left out or is repeated;
       texts get line breaks, terminal escapes, markup, or paths elsewhere. Then verbs that read the
       file run.
flips  One bit of a file that the program wrote is flipped. Then the verbs that read the file must
       give the result that they give without the flip, or one line that says what is wrong.

Trials run as in fuzz.py, which they share: in forked processes that record every file opened for
writing, every process started and every connection. Wrong are a traceback, a signal, control
characters in the output or on the page, a file elsewhere, more than 10 s of CPU time, more than
3 GiB, and after a flip another result without a word. All randomness comes from --seed.
"""

import argparse
import base64
import copy
import json
import math
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import fuzz
import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from campaign import plain, timeless
from fuzz import TINY, Task, check_verb, run_verb
from PIL import Image
from torch import nn

import simsiam.embeddings.cluster
import simsiam.embeddings.duplicates
import simsiam.embeddings.outliers
import simsiam.evaluation.evaluate
import simsiam.exports.export  # noqa: F401  imported here once, for all forks
from simsiam.detection import scenes
from simsiam.detection.annotations import keep_masked_objects, open_annotated
from simsiam.detection.metrics import decode_masks
from simsiam.detection.pictures import _arrange
from simsiam.detection.splits import split_source
from simsiam.errors import UsageError, WorkFailed, say_once
from simsiam.model.encoder import Encoder
from simsiam.model.precision import Compute
from simsiam.runs.encoder import load
from simsiam.runs.environment import collect_environment, utc_now
from simsiam.runs.run_folder import Run, read_checkpoint
from simsiam.utils.checksums import (
    CHECKSUM_KEY,
    SUMS_FILE,
    file_sha256,
    read_with_checksum,
    seal,
)
from simsiam.utils.files import atomic_write

SECONDS = 10.0
BRIEF = (
    "--steps 3 --batch-size 2 --warmup-steps 0 --regions 8 --proposals 40 --test-proposals 10 "
    "--region-size 4 --precise-bn 1 --precision float32 --device cpu"
)
CPU = ("--device", "cpu", "--precision", "float32")
DEEP: Any = []
for _ in range(150):
    DEEP = [DEEP]
WRONG_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**31, 2**70, 10**400, -1e308, math.nan, math.inf, "", "x", "12",
    "a\nb", "\x1b[2J\x1b[31mred", "\ud800", "\udcff", "a\0b", "[/]", "<script>", "../../secret",
    "/etc/passwd", "x" * 5000, [], [1], [None, "x"], [[1, 2], [3]], {}, {"a": 1}, {"": []}, DEEP,
)  # fmt: skip


# --- the files ---


def make_files(folder: Path) -> None:
    """Make a run folder with every kind of file, a converted one, an embedding and annotations."""
    before = Path.cwd()
    os.chdir(folder)
    rng = np.random.default_rng(0)
    for i in range(24):
        path = Path("photos") / ("train" if i < 18 else "test") / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 128 + 127 * (i % 2), (32, 32, 3), np.uint8)).save(path)
    (folder / "photos" / "train" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    scenes.write_scenes(folder / "coco", {"train": 8, "val": 3, "test": 4})
    annotations = sorted((folder / "coco").rglob("*.json"))[0]
    content = json.loads(annotations.read_text())
    content["annotations"].append({"image_id": -1})  # for faults.txt
    annotations.write_text(json.dumps(content))
    write_voc(folder / "voc", rng)

    def verb(*arguments: str) -> None:
        code, output = run_verb(list(arguments))
        assert code == 0, (arguments, output)

    tiny = [*TINY.split(), "--epochs", "2", "--save-every", "1", "--log-every", "1"]
    verb("pretrain", "photos", "--out", "run", *tiny, "--save-seconds", "0", *CPU)
    run = Run("run")
    head = nn.Linear(*(load(run.path).dim,) * 2)
    run.write_head(Encoder(load(run.path), head))
    row = {"candidate": "unchanged", "score": 1.5, "view_retrieval": 50.0, "knn_top1": 60.0}
    rows = [row | {"taken": True}, row | {"than": "x", "gain": 0.1, "error": 0.2, "taken": False}]
    run.write("loggers.json", {"loggers": ["tensorboard"], "id": "0" * 32})
    run.write("adapt.json", {"chosen": "unchanged", "candidates": rows})
    row = {"score": 1.5, "score_interval": [1.4, 1.6], "view_retrieval": 50.0}
    row |= {"knn_top1": 60.0, "interval": [50.0, 70.0], "n": 20}
    features = {"features": [{"features": "end"} | row, {"features": "start"} | row]}
    run.write("summary.json", run.json("summary.json") | features | {"start": row, "end": row})
    verb("evaluate", "run", "--protocol", "knn", "few_label", "label_free", *CPU)
    verb("evaluate", "run", "--protocol", "finetune", "--finetune-epochs", "1", *CPU)
    verb("transfer", "run", "coco", "--task", "segmentation", *BRIEF.split())
    verb("export", "run", "--format", "safetensors")
    verb("report", "run", "--limit", "20")
    verb("embed", "run", "photos", "--out", "e.parquet", *CPU)
    torch.save({"state_dict": load("run", head=False).state_dict()}, "a.pt")
    verb("convert", "a.pt", "--out", "converted")
    os.chdir(before)


def write_voc(folder: Path, rng: np.random.Generator) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for i in range(8):
        pixels = rng.integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{i}.jpg")
        objects = "".join(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin>"
            f"<ymin>{x}</ymin><xmax>{x + 20}</xmax><ymax>{x + 15}</ymax></bndbox></object>"
            for name, x in (("cat", 3), ("dog", 10))
        )
        size = "<size><width>48</width><height>40</height><depth>3</depth></size>"
        text = f"<annotation><filename>{i}.jpg</filename>{size}{objects}</annotation>"
        (folder / "Annotations" / f"{i}.xml").write_text(text)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n2\n3\n4\n")
    (folder / "ImageSets" / "Main" / "test.txt").write_text("5\n6\n7\n")


# --- types ---


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where all values are: the keys that lead to each."""
    yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*place, key))
    elif isinstance(value, list):
        for i, item in enumerate(value[:20]):
            yield from places(item, (*place, i))


def change_type(content: Any, rng: random.Random) -> tuple[Any, str]:
    """Change one to three values; return the content, and what was done."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place = rng.choice(list(places(content)))
        value = copy.deepcopy(rng.choice(WRONG_VALUES))
        if not place:
            if rng.random() < 0.1:
                return value, "all"
            continue
        owner = content
        for key in place[:-1]:
            owner = owner[key]
        kind, key = rng.randrange(8), place[-1]
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[rng.choice(["x", "", "a\nb", "\x1b[2J", "__proto__"])] = owner.pop(key)
        elif kind == 2 and isinstance(owner, list):
            owner.insert(key, value)
        elif kind == 3:
            owner[key] = [owner[key]]
        else:
            owner[key] = value
        done.append(f"{'.'.join(map(str, place))}: {kind} {value!r}"[:120])
    return content, "; ".join(done)


def drop_checksums(content: Any, rng: random.Random) -> Any:
    """Remove checksums as a stranger would, or make them fit, or leave them as they are."""
    choice = rng.random()

    def renew(record: Any) -> Any:
        if not isinstance(record, dict) or choice < 0.1:
            return record
        plain_record = {k: v for k, v in record.items() if k != CHECKSUM_KEY}
        try:
            return seal(plain_record) if choice < 0.4 else plain_record
        except (ValueError, RecursionError):
            return plain_record

    return [renew(item) for item in content] if isinstance(content, list) else renew(content)


def change_json(path: Path, rng: random.Random) -> str:
    content, done = change_type(json.loads(path.read_text()), rng)
    path.write_text(json.dumps(drop_checksums(content, rng)))
    return done


def change_lines(path: Path, rng: random.Random) -> str:
    lines = path.read_text().splitlines()
    i = rng.randrange(len(lines))
    content, done = change_type(json.loads(lines[i]), rng)
    lines[i] = json.dumps(drop_checksums(content, rng))
    path.write_text("\n".join(lines) + "\n")
    return done


def change_yaml(path: Path, rng: random.Random) -> str:
    content, done = change_type(yaml.safe_load(path.read_text()), rng)
    try:
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, ValueError):
        text = json.dumps(content)
    path.write_text(text, errors="surrogatepass")
    return done


def change_checkpoint(path: Path, rng: random.Random) -> str:
    content = torch.load(path, weights_only=True)
    tensors = {key: content.pop(key) for key in ("model", "optimizer") if rng.random() < 0.8}
    content = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    content, done = change_type(content, rng)
    if isinstance(content, dict):
        content |= tensors
    if rng.random() < 0.2 and "model" in tensors:
        name = rng.choice(list(tensors["model"]))
        dtype = rng.choice([torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8])
        tensors["model"][name] = tensors["model"][name].to(dtype).conj()
        done += f" {name} {dtype}"
    torch.save(content, path)
    return done


def change_metadata(path: Path, rng: random.Random) -> str:
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"simsiam"])
    content, done = change_type(metadata, rng)
    text = json.dumps(content)
    pq.write_table(table.replace_schema_metadata({"simsiam": text}), path)
    return done


def change_xml(path: Path, rng: random.Random) -> str:
    tree = ET.parse(path)
    parents = [(parent, child) for parent in tree.iter() for child in parent]
    for _ in range(rng.choice([1, 1, 2, 3])):
        parent, child = rng.choice(parents)
        kind = rng.randrange(5)
        if kind == 0 and child in parent:
            parent.remove(child)
        elif kind == 1:
            child.append(copy.deepcopy(rng.choice(parents)[1]))
        elif kind == 2:
            child.tag = rng.choice(["x", "object", "name", "size"])
        else:
            value = rng.choice(WRONG_VALUES)
            child.text = "".join(c for c in str(value)[:5000] if c.isprintable() or c in "\n\t")
    if rng.random() < 0.05:
        path.write_text(f'<?xml version="1.0" encoding="{rng.choice(["x", "utf-7"])}"?><a/>')
        return "encoding"
    try:
        tree.write(path)
    except (RecursionError, UnicodeEncodeError):
        path.write_text("<annotation>" * 2000)
    return "xml"


def page_is_clean(page: Path) -> str:
    """Say whether a page has raw control characters, apart from the names in its galleries."""
    text = re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1]  # type: ignore[index]
    data = json.loads(text)

    def check(value: Any) -> bool:
        if isinstance(value, dict):
            return all(check(k) and check(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(check, value))
        return not isinstance(value, str) or not any(
            ord(c) < 32 or 127 <= ord(c) < 160 for c in value
        )

    return "" if check(data["runs"]) else "control characters on the page"


REPORT = ["report", "run", "--no-map", "--out", "page.html"]
COMPARE = ["compare", "run", "run"]
RESUME = ["resume", "run"]
EMBED = ["embed", "run", "photos", "--out", "near.parquet", "--limit", "4", *CPU]
CARD = ["export", "run", "--format", "huggingface", "--out", "card"]
FREE = ["evaluate", "run", "photos", "--protocol", "label_free", "--limit", "4", *CPU]
TYPED_FILES: dict[str, tuple[Callable[[Path, random.Random], str], list[list[str]]]] = {
    "run/summary.json": (change_json, [REPORT, COMPARE, CARD, RESUME]),
    "run/environment.json": (change_json, [REPORT, COMPARE, CARD, RESUME]),
    "run/metrics.jsonl": (change_lines, [REPORT, COMPARE, RESUME]),
    "run/adapt.json": (change_json, [REPORT]),
    "run/evaluations/knn.json": (change_json, [REPORT, COMPARE, CARD]),
    "run/evaluations/few_label.json": (change_json, [REPORT, COMPARE, CARD]),
    "run/evaluations/label_free.json": (change_json, [REPORT, COMPARE, FREE]),
    "run/transfers/segmentation.json": (change_json, [REPORT]),
    "run/loggers.json": (change_json, [RESUME]),
    "run/recipe.yaml": (change_yaml, [REPORT, COMPARE, EMBED, RESUME]),
    "run/checkpoints/last.pt": (change_checkpoint, [RESUME, FREE, REPORT]),
    "converted/converted.json": (
        change_json,
        [["pretrain", "photos", "--init", "converted", "--out", "new", *TINY.split(), *CPU]],
    ),
    "converted/origin.json": (
        change_json,
        [["export", "converted", "--format", "huggingface", "--out", "card"]],
    ),
    "run/exports/safetensors/preprocessing.json": (
        change_json,
        [["convert", "run/exports/safetensors/backbone.safetensors", "--out", "made"]],
    ),
    "e.parquet": (
        change_metadata,
        [
            ["neighbors", "e.parquet", "01.png", "--html", "near.html"],
            ["report", "e.parquet", "--limit", "20", "--out", "page.html"],
            ["duplicates", "e.parquet"],
            ["outliers", "e.parquet"],
        ],
    ),
}


def read_annotations(folder: str, work: Path) -> tuple[str, str]:
    """Open annotations, and use them as `transfer` does, without the training."""
    try:
        source = open_annotated(work / folder)
        for opened in (source, keep_masked_objects(source)):
            splits = split_source(opened)
            for part in (splits.train, splits.test):
                for i in range(len(part)):
                    if part.objects[i].segments:
                        decode_masks(part.objects[i])
            blank = Image.new("RGB", (8, 8))
            _arrange([(blank, blank)], splits.train.classes)
    except (UsageError, WorkFailed) as error:
        fine = len(str(error)) < 2000
        return "one line", "" if fine else f"a line of {len(str(error))} characters"
    return "done", ""


def one_type(name: str, files: Path, work: Path, rng: random.Random) -> tuple[str, str]:
    """Change the type of something in a file, then run a verb that reads it."""
    say_once.cache_clear()
    root = name.split("/")[0]
    source = files / root
    (shutil.copytree if source.is_dir() else shutil.copy)(source, work / root)
    (work / "photos").symlink_to(files / "photos")
    if root in ("coco", "voc"):
        path = rng.choice(
            sorted((work / root).rglob("*.json")) or sorted((work / root).rglob("*.xml"))
        )
        done = (change_json if path.suffix == ".json" else change_xml)(path, rng)
        end, wrong = read_annotations(root, work)
        return end, f"{wrong} {done}" if wrong else ""
    change, verbs = TYPED_FILES[name]
    try:
        done = change(work / name, rng)
    except (RuntimeError, NotImplementedError):  # of a tensor's type
        return "not made", ""
    verb = list(rng.choice(verbs))
    end, wrong = check_verb(verb)
    if not wrong and (work / "page.html").exists():
        wrong = page_is_clean(work / "page.html")
    return end, f"{verb[0]}: {wrong} after {done}" if wrong else ""


# --- flips ---


def results(verb: str, work: Path) -> tuple[Any, str]:
    """Run a verb on the run folder in `work`; return its result and its output."""
    say_once.cache_clear()
    commands = {"report": REPORT, "embed": EMBED, "resume": RESUME}
    code, output = run_verb(list(commands[verb]))
    if code:
        return code, output
    if verb == "report":
        text = (work / "page.html").read_text()
        data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
        return timeless(data["runs"]), output
    if verb == "embed":
        return sha256(
            pq.read_table(work / "near.parquet")["vector"]
            .combine_chunks()
            .flatten()
            .to_numpy()
            .tobytes()
        ).hexdigest(), output
    run = Run("run")
    result = {"checkpoint": plain(run.checkpoint()), "metrics": timeless(run.metrics())}
    return result | {"summary": timeless(run.json("summary.json"))}, output


def verbs_for(name: str) -> list[str]:
    """The verbs that read a file of the run folder."""
    if name in (
        "checkpoints/last.pt",
        "checkpoints/previous.pt",
        "environment.json",
        "loggers.json",
    ):
        return ["resume"]
    if name.startswith("tensorboard"):
        return ["resume"]
    if name == "recipe.yaml" or name.endswith(".safetensors"):
        return ["report", "embed"]
    return ["report", "resume"] if name == "metrics.jsonl" else ["report"]


def sums_match(folder: Path) -> bool:
    lines = (folder / SUMS_FILE).read_text(errors="replace").splitlines()
    try:
        pairs = [line.split("  ", 1) for line in lines]
        named = {name for _, name in pairs}
        present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        return named == present - {SUMS_FILE} and all(
            file_sha256(folder / name) == digest for digest, name in pairs
        )
    except (OSError, ValueError):
        return False


def page_matches(path: Path) -> bool:
    """Whether a browser would run the page's script on data that match their checksum."""
    text = path.read_bytes().decode("utf-8", "replace")
    parts = {
        "data": r'<script type="application/json" id="data">(.*?)</script>',
        "script": r"<script>(.*?)</script>",
        "style": r"<style>(.*?)</style>",
    }
    found = {name: re.search(pattern, text, re.S) for name, pattern in parts.items()}
    if None in found.values():
        return False
    content = {name: match[1] for name, match in found.items() if match}
    digests = [
        base64.b64encode(sha256(content[name].encode()).digest()).decode()
        for name in ("script", "style")
    ]
    fits = f'data-crc32="{crc32(content["data"].encode()):08x}"' in text
    return fits and all(digest in text for digest in digests)


def one_flip(
    name: str, files: Path, known: dict[str, Any], work: Path, rng: random.Random
) -> tuple[str, str]:
    """Flip a bit of a file in a run folder, then run what reads it."""
    shutil.copytree(files / "run", work / "run")
    (work / "photos").symlink_to(files / "photos")
    path = work / "run" / name
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    place = f"bit {bit} of {8 * len(data)}"
    if name.startswith("exports/"):
        return ("seen", "") if not sums_match(path.parent) else ("", f"not seen: {place}")
    if name == "report.html":
        body = {"seen": not page_matches(path)}
        if body["seen"] or visible(files / "run" / name) == visible(path):
            return "seen" if body["seen"] else "the same result", ""
        return "", f"not seen: {place}"
    last = path.stem in ("last", "previous")
    if path.suffix == ".pt" and not (last and path.parent.name == "checkpoints"):
        try:
            state = plain(read_checkpoint(path))
        except UsageError:
            return "one line", ""
        same = state == plain(read_checkpoint(files / "run" / name))
        return ("the same result", "") if same else ("", f"another state: {place}")
    if path.name.startswith("faults.txt"):
        return ("", f"not seen: {place}") if fits_checksum(work / "run" / name) else ("seen", "")
    if name.endswith(("curve.jsonl", "curve.png", "transfers/.lock")):
        return "not read by the program", ""
    ends = []
    for verb in verbs_for(name):
        result, output = results(verb, work)
        if result == known[verb]:
            ends.append("the same result")
        elif isinstance(result, int):
            end, wrong = ("one line", "") if "simsiam: " in output else ("", output[-300:])
            if wrong or "Traceback" in output:
                return "", f"{verb}: exit code {result}: {output[-300:]}"
            ends.append(end)
        elif "note     " in output or "damaged" in output:
            ends.append("a note")
        else:
            return "", f"{verb}: another result without a word: {place}"
    return min(ends), ""


def fits_checksum(path: Path) -> bool:
    try:
        read_with_checksum(path.with_name("faults.txt"))
    except UsageError:
        return False
    return True


def visible(path: Path) -> str:
    """The page without its data, its script and its style: what is seen if they are changed."""
    text = path.read_bytes().decode("utf-8", "replace")
    return re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S)


def known_results(files: Path) -> dict[str, Any]:
    known = {}
    for verb in ("report", "embed", "resume"):
        work = Path(tempfile.mkdtemp(dir=files))
        shutil.copytree(files / "run", work / "run")
        (work / "photos").symlink_to(files / "photos")
        os.chdir(work)
        known[verb], output = results(verb, work)
        assert not isinstance(known[verb], int), output
        os.chdir(files)
        shutil.rmtree(work)
    return known


# --- the campaign ---


def prepare(files: Path) -> dict[str, Any]:
    make_files(files)
    return known_results(files)


def plan(options: argparse.Namespace, files: Path, known: dict[str, Any]) -> list[Task]:
    """List the trials in parts, each for a process of its own; their kinds take turns."""
    typed = [*TYPED_FILES, "coco", "coco", "voc", "voc"]
    run = files / "run"
    flipped = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())
    flipped = [name for name in flipped if not name.endswith(".lock")]
    tasks = []
    for kind, names, count in (("type", typed, options.types), ("flip", flipped, options.flips)):
        for first in range(0, count, fuzz.CHUNK):
            trials, labels = [], []
            for i in range(first, min(first + fuzz.CHUNK, count)):
                name, rng = names[i % len(names)], random.Random(f"{options.seed} {kind} {i}")
                work: Any = partial(one_type, name, files, rng=rng)
                if kind == "flip":
                    work = partial(one_flip, name, files, known, rng=rng)
                trials.append(work)
                labels.append(f"{kind} {i} {name}")
            tasks.append(Task(kind, first, trials, labels, first / max(count, 1), SECONDS))
    return sorted(tasks, key=lambda task: task.when)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", type=int, default=5000)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write PATH.json and PATH.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, started = time.monotonic(), utc_now()
    with tempfile.TemporaryDirectory(prefix="run-files-") as name:
        root = Path(name).resolve()
        for name in ("CACHE", "STATE"):
            os.environ[f"SIMSIAM_{name}"] = str(root / name.lower())
        files, trials = root / "files", root / "trials"
        files.mkdir()
        trials.mkdir()
        known = fuzz.in_a_child(prepare, files)
        tasks = plan(options, files, known)
        until = start + 60 * options.minutes
        ends, wrongs, costs = fuzz.run_all(tasks, trials, options.processes, until)
        largest = max((cost["mib"] for cost in costs), default=0)
    environment = collect_environment(Compute(torch.device("cpu"), "float32"))
    seconds = time.monotonic() - start
    cpu_seconds = sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    total = sum(ends.values())
    rows = [f"| {kind} | {end} | {n:,} |" for (kind, end), n in sorted(ends.items())]
    command = "python tests/stress/run_files.py " + " ".join(sys.argv[1:])
    text = (
        f"`{command}`\n\ncommit {environment['commit']}, {environment['device']}, torch "
        f"{environment['versions']['torch']}, {started}, {seconds / 60:.1f} min "
        f"({cpu_seconds / 60:.1f} CPU-minutes). {total:,} trials, {len(wrongs)} wrong: a crash, "
        f"more than {SECONDS:g} s, a file elsewhere, a traceback, more than one line, control "
        "characters, or after a flip another result without a word. The largest process took "
        f"{largest / 2**10:.2f} GiB, Python and torch included.\n\n"
        "| trial | what came of it | number |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )
    print(text)
    for wrong in wrongs[:50]:
        print(wrong)
    if options.out:
        report = {"command": command, "started": started, "environment": environment}
        report |= {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
        counts = {f"{kind}: {end}": n for (kind, end), n in sorted(ends.items())}
        report |= {"counts": counts, "wrong": wrongs, "largest_mib": largest}
        contents = {"json": json.dumps(report, indent=1) + "\n", "md": text}
        for suffix, content in contents.items():
            with atomic_write(Path(f"{options.out}.{suffix}")) as part:
                part.write_text(content)
    return bool(wrongs)


if __name__ == "__main__":
    sys.exit(main())
