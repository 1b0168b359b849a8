"""Speed beside the plain way of doing the same, in one run: the contestants of a case take turns, and ratios are told.

A ratio is the median, over rounds, of two times measured next to each other: a machine that slows down slows both. The
pictures are drawn here, so a case needs no data, and peers (kornia, lightly) take part where they are installed.
"""

import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

from simsiam.config.method import Views
from simsiam.config.recipes import STATISTICS, Recipe, cifar, shapes
from simsiam.data.batches import batches, crops_of, least_side, views_of
from simsiam.data.images import Images, from_arrays, in_memory
from simsiam.data.storage import Column, Names, numbered
from simsiam.data.transform import Transform
from simsiam.data.views import make_views
from simsiam.errors import UsageError, WorkFailed, unknown
from simsiam.model.optimizers import set_lr
from simsiam.model.precision import pick_device, pick_precision
from simsiam.model.siamese import build
from simsiam.monitoring.features import extract
from simsiam.monitoring.nearest_neighbors import K, knn_scores
from simsiam.runs.environment import environment
from simsiam.sources.disk_cache import Decoded, cached, write
from simsiam.training.prepare import assemble
from simsiam.training.step import gradients_of
from simsiam.utils.files import whole
from simsiam.utils.workers import CORES

ROUNDS = 5
MEAN, STD = STATISTICS["cifar10"]
PHOTO = (380, 460)  # height and width of a photograph: ImageNet's mean


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where a case takes place."""

    device: torch.device
    precision: str
    folder: Path  # for files; empty at first, and gone at the end


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Functions that do the same work; the first is the plain way, which the others are compared with."""

    count: int  # of what a call makes or goes through
    ways: Mapping[str, Callable[[], object]]
    flops: float = 0.0  # of a call of ours, where arithmetic is the limit
    bytes: float = 0.0  # that a call of ours has to read and write, where memory is the limit
    precision: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Case:
    what: str
    unit: str
    prepare: Callable[[Scene], Contest]
    threads: int | None = None  # None: as many as torch takes
    device: str | None = None  # the type of the only device that it is for


def bench(*, device: str = "auto", out: str | None = None, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure the cases named by `only`, or all; prints a table each, and writes everything measured to `out`, JSON."""
    for name in only:
        if name not in CASES:
            raise unknown("case", name, CASES)
    if out is not None and not Path(out).parent.is_dir():
        raise UsageError(f"{Path(out).parent} is not a folder: choose another --out")
    where = pick_device(device)
    precision = pick_precision("auto", where)
    console = Console(highlight=False)
    found: dict[str, Any] = {}
    for name in only or [name for name, case in CASES.items() if case.device in (None, where.type)]:
        with tempfile.TemporaryDirectory() as folder, threads(CASES[name].threads):
            scene = Scene(device=where, precision=precision, folder=Path(folder))
            found[name] = measure(CASES[name], CASES[name].prepare(scene), where)
        console.print(table(name, found[name]))
    here = {k: v for k, v in environment(where, precision).items() if k not in ("command", "processes")}
    peers = {name: importlib.metadata.version(name) for name in ("kornia", "lightly") if installed(name)}
    report = here | {"cores": CORES, "peers": peers, "rounds": ROUNDS, "cases": found}
    if out is not None:
        with whole(Path(out)) as part:
            part.write_text(json.dumps(report, indent=1) + "\n")
    return report


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(case: Case, contest: Contest, device: torch.device) -> dict[str, Any]:
    """A contest in numbers: times in seconds, rates per second, ratios to the plain way, memory in MiB."""
    seconds, peaks = take_turns(contest.ways, device)
    plain, ways = next(iter(seconds)), {}
    for name, times in seconds.items():
        ratios = sorted(p / t for p, t in zip(seconds[plain], times, strict=True))
        ways[name] = {
            "seconds": four(median(times)),
            "rate": four(contest.count / median(times)),
            "ratio": four(median(ratios)),
            "ratios": [four(ratio) for ratio in ratios],
            "peak_mib": None if any(map(isnan, peaks[name])) else four(max(peaks[name])),
        }
    found = {"what": case.what, "unit": case.unit, "threads": torch.get_num_threads(), "ways": ways}
    fastest = min(median(times) for name, times in seconds.items() if name.startswith("simsiam"))
    if contest.flops:
        limit = {"of": f"FLOP/s of a {contest.precision} product", "machine": products(device, contest.precision)}
        found["limit"] = limit | {"achieved": four(contest.flops / fastest)}
    elif contest.bytes:
        limit = {"of": "bytes/s of a copy", "machine": copies(device)}
        found["limit"] = limit | {"achieved": four(contest.bytes / fastest)}
    return found


def take_turns(
    ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds, and MiB at the peak beyond those at the start, of each way in each round, after one that is not told."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            before = memory(device, forget=True)
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            peaks[name].append(memory(device) - before)
    return {k: v[1:] for k, v in seconds.items()}, {k: v[1:] for k, v in peaks.items()}


def memory(device: torch.device, forget: bool = False) -> float:
    """The peak of this process's memory in MiB, worker processes not counted; `forget` makes it what is held now.

    nan where the system does not tell: on a CPU only Linux does.
    """
    if device.type == "cuda":
        if forget:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return nan
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


@cache
def products(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    return four(2 * n**3 / min(take_turns({"": lambda: x @ x}, device)[0][""]))


@cache
def copies(device: torch.device) -> float:
    """Bytes/s, read and written, of a large copy."""
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    return four(2 * x.nbytes / min(take_turns({"": lambda: y.copy_(x)}, device)[0][""]))


def four(x: float) -> float:
    """Four digits; more would be noise."""
    return float(f"{x:.4g}")


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def installed(name: str) -> bool:
    """Whether a peer's module is there, with all that it needs."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def table(name: str, found: Mapping[str, Any]) -> Table:
    """A case in at most 80 columns."""
    made, limit = Table(title=f"{name}: {found['what']}", title_justify="left", width=80), found.get("limit")
    if limit:
        share = f"{limit['achieved'] / limit['machine']:.0%} of the machine's {limit['machine']:.2g} {limit['of']}"
        made.caption, made.caption_justify = f"simsiam reaches {share}", "left"
    made.add_column(f"threads: {found['threads']}")
    for head in ("seconds", found["unit"], "ratio", "MiB more"):
        made.add_column(head, justify="right")
    for way, v in found["ways"].items():
        peak = "" if v["peak_mib"] is None else f"{v['peak_mib']:.0f}"
        made.add_row(
            way, f"{v['seconds']:.3g}", f"{v['rate']:,.{0 if v['rate'] >= 100 else 2}f}", f"{v['ratio']:.2f}", peak
        )
    return made


# --- the plain way ----------------------------------------------------------------------------------------------------


def photographs(count: int, height: int, width: int) -> list[bytes]:
    """JPEG files of large soft patches under a fine grain, as photographs are; about as many bytes a pixel as they."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        patches = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
        grain = rng.integers(-12, 13, (height, width, 1))
        file = io.BytesIO()
        Image.fromarray((np.asarray(patches) + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=75)
        files.append(file.getvalue())
    return files


class PillowBlur:
    """A Gaussian blur as in the authors' code."""

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def by_torchvision(views: Views, size: int) -> Callable[[Image.Image], Tensor]:
    """One view of a Pillow image, by torchvision's transforms."""
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(views.crop_min, 1.0)),
            T.RandomApply([T.ColorJitter(*views.jitter)], p=views.jitter_p),
            T.RandomGrayscale(p=views.gray),
            T.RandomApply([PillowBlur(views.blur_sigma)], p=views.blur),
            T.RandomHorizontalFlip(p=views.flip),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )


def by_lightly(views: Views, size: int) -> Callable[[Image.Image], Tensor]:
    """The same by lightly, whose values are SimSiam's but for the blur and the statistics."""
    from lightly.transforms.simsiam_transform import SimSiamViewTransform

    normalize = {"mean": list(MEAN), "std": list(STD)}
    return SimSiamViewTransform(input_size=size, gaussian_blur=views.blur, normalize=normalize)


class Files(Dataset):
    """Images (JPEG, bytes or paths) through `transforms`, each image through each: what a loop's workers do."""

    def __init__(self, files: Sequence[bytes | Path], *transforms: Callable[[Image.Image], Tensor]):
        self.files, self.transforms = files, transforms

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> list[Tensor]:
        file = self.files[i]
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            image = opened.convert("RGB")
        return [transform(image) for transform in self.transforms]

    def loader(self, batch_size: int) -> DataLoader:
        return DataLoader(self, batch_size=batch_size, num_workers=CORES)


# --- the cases --------------------------------------------------------------------------------------------------------


def encoded(files: Sequence[bytes]) -> Images:
    return Images(numbered("bench", len(files)), Column(pa.array(files, pa.large_binary())))


def training(scene: Scene, *, backbone: str, width: int = 64, batch_size: int) -> Contest:
    """Load, augment and step, on images of 32 px; ours decodes them once, before the first step, as training does."""
    steps = 20 if scene.device.type == "cuda" else max(1, 64 // width)  # long enough for a loader's start not to count
    changes: dict[str, Any] = {"backbone": backbone, "width": width, "batch_size": batch_size, "mean": MEAN, "std": STD}
    recipe = Recipe().replace(**cifar() | changes, device=scene.device.type)
    views = recipe.method.views[0]
    files = photographs(batch_size, 32, 32) * steps
    train, _ = in_memory(encoded(files), 2**30)
    ours, device, precision = stepping(recipe, train, steps), scene.device, scene.precision

    def loop(transform: Callable[[Image.Image], Tensor]) -> Callable[[], None]:
        plain = build(recipe.method, backbone=backbone, image_size=32, width=width).to(device)
        sgd = torch.optim.SGD(plain.parameters(), lr=recipe.peak_lr, momentum=0.9, weight_decay=5e-4)
        loader = Files(files, transform, transform).loader(batch_size)

        def run() -> None:
            for x1, x2 in loader:
                loss = plain(x1.to(device), x2.to(device)).loss
                sgd.zero_grad()
                loss.backward()
                sgd.step()

        return run

    with FlopCounterMode(display=False) as counter:
        stepping(recipe, train, 1)()
    ways = {"plain loop, torchvision's transforms": loop(by_torchvision(views, 32)), "simsiam": ours}
    if device.type == "cuda":
        ways["simsiam, compiled"] = stepping(recipe.replace(compile=True), train, steps)
    if installed("lightly.transforms"):
        ways["plain loop, lightly's transform"] = loop(by_lightly(views, 32))
    return Contest(count=len(files), ways=ways, flops=steps * counter.get_total_flops(), precision=precision)


def stepping(recipe: Recipe, train: Images, steps: int) -> Callable[[], None]:
    """A function that takes the next steps of a run; of several processes, its share in them."""
    model, optimizer, device, _ = parts = assemble(recipe)
    gradients, clock = gradients_of(recipe, parts), itertools.count(0, steps)

    def ours() -> None:
        start = next(clock)
        for batch in batches(train, recipe, start, start + steps, device):
            set_lr(optimizer, batch.step % 1000, peak=recipe.peak_lr, steps=1000, warmup=0)
            output = gradients(batch.views, batch.index.to(device), batch.weight)
            optimizer.step()
            model.after_step(output)

    return ours


def processes(scene: Scene, *, backbone: str, width: int, batch_size: int, steps: int) -> Contest:
    """Steps on a CPU: by one process of two threads, and by two of one thread each, who share each batch."""
    what = backbone, width, batch_size, steps
    here = multiprocessing.get_context("spawn")
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}  # as cli.keep_memory
    ends = []
    for number in range(2):
        mine, its = here.Pipe()
        given = its, number, str(scene.folder / "store"), *what
        here.Process(target=serve, args=given, daemon=True).start()
        ends.append(mine)

    def both() -> None:
        for end in ends:
            end.send(True)
        for end in ends:
            end.recv()

    ways = {"one process, two threads": shared(*what), "simsiam, two processes of one thread": both}
    return Contest(count=steps * batch_size, ways=ways)


def shared(backbone: str, width: int, batch_size: int, steps: int) -> Callable[[], None]:
    images = from_arrays("train", np.random.default_rng(0).integers(0, 256, (1024, 3, 32, 32), dtype=np.uint8))
    changes: dict[str, Any] = {"backbone": backbone, "width": width, "batch_size": batch_size, "mean": MEAN, "std": STD}
    return stepping(Recipe().replace(**shapes() | changes, device="cpu", precision="float32"), images, steps)


def serve(end: Any, number: int, store: str, *what: Any) -> None:
    """One of the two processes: takes its share of the steps whenever it is told to, until nobody is left to tell."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=number, world_size=2)
    steps = shared(*what)
    with suppress(EOFError):
        while end.recv():
            steps()
            end.send(True)


def small_views(scene: Scene) -> Contest:
    """A view each of decoded images of 32 pixels, without blur as in appendix D."""
    count, views, clock = 512, Views(blur=0.0), itertools.count()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in photographs(count, 32, 32)])
    pillow = [Image.fromarray(image) for image in pixels]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(scene.device)

    def ours(compiled: bool) -> list[Tensor]:
        key: dict[str, Any] = {"seed": 0, "step": next(clock), "positions": np.arange(count)}
        return make_views(images, (views,), count=1, size=32, mean=MEAN, std=STD, **key, compiled=compiled)

    def one_by_one(transform: Callable[[Image.Image], Tensor]) -> Tensor:
        return torch.stack([transform(image) for image in pillow]).to(scene.device)

    ways: dict[str, Callable[[], object]] = {"torchvision, Pillow": partial(one_by_one, by_torchvision(views, 32))}
    ways |= {"simsiam": partial(ours, False), "simsiam, compiled": partial(ours, True)}
    if installed("kornia"):
        import kornia.augmentation as A

        chain = A.AugmentationSequential(
            A.RandomResizedCrop((32, 32), scale=(views.crop_min, 1.0)),
            A.RandomHorizontalFlip(p=views.flip),
            A.ColorJitter(*views.jitter, p=views.jitter_p),
            A.RandomGrayscale(p=views.gray),
            A.Normalize(MEAN, STD),
        )
        ways["kornia"] = lambda: chain(images.float() / 255)
    if installed("lightly.transforms"):
        ways["lightly"] = partial(one_by_one, by_lightly(views, 32))
    return Contest(count=count, ways=ways, bytes=5 * images.numel())


def photo_recipe(device: torch.device, batch_size: int) -> Recipe:
    return Recipe().replace(image_size=224, mean=MEAN, std=STD, batch_size=batch_size, device=device.type)


def kept_on_disk(images: Images, recipe: Recipe, folder: Path) -> Images:
    least, path = least_side(recipe), folder / "pixels.npy"
    write(images, path, least, 2**40)
    return cached(images, Decoded(path, images.channels), least)


def large_views(scene: Scene) -> Contest:
    """JPEG files to two views of 224 pixels each, in one process."""
    count = 128  # enough for a second of the plain way: short rounds scatter
    files, recipe, index = photographs(count, *PHOTO), photo_recipe(scene.device, count), np.arange(count)
    images, view = encoded(files), by_torchvision(recipe.method.views[0], 224)
    kept = kept_on_disk(images, recipe, scene.folder)
    plain, compiled = Files(files, view, view), recipe.replace(compile=True)
    ways = {
        "torchvision, Pillow": lambda: [plain[i] for i in range(count)],
        "simsiam": lambda: views_of(images, index, recipe, 0, scene.device),
        "simsiam, compiled": lambda: views_of(images, index, compiled, 0, scene.device),
        "simsiam, what workers do of it": lambda: crops_of(images, index, recipe, 0, 2),
        "the same, decoded on disk": lambda: crops_of(kept, index, recipe, 0, 2),
    }
    return Contest(count=count, ways=ways)


def folder(scene: Scene) -> Contest:
    """A folder of JPEG files to two views of 224 pixels each, on the device, by all workers."""
    batch_size, steps = 64, 16  # enough for the start of the workers not to count
    paths = [scene.folder / f"{i}.jpg" for i in range(batch_size * steps)]
    for path, file in zip(paths, photographs(len(paths), *PHOTO)):
        path.write_bytes(file)
    images = Images(Names(pa.array([path.name.encode() for path in paths], pa.large_binary())), scene.folder)
    recipe = photo_recipe(scene.device, batch_size)
    view, kept = by_torchvision(recipe.method.views[0], 224), kept_on_disk(images, recipe, scene.folder)
    loader = Files(paths, view, view).loader(batch_size)
    ways = {
        "DataLoader, torchvision, Pillow": lambda: [[x.to(scene.device) for x in views] for views in loader][:0],
        "simsiam": lambda: [batch.step for batch in batches(images, recipe, 0, steps, scene.device)],
        "simsiam, decoded on disk": lambda: [batch.step for batch in batches(kept, recipe, 0, steps, scene.device)],
    }
    return Contest(count=len(paths), ways=ways)


def neighbors(scene: Scene) -> Contest:
    """10,000 queries against 50,000 rows of 512 numbers, k = 200: every way is exact and weights alike."""
    from sklearn.neighbors import KNeighborsClassifier

    rng = torch.Generator().manual_seed(0)
    bank, queries = (nn.functional.normalize(torch.randn(n, 512, generator=rng), dim=1) for n in (50_000, 10_000))
    labels = torch.randint(0, 10, (len(bank),), generator=rng)

    def weights(distance: np.ndarray) -> np.ndarray:  # of unit vectors: cos = 1 - distance^2 / 2
        return np.exp((1 - distance**2 / 2) / 0.1)

    plain = KNeighborsClassifier(K, weights=weights, algorithm="brute").fit(bank.numpy(), labels.numpy())
    mine = bank.to(scene.device), labels.to(scene.device), queries.to(scene.device)
    ways: dict[str, Callable[[], object]] = {
        "scikit-learn, brute force": lambda: plain.predict(queries.numpy()),
        "simsiam": lambda: knn_scores(*mine, classes=10).argmax(1),
    }
    if installed("lightly.utils.benchmarking"):
        from lightly.utils.benchmarking import knn_predict

        turned = mine[0].T.contiguous()
        ways["lightly, 512 queries at a time"] = lambda: [
            knn_predict(part, turned, mine[1], num_classes=10, knn_k=K, knn_t=0.1) for part in mine[2].split(512)
        ]
    return Contest(count=len(queries), ways=ways, flops=2.0 * bank.numel() * len(queries))


def embedding(scene: Scene) -> Contest:
    """JPEG files to the features of a ResNet-18 at 224 pixels."""
    files = photographs(512, *PHOTO)
    images, model = encoded(files), build(backbone="resnet18").backbone.eval()
    mine = build(backbone="resnet18").backbone.to(scene.device).to(memory_format=torch.channels_last)  # type: ignore
    transform = Transform(224, MEAN, STD)
    plain = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)])
    loader, model = Files(files, plain).loader(64), model.to(scene.device)

    def loop() -> None:
        with torch.no_grad():
            for (x,) in loader:
                model(x.to(scene.device)).cpu()

    ways = {
        "plain loop": loop,
        "simsiam": lambda: extract(mine, images, transform, device=scene.device, precision=scene.precision),
    }
    return Contest(count=len(files), ways=ways)


def start(scene: Scene) -> Contest:
    """Processes, from nothing to their end, or to the first step that a run has written down."""
    runs = itertools.count()

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    def first_step() -> None:
        out = scene.folder / str(next(runs))
        words = ["-m", "simsiam", "pretrain", "shapes", "--device", scene.device.type, "--out", str(out)]
        with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            journal = out / "metrics.jsonl"
            try:
                while not (journal.exists() and journal.stat().st_size):
                    if process.poll() is not None:
                        raise WorkFailed(f"the run ended before its first step: {process.communicate()[1].decode()}")
                    time.sleep(0.01)
            finally:  # whoever stops the bench does not wait for a whole run
                process.kill()

    ways = {
        "python -c 'import torch'": lambda: run("-c", "import torch"),
        "simsiam --help": lambda: run("-m", "simsiam", "--help"),
        "simsiam pretrain shapes, to its first step": first_step,
    }
    return Contest(count=1, ways=ways)


def step_case(backbone: str, width: int, batch_size: int, device: str | None = None) -> Case:
    network = backbone if width == 64 else f"{backbone} of width {width}"
    prepare = partial(training, backbone=backbone, width=width, batch_size=batch_size)
    what = f"training, {network}, 32 px, batch {batch_size}"
    return Case(what=what, unit="images/s", prepare=prepare, device=device)


def processes_case(backbone: str, width: int, batch_size: int, steps: int) -> Case:
    what = f"training, {backbone} of width {width}, 32 px, batch {batch_size}, two cores, float32"
    prepare = partial(processes, backbone=backbone, width=width, batch_size=batch_size, steps=steps)
    return Case(what=what, unit="images/s", prepare=prepare, threads=2)


CASES: dict[str, Case] = {
    "step-resnet18-512": step_case("resnet18", 64, 512, "cuda"),
    "step-resnet18-256": step_case("resnet18", 64, 256),
    "step-resnet18-64": step_case("resnet18", 64, 64),
    "step-resnet18-w16-256": step_case("resnet18", 16, 256),
    "step-resnet10-w16-128": step_case("resnet10", 16, 128),
    "views-32": Case(what="a view of 32 px", unit="views/s", prepare=small_views, threads=1),
    "views-224": Case(what="a JPEG to two views of 224 px", unit="images/s", prepare=large_views, threads=1),
    "folder": Case(what="a folder to two views of 224 px", unit="images/s", prepare=folder),
    "knn": Case(what="k = 200 of 50,000 x 512", unit="queries/s", prepare=neighbors),
    "embed": Case(what="JPEG to features, ResNet-18, 224 px", unit="images/s", prepare=embedding),
    "processes-resnet10-w16": processes_case("resnet10", 16, 128, 20),
    "processes-resnet18": processes_case("resnet18", 64, 128, 3),
    "processes-resnet18-512": processes_case("resnet18", 64, 512, 2),
    "start": Case(what="from nothing to the end of a process, or to a first step", unit="1/s", prepare=start),
}
