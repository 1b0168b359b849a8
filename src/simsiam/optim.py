"""Optimizers and schedules. A parameter group names its schedule, and a schedule is a pure function of the step."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from simsiam.methods import Method


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    """Share of the peak lr at 0 <= step < steps: a linear rise over `warmup` steps, then half a cosine (section 3)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def constant(step: int, steps: int, warmup: int = 0) -> float:
    """Always the peak, warm-up included: the predictor should adapt to the latest representations (section 4.2)."""
    return 1.0


SCHEDULES = {"cosine": cosine, "constant": constant}


class LARS(Optimizer):
    """SGD whose update of a weight is as long as the weight asks, whatever its gradient's size (You et al., 2017).

    Where a group says `adapt`, gradient plus decay is scaled to `trust` times the weight's length. The lr stands
    outside the momentum, as in BYOL's, Barlow Twins' and VICReg's code. (SimCLR's has it inside: the same while the lr
    changes little in ten steps. SwAV's LARC adds the lengths of gradient and decay: the same while the decay is small.)
    A group at lr 0 rests, its momentum too.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float):
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adapt": True, "trust": 1e-3}
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
    """SGD with momentum over everything that is trained, weight decay on all of it, BN and biases too (appendix A).

    The predictor is a group of its own, because its lr may have another schedule and another scale.
    """
    of_predictor = {id(p) for p in model.predictor.parameters()}  # type: ignore[union-attr]
    trained = [p for p in model.parameters() if p.requires_grad]
    encoder = {"name": "encoder", "schedule": "cosine", "lr_scale": 1.0}
    predictor = {"name": "predictor", "schedule": method.predictor_lr, "lr_scale": method.predictor_lr_scale}
    groups: list[dict[str, Any]] = [
        encoder | {"params": [p for p in trained if id(p) not in of_predictor]},
        predictor | {"params": [p for p in trained if id(p) in of_predictor]},
    ]
    groups = [group for group in groups if group["params"]]
    return SGD(groups, lr=method.base_lr, momentum=method.momentum, weight_decay=method.weight_decay, fused=True)


def set_lr(optimizer: Optimizer, step: int, *, peak: float, steps: int, warmup: int) -> dict[str, float]:
    """Give every group its lr of this step; returns them by the group's name."""
    for group in optimizer.param_groups:
        group["lr"] = peak * group["lr_scale"] * SCHEDULES[group["schedule"]](step, steps, warmup)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
