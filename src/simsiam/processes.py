"""The processes of one run, as torchrun starts them: which is this one, what is its share, and what all of them know.

PyTorch does the work: gloo carries what lies on a CPU, NCCL what lies on a GPU, DistributedDataParallel the gradients.
A batch is dealt in order: the shares, in order of rank, are the batch of one process. All functions but `rank`, `count`
and `share` are calls that every process has to make; for a process that is alone they do nothing.
"""

import atexit
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from simsiam.errors import Stopped, UsageError, WorkFailed

P = ParamSpec("P")
T = TypeVar("T")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # a number's bytes as a whole number

_alone = False  # while the first process does what the others are told of


def count() -> int:
    """How many processes there are; 1 where nobody started several."""
    together = not _alone and distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def share(n: int) -> slice:
    """This process's part of n things in order; the first ones take one more where n cannot be divided."""
    each, more = divmod(n, count())
    start = rank() * each + min(rank(), more)
    return slice(start, start + each + (rank() < more))


# --- what all of them know --------------------------------------------------------------------------------------------


def most(*numbers: int) -> list[int]:
    """The largest that any process gave, of each number."""
    if count() == 1:
        return list(numbers)
    found = torch.tensor([int(number) for number in numbers])
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.tolist()


def union(things: Sequence[T]) -> list[T]:
    """The things of all processes, in order of rank."""
    if count() == 1:
        return list(things)
    every: list[Any] = [None] * count()
    distributed.all_gather_object(every, list(things))
    return [thing for some in every for thing in some]


def broadcast(thing: T) -> T:
    """The first process's thing."""
    if count() == 1:
        return thing
    box = [thing]
    distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def by_first(f: Callable[P, T]) -> Callable[P, T]:
    """f is done by the first process alone: what it returns or raises, all return or raise."""

    @wraps(f)
    def done(*given: P.args, **named: P.kwargs) -> T:
        global _alone
        if count() == 1:
            return f(*given, **named)
        result, failed = None, None
        if rank() == 0:
            _alone = True
            try:
                result = f(*given, **named)
            except Exception as error:
                failed = error
            finally:
                _alone = False
        result, failed = broadcast((result, failed))
        if failed is not None:
            raise failed
        return result  # type: ignore[return-value]

    return done


@contextmanager
def held(context: AbstractContextManager[Any]) -> Iterator[None]:
    """A context that the first process enters for all: what entering it raises, all raise."""
    with ExitStack() as stack:
        by_first(lambda: stack.enter_context(context) and None)()
        yield


def alike(state: Mapping[str, Tensor]) -> None:
    """Raises WorkFailed where a tensor is not the same, to the bit, on every process."""
    if count() == 1:
        return
    sums = [v.detach().view(BITS[v.element_size()]).sum(dtype=torch.int64) for v in state.values()]
    every = gather(torch.stack(sums).cpu()[None])
    if differ := [name for name, column in zip(state, every.T) if (column != column[0]).any()]:
        raise WorkFailed(f"the processes have come apart: {', '.join(differ[:3])} of {len(differ)} are not alike")


# --- tensors ----------------------------------------------------------------------------------------------------------


def sizes(n: int) -> list[int]:
    """Every process's n, in order of rank."""
    if count() == 1:
        return [n]
    every = torch.empty(count(), dtype=torch.int64)
    distributed.all_gather_into_tensor(every, torch.tensor([n]))
    return every.tolist()


def rows(n: int) -> slice:
    """Where this process's n rows are among those of all."""
    start = sum(sizes(n)[: rank()])
    return slice(start, start + n)


def gather(x: Tensor) -> Tensor:
    """The x (n, ...) of all processes in order of rank, whatever each one's n; gradients flow back to each."""
    if count() == 1:
        return x
    return _Gather.apply(x, sizes(len(x)))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, each: list[int]) -> Tensor:
        start = sum(each[: rank()])
        ctx.mine = slice(start, start + len(x))
        padded = x.new_zeros(max(each), *x.shape[1:])  # collectives take equal parts
        padded[: len(x)] = x
        every = x.new_empty(len(each) * max(each), *x.shape[1:])
        distributed.all_gather_into_tensor(every, padded)
        return torch.cat([part[:n] for part, n in zip(every.split(max(each)), each)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total[ctx.mine], None


def dealt(table: Tensor) -> Tensor:
    """This process's rows of a table too large for each to have all: row i is process i mod N's, at place i // N."""
    return table[rank() :: count()]


def collected(mine: Tensor) -> Tensor:
    """The table of which every process gives its `dealt` rows: to the first one, in main memory; others get theirs."""
    if count() == 1:
        return mine
    each = sizes(len(mine))
    padded = mine.new_zeros(max(each), *mine.shape[1:], device="cpu")  # collectives take equal parts
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in each] if rank() == 0 else None
    distributed.gather(padded, parts)
    return mine if parts is None else torch.stack(parts, dim=1).flatten(0, 1)[: sum(each)]


def take(mine: Tensor, index: Tensor) -> Tensor:
    """The rows of a `dealt` table that a process asks for, whoever has them."""
    if count() == 1:
        return mine[index]
    every = gather(index)
    here = every % count() == rank()
    found = mine.new_zeros(len(every), *mine.shape[1:])
    found[here] = mine[every[here] // count()]
    distributed.all_reduce(found)
    return found[rows(len(index))]


def put(mine: Tensor, index: Tensor, values: Tensor) -> None:
    """Write rows into a `dealt` table, each into the part of the process that has it."""
    values = values.to(mine.dtype)
    if count() == 1:
        mine[index] = values
        return
    every, values = gather(index), gather(values)
    here = every % count() == rank()
    mine[every[here] // count()] = values[here]


def mean(x: Tensor, n: int) -> Tensor:
    """The mean of a scalar over the images of all processes, of which n are this one's; without gradient."""
    weighed = torch.stack([x.detach() * n, x.new_tensor(n)])
    if count() > 1:
        distributed.all_reduce(weighed)
    return weighed[0] / weighed[1]


def parallel(network: Any) -> Any:
    """The network, whose `backward` leaves the mean of the processes' gradients on each.

    Buffers are not sent around: what a step makes of them is the same everywhere, and `alike` checks it.
    """
    if count() == 1:
        return network
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


# --- finding each other, and losing each other ------------------------------------------------------------------------


def together(f: Callable[P, T]) -> Callable[P, T]:
    """f is done by all processes that torchrun started: they find each other before the first such f.

    Raises WorkFailed where another process is lost on the way: torchrun may then start all of them again.
    """

    @wraps(f)
    def done(*given: P.args, **named: P.kwargs) -> T:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return f(*given, **named)
        try:
            join()
            result = f(*given, **named)
            distributed.barrier()
            return result
        except (UsageError, WorkFailed, Stopped):
            raise
        except RuntimeError as error:
            if not isinstance(error, distributed.DistError) and not any(w in str(error) for w in ("gloo", "NCCL")):
                raise
            reason = (str(error).splitlines() or [""])[0][:160]
            raise WorkFailed(f"process {os.environ['RANK']} lost another one, or never found it: {reason}") from None

    return done


def join() -> None:
    """Find the other processes, once; on a host with GPUs each takes the one of its local rank."""
    if distributed.is_initialized():
        return
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    store, number, processes = next(iter(distributed.rendezvous("env://")))
    apart = distributed.PrefixStore(agreed(store, number, processes), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=apart, rank=number, world_size=processes)
    atexit.register(distributed.destroy_process_group)


def agreed(store: Any, number: int, processes: int) -> str:
    """A word that all of these processes know, and none that ran before them.

    torchrun keeps its store when it starts processes anew, and they would take the addresses of the dead for those of
    the living (pytorch issue 135712). So each leaves a word in the store, and waits for the answer to this very word.
    """
    word = uuid4().hex
    if number > 0:
        store.set(f"simsiam/{number}", word)
        answer = store.get(f"simsiam/{word}").decode()
        store.set(f"simsiam/{answer}/{number}", "heard")
        return answer
    others = range(1, processes)
    while not all(store.check([f"simsiam/{word}/{other}"]) for other in others):
        for other in others:
            if store.check([f"simsiam/{other}"]):
                store.set(f"simsiam/{store.get(f'simsiam/{other}').decode()}", word)
        time.sleep(0.01)
    return word
