"""Gauges: named numbers that are read from the output of one step.

What `z_std_sqrt_d` means: the unit vectors ẑ = z/‖z‖ of one view over a batch satisfy
Σ_c var(ẑ_c) = 1 − ‖mean ẑ‖². So `z_std_sqrt_d` is at most √(1 − ‖mean ẑ‖²), and equal to it if all
channels have the same variance, as they do after a batch norm. It measures how much of each vector
is not common to all images.

One collapse is invisible to it: with a batch norm on the output, half of the images can be at +v
and the other half at −v, and the standard deviation is still perfect. Therefore the verdict
(`simsiam.monitoring.verdict`) also reads `z_rank`, the effective rank of z.
"""

import math
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.distributed.collectives import all_gather, all_reduce_max, all_reduce_mean
from simsiam.model.siamese import Output


def effective_rank(x: Tensor) -> Tensor:
    """Compute the effective rank: exp of the entropy of the variances along the principal axes.

    This is Roy & Vetterli's effective rank, computed on variances instead of singular values, so
    that weak noise in many directions counts for little.

    Args:
        x: (N, d).

    Returns:
        A scalar: 1 if all rows are on one line, at most min(N - 1, d).
    """
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x  # the same nonzero eigenvalues
    energy = torch.linalg.eigvalsh(gram / gram.diagonal().sum().clamp_min(1e-30)).clamp_min(0)
    share = energy / energy.sum().clamp_min(1e-30)
    return torch.special.entr(share).sum().exp()


def z_std(z: Tensor) -> Tensor:
    """Compute the standard deviation of z/‖z‖ over the batch, averaged over channels.

    Source: Figure 2 (middle).

    Args:
        z: (N, d).

    Returns:
        A scalar: 0 if all rows have one direction, 1/√d if z is isotropic.
    """
    return F.normalize(z, dim=1).std(0, correction=0).mean()


def mean_squared_cosine(z: Tensor) -> Tensor:
    """Compute the mean squared cosine between the z of different images.

    Args:
        z: (N, d), N at least 2.

    Returns:
        A scalar: 1 if all rows are on one line, about 1/d if z is isotropic.
    """
    unit = F.normalize(z, dim=1)
    n = len(unit)
    return ((unit @ unit.T).square().sum() - unit.square().sum(1).square().sum()) / (n * (n - 1))


@torch.no_grad()
def compute_gauges(output: Output) -> dict[str, float]:
    """Compute the gauges of one step from its first view, over the batch of all processes.

    Args:
        output: What the model returned for the share of this process.

    Returns:
        `loss`, `z_std`, `z_std_sqrt_d`, `z_rank`, `z_cosine_squared` and `h_rank`, all computed in
        float32.
    """
    loss = all_reduce_mean(output.loss, len(output.features[0]))
    z, h = (
        all_gather(views[0].detach().float()) for views in (output.projections, output.features)
    )
    std = z_std(z)
    gauges = {
        "loss": loss,
        "z_std": std,
        "z_std_sqrt_d": std * math.sqrt(z.shape[1]),
        "z_rank": effective_rank(z),
        "z_cosine_squared": mean_squared_cosine(z),
        "h_rank": effective_rank(h),
    }
    numbers = torch.stack([gauge.float() for gauge in gauges.values()]).tolist()  # one transfer
    return dict(zip(gauges, numbers, strict=True))


def all_finite(loss: Tensor, model: nn.Module | None = None) -> bool:
    """Tell whether the loss, and the model if there is one, are finite on every process.

    Args:
        loss: The loss of this process, a scalar.
        model: A module whose parameters and buffers are checked as well.

    Returns:
        The same answer on all processes.
    """
    tensors = [loss.detach()]
    if model is not None:
        state = chain(model.parameters(), model.buffers())
        tensors += [tensor for tensor in state if tensor.is_floating_point()]
    broken = not all(bool(tensor.isfinite().all()) for tensor in tensors)
    return not any(all_reduce_max(broken))


def grad_norm(model: nn.Module) -> float:
    """Compute the Euclidean norm of the gradient of the latest step.

    Args:
        model: The trained module.

    Returns:
        The norm over all parameters that have a gradient.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()
