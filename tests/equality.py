"""N processes with synchronized batch norm compute what one process computes, for each method.

    python tests/equality.py [WORD ...]

Compared are losses, gradients, parameters, buffers and momenta of five steps in float64. Each line
shows the relative distance from the run of one process; more than 1e-12 is a failure, because the
order of sums alone explains less. So is any bit in which the processes differ from each other.
With WORDs, only the cases run whose names contain one of them.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, distributed

from simsiam.config.method import Method
from simsiam.config.methods import METHODS
from simsiam.distributed.collectives import all_reduce_mean, wrap_ddp
from simsiam.distributed.process_group import broadcast, rank, world_size
from simsiam.distributed.sync_batch_norm import convert_sync_batchnorm, synchronize_replicas
from simsiam.model.optimizers import build_optimizer, set_lr
from simsiam.model.siamese import Siamese, build

LIMIT = 1e-12
IMAGES, STEPS = 48, 5
SMALL = {
    "dim": 12, "proj_hidden": 20, "pred_dim": 6, "queue": 40, "prototypes": 10,
    "freeze_prototypes": 2, "warmup_epochs": 0, "base_lr": 0.3,
}  # fmt: skip


def small(name: str, **cells) -> Method:
    return replace(METHODS[name], **SMALL | cells)


# MoCo's batches are not split in eighths here; `split` is a case of its own, of 16 images.
CASES = {
    name: small(name, bn="joint" if row.bn == "joint" else "per_view")
    for name, row in METHODS.items()
} | {
    "moving_average": small("simsiam", target="moving_average"),
    "alternation": small("simsiam", target="alternation", target_steps=2),
    "expectation": small("simsiam", target="expectation", target_views=2),
    "num_views": small("simsiam", num_views=3),
    "small crops": small("simsiam", small_crops=2),
    "direct predictor": small("simsiam", predictor="direct", iso_loss=True),
    "cross_entropy": small("simsiam", criterion="cross_entropy"),
    "asymmetric_2x": small("simsiam", pairs="asymmetric_2x"),
    "prototypes outside": small("swav", prototype_norm="outside"),
    "simclr with a predictor": small("simclr", predictor="mlp", stop_gradient=True),
    "split": small("moco_v2_plus", bn="split"),
}
SHARES = [(6, 6), (7, 5), (4, 4, 4), (5, 4, 3)]


def batch(step: int, views: int, n: int) -> tuple[Tensor, Tensor]:
    """Return the views of a step, (views, n, 3, 16, 16) float64, and its images' positions."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(views, n, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x, torch.randperm(IMAGES, generator=generator)[:n]


def train(method: Method, shares: tuple[int, ...]) -> dict[str, list[Tensor]]:
    """Train five steps on this process's share of each batch, and return what was computed."""
    n, first = sum(shares), sum(shares[: rank()])
    rows = slice(first, first + shares[rank()]) if world_size() > 1 else slice(0, n)
    model = build(method, backbone="resnet10", width=4, image_size=16).double()
    if world_size() > 1 and method.bn != "split":
        convert_sync_batchnorm(model, torch.device("cpu"))
    optimizer, network = build_optimizer(model, method), wrap_ddp(model)
    begin_run(model)
    results: dict[str, list[Tensor]] = {"loss": [], "gradient": []}
    for step in range(STEPS):
        if step == 2:  # as if the run were resumed from a checkpoint
            state = checkpoint(model)
            begin_run(model)
            model.load_state_dict(state)
        x, index = batch(step, method.view_count, n)
        x = [*x[: method.full_view_count], *x[method.full_view_count :, ..., :8, :8]]
        set_lr(optimizer, step, peak_lr=method.base_lr * n / 256, steps=STEPS, warmup_steps=0)
        out = network(*(view[rows] for view in x), index=index[rows])
        optimizer.zero_grad()
        (len(index[rows]) * world_size() / n * out.loss).backward()
        results["loss"].append(all_reduce_mean(out.loss, len(index[rows])))
        results["gradient"] += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        model.after_step(out, step, index[rows])
    synchronize_replicas(model)
    # With split batch norm, each process tracks the statistics of its own eighths.
    local = ("running_mean", "running_var", "num_batches_tracked") if method.bn == "split" else ()
    results["state"] = [v for k, v in checkpoint(model).items() if not k.endswith(local)]
    states = optimizer.state.values()
    results["momentum"] = [s["momentum_buffer"] for s in states if "momentum_buffer" in s]
    return results


def begin_run(model: Siamese) -> None:
    """Begin, and give each image what its target keeps: an eta or a cluster."""
    labels = torch.arange(IMAGES) % 10
    model.begin(images=IMAGES, labels=labels, steps=STEPS, per_epoch=4)
    if model.method.target in ("moving_average", "teacher"):
        assert len(model.target.eta) == len(range(rank(), IMAGES, world_size())), (
            "eta is not sharded"
        )
        part = torch.arange(IMAGES).tensor_split(world_size())[rank()]
        eta = torch.randn(IMAGES, 12, generator=torch.Generator().manual_seed(9)).double()
        model.target.set_eta(eta[part], part)
    if model.method.target == "kmeans":
        model.target.labels.copy_(labels)
        model.criterion.balance(labels)


def checkpoint(model: Siamese) -> dict[str, Tensor]:
    """Return this process's state, with the complete eta, which only rank zero's has."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state | {k: broadcast(v) for k, v in state.items() if k == "target.eta"}


def distance(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """Return |a - b| / |b| of all tensors together."""
    a, b = (
        torch.cat([x.flatten() for x in tensors if x.is_floating_point()])
        for tensors in (mine, theirs)
    )
    return ((a - b).norm() / b.norm()).item()


def one_process_of_many(number: str, folder: str, shares: str, *names: str) -> None:
    sizes = tuple(map(int, shares.split(",")))
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=int(number), world_size=len(sizes)
    )
    torch.save(
        {name: train(CASES[name], scaled(name, sizes)) for name in names}, f"{folder}/{number}.pt"
    )
    distributed.barrier()
    # gloo's threads may outlive the interpreter and then abort (pytorch issue 190489).
    os._exit(0)


def scaled(name: str, shares: tuple[int, ...]) -> tuple[int, ...]:
    """Return the same shares, or 8 images for each process if batch norm is split."""
    return (8,) * len(shares) if name == "split" else shares


def compared(shares: tuple[int, ...], names: list[str]) -> dict[str, dict[str, float]]:
    """Return each case's distances between len(shares) processes and one.

    Raises AssertionError if the processes differ from each other in any bit.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [folder, ",".join(map(str, shares)), *names]
        command = [sys.executable, __file__, "--process"]
        children = [
            subprocess.Popen([*command, str(number), *arguments]) for number in range(len(shares))
        ]
        alone = {name: train(CASES[name], scaled(name, shares)) for name in names}
        assert [child.wait() for child in children] == [0] * len(shares)
        several = [torch.load(f"{folder}/{number}.pt") for number in range(len(shares))]
    distances = {}
    for name in names:
        first = several[0][name]
        for other in several[1:]:
            for kind, tensors in first.items():
                assert all(map(torch.equal, tensors, other[name][kind])), (name, kind)
        distances[name] = {
            kind: distance(first[kind], tensors) for kind, tensors in alone[name].items() if tensors
        }
    return distances


def main(*words: str) -> int:
    worst = 0.0
    for shares in SHARES:
        names = [
            n
            for n in CASES
            if (n != "split" or len(shares) == 2) and (not words or any(w in n for w in words))
        ]
        for name, distances in compared(shares, names).items():
            worst = max(worst, *distances.values())
            text = "  ".join(f"{kind} {value:.1e}" for kind, value in distances.items())
            print(f"{'+'.join(map(str, scaled(name, shares))):<8}{name:<26}{text}", flush=True)
    print(f"the largest relative distance is {worst:.1e}; at most {LIMIT:g} is summation order")
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        one_process_of_many(*sys.argv[2:])
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(*sys.argv[1:]))
