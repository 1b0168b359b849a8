"""The gradients of one step: Algorithm 1 from the views to the backward pass."""

from collections.abc import Sequence
from copy import copy, deepcopy

import torch
from torch import Tensor, nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.views import compile_works
from simsiam.distributed.collectives import wrap_ddp
from simsiam.distributed.process_group import world_size
from simsiam.errors import WorkFailed
from simsiam.model.precision import Compute
from simsiam.model.siamese import Output, Siamese
from simsiam.training.prepare import TrainingSetup
from simsiam.utils.devices import device_traits

CPU = torch.device("cpu")
# Relative difference between the loss and the gradients of two devices that rounding may cause.
FLOAT32_TOLERANCE = 1e-3
# Before a graph is recorded: libraries choose their kernels in the first steps.
GRAPH_WARMUP_STEPS = 3


class GradientStep:
    """Computes the gradients of a batch's loss; they replace those that the parameters had.

    On CUDA the thousands of small kernels of a step are recorded once as a CUDA graph and then
    launched as one: the same kernels in the same order, so the results have the same bits. With
    several processes, whose gradients are averaged during the backward pass, kernels are launched
    one by one.

    Args:
        network: The model, perhaps wrapped for several processes.
        compute: Device and precision.
    """

    def __init__(self, network: nn.Module, compute: Compute):
        self.network, self.compute = network, compute
        self.graph: torch.cuda.CUDAGraph | None = None
        record = compute.device.type == "cuda" and world_size() == 1
        self.warmup_calls_left = GRAPH_WARMUP_STEPS if record else -1  # -1: never record
        self.trusted = device_traits(compute.device).trusted

    def __call__(self, views: Sequence[Tensor], index: Tensor, weight: float = 1.0) -> Output:
        """Compute the loss of a batch and its gradients.

        Args:
            views: One tensor (N, C, H, W) for each view, normalized, on the device.
            index: Positions (N,) of the images in the training set, int64.
            weight: Factor of the loss.

        Returns:
            What the network computed, detached. On CUDA it is valid until the next call.

        Raises:
            WorkFailed: The device is not trusted, and the first step differs from that of the CPU.
        """
        if not self.trusted:
            self.trusted = True
            return self._compare_with_cpu(views, index, weight)
        if self.warmup_calls_left:
            self.warmup_calls_left -= self.warmup_calls_left > 0
            return self.compute_gradients(views, index, weight)
        if self.graph is None:
            self.static_inputs = [view.clone() for view in views], index.clone()
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: the thread of a data loader may pin memory meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.static_output = self.compute_gradients(*self.static_inputs, weight)
        for static, new in zip(
            [*self.static_inputs[0], self.static_inputs[1]], [*views, index], strict=True
        ):
            static.copy_(new)
        self.graph.replay()
        return self.static_output

    def _compare_with_cpu(self, views: Sequence[Tensor], index: Tensor, weight: float) -> Output:
        """Compute the gradients on the CPU as well: they differ by rounding, or the device errs."""
        on_cpu = GradientStep(deepcopy(self.network).cpu(), Compute(CPU, "float32"))
        expected = on_cpu.compute_gradients([view.cpu() for view in views], index.cpu(), weight)
        output = self.compute_gradients(views, index, weight)
        pairs = [(output.loss, expected.loss)]
        for own, other in zip(self.network.parameters(), on_cpu.network.parameters(), strict=True):
            if own.grad is not None and other.grad is not None:
                pairs.append((own.grad, other.grad))
        a, b = (torch.cat([x.cpu().flatten() for x in column]) for column in zip(*pairs))
        difference = ((a - b).norm() / b.norm()).item()
        if not difference < FLOAT32_TOLERANCE:
            raise WorkFailed(
                f"the first step on {self.compute.device.type} differs from that on the CPU by "
                f"{100 * difference:.2g} %, which is more than rounding: use --device cpu"
            )
        return output

    def compute_gradients(self, views: Sequence[Tensor], index: Tensor, weight: float) -> Output:
        """Do the same without a graph."""
        with self.compute.autocast():
            output = self.network(*views, index=index)
        self.network.zero_grad()
        (weight * output.loss).backward()
        return Output(
            output.loss.detach(), *([x.detach() for x in of_views] for of_views in output[1:])
        )


def build_gradient_step(recipe: ResolvedRecipe, setup: TrainingSetup) -> GradientStep:
    """Build the gradient step of a run.

    Args:
        recipe: The recipe; `compile` asks for a compiled backbone.
        setup: Model, device and precision.

    Returns:
        The gradient step.
    """
    network = compile_backbone(setup.model) if recipe.compile else setup.model
    return GradientStep(wrap_ddp(network), setup.compute)


def compile_backbone(model: Siamese) -> Siamese:
    """Return the model with its backbone compiled, sharing all weights.

    The backbone takes nearly all of the time, and is compiled once for all views.

    Args:
        model: The model.

    Returns:
        A copy with the same parameters; the model itself where torch.compile does not work.
    """
    if not compile_works(next(model.parameters()).device):
        return model
    fast = copy(model)
    backbone: nn.Module = torch.compile(model.backbone)  # type: ignore[assignment]
    fast._modules = {**model._modules, "backbone": backbone}
    return fast
