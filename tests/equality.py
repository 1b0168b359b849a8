"""N processes with synchronized batch norm compute what one does, method by method: python tests/equality.py [WORD ...]

In float64, for five steps: losses, gradients, and then every parameter, buffer and momentum, up to the order of sums.
Each line tells the largest relative distance from the run of one process; more than 1e-12 is a failure, and so is a bit
in which the processes differ among themselves. With WORDs, only the cases whose names have one of them.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
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
    "dim": 12, "proj_hidden": 20, "pred_dim": 6, "queue": 40, "prototypes": 10, "freeze_prototypes": 2,
    "warmup_epochs": 0, "base_lr": 0.3,
}  # fmt: skip


def small(name: str, **cells) -> Method:
    return replace(METHODS[name], **SMALL | cells)


# What MoCo splits in eighths is whole here; `split` is a case of its own, of 16 images.
CASES = {
    name: small(name, bn="joint" if row.bn == "joint" else "per_view")
    for name, row in METHODS.items()
} | {
    "moving_average": small("simsiam", target="moving_average"),
    "alternation": small("simsiam", target="alternation", target_steps=2),
    "expectation": small("simsiam", target="expectation", target_views=2),
    "cross_entropy": small("simsiam", criterion="cross_entropy"),
    "asymmetric_2x": small("simsiam", pairs="asymmetric_2x"),
    "prototypes outside": small("swav", prototype_norm="outside"),
    "simclr with a predictor": small("simclr", predictor="mlp", stop_gradient=True),
    "split": small("moco_v2_plus", bn="split"),
}
SHARES = [(6, 6), (7, 5), (4, 4, 4), (5, 4, 3)]


def batch(step: int, views: int, n: int) -> tuple[Tensor, Tensor]:
    """The views of a step, float64, and the positions of its images."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(views, n, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x, torch.randperm(IMAGES, generator=generator)[:n]


def train(method: Method, shares: tuple[int, ...]) -> dict[str, list[Tensor]]:
    """What this process computes of five steps, given the rows of each batch that are its own."""
    n, first = sum(shares), sum(shares[: rank()])
    mine = slice(first, first + shares[rank()]) if world_size() > 1 else slice(0, n)
    model = build(method, backbone="resnet10", width=4, image_size=16).double()
    if world_size() > 1 and method.bn != "split":
        convert_sync_batchnorm(model, torch.device("cpu"))
    optimizer, network = build_optimizer(model, method), wrap_ddp(model)
    begin = partial(
        model.begin, images=IMAGES, labels=torch.arange(IMAGES) % 10, steps=STEPS, per_epoch=4
    )
    begin()
    if method.target == "moving_average":
        assert len(model.target.eta) == len(range(rank(), IMAGES, world_size())), "dealt out"
        part = torch.arange(IMAGES).tensor_split(world_size())[rank()]
        model.target.set_eta(
            torch.randn(IMAGES, 12, generator=torch.Generator().manual_seed(9)).double()[part], part
        )
    found: dict[str, list[Tensor]] = {"loss": [], "gradient": []}
    for step in range(STEPS):
        if step == 2:  # as a run goes on from its checkpoint
            state = checkpoint(model)
            begin()
            model.load_state_dict(state)
        x, index = batch(step, method.view_count, n)
        set_lr(optimizer, step, peak_lr=method.base_lr * n / 256, steps=STEPS, warmup_steps=0)
        out = network(*(view[mine] for view in x), index=index[mine])
        optimizer.zero_grad()
        (len(index[mine]) * world_size() / n * out.loss).backward()
        found["loss"].append(all_reduce_mean(out.loss, len(index[mine])))
        found["gradient"] += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        model.after_step(out, step, index[mine])
    synchronize_replicas(model)
    tracked = (
        "running_mean",
        "running_var",
        "num_batches_tracked",
    )  # of eighths each process has seen its own
    state = {
        k: v
        for k, v in checkpoint(model).items()
        if method.bn != "split" or not k.endswith(tracked)
    }
    found["state"] = list(state.values())
    found["momentum"] = [
        s["momentum_buffer"] for s in optimizer.state.values() if "momentum_buffer" in s
    ]
    return found


def checkpoint(model: Siamese) -> dict[str, Tensor]:
    """What a run goes on from: the state of this process, and every image's eta, which only the first one's has."""
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    return whole | {k: broadcast(v) for k, v in whole.items() if k == "target.eta"}


def distance(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """|a - b| / |b| of all tensors together."""
    a, b = (
        torch.cat([x.flatten() for x in tensors if x.is_floating_point()])
        for tensors in (mine, theirs)
    )
    return ((a - b).norm() / b.norm()).item()


def one_process_of_many(number: str, folder: str, shares: str, *names: str) -> None:
    each = tuple(map(int, shares.split(",")))
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=int(number), world_size=len(each)
    )
    torch.save(
        {name: train(CASES[name], scaled(name, each)) for name in names}, f"{folder}/{number}.pt"
    )
    distributed.barrier()
    os._exit(
        0
    )  # at once: gloo's threads may outlive the interpreter and then abort (pytorch issue 190489)


def scaled(name: str, shares: tuple[int, ...]) -> tuple[int, ...]:
    """The same shares, or for eighths 8 images each."""
    return (8,) * len(shares) if name == "split" else shares


def compared(shares: tuple[int, ...], names: list[str]) -> dict[str, dict[str, float]]:
    """For each case, the distances between len(shares) processes and one. Raises where those differ by a bit."""
    with tempfile.TemporaryDirectory() as folder:
        how = [folder, ",".join(map(str, shares)), *names]
        command = [sys.executable, __file__, "--process"]
        children = [
            subprocess.Popen([*command, str(number), *how]) for number in range(len(shares))
        ]
        alone = {name: train(CASES[name], scaled(name, shares)) for name in names}
        assert [child.wait() for child in children] == [0] * len(shares)
        several = [torch.load(f"{folder}/{number}.pt") for number in range(len(shares))]
    found = {}
    for name in names:
        for other in several[1:]:
            for kind, tensors in several[0][name].items():
                assert all(map(torch.equal, tensors, other[name][kind])), (name, kind)
        found[name] = {kind: distance(several[0][name][kind], alone[name][kind]) for kind in alone[name]
                       if alone[name][kind]}  # fmt: skip
    return found


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
            told = "  ".join(f"{kind} {value:.1e}" for kind, value in distances.items())
            print(f"{'+'.join(map(str, scaled(name, shares))):<8}{name:<26}{told}", flush=True)
    print(f"the largest relative distance is {worst:.1e}; at most {LIMIT:g} is summation order")
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        one_process_of_many(*sys.argv[2:])
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(*sys.argv[1:]))
