"""The processes of one run, as torchrun starts them: this one's rank, its share, and work for rank zero alone."""

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

import torch
from torch import distributed

from simsiam.errors import Stopped, UsageError, WorkFailed

P = ParamSpec("P")


T = TypeVar("T")


_in_rank_zero_only = False  # while the first process does what the others are told of


def world_size() -> int:
    """How many processes there are; 1 where nobody started several."""
    together = (
        not _in_rank_zero_only and distributed.is_available() and distributed.is_initialized()
    )
    return distributed.get_world_size() if together else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def local_slice(n: int) -> slice:
    """This process's part of n things in order; the first ones take one more where n cannot be divided."""
    each, more = divmod(n, world_size())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))


def broadcast(value: T) -> T:
    """The first process's thing."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def rank_zero_only(function: Callable[P, T]) -> Callable[P, T]:
    """f is done by the first process alone: what it returns or raises, all return or raise."""

    @wraps(function)
    def done(*given: P.args, **named: P.kwargs) -> T:
        global _in_rank_zero_only
        if world_size() == 1:
            return function(*given, **named)
        result, failed = None, None
        if rank() == 0:
            _in_rank_zero_only = True
            try:
                result = function(*given, **named)
            except Exception as error:
                failed = error
            finally:
                _in_rank_zero_only = False
        result, failed = broadcast((result, failed))
        if failed is not None:
            raise failed
        return result  # type: ignore[return-value]

    return done


@contextmanager
def rank_zero_context(context: AbstractContextManager[Any]) -> Iterator[None]:
    """A context that the first process enters for all: what entering it raises, all raise."""
    with ExitStack() as stack:
        rank_zero_only(lambda: stack.enter_context(context) and None)()
        yield


def distributed_entry_point(function: Callable[P, T]) -> Callable[P, T]:
    """f is done by all processes that torchrun started: they find each other before the first such f.

    Raises WorkFailed where another process is lost on the way: torchrun may then start all of them again.
    """

    @wraps(function)
    def done(*given: P.args, **named: P.kwargs) -> T:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return function(*given, **named)
        try:
            join_process_group()
            result = function(*given, **named)
            distributed.barrier()
            return result
        except (UsageError, WorkFailed, Stopped):
            raise
        except RuntimeError as error:
            if not isinstance(error, distributed.DistError) and not any(
                w in str(error) for w in ("gloo", "NCCL")
            ):
                raise
            reason = (str(error).splitlines() or [""])[0][:160]
            raise WorkFailed(
                f"process {os.environ['RANK']} lost another one, or never found it: {reason}"
            ) from None

    return done


def join_process_group() -> None:
    """Find the other processes, once; on a host with GPUs each takes the one of its local rank."""
    if distributed.is_initialized():
        return
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    store, number, processes = next(iter(distributed.rendezvous("env://")))
    apart = distributed.PrefixStore(rendezvous_token(store, number, processes), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=apart, rank=number, world_size=processes)
    atexit.register(distributed.destroy_process_group)


def rendezvous_token(store: Any, process_rank: int, num_processes: int) -> str:
    """A word that all of these processes know, and none that ran before them.

    torchrun keeps its store when it starts processes anew, and they would take the addresses of the dead for those of
    the living (pytorch issue 135712). So each leaves a word in the store, and waits for the answer to this very word.
    """
    word = uuid4().hex
    if process_rank > 0:
        store.set(f"simsiam/{process_rank}", word)
        answer = store.get(f"simsiam/{word}").decode()
        store.set(f"simsiam/{answer}/{process_rank}", "heard")
        return answer
    others = range(1, num_processes)
    while not all(store.check([f"simsiam/{word}/{other}"]) for other in others):
        for other in others:
            if store.check([f"simsiam/{other}"]):
                store.set(f"simsiam/{store.get(f'simsiam/{other}').decode()}", word)
        time.sleep(0.01)
    return word
