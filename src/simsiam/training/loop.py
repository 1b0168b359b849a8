"""The training loop: pretraining, fine-tuning, detection and linear evaluation on crops run in it.

A `Training` says what one step is, what is measured and where its state goes. The loop does what
they have in common: progress, signals, checks that the loss is finite, logging, and checkpoints, in
agreement across all processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from simsiam.distributed.collectives import all_gather_objects, all_reduce_max
from simsiam.distributed.process_group import rank_zero_only
from simsiam.distributed.sync_batch_norm import synchronize_replicas
from simsiam.errors import Stopped, UsageError, printable, say_once
from simsiam.monitoring.gauges import all_finite
from simsiam.runs.records import Record, SavedTraining
from simsiam.runs.run_folder import TrainingFolder, read_checkpoint
from simsiam.training.progress import ProgressLine, Stopwatch
from simsiam.utils.files import atomic_write, make_folder
from simsiam.utils.interrupt import InterruptHandler
from simsiam.utils.typed_json import check_type

Metrics: TypeAlias = Mapping[str, float | None]  # named numbers; None where there is none yet
SkippedFiles: TypeAlias = Sequence[tuple[str, str]]  # key and reason of unreadable files


class Batch(Protocol):
    """What the loop reads of a batch."""

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Key and reason of each unreadable file that another image replaced."""

    @property
    def wait(self) -> float:
        """Seconds that the loop waited for the batch."""


B = TypeVar("B", bound=Batch)


class Training(ABC, Generic[B]):
    """One training, as the loop sees it.

    Attributes:
        model: The module that is trained; all processes hold the same weights.
        steps: Number of optimizer steps of the whole training.
        steps_per_epoch: Number of optimizer steps in one pass over the images.
        batch_size: Images in a batch of all processes together.
        log_every: Steps between two logged records.
        measure_every: Steps between two measurements; 0 for none.
        keep_every: Steps between two checkpoints that are kept; 0 for none.
        save_seconds: Seconds between two checkpoints to resume from.
        step: Steps done so far. The loop advances it.
        seconds: Training time so far, without measurements and checkpoints. The loop advances it.
    """

    model: nn.Module
    steps: int
    steps_per_epoch: int
    batch_size: int
    log_every: int
    measure_every: int = 0
    keep_every: int = 0
    save_seconds: float = 60.0
    step: int = 0
    seconds: float = 0.0

    def begin(self) -> None:
        """Do what comes before the first batch."""

    @abstractmethod
    def batches(self) -> Iterator[B]:
        """Yield the batches of the remaining steps."""

    @abstractmethod
    def train_step(self, batch: B) -> Tensor:
        """Take one optimizer step and return its loss, a scalar."""

    @abstractmethod
    def metrics(self) -> Metrics:
        """Return named numbers of the latest step."""

    def measure(self) -> Metrics:
        """Return named measurements of the model as it is now."""
        return {}

    def observe(self) -> None:
        """Do what comes after every step and does not count as training time."""

    def log(self, record: Metrics) -> str | None:
        """Keep a record: `step`, `epoch`, and what `metrics` and `measure` returned.

        Returns:
            A warning to print, or None.
        """
        return None

    def save(self, name: str) -> None:
        """Save the state under a name: "last" to resume from, "epoch-NNNN" to keep."""

    def record_unreadable(self, files: SkippedFiles) -> None:
        """Keep key and reason of files that could not be read."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        step: The last step that was taken.
        steps: The number of steps that were planned.
        last_finite_step: The last step at which loss and weights were known to be finite.
        diverged: Whether loss or weights stopped being finite.
        signum: The signal that asked the training to stop, or 0.
        interrupt: The handler that received it.
    """

    step: int
    steps: int
    last_finite_step: int
    diverged: bool
    signum: int
    interrupt: InterruptHandler

    def raise_if_stopped(self, hint: str) -> None:
        """Raise Stopped if a signal ended the training early; raise a later signal again.

        Args:
            hint: What the user can do now, as the end of the message.
        """
        if self.signum and self.step < self.steps:
            raise Stopped(f"stopped at step {self.step} of {self.steps}, {hint}", self.signum)
        self.interrupt.raise_pending()


def run_training(training: Training[B], messages: Sequence[str] = ()) -> Outcome:
    """Train to the last step, or until a signal arrives or the loss diverges.

    Args:
        training: What to train.
        messages: Lines to print above the progress line.

    Returns:
        How the training ended. The caller turns it into an error where it is one.
    """
    steps, per_epoch = training.steps, training.steps_per_epoch
    last_finite_step, signum, diverged = training.step, 0, False
    with ProgressLine(training.step, steps, per_epoch) as line, InterruptHandler() as interrupt:
        for message in messages:
            line.print_line(message)
        training.begin()
        watch = Stopwatch(training.seconds)
        for batch in training.batches():
            loss = training.train_step(batch)
            training.step = step = training.step + 1

            # What one process meets (a signal, an unreadable file) all act on at the same step.
            signum, save_due, unreadable = all_reduce_max(
                interrupt.signum, watch.save_due(training.save_seconds), len(batch.skipped)
            )
            last = step == steps
            logged = last or step == 1 or step % training.log_every == 0
            measured = bool(training.measure_every) and (last or step % training.measure_every == 0)
            kept = bool(training.keep_every) and step % training.keep_every == 0
            saved = last or kept or bool(signum) or bool(save_due)
            if logged or measured or saved:
                if not all_finite(loss, training.model if measured or saved else None):
                    diverged = True
                    break
                last_finite_step = step
            watch.record_step(training.batch_size, batch.wait)
            training.seconds = watch.seconds
            with watch.paused():
                if unreadable:
                    training.record_unreadable(all_gather_objects(batch.skipped))
                record: dict[str, float | None] = {}
                if logged:
                    record |= {**training.metrics(), **watch.rates()}
                if measured or saved:
                    synchronize_replicas(training.model)
                if measured:
                    record |= training.measure()
                if record:
                    place = {"step": step, "epoch": round(step / per_epoch, 4)}
                    if warning := training.log(place | record):
                        line.print_line(f"warning  {warning}")
                line.update(step, record)
                training.observe()
                if kept:
                    training.save(f"epoch-{step // per_epoch:04d}")
                if saved:
                    training.save("last")
            if signum:
                break
    return Outcome(training.step, steps, last_finite_step, diverged, signum, interrupt)


@rank_zero_only
def load_state(
    folder: Path, settings: Mapping[str, object], initial: Mapping[str, object]
) -> Record:
    """Load the state of an unfinished training from FOLDER/last.pt, or start a new one.

    Args:
        folder: The folder of the training; it is made if it is missing.
        settings: What determines the training; a saved state must have the same.
        initial: The state to start from where nothing is saved.

    Returns:
        The saved state, or a copy of `initial`.

    Raises:
        UsageError: If the folder holds a training with other settings, or a damaged file.
    """
    path = folder / "last.pt"
    make_folder(folder)
    if not path.exists():
        return dict(initial)
    try:
        state = check_type(read_checkpoint(path), SavedTraining, printable(str(path)))
    except UsageError as error:
        raise UsageError(f"{error}: delete it to start the training again") from None
    for line in TrainingFolder(folder).missing_metrics(state):
        say_once(line)
    for name, value in settings.items():
        if (saved := state["settings"].get(name)) != value:
            raise UsageError(
                f"{folder} holds a training with {name} {saved}, not {value}: choose another "
                "folder, or delete it"
            )
    return cast(Record, state)


@rank_zero_only
def save_state(folder: Path, settings: Mapping[str, object], state: Mapping[str, object]) -> None:
    """Save the state of a training as FOLDER/last.pt, for `load_state`.

    Args:
        folder: The folder of the training.
        settings: What determines the training.
        state: What it needs to continue.

    Raises:
        WorkFailed: If the file cannot be written; the one before is kept.
    """
    metrics = {"metrics": TrainingFolder(folder).sync_metrics()}
    with atomic_write(folder / "last.pt") as part, open(part, "wb") as file:
        torch.save({"settings": dict(settings)} | dict(state) | metrics, file)
