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
from typing_extensions import Unpack

from simsiam.config.keyword_settings import EvaluationSettings
from simsiam.config.protocols import FROZEN_PROTOCOLS, PROTOCOLS, Settings
from simsiam.data.images import load_into_memory, sample
from simsiam.distributed.process_group import distributed_entry_point, rank, rank_zero_only
from simsiam.errors import UsageError, unknown_name
from simsiam.evaluation.protocol_few_label import evaluate_few_label, plan_draws
from simsiam.evaluation.protocol_finetune import evaluate_finetune
from simsiam.evaluation.frozen import (
    UNTRAINED_NETWORK,
    FrozenNetwork,
    ProtocolResult,
    split_train_test,
)
from simsiam.evaluation.protocol_knn import evaluate_knn
from simsiam.evaluation.protocol_label_free import evaluate_label_free
from simsiam.evaluation.protocol_linear import evaluate_linear
from simsiam.evaluation.scores import score_predictions
from simsiam.model.precision import Compute
from simsiam.runs.encoder import weights_sha256
from simsiam.runs.environment import collect_environment, utc_now
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.utils.files import file_lock

EVALUATORS: dict[str, Callable[[FrozenNetwork, Settings], Iterator[ProtocolResult]]] = {
    "knn": evaluate_knn,
    "linear": evaluate_linear,
    "few_label": evaluate_few_label,
    "label_free": evaluate_label_free,
}
assert tuple(EVALUATORS) == FROZEN_PROTOCOLS
SIGNALS = ("rankme", "spectrum_auc", "alignment", "uniformity", "view_retrieval")
# A record is of the same measurement as another if these agree; it then takes the other's place in the file.
RECORD_IDENTITY_KEYS = (
    "protocol",
    "parameters",
    "features",
    "checkpoint",
    "source",
    "train",
    "test",
)


@distributed_entry_point
def evaluate(
    run: str | os.PathLike[str],
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    protocols: Sequence[str] = FROZEN_PROTOCOLS,
    checkpoint: str = "last",
    device: str = "auto",
    precision: str = "auto",
    limit: int | None = None,
    **overrides: Unpack[EvaluationSettings],
) -> list[dict[str, Any]]:
    """Measure a run's backbone on a source, by default the run's own; returns the records and prints them as a table.

    `checkpoint` is last, best or epoch-NNNN, `limit` takes so many training and so many test images, spread evenly, and
    `words` are the fields of `Settings`. Each protocol's records go into RUN/evaluations/PROTOCOL.json. Raises
    UsageError for a wrong request, WorkFailed where no image can be read.
    """
    how = Settings.from_dict(overrides)
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; it is at least 1")
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise unknown_name("protocol", protocol, PROTOCOLS)
    folder = Run(run)
    opened = open_source(source or folder.recipe.source, folder.recipe.channels)
    train, test, split = split_train_test(opened, require_labels=set(protocols) != {"label_free"})
    for name, images in {"train": train, "test": test}.items():
        if limit is not None and limit < len(images):
            split[name] = f"{limit} of {split[name]}"
    train, test = sample(train, limit), sample(test, limit)
    room = int(folder.recipe.cache_gib * 2**30)
    (train, broken), (test, more) = load_into_memory(train, room), load_into_memory(test, room)
    compute = Compute.pick(device, precision)
    frozen = FrozenNetwork(folder, checkpoint, train, replace(test, labels=None), compute=compute)
    truth: Any = test.labels  # here, and nowhere below
    tuning = partial(
        evaluate_finetune, folder, checkpoint, train, test, how, compute=compute
    )  # it alone is given test labels
    if {"few_label", "finetune"} & set(protocols):
        plan_draws(train, how)  # refuses now what could not be drawn after an hour
    weights = weights_sha256(frozen.backbone)
    here = collect_environment(frozen.compute)
    about = {
        "checkpoint": checkpoint, "step": frozen.step, "backbone_sha256": weights,
        "source": opened.name, **split, "train_images": len(train), "classes": len(train.classes),
    }  # fmt: skip
    conditions = {k: here[k] for k in ("commit", "device", "precision", "threads")}
    conditions["torch"] = here["versions"]["torch"]

    found = []
    for protocol in protocols:
        started, records = time.monotonic(), []
        for answer in tuning() if protocol == "finetune" else EVALUATORS[protocol](frozen, how):
            result = answer.metrics or score_predictions(
                answer.predictions, truth[frozen.test_indices], len(train.classes)
            )
            given = {
                "name": answer.name,
                "features": answer.features,
                "parameters": answer.parameters,
            }
            records.append(
                {"protocol": protocol, **given, "chosen": answer.selected, **result, **about}
            )
        assert weights_sha256(frozen.backbone) == weights, "a frozen backbone moved"
        lost = len(broken + more + frozen.unreadable)
        spent = {"measured": utc_now(), "seconds": round(time.monotonic() - started, 1)}
        said = {"frozen": protocol != "finetune", "environment": conditions} | spent
        records = [r | {"unreadable": lost + r.get("unreadable", 0)} | said for r in records]
        save_records(folder, protocol, records)
        found += records
    print_records(
        found,
        f"{opened.name}: classifiers learn from {split['train']} and are tested on {split['test']}",
    )
    return found


@rank_zero_only
def save_records(run: Run, protocol: str, records: Sequence[dict[str, Any]]) -> None:
    """Add records to the protocol's file, in the place of those of the same measurements."""
    plain = json.loads(json.dumps(records))  # as they read back
    new = [[record[key] for key in RECORD_IDENTITY_KEYS] for record in plain]
    with file_lock(
        run.path / "evaluations" / ".lock", wait=True
    ):  # two evaluations may end at once
        before = run.read_records(f"evaluations/{protocol}.json")
        others = [
            record
            for record in before
            if [record.get(key) for key in RECORD_IDENTITY_KEYS] not in new
        ]
        run.write(f"evaluations/{protocol}.json", json.dumps(others + plain, indent=2) + "\n")


def print_records(records: Sequence[dict[str, Any]], title: str) -> None:
    """The records as one table of 80 columns."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False
    )
    for heading in ("protocol", "parameters", "checkpoint", "features"):
        table.add_column(heading, overflow="fold")
    for heading in ("top-1", "top-5", "n", "± or 95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in (r for r in records if "top1" in r):
        top5 = "" if r["top5"] is None else f"{r['top5']:.1f}"
        low_high = (
            "{:.1f}–{:.1f}".format(*r["interval"]) if "interval" in r else f"± {r['top1_std']:.1f}"
        )
        features = "untrained" if r["features"] == UNTRAINED_NETWORK else r["features"]
        cells = (
            r["protocol"],
            r["name"],
            r["checkpoint"],
            features,
            f"{r['top1']:.1f}",
            top5,
            str(r["n"]),
            low_high,
        )
        table.add_row(*cells, style="bold" if r["features"] in ("h", "z", "pretrained") else None)
    console = Console(highlight=False, quiet=rank() != 0)
    if table.rows:
        console.print(table)
    for r in (r for r in records if "top1" not in r):
        signals = ", ".join(f"{signal} {r[signal]:.4g}" for signal in SIGNALS)
        console.print(
            f"{r['protocol']}: {r['features']} of {r['name']} of {r['test']} at {r['checkpoint']}: {signals}"
        )
