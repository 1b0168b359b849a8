"""A step's gradients: Algorithm 1 from the views to the backward pass, and how one GPU is kept busy with it."""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor, nn

from simsiam.config.recipes import Recipe
from simsiam.data.views import compiles
from simsiam.distributed.collectives import parallel
from simsiam.distributed.process_group import count
from simsiam.model.precision import autocast
from simsiam.model.siamese import Output, Siamese
from simsiam.training.prepare import Parts

WARM = 3  # steps before a graph is recorded: libraries load and choose their kernels in the first ones


class Gradients:
    """Call it with a batch's views and index: the gradients of its loss replace those that the parameters had.

    What the network made is returned, cut off from autograd; on CUDA it is good until the next call. There the
    thousands of small kernels of a step are recorded once, as a CUDA graph, and from then on launched as one: the same
    kernels in the same order, so the same bits. Several processes, whose gradients meet on the way, launch them singly.
    """

    def __init__(self, network: nn.Module, device: torch.device, precision: str):
        self.network, self.device, self.precision = network, device, precision
        self.graph: torch.cuda.CUDAGraph | None = None
        self.waits = WARM if device.type == "cuda" and count() == 1 else -1  # calls until it is recorded; -1: for ever

    def __call__(self, views: Sequence[Tensor], index: Tensor, weight: float = 1.0) -> Output:
        if self.waits:
            self.waits -= self.waits > 0
            return self.computed(views, index, weight)
        if self.graph is None:
            self.given = [view.clone() for view in views], index.clone()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # a loader's thread pins memory
                self.made = self.computed(*self.given, weight)
        for mine, new in zip([*self.given[0], self.given[1]], [*views, index], strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.made

    def computed(self, views: Sequence[Tensor], index: Tensor, weight: float) -> Output:
        with autocast(self.device, self.precision):
            output = self.network(*views, index=index)
        self.network.zero_grad()
        (weight * output.loss).backward()
        return Output(output.loss.detach(), *([x.detach() for x in of_views] for of_views in output[1:]))


def gradients_of(recipe: Recipe, parts: Parts) -> Gradients:
    """A run's way to its gradients."""
    network = compiled(parts.model) if recipe.compile else parts.model
    return Gradients(parallel(network), parts.device, parts.precision)


def compiled(model: Siamese) -> Siamese:
    """The same model, its weights too, with the kernels that torch.compile makes of its backbone; itself where none.

    The backbone takes nearly all of the time, and is compiled once for all views.
    """
    if not compiles(next(model.parameters()).device):
        return model
    fast = copy(model)
    fast._modules = {**model._modules, "backbone": torch.compile(model.backbone)}  # type: ignore[dict-item]
    return fast
