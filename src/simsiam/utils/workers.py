"""Work done by all cores, in order."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from simsiam.errors import UsageError, WorkFailed

CPU_CORES = (
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
)


CPU_CORES = max(
    1, CPU_CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
)  # the processes of a run share a host
STOP_SIGNALS = (
    {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "pthread_sigmask") else set()
)  # none on Windows


def parallel_map(function: Callable[..., Any], jobs: Sequence[tuple]) -> Iterator[Any]:
    """work(*job) of each job, in order, done by all cores; raises WorkFailed if a process is killed.

    Processes, because Pillow parses headers under the GIL. Each reports through a pipe of its own, and ends when nobody
    listens any more. What a user can get wrong is raised here as it was there.
    """
    if len(jobs) < 2:
        return iter([function(*job) for job in jobs])
    context: Any = get_context("fork" if sys.platform == "linux" else None)
    pipes = []
    with block_stop_signals():
        for worker in range(min(CPU_CORES, len(jobs))):
            receive, send = context.Pipe(duplex=False)
            pipes.append(receive)
            context.Process(
                target=_worker_loop,
                args=(function, jobs[worker::CPU_CORES], send, pipes),
                daemon=True,
            ).start()
            send.close()

    def results() -> Iterator[Any]:
        try:
            for i in range(len(jobs)):
                found = pipes[i % CPU_CORES].recv()
                if isinstance(found, UsageError | WorkFailed):
                    raise found
                yield found
        except EOFError:
            raise WorkFailed(
                "a process that looked at images was killed: perhaps memory ran out; try again"
            ) from None
        finally:
            for receive in pipes:
                receive.close()

    return results()


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: an exception that a signal raises in the middle of a fork would be lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if STOP_SIGNALS else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parallel_map_with_progress(
    function: Callable[..., Any], jobs: Sequence[tuple], description: str
) -> list[Any]:
    """work(*job) of each job, done by all cores; on a terminal, a bar shows how far they are."""
    from simsiam.utils.progress_bar import progress_bar

    found = []
    with progress_bar(description, len(jobs)) as advance:
        for one in parallel_map(function, jobs):
            found.append(one)
            advance(1)
    return found


def _worker_loop(
    function: Callable[..., Any],
    jobs: Sequence[tuple],
    sender: Connection,
    pipes: Sequence[Connection],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that listens
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # it has ended; nothing stays half-written
    if STOP_SIGNALS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for receive in pipes:
        receive.close()  # or this process itself would be a listener
    with suppress(BrokenPipeError):
        for job in jobs:
            try:
                found = function(*job)
            except (UsageError, WorkFailed) as error:
                found = error
            sender.send(found)
