"""The encoder that a run hands over: its backbone and what was fitted after it."""

import torch
from torch import Tensor, nn

from simsiam.model.backbones import feature_dim
from simsiam.model.precision import at_least_float32, without_autocast


class Encoder(nn.Module):
    """A backbone, a linear map of its features, and a second branch of patches.

    Every part but the backbone may be missing. The maps compute in at least float32: they stretch
    directions in which features hardly vary, where bfloat16 has too few digits.

    Attributes:
        backbone: The backbone.
        head: The map of its features; None leaves them as they are.
        patches: The second branch, which is given the same images; None if there is none.
        patches_head: The map of its features.
        dim: The width of the result.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear | None = None,
        patches: nn.Module | None = None,
        patches_head: nn.Linear | None = None,
    ):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.patches, self.patches_head = patches, patches_head
        self.dim = _out_dim(backbone, head)
        if patches is not None:
            self.dim += _out_dim(patches, patches_head)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features of normalized images.

        Args:
            x: (N, C, H, W).

        Returns:
            (N, dim); the features of the second branch come last.
        """
        h = _apply(self.head, self.backbone(x))
        if self.patches is None:
            return h
        return torch.cat([h, _apply(self.patches_head, self.patches(x))], dim=1)

    def head_state(self) -> dict[str, Tensor]:
        """Return the state dict without the backbone: the content of head.safetensors."""
        state = self.state_dict()
        return {name: state[name] for name in state if not name.startswith("backbone.")}


def _out_dim(network: nn.Module, head: nn.Linear | None) -> int:
    return feature_dim(network) if head is None else head.out_features


def _apply(head: nn.Linear | None, h: Tensor) -> Tensor:
    if head is None:
        return h
    with without_autocast(h):
        return head(at_least_float32(h))
