"""Collectives: what the processes of one run tell each other.

gloo carries tensors on a CPU, NCCL tensors on a GPU, and DistributedDataParallel the gradients. A
batch is divided in order: the parts of all processes, in order of rank, are the batch of a single
process. Every process has to call these functions, except `shard_rows`. In a single process they
return their input.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from simsiam.distributed.process_group import T, rank, world_size
from simsiam.errors import WorkFailed

# The integer type with as many bytes as a number, for comparing bits.
INT_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def all_reduce_max(*numbers: int) -> list[int]:
    """Return the maximum over all processes of each number.

    Args:
        *numbers: As many on every process.

    Returns:
        One maximum for each number.
    """
    if world_size() == 1:
        return list(numbers)
    maxima = torch.tensor([int(number) for number in numbers])
    distributed.all_reduce(maxima, distributed.ReduceOp.MAX)
    return maxima.tolist()


def all_gather_objects(items: Sequence[T]) -> list[T]:
    """Concatenate the lists of all processes.

    Args:
        items: This process's objects, any number of them; they are pickled.

    Returns:
        The objects of all processes, in order of rank.
    """
    if world_size() == 1:
        return list(items)
    lists: list[Any] = [None] * world_size()
    distributed.all_gather_object(lists, list(items))
    return [item for process_items in lists for item in process_items]


def check_replicas_equal(state: Mapping[str, Tensor]) -> None:
    """Check that every process has the same tensors, by the sum of their bits.

    Args:
        state: Tensors by name, the same names on every process.

    Raises:
        WorkFailed: If a tensor differs.
    """
    if world_size() == 1:
        return
    sums = [
        v.detach().view(INT_DTYPES[v.element_size()]).sum(dtype=torch.int64) for v in state.values()
    ]
    table = all_gather(torch.stack(sums).cpu()[None])  # (processes, tensors)
    differ = [name for name, column in zip(state, table.T) if (column != column[0]).any()]
    if differ:
        raise WorkFailed(
            f"the processes have diverged: {len(differ)} tensors differ between them, "
            f"the first of which are {', '.join(differ[:3])}"
        )


def all_gather_sizes(n: int) -> list[int]:
    """Return the number `n` of every process, in order of rank."""
    if world_size() == 1:
        return [n]
    sizes = torch.empty(world_size(), dtype=torch.int64)
    distributed.all_gather_into_tensor(sizes, torch.tensor([n]))
    return sizes.tolist()


def local_rows(n: int) -> slice:
    """Return where this process's rows are among the rows of all processes.

    Args:
        n: How many rows this process has.

    Returns:
        A slice of length n.
    """
    start = sum(all_gather_sizes(n)[: rank()])
    return slice(start, start + n)


def all_gather(x: Tensor) -> Tensor:
    """Concatenate the tensors of all processes; gradients flow back to each of them.

    Args:
        x: (n, ...); n may differ between processes.

    Returns:
        (sum of n, ...), in order of rank.
    """
    if world_size() == 1:
        return x
    return _AllGather.apply(x, all_gather_sizes(len(x)))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row_counts: list[int]) -> Tensor:
        start, longest = sum(row_counts[: rank()]), max(row_counts)
        ctx.rows = slice(start, start + len(x))
        padded = x.new_zeros(longest, *x.shape[1:])  # collectives take parts of equal size
        padded[: len(x)] = x
        gathered = x.new_empty(len(row_counts) * longest, *x.shape[1:])
        distributed.all_gather_into_tensor(gathered, padded)
        return torch.cat([part[:n] for part, n in zip(gathered.split(longest), row_counts)])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad_output.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total[ctx.rows], None


# --- tables that are too large for each process to have all rows: process i mod N has row i, as
# --- its row i // N


def shard_rows(table: Tensor) -> Tensor:
    """Return this process's rows of a table.

    Args:
        table: (rows, ...), complete.

    Returns:
        Rows rank, rank + N, rank + 2 N, ... of the table, for N processes.
    """
    return table[rank() :: world_size()]


def gather_rows(local_table: Tensor) -> Tensor:
    """Collect a sharded table in the main memory of rank zero.

    Args:
        local_table: This process's rows, as `shard_rows` returns them.

    Returns:
        The complete table on rank zero; `local_table` on the other processes.
    """
    if world_size() == 1:
        return local_table
    sizes = all_gather_sizes(len(local_table))
    # Collectives take parts of equal size.
    padded = local_table.new_zeros(max(sizes), *local_table.shape[1:], device="cpu")
    padded[: len(local_table)] = local_table
    parts = [torch.empty_like(padded) for _ in sizes] if rank() == 0 else None
    distributed.gather(padded, parts)
    return local_table if parts is None else torch.stack(parts, dim=1).flatten(0, 1)[: sum(sizes)]


def lookup_rows(local_table: Tensor, index: Tensor) -> Tensor:
    """Return rows of a sharded table.

    Args:
        local_table: This process's rows, as `shard_rows` returns them.
        index: (n,) int64, the rows that this process wants; n may differ between processes.

    Returns:
        (n, ...), whichever processes have these rows.
    """
    if world_size() == 1:
        return local_table[index]
    indices = all_gather(index)
    is_local = indices % world_size() == rank()
    rows = local_table.new_zeros(len(indices), *local_table.shape[1:])
    rows[is_local] = local_table[indices[is_local] // world_size()]
    distributed.all_reduce(rows)
    return rows[local_rows(len(index))]


def write_rows(local_table: Tensor, index: Tensor, values: Tensor) -> None:
    """Write rows into a sharded table.

    Args:
        local_table: This process's rows, as `shard_rows` returns them; changed in place.
        index: (n,) int64, the rows that this process has values for.
        values: (n, ...), the values.
    """
    values = values.to(local_table.dtype)
    if world_size() == 1:
        local_table[index] = values
        return
    indices, values = all_gather(index), all_gather(values)
    is_local = indices % world_size() == rank()
    local_table[indices[is_local] // world_size()] = values[is_local]


def all_reduce_mean(x: Tensor, n: int) -> Tensor:
    """Average a scalar over the images of all processes, without gradient.

    Args:
        x: The mean over this process's images, a scalar.
        n: How many images these are.

    Returns:
        The mean over all images.
    """
    weighted = torch.stack([x.detach() * n, x.new_tensor(n)])
    if world_size() > 1:
        distributed.all_reduce(weighted)
    return weighted[0] / weighted[1]


def wrap_ddp(network: nn.Module) -> nn.Module:
    """Wrap a network so that `backward` averages its gradients over all processes.

    Buffers are not sent: each process computes the same, which `check_replicas_equal` checks.

    Args:
        network: The network, on its device.

    Returns:
        The network in DistributedDataParallel; in a single process, the network itself.
    """
    if world_size() == 1:
        return network
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
