"""Optimizers and schedules. A parameter group names its schedule, and a schedule is a pure function of the step."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from simsiam.config.method import Method


def cosine_schedule(step: int, steps: int, warmup: int = 0) -> float:
    """Share of the peak lr at 0 <= step < steps: a linear rise over `warmup` steps, then half a cosine (section 3)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def constant_schedule(step: int, steps: int, warmup: int = 0) -> float:
    """Always the peak, warm-up included: the predictor should adapt to the latest representations (section 4.2)."""
    return 1.0


SCHEDULES = {"cosine": cosine_schedule, "constant": constant_schedule}


class LARS(Optimizer):
    """SGD whose update of a weight is as long as the weight asks, whatever its gradient's size (You et al., 2017).

    Where a group says `adapt`, gradient plus decay is scaled to `trust` times the weight's length. The lr stands
    outside the momentum, as in BYOL's, Barlow Twins' and VICReg's code. (SimCLR's has it inside: the same while the lr
    changes little in ten steps. SwAV's LARC adds the lengths of gradient and decay: the same while the decay is small.)
    A group at lr 0 rests, its momentum too.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float
    ):
        settings = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adapt": True,
            "trust": 1e-3,
        }
        super().__init__(groups, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in (group for group in self.param_groups if group["lr"]):
            for w in (w for w in group["params"] if w.grad is not None):
                update = w.grad.add(w, alpha=group["weight_decay"])
                if group["adapt"]:
                    length, wanted = update.norm(), group["trust"] * w.norm()
                    update *= torch.where((length > 0) & (wanted > 0), wanted / length, 1.0)
                state = self.state[w]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(w)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                w.sub_(state["momentum_buffer"], alpha=group["lr"])


def build_optimizer(model: nn.Module, method: Method) -> Optimizer:
    """The row's optimizer over everything that is trained.

    The predictor is a group of its own, because its lr may have another schedule and another scale; so are the
    prototypes, which start late. What is excluded from decay and adaptation makes a second group of each.
    """
    rest = method.freeze_prototypes if method.criterion == "swapped" else 0
    schedules: dict[str, dict[str, Any]] = {
        "encoder": {"schedule": "cosine", "lr_scale": 1.0},
        "predictor": {"schedule": method.predictor_lr, "lr_scale": method.predictor_lr_scale},
        "criterion": {"schedule": "cosine", "lr_scale": 1.0, "rest": rest},
    }
    groups: list[dict[str, Any]] = []
    for name, schedule in schedules.items():
        trained = [(k.partition(".")[0], p) for k, p in model.named_parameters() if p.requires_grad]
        mine = [p for owner, p in trained if (owner if owner in schedules else "encoder") == name]
        excluded = [method.exclude == "bias_and_norm" and p.ndim == 1 for p in mine]
        groups.append(
            {"name": name, "params": [p for p, out in zip(mine, excluded) if not out]} | schedule
        )
        groups.append(
            {"name": f"{name}, excluded", "params": [p for p, out in zip(mine, excluded) if out]}
            | schedule
        )
        groups[-1] |= {"weight_decay": 0.0, "adapt": False}
    groups = [group for group in groups if group["params"]]
    how: dict[str, Any] = {"lr": method.base_lr, "weight_decay": method.weight_decay}
    if method.optimizer == "adamw":
        return AdamW(groups, betas=(method.momentum, 0.999), **how, fused=True)
    if method.optimizer == "lars":
        return LARS(groups, momentum=method.momentum, **how)
    return SGD(groups, momentum=method.momentum, **how, fused=True)


def set_lr(
    optimizer: Optimizer, step: int, *, peak_lr: float, steps: int, warmup_steps: int
) -> dict[str, float]:
    """Give every group its lr of this step; returns them by the group's name. A group that rests has none yet."""
    for group in optimizer.param_groups:
        share = (
            SCHEDULES[group["schedule"]](step, steps, warmup_steps)
            if step >= group.get("rest", 0)
            else 0.0
        )
        group["lr"] = peak_lr * group["lr_scale"] * share
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
