"""Batch norm with the statistics of all processes together (section 3, synchronized BN).

On GPUs PyTorch has it. On CPUs it has none, and `CPUSyncBatchNorm` computes it here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from simsiam.distributed.collectives import check_replicas_equal
from simsiam.distributed.process_group import world_size
from simsiam.utils.system import yield_core

# tests/test_torch_private.py holds what is relied upon in these two, which PyTorch does not
# document. The first is F.batch_norm that writes into memory it is given.
_native_batch_norm_out = torch.ops.aten.native_batch_norm.out
_native_batch_norm_backward = torch.ops.aten.native_batch_norm_backward

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


class _Replacement(nn.Module):
    """A batch norm in the place of another: its parameters and buffers under the same names."""

    def __init__(self, batch_norm: BatchNorm):
        """Take over the parameters, buffers and settings of `batch_norm`."""
        super().__init__(  # type: ignore[call-arg]
            batch_norm.num_features,
            batch_norm.eps,
            batch_norm.momentum,  # type: ignore[arg-type]
            batch_norm.affine,
            batch_norm.track_running_stats,
        )
        for name, parameter in batch_norm.named_parameters(recurse=False):
            setattr(self, name, parameter)
        for name, buffer in batch_norm.named_buffers(recurse=False):
            setattr(self, name, buffer)
        # timm's BatchNormAct2d has children, which it applies to what it normalized.
        self.after_norm = nn.Sequential(*batch_norm.children())
        self.training = batch_norm.training


class GPUSyncBatchNorm(_Replacement, nn.SyncBatchNorm):
    """PyTorch's synchronized batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (n, C, ...) normalized."""
        return self.after_norm(super().forward(x))


class CPUSyncBatchNorm(_Replacement, nn.BatchNorm1d):
    """Synchronized batch norm on CPUs, where nn.SyncBatchNorm does not work.

    Attributes:
        num_views: How many views a batch consists of, one after the other. Each view has its own
            statistics. `separate_views` sets it.
    """

    num_views = 1

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept any (n, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (num_views * n, C, ...) normalized."""
        if not self.training or world_size() == 1:
            return self.after_norm(super().forward(x))
        momenta = [self.momentum] * self.num_views
        if self.num_batches_tracked is not None:
            before = int(self.num_batches_tracked)
            self.num_batches_tracked.add_(self.num_views)
            momenta = [
                1 / (before + 1 + view) if m is None else m for view, m in enumerate(momenta)
            ]
        y = _SyncBatchNormFunction.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, momenta
        )
        return self.after_norm(y)


@contextmanager
def separate_views(network: nn.Module, num_views: int) -> Iterator[None]:
    """Within, CPUSyncBatchNorm keeps the views in a batch apart.

    The statistics of all views travel in one message, so that processes wait for each other once
    instead of once per view.

    Args:
        network: The network whose batch norms are meant.
        num_views: The number of views in a batch, one after the other, of equal size.

    Yields:
        Nothing.
    """
    norms = [module for module in network.modules() if isinstance(module, CPUSyncBatchNorm)]
    for norm in norms:
        norm.num_views = num_views
    try:
        yield
    finally:
        for norm in norms:
            norm.num_views = 1


def synchronizes_on_cpu(network: nn.Module) -> bool:
    """Return whether a network has a CPUSyncBatchNorm."""
    return any(isinstance(module, CPUSyncBatchNorm) for module in network.modules())


class _SyncBatchNormFunction(torch.autograd.Function):
    """x (views * n, C, ...) of each process; each view has its mean and variance over all."""

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
        views, channels = len(momenta), x.shape[1]
        # The data type of these unused statistics is that of the answer.
        unused = x.new_zeros(2, channels, dtype=torch.promote_types(x.dtype, torch.float32))
        moments = [
            torch.batch_norm_update_stats(view, unused[0], unused[1], 0.0)
            for view in x.chunk(views)
        ]
        mean, var = map(torch.stack, zip(*moments, strict=True))  # (views, C); biased variance
        count = mean.new_full((views, 1), x.numel() // mean.numel())
        gathered = all_gather_stats(torch.cat([mean, var, count], dim=1))  # (processes, views, .)
        means, variances, counts = gathered.split([channels, channels, 1], dim=2)
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
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Compute weight / std * (g - mean of g - x^ * mean of g x^) with x^ = (x - mean) / std.

        g is `grad_output`, and both means are over the images of all processes.
        """
        x, weight, mean, var, n = ctx.saved_tensors
        views, inv_std = len(mean), (var + ctx.eps).rsqrt()
        gamma = torch.ones_like(mean[0]) if weight is None else weight
        sums = [
            _native_batch_norm_backward(
                g, view, gamma, None, None, m, s, True, ctx.eps, [False, True, True]
            )[1:]
            for g, view, m, s in zip(
                grad_output.chunk(views), x.chunk(views), mean, inv_std, strict=True
            )
        ]
        sum_gx, sum_g = map(torch.stack, zip(*sums, strict=True))  # of g x^ and of g, (views, C)
        totals = all_gather_stats(torch.cat([sum_gx, sum_g], dim=1)).sum(0)
        mean_gx, mean_g = (totals / n).chunk(2, dim=1)
        scale = inv_std * gamma
        grad_x = _normalize_per_view(x, mean, var, -scale * mean_gx, -scale * mean_g, ctx.eps)
        grads = zip(grad_x.chunk(views), grad_output.chunk(views), scale, strict=True)
        for grad_view, g, s in grads:
            grad_view.addcmul_(g, s.to(g.dtype).view(-1, *[1] * (x.ndim - 2)))
        grad_affine = (None, None) if weight is None else (sum_gx.sum(0), sum_g.sum(0))
        return grad_x, *grad_affine, None, None, None, None


def _normalize_per_view(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalize each view by its row of mean and var (views, C); weight and bias may have rows."""
    views, y, none = len(mean), torch.empty_like(x), mean.new_empty(0)
    rows = [[None] * views if v is None else v.expand_as(mean) for v in (weight, bias)]
    for view, out, m, v, w, b in zip(x.chunk(views), y.chunk(views), mean, var, *rows, strict=True):
        _native_batch_norm_out(
            view, w, b, m, v, False, 0.0, eps, out=out, save_mean=none, save_invstd=none
        )
    return y


def all_gather_stats(x: Tensor) -> Tensor:
    """Gather a small tensor from every process.

    For few numbers, gloo's all-gather takes a quarter of the time of its all-reduce. The result is
    polled for, because a core that sleeps while it waits for each message is slow to wake up.

    Args:
        x: Of the same shape on every process.

    Returns:
        (processes, *x.shape), in order of rank.
    """
    gathered = x.new_empty(world_size(), *x.shape)
    work = distributed.all_gather_into_tensor(gathered, x[None], async_op=True)
    while not work.is_completed():
        yield_core()
    work.wait()
    return gathered


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> None:
    """Replace each batch norm in a model by a synchronized one.

    Args:
        model: The model; it is changed in place. Names in its state dict stay the same.
        device: The device on which the model will be trained.
    """
    replacement = GPUSyncBatchNorm if device.type == "cuda" else CPUSyncBatchNorm
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, BatchNorm) and not isinstance(child, _Replacement):
                module.register_module(name, replacement(child))


def synchronize_replicas(model: nn.Module) -> None:
    """Make sure that the model is the same on every process, before it is measured or saved.

    Where processes have batch norm statistics of their own, those of rank zero replace the others.

    Args:
        model: The model; its batch norm buffers may change.

    Raises:
        WorkFailed: If a parameter or a buffer differs between processes.
    """
    if world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, BatchNorm) and not isinstance(module, _Replacement):
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)
    check_replicas_equal({**dict(model.named_parameters()), **dict(model.named_buffers())})
