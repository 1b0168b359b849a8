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
from simsiam.config.recipes import (
    CHANNEL_STATISTICS,
    Recipe,
    ResolvedRecipe,
    cifar_recipe,
    shapes_recipe,
)
from simsiam.data.batches import crop_images, iter_batches, make_training_views, min_decode_side
from simsiam.data.images import Images, from_arrays, load_into_memory
from simsiam.data.storage import EncodedColumn, FolderFiles, Names, numbered_keys
from simsiam.data.transform import Transform
from simsiam.data.views import make_views
from simsiam.errors import UsageError, WorkFailed, unknown_name
from simsiam.model.optimizers import set_lr
from simsiam.model.precision import Compute
from simsiam.model.siamese import build
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.nearest_neighbors import IMAGENET_K, knn_scores
from simsiam.runs.environment import collect_environment
from simsiam.sources.disk_cache import PixelFile, with_pixel_file, write_pixel_file
from simsiam.training.prepare import build_training_setup
from simsiam.training.step import build_gradient_step
from simsiam.utils.files import atomic_write
from simsiam.utils.workers import CPU_CORES

ROUNDS = 5
MEAN, STD = CHANNEL_STATISTICS["cifar10"]
PHOTO_SIZE = (380, 460)  # height and width of a photograph: ImageNet's mean


@dataclass(frozen=True, kw_only=True)
class BenchContext:
    """Where a case takes place."""

    compute: Compute
    folder: Path  # for files; empty at first, and gone at the end


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Functions that do the same work; the first is the plain way, which the others are compared with."""

    num_items: int  # of what a call makes or goes through
    variants: Mapping[str, Callable[[], object]]
    flops: float = 0.0  # of a call of ours, where arithmetic is the limit
    bytes_moved: float = 0.0  # that a call of ours has to read and write, where memory is the limit
    precision: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Case:
    description: str
    unit: str
    prepare: Callable[[BenchContext], Comparison]
    threads: int | None = None  # None: as many as torch takes
    device: str | None = None  # the type of the only device that it is for


def bench(
    *, device: str = "auto", out: str | None = None, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure the cases named by `only`, or all; prints a table each, and writes everything measured to `out`, JSON."""
    for name in only:
        if name not in CASES:
            raise unknown_name("case", name, CASES)
    if out is not None and not Path(out).parent.is_dir():
        raise UsageError(f"{Path(out).parent} is not a folder: choose another --out")
    compute = Compute.pick(device)
    console = Console(highlight=False)
    found: dict[str, Any] = {}
    for name in only or [
        name for name, case in CASES.items() if case.device in (None, compute.device.type)
    ]:
        with tempfile.TemporaryDirectory() as folder, torch_threads(CASES[name].threads):
            scene = BenchContext(compute=compute, folder=Path(folder))
            found[name] = measure_case(CASES[name], CASES[name].prepare(scene), compute.device)
        console.print(result_table(name, found[name]))
    here = {
        k: v for k, v in collect_environment(compute).items() if k not in ("command", "processes")
    }
    peers = {
        name: importlib.metadata.version(name)
        for name in ("kornia", "lightly")
        if is_installed(name)
    }
    report = here | {"cores": CPU_CORES, "peers": peers, "rounds": ROUNDS, "cases": found}
    if out is not None:
        with atomic_write(Path(out)) as part:
            part.write_text(json.dumps(report, indent=1) + "\n")
    return report


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_case(case: Case, comparison: Comparison, device: torch.device) -> dict[str, Any]:
    """A contest in numbers: times in seconds, rates per second, ratios to the plain way, memory in MiB."""
    seconds, peaks = time_interleaved(comparison.variants, device)
    plain, ways = next(iter(seconds)), {}
    for name, times in seconds.items():
        ratios = sorted(p / t for p, t in zip(seconds[plain], times, strict=True))
        ways[name] = {
            "seconds": round_to_four_digits(median(times)),
            "rate": round_to_four_digits(comparison.num_items / median(times)),
            "ratio": round_to_four_digits(median(ratios)),
            "ratios": [round_to_four_digits(ratio) for ratio in ratios],
            "peak_mib": None
            if any(map(isnan, peaks[name]))
            else round_to_four_digits(max(peaks[name])),
        }
    found = {
        "what": case.description,
        "unit": case.unit,
        "threads": torch.get_num_threads(),
        "ways": ways,
    }
    fastest = min(median(times) for name, times in seconds.items() if name.startswith("simsiam"))
    if comparison.flops:
        limit = {
            "of": f"FLOP/s of a {comparison.precision} product",
            "machine": matmul_throughput(device, comparison.precision),
        }
        found["limit"] = limit | {"achieved": round_to_four_digits(comparison.flops / fastest)}
    elif comparison.bytes_moved:
        limit = {"of": "bytes/s of a copy", "machine": copy_bandwidth(device)}
        found["limit"] = limit | {
            "achieved": round_to_four_digits(comparison.bytes_moved / fastest)
        }
    return found


def time_interleaved(
    variants: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds, and MiB at the peak beyond those at the start, of each way in each round, after one that is not told."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, way in variants.items():
            before = peak_memory_mib(device, reset=True)
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            peaks[name].append(peak_memory_mib(device) - before)
    return {k: v[1:] for k, v in seconds.items()}, {k: v[1:] for k, v in peaks.items()}


def peak_memory_mib(device: torch.device, reset: bool = False) -> float:
    """The peak of this process's memory in MiB, worker processes not counted; `forget` makes it what is held now.

    nan where the system does not tell: on a CPU only Linux does.
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return nan
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


@cache
def matmul_throughput(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(
        n, n, device=device, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32
    )
    return round_to_four_digits(
        2 * n**3 / min(time_interleaved({"": lambda: x @ x}, device)[0][""])
    )


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of a large copy."""
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    return round_to_four_digits(
        2 * x.nbytes / min(time_interleaved({"": lambda: y.copy_(x)}, device)[0][""])
    )


def round_to_four_digits(x: float) -> float:
    """Four digits; more would be noise."""
    return float(f"{x:.4g}")


@contextmanager
def torch_threads(num_threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_installed(name: str) -> bool:
    """Whether a peer's module is there, with all that it needs."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def result_table(name: str, result: Mapping[str, Any]) -> Table:
    """A case in at most 80 columns."""
    made, limit = (
        Table(title=f"{name}: {result['what']}", title_justify="left", width=80),
        result.get("limit"),
    )
    if limit:
        share = f"{limit['achieved'] / limit['machine']:.0%} of the machine's {limit['machine']:.2g} {limit['of']}"
        made.caption, made.caption_justify = f"simsiam reaches {share}", "left"
    made.add_column(f"threads: {result['threads']}")
    for head in ("seconds", result["unit"], "ratio", "MiB more"):
        made.add_column(head, justify="right")
    for way, v in result["ways"].items():
        peak = "" if v["peak_mib"] is None else f"{v['peak_mib']:.0f}"
        made.add_row(
            way,
            f"{v['seconds']:.3g}",
            f"{v['rate']:,.{0 if v['rate'] >= 100 else 2}f}",
            f"{v['ratio']:.2f}",
            peak,
        )
    return made


# --- the plain way ----------------------------------------------------------------------------------------------------


def make_photographs(count: int, height: int, width: int) -> list[bytes]:
    """JPEG files of large soft patches under a fine grain, as photographs are; about as many bytes a pixel as they."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        patches = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            (width, height)
        )
        grain = rng.integers(-12, 13, (height, width, 1))
        file = io.BytesIO()
        Image.fromarray((np.asarray(patches) + grain).clip(0, 255).astype(np.uint8)).save(
            file, "JPEG", quality=75
        )
        files.append(file.getvalue())
    return files


class PillowBlur:
    """A Gaussian blur as in the authors' code."""

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def torchvision_transform(views: Views, size: int) -> Callable[[Image.Image], Tensor]:
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


def lightly_transform(views: Views, size: int) -> Callable[[Image.Image], Tensor]:
    """The same by lightly, whose values are SimSiam's but for the blur and the statistics."""
    from lightly.transforms.simsiam_transform import SimSiamViewTransform

    normalize = {"mean": list(MEAN), "std": list(STD)}
    return SimSiamViewTransform(input_size=size, gaussian_blur=views.blur, normalize=normalize)


class JpegDataset(Dataset):
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

    def data_loader(self, batch_size: int) -> DataLoader:
        return DataLoader(self, batch_size=batch_size, num_workers=CPU_CORES)


# --- the cases --------------------------------------------------------------------------------------------------------


def images_from_jpegs(files: Sequence[bytes]) -> Images:
    storage = EncodedColumn(pa.array(files, pa.large_binary()))
    return Images(numbered_keys("bench", len(files)), storage)


def bench_training(
    context: BenchContext, *, backbone: str, width: int = 64, batch_size: int
) -> Comparison:
    """Load, augment and step, on images of 32 px; ours decodes them once, before the first step, as training does."""
    steps = (
        20 if context.compute.device.type == "cuda" else max(1, 64 // width)
    )  # long enough for a loader's start not to count
    changes: dict[str, Any] = {
        "backbone": backbone,
        "width": width,
        "batch_size": batch_size,
        "mean": MEAN,
        "std": STD,
    }
    recipe = Recipe().replace(**cifar_recipe() | changes, device=context.compute.device.type).resolve()
    views = recipe.method.views[0]
    files = make_photographs(batch_size, 32, 32) * steps
    train, _ = load_into_memory(images_from_jpegs(files), 2**30)
    ours, device, precision = (
        make_training_steps(recipe, train, steps),
        context.compute.device,
        context.compute.precision,
    )

    def loop(transform: Callable[[Image.Image], Tensor]) -> Callable[[], None]:
        plain = build(recipe.method, backbone=backbone, image_size=32, width=width).to(device)
        sgd = torch.optim.SGD(
            plain.parameters(), lr=recipe.peak_lr, momentum=0.9, weight_decay=5e-4
        )
        loader = JpegDataset(files, transform, transform).data_loader(batch_size)

        def run() -> None:
            for x1, x2 in loader:
                loss = plain(x1.to(device), x2.to(device)).loss
                sgd.zero_grad()
                loss.backward()
                sgd.step()

        return run

    with FlopCounterMode(display=False) as counter:
        make_training_steps(recipe, train, 1)()
    ways = {
        "plain loop, torchvision's transforms": loop(torchvision_transform(views, 32)),
        "simsiam": ours,
    }
    if device.type == "cuda":
        ways["simsiam, compiled"] = make_training_steps(recipe.replace(compile=True), train, steps)
    if is_installed("lightly.transforms"):
        ways["plain loop, lightly's transform"] = loop(lightly_transform(views, 32))
    return Comparison(
        num_items=len(files),
        variants=ways,
        flops=steps * counter.get_total_flops(),
        precision=precision,
    )


def make_training_steps(recipe: ResolvedRecipe, train: Images, steps: int) -> Callable[[], None]:
    """A function that takes the next steps of a run; of several processes, its share in them."""
    model, optimizer, (device, _) = parts = build_training_setup(recipe)
    gradients, clock = build_gradient_step(recipe, parts), itertools.count(0, steps)

    def ours() -> None:
        start = next(clock)
        for batch in iter_batches(train, recipe, start, start + steps, device):
            set_lr(optimizer, batch.step % 1000, peak_lr=recipe.peak_lr, steps=1000, warmup_steps=0)
            output = gradients(batch.views, batch.index.to(device), batch.weight)
            optimizer.step()
            model.after_step(output)

    return ours


def bench_processes(
    context: BenchContext, *, backbone: str, width: int, batch_size: int, steps: int
) -> Comparison:
    """Steps on a CPU: by one process of two threads, and by two of one thread each, who share each batch."""
    what = backbone, width, batch_size, steps
    here = multiprocessing.get_context("spawn")
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}  # as cli.keep_memory
    ends = []
    for number in range(2):
        mine, its = here.Pipe()
        given = its, number, str(context.folder / "store"), *what
        here.Process(target=run_worker, args=given, daemon=True).start()
        ends.append(mine)

    def both() -> None:
        for end in ends:
            end.send(True)
        for end in ends:
            end.recv()

    ways = {
        "one process, two threads": make_synthetic_steps(*what),
        "simsiam, two processes of one thread": both,
    }
    return Comparison(num_items=steps * batch_size, variants=ways)


def make_synthetic_steps(
    backbone: str, width: int, batch_size: int, steps: int
) -> Callable[[], None]:
    images = from_arrays(
        "train", np.random.default_rng(0).integers(0, 256, (1024, 3, 32, 32), dtype=np.uint8)
    )
    changes: dict[str, Any] = {
        "backbone": backbone,
        "width": width,
        "batch_size": batch_size,
        "mean": MEAN,
        "std": STD,
    }
    return make_training_steps(
        Recipe().replace(**shapes_recipe() | changes, device="cpu", precision="float32").resolve(),
        images,
        steps,
    )


def run_worker(connection: Any, rank: int, store: str, *step_settings: Any) -> None:
    """One of the two processes: takes its share of the steps whenever it is told to, until nobody is left to tell."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    steps = make_synthetic_steps(*step_settings)
    with suppress(EOFError):
        while connection.recv():
            steps()
            connection.send(True)


def bench_small_views(context: BenchContext) -> Comparison:
    """A view each of decoded images of 32 pixels, without blur as in appendix D."""
    count, views, clock = 512, Views(blur=0.0), itertools.count()
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(file))) for file in make_photographs(count, 32, 32)]
    )
    pillow = [Image.fromarray(image) for image in pixels]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(context.compute.device)

    def ours(compiled: bool) -> list[Tensor]:
        key: dict[str, Any] = {"seed": 0, "step": next(clock), "positions": np.arange(count)}
        return make_views(
            images, (views,), view_count=1, size=32, mean=MEAN, std=STD, **key, compiled=compiled
        )

    def one_by_one(transform: Callable[[Image.Image], Tensor]) -> Tensor:
        return torch.stack([transform(image) for image in pillow]).to(context.compute.device)

    ways: dict[str, Callable[[], object]] = {
        "torchvision, Pillow": partial(one_by_one, torchvision_transform(views, 32))
    }
    ways |= {"simsiam": partial(ours, False), "simsiam, compiled": partial(ours, True)}
    if is_installed("kornia"):
        import kornia.augmentation as A

        chain = A.AugmentationSequential(
            A.RandomResizedCrop((32, 32), scale=(views.crop_min, 1.0)),
            A.RandomHorizontalFlip(p=views.flip),
            A.ColorJitter(*views.jitter, p=views.jitter_p),
            A.RandomGrayscale(p=views.gray),
            A.Normalize(MEAN, STD),
        )
        ways["kornia"] = lambda: chain(images.float() / 255)
    if is_installed("lightly.transforms"):
        ways["lightly"] = partial(one_by_one, lightly_transform(views, 32))
    return Comparison(num_items=count, variants=ways, bytes_moved=5 * images.numel())


def photo_recipe(device: torch.device, batch_size: int) -> ResolvedRecipe:
    return Recipe().replace(
        image_size=224, mean=MEAN, std=STD, batch_size=batch_size, device=device.type
    ).resolve()


def cache_on_disk(images: Images, recipe: ResolvedRecipe, folder: Path) -> Images:
    least, path = min_decode_side(recipe), folder / "pixels.npy"
    write_pixel_file(images, path, least, 2**40)
    return with_pixel_file(images, PixelFile(path, images.channels), least)


def bench_large_views(context: BenchContext) -> Comparison:
    """JPEG files to two views of 224 pixels each, in one process."""
    count = 128  # enough for a second of the plain way: short rounds scatter
    files, recipe, index = (
        make_photographs(count, *PHOTO_SIZE),
        photo_recipe(context.compute.device, count),
        np.arange(count),
    )
    images, view = images_from_jpegs(files), torchvision_transform(recipe.method.views[0], 224)
    kept = cache_on_disk(images, recipe, context.folder)
    plain, compiled = JpegDataset(files, view, view), recipe.replace(compile=True)
    ways = {
        "torchvision, Pillow": lambda: [plain[i] for i in range(count)],
        "simsiam": lambda: make_training_views(images, index, recipe, 0, context.compute.device),
        "simsiam, compiled": lambda: make_training_views(
            images, index, compiled, 0, context.compute.device
        ),
        "simsiam, what workers do of it": lambda: crop_images(images, index, recipe, 0, 2),
        "the same, decoded on disk": lambda: crop_images(kept, index, recipe, 0, 2),
    }
    return Comparison(num_items=count, variants=ways)


def bench_folder(context: BenchContext) -> Comparison:
    """A folder of JPEG files to two views of 224 pixels each, on the device, by all workers."""
    batch_size, steps = 64, 16  # enough for the start of the workers not to count
    paths = [context.folder / f"{i}.jpg" for i in range(batch_size * steps)]
    for path, file in zip(paths, make_photographs(len(paths), *PHOTO_SIZE)):
        path.write_bytes(file)
    names = Names(pa.array([path.name.encode() for path in paths], pa.large_binary()))
    images = Images(names, FolderFiles(context.folder, names))
    recipe = photo_recipe(context.compute.device, batch_size)
    view, kept = (
        torchvision_transform(recipe.method.views[0], 224),
        cache_on_disk(images, recipe, context.folder),
    )
    loader = JpegDataset(paths, view, view).data_loader(batch_size)
    ways = {
        "DataLoader, torchvision, Pillow": lambda: [
            [x.to(context.compute.device) for x in views] for views in loader
        ][:0],
        "simsiam": lambda: [
            batch.step for batch in iter_batches(images, recipe, 0, steps, context.compute.device)
        ],
        "simsiam, decoded on disk": lambda: [
            batch.step for batch in iter_batches(kept, recipe, 0, steps, context.compute.device)
        ],
    }
    return Comparison(num_items=len(paths), variants=ways)


def bench_neighbors(context: BenchContext) -> Comparison:
    """10,000 queries against 50,000 rows of 512 numbers, k = 200: every way is exact and weights alike."""
    from sklearn.neighbors import KNeighborsClassifier

    rng = torch.Generator().manual_seed(0)
    bank, queries = (
        nn.functional.normalize(torch.randn(n, 512, generator=rng), dim=1) for n in (50_000, 10_000)
    )
    labels = torch.randint(0, 10, (len(bank),), generator=rng)

    def weights(distance: np.ndarray) -> np.ndarray:  # of unit vectors: cos = 1 - distance^2 / 2
        return np.exp((1 - distance**2 / 2) / 0.1)

    plain = KNeighborsClassifier(IMAGENET_K, weights=weights, algorithm="brute").fit(
        bank.numpy(), labels.numpy()
    )
    mine = (
        bank.to(context.compute.device),
        labels.to(context.compute.device),
        queries.to(context.compute.device),
    )
    ways: dict[str, Callable[[], object]] = {
        "scikit-learn, brute force": lambda: plain.predict(queries.numpy()),
        "simsiam": lambda: knn_scores(*mine, classes=10).argmax(1),
    }
    if is_installed("lightly.utils.benchmarking"):
        from lightly.utils.benchmarking import knn_predict

        turned = mine[0].T.contiguous()
        ways["lightly, 512 queries at a time"] = lambda: [
            knn_predict(part, turned, mine[1], num_classes=10, knn_k=IMAGENET_K, knn_t=0.1)
            for part in mine[2].split(512)
        ]
    return Comparison(
        num_items=len(queries), variants=ways, flops=2.0 * bank.numel() * len(queries)
    )


def bench_embedding(context: BenchContext) -> Comparison:
    """JPEG files to the features of a ResNet-18 at 224 pixels."""
    files = make_photographs(512, *PHOTO_SIZE)
    images, model = images_from_jpegs(files), build(backbone="resnet18").backbone.eval()
    mine = context.compute.place(build(backbone="resnet18").backbone)
    transform = Transform(224, MEAN, STD)
    plain = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)])
    loader, model = JpegDataset(files, plain).data_loader(64), model.to(context.compute.device)

    def loop() -> None:
        with torch.no_grad():
            for (x,) in loader:
                model(x.to(context.compute.device)).cpu()

    ways = {
        "plain loop": loop,
        "simsiam": lambda: extract_features(mine, images, transform, compute=context.compute),
    }
    return Comparison(num_items=len(files), variants=ways)


def bench_startup(context: BenchContext) -> Comparison:
    """Processes, from nothing to their end, or to the first step that a run has written down."""
    runs = itertools.count()

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    def first_step() -> None:
        out = context.folder / str(next(runs))
        words = [
            "-m",
            "simsiam",
            "pretrain",
            "shapes",
            "--device",
            context.compute.device.type,
            "--out",
            str(out),
        ]
        with subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            journal = out / "metrics.jsonl"
            try:
                while not (journal.exists() and journal.stat().st_size):
                    if process.poll() is not None:
                        raise WorkFailed(
                            f"the run ended before its first step: {process.communicate()[1].decode()}"
                        )
                    time.sleep(0.01)
            finally:  # whoever stops the bench does not wait for a whole run
                process.kill()

    ways = {
        "python -c 'import torch'": lambda: run("-c", "import torch"),
        "simsiam --help": lambda: run("-m", "simsiam", "--help"),
        "simsiam pretrain shapes, to its first step": first_step,
    }
    return Comparison(num_items=1, variants=ways)


def step_case(backbone: str, width: int, batch_size: int, device: str | None = None) -> Case:
    network = backbone if width == 64 else f"{backbone} of width {width}"
    prepare = partial(bench_training, backbone=backbone, width=width, batch_size=batch_size)
    what = f"training, {network}, 32 px, batch {batch_size}"
    return Case(description=what, unit="images/s", prepare=prepare, device=device)


def processes_case(backbone: str, width: int, batch_size: int, steps: int) -> Case:
    what = f"training, {backbone} of width {width}, 32 px, batch {batch_size}, two cores, float32"
    prepare = partial(
        bench_processes, backbone=backbone, width=width, batch_size=batch_size, steps=steps
    )
    return Case(description=what, unit="images/s", prepare=prepare, threads=2)


CASES: dict[str, Case] = {
    "step-resnet18-512": step_case("resnet18", 64, 512, "cuda"),
    "step-resnet18-256": step_case("resnet18", 64, 256),
    "step-resnet18-64": step_case("resnet18", 64, 64),
    "step-resnet18-w16-256": step_case("resnet18", 16, 256),
    "step-resnet10-w16-128": step_case("resnet10", 16, 128),
    "views-32": Case(
        description="a view of 32 px", unit="views/s", prepare=bench_small_views, threads=1
    ),
    "views-224": Case(
        description="a JPEG to two views of 224 px",
        unit="images/s",
        prepare=bench_large_views,
        threads=1,
    ),
    "folder": Case(
        description="a folder to two views of 224 px", unit="images/s", prepare=bench_folder
    ),
    "knn": Case(description="k = 200 of 50,000 x 512", unit="queries/s", prepare=bench_neighbors),
    "embed": Case(
        description="JPEG to features, ResNet-18, 224 px", unit="images/s", prepare=bench_embedding
    ),
    "processes-resnet10-w16": processes_case("resnet10", 16, 128, 20),
    "processes-resnet18": processes_case("resnet18", 64, 128, 3),
    "processes-resnet18-512": processes_case("resnet18", 64, 512, 2),
    "start": Case(
        description="from nothing to the end of a process, or to a first step",
        unit="1/s",
        prepare=bench_startup,
    ),
}
