"""One line that says how a run is doing: a live bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from simsiam.distributed.process_group import rank
from simsiam.errors import shown


class Line:
    """Epochs, time left, images/s, share of time spent waiting for data, loss, z std times sqrt d, views that find each
    other, and the last kNN: 80 columns.
    """

    def __init__(self, start: int, steps: int, per_epoch: int):
        self.start, self.steps, self.per_epoch = start, steps, per_epoch
        self.clock, self.spoken = time.monotonic(), start
        self.values: dict[str, Any] = {}
        self.console = Console(stderr=True, highlight=False, quiet=rank() != 0)
        self.live = Progress(
            TextColumn("{task.fields[epochs]}"), BarColumn(5), TextColumn("{task.fields[words]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.live.add_task("", total=steps, completed=start, epochs="", words="starting")

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """Say where the run is; values not given keep what was said last."""
        self.values |= {k: v for k, v in values.items() if v is not None}
        left = (time.monotonic() - self.clock) / max(1, step - self.start) * (self.steps - step)
        epochs = f"{step / self.per_epoch:.4g}/{self.steps / self.per_epoch:.4g}"
        words = f"{int(left // 60)}:{int(left % 60):02d} left " + " ".join(
            form.format(self.values[name])
            for name, form in {
                "images_per_second": "{:.0f}/s",
                "data_wait": "wait {:.0%}",
                "loss": "loss {:.2f}",
                "z_std_sqrt_d": "std {:.2f}",
                "view_retrieval": "views {:.0f}%",
                "knn_top1": "kNN {:.1f}",
                "val_top1": "val {:.1f}",
            }.items()
            if name in self.values
        )
        self.live.update(self.task, completed=step, epochs=epochs, words=words)
        if not self.console.is_terminal and (step - self.spoken >= self.steps / 10 or step == self.steps):
            self.spoken = step
            self.console.print(f"epoch {epochs} {words}", soft_wrap=True)

    def say(self, text: str) -> None:
        """A line that stays above the bar."""
        self.console.print(shown(text), soft_wrap=True, markup=False)

    def __enter__(self) -> "Line":
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()


def told(word: str, lines: Sequence[str]) -> list[str]:
    """Lines that say one thing, its name before the first."""
    return [f"{word if i == 0 else '':<8} {line}" for i, line in enumerate(lines)]


class Stopwatch:
    """Training time: seconds, images and waiting, without what `paused` spends on measurements and checkpoints."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.images, self.waited = seconds, 0, 0.0
        self.saved, self.since = time.monotonic(), time.monotonic()
        self.mark = (seconds, 0, 0.0)

    def count(self, images: int, waited: float) -> None:
        """One step is done."""
        clock = time.monotonic()
        self.seconds += clock - self.since
        self.since, self.images, self.waited = clock, self.images + images, self.waited + waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield
        self.since = time.monotonic()

    def rates(self) -> dict[str, float]:
        """Images (not views) per second and the share of time spent waiting for data, since the last call."""
        (seconds, images, waited), self.mark = self.mark, (self.seconds, self.images, self.waited)
        elapsed = max(self.seconds - seconds, 1e-9)
        return {"images_per_second": (self.images - images) / elapsed, "data_wait": (self.waited - waited) / elapsed}

    def stale(self, seconds: float) -> bool:
        """True, and the count starts again, if so many seconds have passed since it last was true.

        Of several processes the first one's clock counts.
        """
        if rank() != 0 or time.monotonic() - self.saved < seconds:
            return False
        self.saved = time.monotonic()
        return True
