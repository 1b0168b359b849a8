"""What SimSiam arrives at when everything is linear, beside the map of view noise.

    python benchmarks/linear_method.py

Views are x = s + n with a signal s that they share and noise n of their own, Gaussian with known
covariances. Gradient descent on the linear method (squared error, predictor P, stop-gradient,
weight decay) is compared with its stationary points, which docs/closed_form.md derives.
"""

import torch
from torch import Tensor

DECAY = 0.01  # weight decay of encoder and predictor
STEPS, LR, STARTS = 30_000, 0.05, 10


def descend(signal: Tensor, noise: Tensor, *, decay: float = DECAY, seed: int = 0) -> Tensor:
    """Train a linear encoder W and predictor P by gradient descent on the expected loss.

    The loss is E |P W x1 - sg(W x2)|^2 / 2; its gradients are those of the covariances, without
    sampling.

    Args:
        signal: (d, d), covariance of what views share.
        noise: (d, d), covariance of what differs.
        decay: Weight decay.
        seed: Seed of the initial weights.

    Returns:
        W (d, d).
    """
    d, generator = len(signal), torch.Generator().manual_seed(seed)
    w, p = (
        torch.eye(d, dtype=torch.float64)
        + 0.1 * torch.randn(d, d, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    for _ in range(STEPS):
        error = p @ w @ (signal + noise) - w @ signal  # gradient with respect to P W
        p, w = p - LR * (error @ w.T + decay * p), w - LR * (p.T @ error + decay * w)
    return w


def predicted_gain(signal: Tensor, noise: Tensor, decay: float = DECAY) -> Tensor:
    """Return the stable stationary gain of each direction; 0 where weight decay wins.

    Args:
        signal: (d,), variance of the signal.
        noise: (d,), variance of the noise.
        decay: Weight decay.
    """
    total = signal + noise
    discriminant = signal.square() - 4 * decay * total
    return torch.where(
        discriminant > 0, (signal + discriminant.clamp(min=0).sqrt()) / (2 * total), 0
    )


def main() -> None:
    """Print the table of docs/closed_form.md."""
    signal = torch.tensor([1.0, 1.0, 1.0, 0.25, 0.25, 0.05], dtype=torch.float64)
    noise = torch.tensor([0.1, 1.0, 4.0, 0.02, 0.25, 0.01], dtype=torch.float64)
    # The gain of a direction is the length of its image: W is found up to a rotation on the left.
    starts = range(STARTS)
    gains = torch.stack([descend(signal.diag(), noise.diag(), seed=k).norm(dim=0) for k in starts])
    survived = gains > 1e-3
    trained = (gains * survived).sum(0) / survived.sum(0).clamp(min=1)
    print(
        f"| signal | noise | reliability | gain by descent | of {STARTS} starts | predicted | map |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    predicted = predicted_gain(signal, noise)
    rows = zip(signal, noise, trained, survived.sum(0), predicted, strict=True)
    for s, n, gain, count, expected in rows:
        print(
            f"| {s:.2f} | {n:.2f} | {s / (s + n):.3f} | {gain:.3f} | {count} | {expected:.3f} "
            f"| {n.rsqrt():.2f} |"
        )


if __name__ == "__main__":
    main()
