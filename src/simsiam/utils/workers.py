"""Work on all cores, with results in order."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from simsiam.errors import UsageError, WorkFailed
from simsiam.utils.system import (
    block_stop_signals,
    count_cores,
    process_context,
    unblock_stop_signals,
)

T = TypeVar("T")

# The processes of a run share a host.
CPU_CORES = max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def parallel_map(function: Callable[..., T], jobs: Sequence[tuple[object, ...]]) -> Iterator[T]:
    """Call a function for each job, on all cores.

    Processes do the work rather than threads, because Pillow parses headers under the GIL. Each
    process sends its results through a pipe of its own, and ends when the pipe is closed.

    Args:
        function: A function that can be pickled.
        jobs: The arguments of each call.

    Returns:
        An iterator of results, in the order of the jobs. It raises UsageError or WorkFailed if the
        function does, and WorkFailed if a process is killed.

    Raises:
        UsageError: A script without a guard cannot start processes on this system.
    """
    if len(jobs) < 2:
        return iter([function(*job) for job in jobs])
    context: Any = process_context()
    pipes = []
    with block_stop_signals():
        for worker in range(min(CPU_CORES, len(jobs))):
            receiver, sender = context.Pipe(duplex=False)
            pipes.append(receiver)
            arguments = (function, jobs[worker::CPU_CORES], sender, pipes)
            context.Process(target=_worker_loop, args=arguments, daemon=True).start()
            sender.close()

    def results() -> Iterator[T]:
        try:
            for i in range(len(jobs)):
                result = pipes[i % CPU_CORES].recv()
                if isinstance(result, UsageError | WorkFailed):
                    raise result
                yield result
        except EOFError:
            raise WorkFailed(
                "a process that reads images was killed: perhaps memory ran out; try again"
            ) from None
        finally:
            for receiver in pipes:
                receiver.close()

    return results()


def parallel_map_with_progress(
    function: Callable[..., T], jobs: Sequence[tuple[object, ...]], description: str
) -> list[T]:
    """Call a function for each job, on all cores, and show a progress bar on a terminal.

    Args:
        function: A function that can be pickled.
        jobs: The arguments of each call.
        description: The text before the bar.

    Returns:
        The results, in the order of the jobs.

    Raises:
        UsageError: If the function raises it.
        WorkFailed: If the function raises it, or a process is killed.
    """
    from simsiam.utils.progress_bar import progress_bar

    results = []
    with progress_bar(description, len(jobs)) as advance:
        for result in parallel_map(function, jobs):
            results.append(result)
            advance(1)
    return results


def _worker_loop(
    function: Callable[..., Any],
    jobs: Sequence[tuple[object, ...]],
    sender: Connection,
    pipes: Sequence[Connection],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # from the main process, when it ends
    unblock_stop_signals()
    for receiver in pipes:
        receiver.close()  # while it is open in any process, sending into the pipe succeeds
    with suppress(BrokenPipeError):
        for job in jobs:
            try:
                result = function(*job)
            except (UsageError, WorkFailed) as error:
                result = error
            except OSError as error:
                result = WorkFailed(str(error))
            sender.send(result)
