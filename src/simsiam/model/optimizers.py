"""Optimizers and schedules.

A parameter group names its schedule, and a schedule is a function of the step alone.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from simsiam.config.method import Method

DECAY_SHARE = 0.2  # of the steps of `constant_decay_schedule`


def cosine_schedule(step: float, steps: float, warmup: int = 0) -> float:
    """Return the fraction of the peak lr: a linear rise, then half a cosine (section 3).

    Args:
        step: The step, 0 <= step < steps; or any other measure of what is done.
        steps: Number of steps of the run; or the same measure at its end.
        warmup: Number of steps of the linear rise.

    Returns:
        A fraction from 0 to 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def constant_schedule(step: int, steps: int, warmup: int = 0) -> float:
    """Return 1: always the peak lr, even during warm-up.

    The predictor has it, to adapt to the latest representations (section 4.2).

    Args:
        step: The step (unused).
        steps: Number of steps of the run (unused).
        warmup: Number of steps of the encoder's linear rise (unused).

    Returns:
        1.0
    """
    return 1.0


def constant_decay_schedule(step: float, steps: float, warmup: int = 0) -> float:
    """Return the fraction of the peak lr: a linear rise, then 1, then a linear decay to 0.

    The decay takes the last fifth of the steps (Haegele et al., 2024). Until then the lr does not
    depend on the number of steps.

    Args:
        step: The step, 0 <= step < steps.
        steps: Number of steps of the run.
        warmup: Number of steps of the linear rise.

    Returns:
        A fraction from 0 to 1.
    """
    return min(1.0, (step + 1) / max(warmup, 1), (steps - step) / (DECAY_SHARE * steps))


SCHEDULES = {
    "cosine": cosine_schedule,
    "constant": constant_schedule,
    "constant_decay": constant_decay_schedule,
}


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017): SGD with updates scaled to the weights.

    In groups with `adapt`, the gradient plus decay is scaled to `trust` times the weight's norm.
    The lr is applied outside the momentum, as in the code of BYOL, Barlow Twins and VICReg. SimCLR
    applies it inside, which is the same while the lr changes little within ten steps. SwAV's LARC
    adds the norms of gradient and decay, which is the same while the decay is small.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, object]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ):
        """Create the optimizer.

        Args:
            groups: Parameter groups: "params", and optionally values of their own for the
                settings below and for "adapt" (True) and "trust" (0.001).
            lr: Learning rate.
            momentum: Fraction of the previous update that is kept.
            weight_decay: L2 penalty.
        """
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adapt": True,
            "trust": 1e-3,
        }
        super().__init__([dict(group) for group in groups], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: Not supported.
        """
        for group in self.param_groups:
            for w in (w for w in group["params"] if w.grad is not None):
                update = w.grad.add(w, alpha=group["weight_decay"])
                if group["adapt"]:
                    norm, target_norm = update.norm(), group["trust"] * w.norm()
                    nonzero = (norm > 0) & (target_norm > 0)
                    update *= torch.where(nonzero, target_norm / norm, 1.0)
                state = self.state[w]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(w)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                w.sub_(state["momentum_buffer"], alpha=group["lr"])


def build_optimizer(model: nn.Module, method: Method) -> Optimizer:
    """Create a row's optimizer over all parameters that require a gradient.

    The predictor is a group of its own, because its lr can have another schedule and another
    scale, and so are SwAV's prototypes, which start to move later. Parameters that are excluded
    from decay and adaptation are a second group of each.

    Args:
        model: The model, as `build` returns it.
        method: The row.

    Returns:
        SGD, LARS or AdamW. Each group has a "name", a "schedule", an "lr_scale" and, if it starts
        to move later, the number of steps to "rest".
    """
    rest = method.freeze_prototypes if method.criterion == "swapped" else 0
    schedules: dict[str, dict[str, object]] = {
        "encoder": {"schedule": method.lr_schedule, "lr_scale": 1.0},
        "predictor": {
            "schedule": "constant" if method.predictor_lr == "constant" else method.lr_schedule,
            "lr_scale": method.predictor_lr_scale,
        },
        "criterion": {"schedule": method.lr_schedule, "lr_scale": 1.0, "rest": rest},
    }
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in schedules}
    for path, p in model.named_parameters():
        if p.requires_grad:
            part = path.partition(".")[0]
            parameters[part if part in schedules else "encoder"].append(p)
    groups: list[dict[str, object]] = []
    for name, schedule in schedules.items():
        regular = [p for p in parameters[name] if not _is_excluded(p, method)]
        excluded = [p for p in parameters[name] if _is_excluded(p, method)]
        no_decay = {"weight_decay": 0.0, "adapt": False}
        groups.append({"name": name, "params": regular, **schedule})
        groups.append({"name": f"{name}, excluded", "params": excluded, **schedule, **no_decay})
    groups = [group for group in groups if group["params"]]
    for group in groups:
        if group["name"] == "predictor" and method.predictor_weight_decay is not None:
            group["weight_decay"] = method.predictor_weight_decay
    lr, weight_decay, momentum = method.base_lr, method.weight_decay, method.momentum
    if method.optimizer == "adamw":
        betas = (momentum, 0.999)
        return AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    if method.optimizer == "lars":
        return LARS(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)


def _is_excluded(p: nn.Parameter, method: Method) -> bool:
    return method.exclude == "bias_and_norm" and p.ndim == 1


def update_weights(optimizer: Optimizer) -> None:
    """Take a step with the groups that move.

    A group whose lr is 0 keeps its momentum, as well as its weights: SwAV's code removes the
    gradients of prototypes that are frozen, so that their momentum starts with the first step.

    Args:
        optimizer: An optimizer of `build_optimizer`, whose lr are set.
    """
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group["lr"]]
    optimizer.step()
    optimizer.param_groups = groups


def set_lr(
    optimizer: Optimizer, step: int, *, peak_lr: float, steps: int, warmup_steps: int
) -> dict[str, float]:
    """Set the lr of each group for a step.

    Args:
        optimizer: An optimizer of `build_optimizer`.
        step: The step, counted from 0.
        peak_lr: The encoder's largest lr.
        steps: Number of steps of the run.
        warmup_steps: Number of steps of the linear rise.

    Returns:
        The lr by name of the group; 0 for a group that does not move yet.
    """
    for group in optimizer.param_groups:
        schedule, moves = SCHEDULES[group["schedule"]], step >= group.get("rest", 0)
        fraction = schedule(step, steps, warmup_steps) if moves else 0.0
        group["lr"] = peak_lr * group["lr_scale"] * fraction
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
