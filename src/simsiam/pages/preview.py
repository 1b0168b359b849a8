"""What training sees, as one picture: images of a source, views made of them, and the recipe in words."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from simsiam.config.recipes import Recipe, ResolvedRecipe, default_stem
from simsiam.data.batches import DEFAULT_VIEW_COUNT, make_training_views
from simsiam.data.decode import Unreadable
from simsiam.data.images import Images, evenly_spaced, sample
from simsiam.data.views import describe_augmentation
from simsiam.errors import UsageError, WorkFailed, check_ranges, printable
from simsiam.model.backbones import RESNETS
from simsiam.runs.compose import compose_recipe
from simsiam.sources.open_source import Source
from simsiam.utils.files import atomic_write

MIN_SIDE, MAX_SIDE = (
    96,
    320,
)  # sides of a picture on the sheet: smaller views are enlarged, larger ones reduced
TEXT_COLOR, MUTED_COLOR, BORDER_COLOR, BACKGROUND_COLOR = (
    (24, 24, 24),
    (112, 112, 112),
    (216, 216, 216),
    (255, 255, 255),
)
MARGIN, GAP, LINE_HEIGHT = (
    40,
    12,
    23,
)  # pixels around the sheet, between pictures, and from one line of text to the next


@dataclass(frozen=True, kw_only=True)
class PreviewRow:
    key: str
    original: np.ndarray  # uint8 (H, W, 3), upright
    views: list[
        np.ndarray
    ]  # each uint8 (size, size, 3), in pairs: views 1 and 2 of step 0, of step 1, ...


@dataclass(frozen=True, kw_only=True)
class PreviewSheet:
    """All that the picture shows, before it is drawn."""

    title: str
    sections: list[tuple[str, list[str]]]  # headings, and the lines that stand beside them
    rows: list[PreviewRow]


def preview(
    sources: str | os.PathLike[str] | Sequence[str],
    *,
    out: str | os.PathLike[str],
    recipe: str | Recipe | None = None,
    rows: int = 8,
    views: int = 6,
    **settings: Any,
) -> Path:
    """Draw `rows` images, each with as many `views`, into the PNG file `out`; returns its path.

    Sources, recipe and words are those of `pretrain`, and so are the views. A file of that name is replaced: it is only
    a picture. Raises UsageError for a wrong request, WorkFailed if no image can be read.
    """
    path = Path(out)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UsageError(
            f"--out is {printable(str(path))}: it takes the name of a picture that ends in .png"
        )
    if not path.parent.is_dir():
        raise UsageError(
            f"--out is {printable(str(path))}, and there is no folder {printable(str(path.parent))}"
        )
    check_ranges(SimpleNamespace(rows=rows, views=views), rows=(1, 100), views=(1, 20))
    picture = draw_sheet(
        build_sheet(*compose_recipe(sources, recipe, settings), rows=rows, views=views)
    )
    with atomic_write(path) as part:
        picture.save(part, format="PNG")
    return path


def build_sheet(
    recipe: ResolvedRecipe, source: Source, reasons: Sequence[str], *, rows: int, views: int
) -> PreviewSheet:
    """The sheet of what `compose` returns.

    The image in row i is seen as image i of a batch is: at step 0 in the first pair of columns, at step 1 in the next.
    """
    images = sample(source.train, recipe.limit)
    picked, unreadable = pick_readable(images, rows)
    bare = recipe.replace(
        mean=[0.0] * recipe.channels, std=[1.0] * recipe.channels
    )  # normalization changes nothing
    columns: list[np.ndarray] = []
    for step in range(-(-views // DEFAULT_VIEW_COUNT)):
        pair = make_training_views(picked, np.arange(len(picked)), bare, step, torch.device("cpu"))
        columns += [(x * 255).round().byte().permute(0, 2, 3, 1).numpy() for x in pair]
    return PreviewSheet(
        title=f"{source.name}: images and their views",
        sections=[
            ("images", describe_images(images, picked, unreadable)),
            ("recipe", list(reasons)),
            *describe_recipe(recipe),
        ],
        rows=[
            PreviewRow(
                key=picked.keys[i],
                original=to_rgb(picked.read(i)),
                views=[to_rgb(column[i]) for column in columns[:views]],
            )
            for i in range(len(picked))
        ],
    )


def pick_readable(images: Images, count: int) -> tuple[Images, list[tuple[str, str]]]:
    """`count` readable images spread evenly, or all there are; key and reason of unreadable ones met meanwhile."""
    asked = count
    while True:
        looked_at, good, unreadable = sample(images, asked), [], []
        for i in range(len(looked_at)):
            try:
                looked_at.read(i)
                good.append(i)
            except Unreadable as error:
                unreadable.append((looked_at.keys[i], str(error)))
        if len(good) >= count or len(looked_at) == len(images):
            break
        asked *= 2
    if not good:
        key, reason = unreadable[0]
        raise WorkFailed(
            f"none of the {len(images)} images can be read; the first, {printable(key)}: {reason}"
        )
    return looked_at.take(np.array(good)[evenly_spaced(len(good), count)]), unreadable


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) to (H, W, 3): the first three channels, or the first as gray where there are fewer."""
    return np.ascontiguousarray(
        pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)
    )


def describe_images(
    images: Images, picked: Images, unreadable: Sequence[tuple[str, str]]
) -> list[str]:
    """The images in words."""
    classes = f" in {len(images.classes)} classes" if images.classes else ""
    lines = [f"{len(images):,} to train on{classes}; below, {len(picked)} of them, spread evenly"]
    if unreadable:
        key, reason = unreadable[0]
        lines.append(
            f"{len(unreadable)} that cannot be read were passed over; the first, {printable(key)}: {reason}"
        )
    return lines


def describe_recipe(recipe: ResolvedRecipe) -> list[tuple[str, list[str]]]:
    """The recipe's parameters that the pictures depend on, and how the pictures show them."""
    size, channels = recipe.image_size, recipe.channels
    stem = recipe.stem or default_stem(size)
    network = (
        f"{recipe.backbone}, width {recipe.width}, {stem} stem"
        if recipe.backbone in RESNETS
        else recipe.backbone
    )
    mean, std = (" ".join(f"{v:.3f}" for v in values) for values in (recipe.mean, recipe.std))
    made = [
        v if channels == 3 else replace(v, jitter=(*v.jitter[:2], 0, 0), gray=0)
        for v in recipe.method.views
    ]
    first, second = (
        made[min(view, len(made) - 1)] for view in range(DEFAULT_VIEW_COUNT)
    )  # without color, no changes of color
    kinds = {"both views": first} if first == second else {"view 1": first, "view 2": second}
    enlarged = (
        f", each pixel as {display_side(size) // size} x {display_side(size) // size}"
        if size < MIN_SIDE
        else ""
    )
    scale = f", reduced to {MAX_SIDE} pixels" if size > MAX_SIDE else enlarged
    lines = [f"in the pairs that a step compares, before normalization{scale}"]
    if channels != 3:
        colors = "the first three as red, green and blue" if channels > 3 else "the first as gray"
        lines.append(
            f"of {channels} channels {colors}" if channels > 1 else "the one channel as gray"
        )
    return [
        ("network", [f"{network}, views of {size} x {size} pixels", f"mean {mean}", f"std {std}"]),
        *((name, describe_augmentation(kind)) for name, kind in kinds.items()),
        ("shown", lines),
    ]


def display_side(size: int) -> int:
    """Of a view's picture: the view's own side, a whole multiple of it where it is small, MOST where it is large."""
    return min(size * -(-MIN_SIDE // size), MAX_SIDE)


def fit_to_square(pixels: np.ndarray, side: int) -> Image.Image:
    """(H, W, 3) in a square of `side`, its aspect kept: enlarged by a whole factor without smoothing, or reduced."""
    image = Image.fromarray(pixels)
    factor = side // max(image.size)
    if factor > 1:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def draw_sheet(sheet: PreviewSheet) -> Image.Image:
    """The words on top, below them a row for each image."""
    title, text, small = (ImageFont.load_default(size) for size in (26, 15, 12))
    views = sheet.rows[0].views
    side = display_side(len(views[0]))
    indent = MARGIN + max(text.getlength(name) for name, _ in sheet.sections) + 2 * GAP
    lefts = [
        MARGIN + (side + GAP) * (column + 1) + 2 * GAP * (column // DEFAULT_VIEW_COUNT + 1)
        for column in range(len(views))
    ]
    widest = max(text.getlength(to_ascii(line)) for _, lines in sheet.sections for line in lines)
    top = (
        MARGIN
        + 52
        + sum(LINE_HEIGHT * len(lines) + GAP // 2 for _, lines in sheet.sections)
        + 2 * GAP
    )
    pitch = side + 2 * LINE_HEIGHT + GAP
    width = (
        max(lefts[-1] + side, round(indent + widest), MARGIN + round(title.getlength(sheet.title)))
        + MARGIN
    )
    page = Image.new(
        "RGB", (width, top + LINE_HEIGHT + pitch * len(sheet.rows) + MARGIN - GAP), BACKGROUND_COLOR
    )
    pen = ImageDraw.Draw(page)

    def paste(pixels: np.ndarray, x: int, y: int) -> Image.Image:
        picture = fit_to_square(pixels, side)
        page.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=BORDER_COLOR)
        return picture

    pen.text((MARGIN, MARGIN), to_ascii(sheet.title), TEXT_COLOR, title)
    y = MARGIN + 52
    for name, lines in sheet.sections:
        pen.text((MARGIN, y), name, MUTED_COLOR, text)
        for line in lines:
            pen.text((indent, y), to_ascii(line), TEXT_COLOR, text)
            y += LINE_HEIGHT
        y += GAP // 2
    for column, x in enumerate([MARGIN, *lefts]):
        pen.text(
            (x, top),
            f"view {(column - 1) % DEFAULT_VIEW_COUNT + 1}" if column else "original",
            MUTED_COLOR,
            text,
        )
    for number, row in enumerate(sheet.rows):
        y = top + LINE_HEIGHT + pitch * number
        below = y + paste(row.original, MARGIN, y).height + GAP // 2
        pen.text((MARGIN, below), truncate_start(to_ascii(row.key), small, side), TEXT_COLOR, small)
        size = f"{row.original.shape[1]} x {row.original.shape[0]}"
        pen.text((MARGIN, below + LINE_HEIGHT - 6), size, MUTED_COLOR, small)
        for x, pixels in zip(lefts, row.views, strict=True):
            paste(pixels, x, y)
    return page


def to_ascii(text: str) -> str:
    """The font that Pillow brings knows ASCII; all else is written as backslashes."""
    return printable(text).encode("ascii", "backslashreplace").decode()


def truncate_start(text: str, font: Any, width: int) -> str:
    """The end of a text, which tells images apart, as far as it fits."""
    cut = text
    while font.getlength(cut) > width:
        text = text[1:]
        cut = f"...{text}"
    return cut
