"""How the target t, the paper's eta, is solved (section 5). A target sees the views x and the projections z.

`forward` is pure; what a target remembers between steps moves in `after_step`.
"""

from torch import Tensor, nn


class Shared(nn.Module):
    """The encoder's own projections: one step of the alternation that section 5.1 describes."""

    def forward(self, x: list[Tensor], z: list[Tensor]) -> list[Tensor]:
        return z

    def after_step(self) -> None:
        """Nothing to move: the target is the encoder itself."""


TARGETS = {"shared": Shared}
