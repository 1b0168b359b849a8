"""The processes of one run, as torchrun starts them: which is this one, what is its share, and what all of them know.

PyTorch does the work: gloo carries what lies on a CPU, NCCL what lies on a GPU, DistributedDataParallel the gradients.
A batch is dealt in order: the shares, in order of rank, are the batch of one process. All functions but `rank`, `count`
and `share` are calls that every process has to make; for a process that is alone they do nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from simsiam.distributed.process_group import T, rank, world_size
from simsiam.errors import WorkFailed

INT_DTYPES = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # a number's bytes as a whole number


def all_reduce_max(*numbers: int) -> list[int]:
    """The largest that any process gave, of each number."""
    if world_size() == 1:
        return list(numbers)
    found = torch.tensor([int(number) for number in numbers])
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.tolist()


def all_gather_objects(items: Sequence[T]) -> list[T]:
    """The things of all processes, in order of rank."""
    if world_size() == 1:
        return list(items)
    every: list[Any] = [None] * world_size()
    distributed.all_gather_object(every, list(items))
    return [thing for some in every for thing in some]


def check_replicas_equal(state: Mapping[str, Tensor]) -> None:
    """Raises WorkFailed where a tensor is not the same, to the bit, on every process."""
    if world_size() == 1:
        return
    sums = [
        v.detach().view(INT_DTYPES[v.element_size()]).sum(dtype=torch.int64) for v in state.values()
    ]
    every = all_gather(torch.stack(sums).cpu()[None])
    if differ := [name for name, column in zip(state, every.T) if (column != column[0]).any()]:
        raise WorkFailed(
            f"the processes have come apart: {', '.join(differ[:3])} of {len(differ)} are not alike"
        )


def all_gather_sizes(n: int) -> list[int]:
    """Every process's n, in order of rank."""
    if world_size() == 1:
        return [n]
    every = torch.empty(world_size(), dtype=torch.int64)
    distributed.all_gather_into_tensor(every, torch.tensor([n]))
    return every.tolist()


def local_rows(n: int) -> slice:
    """Where this process's n rows are among those of all."""
    start = sum(all_gather_sizes(n)[: rank()])
    return slice(start, start + n)


def all_gather(x: Tensor) -> Tensor:
    """The x (n, ...) of all processes in order of rank, whatever each one's n; gradients flow back to each."""
    if world_size() == 1:
        return x
    return _AllGather.apply(x, all_gather_sizes(len(x)))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row_counts: list[int]) -> Tensor:
        start = sum(row_counts[: rank()])
        ctx.mine = slice(start, start + len(x))
        padded = x.new_zeros(max(row_counts), *x.shape[1:])  # collectives take equal parts
        padded[: len(x)] = x
        every = x.new_empty(len(row_counts) * max(row_counts), *x.shape[1:])
        distributed.all_gather_into_tensor(every, padded)
        return torch.cat([part[:n] for part, n in zip(every.split(max(row_counts)), row_counts)])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad_output.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total[ctx.mine], None


def shard_rows(table: Tensor) -> Tensor:
    """This process's rows of a table too large for each to have all: row i is process i mod N's, at place i // N."""
    return table[rank() :: world_size()]


def gather_rows(local_table: Tensor) -> Tensor:
    """The table of which every process gives its `dealt` rows: to the first one, in main memory; others get theirs."""
    if world_size() == 1:
        return local_table
    each = all_gather_sizes(len(local_table))
    padded = local_table.new_zeros(
        max(each), *local_table.shape[1:], device="cpu"
    )  # collectives take equal parts
    padded[: len(local_table)] = local_table
    parts = [torch.empty_like(padded) for _ in each] if rank() == 0 else None
    distributed.gather(padded, parts)
    return local_table if parts is None else torch.stack(parts, dim=1).flatten(0, 1)[: sum(each)]


def lookup_rows(local_table: Tensor, index: Tensor) -> Tensor:
    """The rows of a `dealt` table that a process asks for, whoever has them."""
    if world_size() == 1:
        return local_table[index]
    every = all_gather(index)
    here = every % world_size() == rank()
    found = local_table.new_zeros(len(every), *local_table.shape[1:])
    found[here] = local_table[every[here] // world_size()]
    distributed.all_reduce(found)
    return found[local_rows(len(index))]


def write_rows(local_table: Tensor, index: Tensor, values: Tensor) -> None:
    """Write rows into a `dealt` table, each into the part of the process that has it."""
    values = values.to(local_table.dtype)
    if world_size() == 1:
        local_table[index] = values
        return
    every, values = all_gather(index), all_gather(values)
    here = every % world_size() == rank()
    local_table[every[here] // world_size()] = values[here]


def all_reduce_mean(x: Tensor, n: int) -> Tensor:
    """The mean of a scalar over the images of all processes, of which n are this one's; without gradient."""
    weighed = torch.stack([x.detach() * n, x.new_tensor(n)])
    if world_size() > 1:
        distributed.all_reduce(weighed)
    return weighed[0] / weighed[1]


def wrap_ddp(network: Any) -> Any:
    """The network, whose `backward` leaves the mean of the processes' gradients on each.

    Buffers are not sent around: what a step makes of them is the same everywhere, and `alike` checks it.
    """
    if world_size() == 1:
        return network
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
