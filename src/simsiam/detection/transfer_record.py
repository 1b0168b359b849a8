"""The record of a fine-tuning: RUN/transfers/TASK.json, and the table that is printed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simsiam.detection.metrics import ApRecord
from simsiam.errors import printable
from simsiam.runs.run_folder import Run
from simsiam.utils.files import file_lock

METRIC_LABELS = {"voc_box": "VOC boxes", "coco_box": "COCO boxes", "coco_mask": "COCO masks"}


@dataclass(frozen=True, kw_only=True)
class TransferRecord:
    """A fine-tuned detector: what it was trained on, how, and its metrics on the test images."""

    protocol: str
    task: str  # "detection" or "segmentation"
    source: str  # the name of the annotated source
    train: str  # which images were trained on ...
    test: str  # ... tested on ...
    val: str  # ... and used to select the lr
    classes: Sequence[str]
    train_images: int
    test_images: int
    init: Mapping[str, str]  # the origin of the backbone, and its hash if it was pretrained
    seed: int
    network: str
    precision: str
    processes: int
    parameters: Mapping[str, object]  # the schedule, and the number of epochs
    chosen: Mapping[str, object]  # the lr; if several were tried, their AP on val
    tested_by: str  # the main one of `metrics`
    metrics: Mapping[str, ApRecord]
    n: int  # test images that could be read
    unreadable: int  # images, of training and test together, that could not
    faults: Mapping[str, int]  # of the annotations, by kind
    folder: str  # of this fine-tuning, in RUN/transfers
    picture: str  # relative to RUN/transfers
    asked: Mapping[str, object]  # the arguments of `transfer`
    environment: Mapping[str, object]
    measured: str  # the time, UTC
    training_seconds: float

    def to_dict(self) -> dict[str, object]:
        """Return the record as plain data, exactly as it reads back from JSON."""
        return json.loads(json.dumps(asdict(self)))


def save_record(run: Run, record: TransferRecord) -> None:
    """Write a record into the file of its task, in place of an older one of the same fine-tuning.

    Args:
        run: The run whose backbone was fine-tuned.
        record: The record.
    """
    name = f"transfers/{record.task}.json"
    with file_lock(run.path / "transfers" / ".lock", wait=True):  # two may finish at the same time
        others = [other for other in run.read_records(name) if other.get("folder") != record.folder]
        run.write(name, [*others, record.to_dict()])


def print_record(record: TransferRecord) -> None:
    """Print the metrics of a record as a table of 80 columns.

    Args:
        record: The record.
    """
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("protocol", "from", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("AP50", "AP", "AP75", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for metric, aps in record.metrics.items():
        table.add_row(
            record.protocol,
            escape(printable(record.init["from"])),
            METRIC_LABELS[metric],
            *(f"{value:.1f}" for value in (aps["AP50"], aps["AP"], aps["AP75"])),
            str(record.n),
            style="bold" if metric == record.tested_by else None,
        )
    console = Console(highlight=False)
    console.print(table)
    ap50_of_class = record.metrics[record.tested_by]["AP50_of_class"]
    numbers = ", ".join(f"{name} {value:.1f}" for name, value in list(ap50_of_class.items())[:10])
    more = " ..." if len(ap50_of_class) > 10 else ""
    console.print(f"AP50 of {printable(numbers)}{more}", markup=False)
