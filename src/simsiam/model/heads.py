"""The heads: f's projector and the predictor h, both plain MLPs (section 3); and who shares batch norm's statistics."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from simsiam.config.method import BN_SPLITS, Method
from simsiam.distributed.process_group import world_size
from simsiam.distributed.sync_batch_norm import SyncBatchNorm, per_view_statistics
from simsiam.errors import UsageError


def mlp(
    widths: Sequence[int],
    *,
    hidden_bn: bool,
    out_bn: bool,
    out_affine: bool = True,
    out_bias: bool = True,
) -> nn.Sequential:
    """Fully-connected layers (N, widths[0]) to (N, widths[-1]), ReLU between them and none after the last.

    A layer has a bias exactly where no batch norm follows it: the norm would take the bias away again. Without
    `out_bias` the last layer has none in any case.
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
    """h (N, dim) to z (N, d): `proj_layers` layers, hidden ones `proj_hidden` wide."""
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
    """z (N, d) to p (N, d): the two-layer bottleneck, the identity for "none", without gradient for "fixed"."""
    if method.predictor == "none":
        return nn.Identity()
    bn = {"hidden_bn": "pred_hidden" in method.head_bn, "out_bn": "pred_out" in method.head_bn}
    head = mlp([method.dim, method.pred_dim, method.dim], out_bias=method.output_bias, **bn)
    return head.requires_grad_(method.predictor != "fixed")


# --- what a batch is to batch norm: a network applied to views, {view: (N, ...)} to {view: (N, d)} ---


def forward_per_view(network: nn.Module, views: dict[int, Tensor]) -> dict[int, Tensor]:
    """A call for each view, so batch norm's statistics are each view's own, as in SimSiam's code.

    Synchronized, on a CPU, batch norm keeps the views of one call apart, and processes wait for each other less often.
    """
    synchronized = any(isinstance(module, SyncBatchNorm) for module in network.modules())
    if synchronized and not any(x.is_cuda for x in views.values()):
        with per_view_statistics(len(views)):
            return forward_joint(network, views)
    return {view: network(x) for view, x in views.items()}


def forward_joint(network: nn.Module, views: dict[int, Tensor]) -> dict[int, Tensor]:
    """One call for all views, so they share their statistics."""
    return dict(zip(views, network(torch.cat(list(views.values()))).chunk(len(views)), strict=True))


def forward_split(network: nn.Module, views: dict[int, Tensor]) -> dict[int, Tensor]:
    """A call for each eighth of each view: what 8 GPUs compute that do not synchronize batch norm.

    Of several processes each has its part of the eighths, so that 2, 4 and 8 of them compute what one does.
    """
    parts = BN_SPLITS // world_size()
    return {
        view: torch.cat([network(part) for part in x.tensor_split(parts)])
        for view, x in views.items()
    }


BN_GROUPINGS: dict[str, Callable[[nn.Module, dict[int, Tensor]], dict[int, Tensor]]]
BN_GROUPINGS = {"per_view": forward_per_view, "joint": forward_joint, "split": forward_split}
