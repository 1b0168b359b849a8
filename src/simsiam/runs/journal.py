"""The logged numbers of a run: metrics.jsonl and TensorBoard events."""

import errno
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from simsiam.distributed.process_group import rank
from simsiam.errors import WorkFailed
from simsiam.monitoring.verdict import early_warning
from simsiam.runs.run_folder import TrainingFolder


class MetricsLogger:
    """A context in which records are added to metrics.jsonl and to TensorBoard's events.

    Both are cut back to `step` first, so that no step is ever in them twice.

    Args:
        folder: The folder of the training.
        step: The last step that is kept.
        warn: Whether to warn of outputs that become alike; those of a classifier may be.

    Attributes:
        folder: The folder of the training.
        step: The step of the latest record.
        lines: All records of metrics.jsonl.
    """

    def __init__(self, folder: TrainingFolder, step: int, *, warn: bool = True):
        self.folder, self.step, self.warn = folder, step, warn
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

    def log(self, record: Mapping[str, float | None]) -> str | None:
        """Add a record, and to it a warning where the run begins badly.

        Args:
            record: Numbers by name, with `step`. NaN and infinity become null: JSON has neither.

        Returns:
            The warning, or None.

        Raises:
            WorkFailed: It cannot be written.
        """
        line: dict[str, Any] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self.lines.append(line)
        self.step = int(line["step"])
        warning = early_warning(self.lines) if self.warn else None
        if warning is not None:
            line["warning"] = warning
        if rank() != 0:
            return None
        data = (json.dumps(line) + "\n").encode()
        try:
            if self.file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, value in line.items():
                if name not in ("step", "warning") and value is not None:
                    self.tensorboard.add_scalar(name, value, self.step)
        except OSError as error:  # a line that is cut short is removed when the run continues
            reason = error.strerror or error
            raise WorkFailed(
                f"cannot write metrics.jsonl or tensorboard/ in {self.folder.path}: {reason}; "
                "`simsiam resume` continues the run"
            ) from error
        return warning

    def __exit__(self, *error: object) -> None:
        if rank() == 0:
            self.file.close()
            self.tensorboard.close()
