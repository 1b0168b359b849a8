"""What a backbone is worth: every protocol, each number labeled with how it was obtained.

A protocol is a function from a frozen network and settings to answers. It sees no test label: answers are compared with
the truth here, and only here are records made, written and shown.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from simsiam.config.protocols import FROZEN, PROTOCOLS, Settings
from simsiam.data.images import in_memory, sample
from simsiam.distributed.process_group import by_first, rank, together
from simsiam.errors import UsageError, unknown
from simsiam.evaluation.few_label import planned, with_few_labels
from simsiam.evaluation.finetune_protocol import tuned
from simsiam.evaluation.frozen import UNTRAINED, Answer, Frozen, divide
from simsiam.evaluation.knn import by_neighbors
from simsiam.evaluation.label_free import without_labels
from simsiam.evaluation.linear import probes
from simsiam.evaluation.scores import score
from simsiam.runs.encoder import fingerprint
from simsiam.runs.environment import environment, now
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.utils.files import locked

ANSWERS: dict[str, Callable[[Frozen, Settings], Iterator[Answer]]] = {
    "knn": by_neighbors,
    "linear": probes,
    "few_label": with_few_labels,
    "label_free": without_labels,
}
assert tuple(ANSWERS) == FROZEN
SIGNALS = ("rankme", "spectrum_auc", "alignment", "uniformity", "view_retrieval")
# A record is of the same measurement as another if these agree; it then takes the other's place in the file.
SAME = ("protocol", "parameters", "features", "checkpoint", "source", "train", "test")


@together
def evaluate(
    run: str | os.PathLike[str],
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    protocols: Sequence[str] = FROZEN,
    checkpoint: str = "last",
    device: str = "auto",
    precision: str = "auto",
    limit: int | None = None,
    **words: Any,
) -> list[dict[str, Any]]:
    """Measure a run's backbone on a source, by default the run's own; returns the records and prints them as a table.

    `checkpoint` is last, best or epoch-NNNN, `limit` takes so many training and so many test images, spread evenly, and
    `words` are the fields of `Settings`. Each protocol's records go into RUN/evaluations/PROTOCOL.json. Raises
    UsageError for a wrong request, WorkFailed where no image can be read.
    """
    how = Settings.of(words)
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; it is at least 1")
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise unknown("protocol", protocol, PROTOCOLS)
    folder = Run(run)
    opened = open_source(source or folder.recipe.source, folder.recipe.channels)
    train, test, split = divide(opened, labeled=set(protocols) != {"label_free"})
    for name, images in {"train": train, "test": test}.items():
        if limit is not None and limit < len(images):
            split[name] = f"{limit} of {split[name]}"
    train, test = sample(train, limit), sample(test, limit)
    room = int(folder.recipe.cache_gib * 2**30)
    (train, broken), (test, more) = in_memory(train, room), in_memory(test, room)
    where: dict[str, Any] = {"device": device, "precision": precision}
    frozen = Frozen(folder, checkpoint, train, replace(test, labels=None), **where)
    truth: Any = test.labels  # here, and nowhere below
    tuning = partial(tuned, folder, checkpoint, train, test, how, **where)  # it alone is given test labels
    if {"few_label", "finetune"} & set(protocols):
        planned(train, how)  # refuses now what could not be drawn after an hour
    weights = fingerprint(frozen.backbone)
    here = environment(frozen.device, frozen.precision)
    about = {
        "checkpoint": checkpoint, "step": frozen.step, "backbone_sha256": weights,
        "source": opened.name, **split, "train_images": len(train), "classes": len(train.classes),
    }  # fmt: skip
    conditions = {k: here[k] for k in ("commit", "device", "precision", "threads")}
    conditions["torch"] = here["versions"]["torch"]

    found = []
    for protocol in protocols:
        started, records = time.monotonic(), []
        for answer in tuning() if protocol == "finetune" else ANSWERS[protocol](frozen, how):
            result = answer.values or score(answer.ranked, truth[frozen.readable], len(train.classes))
            given = {"name": answer.name, "features": answer.features, "parameters": answer.parameters}
            records.append({"protocol": protocol, **given, "chosen": answer.chosen, **result, **about})
        assert fingerprint(frozen.backbone) == weights, "a frozen backbone moved"
        lost = len(broken + more + frozen.unreadable)
        spent = {"measured": now(), "seconds": round(time.monotonic() - started, 1)}
        said = {"frozen": protocol != "finetune", "environment": conditions} | spent
        records = [r | {"unreadable": lost + r.get("unreadable", 0)} | said for r in records]
        write(folder, protocol, records)
        found += records
    show(found, f"{opened.name}: classifiers learn from {split['train']} and are tested on {split['test']}")
    return found


@by_first
def write(run: Run, protocol: str, records: Sequence[dict[str, Any]]) -> None:
    """Add records to the protocol's file, in the place of those of the same measurements."""
    plain = json.loads(json.dumps(records))  # as they read back
    new = [[record[key] for key in SAME] for record in plain]
    with locked(run.path / "evaluations" / ".lock", wait=True):  # two evaluations may end at once
        before = run.listed(f"evaluations/{protocol}.json")
        others = [record for record in before if [record.get(key) for key in SAME] not in new]
        run.write(f"evaluations/{protocol}.json", json.dumps(others + plain, indent=2) + "\n")


def show(records: Sequence[dict[str, Any]], title: str) -> None:
    """The records as one table of 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("protocol", "parameters", "checkpoint", "features"):
        table.add_column(heading, overflow="fold")
    for heading in ("top-1", "top-5", "n", "± or 95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in (r for r in records if "top1" in r):
        top5 = "" if r["top5"] is None else f"{r['top5']:.1f}"
        low_high = "{:.1f}–{:.1f}".format(*r["interval"]) if "interval" in r else f"± {r['top1_std']:.1f}"
        features = "untrained" if r["features"] == UNTRAINED else r["features"]
        cells = (r["protocol"], r["name"], r["checkpoint"], features, f"{r['top1']:.1f}", top5, str(r["n"]), low_high)
        table.add_row(*cells, style="bold" if r["features"] in ("h", "z", "pretrained") else None)
    console = Console(highlight=False, quiet=rank() != 0)
    if table.rows:
        console.print(table)
    for r in (r for r in records if "top1" not in r):
        signals = ", ".join(f"{signal} {r[signal]:.4g}" for signal in SIGNALS)
        console.print(f"{r['protocol']}: {r['features']} of {r['name']} of {r['test']} at {r['checkpoint']}: {signals}")
