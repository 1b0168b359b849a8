"""A step's gradients: Algorithm 1 from the views to the backward pass, and how one GPU is kept busy with it."""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor, nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.views import compile_works
from simsiam.distributed.collectives import wrap_ddp
from simsiam.distributed.process_group import world_size
from simsiam.model.precision import Compute
from simsiam.model.siamese import Output, Siamese
from simsiam.training.prepare import TrainingSetup

GRAPH_WARMUP_STEPS = (
    3  # steps before a graph is recorded: libraries load and choose their kernels in the first ones
)


class GradientStep:
    """Call it with a batch's views and index: the gradients of its loss replace those that the parameters had.

    What the network made is returned, cut off from autograd; on CUDA it is good until the next call. There the
    thousands of small kernels of a step are recorded once, as a CUDA graph, and from then on launched as one: the same
    kernels in the same order, so the same bits. Several processes, whose gradients meet on the way, launch them singly.
    """

    def __init__(self, network: nn.Module, compute: Compute):
        self.network, self.compute = network, compute
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warmup_calls_left = (
            GRAPH_WARMUP_STEPS if compute.device.type == "cuda" and world_size() == 1 else -1
        )  # calls until it is recorded; -1: for ever

    def __call__(self, views: Sequence[Tensor], index: Tensor, weight: float = 1.0) -> Output:
        if self.warmup_calls_left:
            self.warmup_calls_left -= self.warmup_calls_left > 0
            return self.compute_gradients(views, index, weight)
        if self.graph is None:
            self.static_inputs = [view.clone() for view in views], index.clone()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                self.graph, capture_error_mode="thread_local"
            ):  # a loader's thread pins memory
                self.static_output = self.compute_gradients(*self.static_inputs, weight)
        for mine, new in zip(
            [*self.static_inputs[0], self.static_inputs[1]], [*views, index], strict=True
        ):
            mine.copy_(new)
        self.graph.replay()
        return self.static_output

    def compute_gradients(self, views: Sequence[Tensor], index: Tensor, weight: float) -> Output:
        with self.compute.autocast():
            output = self.network(*views, index=index)
        self.network.zero_grad()
        (weight * output.loss).backward()
        return Output(
            output.loss.detach(), *([x.detach() for x in of_views] for of_views in output[1:])
        )


def build_gradient_step(recipe: ResolvedRecipe, setup: TrainingSetup) -> GradientStep:
    """A run's way to its gradients."""
    network = compile_backbone(setup.model) if recipe.compile else setup.model
    return GradientStep(wrap_ddp(network), setup.compute)


def compile_backbone(model: Siamese) -> Siamese:
    """The same model, its weights too, with the kernels that torch.compile makes of its backbone; itself where none.

    The backbone takes nearly all of the time, and is compiled once for all views.
    """
    if not compile_works(next(model.parameters()).device):
        return model
    fast = copy(model)
    fast._modules = {**model._modules, "backbone": torch.compile(model.backbone)}  # type: ignore[dict-item]
    return fast
