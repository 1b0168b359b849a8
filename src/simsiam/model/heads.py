"""The heads and batch norm's grouping of the views.

The heads are the projector, which completes the encoder f, and the predictor h: both are plain
MLPs (section 3). A grouping decides which images share batch norm's statistics.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from simsiam.config.method import BN_SPLITS, Method
from simsiam.distributed.collectives import all_gather
from simsiam.distributed.process_group import world_size
from simsiam.distributed.sync_batch_norm import separate_views, synchronizes_on_cpu
from simsiam.errors import UsageError
from simsiam.model.precision import at_least_float32


def mlp(
    widths: Sequence[int],
    *,
    hidden_bn: bool,
    out_bn: bool,
    out_affine: bool = True,
    out_bias: bool = True,
) -> nn.Sequential:
    """Create fully-connected layers with ReLU between them and none after the last.

    A layer has a bias only where no batch norm follows it, because the norm would cancel the bias.

    Args:
        widths: Width of the input, of each hidden layer, and of the output.
        hidden_bn: Whether batch norm follows each hidden layer.
        out_bn: Whether batch norm follows the last layer.
        out_affine: Whether that last batch norm has a scale and a shift.
        out_bias: Whether the last layer may have a bias.

    Returns:
        A module from (N, widths[0]) to (N, widths[-1]).
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        bn = out_bn if i == last else hidden_bn
        layers.append(nn.Linear(fan_in, fan_out, bias=not bn and (i < last or out_bias)))
        if bn:
            layers.append(nn.BatchNorm1d(fan_out, affine=i < last or out_affine))
        if i < last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def build_projector(method: Method, dim: int) -> nn.Sequential:
    """Create the projector, h (N, dim) to z (N, d) (section 3, projection MLP).

    Args:
        method: The row; `proj_layers`, `proj_hidden`, `dim` and `head_bn` shape the projector.
        dim: Width of the backbone's feature h.

    Returns:
        An MLP of `proj_layers` layers.

    Raises:
        UsageError: If the row asks for an affine output batch norm and has no output batch norm.
    """
    if method.output_bn_affine and "proj_out" not in method.head_bn:
        raise UsageError(
            "output_bn_affine needs a batch norm on the projector's output: add proj_out to head_bn"
        )
    return mlp(
        [dim, *[method.proj_hidden] * (method.proj_layers - 1), method.dim],
        hidden_bn="proj_hidden" in method.head_bn,
        out_bn="proj_out" in method.head_bn,
        out_affine=method.output_bn_affine,
        out_bias=method.output_bias,
    )


def build_predictor(method: Method) -> nn.Module:
    """Create the predictor, z (N, d) to p (N, d) (section 3, prediction MLP).

    Args:
        method: The row; `predictor`, `pred_dim`, `dim` and `head_bn` shape the predictor.

    Returns:
        A two-layer bottleneck; the identity for "none" (Table 1a); parameters that get no gradient
        for "fixed" (Table 1b); `DirectPredictor` for "direct".
    """
    if method.predictor == "none":
        return nn.Identity()
    if method.predictor == "direct":
        return DirectPredictor(method)
    bn = {"hidden_bn": "pred_hidden" in method.head_bn, "out_bn": "pred_out" in method.head_bn}
    head = mlp([method.dim, method.pred_dim, method.dim], out_bias=method.output_bias, **bn)
    return head.requires_grad_(method.predictor != "fixed")


class DirectPredictor(nn.Module):
    """A linear predictor p = W z, computed instead of trained (DirectSet, Wang et al., 2021).

    F is a moving average of the correlations E[z z'] and W = (F / |F|) ** power + epsilon I, with
    the spectral norm |F|. A trained linear predictor aligns its eigenspaces with those of F (Tian
    et al., 2021); this one is aligned from the start.
    """

    correlation: Tensor  # F, (d, d)
    weight: Tensor  # W, (d, d)

    def __init__(self, method: Method):
        """Create the predictor, which is epsilon I before the first step."""
        super().__init__()
        self.method = method
        self.register_buffer("correlation", torch.zeros(method.dim, method.dim))
        self.register_buffer("weight", method.direct_epsilon * torch.eye(method.dim))

    def forward(self, z: Tensor) -> Tensor:
        """Return p (N, d) for z (N, d)."""
        weight = self.weight.to(z.dtype)
        return _PassGradient.apply(z, weight) if self.method.iso_loss else z @ weight

    @torch.no_grad()
    def after_step(self, z: list[Tensor]) -> None:
        """Update F and W, after a step of the optimizer.

        Args:
            z: The step's projections of each predicting view, (N, d) each.
        """
        rows = torch.cat([all_gather(at_least_float32(view)) for view in z])
        self.correlation.lerp_(rows.T @ rows / len(rows), 1 - self.method.direct_decay)
        values, vectors = torch.linalg.eigh(self.correlation)
        largest = values[-1].clamp_min(torch.finfo(values.dtype).tiny)  # 0 if the decay is 1
        power = (values / largest).clamp_min(0) ** self.method.direct_power
        self.weight.copy_((vectors * (power + self.method.direct_epsilon)) @ vectors.T)


class _PassGradient(torch.autograd.Function):
    """A product z W that gives z the gradient of the product (IsoLoss)."""

    @staticmethod
    def forward(ctx: object, z: Tensor, weight: Tensor) -> Tensor:
        return z @ weight

    @staticmethod
    def backward(ctx: object, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_output, None


# --- batch norm's grouping: a network applied to views, {view: (N, ...)} to {view: (N, d)} ---


def forward_per_view(network: nn.Module, views: dict[int, Tensor]) -> dict[int, Tensor]:
    """Apply a network to each view in its own call, so that each has its own statistics.

    This is what SimSiam's authors do. Batch norm that is synchronized on CPUs gets all views in one
    call and keeps them apart, so that processes wait for each other less often.

    Args:
        network: The network.
        views: Its inputs, one tensor (N, ...) for each view.

    Returns:
        Its outputs, (N, d) for each view.
    """
    if synchronizes_on_cpu(network):
        with separate_views(network, len(views)):
            return forward_joint(network, views)
    return {view: network(x) for view, x in views.items()}


def forward_joint(network: nn.Module, views: dict[int, Tensor]) -> dict[int, Tensor]:
    """Apply a network to all views in one call, so that they share their statistics.

    Args:
        network: The network.
        views: Its inputs, one tensor (N, ...) for each view.

    Returns:
        Its outputs, (N, d) for each view.
    """
    return dict(zip(views, network(torch.cat(list(views.values()))).chunk(len(views)), strict=True))


def forward_split(network: nn.Module, views: dict[int, Tensor]) -> dict[int, Tensor]:
    """Apply a network to each eighth of each view: 8 GPUs whose batch norm is not synchronized.

    Of N processes each has 8 / N of the eighths, so that 2, 4 or 8 compute what one computes.

    Args:
        network: The network.
        views: Its inputs, one tensor (N, ...) for each view.

    Returns:
        Its outputs, (N, d) for each view.
    """
    splits = BN_SPLITS // world_size()
    return {
        view: torch.cat([network(part) for part in x.tensor_split(splits)])
        for view, x in views.items()
    }


def forward_by_size(
    forward_views: Callable[[nn.Module, dict[int, Tensor]], dict[int, Tensor]],
    network: nn.Module,
    views: dict[int, Tensor],
) -> dict[int, Tensor]:
    """Apply a network to the views of each size apart: crops of one size are one batch (SwAV, 3.2).

    Args:
        forward_views: One of BN_GROUPINGS.
        network: The network.
        views: Views, (N, C, H, W) each; small crops come last.

    Returns:
        Its outputs, (N, d) for each view.
    """
    results: dict[int, Tensor] = {}
    for size in dict.fromkeys(view.shape[-1] for view in views.values()):
        of_size = {i: view for i, view in views.items() if view.shape[-1] == size}
        results |= forward_views(network, of_size)
    return results


BN_GROUPINGS: dict[str, Callable[[nn.Module, dict[int, Tensor]], dict[int, Tensor]]]
BN_GROUPINGS = {"per_view": forward_per_view, "joint": forward_joint, "split": forward_split}
