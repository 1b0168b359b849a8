"""D(p, t): what a pair of views pays for disagreeing. Each criterion is one function of p and t, both (N, d)."""

import torch.nn.functional as F
from torch import Tensor


def precise(x: Tensor) -> Tensor:
    """x in at least float32: losses are not computed in bfloat16, and float64 is not lowered."""
    return x if x.element_size() >= 4 else x.float()


def negative_cosine(p: Tensor, t: Tensor) -> Tensor:
    """Equation 1: minus the cosine of p and t, averaged over the batch; from -1 to 1, about 0 for unrelated vectors."""
    return -F.cosine_similarity(precise(p), precise(t), dim=1).mean()


CRITERIA = {"cosine": negative_cosine}
