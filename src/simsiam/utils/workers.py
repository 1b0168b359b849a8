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

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CORES = max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # the processes of a run share a host
STOPS = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "pthread_sigmask") else set()  # none on Windows


def in_turn(work: Callable[..., Any], jobs: Sequence[tuple]) -> Iterator[Any]:
    """work(*job) of each job, in order, done by all cores; raises WorkFailed if a process is killed.

    Processes, because Pillow parses headers under the GIL. Each reports through a pipe of its own, and ends when nobody
    listens any more. What a user can get wrong is raised here as it was there.
    """
    if len(jobs) < 2:
        return iter([work(*job) for job in jobs])
    context: Any = get_context("fork" if sys.platform == "linux" else None)
    pipes = []
    with unstopped():
        for worker in range(min(CORES, len(jobs))):
            receive, send = context.Pipe(duplex=False)
            pipes.append(receive)
            context.Process(target=_work, args=(work, jobs[worker::CORES], send, pipes), daemon=True).start()
            send.close()

    def results() -> Iterator[Any]:
        try:
            for i in range(len(jobs)):
                found = pipes[i % CORES].recv()
                if isinstance(found, UsageError | WorkFailed):
                    raise found
                yield found
        except EOFError:
            raise WorkFailed("a process that looked at images was killed: perhaps memory ran out; try again") from None
        finally:
            for receive in pipes:
                receive.close()

    return results()


@contextmanager
def unstopped() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: an exception that a signal raises in the middle of a fork would be lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS) if STOPS else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def with_a_bar(work: Callable[..., Any], jobs: Sequence[tuple], words: str) -> list[Any]:
    """work(*job) of each job, done by all cores; on a terminal, a bar shows how far they are."""
    from simsiam.utils.progress_bar import bar

    found = []
    with bar(words, len(jobs)) as advance:
        for one in in_turn(work, jobs):
            found.append(one)
            advance(1)
    return found


def _work(work: Callable[..., Any], jobs: Sequence[tuple], send: Connection, pipes: Sequence[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that listens
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # it has ended; nothing stays half-written
    if STOPS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    for receive in pipes:
        receive.close()  # or this process itself would be a listener
    with suppress(BrokenPipeError):
        for job in jobs:
            try:
                found = work(*job)
            except (UsageError, WorkFailed) as error:
                found = error
            send.send(found)
