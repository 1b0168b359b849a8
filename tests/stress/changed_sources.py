"""Change the images of a source while a job is interrupted, and check that the job notices it.

    python tests/stress/changed_sources.py --trials 600 --out results/faults/changed_sources

A trial writes a source of random kind, kills `pretrain`, `embed` or `shard` in the middle, lets
something happen to the source, and starts the job again. A change must be told in one line, and
with --accept-changed-source the result must be that of the images as they are. If the images are
the same, because they were moved or touched, the result must be that of an uninterrupted job, bit
for bit. All randomness comes from --seed.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from counts import report

sys.path.insert(0, str(Path(__file__).parents[1]))
from source_changes import CHANGES, KINDS, change_source

from simsiam.commands.main import main as run_verb
from simsiam.embeddings import embed as embedding
from simsiam.runs.environment import utc_now
from simsiam.runs.run_folder import Run, read_checkpoint
from simsiam.sources import write_shards
from simsiam.training.pretrain import Pretraining

TINY = (
    "--backbone resnet10 --width 4 --dim 16 --proj-hidden 16 --pred-dim 4 --batch-size 8 "
    "--steps 6 --workers 0 --save-seconds 0 --log-every 1 --knn-every 99 --image-size 16 "
    "--precision float32 --device cpu --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25"
)
KILLED = 9


def child(send: Any, arguments: list[str], kill_at: int) -> None:
    """Run a verb in this process, which is forked; end it at a call if `kill_at` is not 0."""
    calls = 0

    def counted(function: Any) -> Any:
        def call(*values: Any, **words: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os._exit(KILLED)
            return function(*values, **words)

        return call

    Pretraining.train_step = counted(Pretraining.train_step)  # type: ignore[method-assign]
    embedding.PART_SIZE = 8  # type: ignore[misc]
    embedding.embed_part = counted(embedding.embed_part)  # type: ignore[assignment]
    write_shards._write_tar = counted(write_shards._write_tar)  # type: ignore[assignment]
    write_shards._write_parquet = counted(write_shards._write_parquet)  # type: ignore[assignment]
    write_shards.parallel_map_with_progress = (  # type: ignore[assignment]
        lambda function, jobs, text: [function(*job) for job in jobs]
    )
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code: int | str = run_verb(arguments)
        except BaseException:
            code = traceback.format_exc()[-800:]
    send.send((code, output.getvalue()))


def run(arguments: list[str], kill_at: int = 0) -> tuple[int | str, str]:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(send, arguments, kill_at))
    process.start()
    send.close()
    try:
        result = receive.recv() if receive.poll(180) else ("it hangs", "")
    except EOFError:
        result = (KILLED, "")
    process.kill()
    process.join()
    return result


def digest(work: Path, name: str) -> Any:
    """Digest the result of a job, without what differs between any two places."""
    if name == "run":
        state = read_checkpoint(work / "run" / "checkpoints" / "last.pt")
        tensors = {
            key: sha256(x.contiguous().numpy().tobytes()).hexdigest()
            for key, x in state["model"].items()
        }
        return tensors, [line["loss"] for line in Run(work / "run").metrics() if "loss" in line]
    if name == "e.parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(work / name)
        return table.to_pydict()
    return {path.name: path.read_bytes() for path in sorted((work / name).glob("*.[tp]a*"))}


def commands(verb: str, path: Path, root: Path, work: Path) -> tuple[list[str], list[str], str]:
    """The command, the one that goes on with the source at a path, and the name of the result."""
    if verb == "pretrain":
        first = ["pretrain", str(path), "--out", str(work / "run"), *TINY.split()]
        return first, ["resume", str(work / "run")], "run"
    if verb == "embed":
        first = ["embed", str(root / "run"), str(path), "--out", str(work / "e.parquet")]
        return first, first, "e.parquet"
    form = verb.rpartition(" ")[2]
    first = ["shard", str(path), "--per-shard", "8", "--format", form, "--out", str(work / "s")]
    return first, first, "s"


def trial(root: Path, work: Path, rng: random.Random) -> tuple[str, str, str]:
    """Return the change, how it ended, and what was wrong."""
    kind, change = rng.choice(list(KINDS)), rng.choice(list(CHANGES))
    verb = rng.choice(["pretrain", "embed", "shard tar", "shard parquet"])
    source = work / "source"
    path, happen, harmless = change_source(kind, change, source, rng, rng.randrange(24, 60))
    what = f"{verb}, {kind}, {change}"
    first, _, name = commands(verb, path, root, work)
    code, output = run(first, kill_at=rng.randrange(2, 4))
    if code != KILLED:
        return what, "", f"it was not killed: {code} {output[-300:]}"
    new = happen()
    _, again, _ = commands(verb, new, root, work)
    if verb == "pretrain" and change == "moved":
        again += ["--source", str(new)]
    code, output = run(again)
    if (kind, change) == ("absolute list", "moved") and verb != "pretrain":
        refused = code == 2 and "holds the parts of another job" in output
        return what, "told", "" if refused else f"other paths: {code} {output[-300:]}"
    told = [line for line in output.splitlines() if "the images have changed" in line]
    if not harmless:
        if code != 2 or len(told) != 1:
            return what, "", f"not noticed: {code} {output[-300:]}"
        code, output = run([*again, "--accept-changed-source"])
    if code != 0:
        return what, "", f"{code} {output[-400:]}"
    if harmless and told:
        return what, "", f"no change was told as one: {told}"
    if verb == "pretrain" and not harmless:
        return what, "told, then accepted", ""
    result = digest(work, name)
    fresh = work / "fresh"
    fresh.mkdir()
    first, _, _ = commands(verb, new, root, fresh)
    code, output = run(first)
    if code != 0:
        return what, "", f"the uninterrupted job: {code} {output[-300:]}"
    if digest(fresh, name) != result:
        return what, "", "another result than that of an uninterrupted job"
    return what, "the same result" if harmless else "told, then begun again", ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write PATH.json and PATH.md")
    options = parser.parse_args()
    place = os.getcwd()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="changed-")).resolve()
    for name in ("CACHE", "STATE"):
        os.environ[f"SIMSIAM_{name}"] = str(root / name.lower())
    started, ends, wrongs = utc_now(), Counter[tuple[str, str]](), list[dict[str, object]]()
    try:
        code, output = run(["pretrain", "shapes", "--limit", "32", "--out", str(root / "run"),
                            "--holdout", "0", *TINY.split()])  # fmt: skip
        assert code == 0, output
        for number in range(options.trials):
            work = Path(tempfile.mkdtemp(dir=root))
            os.chdir(work)
            what, end, wrong = trial(root, work, random.Random(f"{options.seed} {number}"))
            ends[what.rpartition(", ")[2], end or "wrong"] += 1
            if wrong:
                wrongs.append({"trial": number, "what": what, "wrong": wrong})
                print(f"WRONG {number} {what}: {wrong}", flush=True)
            os.chdir(root)
            shutil.rmtree(work)
    finally:
        os.chdir(place)
        shutil.rmtree(root, ignore_errors=True)
    return report(
        ends,
        wrongs,
        started=started,
        meaning="a change that was not noticed, one that was none, or another result than that of "
        "an uninterrupted job",
        heading="what happened to the source",
        out=options.out,
    )


if __name__ == "__main__":
    sys.exit(main())
