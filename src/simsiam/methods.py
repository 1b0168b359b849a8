"""Siamese methods are rows of one table (the paper's Figure 3), and an ablation is a row with one cell replaced.

`Method` names the columns and METHODS holds the rows. The letters are the paper's: x a view, h the backbone's feature,
z = f(x) the projection, p the prediction, t the target; D(p, t) is what a row minimises. This file is pure data and
loads no torch.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from simsiam.errors import within

HeadBN = Literal["proj_hidden", "proj_out", "pred_hidden", "pred_out"]


@dataclass(frozen=True, kw_only=True)
class Views:
    """How one view x is made from an image (appendix A). A probability of 0 switches an operation off."""

    crop_min: float = 0.2  # smallest share of the image's area that a crop keeps; the largest is 1 (A)
    flip: float = 0.5  # probability of a horizontal flip (A)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue (A)
    jitter_p: float = 0.8  # probability of the color jitter (A)
    gray: float = 0.2  # probability of turning gray (A)
    blur: float = 0.5  # probability of a Gaussian blur (the authors' code; the paper gives none)
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # its standard deviation in pixels of the view (A)
    solarize: float = 0.0  # probability of solarizing; 0 in SimSiam, BYOL's second view uses it

    def __post_init__(self) -> None:
        within(self, crop_min=(0.01, 1), flip=(0, 1), jitter_p=(0, 1), gray=(0, 1), blur=(0, 1), solarize=(0, 1))
        within(self, jitter=(0, 2), blur_sigma=(0, 100))


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of Figure 3. Defaults are the paper's baseline (section 3), so a row says only what is its own."""

    name: str
    # f = backbone + projector. Hidden width 2048 whatever the backbone and whatever `dim` (section 3).
    dim: int = 2048  # d, the width of z and p (appendix B)
    proj_layers: int = 3  # fc layers of the projector; 2 for CIFAR (appendix D)
    proj_hidden: int = 2048  # width of its hidden layers
    # h, the predictor.
    predictor: Literal["mlp", "none", "fixed"] = "mlp"  # none: Table 1a; fixed at its random initialization: 1b
    pred_dim: int = 512  # width of its hidden layer, the bottleneck (appendix B)
    predictor_lr: Literal["constant", "cosine"] = "constant"  # constant from section 4.3 on (Table 1c)
    predictor_lr_scale: float = 1.0  # times the encoder's peak lr (footnote 2 tries 10 on BYOL)
    head_bn: tuple[HeadBN, ...] = ("proj_hidden", "proj_out", "pred_hidden")  # layers with batch norm (Table 3)
    output_bn_affine: bool = False  # affine in f's output BN: 68.1 with, 68.2 without (section 4.4)
    # The loss: the mean of D(p_i, t_j) over `pairs`.
    criterion: Literal["cosine"] = "cosine"  # D (equation 1)
    target: Literal["shared"] = "shared"  # how t, the paper's eta, is solved (section 5)
    stop_gradient: bool = True  # t is a constant (equation 3)
    pairs: Literal["symmetric", "asymmetric"] = "symmetric"  # (1,2) and (2,1), or (1,2) alone (section 4.6)
    # How a batch becomes views; the last recipe serves every later view.
    views: tuple[Views, ...] = (Views(),)
    # How the weights move (section 3).
    optimizer: Literal["sgd"] = "sgd"  # no large-batch optimizer is needed (section 3)
    base_lr: float = 0.05  # peak lr = base_lr * batch_size / 256
    momentum: float = 0.9  # of the optimizer
    weight_decay: float = 1e-4  # on every parameter, BN and biases too (A)
    warmup_epochs: int = 0  # linear; 10 for batches of 1024 and more (Table 2) and without BN (Table 3a)

    def __post_init__(self) -> None:
        within(self, dim=(1, inf), proj_layers=(1, 100), proj_hidden=(1, inf), pred_dim=(1, inf))
        within(
            self,
            warmup_epochs=(0, inf),
            base_lr=(0, 1e30),
            momentum=(0, 1),
            weight_decay=(0, 1e30),
            predictor_lr_scale=(0, 1e30),
        )


METHODS: dict[str, Method] = {
    "simsiam": Method(name="simsiam"),
}

FIGURE_3 = (
    "name",
    "predictor",
    "target",
    "stop_gradient",
    "criterion",
    "pairs",
)  # the columns in which rows differ most


def table() -> str:
    """METHODS as text, a line for each row, in the columns of Figure 3."""
    rows = [FIGURE_3, *(tuple(str(getattr(row, column)) for column in FIGURE_3) for row in METHODS.values())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
