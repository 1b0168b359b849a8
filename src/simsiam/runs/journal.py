"""The logged numbers of a run: metrics.jsonl, and the loggers that show them elsewhere."""

import json
import math
from collections.abc import Mapping
from typing import Any

from simsiam.config.recipes import Recipe
from simsiam.distributed.process_group import rank
from simsiam.errors import Stopped, WorkFailed
from simsiam.monitoring.verdict import early_warning
from simsiam.runs.loggers.background import BackgroundLoggers
from simsiam.runs.loggers.choice import LoggerChoice
from simsiam.runs.loggers.loggers import LoggedRun, Status
from simsiam.runs.records import Record
from simsiam.runs.run_folder import TrainingFolder
from simsiam.utils.checksums import seal
from simsiam.utils.files import append_bytes
from simsiam.utils.system import open_own


class MetricsLogger:
    """A context in which records are added to metrics.jsonl and given to loggers.

    metrics.jsonl is cut back to `step` first, so that no step is ever in it twice. An error in a
    logger is said once and changes nothing else; one in writing metrics.jsonl ends the run.

    Args:
        folder: The folder of the training.
        step: The last step that is kept.
        warn: Whether to warn of outputs that become alike; those of a classifier may be.
        choice: The loggers.
        recipe: The recipe, for the loggers.

    Attributes:
        folder: The folder of the training.
        step: The step of the latest record.
        lines: All records of metrics.jsonl.
        summary: What summary.json holds, for the loggers.
    """

    def __init__(
        self,
        folder: TrainingFolder,
        step: int,
        *,
        warn: bool = True,
        choice: LoggerChoice | None = None,
        recipe: Recipe | None = None,
    ):
        self.folder, self.step, self.warn = folder, step, warn
        self.choice, self.recipe = choice or LoggerChoice(), recipe
        self.lines = [record for record in folder.metrics() if record["step"] <= step]
        self.summary: Record = {}

    def __enter__(self) -> "MetricsLogger":
        lines = "".join(json.dumps(seal(record)) + "\n" for record in self.lines)
        self.folder.write("metrics.jsonl", lines)
        if rank() == 0:
            path = self.folder.path.absolute()
            self.file = open_own(path / "metrics.jsonl", "ab")
            settings = {} if self.recipe is None else self.recipe.to_dict()
            logged_run = LoggedRun(path, self.step, self.choice.id, settings)
            self.loggers = BackgroundLoggers(self.choice.names, logged_run)
            for line in self.lines:
                self.loggers.log(line)
        return self

    def log(self, record: Mapping[str, float | None]) -> str | None:
        """Add a record, and to it a warning where the run begins badly.

        Args:
            record: Numbers by name, with `step`. NaN and infinity become null: JSON has neither.

        Returns:
            The warning, or None.

        Raises:
            WorkFailed: It cannot be written to metrics.jsonl.
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
        try:
            append_bytes(self.file, (json.dumps(seal(line)) + "\n").encode())
        except OSError as error:  # a line that is cut short is removed when the run continues
            reason = error.strerror or error
            raise WorkFailed(
                f"cannot write metrics.jsonl in {self.folder.path}: {reason}; "
                "`simsiam resume` continues the run"
            ) from error
        self.loggers.log(line)
        return warning

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if rank() == 0:
            self.file.close()
            status: Status = "finished" if kind is None else "failed"
            if kind is not None and issubclass(kind, Stopped | KeyboardInterrupt):
                status = "stopped"
            self.loggers.close(self.summary, status)
