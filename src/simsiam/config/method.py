"""What a method consists of: the fields of `Method`, with SimSiam's values (section 3) as defaults.

x is a view, h the backbone's feature, z the projector's output, p the predictor's output, t the
target, and D(p, t) the loss that a method minimizes. x, z, p and D are the paper's letters. In the
paper h is the predictor, and t is eta (section 5). Plain data; loads no torch.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from simsiam.config.settings import setting
from simsiam.errors import UsageError, check_ranges

MAX_PARAMETERS = 2**29  # of a network whose widths are settings: 2 GiB
MAX_WIDTH = 2**16  # of a layer
MAX_TARGET_VIEWS = 1000

HeadBN = Literal["proj_hidden", "proj_out", "pred_hidden", "pred_out"]
Pairs = Literal["symmetric", "asymmetric", "asymmetric_2x", "single"]

# Names that come with this package, each with its meaning, for help and messages: help must not
# load torch. What is allowed is decided by the tables model.targets.TARGETS and
# model.losses.CRITERIA, which users may extend; a test compares the names.
BUILTIN_TARGETS = {
    "shared": "z of the same encoder, as in SimSiam",
    "momentum": "z of a second encoder, the moving average of the first",
    "alternation": "z of an earlier copy of the encoder, section 5.2",
    "moving_average": "an exponential moving average of the image's z over the epochs, section 5.2",
    "expectation": "the mean of z over several views, equation 9",
    "teacher": "the image's feature of a frozen network, --teacher",
    "kmeans": "the image's cluster, found by k-means before each epoch (DeepCluster)",
    "labels": "the image's label",
}
BUILTIN_CRITERIA = {
    "cosine": "equation 1",
    "cross_entropy": "section 4.5",
    "nt_xent": "SimCLR",
    "info_nce": "MoCo",
    "swapped": "SwAV",
    "barlow_twins": "Barlow Twins",
    "vicreg": "VICReg",
    "classification": "cross-entropy with labels or clusters",
}
CLASS_TARGETS = ("labels", "kmeans")  # targets that are numbers of classes
FIXED_TARGETS = ("labels", "teacher")  # that training does not change, so that none can collapse
# Targets that an image has, not a view: its only view can be compared with them.
PER_IMAGE_TARGETS = ("moving_average", "teacher", *CLASS_TARGETS)
SECOND_ENCODER_TARGETS = ("momentum", "alternation")  # targets that a second encoder computes

# The terms of the loss, each (view of p, view of t). Views are counted from 0 (section 4.6).
PAIRS = {
    "symmetric": ((0, 1), (1, 0)),
    "asymmetric": ((0, 1),),
    "asymmetric_2x": ((0, 1), (2, 3)),
    "single": ((0, 0),),
}
BN_SPLITS = 8  # parts of a batch with batch norm "split": the number of GPUs that MoCo uses


def _list_meanings(names: dict[str, str]) -> str:
    return "; ".join(f"{name} ({meaning})" for name, meaning in names.items())


@dataclass(frozen=True, kw_only=True)
class Views:
    """How one view x is made from an image (appendix A). Probability 0 turns an operation off."""

    crop_min: float = setting(
        0.2, "smallest area of a random crop, as a fraction of the image's area (appendix A)"
    )
    crop_max: float = setting(
        1.0, "largest area of a random crop, as a fraction of the image's area (appendix A)"
    )
    flip: float = setting(0.5, "probability of a horizontal flip (appendix A)")
    jitter: tuple[float, float, float, float] = setting(
        (0.4, 0.4, 0.4, 0.1),
        "strength of the color jitter: brightness, contrast, saturation, hue (appendix A)",
    )
    jitter_p: float = setting(0.8, "probability of the color jitter (appendix A)")
    gray: float = setting(0.2, "probability of conversion to gray (appendix A)")
    blur: float = setting(
        0.5,
        "probability of a Gaussian blur (value of the authors' code; the paper does not give it)",
    )
    blur_sigma: tuple[float, float] = setting(
        (0.1, 2.0),
        "smallest and largest standard deviation of the blur, in pixels of the view (appendix A)",
    )
    solarize: float = setting(
        0.0,
        "probability of solarization, which inverts bright pixels (used by BYOL, not by SimSiam)",
    )
    interpolation: Literal["bilinear", "bicubic"] = setting(
        "bilinear",
        "how crops are resized, with antialiasing: bilinear is torchvision's default; the codes of "
        "BYOL, SimCLR, Barlow Twins and VICReg use bicubic",
    )

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        probability = (0, 1)
        check_ranges(self, crop_min=(0.01, 1), crop_max=(0.01, 1), flip=probability)
        check_ranges(self, jitter_p=probability, gray=probability, blur=probability)
        check_ranges(self, solarize=probability, jitter=(0, 2), blur_sigma=(0, 100))
        if self.crop_min > self.crop_max:
            raise UsageError(
                f"crop_min is {self.crop_min:g} and crop_max {self.crop_max:g}: "
                "crop_max must not be smaller"
            )


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of Figure 3. The defaults are SimSiam's; another method sets what differs."""

    name: str
    # The encoder f is the backbone and the projector.
    dim: int = setting(2048, "output width of projector and predictor (d in appendix B)")
    proj_layers: int = setting(3, "linear layers of the projector; 2 for CIFAR-10 (appendix D)")
    proj_hidden: int = setting(2048, "width of the projector's hidden layers (section 3)")
    # The predictor h.
    predictor: Literal["mlp", "none", "fixed", "direct"] = setting(
        "mlp",
        "mlp: two layers; none: no predictor (Table 1a); fixed: its random weights are not trained "
        "(Table 1b); direct: one matrix, computed from the correlations of z (DirectPred)",
    )
    direct_power: float = setting(
        0.5,
        "with --predictor direct: power of the eigenvalues of the correlations; 0.5: DirectPred "
        "(Tian et al., 2021); 1: DirectCopy (Wang et al., 2021)",
    )
    direct_epsilon: float = setting(
        0.1, "with --predictor direct: what is added to each eigenvalue of the matrix"
    )
    direct_decay: float = setting(
        0.3, "with --predictor direct: share of the old correlations that each step keeps"
    )
    iso_loss: bool = setting(
        False,
        "with --predictor direct: z gets the gradient of p, so that all eigenspaces learn at one "
        "rate (IsoLoss, Halvagal et al., 2023)",
    )
    pred_dim: int = setting(512, "width of the predictor's hidden layer, a bottleneck (appendix B)")
    predictor_lr: Literal["constant", "cosine"] = setting(
        "constant", "schedule of the predictor's lr; Table 1 compares the two"
    )
    predictor_lr_scale: float = setting(
        1.0, "peak lr of the predictor divided by that of backbone and projector"
    )
    predictor_weight_decay: float | None = setting(
        None, "weight decay of the predictor [that of the other parts]"
    )
    # Both heads.
    head_bn: tuple[HeadBN, ...] = setting(
        ("proj_hidden", "proj_out", "pred_hidden"),
        "layers of projector and predictor that have batch norm (Table 3)",
    )
    output_bn_affine: bool = setting(
        False,
        "learn scale and shift in the batch norm of the projector's output; the paper's ImageNet "
        "accuracy is 68.1% with them, 68.2% without (section 4.4)",
    )
    output_bias: bool = setting(
        True, "bias in the last layer of projector and predictor, unless batch norm follows"
    )
    bn: Literal["per_view", "joint", "split"] = setting(
        "per_view",
        "what batch norm computes its statistics over: per_view: the batch of each view; joint: "
        "all views together; split: each eighth of a view's batch, as on MoCo's 8 GPUs",
    )
    # The target t.
    target: str = setting("shared", f"the target of the loss: {_list_meanings(BUILTIN_TARGETS)}")
    target_decay: float | None = setting(
        None,
        "with --target momentum or moving_average: share of the old value that each update keeps "
        "[momentum: 0.99 (BYOL); moving_average: 0.8 (section 5.2)]",
    )
    target_fresh: bool = setting(
        True,
        "with --target moving_average: the average includes this step's z (footnote 5); off: it is "
        "the one before, as in a memory bank (instance discrimination)",
    )
    target_schedule: Literal["constant", "cosine"] = setting(
        "constant",
        "with --target momentum: --target-decay is constant, or rises to 1 (cosine, BYOL)",
    )
    target_steps: int = setting(
        1,
        "with --target alternation: steps between two updates of the copy; 0: one epoch; "
        "1: the same as SimSiam (section 5.2)",
    )
    target_views: int = setting(
        1,
        "with --target expectation: number of views to average over; 1: the same as SimSiam "
        "(equation 9)",
    )
    stop_gradient: bool = setting(
        True, "treat the target as a constant, so that it gets no gradient (equation 3)"
    )
    # The loss: `loss_scale` times the mean of D(p_i, t_j) over `pairs`.
    criterion: str = setting("cosine", f"the loss: {_list_meanings(BUILTIN_CRITERIA)}")
    loss_scale: float = setting(
        1.0,
        "factor of the loss, and so of its gradient; weight decay is not multiplied. With adamw "
        "it hardly changes the size of a step; with lars it changes only the steps of parameters "
        "that --exclude names",
    )
    pairs: Pairs = setting(
        "symmetric",
        "pairs (view of the prediction, view of the target) in the loss. symmetric: (1,2), (2,1); "
        "asymmetric: (1,2); asymmetric_2x: (1,2), (3,4) (section 4.6); single: one view and what "
        "its image has: a label, cluster, moving average or a teacher's feature",
    )
    num_views: int = setting(
        2,
        "views of each image; with more than 2, each view (with pairs asymmetric the first alone) "
        "is compared with the mean target of all others (FastSiam)",
    )
    small_crops: int = setting(
        0,
        "views of each image that are small crops, added to the others: they predict the targets "
        "of the other views and give none (multi-crop, section 3.2 of SwAV)",
    )
    small_crop_size: int | None = setting(
        None,
        "with --small-crops: side of a small crop in pixels [3/7 of image_size, as 96 of 224]",
    )
    small_crop_scale: tuple[float, float] = setting(
        (0.05, 0.14),
        "with --small-crops: smallest and largest area of a small crop, as a fraction of the "
        "image's area",
    )
    tau: float = setting(0.1, "with --criterion nt_xent, info_nce or swapped: temperature")
    queue: int = setting(
        65536,
        "with --criterion info_nce: number of past targets used as negatives; with --target "
        "moving_average they are drawn from the averages of all images",
    )
    barlow_lambda: float = setting(
        5e-3, "with --criterion barlow_twins: weight of the off-diagonal correlations"
    )
    vicreg_weights: tuple[float, float, float] = setting(
        (25.0, 25.0, 1.0),
        "with --criterion vicreg: weights of invariance, variance and covariance",
    )
    prototypes: int = setting(3000, "with --criterion swapped: number of prototypes")
    prototype_norm: Literal["inside", "outside"] = setting(
        "inside",
        "with --criterion swapped: normalize the prototypes in the forward pass, with gradients "
        "(inside, footnote 8), or after each step, without gradients (outside, SwAV)",
    )
    freeze_prototypes: int = setting(
        313, "with --criterion swapped: train the prototypes only after this many steps"
    )
    sinkhorn_epsilon: float = setting(
        0.05, "with --criterion swapped: Sinkhorn's epsilon; larger values give softer codes"
    )
    sinkhorn_iterations: int = setting(3, "with --criterion swapped: number of Sinkhorn iterations")
    # How a batch becomes views. The last entry is used for every later view.
    views: tuple[Views, ...] = (Views(),)
    # How the weights are updated (section 3).
    optimizer: Literal["sgd", "lars", "adamw"] = setting(
        "sgd", "the optimizer; for SimSiam the paper uses sgd at every batch size (section 3)"
    )
    base_lr: float = setting(
        0.05,
        "learning rate for a batch of 256; the peak lr is base_lr * batch_size / 256 (section 3)",
    )
    momentum: float = setting(0.9, "momentum of sgd and lars; beta1 of adamw")
    weight_decay: float = setting(
        1e-4, "weight decay of all parameters but those named by --exclude (appendix A)"
    )
    exclude: Literal["none", "bias_and_norm"] = setting(
        "none",
        "parameters without weight decay and without LARS adaptation: none, or biases and the "
        "parameters of norm layers (appendix A)",
    )
    lr_schedule: Literal["cosine", "constant_decay"] = setting(
        "cosine",
        "schedule of the lr: half a cosine (section 3); or constant, then a linear decay to 0 in "
        "the last fifth of the steps: a run of other length has the same beginning",
    )
    cut_init: float = setting(
        1.0,
        "divide the initial weights of all layers by this (with --init, of the heads), so that the "
        "first steps turn them more (Draganov et al., 2025, use 9)",
    )
    warmup_epochs: int = setting(
        0,
        "epochs of linear lr warmup; the paper uses 10 for batches of 1024 and more (Table 2) "
        "and without batch norm (Table 3a)",
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
        if (self.target in CLASS_TARGETS) != (self.criterion == "classification"):
            raise UsageError(
                f"target is {self.target} and criterion is {self.criterion}: "
                "criterion classification goes together with target labels or kmeans"
            )
        if self.target == "kmeans" and (
            self.predictor != "none" or "proj_out" in self.head_bn or not self.output_bias
        ):
            raise UsageError(
                "target kmeans begins a new classifier in each epoch, the last layer of the "
                "projector: use predictor none, head_bn without proj_out, and output_bias"
            )
        if self.pairs == "single" and self.target not in PER_IMAGE_TARGETS:
            raise UsageError(
                "pairs single compares a view with what its image has: use other pairs, or target "
                + " or ".join(PER_IMAGE_TARGETS)
            )
        if self.target in ("moving_average", "teacher") and self.criterion == "swapped":
            raise UsageError(
                f"target {self.target} gives features, and the targets of swapped are codes: "
                "use target shared"
            )

        if not self.views:
            raise UsageError("views is empty: it says how views are made, at least one way")
        if self.num_views > 2:
            self._check_num_views()
        low, high = self.small_crop_scale
        if not 0.01 <= low <= high <= 1:
            raise UsageError(
                f"small_crop_scale is {low:g} {high:g}: give two areas from 0.01 to 1, the "
                "smaller one first"
            )

    def _check_num_views(self) -> None:
        if self.target in ("expectation", *CLASS_TARGETS) or self.criterion == "swapped":
            given = self.criterion if self.criterion == "swapped" else f"target {self.target}"
            raise UsageError(
                f"num_views is {self.num_views}, which averages targets, and {given} does not go "
                "with it: use target shared and criterion cosine"
            )
        if self.pairs not in ("symmetric", "asymmetric"):
            raise UsageError(
                f"num_views is {self.num_views} and pairs {self.pairs}: use pairs symmetric, or "
                "asymmetric for one predicting view"
            )

    def _check_ranges(self) -> None:
        count, weight, width = (1, inf), (0, 1e30), (1, MAX_WIDTH)
        check_ranges(self, dim=width, proj_layers=(1, 100), proj_hidden=width, pred_dim=width)
        check_ranges(
            self,
            num_views=(2, MAX_TARGET_VIEWS),
            target_decay=(0, 1),
            target_steps=(0, inf),
            target_views=(1, MAX_TARGET_VIEWS),
            small_crops=(0, MAX_TARGET_VIEWS),
            small_crop_size=(8, 4096),
        )
        check_ranges(self, loss_scale=(1e-30, 1e30), tau=(1e-6, 1e30), queue=count)
        check_ranges(self, barlow_lambda=weight, vicreg_weights=weight)
        check_ranges(self, prototypes=count, freeze_prototypes=(0, inf))
        check_ranges(self, sinkhorn_epsilon=(1e-3, 1e30), sinkhorn_iterations=count)
        check_ranges(self, base_lr=weight, momentum=(0, 1), weight_decay=weight)
        check_ranges(self, predictor_lr_scale=weight, warmup_epochs=(0, inf))
        check_ranges(self, direct_power=(0, 10), direct_epsilon=(0, 10), direct_decay=(0, 1))
        check_ranges(self, predictor_weight_decay=weight, cut_init=(1e-3, 1e3))
        # Without the projector's first layer, whose size also depends on the backbone.
        hidden_layers = (self.proj_layers - 2) * self.proj_hidden**2
        predictor_rows = {"none": 0, "direct": 2 * self.dim}.get(self.predictor, 2 * self.pred_dim)
        rows = self.proj_hidden + predictor_rows
        rows += {"info_nce": self.queue, "swapped": self.prototypes}.get(self.criterion, 0)
        if (parameters := hidden_layers + rows * self.dim) > MAX_PARAMETERS:
            raise UsageError(
                f"the heads, the queue and the prototypes have {parameters:,} numbers; at most "
                f"{MAX_PARAMETERS:,} are allowed: give smaller values for dim, proj_hidden, "
                "pred_dim, proj_layers, queue or prototypes"
            )

    @property
    def terms(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The terms of the loss: the view of p, and the views whose targets are averaged.

        Small crops are the last views. Each predicts every target that another view predicts.
        """
        count, targets = self.full_view_count, dict.fromkeys(views for _, views in self._full_terms)
        small = range(count, count + self.small_crops)
        return self._full_terms + tuple((i, views) for i in small for views in targets)

    @property
    def _full_terms(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        if self.num_views > 2:
            predicting = range(self.num_views if self.pairs == "symmetric" else 1)
            return tuple((i, (*range(i), *range(i + 1, self.num_views))) for i in predicting)
        count = 1 + max(map(max, PAIRS[self.pairs]))
        extra = self.target_views - 1 if self.target == "expectation" else 0
        return tuple((i, (j, *range(count, count + extra))) for i, j in PAIRS[self.pairs])

    @property
    def full_view_count(self) -> int:
        """Number of views of each image in a step that are no small crops."""
        return 1 + max(max(i, *views) for i, views in self._full_terms)

    @property
    def view_count(self) -> int:
        """Number of views of each image in a step."""
        return self.full_view_count + self.small_crops

    @property
    def min_batch(self) -> int:
        """Number of images that batch norm needs: two for each of its parts of a batch."""
        return 2 * BN_SPLITS if self.bn == "split" else 2

    @property
    def small_views(self) -> Views:
        """How a small crop is made."""
        crop_min, crop_max = self.small_crop_scale
        return replace(self.views[-1], crop_min=crop_min, crop_max=crop_max)

    @property
    def decay(self) -> float:
        """The value of m: the share of its old value that the target keeps."""
        default = {"momentum": 0.99, "moving_average": 0.8}.get(self.target, 0.0)
        return default if self.target_decay is None else self.target_decay


# Settings that have an effect only if another setting has one of these values.
_SWAPPED = ("criterion", ("swapped",))
_DIRECT = ("predictor", ("direct",))
SETTING_CONDITIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "direct_power": _DIRECT,
    "direct_epsilon": _DIRECT,
    "direct_decay": _DIRECT,
    "iso_loss": _DIRECT,
    "target_decay": ("target", ("momentum", "moving_average")),
    "target_fresh": ("target", ("moving_average",)),
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
    if not method.small_crops and (given := names & {"small_crop_size", "small_crop_scale"}):
        raise UsageError(f"{min(given)} has no effect here: give small_crops, their number, too")
    for name in sorted(names & SETTING_CONDITIONS.keys()):
        owner, values = SETTING_CONDITIONS[name]
        value = getattr(method, owner)
        known = owner == "predictor" or value in (*BUILTIN_TARGETS, *BUILTIN_CRITERIA)
        if known and value not in values:
            raise UsageError(
                f"{name} has no effect here: it belongs to {owner} {' or '.join(values)}, "
                f"not to {value}"
            )
