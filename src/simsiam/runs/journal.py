"""metrics.jsonl and TensorBoard events of a run."""

import errno
import json
import math
import os
from typing import Any

from simsiam.distributed.process_group import rank
from simsiam.errors import WorkFailed
from simsiam.runs.run_folder import TrainingFolder


class MetricsLogger:
    """metrics.jsonl and TensorBoard, both cut back to `step` first, so that no step is ever in them twice."""

    def __init__(self, folder: TrainingFolder, step: int):
        self.folder, self.step = folder, step
        self.lines = [line for line in folder.metrics() if line["step"] <= step]

    def __enter__(self) -> "MetricsLogger":
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # slow to import, and only training needs it

        self.folder.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        if rank() == 0:
            self.file = open(self.folder.path / "metrics.jsonl", "ab", buffering=0)
            self.tensorboard = SummaryWriter(
                str(self.folder.path / "tensorboard"), purge_step=self.step + 1
            )
        return self

    def log(self, line: dict[str, Any]) -> None:
        """Add a line; it has a `step`."""
        self.step = line["step"]
        line = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
        }  # strict JSON
        self.lines.append(line)
        if rank() != 0:
            return
        data = (json.dumps(line) + "\n").encode()
        try:
            if self.file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.tensorboard.add_scalar(name, value, self.step)
        except OSError as error:  # a torn line is cut off again when the run goes on
            where = f"metrics.jsonl or tensorboard/ in {self.folder.path}"
            raise WorkFailed(
                f"cannot write {where}: {error.strerror or error}; `simsiam resume` goes on"
            ) from error

    def __exit__(self, *error: object) -> None:
        if rank() == 0:
            self.file.close()
            self.tensorboard.close()
