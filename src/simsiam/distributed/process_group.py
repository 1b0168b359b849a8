"""The processes of one run, as torchrun starts them: rank, share of the work, work for rank zero.

Every process has to call these functions, except `world_size`, `rank`, `under_torchrun` and
`local_slice`. In a single process they do nothing but call what they are given.
"""

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from inspect import isgeneratorfunction
from typing import ParamSpec, TypeVar
from uuid import uuid4

import torch
from torch import distributed

from simsiam.errors import Stopped, UsageError, WorkFailed

P = ParamSpec("P")
T = TypeVar("T")

# True while rank zero works alone in `rank_zero_only`. It is global because whatever that work
# calls, at any depth, has to behave as in a single process: a collective call would wait for ever.
_in_rank_zero_only = False


def world_size() -> int:
    """Return the number of processes; 1 for a single process and inside `rank_zero_only`."""
    if _in_rank_zero_only or not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def rank() -> int:
    """Return this process's number, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def under_torchrun() -> bool:
    """Tell whether torchrun started this process; it may have started the command before."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_slice(n: int) -> slice:
    """Return this process's share of n items.

    Args:
        n: Number of items, which are divided in order.

    Returns:
        A slice of n // N items for N processes; the first n mod N processes get one more.
    """
    size, remainder = divmod(n, world_size())
    start = rank() * size + min(rank(), remainder)
    return slice(start, start + size + (rank() < remainder))


def broadcast(value: T) -> T:
    """Return rank zero's value on every process.

    Args:
        value: A value that can be pickled; only rank zero's is used.

    Returns:
        Rank zero's value.
    """
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def rank_zero_only(function: Callable[P, T]) -> Callable[P, T]:
    """Let rank zero alone call a function; all processes return or raise what it does.

    Args:
        function: A function whose result and exceptions can be pickled.

    Returns:
        The function, to be called by every process.
    """
    assert not isgeneratorfunction(function), f"{function}: a generator cannot be pickled"

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        global _in_rank_zero_only
        if world_size() == 1:
            return function(*args, **kwargs)
        result, error = None, None
        if rank() == 0:
            _in_rank_zero_only = True
            try:
                result = function(*args, **kwargs)
            except Exception as exception:
                error = exception
            finally:
                _in_rank_zero_only = False
        result, error = broadcast((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    return wrapper


@contextmanager
def rank_zero_context(context: AbstractContextManager[object]) -> Iterator[None]:
    """Let rank zero alone enter a context; what entering it raises, every process raises.

    Args:
        context: The context, for example a lock.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        rank_zero_only(lambda: stack.enter_context(context) and None)()
        yield


def distributed_entry_point(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function be called by all processes that torchrun started.

    They join one process group before the first such function runs.

    Args:
        function: The function.

    Returns:
        The function; it raises WorkFailed if another process is lost while it runs. torchrun can
        then start all processes again.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return function(*args, **kwargs)
        try:
            join_process_group()
            result = function(*args, **kwargs)
            distributed.barrier()
            return result
        except (UsageError, WorkFailed, Stopped):
            raise
        except RuntimeError as error:
            message = str(error)
            from_backend = "gloo" in message or "NCCL" in message
            if not isinstance(error, distributed.DistError) and not from_backend:
                raise
            reason = (message.splitlines() or [""])[0][:160]
            raise WorkFailed(
                f"process {os.environ['RANK']} lost the connection to another process, "
                f"or never had one: {reason}"
            ) from None

    return wrapper


def join_process_group() -> None:
    """Join the processes into one group, once; each takes the GPU of its local rank, if any."""
    if distributed.is_initialized():
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    store, process_rank, num_processes = next(iter(distributed.rendezvous("env://")))
    token = rendezvous_token(store, process_rank, num_processes)
    store = distributed.PrefixStore(token, store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=process_rank, world_size=num_processes
    )
    atexit.register(distributed.destroy_process_group)


def rendezvous_token(store: distributed.Store, process_rank: int, num_processes: int) -> str:
    """Agree on a token that these processes share and processes that ran before them do not have.

    torchrun keeps its store when it restarts processes, so that new processes could read the
    addresses of dead ones (pytorch issue 135712). Therefore each process writes a random word of
    its own into the store and waits for an answer under this very word.

    Args:
        store: The store that torchrun provides.
        process_rank: This process's number, from 0.
        num_processes: The number of processes.

    Returns:
        Rank zero's word.
    """
    word = uuid4().hex
    if process_rank > 0:
        store.set(f"simsiam/{process_rank}", word)
        token = store.get(f"simsiam/{word}").decode()
        store.set(f"simsiam/{token}/{process_rank}", "heard")
        return token
    others = range(1, num_processes)
    while not all(store.check([f"simsiam/{word}/{other}"]) for other in others):
        for other in others:
            if store.check([f"simsiam/{other}"]):
                store.set(f"simsiam/{store.get(f'simsiam/{other}').decode()}", word)
        time.sleep(0.01)
    return word
