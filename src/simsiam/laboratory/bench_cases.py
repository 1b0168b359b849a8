"""The cases of `simsiam bench`: what is compared with which standard implementation."""

import importlib
import io
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageFilter
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset
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
from simsiam.data.decode import decode_image
from simsiam.data.images import Images, from_arrays, load_into_memory
from simsiam.data.storage import EncodedColumn, FolderFiles, Names, numbered_keys
from simsiam.data.transform import Transform
from simsiam.data.views import make_views
from simsiam.errors import WorkFailed
from simsiam.model.optimizers import set_lr
from simsiam.model.precision import Compute
from simsiam.model.siamese import build
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.nearest_neighbors import IMAGENET_K, knn_scores
from simsiam.sources.disk_cache import PixelFile, with_pixel_file, write_pixel_file
from simsiam.training.prepare import build_training_setup
from simsiam.training.step import build_gradient_step
from simsiam.utils.flops import count_flops
from simsiam.utils.workers import CPU_CORES

MEAN, STD = CHANNEL_STATISTICS["cifar10"]
PHOTO_SIZE = (380, 460)  # height and width of a photograph in pixels: ImageNet's means

Variants = Mapping[str, Callable[[], object]]
PillowTransform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, kw_only=True)
class BenchContext:
    """Where a case runs."""

    compute: Compute
    folder: Path  # for files; empty at first, deleted at the end


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Functions that do the same work; the first is the standard one, the reference of ratios."""

    num_items: int  # processed by one call
    variants: Variants
    flops: float = 0.0  # of one call of simsiam's variant, if arithmetic is the limit
    bytes_moved: float = 0.0  # read and written by one call, if memory is the limit
    precision: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A comparison that can be prepared and measured."""

    description: str
    unit: str  # of the rate
    prepare: Callable[[BenchContext], Comparison]
    threads: int | None = None  # None: torch's default
    device: str | None = None  # the only type of device that the case is for


def is_installed(name: str) -> bool:
    """Check whether a module can be imported, with all that it needs.

    Args:
        name: The module.

    Returns:
        Whether it can.
    """
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def make_photographs(count: int, height: int, width: int) -> list[bytes]:
    """Generate JPEG files with about as many bytes per pixel as photographs.

    They show large soft patches under fine grain.

    Args:
        count: The number of files.
        height: Pixels.
        width: Pixels.

    Returns:
        The contents of the files, the same in every call.
    """
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        colors = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        patches = np.asarray(colors.resize((width, height)))
        grain = rng.integers(-12, 13, (height, width, 1))
        image = Image.fromarray((patches + grain).clip(0, 255).astype(np.uint8))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=75)
        files.append(file.getvalue())
    return files


class PillowBlur:
    """Gaussian blur with Pillow, as in the authors' code.

    Args:
        sigma: The range of the standard deviation in pixels.
    """

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur an image.

        Args:
            image: The image.

        Returns:
            The blurred image.
        """
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def torchvision_transform(
    views: Views, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> PillowTransform:
    """Build the transform of one view from torchvision's transforms.

    Args:
        views: The parameters of the view.
        size: The side of the view in pixels.
        mean: Mean of each channel.
        std: Standard deviation of each channel.

    Returns:
        Maps a Pillow image to (3, size, size) float32.
    """
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(views.crop_min, views.crop_max)),
            T.RandomApply([T.ColorJitter(*views.jitter)], p=views.jitter_p),
            T.RandomGrayscale(p=views.gray),
            T.RandomApply([PillowBlur(views.blur_sigma)], p=views.blur),
            T.RandomHorizontalFlip(p=views.flip),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )


def lightly_transform(
    views: Views, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> PillowTransform:
    """Build the transform of one view with lightly, whose defaults are SimSiam's.

    Args:
        views: The parameters of the view; the smallest crop and the blur are passed on.
        size: The side of the view in pixels.
        mean: Mean of each channel.
        std: Standard deviation of each channel.

    Returns:
        Maps a Pillow image to (3, size, size) float32.
    """
    from lightly.transforms.simsiam_transform import SimSiamViewTransform

    return SimSiamViewTransform(
        input_size=size,
        min_scale=views.crop_min,
        gaussian_blur=views.blur,
        normalize={"mean": list(mean), "std": list(std)},
    )


class JpegDataset(Dataset):
    """JPEG images through transforms, each image through each: what a loop's workers do.

    Args:
        files: Contents or paths of JPEG files.
        *transforms: The transforms.
    """

    def __init__(self, files: Sequence[bytes | Path], *transforms: PillowTransform):
        self.files, self.transforms = files, transforms

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> list[Tensor]:
        file = self.files[i]
        with JpegImageFile(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            image = opened.convert("RGB")
        return [transform(image) for transform in self.transforms]

    def data_loader(self, batch_size: int) -> DataLoader:
        """Build a loader with a worker for every core.

        Args:
            batch_size: Images in a batch.

        Returns:
            The loader.
        """
        return DataLoader(self, batch_size=batch_size, num_workers=CPU_CORES)


# --- the cases ------------------------------------------------------------------------------------


def images_from_jpegs(files: Sequence[bytes]) -> Images:
    """Build images that are kept as JPEG in memory.

    Args:
        files: The contents of the files.

    Returns:
        The images.
    """
    storage = EncodedColumn(pa.array(files, pa.large_binary()))
    return Images(numbered_keys("bench", len(files)), storage)


def bench_training(
    context: BenchContext, *, backbone: str, width: int = 64, batch_size: int
) -> Comparison:
    """Compare training steps with images of 32 pixels, including loading and augmentation.

    simsiam decodes images once before the first step, as it does in training.

    Args:
        context: Where the case runs.
        backbone: The name of the backbone.
        width: The width of the backbone.
        batch_size: Images in a batch.

    Returns:
        The comparison.
    """
    compute = context.compute
    device = compute.device
    # Long enough that the start of a loader does not count.
    steps = 20 if device.type == "cuda" else max(1, 64 // width)
    settings = cifar_recipe() | _step_settings(backbone, width, batch_size)
    recipe = Recipe().replace(**settings, device=device.type).resolve()
    views = recipe.method.views[0]
    files = make_photographs(batch_size, 32, 32) * steps
    train, _ = load_into_memory(images_from_jpegs(files), 2**30)

    def loop(transform: PillowTransform) -> Callable[[], None]:
        model = build(recipe.method, backbone=backbone, image_size=32, width=width).to(device)
        sgd = torch.optim.SGD(
            model.parameters(), lr=recipe.peak_lr, momentum=0.9, weight_decay=5e-4
        )
        loader = JpegDataset(files, transform, transform).data_loader(batch_size)

        def run() -> None:
            for x1, x2 in loader:
                loss = model(x1.to(device), x2.to(device)).loss
                sgd.zero_grad()
                loss.backward()
                sgd.step()

        return run

    with count_flops() as counter:
        make_training_steps(recipe, train, 1)()
    ways = {
        "plain loop, torchvision's transforms": loop(torchvision_transform(views, 32)),
        "simsiam": make_training_steps(recipe, train, steps),
    }
    if device.type == "cuda":
        ways["simsiam, compiled"] = make_training_steps(recipe.replace(compile=True), train, steps)
    if is_installed("lightly.transforms"):
        ways["plain loop, lightly's transform"] = loop(lightly_transform(views, 32))
    return Comparison(
        num_items=len(files),
        variants=ways,
        flops=steps * counter.get_total_flops(),
        precision=compute.precision,
    )


def make_training_steps(recipe: ResolvedRecipe, train: Images, steps: int) -> Callable[[], None]:
    """Build a function that makes the next training steps.

    Args:
        recipe: The recipe.
        train: The training images.
        steps: The number of steps in a call.

    Returns:
        The function; each of several processes makes its part of every step.
    """
    model, optimizer, (device, _) = setup = build_training_setup(recipe)
    gradients, starts = build_gradient_step(recipe, setup), itertools.count(0, steps)

    def make_steps() -> None:
        start = next(starts)
        for batch in iter_batches(train, recipe, start, start + steps, device):
            set_lr(optimizer, batch.step % 1000, peak_lr=recipe.peak_lr, steps=1000, warmup_steps=0)
            output = gradients(batch.views, batch.index.to(device), batch.weight)
            optimizer.step()
            model.after_step(output)

    return make_steps


def _step_settings(backbone: str, width: int, batch_size: int) -> dict[str, Any]:
    """Collect the settings of a recipe that cases choose.

    Args:
        backbone: The name of the backbone.
        width: The width of the backbone.
        batch_size: Images in a batch.

    Returns:
        Settings by name.
    """
    return {
        "backbone": backbone,
        "width": width,
        "batch_size": batch_size,
        "mean": MEAN,
        "std": STD,
    }


def bench_processes(
    context: BenchContext, *, backbone: str, width: int, batch_size: int, steps: int
) -> Comparison:
    """Compare one process of two threads with two processes of one thread that share each batch.

    Args:
        context: Where the case runs.
        backbone: The name of the backbone.
        width: The width of the backbone.
        batch_size: Images in a batch.
        steps: Steps in a call.

    Returns:
        The comparison.
    """
    settings = backbone, width, batch_size, steps
    spawn = multiprocessing.get_context("spawn")
    # As utils.system.keep_freed_memory sets them.
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
    connections = []
    for rank in range(2):
        connection, worker_connection = spawn.Pipe()
        arguments = worker_connection, rank, str(context.folder / "store"), *settings
        spawn.Process(target=run_worker, args=arguments, daemon=True).start()
        connections.append(connection)

    def both() -> None:
        for connection in connections:
            connection.send(True)
        for connection in connections:
            connection.recv()

    ways = {
        "one process, two threads": make_synthetic_steps(*settings),
        "simsiam, two processes of one thread": both,
    }
    return Comparison(num_items=steps * batch_size, variants=ways)


def make_synthetic_steps(
    backbone: str, width: int, batch_size: int, steps: int
) -> Callable[[], None]:
    """Build a function that makes training steps with random images on the CPU.

    Args:
        backbone: The name of the backbone.
        width: The width of the backbone.
        batch_size: Images in a batch.
        steps: Steps in a call.

    Returns:
        The function.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 3, 32, 32), dtype=np.uint8)
    settings = shapes_recipe() | _step_settings(backbone, width, batch_size)
    recipe = Recipe().replace(**settings, device="cpu", precision="float32").resolve()
    return make_training_steps(recipe, from_arrays("train", pixels), steps)


def run_worker(
    connection: Connection,
    rank: int,
    store: str,
    backbone: str,
    width: int,
    batch_size: int,
    steps: int,
) -> None:
    """Make this process's part of the steps at every message, until the connection is closed.

    Args:
        connection: Receives a message for each call, and answers it.
        rank: The rank of this process.
        store: The file through which the two processes find each other.
        backbone: The name of the backbone.
        width: The width of the backbone.
        batch_size: Images in a batch.
        steps: Steps in a call.
    """
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    make_steps = make_synthetic_steps(backbone, width, batch_size, steps)
    with suppress(EOFError):
        while connection.recv():
            make_steps()
            connection.send(True)


def bench_small_views(context: BenchContext) -> Comparison:
    """Compare views of decoded images of 32 pixels, without blur as in appendix D.

    Args:
        context: Where the case runs.

    Returns:
        The comparison.
    """
    count, views, steps = 512, Views(blur=0.0), itertools.count()
    files = make_photographs(count, 32, 32)
    pixels = np.stack([decode_image(file) for file in files])
    pillow_images = [Image.fromarray(image) for image in pixels]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(context.compute.device)

    def batched(compiled: bool) -> list[Tensor]:
        return make_views(
            images,
            (views,),
            view_count=1,
            size=32,
            mean=MEAN,
            std=STD,
            seed=0,
            step=next(steps),
            positions=np.arange(count),
            compiled=compiled,
        )

    def one_by_one(transform: PillowTransform) -> Tensor:
        return torch.stack([transform(image) for image in pillow_images]).to(context.compute.device)

    ways: dict[str, Callable[[], object]] = {
        "torchvision, Pillow": partial(one_by_one, torchvision_transform(views, 32))
    }
    ways |= {"simsiam": partial(batched, False), "simsiam, compiled": partial(batched, True)}
    if is_installed("kornia"):
        import kornia.augmentation as A

        chain = A.AugmentationSequential(
            A.RandomResizedCrop((32, 32), scale=(views.crop_min, views.crop_max)),
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
    """Build a recipe for views of 224 pixels.

    Args:
        device: The device.
        batch_size: Images in a batch.

    Returns:
        The recipe.
    """
    recipe = Recipe().replace(image_size=224, mean=MEAN, std=STD, batch_size=batch_size)
    return recipe.replace(device=device.type).resolve()


def cache_on_disk(images: Images, recipe: ResolvedRecipe, folder: Path) -> Images:
    """Decode images once into a file of pixels.

    Args:
        images: The images.
        recipe: The recipe, which determines their size in the file.
        folder: The folder of the file.

    Returns:
        The same images, read from the file.
    """
    min_side, path = min_decode_side(recipe), folder / "pixels.npy"
    write_pixel_file(images, path, min_side, 2**40)
    return with_pixel_file(images, PixelFile(path, images.channels), min_side)


def bench_large_views(context: BenchContext) -> Comparison:
    """Compare two views of 224 pixels from each JPEG file, in one process.

    Args:
        context: Where the case runs.

    Returns:
        The comparison.
    """
    count, device = 128, context.compute.device  # about a second each; shorter rounds vary more
    files, recipe, index = (
        make_photographs(count, *PHOTO_SIZE), photo_recipe(device, count), np.arange(count),
    )  # fmt: skip
    images, view = images_from_jpegs(files), torchvision_transform(recipe.method.views[0], 224)
    cached = cache_on_disk(images, recipe, context.folder)
    dataset, compiled = JpegDataset(files, view, view), recipe.replace(compile=True)
    ways = {
        "torchvision, Pillow": lambda: [dataset[i] for i in range(count)],
        "simsiam": lambda: make_training_views(images, index, recipe, 0, device),
        "simsiam, compiled": lambda: make_training_views(images, index, compiled, 0, device),
        "simsiam, what workers do of it": lambda: crop_images(images, index, recipe, 0, 2),
        "the same, decoded on disk": lambda: crop_images(cached, index, recipe, 0, 2),
    }
    return Comparison(num_items=count, variants=ways)


def bench_folder(context: BenchContext) -> Comparison:
    """Compare two views of 224 pixels from each file of a folder, made by all workers.

    Args:
        context: Where the case runs.

    Returns:
        The comparison.
    """
    device = context.compute.device
    batch_size, steps = 64, 16  # long enough that the start of the workers does not count
    paths = [context.folder / f"{i}.jpg" for i in range(batch_size * steps)]
    for path, file in zip(paths, make_photographs(len(paths), *PHOTO_SIZE)):
        path.write_bytes(file)
    names = Names(pa.array([path.name.encode() for path in paths], pa.large_binary()))
    images = Images(names, FolderFiles(context.folder, names))
    recipe = photo_recipe(device, batch_size)
    cached = cache_on_disk(images, recipe, context.folder)
    view = torchvision_transform(recipe.method.views[0], 224)
    loader = JpegDataset(paths, view, view).data_loader(batch_size)

    def read_batches(source: Images) -> None:
        for _ in iter_batches(source, recipe, 0, steps, device):
            pass

    ways = {
        "DataLoader, torchvision, Pillow": lambda: [
            [x.to(device) for x in views] for views in loader
        ][:0],
        "simsiam": lambda: read_batches(images),
        "simsiam, decoded on disk": lambda: read_batches(cached),
    }
    return Comparison(num_items=len(paths), variants=ways)


def bench_neighbors(context: BenchContext) -> Comparison:
    """Compare kNN with k = 200: 10,000 queries in 50,000 rows of 512 numbers.

    All variants are exact and use the same weights.

    Args:
        context: Where the case runs.

    Returns:
        The comparison.
    """
    from sklearn.neighbors import KNeighborsClassifier

    rng = torch.Generator().manual_seed(0)
    bank, queries = (
        nn.functional.normalize(torch.randn(n, 512, generator=rng), dim=1) for n in (50_000, 10_000)
    )
    labels = torch.randint(0, 10, (len(bank),), generator=rng)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance**2 / 2) / 0.1)  # the cosine of unit vectors is 1 - distance²/2

    classifier = KNeighborsClassifier(IMAGENET_K, weights=weights, algorithm="brute").fit(
        bank.numpy(), labels.numpy()
    )
    on_device = tuple(x.to(context.compute.device) for x in (bank, labels, queries))
    ways: dict[str, Callable[[], object]] = {
        "scikit-learn, brute force": lambda: classifier.predict(queries.numpy()),
        "simsiam": lambda: knn_scores(*on_device, classes=10).argmax(1),
    }
    if is_installed("lightly.utils.benchmarking"):
        from lightly.utils.benchmarking import knn_predict

        columns = on_device[0].T.contiguous()
        ways["lightly, 512 queries at a time"] = lambda: [
            knn_predict(part, columns, on_device[1], num_classes=10, knn_k=IMAGENET_K, knn_t=0.1)
            for part in on_device[2].split(512)
        ]
    return Comparison(
        num_items=len(queries), variants=ways, flops=2.0 * bank.numel() * len(queries)
    )


def bench_embedding(context: BenchContext) -> Comparison:
    """Compare the features of a ResNet-18 at 224 pixels, from JPEG files.

    Args:
        context: Where the case runs.

    Returns:
        The comparison.
    """
    compute, files = context.compute, make_photographs(512, *PHOTO_SIZE)
    images = images_from_jpegs(files)
    model = build(backbone="resnet18").backbone.eval().to(compute.device)
    backbone = compute.place(build(backbone="resnet18").backbone)
    transform = Transform(224, MEAN, STD)
    steps = [T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)]
    loader = JpegDataset(files, T.Compose(steps)).data_loader(64)

    def loop() -> None:
        with torch.no_grad():
            for (x,) in loader:
                model(x.to(compute.device)).cpu()

    ways = {
        "plain loop": loop,
        "simsiam": lambda: extract_features(backbone, images, transform, compute=compute),
    }
    return Comparison(num_items=len(files), variants=ways)


def bench_startup(context: BenchContext) -> Comparison:
    """Time processes from start to end, and a run from its start to its first logged step.

    Args:
        context: Where the case runs.

    Returns:
        The comparison.
    """
    runs = itertools.count()

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    def first_step() -> None:
        out, device = context.folder / str(next(runs)), context.compute.device.type
        arguments = ["pretrain", "shapes", "--device", device, "--out", str(out)]
        command, metrics = [sys.executable, "-m", "simsiam", *arguments], out / "metrics.jsonl"
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            try:
                while not (metrics.exists() and metrics.stat().st_size):
                    if process.poll() is not None:
                        error = process.communicate()[1].decode()
                        raise WorkFailed(f"the run ended before its first step: {error}")
                    time.sleep(0.01)
            finally:  # also if the benchmark is interrupted, which must not wait for the run
                process.kill()

    ways = {
        "python -c 'import torch'": lambda: run("-c", "import torch"),
        "simsiam --help": lambda: run("-m", "simsiam", "--help"),
        "simsiam pretrain shapes, to its first step": first_step,
    }
    return Comparison(num_items=1, variants=ways)


def step_case(backbone: str, width: int, batch_size: int, device: str | None = None) -> Case:
    """Build a case of `bench_training`.

    Args:
        backbone: The name of the backbone.
        width: The width of the backbone.
        batch_size: Images in a batch.
        device: The only type of device that the case is for.

    Returns:
        The case.
    """
    network = backbone if width == 64 else f"{backbone} of width {width}"
    prepare = partial(bench_training, backbone=backbone, width=width, batch_size=batch_size)
    description = f"training, {network}, 32 px, batch {batch_size}"
    return Case(description=description, unit="images/s", prepare=prepare, device=device)


def processes_case(backbone: str, width: int, batch_size: int, steps: int) -> Case:
    """Build a case of `bench_processes`.

    Args:
        backbone: The name of the backbone.
        width: The width of the backbone.
        batch_size: Images in a batch.
        steps: Steps in a call.

    Returns:
        The case.
    """
    network = f"{backbone} of width {width}"
    description = f"training, {network}, 32 px, batch {batch_size}, two cores, float32"
    prepare = partial(
        bench_processes, backbone=backbone, width=width, batch_size=batch_size, steps=steps
    )
    return Case(description=description, unit="images/s", prepare=prepare, threads=2)


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
