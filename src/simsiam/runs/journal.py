"""The logged numbers of a run: metrics.jsonl and TensorBoard events."""

import errno
import json
import math
import os
from collections.abc import Mapping
from typing import cast

from simsiam.distributed.process_group import rank
from simsiam.errors import WorkFailed
from simsiam.runs.records import MetricsRecord
from simsiam.runs.run_folder import TrainingFolder


class MetricsLogger:
    """A context in which records are added to metrics.jsonl and to TensorBoard's events.

    Both are cut back to `step` first, so that no step is ever in them twice.

    Args:
        folder: The folder of the training.
        step: The last step that is kept.

    Attributes:
        folder: The folder of the training.
        step: The step of the latest record.
        lines: All records of metrics.jsonl.
    """

    def __init__(self, folder: TrainingFolder, step: int):
        self.folder, self.step = folder, step
        self.lines = [record for record in folder.metrics() if record["step"] <= step]

    def __enter__(self) -> "MetricsLogger":
        # TensorBoard is slow to import, and only training needs it.
        from torch.utils.tensorboard import SummaryWriter

        lines = "".join(json.dumps(record) + "\n" for record in self.lines)
        self.folder.write("metrics.jsonl", lines)
        if rank() == 0:
            path = self.folder.path
            self.file = open(path / "metrics.jsonl", "ab", buffering=0)
            self.tensorboard = SummaryWriter(str(path / "tensorboard"), purge_step=self.step + 1)
        return self

    def log(self, record: Mapping[str, float | None]) -> None:
        """Add a record.

        Args:
            record: Numbers by name, with `step`. NaN and infinity become null: JSON has neither.

        Raises:
            WorkFailed: It cannot be written.
        """
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self.lines.append(cast(MetricsRecord, line))
        self.step = int(self.lines[-1]["step"])
        if rank() != 0:
            return
        data = (json.dumps(line) + "\n").encode()
        try:
            if self.file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.tensorboard.add_scalar(name, value, self.step)
        except OSError as error:  # a line that is cut short is removed when the run continues
            reason = error.strerror or error
            raise WorkFailed(
                f"cannot write metrics.jsonl or tensorboard/ in {self.folder.path}: {reason}; "
                "`simsiam resume` continues the run"
            ) from error

    def __exit__(self, *error: object) -> None:
        if rank() == 0:
            self.file.close()
            self.tensorboard.close()
