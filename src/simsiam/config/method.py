"""What a method consists of: the fields of `Method`, with SimSiam's values (section 3) as defaults.

The letters are the paper's: x is a view, h the backbone's feature, z = f(x) the projection, p the
prediction, t the target; D(p, t) is the loss that a method minimizes. Plain data; loads no torch.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from simsiam.config.settings import setting
from simsiam.errors import UsageError, check_ranges

HeadBN = Literal["proj_hidden", "proj_out", "pred_hidden", "pred_out"]
Pairs = Literal["symmetric", "asymmetric", "asymmetric_2x", "single"]

# Names that come with this package, for help and messages. What is allowed is decided by the tables
# model.targets.TARGETS and model.losses.CRITERIA, which users may extend.
BUILTIN_TARGETS = (
    "shared", "momentum", "alternation", "moving_average", "expectation", "labels",
)  # fmt: skip
BUILTIN_CRITERIA = (
    "cosine", "cross_entropy", "nt_xent", "info_nce", "swapped", "barlow_twins", "vicreg",
    "classification",
)  # fmt: skip
SECOND_ENCODER_TARGETS = ("momentum", "alternation")  # targets that a second encoder computes

# The terms of the loss, each (view of p, view of t). Views are counted from 0 (section 4.6).
PAIRS = {
    "symmetric": ((0, 1), (1, 0)),
    "asymmetric": ((0, 1),),
    "asymmetric_2x": ((0, 1), (2, 3)),
    "single": ((0, 0),),
}
BN_SPLITS = 8  # parts of a batch with batch norm "split": the number of GPUs that MoCo uses


@dataclass(frozen=True, kw_only=True)
class Views:
    """How one view x is made from an image (appendix A). Probability 0 turns an operation off."""

    crop_min: float = setting(
        0.2, "smallest area of a crop, as a fraction of the image; the largest is 1 (appendix A)"
    )
    flip: float = setting(0.5, "probability of a horizontal flip (appendix A)")
    jitter: tuple[float, float, float, float] = setting(
        (0.4, 0.4, 0.4, 0.1),
        "strength of the color jitter: brightness, contrast, saturation, hue (appendix A)",
    )
    jitter_p: float = setting(0.8, "probability of the color jitter (appendix A)")
    gray: float = setting(0.2, "probability of conversion to gray (appendix A)")
    blur: float = setting(
        0.5, "probability of a Gaussian blur (from the authors' code; the paper gives none)"
    )
    blur_sigma: tuple[float, float] = setting(
        (0.1, 2.0),
        "smallest and largest standard deviation of the blur, in pixels of the view (appendix A)",
    )
    solarize: float = setting(
        0.0, "probability of solarization; SimSiam does not use it, BYOL's second view does"
    )

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        probability = (0, 1)
        check_ranges(self, crop_min=(0.01, 1), flip=probability, jitter_p=probability)
        check_ranges(self, gray=probability, blur=probability, solarize=probability)
        check_ranges(self, jitter=(0, 2), blur_sigma=(0, 100))


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of Figure 3. The defaults are SimSiam's, so a row gives only what differs."""

    name: str
    # The encoder f is the backbone and the projector.
    dim: int = setting(2048, "d, the width of z and p (appendix B)")
    proj_layers: int = setting(3, "fc layers of the projector; 2 for CIFAR-10 (appendix D)")
    proj_hidden: int = setting(
        2048, "width of the projector's hidden layers, whatever the backbone and d (section 3)"
    )
    # The predictor h.
    predictor: Literal["mlp", "none", "fixed"] = setting(
        "mlp",
        "mlp, none (Table 1a), or fixed at its random initialization (Table 1b)",
    )
    pred_dim: int = setting(
        512, "width of the predictor's hidden layer, the bottleneck (appendix B)"
    )
    predictor_lr: Literal["constant", "cosine"] = setting(
        "constant", "schedule of the predictor's lr; constant from section 4.3 on (Table 1c)"
    )
    predictor_lr_scale: float = setting(
        1.0, "the predictor's peak lr, relative to the encoder's (footnote 2 tries 10 on BYOL)"
    )
    # Both heads.
    head_bn: tuple[HeadBN, ...] = setting(
        ("proj_hidden", "proj_out", "pred_hidden"),
        "layers of the heads with batch norm (Table 3)",
    )
    output_bn_affine: bool = setting(
        False,
        "scale and shift in the projector's output batch norm: 68.1 with, 68.2 without "
        "(section 4.4)",
    )
    output_bias: bool = setting(
        True, "a bias in the last layer of each head, if no batch norm follows it"
    )
    bn: Literal["per_view", "joint", "split"] = setting(
        "per_view",
        "images that share batch norm's statistics: those of one view, all views together, or "
        "an eighth of the batch (MoCo)",
    )
    # The target t.
    target: str = setting(
        "shared", f"how the target t (eta in section 5) is computed: {', '.join(BUILTIN_TARGETS)}"
    )
    target_decay: float | None = setting(
        None,
        "momentum, moving_average: m, the share of the old value that is kept "
        "[0.99 (BYOL); 0.8 (section 5.2)]",
    )
    target_schedule: Literal["constant", "cosine"] = setting(
        "constant", "momentum: schedule of m; cosine raises it to 1 (BYOL)"
    )
    target_steps: int = setting(
        1,
        "alternation: steps between two updates of eta; 0 is an epoch, 1 is SimSiam (section 5.2)",
    )
    target_views: int = setting(
        1, "expectation: number of views that eta averages over; 1 is SimSiam (equation 9)"
    )
    stop_gradient: bool = setting(True, "treat t as a constant (equation 3)")
    # The loss: `loss_scale` times the mean of D(p_i, t_j) over `pairs`.
    criterion: str = setting(
        "cosine", f"the loss D: {', '.join(BUILTIN_CRITERIA)} (cosine: equation 1)"
    )
    loss_scale: float = setting(
        1.0,
        "factor of the loss; matters for weight decay and for parameters that LARS does not adapt",
    )
    pairs: Pairs = setting(
        "symmetric",
        "pairs of views in the loss: (1,2) and (2,1); (1,2); (1,2) and (3,4); or one view and its "
        "label (section 4.6)",
    )
    tau: float = setting(0.1, "nt_xent, info_nce, swapped: temperature")
    queue: int = setting(65536, "info_nce: number of past targets used as negatives")
    barlow_lambda: float = setting(5e-3, "barlow_twins: weight of the off-diagonal correlations")
    vicreg_weights: tuple[float, float, float] = setting(
        (25.0, 25.0, 1.0), "vicreg: weights of invariance, variance and covariance"
    )
    prototypes: int = setting(3000, "swapped: number of prototypes")
    prototype_norm: Literal["inside", "outside"] = setting(
        "inside",
        "swapped: normalize prototypes inside the gradient (footnote 8) or outside (SwAV)",
    )
    freeze_prototypes: int = setting(313, "swapped: steps before the prototypes are trained")
    sinkhorn_epsilon: float = setting(0.05, "swapped: smoothness of the codes")
    sinkhorn_iterations: int = setting(3, "swapped: iterations that balance the codes")
    # How a batch becomes views. The last entry is used for every later view.
    views: tuple[Views, ...] = (Views(),)
    # How the weights are updated (section 3).
    optimizer: Literal["sgd", "lars", "adamw"] = setting(
        "sgd", "the optimizer; SimSiam does not need lars, even for large batches (section 3)"
    )
    base_lr: float = setting(0.05, "the peak lr is base_lr * batch_size / 256")
    momentum: float = setting(0.9, "momentum of the optimizer; the first beta of AdamW")
    weight_decay: float = setting(
        1e-4, "weight decay of every parameter, with biases and batch norm (appendix A)"
    )
    exclude: Literal["none", "bias_and_norm"] = setting(
        "none", "parameters without weight decay and LARS adaptation (appendix A)"
    )
    warmup_epochs: int = setting(
        0,
        "epochs of linear warmup; 10 for batches of 1024 and more (Table 2) and without batch "
        "norm (Table 3a)",
    )

    def __post_init__(self) -> None:
        """Check the ranges of all fields, and refuse settings that contradict each other."""
        self._check_ranges()
        if self.target in SECOND_ENCODER_TARGETS and not self.stop_gradient:
            raise UsageError(
                f"stop_gradient is off and target is {self.target}: "
                "a second encoder gets no gradient. Use stop_gradient or target shared"
            )
        if self.pairs == "asymmetric_2x" and self.criterion in ("barlow_twins", "vicreg"):
            raise UsageError(
                f"pairs is asymmetric_2x (section 4.6), and {self.criterion} is symmetric already: "
                "use pairs asymmetric and a larger batch"
            )
        if (self.target == "labels") != (self.criterion == "classification"):
            raise UsageError(
                f"target is {self.target} and criterion is {self.criterion}: "
                "target labels and criterion classification go together"
            )
        if self.pairs == "single" and self.target != "labels":
            raise UsageError(
                "pairs single compares a view with the label of its image: "
                "use target labels or other pairs"
            )
        if self.target == "moving_average" and self.criterion == "swapped":
            raise UsageError(
                "target moving_average averages z, and the targets of swapped are codes: "
                "use target shared"
            )

    def _check_ranges(self) -> None:
        count, weight, width = (1, inf), (0, 1e30), (1, inf)
        check_ranges(self, dim=width, proj_layers=(1, 100), proj_hidden=width, pred_dim=width)
        check_ranges(self, target_decay=(0, 1), target_steps=(0, inf), target_views=count)
        check_ranges(self, loss_scale=(1e-30, 1e30), tau=(1e-6, 1e30), queue=count)
        check_ranges(self, barlow_lambda=weight, vicreg_weights=weight)
        check_ranges(self, prototypes=count, freeze_prototypes=(0, inf))
        check_ranges(self, sinkhorn_epsilon=(1e-3, 1e30), sinkhorn_iterations=count)
        check_ranges(self, base_lr=weight, momentum=(0, 1), weight_decay=weight)
        check_ranges(self, predictor_lr_scale=weight, warmup_epochs=(0, inf))

    @property
    def view_count(self) -> int:
        """Number of views of each image in a step."""
        extra = self.target_views - 1 if self.target == "expectation" else 0
        return 1 + max(map(max, PAIRS[self.pairs])) + extra

    @property
    def decay(self) -> float:
        """The value of m: the share of its old value that the target keeps."""
        default = {"momentum": 0.99, "moving_average": 0.8}.get(self.target, 0.0)
        return default if self.target_decay is None else self.target_decay


# Settings that have an effect only if another setting has one of these values.
_SWAPPED = ("criterion", ("swapped",))
SETTING_CONDITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "target_decay": ("target", ("momentum", "moving_average")),
    "target_schedule": ("target", ("momentum",)),
    "target_steps": ("target", ("alternation",)),
    "target_views": ("target", ("expectation",)),
    "tau": ("criterion", ("nt_xent", "info_nce", "swapped")),
    "queue": ("criterion", ("info_nce",)),
    "barlow_lambda": ("criterion", ("barlow_twins",)),
    "vicreg_weights": ("criterion", ("vicreg",)),
    "prototypes": _SWAPPED,
    "prototype_norm": _SWAPPED,
    "freeze_prototypes": _SWAPPED,
    "sinkhorn_epsilon": _SWAPPED,
    "sinkhorn_iterations": _SWAPPED,
}
# Settings that `equal_terms` copies from simsiam, so that only the method differs (appendix D).
EQUAL_TERMS = (
    "views", "optimizer", "base_lr", "momentum", "weight_decay", "exclude", "warmup_epochs",
)  # fmt: skip


def check_setting_conditions(method: Method, names: set[str]) -> None:
    """Refuse settings that have no effect, because the target or the criterion does not use them.

    A target or criterion that is not part of this package may use any setting.

    Args:
        method: The method, with these settings.
        names: Names of the settings that the user has given.

    Raises:
        UsageError: One of the settings has no effect.
    """
    for name in sorted(names & SETTING_CONDITIONS.keys()):
        owner, values = SETTING_CONDITIONS[name]
        value = getattr(method, owner)
        if value in (*BUILTIN_TARGETS, *BUILTIN_CRITERIA) and value not in values:
            raise UsageError(
                f"{name} has no effect here: it belongs to {owner} {' or '.join(values)}, "
                f"not to {value}"
            )
