"""Batch norm whose statistics are those of all processes together, as in the paper (section 3, Synchronized BN)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules._functions import SyncBatchNorm as OnGPU  # what nn.SyncBatchNorm is made of
from torch.nn.modules.batchnorm import _BatchNorm

from simsiam.distributed.collectives import check_replicas_equal
from simsiam.distributed.process_group import world_size

_native_batch_norm_out = torch.ops.aten.native_batch_norm.out
_native_batch_norm_backward = torch.ops.aten.native_batch_norm_backward

_num_views = 1  # that the rows are of, one after the other; each has statistics of its own


@contextmanager
def per_view_statistics(num_views: int) -> Iterator[None]:
    """Within, the rows of a batch are those of several views, and synchronized batch norm on a CPU keeps these apart.

    What all views have to tell goes in one message, so processes wait for each other once and not once a view.
    """
    global _num_views
    _num_views = num_views
    try:
        yield
    finally:
        _num_views = 1


class SyncBatchNorm(_BatchNorm):
    """A batch norm, synchronized: by PyTorch's own function on a GPU, and by ours on a CPU, where PyTorch has none.

    It has the parameters and buffers of the batch norm it stands for, under the same names. (nn.SyncBatchNorm itself
    will not be on a CPU, nor will DistributedDataParallel have it there.)
    """

    def __init__(self, batch_norm: _BatchNorm):
        super().__init__(
            batch_norm.num_features,
            batch_norm.eps,
            batch_norm.momentum,
            batch_norm.affine,
            batch_norm.track_running_stats,
        )
        self._parameters, self._buffers = batch_norm._parameters, batch_norm._buffers
        self.then = nn.Sequential(
            *batch_norm.children()
        )  # timm's BatchNormAct2d: what it does to what it normalized

    def _check_input_dim(self, x: Tensor) -> None:
        """Any (n, C, ...) will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return self.then(super().forward(x))
        momenta = [self.momentum] * _num_views
        if self.num_batches_tracked is not None:
            before = int(self.num_batches_tracked)
            self.num_batches_tracked.add_(_num_views)
            momenta = [
                1 / (before + 1 + view) if m is None else m for view, m in enumerate(momenta)
            ]
        given = x, self.weight, self.bias, self.running_mean, self.running_var, self.eps
        if x.is_cuda:
            return self.then(OnGPU.apply(*given, momenta[0], distributed.group.WORLD, world_size()))
        return self.then(_SyncBatchNormFunction.apply(*given, momenta))


class _SyncBatchNormFunction(torch.autograd.Function):
    """x (views * n, C, ...) of each process; each view is normalized by its mean and variance over all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momenta: list[float],
    ) -> Tensor:
        views = len(momenta)
        blank = x.new_zeros(
            2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)
        )  # as exact is the answer
        moments = [
            torch.batch_norm_update_stats(view, blank[0], blank[1], 0.0) for view in x.chunk(views)
        ]
        mean, var = map(torch.stack, zip(*moments, strict=True))  # the variance is biased
        mine = torch.cat([mean, var, mean.new_full((views, 1), x.numel() // mean.numel())], dim=1)
        means, variances, counts = all_gather_stats(mine).split(
            [x.shape[1], x.shape[1], 1], dim=2
        )  # (processes, views, C)
        n = counts.sum(0)
        share = counts / n
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        if running_mean is not None and running_var is not None:
            for m, v, momentum in zip(mean, var * (n / (n - 1)), momenta, strict=True):
                running_mean.lerp_(m, momentum)
                running_var.lerp_(v, momentum)
        ctx.save_for_backward(x, weight, mean, var, n)
        ctx.eps = eps
        return _normalize_per_view(x, mean, var, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """With x^ = (x - mean) / std: weight / std * (g - mean of g - x^ * mean of g x^), both means over all."""
        x, weight, mean, var, n = ctx.saved_tensors
        views, scale = len(mean), (var + ctx.eps).rsqrt()
        one = torch.ones_like(mean[0]) if weight is None else weight
        sums = [
            _native_batch_norm_backward(
                part, view, one, None, None, m, s, True, ctx.eps, [False, True, True]
            )[1:]
            for part, view, m, s in zip(
                grad_output.chunk(views), x.chunk(views), mean, scale, strict=True
            )
        ]
        of_weight, of_bias = map(torch.stack, zip(*sums, strict=True))
        of_x, of_one = (all_gather_stats(torch.cat([of_weight, of_bias], dim=1)).sum(0) / n).chunk(
            2, dim=1
        )
        scale = scale * one
        away = _normalize_per_view(x, mean, var, -scale * of_x, -scale * of_one, ctx.eps)
        for of_view, gradient, by in zip(
            away.chunk(views), grad_output.chunk(views), scale, strict=True
        ):
            of_view.addcmul_(gradient, by.to(grad_output.dtype).view(-1, *[1] * (x.ndim - 2)))
        mine = (None, None) if weight is None else (of_weight.sum(0), of_bias.sum(0))
        return away, *mine, None, None, None, None


def _normalize_per_view(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Each view of x by its row of mean and var (views, C); weight and bias are (C,), or (views, C) too."""
    y, none = torch.empty_like(x), mean.new_empty(0)
    rows = [[None] * len(mean) if v is None else v.expand_as(mean) for v in (weight, bias)]
    for view, out, m, v, w, b in zip(
        x.chunk(len(mean)), y.chunk(len(mean)), mean, var, *rows, strict=True
    ):
        _native_batch_norm_out(
            view, w, b, m, v, False, 0.0, eps, out=out, save_mean=none, save_invstd=none
        )
    return y


def all_gather_stats(x: Tensor) -> Tensor:
    """x of each process, (processes, ...). For few numbers gloo gathers in a quarter of the time that it sums in.

    It asks for them again and again, for a processor that goes to sleep over each message is late to wake.
    """
    every = x.new_empty(world_size(), *x.shape)
    work = distributed.all_gather_into_tensor(every, x[None], async_op=True)
    while not work.is_completed():
        os.sched_yield()
    work.wait()
    return every


def convert_sync_batchnorm(model: nn.Module) -> None:
    """Put a synchronized batch norm in the place of each."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
                module.register_module(name, SyncBatchNorm(child))


def synchronize_replicas(model: nn.Module) -> None:
    """Before a model is measured or saved: it is the same on every process, or WorkFailed.

    Where each process has batch norm statistics of its own, the first one's are the run's.
    """
    if world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)
    check_replicas_equal({**dict(model.named_parameters()), **dict(model.named_buffers())})
