"""Gauges read from one step's output, and the verdict on a run.

What the gauges mean. A view's unit vectors ẑ = z/‖z‖ over a batch satisfy Σ_c var(ẑ_c) = 1 − ‖mean ẑ‖², so
`z_std_sqrt_d` is at most √(1 − ‖mean ẑ‖²), and just that where all channels vary alike, as they do behind a batch norm:
it says how much of each vector is not common to all images. That alone misses one collapse: with a batch norm on the
output, all images can sit at +v and −v, half and half, and the std is perfect. So the verdict also asks for the
effective rank of z.

Where the thresholds come from. They were written down before the runs that test them (results/README.md), though not
before the first look at healthy ranks on `shapes`: 3 to 4 with d = 512, 5 to 6 with the demo's d = 2048.

- `collapsed`: z_std_sqrt_d below 0.1, which is ‖mean ẑ‖² above 0.99 where channels vary alike: every image within a few
  degrees of one vector. Or an effective rank of z of at most 2: what is left is a line or a plane, and r directions
  have 2^r orthants, so no more than four groups of images stand apart. Isotropic z have a rank near min(N, d).
- `partial collapse`: z_std_sqrt_d below 0.5, so three quarters of each vector's energy is common to all images; or a
  rank of at most 3, eight orthants, fewer than most image sets have kinds of images.
- `not converging`: the loss has covered less than a quarter of the way from unrelated vectors to its minimum (Table 1b:
  a fixed predictor leaves the loss high; that is no collapse, though the accuracy is near chance too). SwAV's is
  within 2 % of log K, where it stays if its codes are uniform (drawn after the runs: stuck at 1.00, learning at 0.92).
- `too early`: fewer than 200 steps. SGD's momentum forgets in 10 steps, batch norm's averages in about as many, and a
  network with its predictor needs some dozens of those to leave its initialization; nothing is decided before.
- `diverged`: the loss was not a finite number.

The gauges are the median over the last tenth of the logged lines (at least three), so one noisy batch decides nothing.
"""

import math
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.distributed.collectives import all_gather, all_reduce_max, all_reduce_mean
from simsiam.model.siamese import Output


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the variances of x (N, d) along its principal axes; 1 for a line, min(N-1, d) at most.

    Roy & Vetterli's effective rank on variances, so that faint noise in many directions counts for little.
    """
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x  # the same nonzero eigenvalues
    energy = torch.linalg.eigvalsh(gram / gram.diagonal().sum().clamp_min(1e-30)).clamp_min(0)
    share = energy / energy.sum().clamp_min(1e-30)
    return torch.special.entr(share).sum().exp()


def z_std(z: Tensor) -> Tensor:
    """Figure 2 (middle): std over the batch of each channel of z/‖z‖, averaged over channels; 1/√d if isotropic."""
    return F.normalize(z, dim=1).std(0, correction=0).mean()


def mean_squared_cosine(z: Tensor) -> Tensor:
    """Mean squared cosine between the z of different images: 1 when all lie on one line, about 1/d when isotropic."""
    unit = F.normalize(z, dim=1)
    n = len(unit)
    return ((unit @ unit.T).square().sum() - unit.square().sum(1).square().sum()) / (n * (n - 1))


@torch.no_grad()
def compute_gauges(output: Output) -> dict[str, float]:
    """Named numbers from one step, read from its first view over the whole batch, in float32."""
    loss = all_reduce_mean(output.loss, len(output.features[0]))
    z, h = (
        all_gather(of_views[0].detach().float())
        for of_views in (output.projections, output.features)
    )
    std = z_std(z)
    values = {
        "loss": loss,
        "z_std": std,
        "z_std_sqrt_d": std * math.sqrt(z.shape[1]),
        "z_rank": effective_rank(z),
        "z_cosine_squared": mean_squared_cosine(z),
        "h_rank": effective_rank(h),
    }
    return dict(
        zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True)
    )


def all_finite(loss: Tensor, model: nn.Module | None = None) -> bool:
    """Whether the loss and, where a model is given, all its weights and statistics are numbers, on every process."""
    values = (
        []
        if model is None
        else [v for v in chain(model.parameters(), model.buffers()) if v.is_floating_point()]
    )
    return not any(
        all_reduce_max(not all(bool(v.isfinite().all()) for v in [loss.detach(), *values]))
    )


def grad_norm(model: nn.Module) -> float:
    """Euclidean norm of the last step's gradient over all parameters."""
    return torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    ).item()
