"""The record of an evaluation: RUN/evaluations/PROTOCOL.json, and the table that is printed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from rich import box
from rich.console import Console
from rich.table import Table

from simsiam.distributed.process_group import rank, rank_zero_only
from simsiam.evaluation.frozen import UNTRAINED_NETWORK, WITH_HEAD, WITH_PATCHES
from simsiam.runs.run_folder import Run
from simsiam.utils.files import file_lock

# Kinds of features that are no baselines.
_OF_THE_RUN = ("h", WITH_HEAD, WITH_PATCHES, "z", "pretrained")


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """One measurement of a backbone, and how it was obtained.

    A field that an old file lacks has its default value.
    """

    protocol: str
    name: str = ""  # the parameters in short
    # "h", "z", "h after the map", "h beside patches", "raw pixels", ...; finetune: "pretrained"
    features: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)
    chosen: Mapping[str, object] = field(default_factory=dict)  # on training images alone
    # top1, top5 in percent, n, interval or top1_std and draws; or label-free signals. In the file
    # they are not nested. `unreadable`, if it is here, is that of the protocol alone.
    metrics: Mapping[str, object] = field(default_factory=dict)
    checkpoint: str = ""
    step: int = 0
    backbone_sha256: str = ""
    source: str = ""
    train: str = ""  # which images were learned from ...
    test: str = ""  # ... and which were classified
    train_images: int = 0
    classes: int = 0
    unreadable: int = 0  # images, of training and test together
    frozen: bool = True  # the backbone was not trained
    environment: Mapping[str, object] = field(default_factory=dict)
    measured: str = ""  # the time, UTC
    seconds: float = 0.0

    def to_dict(self) -> dict[str, object]:
        """Return the record as plain data, exactly as it reads back from JSON."""
        content: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            content |= value if f.name == "metrics" else {f.name: value}
        return json.loads(json.dumps(content))

    @classmethod
    def from_dict(cls, content: Mapping[str, object]) -> "EvaluationRecord":
        """Make a record from what a file holds.

        Args:
            content: An object of RUN/evaluations/PROTOCOL.json, also of an older version.

        Returns:
            The record. Keys that are not fields are its metrics.
        """
        names = {f.name for f in fields(cls)} - {"metrics"}
        values = {name: content[name] for name in names & content.keys()}
        metrics = {name: value for name, value in content.items() if name not in names}
        return cls(**values, metrics=metrics)  # type: ignore[arg-type]

    @property
    def identity(self) -> tuple[object, ...]:
        """What two records of the same measurement have in common; the newer replaces the older."""
        return (
            self.protocol,
            self.parameters,
            self.features,
            self.checkpoint,
            self.source,
            self.train,
            self.test,
        )


@rank_zero_only
def save_records(run: Run, protocol: str, records: Sequence[EvaluationRecord]) -> None:
    """Add records to the file of their protocol, in place of older ones of the same measurements.

    Args:
        run: The run whose backbone was measured.
        protocol: The protocol.
        records: Its new records.

    Raises:
        UsageError: If the file holds something else.
        WorkFailed: If it cannot be written.
    """
    name = f"evaluations/{protocol}.json"
    new = [record.to_dict() for record in records]
    identities = [EvaluationRecord.from_dict(content).identity for content in new]
    with file_lock(run.path / "evaluations" / ".lock", wait=True):  # two may end at the same time
        old = [
            content
            for content in run.read_records(name)
            if EvaluationRecord.from_dict(content).identity not in identities
        ]
        run.write(name, old + new)


def print_records(records: Sequence[EvaluationRecord], title: str) -> None:
    """Print accuracies as a table of 80 columns, and records without one as lines below it.

    Args:
        records: The records.
        title: The title of the table.
    """
    console = Console(highlight=False, quiet=rank() != 0)
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False
    )
    for heading in ("protocol", "parameters", "checkpoint", "features"):
        table.add_column(heading, overflow="fold")
    for heading in ("top-1", "top-5", "n", "± or 95 %"):
        table.add_column(heading, justify="right", no_wrap=True)
    accuracies = [record for record in records if "top1" in record.metrics]
    for record in accuracies:
        table.add_row(
            record.protocol,
            record.name,
            record.checkpoint,
            "untrained" if record.features == UNTRAINED_NETWORK else record.features,
            *_format_accuracy(record.metrics),
            style="bold" if record.features in _OF_THE_RUN else None,
        )
    if accuracies:
        console.print(table)
    for record in records:
        if "top1" not in record.metrics:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
            console.print(
                f"{record.protocol}: {record.features} of {record.name} of {record.test} "
                f"at {record.checkpoint}: {numbers}"
            )


def _format_accuracy(metrics: Mapping[str, object]) -> tuple[str, str, str, str]:
    """The columns top-1, top-5, n, and uncertainty."""
    if "interval" in metrics:
        uncertainty = "{:.1f}–{:.1f}".format(*metrics["interval"])  # type: ignore[misc]
    else:
        uncertainty = f"± {metrics['top1_std']:.1f}"
    top5 = "" if metrics["top5"] is None else f"{metrics['top5']:.1f}"
    return f"{metrics['top1']:.1f}", top5, str(metrics["n"]), uncertainty
