"""Projectors and predictors in checkpoints of other programs: their layers, and their method."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from simsiam.config.method import HeadBN
from simsiam.config.methods import METHODS, Method
from simsiam.errors import UsageError
from simsiam.runs.checkpoints.layouts import Layout


class ParsedHead(NamedTuple):
    """An MLP in a checkpoint.

    Attributes:
        names: The names of this package, and the checkpoint's for each.
        widths: The dimensions of its input and of each layer's output.
        has_bn: Whether a batch norm follows, for each layer.
        last_bn_affine: Whether the last batch norm has affine parameters.
        biases: Names of running means, and the bias that each absorbs.
        out_bias: Whether the last layer has a bias, if no batch norm follows it.
    """

    names: dict[str, str]
    widths: list[int]
    has_bn: list[bool]
    last_bn_affine: bool
    biases: dict[str, str]
    out_bias: bool


def parse_heads(
    tensors: Mapping[str, Tensor], layout: Layout
) -> tuple[Layout, dict[str, ParsedHead], Method, list[str]]:
    """Parse the heads of a checkpoint.

    A projector that no method here has is left over, unless its layout says which it must be: the
    backbone can be used without it.

    Args:
        tensors: The tensors of the checkpoint.
        layout: Its layout.

    Returns:
        The layout, without a projector that is left over; the heads by name; the method; notes.

    Raises:
        UsageError: The heads of an exact layout have another form than its program makes.
    """
    try:
        heads = {part: parse_head(tensors, prefix) for part, prefix in layout.heads.items()}
        method = method_from_heads(layout, heads)
    except UsageError as error:
        if layout.exact:
            raise
        layout = layout._replace(projector="")
        return layout, {}, method_from_heads(layout, {}), [f"the projector is left over: {error}"]
    assumed = "the layers of the projector are assumed to have ReLU between them"
    return layout, heads, method, [] if layout.exact else [assumed]


def parse_head(tensors: Mapping[str, Tensor], prefix: str) -> ParsedHead:
    """Parse the MLP under a prefix: layers and batch norms in the order of the numbers in names.

    Args:
        tensors: The tensors of the checkpoint.
        prefix: The prefix of the head.

    Returns:
        Its tensors and dimensions.

    Raises:
        UsageError: It has a module that is neither a fully connected layer nor a batch norm.
    """
    layers = _used_layers(_pair_layers(tensors, prefix), tensors)
    names: dict[str, str] = {}
    biases: dict[str, str] = {}
    position = 0  # in the Sequential of this package
    for fc, bn in layers:
        if bn and "bias" in fc:
            biases[f"{position + 1}.running_mean"] = fc["bias"]
        names |= {
            f"{position}.{leaf}": name for leaf, name in fc.items() if not bn or leaf != "bias"
        }
        names |= {f"{position + 1}.{leaf}": name for leaf, name in bn.items()}
        position += 3 if bn else 2  # the ReLU has a position too
    shapes = [tensors[fc["weight"]].shape for fc, _ in layers]
    widths = [shapes[0][1], *(shape[0] for shape in shapes)]
    has_bn = [bool(bn) for _, bn in layers]
    last_fc, last_bn = layers[-1]
    return ParsedHead(names, widths, has_bn, "weight" in last_bn, biases, "bias" in last_fc)


# The names of the tensors of a fully connected layer and of the batch norm after it, by what they
# are ("weight", "bias", ...); {} if there is no batch norm.
_Layer = tuple[dict[str, str], dict[str, str]]


def _pair_layers(tensors: Mapping[str, Tensor], prefix: str) -> list[_Layer]:
    """List the layers of a head in order, each with the batch norm after it."""
    modules: dict[str, dict[str, str]] = {}
    for name in tensors:
        if name.startswith(prefix):
            path, _, leaf = name.rpartition(".")
            modules.setdefault(path, {})[leaf] = name

    def order(path: str) -> tuple[list[int], bool]:
        # fc0 and bn0 have the same number: the batch norm is the second.
        numbers = [int(n) for n in re.findall(r"\d+", path[len(prefix) :])]
        return numbers, "running_mean" in modules[path]

    layers: list[_Layer] = []
    for path in sorted(modules, key=order):
        module = modules[path]
        if "running_mean" in module and layers and not layers[-1][1]:
            layers[-1] = (layers[-1][0], module)
        elif "weight" in module and tensors[module["weight"]].ndim == 2:
            layers.append((module, {}))
        else:
            raise UsageError(
                f"{path} is neither a fully connected layer nor a batch norm after one"
            )
    return layers


def _used_layers(layers: list[_Layer], tensors: Mapping[str, Tensor]) -> list[_Layer]:
    """Leave out layers that are stored but not part of the network (PatrickHua's layer2).

    Their batch norm has counted no batch, while that of another layer has.
    """
    counters = [
        bool(tensors[bn["num_batches_tracked"]].any()) if "num_batches_tracked" in bn else None
        for _, bn in layers
    ]
    if True not in counters:
        return layers
    return [layer for layer, counted in zip(layers, counters) if counted is not False]


def method_from_heads(layout: Layout, heads: Mapping[str, ParsedHead]) -> Method:
    """Make a row of methods with the heads of a checkpoint.

    It is the row of SimSiam under the name of the layout's method. Only its heads come from the
    checkpoint: a converted MoCo has no key encoder and no queue, so its training cannot continue.

    Args:
        layout: The layout.
        heads: The heads, by name.

    Returns:
        The row; without heads, its name is "none".

    Raises:
        UsageError: No method can have such heads.
    """
    row = replace(METHODS["simsiam"], name=layout.method)
    if not heads:
        return row
    projector, predictor = heads["projector"], heads.get("predictor")
    hidden = set(zip(projector.widths[1:-1], projector.has_bn[:-1]))
    if len(hidden) > 1 or (predictor and len(predictor.has_bn) != 2):
        widths = ["-".join(map(str, head.widths)) for head in heads.values()]
        raise UsageError(
            f"no method has such heads: layers of {' and '.join(widths)}, batch norm after some"
        )
    has_bn: dict[HeadBN, bool] = {
        "proj_hidden": any(projector.has_bn[:-1]),
        "proj_out": projector.has_bn[-1],
    }
    row = replace(
        row,
        dim=projector.widths[-1],
        proj_layers=len(projector.has_bn),
        output_bn_affine=projector.last_bn_affine,
        output_bias=layout.out_bias if layout.exact else projector.has_bn[-1] or projector.out_bias,
        predictor="none",
    )
    for width, _ in hidden:
        row = replace(row, proj_hidden=width)
    if predictor:
        has_bn |= {"pred_hidden": predictor.has_bn[0], "pred_out": predictor.has_bn[1]}
        row = replace(row, predictor="mlp", pred_dim=predictor.widths[1])
    return replace(row, head_bn=tuple(name for name, present in has_bn.items() if present))


def check_biases(
    layout: Layout, heads: Mapping[str, ParsedHead], biases: Mapping[str, str]
) -> None:
    """Check that the biases are there that the layout has before batch norms.

    Without such a bias, the running mean of the batch norm would be wrong.

    Args:
        layout: The layout.
        heads: The heads, by name.
        biases: The biases that were found before batch norms.

    Raises:
        UsageError: Some are missing.
    """
    num_norms = sum(sum(head.has_bn) for head in heads.values())
    required = {"no": 0, "out": 1, "all": num_norms}[layout.bias_before_bn]
    if len(biases) < required:
        raise UsageError(
            f"{layout.program} has {required} biases before batch norms, and here are {len(biases)}"
        )


def absorb_biases(
    model_state: dict[str, Tensor], biases: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Absorb biases into the running means of the batch norms after them.

    With running mean m, BN(Wx + b) equals BN(Wx) with running mean m - b; in training mode, the
    mean of the batch removes b.

    Args:
        model_state: The renamed state dict, which is changed.
        biases: Names of running means in it, and the key of the bias that each absorbs.
        tensors: The tensors of the checkpoint.

    Raises:
        UsageError: A bias has another shape than the running mean.
    """
    for mean, key in biases.items():
        bias, running_mean = tensors[key], model_state[mean]
        if bias.shape != running_mean.shape:
            raise UsageError(
                f"{key} is {format_shape(bias)} before a batch norm of {format_shape(running_mean)}"
            )
        model_state[mean] = (running_mean.double() - bias.double()).to(running_mean.dtype)


def format_shape(tensor: Tensor) -> str:
    """Format the shape of a tensor for an error.

    Args:
        tensor: The tensor.
    """
    return str(tuple(tensor.shape))
