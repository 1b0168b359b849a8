"""Which images to label next: those that would teach most, uncertain and typical of their region.

With few labels, the predictions say little; then the queue covers the regions of the features that
no label is near to. The more labels there are, the more it asks about images that the predictions
are unsure of.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simsiam.embeddings.cluster import center_and_normalize
from simsiam.explore.arrangement import measure_density

QUEUE_LENGTH = 24  # images in the queue
MAX_CANDIDATES = 5000  # images that the queue is chosen from
SHARPNESS = 4.0  # how strongly an image counts that is near to another


class Teacher:
    """Chooses the images to label next.

    Args:
        vectors: Features of all images, (N, d).
    """

    def __init__(self, vectors: Tensor):
        self.x = center_and_normalize(vectors)
        self.density = measure_density(self.x)

    def choose(
        self, labeled: Sequence[int], confidence: np.ndarray | None, count: int = QUEUE_LENGTH
    ) -> list[int]:
        """Choose images, the most useful first.

        Each image is worth what it says about others: the sum over all candidates of their
        uncertainty, weighted by how near they are and not yet covered by a label or by an image
        earlier in the queue.

        Args:
            labeled: Positions of the images with a label.
            confidence: (N,) the probability of the predicted class of each image; None without
                predictions.
            count: The number of images to choose.

        Returns:
            Positions of images without a label.
        """
        is_open = np.ones(len(self.x), bool)
        is_open[list(labeled)] = False
        rows = np.flatnonzero(is_open)
        if len(rows) > MAX_CANDIDATES:
            rows = np.random.default_rng(len(labeled)).choice(rows, MAX_CANDIDATES, replace=False)
        if not len(rows):
            return []
        x = self.x[rows]
        near = (x @ x.T).clamp(min=0) ** SHARPNESS
        weight = torch.ones(len(rows))
        if confidence is not None:
            weight = torch.from_numpy(1 - confidence[rows]).float() + 0.02
        covered = torch.zeros(len(rows))
        if len(labeled):
            covered = ((x @ self.x[list(labeled)].T).clamp(min=0) ** SHARPNESS).amax(1)
        chosen = list[int]()
        for _ in range(min(count, len(rows))):
            gain = (near - covered).clamp(min=0) @ weight
            gain[chosen] = -1
            best = int(gain.argmax())
            chosen.append(best)
            covered = torch.maximum(covered, near[:, best])
        return [int(rows[i]) for i in chosen]
