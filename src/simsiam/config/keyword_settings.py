"""Keyword arguments of public functions, as types: editors complete them, type checkers check them.

A test compares them with the dataclasses that define the settings, their defaults and their help.
Plain data; loads no torch.
"""

from typing import Literal, TypedDict

from simsiam.config.method import HeadBN, Pairs


class PretrainSettings(TypedDict, total=False):
    """Settings of a run: `simsiam.pretrain`, `preview` and `plan`; see Recipe, Method and Views."""

    method: str
    backbone: str
    width: int
    stem: Literal["small", "large"] | None
    init: str | None
    teacher: str | None
    channels: int
    image_size: int | None
    view_ratio: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    eval_resize: int | None
    eval_interpolation: Literal["bilinear", "bicubic"]
    limit: int | None
    no_labels: bool
    splits: tuple[str, ...] | None
    holdout: int | None
    epochs: int
    steps: int | None
    batch_size: int
    seed: int
    device: str
    precision: Literal["auto", "bfloat16", "float32"]
    compile: bool
    sync_bn: bool
    order: Literal["auto", "shuffled"]
    workers: int | None
    max_unreadable: float
    read_timeout: float
    cache_gib: float
    disk_cache_gib: float
    average_weights: float
    knn_every: int
    save_every: int
    save_seconds: float
    log_every: int
    dim: int
    proj_layers: int
    proj_hidden: int
    predictor: Literal["mlp", "none", "fixed", "direct"]
    direct_power: float
    direct_epsilon: float
    direct_decay: float
    iso_loss: bool
    pred_dim: int
    predictor_lr: Literal["constant", "cosine"]
    predictor_lr_scale: float
    predictor_weight_decay: float | None
    head_bn: tuple[HeadBN, ...]
    output_bn_affine: bool
    output_bias: bool
    bn: Literal["per_view", "joint", "split"]
    target: str
    target_decay: float | None
    target_fresh: bool
    target_schedule: Literal["constant", "cosine"]
    target_steps: int
    target_views: int
    stop_gradient: bool
    criterion: str
    loss_scale: float
    pairs: Pairs
    num_views: int
    small_crops: int
    small_crop_size: int | None
    small_crop_scale: tuple[float, float]
    tau: float
    queue: int
    barlow_lambda: float
    vicreg_weights: tuple[float, float, float]
    prototypes: int
    prototype_norm: Literal["inside", "outside"]
    freeze_prototypes: int
    sinkhorn_epsilon: float
    sinkhorn_iterations: int
    optimizer: Literal["sgd", "lars", "adamw"]
    base_lr: float
    momentum: float
    weight_decay: float
    exclude: Literal["none", "bias_and_norm"]
    lr_schedule: Literal["cosine", "constant_decay"]
    cut_init: float
    warmup_epochs: int
    crop_min: float
    crop_max: float
    flip: float
    jitter: tuple[float, float, float, float]
    jitter_p: float
    gray: float
    blur: float
    blur_sigma: tuple[float, float]
    solarize: float
    interpolation: Literal["bilinear", "bicubic"]
    equal_terms: bool


class EvaluationSettings(TypedDict, total=False):
    """Settings of `simsiam.evaluate`; see config.protocols.Settings."""

    features: Literal["h", "z"]
    baselines: bool
    k: int | None
    tau: float
    linear: Literal["cached", "paper", "sgd"]
    base_lr: float | None
    linear_epochs: int
    labels: tuple[str, ...] | None
    few_label_list: str | None
    draws: int
    finetune_epochs: int
    from_scratch: bool
    seed: int


class ScheduleSettings(TypedDict, total=False):
    """Settings of a detector's schedule; see detection.schedules.Schedule."""

    architecture: Literal["c4", "fpn"]
    steps: int
    batch_size: int
    lr: tuple[float, ...]
    warmup_steps: int
    decay_at: tuple[float, ...]
    weight_decay: float
    train_sides: tuple[int, ...]
    test_side: int
    longest_side: int
    anchors: tuple[int, ...]
    stride: int
    proposals: int
    test_proposals: int
    regions: int
    region_size: int
    precise_bn: int
