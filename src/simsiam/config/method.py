"""The columns of METHODS: everything that a method consists of, with SimSiam's value (section 3) as the default.

The letters are the paper's: x a view, h the backbone's feature, z = f(x) the projection, p the prediction, t the
target; D(p, t) is what a row minimises. Plain data; loads no torch.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from simsiam.errors import UsageError, check_ranges

HeadBN = Literal["proj_hidden", "proj_out", "pred_hidden", "pred_out"]
TargetType = Literal["shared", "momentum", "alternation", "moving_average", "expectation", "labels"]
Pairs = Literal["symmetric", "asymmetric", "asymmetric_2x", "single"]

# The terms of the loss, each (view of p, view of t); views are counted from 0 (section 4.6).
PAIRS = {
    "symmetric": ((0, 1), (1, 0)),
    "asymmetric": ((0, 1),),
    "asymmetric_2x": ((0, 1), (2, 3)),
    "single": ((0, 0),),
}
BN_SPLITS = 8  # of a batch whose batch norm is "split": MoCo's GPUs
SECOND_ENCODER_TARGETS = ("momentum", "alternation")  # targets that are a second encoder


@dataclass(frozen=True, kw_only=True)
class Views:
    """How one view x is made from an image (appendix A). A probability of 0 switches an operation off."""

    crop_min: float = (
        0.2  # smallest share of the image's area that a crop keeps; the largest is 1 (A)
    )
    flip: float = 0.5  # probability of a horizontal flip (A)
    jitter: tuple[float, float, float, float] = (
        0.4,
        0.4,
        0.4,
        0.1,
    )  # brightness, contrast, saturation, hue (A)
    jitter_p: float = 0.8  # probability of the color jitter (A)
    gray: float = 0.2  # probability of turning gray (A)
    blur: float = 0.5  # probability of a Gaussian blur (the authors' code; the paper gives none)
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # its standard deviation in pixels of the view (A)
    solarize: float = 0.0  # probability of solarizing; 0 in SimSiam, BYOL's second view uses it

    def __post_init__(self) -> None:
        check_ranges(
            self,
            crop_min=(0.01, 1),
            flip=(0, 1),
            jitter_p=(0, 1),
            gray=(0, 1),
            blur=(0, 1),
            solarize=(0, 1),
        )
        check_ranges(self, jitter=(0, 2), blur_sigma=(0, 100))


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of Figure 3. A row says only what is its own; the defaults are SimSiam's."""

    name: str
    # f = backbone + projector. Hidden width 2048 whatever the backbone and whatever `dim` (section 3).
    dim: int = 2048  # d, the width of z and p (appendix B)
    proj_layers: int = 3  # fc layers of the projector; 2 for CIFAR (appendix D)
    proj_hidden: int = 2048  # width of its hidden layers
    # h, the predictor.
    predictor: Literal["mlp", "none", "fixed"] = (
        "mlp"  # none: Table 1a; fixed at its random initialization: 1b
    )
    pred_dim: int = 512  # width of its hidden layer, the bottleneck (appendix B)
    predictor_lr: Literal["constant", "cosine"] = (
        "constant"  # constant from section 4.3 on (Table 1c)
    )
    predictor_lr_scale: float = 1.0  # times the encoder's peak lr (footnote 2 tries 10 on BYOL)
    # Both heads.
    head_bn: tuple[HeadBN, ...] = (
        "proj_hidden",
        "proj_out",
        "pred_hidden",
    )  # layers with batch norm (Table 3)
    output_bn_affine: bool = False  # affine in f's output BN: 68.1 with, 68.2 without (section 4.4)
    output_bias: bool = True  # a bias in a head's last layer, where no batch norm follows it
    bn: Literal["per_view", "joint", "split"] = (
        "per_view"  # whose statistics: a view's, all views', an eighth's (MoCo)
    )
    # t, the target.
    target: TargetType = "shared"  # how t, the paper's eta, is solved (section 5)
    target_decay: float | None = (
        None  # m of momentum (else 0.99, BYOL's) or moving_average (else 0.8, section 5.2)
    )
    target_schedule: Literal["constant", "cosine"] = (
        "constant"  # of momentum's m; cosine takes it to 1 (BYOL)
    )
    target_steps: int = (
        1  # alternation: steps between two solutions for eta, 0 for an epoch; 1 is SimSiam (5.2)
    )
    target_views: int = 1  # expectation: views that eta is the mean over; 1 is SimSiam (equation 9)
    stop_gradient: bool = True  # t is a constant (equation 3)
    # The loss: `loss_scale` times the mean of D(p_i, t_j) over `pairs`.
    criterion: str = "cosine"  # D: cosine (1), cross_entropy (4.5), nt_xent, info_nce, swapped, barlow_twins, vicreg
    loss_scale: float = 1.0  # matters to weight decay, and to parameters that LARS does not adapt
    pairs: Pairs = "symmetric"  # views (1,2) and (2,1); (1,2); (1,2) and (3,4); one view and its label (section 4.6)
    tau: float = 0.1  # temperature of nt_xent, info_nce and swapped
    queue: int = 65536  # info_nce: past targets that serve as negatives
    barlow_lambda: float = 5e-3  # barlow_twins: weight of the correlations off the diagonal
    vicreg_weights: tuple[float, float, float] = (
        25.0,
        25.0,
        1.0,
    )  # vicreg: invariance, variance, covariance
    prototypes: int = 3000  # swapped: clusters
    prototype_norm: Literal["inside", "outside"] = (
        "inside"  # swapped: of the gradient (footnote 8), or as in SwAV
    )
    freeze_prototypes: int = 313  # swapped: steps before the prototypes move
    sinkhorn_epsilon: float = 0.05  # swapped: softness of the codes
    sinkhorn_iterations: int = 3  # swapped: rounds of balancing them
    # How a batch becomes views; the last recipe serves every later view.
    views: tuple[Views, ...] = (Views(),)
    # How the weights move (section 3).
    optimizer: Literal["sgd", "lars", "adamw"] = (
        "sgd"  # no large-batch optimizer is needed (section 3)
    )
    base_lr: float = 0.05  # peak lr = base_lr * batch_size / 256
    momentum: float = 0.9  # of the optimizer; AdamW's first beta
    weight_decay: float = 1e-4  # on every parameter, BN and biases too (A)
    exclude: Literal["none", "bias_and_norm"] = (
        "none"  # from weight decay and from LARS's adaptation (A)
    )
    warmup_epochs: int = (
        0  # linear; 10 for batches of 1024 and more (Table 2) and without BN (Table 3a)
    )

    def __post_init__(self) -> None:
        check_ranges(
            self, dim=(1, inf), proj_layers=(1, 100), proj_hidden=(1, inf), pred_dim=(1, inf)
        )
        check_ranges(
            self,
            target_decay=(0, 1),
            target_steps=(0, inf),
            target_views=(1, inf),
            loss_scale=(1e-30, 1e30),
        )
        check_ranges(
            self,
            tau=(1e-6, 1e30),
            queue=(1, inf),
            barlow_lambda=(0, 1e30),
            vicreg_weights=(0, 1e30),
        )
        check_ranges(self, prototypes=(1, inf), freeze_prototypes=(0, inf))
        check_ranges(self, sinkhorn_epsilon=(1e-3, 1e30), sinkhorn_iterations=(1, inf))
        check_ranges(
            self,
            base_lr=(0, 1e30),
            momentum=(0, 1),
            weight_decay=(0, 1e30),
            predictor_lr_scale=(0, 1e30),
        )
        check_ranges(self, warmup_epochs=(0, inf))
        if self.target in SECOND_ENCODER_TARGETS and not self.stop_gradient:
            raise UsageError(
                f"stop_gradient is off and target is {self.target}: a second encoder gets no gradient. "
                "Leave stop_gradient on, or take target shared"
            )
        if self.pairs == "asymmetric_2x" and self.criterion in ("barlow_twins", "vicreg"):
            raise UsageError(
                f"pairs is asymmetric_2x (section 4.6) and {self.criterion} has no direction to leave out: "
                "take pairs asymmetric, which is the whole of it, and a larger batch"
            )
        if (self.target == "labels") != (self.criterion == "classification"):
            raise UsageError(
                f"target is {self.target} and criterion {self.criterion}: labels and classification go together"
            )
        if self.pairs == "single" and self.target != "labels":
            raise UsageError(
                "pairs single compares one view with its image's label: take target labels or other pairs"
            )
        if self.target == "moving_average" and self.criterion == "swapped":
            raise UsageError(
                "a moving_average is one of z, and swapped's targets are codes: take target shared"
            )

    @property
    def view_count(self) -> int:
        """Views of each image that a step takes."""
        return (
            1
            + max(map(max, PAIRS[self.pairs]))
            + (self.target_views - 1) * (self.target == "expectation")
        )

    @property
    def decay(self) -> float:
        """m, the share of the past that the target keeps."""
        default = {"momentum": 0.99, "moving_average": 0.8}.get(self.target, 0.0)
        return default if self.target_decay is None else self.target_decay


# Cells that say something only where another cell has one of these values; to ask for them elsewhere is a mistake.
SETTING_CONDITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "target_decay": ("target", ("momentum", "moving_average")),
    "target_schedule": ("target", ("momentum",)),
    "target_steps": ("target", ("alternation",)),
    "target_views": ("target", ("expectation",)),
    "tau": ("criterion", ("nt_xent", "info_nce", "swapped")),
    "queue": ("criterion", ("info_nce",)),
    "barlow_lambda": ("criterion", ("barlow_twins",)),
    "vicreg_weights": ("criterion", ("vicreg",)),
    **dict.fromkeys(
        (
            "prototypes",
            "prototype_norm",
            "freeze_prototypes",
            "sinkhorn_epsilon",
            "sinkhorn_iterations",
        ),
        ("criterion", ("swapped",)),
    ),
}
# What `equal_terms` takes from the simsiam row, so that two rows differ in the method alone (appendix D).
EQUAL_TERMS = (
    "views",
    "optimizer",
    "base_lr",
    "momentum",
    "weight_decay",
    "exclude",
    "warmup_epochs",
)
