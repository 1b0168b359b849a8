"""Write one web page about one or several runs: verdict, results, curves, views, map, recipe.

The page needs no network. Its data is JSON in an element of its own, and the script of the page
shows it as text, never as markup. The page's security policy allows this script, identified by its
digest, and no connections. A page whose data do not match their checksum says that it is damaged.
"""

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import TypedDict, cast
from zlib import crc32

from simsiam import __version__
from simsiam.config.protocols import PROTOCOLS
from simsiam.data.decode import Unreadable, decode_image
from simsiam.data.images import evenly_spaced, sample
from simsiam.embeddings.table import read_embeddings
from simsiam.errors import UsageError, WorkFailed, check_ranges, printable, say_once
from simsiam.monitoring.verdict import features_table
from simsiam.pages.embedding_gallery import (
    NO_LABEL,
    EmbeddingFacts,
    embedding_gallery,
    is_embedding,
)
from simsiam.pages.image_map import (
    MAX_MAP_IMAGES,
    MIN_MAP_IMAGES,
    MapData,
    map_images,
    place_images,
)
from simsiam.pages.preview import MIN_SIDE, build_sheet, describe_recipe
from simsiam.pages.thumbnails import (
    Gallery,
    GalleryData,
    build_gallery,
    encode_gallery,
    encode_webp,
    shrink_to_image,
    webp_data_uri,
)
from simsiam.pages.words import WORDS
from simsiam.runs.compose import open_run_source
from simsiam.runs.encoder import eval_transform, load
from simsiam.runs.environment import utc_now
from simsiam.runs.run_folder import Run
from simsiam.runs.weights import open_weights
from simsiam.sources.open_source import Source
from simsiam.sources.own_marks import is_named
from simsiam.utils.files import write_text
from simsiam.utils.names import without_credentials
from simsiam.utils.read_files import read_bytes

# Bytes of thumbnails on a page. As base64 they take a third more, so a page with 10,000 images has
# 5 MB left for everything else if it is to stay below 25 MB.
MAX_THUMBNAIL_BYTES = 14_000_000
MAX_CURVE_POINTS = 1000  # logged steps in a curve
MAX_DETECTION_SIDE = 1600  # pixels of a picture of detections
MAX_UNREADABLE_NAMES = 20  # unreadable files that the page names
PREVIEW_ROWS, VIEWS_PER_ROW = 6, 8  # images shown with their views, and views of each
VIEW_QUALITY, DETECTION_QUALITY = 90, 85  # of WebP
CURVE_NAMES = (
    "loss", "z_std_sqrt_d", "z_rank", "h_rank", "knn_top1", "knn_top1_z", "lr", "lr_predictor",
    "view_retrieval",
)  # fmt: skip
SCRIPTS = (
    "elements.js", "data.js", "results.js", "curves.js", "images.js", "map.js", "page.js"
)  # fmt: skip
NOT_IN_EMBEDDINGS = (
    "an embedding has no verdict, curves, results, views and recipe: `simsiam report RUN` shows "
    "those of a run"
)
MEASUREMENTS = {"knn_top1", "view_retrieval"}  # keys of lines that a monitor wrote, not a step

Curves = dict[str, list[float | None]]  # columns by name, all of one length


class ViewsData(TypedDict):
    """Images with their views, as the page reads them."""

    description: list[dict[str, object]]  # {"name": heading, "lines": [...]}
    pixelated: bool  # whether the pictures are small and shown enlarged
    rows: list[dict[str, object]]  # {"name": key, "pictures": [data URIs: image, views]}


class RunData(TypedDict):
    """What the page shows of a run, or of an embedding."""

    path: str
    embedding: EmbeddingFacts | None  # None of a run
    summary: Mapping[str, object]
    curves: Curves
    results: list[dict[str, object]]  # evaluation records
    transfers: list[dict[str, object]]  # transfer records; "shown" is a data URI or None
    features: list[tuple[str, str, str]]  # rows of `features_table`
    candidates: list[Mapping[str, object]]  # encoders that `adapt`, or the end of a run, compared
    recipe: Mapping[str, object] | None  # None of an embedding
    environment: Mapping[str, object]
    unreadable: dict[str, object]  # {"count": ..., "first": [...]}
    views: ViewsData | None
    map: dict[str, object] | None  # MapData and "gallery", a position in the page's galleries
    missing: str | None  # why there are no views or no map, if that is an error


def report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    limit: int = 3000,
    images: bool = True,
    no_labels: bool = False,
    backbone: str | None = None,
) -> Path:
    """Write one page about a run or an embedding, or about several of these side by side.

    If the views or the map of a run cannot be shown, for example because its images have moved,
    the page says so in their place.

    Args:
        runs: One or several run folders, weights (see `simsiam.runs.weights.open_weights`), or
            files or folders that `embed` wrote.
        out: The HTML file to write; an existing file is replaced. The default is report.html in the
            first run folder or folder, NAME-report.html beside the file NAME.parquet.
        source: Where the images of the runs are; by default where their recipes say, if you have
            named these places before.
        limit: The number of images on the map, 5 to 20,000, evenly spaced in the training set.
        images: Whether to read images; without them the page has no views and no map.
        no_labels: Whether to ignore the labels of the images.
        backbone: The network of a file of weights.

    Returns:
        The path of the page.

    Raises:
        UsageError: An argument is wrong, or a run folder is damaged.
    """
    names = [runs] if isinstance(runs, str | os.PathLike) else runs
    # Of a Parquet file that is no embedding, `read_embeddings` says what it lacks.
    entries = [
        Path(name)
        if is_embedding(name) or Path(name).suffix == ".parquet"
        else Run(open_weights(name, backbone=backbone))
        for name in names
    ]
    if not entries:
        raise UsageError("give at least one run folder or embedding to report on")
    path = Path(out) if out is not None else default_page(entries[0])
    name = printable(str(path))
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UsageError(f"--out is {name}: give the name of a file ending in .html")
    if not path.parent.is_dir():
        folder = printable(str(path.parent))
        raise UsageError(f"--out is {name}, and there is no folder {folder}")
    check_ranges(SimpleNamespace(limit=limit), limit=(MIN_MAP_IMAGES, MAX_MAP_IMAGES))
    if source and not any(isinstance(entry, Run) for entry in entries):
        raise UsageError(
            "--source is the place of the images of runs, and only embeddings are given"
        )
    summaries, galleries = collect_summaries(
        entries, limit, source=source, images=images, no_labels=no_labels
    )
    encoded: list[GalleryData] = [
        encode_gallery(gallery, MAX_THUMBNAIL_BYTES // len(galleries)) for gallery in galleries
    ]
    shown = escape_texts(summaries)  # of galleries the page escapes the names: it offers a list
    data = {"created": utc_now(), "version": __version__, "words": WORDS}
    write_text(path, render_report({**data, "runs": shown, "galleries": encoded}))
    return path


def default_page(entry: Run | Path) -> Path:
    """Choose the file of the page.

    Args:
        entry: The first run or embedding.
    """
    if isinstance(entry, Run):
        return entry.path / "report.html"
    return entry / "report.html" if entry.is_dir() else entry.with_name(f"{entry.stem}-report.html")


def collect_summaries(
    entries: Sequence[Run | Path],
    limit: int,
    *,
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    images: bool,
    no_labels: bool,
) -> tuple[list[RunData], list[Gallery]]:
    """Collect what the page shows.

    Args:
        entries: Runs, and paths of embeddings.
        limit: The number of images on a map.
        source: Where the images of the runs are; None for where their recipes say.
        images: Whether there are to be views and maps.
        no_labels: Whether to ignore the labels of the images.

    Returns:
        The summary of each, and the galleries that their maps refer to by position.
    """
    runs = [(entry, summarize_run(entry)) for entry in entries if isinstance(entry, Run)]
    galleries = []
    if images:
        galleries = add_views_and_maps(runs, limit, source=source, no_labels=no_labels)
    of_run, summaries = iter([summary for _, summary in runs]), []
    for entry in entries:
        if isinstance(entry, Run):
            summaries.append(next(of_run))
            continue
        summary, gallery = summarize_embedding(entry, limit, images=images, no_labels=no_labels)
        if summary["map"] is not None and gallery is not None:
            summary["map"]["gallery"] = len(galleries)
            galleries.append(gallery)
        summaries.append(summary)
    return summaries, galleries


def escape_texts(value: object) -> object:
    """Escape control characters in all texts of the page's data.

    Args:
        value: Anything that JSON can express.

    Returns:
        A copy of the value.
    """
    if isinstance(value, Mapping):
        return {printable(str(key)): escape_texts(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape_texts(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def render_report(data: Mapping[str, object]) -> str:
    """Render the page that shows the data of a report.

    Args:
        data: Anything that JSON can express.

    Returns:
        The HTML of the page.
    """
    return render_page(data, SCRIPTS, title="simsiam report", command="simsiam report")


def render_page(
    data: Mapping[str, object], scripts: Sequence[str], *, title: str, command: str
) -> str:
    """Render one self-contained page.

    Args:
        data: Anything that JSON can express. No text in it can end the element it is stored in.
        scripts: Files in `page`, in their order; the last one builds the page.
        title: The title of the page.
        command: The command that writes the page again, for a reader whose page is damaged.

    Returns:
        The HTML of the page.
    """
    folder = files("simsiam.pages") / "page"
    html, css = ((folder / name).read_text("utf-8") for name in ("page.html", "page.css"))
    html = html.replace("{title}", title).replace("{command}", command)
    js = "\n".join((folder / name).read_text("utf-8") for name in scripts)
    text = json.dumps(replace_nonfinite(data), separators=(",", ":")).replace("<", "\\u003c")
    page = html.replace("{css-digest}", _digest(css)).replace("{js-digest}", _digest(js))
    page = page.replace("{data-crc32}", f"{crc32(text.encode('ascii')):08x}")
    return page.replace("{css}", css).replace("{js}", js).replace("{data}", text)


def _digest(text: str) -> str:
    """Compute the digest by which the page's security policy knows a style or a script."""
    return base64.b64encode(sha256(text.encode()).digest()).decode()


def replace_nonfinite(value: object) -> object:
    """Replace NaN and infinities by None, which strict JSON can express.

    Args:
        value: A number, a text, None, or mappings and lists of these.

    Returns:
        A copy of the value; tuples become lists.
    """
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- what the run folder contains -----------------------------------------------------------------


def summarize_run(run: Run) -> RunData:
    """Read what the page shows of a run folder, without its views and its map.

    Args:
        run: The run.

    Raises:
        UsageError: A file of the run folder is damaged.
    """
    unreadable = run.read_quarantine()
    return {
        "path": printable(str(run.path)),
        "embedding": None,
        "summary": run.json("summary.json"),
        "curves": extract_curves(run.metrics()),
        "results": sorted_evaluations(run),
        "transfers": transfer_records(run),
        "features": features_table(run.json("summary.json")),
        "candidates": (run.json("adapt.json") or run.json("head.json")).get("candidates", []),
        "recipe": without_credentials(run.recipe.to_dict()),
        "environment": without_credentials(run.json("environment.json")),
        "unreadable": {"count": len(unreadable), "first": unreadable[:MAX_UNREADABLE_NAMES]},
        "views": None,
        "map": None,
        "missing": None,
    }


def sorted_evaluations(run: Run) -> list[dict[str, object]]:
    """Read all evaluation records of a run, in the order of `PROTOCOLS`.

    Args:
        run: The run.
    """
    ranks = {name: rank for rank, name in enumerate(PROTOCOLS)}
    return sorted(run.evaluations(), key=lambda record: ranks.get(record["protocol"], len(ranks)))


def transfer_records(run: Run) -> list[dict[str, object]]:
    """Read all records of detectors that were trained from a run.

    Args:
        run: The run.

    Returns:
        The records, each with its picture under "shown": a data URI, or None if there is none.
    """
    records = []
    for record in run.transfers():
        shown = None
        try:
            if name := record.get("picture"):
                data = read_bytes(run.own_file(f"transfers/{name}"))
                picture = shrink_to_image(decode_image(data, 3), MAX_DETECTION_SIDE)
                shown = webp_data_uri(encode_webp(picture, DETECTION_QUALITY))
        except (OSError, UsageError, Unreadable) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            say_once(f"note     no picture of {record['protocol']}: {reason}")
        records.append(record | {"shown": shown})
    return records


def extract_curves(lines: Sequence[Mapping[str, float]]) -> Curves:
    """Collect the curves of a run as columns.

    Args:
        lines: The lines of metrics.jsonl.

    Returns:
        "step", "epoch" and those of `CURVE_NAMES` that have values. Of the logged steps at most
        `MAX_CURVE_POINTS` are kept, evenly spaced; the measurements of monitors and the last line
        are always kept.
    """
    logged = [i for i, line in enumerate(lines) if not MEASUREMENTS & line.keys()]
    kept_steps = {logged[i] for i in evenly_spaced(len(logged), MAX_CURVE_POINTS)}
    dropped = set(logged) - kept_steps - {len(lines) - 1}
    kept = [line for i, line in enumerate(lines) if i not in dropped]
    columns = {
        name: [round_significant(line.get(name)) for line in kept]
        for name in ("step", "epoch", *CURVE_NAMES)
    }
    return {
        name: column
        for name, column in columns.items()
        if any(value is not None for value in column)
    }


def round_significant(value: float | None) -> float | None:
    """Round a number to five significant digits.

    Args:
        value: A number; integers and None stay as they are.
    """
    return value if value is None or isinstance(value, int) else float(f"{value:.5g}")


def summarize_embedding(
    path: Path, limit: int, *, images: bool, no_labels: bool
) -> tuple[RunData, Gallery | None]:
    """Collect what the page shows of an embedding.

    Args:
        path: The file or folder that `embed` wrote.
        limit: The number of images on the map.
        images: Whether there is to be a map.
        no_labels: Whether to ignore the labels.

    Returns:
        The summary, and the images of its map, if there is one.

    Raises:
        UsageError: It is not an embedding file.
    """
    embeddings = read_embeddings(path)
    reasons = cast(list[tuple[str, str]], embeddings.metadata.get("unreadable", []))
    lines = [f"{key}\t{reason}" for key, reason in reasons]
    n, dim = embeddings.vectors.shape
    source = str(embeddings.metadata.get("source", ""))
    summary: RunData = {
        "path": printable(str(path)),
        "embedding": {"images": n, "dim": dim, "source": source},
        "summary": {},
        "curves": {},
        "results": [],
        "transfers": [],
        "features": [],
        "candidates": [],
        "recipe": None,
        "environment": {},
        "unreadable": {"count": len(lines), "first": lines[:MAX_UNREADABLE_NAMES]},
        "views": None,
        "map": None,
        "missing": NOT_IN_EMBEDDINGS,
    }
    if not images:
        return summary, None
    try:
        gallery, h = embedding_gallery(embeddings, limit, no_labels=no_labels)
    except WorkFailed as error:
        summary["missing"] = f"no map: {error}; {NOT_IN_EMBEDDINGS}"
        print(f"{summary['path']}: no map: {error}", flush=True)
        return summary, None
    print(f"{summary['path']}: mapping {len(h):,} images", flush=True)
    classes = {*gallery.images.classes} - {NO_LABEL}
    summary["map"] = {**place_images(h, len(classes))}
    return summary, gallery


# --- views and maps -------------------------------------------------------------------------------


def add_views_and_maps(
    runs: Sequence[tuple[Run, RunData]],
    limit: int,
    *,
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    no_labels: bool,
) -> list[Gallery]:
    """Add the views and the map of each run to its summary, or the reason why there are none.

    Args:
        runs: The runs with their summaries, of which "views", "map" and "missing" are set.
        limit: The number of images on a map.
        source: Where the images of the runs are; None for where their recipes say.
        no_labels: Whether to ignore the labels of the sources.

    Returns:
        The galleries that the maps refer to by position. Runs that were trained on the same
        source share a gallery.
    """
    sources: dict[tuple[object, ...], Source] = {}
    galleries: dict[tuple[object, ...], Gallery] = {}
    for run, summary in runs:
        recipe = run.recipe
        key = recipe.source, recipe.channels, recipe.no_labels, recipe.splits
        try:
            # Each run has its own marks, so only one that has them gets a source that is open.
            known = source or is_named(run.path, "source", recipe.source)
            if key not in sources or not known:
                sources[key] = open_run_source(
                    run,
                    place=source,
                    command=partial(_command_with_source, run.path),
                    no_labels=no_labels,
                )
            summary["views"] = render_views(run, sources[key])
            encoder = load(run.path)
            if key not in galleries:
                galleries[key] = build_gallery(sample(sources[key].train, limit))
            images = galleries[key].images
            print(f"{summary['path']}: mapping {len(images):,} images", flush=True)
            placed: MapData = map_images(encoder, eval_transform(run.recipe), images)
            summary["map"] = {"gallery": list(galleries).index(key), **placed}
        except (UsageError, WorkFailed) as error:
            part = "map" if summary["views"] else "images"
            summary["missing"] = f"no {part}: {' '.join(str(error).split())}"
            print(f"{summary['path']}: {summary['missing']}", flush=True)
    return list(galleries.values())


def _command_with_source(run: Path, names: Sequence[str]) -> list[str]:
    """The words of a command that names the images of a run."""
    return ["report", str(run), "--source", *names]


def render_views(run: Run, source: Source) -> ViewsData:
    """Make the views of some images as in training, and describe the recipe they come from.

    Args:
        run: The run.
        source: The source of its images.

    Raises:
        WorkFailed: No image can be read.
    """
    sheet = build_sheet(run.recipe, source, (), rows=PREVIEW_ROWS, views=VIEWS_PER_ROW)

    def data_uri(pixels) -> str:
        image = shrink_to_image(pixels, 2 * MIN_SIDE)  # twice the side at which the page shows it
        return webp_data_uri(encode_webp(image, VIEW_QUALITY))

    return {
        "description": [
            {"name": name, "lines": lines} for name, lines in describe_recipe(run.recipe)
        ],
        "pixelated": len(sheet.rows[0].views[0]) < MIN_SIDE,
        "rows": [
            {"name": printable(row.key), "pictures": [*map(data_uri, (row.original, *row.views))]}
            for row in sheet.rows
        ],
    }
