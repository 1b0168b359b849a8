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

from simsiam.config.recipes import Recipe, stem_for
from simsiam.data.batches import VIEWS, views_of
from simsiam.data.decode import Unreadable
from simsiam.data.images import Images, sample, spread
from simsiam.data.views import describe
from simsiam.errors import UsageError, WorkFailed, shown, within
from simsiam.model.backbones import RESNETS
from simsiam.runs.compose import compose
from simsiam.sources.open_source import Source
from simsiam.utils.files import whole

LEAST, MOST = 96, 320  # sides of a picture on the sheet: smaller views are enlarged, larger ones reduced
INK, PALE, LINE, PAPER = (24, 24, 24), (112, 112, 112), (216, 216, 216), (255, 255, 255)
MARGIN, GAP, LEADING = 40, 12, 23  # pixels around the sheet, between pictures, and from one line of text to the next


@dataclass(frozen=True, kw_only=True)
class Row:
    key: str
    original: np.ndarray  # uint8 (H, W, 3), upright
    views: list[np.ndarray]  # each uint8 (size, size, 3), in pairs: views 1 and 2 of step 0, of step 1, ...


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """All that the picture shows, before it is drawn."""

    title: str
    words: list[tuple[str, list[str]]]  # headings, and the lines that stand beside them
    rows: list[Row]


def preview(
    sources: str | os.PathLike[str] | Sequence[str],
    *,
    out: str | os.PathLike[str],
    recipe: str | Recipe | None = None,
    rows: int = 8,
    views: int = 6,
    **words: Any,
) -> Path:
    """Draw `rows` images, each with as many `views`, into the PNG file `out`; returns its path.

    Sources, recipe and words are those of `pretrain`, and so are the views. A file of that name is replaced: it is only
    a picture. Raises UsageError for a wrong request, WorkFailed if no image can be read.
    """
    path = Path(out)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UsageError(f"--out is {shown(str(path))}: it takes the name of a picture that ends in .png")
    if not path.parent.is_dir():
        raise UsageError(f"--out is {shown(str(path))}, and there is no folder {shown(str(path.parent))}")
    within(SimpleNamespace(rows=rows, views=views), rows=(1, 100), views=(1, 20))
    picture = draw(lay_out(*compose(sources, recipe, words), rows=rows, views=views))
    with whole(path) as part:
        picture.save(part, format="PNG")
    return path


def lay_out(recipe: Recipe, source: Source, why: Sequence[str], *, rows: int, views: int) -> Sheet:
    """The sheet of what `compose` returns.

    The image in row i is seen as image i of a batch is: at step 0 in the first pair of columns, at step 1 in the next.
    """
    images = sample(source.train, recipe.limit)
    picked, unreadable = readable(images, rows)
    bare = recipe.replace(mean=[0.0] * recipe.channels, std=[1.0] * recipe.channels)  # normalization changes nothing
    columns: list[np.ndarray] = []
    for step in range(-(-views // VIEWS)):
        pair = views_of(picked, np.arange(len(picked)), bare, step, torch.device("cpu"))
        columns += [(x * 255).round().byte().permute(0, 2, 3, 1).numpy() for x in pair]
    return Sheet(
        title=f"{source.name}: images and their views",
        words=[("images", about(images, picked, unreadable)), ("recipe", list(why)), *in_words(recipe)],
        rows=[
            Row(key=picked.keys[i], original=rgb(picked.read(i)), views=[rgb(column[i]) for column in columns[:views]])
            for i in range(len(picked))
        ],
    )


def readable(images: Images, count: int) -> tuple[Images, list[tuple[str, str]]]:
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
        raise WorkFailed(f"none of the {len(images)} images can be read; the first, {shown(key)}: {reason}")
    return looked_at.take(np.array(good)[spread(len(good), count)]), unreadable


def rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) to (H, W, 3): the first three channels, or the first as gray where there are fewer."""
    return np.ascontiguousarray(pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2))


def about(images: Images, picked: Images, unreadable: Sequence[tuple[str, str]]) -> list[str]:
    """The images in words."""
    classes = f" in {len(images.classes)} classes" if images.classes else ""
    lines = [f"{len(images):,} to train on{classes}; below, {len(picked)} of them, spread evenly"]
    if unreadable:
        key, reason = unreadable[0]
        lines.append(f"{len(unreadable)} that cannot be read were passed over; the first, {shown(key)}: {reason}")
    return lines


def in_words(recipe: Recipe) -> list[tuple[str, list[str]]]:
    """The recipe's parameters that the pictures depend on, and how the pictures show them."""
    size, channels = recipe.image_size, recipe.channels
    assert size and recipe.mean and recipe.std
    stem = recipe.stem or stem_for(size)
    network = f"{recipe.backbone}, width {recipe.width}, {stem} stem" if recipe.backbone in RESNETS else recipe.backbone
    mean, std = (" ".join(f"{v:.3f}" for v in values) for values in (recipe.mean, recipe.std))
    made = [v if channels == 3 else replace(v, jitter=(*v.jitter[:2], 0, 0), gray=0) for v in recipe.method.views]
    first, second = (made[min(view, len(made) - 1)] for view in range(VIEWS))  # without color, no changes of color
    kinds = {"both views": first} if first == second else {"view 1": first, "view 2": second}
    enlarged = f", each pixel as {side_of(size) // size} x {side_of(size) // size}" if size < LEAST else ""
    scale = f", reduced to {MOST} pixels" if size > MOST else enlarged
    lines = [f"in the pairs that a step compares, before normalization{scale}"]
    if channels != 3:
        colors = "the first three as red, green and blue" if channels > 3 else "the first as gray"
        lines.append(f"of {channels} channels {colors}" if channels > 1 else "the one channel as gray")
    return [
        ("network", [f"{network}, views of {size} x {size} pixels", f"mean {mean}", f"std {std}"]),
        *((name, describe(kind)) for name, kind in kinds.items()),
        ("shown", lines),
    ]


def side_of(size: int) -> int:
    """Of a view's picture: the view's own side, a whole multiple of it where it is small, MOST where it is large."""
    return min(size * -(-LEAST // size), MOST)


def fitted(pixels: np.ndarray, side: int) -> Image.Image:
    """(H, W, 3) in a square of `side`, its aspect kept: enlarged by a whole factor without smoothing, or reduced."""
    image = Image.fromarray(pixels)
    factor = side // max(image.size)
    if factor > 1:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def draw(sheet: Sheet) -> Image.Image:
    """The words on top, below them a row for each image."""
    title, text, small = (ImageFont.load_default(size) for size in (26, 15, 12))
    views = sheet.rows[0].views
    side = side_of(len(views[0]))
    indent = MARGIN + max(text.getlength(name) for name, _ in sheet.words) + 2 * GAP
    lefts = [MARGIN + (side + GAP) * (column + 1) + 2 * GAP * (column // VIEWS + 1) for column in range(len(views))]
    widest = max(text.getlength(printable(line)) for _, lines in sheet.words for line in lines)
    top = MARGIN + 52 + sum(LEADING * len(lines) + GAP // 2 for _, lines in sheet.words) + 2 * GAP
    pitch = side + 2 * LEADING + GAP
    width = max(lefts[-1] + side, round(indent + widest), MARGIN + round(title.getlength(sheet.title))) + MARGIN
    page = Image.new("RGB", (width, top + LEADING + pitch * len(sheet.rows) + MARGIN - GAP), PAPER)
    pen = ImageDraw.Draw(page)

    def paste(pixels: np.ndarray, x: int, y: int) -> Image.Image:
        picture = fitted(pixels, side)
        page.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=LINE)
        return picture

    pen.text((MARGIN, MARGIN), printable(sheet.title), INK, title)
    y = MARGIN + 52
    for name, lines in sheet.words:
        pen.text((MARGIN, y), name, PALE, text)
        for line in lines:
            pen.text((indent, y), printable(line), INK, text)
            y += LEADING
        y += GAP // 2
    for column, x in enumerate([MARGIN, *lefts]):
        pen.text((x, top), f"view {(column - 1) % VIEWS + 1}" if column else "original", PALE, text)
    for number, row in enumerate(sheet.rows):
        y = top + LEADING + pitch * number
        below = y + paste(row.original, MARGIN, y).height + GAP // 2
        pen.text((MARGIN, below), shortened(printable(row.key), small, side), INK, small)
        size = f"{row.original.shape[1]} x {row.original.shape[0]}"
        pen.text((MARGIN, below + LEADING - 6), size, PALE, small)
        for x, pixels in zip(lefts, row.views, strict=True):
            paste(pixels, x, y)
    return page


def printable(text: str) -> str:
    """The font that Pillow brings knows ASCII; all else is written as backslashes."""
    return shown(text).encode("ascii", "backslashreplace").decode()


def shortened(text: str, font: Any, width: int) -> str:
    """The end of a text, which tells images apart, as far as it fits."""
    cut = text
    while font.getlength(cut) > width:
        text = text[1:]
        cut = f"...{text}"
    return cut
