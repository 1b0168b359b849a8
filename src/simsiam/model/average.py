"""A moving average of the encoder's weights, for evaluation."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn

from simsiam.model.siamese import Siamese


class WeightAverage(nn.Module):
    """An average of backbone and projector over the steps (Polyak averaging); no gradient moves it.

    After n steps the average keeps the fraction min(decay, (n - 1) / n) of itself and takes the
    rest from the weights. So it is the mean over all steps at first, and does not remember the
    initial weights. Batch norm's running statistics are averaged in the same way.

    Attributes:
        backbone: Images (N, C, H, W) to h (N, dim).
        projector: h to z (N, d). The names in the state dict are those of `Siamese`.
    """

    def __init__(self, model: Siamese, decay: float):
        """Copy the weights of a model.

        Args:
            model: The model.
            decay: The largest share of its old value that the average keeps in a step.
        """
        super().__init__()
        self.decay = decay
        self.backbone, self.projector = deepcopy((model.backbone, model.projector))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Siamese, step: int) -> None:
        """Include the weights after a step of the optimizer.

        Args:
            model: The model.
            step: The step, counted from 0.
        """
        share = 1 - min(self.decay, step / (step + 1))
        pairs = zip(_tensors(self), _tensors(model), strict=True)
        for average, new in pairs:
            if average.is_floating_point():
                average.lerp_(new, share)
            else:
                average.copy_(new)  # of batch norm: the number of steps

    def checkpoint(self, model: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds: the average, where whoever reads it looks for weights.

        Args:
            model: State dict of the model.

        Returns:
            "model", with the average, and "trained", what it replaces.
        """
        average = self.state_dict()
        return {"model": {**model, **average}, "trained": {k: model[k] for k in average}}

    def load_checkpoint(self, model: Mapping[str, Tensor]) -> None:
        """Load the average from what a checkpoint calls the model.

        Args:
            model: "model" of `checkpoint`.
        """
        self.load_state_dict({name: model[name] for name in self.state_dict()})


def _tensors(model: "Siamese | WeightAverage") -> Iterator[Tensor]:
    parts = (model.backbone, model.projector)
    return chain.from_iterable(chain(part.parameters(), part.buffers()) for part in parts)
