"""The encoder that a run hands over: its backbone and what was fitted after it."""

import torch
import torch.nn.functional as F
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
        patches_weight: How much their cosine counts; None if features are joined as they are.
        dim: The width of the result.
    """

    patches_weight: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear | None = None,
        patches: nn.Module | None = None,
        patches_head: nn.Linear | None = None,
        patches_weight: float | None = None,
    ):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.patches, self.patches_head = patches, patches_head
        weight = None if patches_weight is None else torch.tensor(patches_weight)
        self.register_buffer("patches_weight", weight)
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
        return join_features(h, _apply(self.patches_head, self.patches(x)), self.patches_weight)

    def head_state(self) -> dict[str, Tensor]:
        """Return the state dict without the backbone: the content of head.safetensors."""
        state = self.state_dict()
        return {name: state[name] for name in state if not name.startswith("backbone.")}


def join_features(h: Tensor, p: Tensor, weight: Tensor | float | None) -> Tensor:
    """Put the features of a network and of patches side by side.

    Args:
        h: (N, d), of the network.
        p: (N, e), of the patches.
        weight: How much the cosine of p counts beside that of h: cosines of the result are
            (cos h + weight * cos p) / (1 + weight). None leaves both as they are.

    Returns:
        (N, d + e).
    """
    if weight is None:
        return torch.cat([h, p], dim=1)
    h, p = (F.normalize(at_least_float32(x), dim=1) for x in (h, p))
    return torch.cat([h, weight**0.5 * p], dim=1)


def _out_dim(network: nn.Module, head: nn.Linear | None) -> int:
    return feature_dim(network) if head is None else head.out_features


def _apply(head: nn.Linear | None, h: Tensor) -> Tensor:
    if head is None:
        return h
    with without_autocast(h):
        return head(at_least_float32(h))
