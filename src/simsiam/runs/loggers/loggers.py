"""The loggers: each shows the lines of metrics.jsonl in another program.

A logger gets the lines, the recipe and the summary of a run, and nothing else. On `open` it says
which lines it has already, so that a run that is resumed continues one curve. It may raise
anything: `BackgroundLogger` calls it. Its package is imported where it is opened.
"""

import io
import logging
import os
import shlex
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from typing_extensions import override

from simsiam.runs.records import MetricsRecord, Record
from simsiam.utils.files import append_bytes, make_folder
from simsiam.utils.names import hide_keys, without_credentials
from simsiam.utils.read_files import open_regular
from simsiam.utils.system import check_no_link, open_own

Status: TypeAlias = Literal["finished", "stopped", "failed"]  # how a run ended
PROJECT = "simsiam"  # the project of W&B and the experiment of MLflow, where the user names none
WANDB_INIT_SECONDS, WANDB_FINISH_SECONDS = 20.0, 20.0
MLFLOW_MAX_METRICS = 1000  # in one request


@dataclass(frozen=True)
class LoggedRun:
    """What loggers know of a run.

    Attributes:
        path: The run folder, absolute.
        step: The last step that metrics.jsonl keeps.
        id: A random name of the run, the same after it is resumed.
        recipe: The recipe, as plain data.
    """

    path: Path
    step: int
    id: str
    recipe: Record


class Logger(ABC):
    """Another place where the numbers of a run go.

    Args:
        run: The run.
    """

    def __init__(self, run: LoggedRun):
        self.run = run

    @abstractmethod
    def open(self) -> tuple[int, str]:
        """Begin, or continue what was logged of this run before.

        Returns:
            The last step that is already logged, or -1, and a line for the user or "".
        """

    @abstractmethod
    def log(self, records: Sequence[MetricsRecord]) -> None:
        """Add lines of metrics.jsonl, in the order of their steps.

        Args:
            records: The lines.
        """

    @abstractmethod
    def close(self, summary: Record, status: Status) -> None:
        """Add the summary and end.

        Args:
            summary: What summary.json holds; empty if there is none.
            status: How the run ended.
        """


class TensorBoardLogger(Logger):
    """Writes event files into the folder tensorboard/ of a run.

    TensorBoard's own writer has a thread whose errors are printed as tracebacks, so only its format
    is used.
    """

    @override
    def open(self) -> tuple[int, str]:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder = self.run.path / "tensorboard"
        make_folder(folder)
        paths = [*folder.glob("events.out.tfevents.*")]
        for path in paths:
            open_regular(path).close()  # the loader would wait for a pipe
        steps = (
            event.step
            for path in paths
            for event in LegacyEventFileLoader(str(path)).Load()
            if event.HasField("summary")
        )
        last_step = min(max(steps, default=-1), self.run.step)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.file = open_own(folder / name, "xb")
        start = SessionLog(status=SessionLog.START)  # hides what other files have from its step on
        self._write(
            Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString(),
            Event(wall_time=time.time(), step=last_step + 1, session_log=start).SerializeToString(),
        )
        return last_step, ""

    @override
    def log(self, records: Sequence[MetricsRecord]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        events = []
        for record in records:
            values = [Summary.Value(tag=k, simple_value=v) for k, v in metrics(record).items()]
            step, summary = int(record["step"]), Summary(value=values)
            event = Event(wall_time=time.time(), step=step, summary=summary)
            events.append(event.SerializeToString())
        self._write(*events)

    def _write(self, *events: bytes) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        writer = RecordWriter(buffer)
        for event in events:
            writer.write(event)
        append_bytes(self.file, buffer.getvalue())

    @override
    def close(self, summary: Record, status: Status) -> None:
        self.file.close()


class WandbLogger(Logger):
    """Sends to Weights & Biases; without an API key, writes an offline run into the run folder."""

    @override
    def open(self) -> tuple[int, str]:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        folder = self.run.path / "wandb"
        # The links in it are of wandb, which replaces them and makes a new folder for each run.
        if os.path.lexists(folder):
            check_no_link(folder, os.lstat(folder))
        settings = wandb.setup(wandb.Settings(silent=True)).settings
        offline = settings.mode in ("offline", "dryrun")
        if settings.mode in ("online", "run"):
            offline = not wandb.login(prompt=False, verify=False)
        # An offline run cannot be continued. A new one has the whole curve, and takes the place of
        # the old one when it is sent.
        self.wandb_run = wandb.init(
            project=settings.project or PROJECT,
            id=self.run.id,
            name=settings.run_name or self.run.path.name,
            dir=str(self.run.path),
            config=without_credentials(self.run.recipe),
            allow_val_change=True,
            mode="offline" if offline else None,
            resume=None if offline else "allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                host="",
                save_code=False,
                symlink=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                init_timeout=WANDB_INIT_SECONDS,
                finish_timeout=WANDB_FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        folder, own = self.run.path / "wandb", Path(self.wandb_run.dir).parent
        for other in folder.glob(f"offline-run-*-{self.run.id}*"):
            if own.parent == folder and own != other:
                shutil.rmtree(other, ignore_errors=True)
        note = self.wandb_run.url or ""
        if offline:
            note = f"offline; `wandb sync {shlex.quote(str(folder))}` sends it"
        return self.wandb_run.starting_step - 1, note

    @override
    def log(self, records: Sequence[MetricsRecord]) -> None:
        for record in records:
            self.wandb_run.log(metrics(record), step=int(record["step"]), commit=True)

    @override
    def close(self, summary: Record, status: Status) -> None:
        self.wandb_run.summary.update(summary_values(summary))
        self.wandb_run.finish(exit_code=0 if status == "finished" else 1)


class MlflowLogger(Logger):
    """Sends to the server in MLFLOW_TRACKING_URI; without it, writes mlflow.db in the run folder.

    MLflow has stopped developing its file store, so the local store is SQLite.
    """

    @override
    def open(self) -> tuple[int, str]:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        if mlflow.is_tracking_uri_set():
            uri = mlflow.get_tracking_uri()
            artifacts, note = None, hide_keys(uri)
        else:
            import alembic  # noqa: F401  MLflow needs both for SQLite, and hides that they are missing
            import sqlalchemy  # noqa: F401

            logging.getLogger("mlflow.store.db").setLevel(logging.ERROR)
            path = str(self.run.path / "mlflow.db").replace("%", "%25").replace("?", "%3F")
            uri, artifacts = f"sqlite:///{path}", (self.run.path / "mlflow").as_uri()
            note = f"`mlflow ui --backend-store-uri {shlex.quote(uri)}` shows it"
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if self.client.get_experiment_by_name(name) is None:
            with suppress(mlflow.MlflowException):  # another run may create it at the same time
                self.client.create_experiment(name, artifact_location=artifacts)
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else ""
        tag = "simsiam.id"
        found = self.client.search_runs([experiment_id], f"tags.`{tag}` = '{self.run.id}'")
        if found:
            self.run_id = found[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            history = self.client.get_metric_history(self.run_id, "epoch")
            return max((metric.step for metric in history), default=-1), note
        tags = {tag: self.run.id}
        created = self.client.create_run(experiment_id, run_name=self.run.path.name, tags=tags)
        self.run_id = created.info.run_id
        params = [
            mlflow.entities.Param(k, str(v))
            for k, v in flatten(without_credentials(self.run.recipe))
        ]
        self.client.log_batch(self.run_id, params=params, synchronous=True)
        return -1, note

    @override
    def log(self, records: Sequence[MetricsRecord]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [
            Metric(name, value, now, int(record["step"]))
            for record in records
            for name, value in metrics(record).items()
        ]
        for i in range(0, len(values), MLFLOW_MAX_METRICS):
            batch = values[i : i + MLFLOW_MAX_METRICS]
            self.client.log_batch(self.run_id, metrics=batch, synchronous=True)

    @override
    def close(self, summary: Record, status: Status) -> None:
        from mlflow.entities import RunTag

        values = summary_values(summary)
        self.log([{"step": summary.get("steps", 0)} | values])
        tags = [RunTag(k, v) for k, v in values.items() if isinstance(v, str)]
        self.client.log_batch(self.run_id, tags=tags, synchronous=True)
        statuses = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.run_id, statuses[status])


LOGGERS: dict[str, Callable[[LoggedRun], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


def metrics(record: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl, without the step.

    Args:
        record: The line. Its texts and missing numbers are left out.
    """
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}


def flatten(content: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of nested dictionaries, with names such as "method/dim".

    Args:
        content: The dictionary.
        prefix: What its names begin with.
    """
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def summary_values(summary: Record) -> dict[str, str | float]:
    """Return the texts and numbers of summary.json, with names such as "summary/knn_top1/best".

    Args:
        summary: The summary. Its tables are left out.
    """
    items = flatten(summary, "summary/")
    return {name: value for name, value in items if isinstance(value, str | int | float)}
