"""Batch norm whose statistics are those of all processes together, as in the paper (section 3, Synchronized BN)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.modules._functions import SyncBatchNorm as OnGPU  # what nn.SyncBatchNorm is made of
from torch.nn.modules.batchnorm import _BatchNorm

from simsiam.processes import alike, count

_backward = torch.ops.aten.native_batch_norm_backward


class SyncBatchNorm(_BatchNorm):
    """A batch norm, synchronized: by PyTorch's own function on a GPU, and by ours on a CPU, where PyTorch has none.

    It has the parameters and buffers of the batch norm it stands for, under the same names. (nn.SyncBatchNorm itself
    will not be on a CPU, nor will DistributedDataParallel have it there.)
    """

    def __init__(self, like: _BatchNorm):
        super().__init__(like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats)
        self._parameters, self._buffers = like._parameters, like._buffers
        self.then = nn.Sequential(*like.children())  # timm's BatchNormAct2d: what it does to what it normalized

    def _check_input_dim(self, x: Tensor) -> None:
        """Any (n, C, ...) will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or count() == 1:
            return self.then(super().forward(x))
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / self.num_batches_tracked.item() if momentum is None else momentum
        given = x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, momentum
        if x.is_cuda:
            return self.then(OnGPU.apply(*given, distributed.group.WORLD, count()))
        return self.then(_Synchronized.apply(*given))


class _Synchronized(torch.autograd.Function):
    """x (n, C, ...) of each process, normalized by the mean and variance over all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
    ) -> Tensor:
        blank = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))  # as exact is the answer
        mean, var = torch.batch_norm_update_stats(x, blank[0], blank[1], 0.0)  # the variance is biased
        mine = torch.cat([mean, var, mean.new_tensor([x.numel() // len(mean)])])
        means, variances, counts = everyones(mine).split([len(mean), len(mean), 1], dim=1)
        n, share = counts.sum(), counts / counts.sum()
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (n / (n - 1)), momentum)
        ctx.save_for_backward(x, weight, mean, var, n)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """With x^ = (x - mean) / std: weight / std * (g - mean of g - x^ * mean of g x^), both means over all."""
        x, weight, mean, var, n = ctx.saved_tensors
        scale = (var + ctx.eps).rsqrt()
        one = torch.ones_like(mean) if weight is None else weight
        _, of_weight, of_bias = _backward(g, x, one, None, None, mean, scale, True, ctx.eps, [False, True, True])
        means = everyones(torch.cat([of_weight, of_bias])).sum(0) / n
        of_x, of_one = means.split(len(mean))
        scale = scale * one
        away = F.batch_norm(x, mean, var, -scale * of_x, -scale * of_one, False, 0.0, ctx.eps)
        away.addcmul_(g, scale.to(g.dtype).view(-1, *[1] * (x.ndim - 2)))
        mine = (None, None) if weight is None else (of_weight, of_bias)
        return away, *mine, None, None, None, None


def everyones(x: Tensor) -> Tensor:
    """x (d) of each process, (processes, d). For few numbers gloo gathers in a quarter of the time that it sums in."""
    every = x.new_empty(count(), len(x))
    distributed.all_gather_into_tensor(every, x[None])
    return every


def synchronize(model: nn.Module) -> None:
    """Put a synchronized batch norm in the place of each."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
                module.register_module(name, SyncBatchNorm(child))


def settle(model: nn.Module) -> None:
    """Before a model is measured or saved: it is the same on every process, or WorkFailed.

    Where each process has batch norm statistics of its own, the first one's are the run's.
    """
    if count() == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)
    alike(model.state_dict())
