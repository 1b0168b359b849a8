"""The map of view noise: a linear map after which the noise of random views is white.

Two views of one image should have the same feature h; what differs between them is noise. Its
covariance Sw, averaged over images, is estimated from several views of each image. The map

    t(h) = L^-1 (h - mean),  with  L L' = Sw + shrinkage * tr(Sw) / d * I

divides every direction by its noise. It is the linear case of what the method asks for: what views
share is kept, what differs between them is removed (docs/closed_form.md compares the two). Image
retrieval knows it as whitening learned from matching pairs (Mikolajczyk & Matas, 2007; Radenovic
et al., 2018), speaker recognition as within-class covariance normalization (Hatch et al., 2006).
"""

import torch
from torch import Tensor, nn


def view_noise_covariance(h: Tensor) -> Tensor:
    """Estimate the covariance of view noise.

    Args:
        h: (images, views, d), features of several views of each image; at least 2 views.

    Returns:
        Sw (d, d) in float64: the mean over images of the unbiased covariance around the image's
        mean.
    """
    images, views, _ = h.shape
    covariance = h.new_zeros(h.shape[2], h.shape[2], dtype=torch.float64)
    for part in h.split(512):
        noise = (part - part.mean(1, keepdim=True)).flatten(0, 1).double()
        covariance += noise.T @ noise
    return covariance / (images * (views - 1))


def fit_map(mean: Tensor, covariance: Tensor, shrinkage: float) -> nn.Linear:
    """Make the map that whitens view noise.

    Args:
        mean: (d,), the mean feature of the training images.
        covariance: Sw (d, d), from `view_noise_covariance`.
        shrinkage: Weight of the isotropic part, relative to the mean of Sw's diagonal; 0 whitens
            exactly.

    Returns:
        A linear layer from d to d, without gradient. L is Cholesky's root, the fastest one; every
        other root gives the same features up to a rotation, so the same cosines.

    Raises:
        torch.linalg.LinAlgError: The shrinkage is 0 and a direction has no noise.
    """
    covariance = covariance.double()
    isotropic = shrinkage * covariance.diagonal().mean()
    root = torch.linalg.cholesky(covariance + isotropic * torch.eye(len(mean)))
    identity = torch.eye(len(mean), dtype=torch.float64)
    return make_linear(mean, torch.linalg.solve_triangular(root, identity, upper=False))


def center(mean: Tensor) -> nn.Linear:
    """Make the map that subtracts the mean and changes nothing else.

    Args:
        mean: (d,).

    Returns:
        A linear layer from d to d.
    """
    return make_linear(mean, torch.eye(len(mean), dtype=torch.float64))


def make_linear(mean: Tensor, matrix: Tensor) -> nn.Linear:
    """Make the linear layer h -> (h - mean) matrix.T, in float32 and without gradient.

    Args:
        mean: (d,).
        matrix: (d_out, d).

    Returns:
        The layer.
    """
    linear = nn.utils.skip_init(nn.Linear, matrix.shape[1], matrix.shape[0])
    with torch.no_grad():
        linear.weight.copy_(matrix)
        linear.bias.copy_(-(matrix @ mean.double()))
    return linear.requires_grad_(False)
