"""The heads: f's projector and the predictor h, both plain MLPs (section 3)."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from simsiam.errors import UsageError
from simsiam.methods import Method


def mlp(widths: Sequence[int], *, hidden_bn: bool, out_bn: bool, out_affine: bool = True) -> nn.Sequential:
    """Fully-connected layers (N, widths[0]) to (N, widths[-1]), ReLU between them and none after the last.

    A layer has a bias exactly where no batch norm follows it: the norm would take the bias away again.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        bn = out_bn if i == last else hidden_bn
        layers.append(nn.Linear(fan_in, fan_out, bias=not bn))
        if bn:
            layers.append(nn.BatchNorm1d(fan_out, affine=i < last or out_affine))
        if i < last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def projector(method: Method, dim: int) -> nn.Sequential:
    """h (N, dim) to z (N, d): `proj_layers` layers, hidden ones `proj_hidden` wide."""
    if method.output_bn_affine and "proj_out" not in method.head_bn:
        raise UsageError("output_bn_affine needs a batch norm on the projector's output: add proj_out to head_bn")
    return mlp(
        [dim, *[method.proj_hidden] * (method.proj_layers - 1), method.dim],
        hidden_bn="proj_hidden" in method.head_bn,
        out_bn="proj_out" in method.head_bn,
        out_affine=method.output_bn_affine,
    )


def predictor(method: Method) -> nn.Module:
    """z (N, d) to p (N, d): the two-layer bottleneck, the identity for "none", without gradient for "fixed"."""
    if method.predictor == "none":
        return nn.Identity()
    bn = {"hidden_bn": "pred_hidden" in method.head_bn, "out_bn": "pred_out" in method.head_bn}
    head = mlp([method.dim, method.pred_dim, method.dim], **bn)
    return head.requires_grad_(method.predictor != "fixed")
