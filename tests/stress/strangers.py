"""Give every verb run folders, recipes and embeddings that name places, and count connections.

    python tests/stress/strangers.py --out results/faults/strangers

A run folder of somebody else may name any place: in its `source`, its `init` and its loggers, and
an embedding in its `sources`. Each trial is one verb with one place of one setting, in a process of
its own. An audit hook there records every look-up of a name, every connection, every process that
is started, and every file that is opened in a folder that only the stranger names. A verb may do
none of these. It must end in one line with the command that names the place, or with its result. A
command that names the place may connect: then the trial shows that the hook sees it.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from counts import report
from PIL import Image

import simsiam
from simsiam.commands.main import main as run_verb
from simsiam.runs.environment import utc_now

TINY = (
    "--backbone resnet10 --width 4 --dim 16 --proj-hidden 16 --pred-dim 4 --batch-size 16 "
    "--steps 2 --workers 0 --limit 32 --holdout 0"
)
SOURCES = (
    "ftp://127.0.0.1:9/photos/", "ftp://me:secret@127.0.0.1:9/a.parquet",
    "http://127.0.0.1:9/a.tar", "https://127.0.0.1:9/a.parquet?token=secret",
    "s3://bucket/photos", "gs://bucket/photos", "hf://datasets/them/photos", "sftp://127.0.0.1/a",
    "smb://127.0.0.1/share", "webhdfs://127.0.0.1:9/a", "github://them:photos@main/",
    "simplecache::ftp://127.0.0.1:9/a.tar", "zip://a.jpg::ftp://127.0.0.1:9/a.zip",
    "file:///PRIVATE", "local:///PRIVATE", "cifar10", "cifar100", "stl10", "PRIVATE",
    "PRIVATE/list.txt", "PRIVATE/a.png",
)  # fmt: skip
INITS = (
    "timm:resnet10t.c3_in1k", "hf-hub:them/network", "ResNet18_Weights.IMAGENET1K_V1",
    "simsiam_resnet50_100ep", "PRIVATE/weights.pth", "https://127.0.0.1:9/a.pth",
)  # fmt: skip
LOGGERS = ("wandb", "mlflow")
# The verbs that are given the run; "NAMED" marks commands that name the place themselves.
SOURCE_VERBS = (
    "report RUN", "report RUN --no-map", "embed RUN --out e.parquet", "evaluate RUN",
    "evaluate RUN --protocol knn", "resume RUN", "resume RUN --epochs 9",
    "pretrain --recipe RUN/recipe.yaml --out new", "compare RUN RUN",
    "export RUN --format safetensors --out x", "convert RUN --out x",
    "search shapes train#0 --encoder RUN",
    "pretrain shapes --init RUN --out new TINY", "report RUN OWN",
)  # fmt: skip
INIT_VERBS = (
    *SOURCE_VERBS, "preview shapes --recipe RUN/recipe.yaml --out p.png",
    "plan shapes --recipe RUN/recipe.yaml", "pretrain shapes --recipe RUN/recipe.yaml --out new",
)  # fmt: skip
SLOW = "adapt shapes --limit 40 --init RUN --out x"
LOGGER_VERBS = ("resume RUN", "report RUN", "evaluate RUN", "embed RUN --out e.parquet")
EMBEDDING_VERBS = (
    "duplicates FILE", "neighbors FILE train#0", "cluster FILE --clusters 2", "outliers FILE",
    "report FILE", "neighbors FILE PRIVATE/a.png",
)  # fmt: skip
WATCHED = (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
    "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system",
)  # fmt: skip
ALLOWED_PROCESSES = ("git",)  # it records the commit


def photographs(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(32):
        pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def prepare(root: Path) -> None:
    """Make a run of the user, an embedding of it, and private files that only strangers name."""
    photographs(root / "photos")
    photographs(root / "private")
    (root / "private" / "a.png").write_bytes((root / "private" / "0.png").read_bytes())
    (root / "private" / "list.txt").write_text("a.png\n" * 32)
    os.chdir(root)
    command = f"pretrain {root}/photos --out own {TINY}"
    assert run_verb(command.split()) == 0
    network = simsiam.load(root / "own").state_dict()
    torch.save({"state_dict": network}, root / "private" / "weights.pth")
    assert run_verb(["embed", "own", "--out", "own.parquet"]) == 0


def strangers_run(root: Path, work: Path, setting: str, place: str) -> None:
    """Copy the run as somebody else would send it, with a place of theirs, into RUN."""
    run = Path(shutil.copytree(root / "own", work / "RUN"))
    if setting == "loggers":
        record = {"loggers": [place], "id": "0" * 32}
        (run / "loggers.json").write_text(json.dumps(record))
        changed: dict[str, Any] = {"source": ["shapes"]}
    elif setting == "init":
        changed = {"source": ["shapes"], "init": place}
        shutil.rmtree(run / "checkpoints")  # so that `resume` needs the initial weights
        (run / "metrics.jsonl").unlink()
    else:
        changed = {"source": [place]}
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | changed))


def strangers_embedding(root: Path, work: Path, place: str) -> None:
    table = pq.read_table(root / "own.parquet")
    metadata = json.loads(table.schema.metadata[b"simsiam"])
    metadata |= {"sources": [place], "run": place}
    pq.write_table(table.replace_schema_metadata({"simsiam": json.dumps(metadata)}), work / "FILE")


def trials(root: Path) -> list[tuple[str, str, str]]:
    """List (setting, place, command)."""
    private = str(root / "private")
    found = [("source", place, verb) for place in SOURCES for verb in SOURCE_VERBS]
    found += [("init", place, verb) for place in INITS for verb in INIT_VERBS]
    found += [("source", SOURCES[0], SLOW), ("init", INITS[0], SLOW)]
    found += [("loggers", place, verb) for place in LOGGERS for verb in LOGGER_VERBS]
    found += [("sources", place, verb) for place in SOURCES for verb in EMBEDDING_VERBS]
    words = {"PRIVATE": private, "TINY": TINY, "OWN": str(root / "own")}

    def fill(text: str) -> str:
        return re.sub("|".join(words), lambda match: words[match[0]], text)

    return [(setting, fill(place), fill(verb)) for setting, place, verb in found]


def perform(send: Any, arguments: list[str], private: str, *, named: bool) -> None:
    """Run a verb in this process, which is forked, and send what it did."""
    events: list[str] = []

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event in WATCHED and not (
            event in ("subprocess.Popen", "os.posix_spawn") and values[0] in ALLOWED_PROCESSES
        ):
            events.append(f"{event} {values[1:]!r}"[:160])
        elif event in ("open", "os.listdir", "os.scandir") and not named:
            path = values[0]
            if isinstance(path, str | bytes | os.PathLike):
                text = os.path.abspath(os.fsdecode(path))
                if text.startswith(private):
                    events.append(f"{event} {text}"[:160])

    def refuse(*values: object, **words: object) -> None:
        raise OSError("no network here")

    sys.addaudithook(hook)
    true_connect = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        sys.audit("socket.connect", self, address)
        if self.family == socket.AF_UNIX:
            return true_connect(self, address)
        return refuse()

    socket.socket.connect = connect  # type: ignore[method-assign]
    socket.getaddrinfo = lambda *values, **words: (  # type: ignore[assignment]
        sys.audit("socket.getaddrinfo", *values) or refuse()
    )
    os.environ["HF_HUB_ETAG_TIMEOUT"] = "1"
    output = io.StringIO()
    code: int | str = "nothing"
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = run_verb(arguments)
        except SystemExit as error:
            code = str(error.code)
        except BaseException:
            code = traceback.format_exc()[-600:]
    send.send((code, output.getvalue(), events))


def in_a_child(arguments: list[str], private: str, *, named: bool) -> tuple[Any, str, list[str]]:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(
        target=perform, args=(send, arguments, private), kwargs={"named": named}
    )
    process.start()
    send.close()
    try:
        result = receive.recv() if receive.poll(600) else ("it hangs", "", [])
    except EOFError:
        result = ("it was killed", "", [])
    process.kill()
    process.join()
    return result


def judge(trial: tuple[str, str, str], root: Path, work: Path) -> tuple[str, str]:
    """Return how a trial ended, and what was wrong."""
    setting, place, command = trial
    if setting == "sources":
        strangers_embedding(root, work, place)
    else:
        strangers_run(root, work, setting, place)
    private = str(root / "private")
    # A query that the user names is read.
    named = private in command
    code, output, events = in_a_child(command.split(), private, named=named)
    wrong = f"it did {events[:3]}; " if events else ""
    asked = "no mark of yours" in output
    if code not in (0, 1, 2):
        wrong += f"exit {code}; "
    if "Traceback" in output:
        wrong += f"a traceback; {output[-300:]}"
    if "secret" in output:
        wrong += "a key is printed; "
    if asked:
        [words] = [shlex.split(text) for text in re.findall("`simsiam (.*?)`", output)][:1]
        if words[0] != command.split()[0] and words[0] != "pretrain":
            wrong += f"the line gives {words}; "
    ending = "asks" if asked else {0: "done", 1: "failed", 2: "refused"}.get(code, "other")
    return ending, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="run only every N-th trial")
    parser.add_argument("--out", help="write PATH.json and PATH.md")
    options = parser.parse_args()
    place = os.getcwd()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="strangers-")).resolve()
    for name in ("CACHE", "STATE", "DATA"):
        os.environ[f"SIMSIAM_{name}"] = str(root / name.lower())
    os.environ["HOME"] = str(root / "home")
    started, ends, wrongs = utc_now(), Counter[tuple[str, str]](), list[dict[str, str]]()
    prepared = multiprocessing.get_context("fork").Process(target=prepare, args=(root,))
    prepared.start()
    prepared.join()
    assert prepared.exitcode == 0
    try:
        # The hook sees a connection that a command names.
        _, _, seen = in_a_child(
            ["embed", str(root / "own"), "ftp://127.0.0.1:9/a/", "--out", str(root / "x.parquet")],
            str(root / "private"), named=True,
        )  # fmt: skip
        assert any("connect" in event or "getaddrinfo" in event for event in seen), seen
        for trial in trials(root)[:: options.every]:
            work = Path(tempfile.mkdtemp(dir=root))
            os.chdir(work)
            ending, wrong = judge(trial, root, work)
            ends[trial[0], ending] += 1
            if wrong:
                wrongs.append(dict(zip(("setting", "place", "command"), trial)) | {"wrong": wrong})
                print(f"WRONG {trial}: {wrong}", flush=True)
            os.chdir(root)
            shutil.rmtree(work)
    finally:
        os.chdir(place)
        shutil.rmtree(root, ignore_errors=True)
    return report(
        ends,
        wrongs,
        started=started,
        meaning="a connection, a look-up of a name, a process, a private file that was opened, a "
        "traceback, or a key that was printed",
        heading="what the stranger wrote",
        out=options.out,
    )


if __name__ == "__main__":
    sys.exit(main())
