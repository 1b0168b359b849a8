"""Run folders become one web page that needs no network: verdict, results, curves, views, a map of the images, recipe.

All that a run says is on the page as JSON, in an element that is no markup, and the page's script shows it as text. The
page allows itself that one script, by its digest, and no connection. Nothing here trains.
"""

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from simsiam import __version__
from simsiam.config.protocols import PROTOCOLS
from simsiam.data.decode import Unreadable
from simsiam.data.images import Images, evenly_spaced, measure_sizes, sample
from simsiam.embeddings.cluster import center_and_normalize, kmeans
from simsiam.embeddings.search import search_neighbors
from simsiam.errors import UsageError, WorkFailed, check_ranges, printable
from simsiam.model.precision import Compute
from simsiam.monitoring.features import extract_features
from simsiam.pages.preview import MIN_SIDE, build_sheet, describe_recipe, to_rgb
from simsiam.runs.encoder import load
from simsiam.runs.environment import utc_now
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import Source, open_source
from simsiam.utils.files import atomic_write
from simsiam.utils.workers import CPU_CORES

MIN_MAP_IMAGES, MAX_MAP_IMAGES = 5, 20_000  # images on a map
THUMBNAIL_SIDES = (
    96,
    64,
    48,
    32,
)  # of a thumbnail in pixels: the largest with which all fill at most PIXELS
MAX_THUMBNAIL_PIXELS = 42_000_000  # of 10,000 images 64 x 64; what a browser decodes, sheet by sheet as needed, times 4 bytes
SHEET_SIDE = 1920  # the side of a sheet of thumbnails in pixels; every one of SIDES divides it
WEBP_QUALITIES = (80, 60, 40, 20)  # of WebP: the first with which all sheets of a page fit in BYTES
MAX_THUMBNAIL_BYTES = (
    14_000_000  # a third more as text; 10,000 images then leave 5 MB of a page's 25 MB for all else
)
NUM_NEIGHBORS = 8  # of every image
MAX_CURVE_POINTS = 1000  # of a curve
MAX_DETECTION_SIDE = 1600  # pixels of a picture of detections
PREVIEW_ROWS, VIEWS_PER_ROW = 6, 8  # images shown with their views, and views of each
CURVE_NAMES = (
    "loss", "z_std_sqrt_d", "z_rank", "h_rank", "knn_top1", "knn_top1_z", "lr", "lr_predictor", "view_retrieval",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Images of one source that can be read, and their thumbnails."""

    images: Images
    thumbnails: list[np.ndarray]  # each uint8 (side, side, 3)
    pixelated: bool  # they are the images' own pixels, not fewer


def report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] | None = None,
    limit: int = 3000,
    images: bool = True,
) -> Path:
    """Write one page about a run, or about several side by side; returns its path, report.html in the first run.

    The map has at most `limit` images, spread evenly over what the run learned from; without `images` none is read, and
    there is no map. A page of that name is replaced. Raises UsageError for a wrong request. What cannot be shown, such
    as the map of images that have moved, is said in its place.
    """
    folders = [Run(run) for run in ([runs] if isinstance(runs, str | os.PathLike) else runs)]
    if not folders:
        raise UsageError("a report takes at least one run folder")
    path = Path(out) if out is not None else folders[0].path / "report.html"
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UsageError(
            f"--out is {printable(str(path))}: it takes the name of a page that ends in .html"
        )
    if not path.parent.is_dir():
        raise UsageError(
            f"--out is {printable(str(path))}, and there is no folder {printable(str(path.parent))}"
        )
    check_ranges(SimpleNamespace(limit=limit), limit=(MIN_MAP_IMAGES, MAX_MAP_IMAGES))
    told = [summarize_run(folder) for folder in folders]
    galleries = add_views_and_maps(folders, told, limit) if images else []
    content = render_report(
        {"made": utc_now(), "version": __version__, "runs": told, "galleries": galleries}
    )
    with atomic_write(path) as part:
        part.write_text(content, encoding="utf-8")
    return path


def render_report(data: Mapping[str, Any]) -> str:
    """The page that shows the data. Whatever the data hold, they cannot end the element they stand in."""
    part = {
        name: (files("simsiam") / "page" / f"page.{name}").read_text("utf-8")
        for name in ("html", "css", "js")
    }
    digest = {
        name: base64.b64encode(sha256(part[name].encode()).digest()).decode()
        for name in ("css", "js")
    }
    made = part["html"].replace("{css-digest}", digest["css"]).replace("{js-digest}", digest["js"])
    made = made.replace("{css}", part["css"]).replace("{js}", part["js"])
    return made.replace(
        "{data}", json.dumps(replace_nonfinite(data), separators=(",", ":")).replace("<", "\\u003c")
    )


def replace_nonfinite(value: Any) -> Any:
    """The same with null for what is no number: strict JSON."""
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- what a run says --------------------------------------------------------------------------------------------------


def summarize_run(run: Run) -> dict[str, Any]:
    """All of a run folder but its images and weights."""
    unreadable = [printable(line) for line in run.read_quarantine()]
    return {
        "path": printable(str(run.path)),
        "summary": run.json("summary.json"),
        "curves": extract_curves(run.metrics()),
        "results": sorted_evaluations(run),
        "transfers": transfer_records(run),
        "recipe": run.recipe.to_dict(),
        "environment": run.json("environment.json"),
        "unreadable": {"count": len(unreadable), "first": unreadable[:20]},
        "views": None,
        "map": None,
    }


def sorted_evaluations(run: Run) -> list[dict[str, Any]]:
    """All measurements, in the order of the protocols."""
    ranks = {name: rank for rank, name in enumerate(PROTOCOLS)}
    return sorted(run.evaluations(), key=lambda record: ranks.get(record["protocol"], len(ranks)))


def transfer_records(run: Run) -> list[dict[str, Any]]:
    """What detectors made of the backbone are worth, each with its picture or None."""
    found = []
    for record in run.transfers():
        try:
            with Image.open(run.path / "transfers" / str(record.get("picture"))) as opened:
                drawing = opened.convert("RGB")
        except (OSError, ValueError):
            found.append(record | {"shown": None})
            continue
        drawing.thumbnail((MAX_DETECTION_SIDE, MAX_DETECTION_SIDE), Image.Resampling.LANCZOS)
        found.append(record | {"shown": webp_data_uri(encode_webp(drawing, 85))})
    return found


def extract_curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """CURVES as columns beside `step` and `epoch`, of at most POINTS logged steps and of each measured one."""
    logged = [i for i, line in enumerate(lines) if not {"knn_top1", "view_retrieval"} & line.keys()]
    left_out = (
        set(logged)
        - {logged[i] for i in evenly_spaced(len(logged), MAX_CURVE_POINTS)}
        - {len(lines) - 1}
    )
    kept = [line for i, line in enumerate(lines) if i not in left_out]
    columns = {
        key: [round_significant(line.get(key)) for line in kept]
        for key in ("step", "epoch", *CURVE_NAMES)
    }
    return {
        key: column for key, column in columns.items() if any(value is not None for value in column)
    }


def round_significant(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.5g}")


# --- what it makes of its images --------------------------------------------------------------------------------------


def add_views_and_maps(
    runs: Sequence[Run], summaries: Sequence[dict[str, Any]], limit: int
) -> list[dict[str, Any]]:
    """Add to each run its views and its map, or why there are none; returns the galleries that the maps refer to.

    Runs that learned from the same source share a gallery.
    """
    sources: dict[tuple[Any, ...], Source] = {}
    galleries: dict[tuple[Any, ...], Gallery] = {}
    for run, about in zip(runs, summaries, strict=True):
        key = run.recipe.source, run.recipe.channels
        try:
            if key not in sources:
                sources[key] = open_source(*key)
            about["views"] = render_views(run, sources[key])
            encoder = load(run.path)
            if key not in galleries:
                galleries[key] = build_gallery(sample(sources[key].train, limit))
            print(f"{about['path']}: mapping {len(galleries[key].images):,} images", flush=True)
            about["map"] = {
                "gallery": list(galleries).index(key),
                **map_images(encoder, galleries[key].images),
            }
        except (UsageError, WorkFailed) as error:
            about["missing"] = (
                f"no {'map' if about['views'] else 'images'}: {' '.join(str(error).split())}"
            )
            print(f"{about['path']}: {about['missing']}", flush=True)
    return [
        encode_gallery(seen, MAX_THUMBNAIL_BYTES // len(galleries)) for seen in galleries.values()
    ]


def render_views(run: Run, source: Source) -> dict[str, Any]:
    """Images as training sees them, and the recipe that makes their views, in words."""
    sheet = build_sheet(run.recipe, source, (), rows=PREVIEW_ROWS, views=VIEWS_PER_ROW)
    return {
        "words": [{"name": name, "lines": lines} for name, lines in describe_recipe(run.recipe)],
        "pixelated": len(sheet.rows[0].views[0]) < MIN_SIDE,
        "rows": [
            {
                "name": printable(row.key),
                "pictures": [
                    webp_data_uri(encode_webp(shrink_to_image(p), 90))
                    for p in (row.original, *row.views)
                ],
            }
            for row in sheet.rows
        ],
    }


def shrink_to_image(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) at its own size, or reduced to twice that at which small views are shown."""
    image = Image.fromarray(pixels)
    image.thumbnail((2 * MIN_SIDE, 2 * MIN_SIDE), Image.Resampling.LANCZOS)
    return image


def encode_webp(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def webp_data_uri(image: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(image).decode()


def build_gallery(images: Images) -> Gallery:
    """The readable ones of some images, and a thumbnail of each: its center, which is what a backbone sees of it.

    Raises WorkFailed where none can be read.
    """
    fitting = [
        side for side in THUMBNAIL_SIDES if len(images) * side**2 <= MAX_THUMBNAIL_PIXELS
    ] or [THUMBNAIL_SIDES[-1]]
    sizes = measure_sizes(images)
    side = next(
        (s for s in reversed(THUMBNAIL_SIDES) if len(sizes) and s >= np.median(sizes.min(1))),
        THUMBNAIL_SIDES[0],
    )
    side = min(side, fitting[0])

    def thumbnail(i: int) -> np.ndarray | str:
        try:
            image = Image.fromarray(to_rgb(images.read(i, min_side=side)))
        except Unreadable as error:
            return str(error)
        return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))

    with ThreadPoolExecutor(CPU_CORES) as pool:
        made = list(pool.map(thumbnail, range(len(images))))
    good = [i for i, found in enumerate(made) if isinstance(found, np.ndarray)]
    if not good:
        raise WorkFailed(
            f"none of the {len(images)} images can be read; the first, {printable(images.keys[0])}: {made[0]}"
        )
    thumbnails = [found for found in made if isinstance(found, np.ndarray)]
    pixelated = bool(len(sizes)) and bool((sizes == side).all())
    return Gallery(images=images.take(np.array(good)), thumbnails=thumbnails, pixelated=pixelated)


def encode_gallery(gallery: Gallery, limit_bytes: int) -> dict[str, Any]:
    """Names, labels and thumbnails of a gallery for the page: sheets of many, as few as possible, row by row."""
    side, images = len(gallery.thumbnails[0]), gallery.images
    across = SHEET_SIDE // side
    sheets = []
    for start in range(0, len(images), across**2):
        part = gallery.thumbnails[start : start + across**2]
        sheet = np.zeros(
            (-(-len(part) // across) * side, min(across, len(part)) * side, 3), np.uint8
        )
        for place, pixels in enumerate(part):
            y, x = side * (place // across), side * (place % across)
            sheet[y : y + side, x : x + side] = pixels
        sheets.append(Image.fromarray(sheet))
    for quality in WEBP_QUALITIES:
        encoded = [encode_webp(sheet, quality) for sheet in sheets]
        if sum(map(len, encoded)) <= limit_bytes:
            break
    return {
        "names": [printable(images.keys[i]) for i in range(len(images))],
        "labels": None if images.labels is None else images.labels.tolist(),
        "classes": [printable(name) for name in images.classes],
        "side": side,
        "across": across,
        "pixelated": gallery.pixelated,
        "sheets": [webp_data_uri(sheet) for sheet in encoded],
    }


def map_images(encoder: Any, images: Images) -> dict[str, Any]:
    """Where a backbone puts each image, which others it finds most alike, and clusters of them.

    Raises WorkFailed where images are too few.
    """
    if len(images) < MIN_MAP_IMAGES:
        raise WorkFailed(
            f"a map takes at least {MIN_MAP_IMAGES} images, and there are {len(images)}"
        )
    compute = Compute.pick("auto", "float32")
    # In float32, for cosines lie close together.
    found = extract_features(
        encoder.to(compute.device),
        images,
        encoder.transform,
        compute=compute,
        progress_label="mapping",
    )
    if found.skipped:
        raise WorkFailed(
            "{}, which could be read, cannot be read again: {}".format(*found.skipped[0])
        )
    h = F.normalize(found.matrices[0], dim=1)
    cosine, nearest = search_neighbors(h, NUM_NEIGHBORS)
    layout, xy = project_to_2d(reduce_dimensions(h))
    return {
        "layout": layout,
        "dim": h.shape[1],
        "x": [round(v, 4) for v in xy[:, 0].tolist()],
        "y": [round(v, 4) for v in xy[:, 1].tolist()],
        "clusters": cluster_features(h, len(images.classes)),
        "neighbors": nearest.tolist(),
        "cosines": [[round(v, 3) for v in row] for row in cosine.tolist()],
    }


def reduce_dimensions(h: Tensor) -> np.ndarray:
    """The first 50 principal components, which carry nearly all and make the layout fast."""
    from sklearn.decomposition import PCA

    return PCA(min(50, *h.shape), random_state=0).fit_transform(h.numpy())


def project_to_2d(x: np.ndarray) -> tuple[str, np.ndarray]:
    """The name of the layout, and points (N, 2) in the unit square: PaCMAP or UMAP where installed, else t-SNE.

    t-SNE alone also takes what lies on a line or in a point, as after a collapse.
    """
    plane = x.shape[1] > 1 and x[:, 1].std() > 1e-6
    name, xy = (plane and (_pacmap(x) or _umap(x))) or _tsne(x)
    xy = xy - xy.min(0)
    return name, xy / (xy.max() or 1)


def _pacmap(x: np.ndarray) -> tuple[str, np.ndarray] | None:
    try:
        from pacmap import PaCMAP
    except ImportError:
        return None
    return "PaCMAP", PaCMAP(random_state=0).fit_transform(x, init="pca")


def _umap(x: np.ndarray) -> tuple[str, np.ndarray] | None:
    try:
        from umap import UMAP
    except ImportError:
        return None
    return "UMAP", UMAP(random_state=0).fit_transform(x)


def _tsne(x: np.ndarray) -> tuple[str, np.ndarray]:
    """From the first two principal components, so that far apart stays far apart; at random after a collapse."""
    from sklearn.manifold import TSNE

    start = "pca" if x[:, 0].std() > 1e-6 and x.shape[1] > 1 else "random"
    return "t-SNE", TSNE(
        perplexity=min(30, (len(x) - 1) / 3), init=start, random_state=0
    ).fit_transform(x)


def cluster_features(h: Tensor, num_classes: int) -> list[int]:
    """Those of `simsiam cluster`: as many as classes, or ten, or as few as there are different images."""
    x = center_and_normalize(h).numpy()
    count = min(num_classes or 10, len(np.unique(x.round(6), axis=0)))
    return kmeans(x, count, seed=0).assignments.tolist()
