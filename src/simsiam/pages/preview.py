"""Preview the views of training: one picture with images, their views, and the recipe as text."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from typing_extensions import Unpack

from simsiam.config.keyword_settings import PretrainSettings
from simsiam.config.recipes import Recipe, ResolvedRecipe
from simsiam.data.batches import DEFAULT_VIEW_COUNT, make_training_views
from simsiam.data.decode import Unreadable
from simsiam.data.images import Images, evenly_spaced, sample
from simsiam.data.views import describe_augmentation
from simsiam.errors import UsageError, check_ranges, none_readable, printable
from simsiam.model.backbones import RESNETS
from simsiam.runs.compose import compose_recipe
from simsiam.sources.open_source import Source
from simsiam.utils.files import atomic_write

# Sides of a picture on the sheet in pixels: smaller views are enlarged, larger ones are reduced.
MIN_SIDE, MAX_SIDE = 96, 320
# Colors as RGB.
TEXT_COLOR, MUTED_COLOR = (24, 24, 24), (112, 112, 112)
BORDER_COLOR, BACKGROUND_COLOR = (216, 216, 216), (255, 255, 255)
# Lengths in pixels: around the sheet, between pictures, and from one line of text to the next.
MARGIN, GAP, LINE_HEIGHT = 40, 12, 23
TITLE_HEIGHT = 52  # pixels from the top of the title to the first section
TITLE_SIZE, TEXT_SIZE, SMALL_TEXT_SIZE = 26, 15, 12  # sizes of fonts in pixels

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True, kw_only=True)
class PreviewRow:
    """One image of the sheet.

    Attributes:
        key: The name of the image in its source.
        original: The image, uint8 (H, W, 3), upright.
        views: Its views, each uint8 (size, size, 3), in pairs: views 1 and 2 of step 0, of step 1,
            and so on.
    """

    key: str
    original: np.ndarray
    views: list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class PreviewSheet:
    """The content of the picture, before it is drawn.

    Attributes:
        title: The title of the sheet.
        sections: Headings, each with its lines of text.
        rows: The images with their views.
    """

    title: str
    sections: list[tuple[str, list[str]]]
    rows: list[PreviewRow]


def preview(
    sources: str | os.PathLike[str] | Sequence[str],
    *,
    out: str | os.PathLike[str],
    recipe: str | Recipe | None = None,
    rows: int = 8,
    views: int = 6,
    **settings: Unpack[PretrainSettings],
) -> Path:
    """Draw images of a source and the views that pretraining would make of them.

    Args:
        sources: One or several sources, as for `pretrain`.
        out: The PNG file to write; an existing file is replaced.
        recipe: A recipe, its name or its file, as for `pretrain`.
        rows: The number of images, 1 to 100.
        views: The number of views of each image, 1 to 20.
        **settings: Settings that replace those of the recipe, as for `pretrain`.

    Returns:
        The path of the picture.

    Raises:
        UsageError: An argument is wrong.
        WorkFailed: No image can be read.
    """
    path = Path(out)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UsageError(f"--out is {printable(str(path))}: give the name of a file ending in .png")
    if not path.parent.is_dir():
        folder = printable(str(path.parent))
        raise UsageError(f"--out is {printable(str(path))}, and there is no folder {folder}")
    check_ranges(SimpleNamespace(rows=rows, views=views), rows=(1, 100), views=(1, 20))
    composed = compose_recipe(sources, recipe, settings, ["preview", "--out", str(path)])
    sheet = build_sheet(*composed, rows=rows, views=views)
    picture = draw_sheet(sheet)
    with atomic_write(path) as part:
        picture.save(part, format="PNG")
    return path


# --- the content of the sheet ---------------------------------------------------------------------


def build_sheet(
    recipe: ResolvedRecipe, source: Source, reasons: Sequence[str], *, rows: int, views: int
) -> PreviewSheet:
    """Collect what the sheet shows, from the values that `compose_recipe` returns.

    The image in row i gets the views of image i of a batch: those of step 0 in the first pair of
    columns, those of step 1 in the next pair, and so on.

    Args:
        recipe: The recipe.
        source: The opened source.
        reasons: Lines that say which recipe this is and why.
        rows: The number of images.
        views: The number of views of each image.

    Raises:
        WorkFailed: No image can be read.
    """
    images = sample(source.train, recipe.limit)
    readable, unreadable = pick_readable(images, rows)
    unnormalized = recipe.replace(mean=[0.0] * recipe.channels, std=[1.0] * recipe.channels)
    columns: list[np.ndarray] = []  # each uint8 (rows, size, size, channels)
    for step in range(-(-views // DEFAULT_VIEW_COUNT)):
        pair = make_training_views(
            readable, np.arange(len(readable)), unnormalized, step, torch.device("cpu")
        )
        columns += [(x * 255).round().byte().permute(0, 2, 3, 1).numpy() for x in pair]
    return PreviewSheet(
        title=f"{source.name}: images and their views",
        sections=[
            ("images", describe_images(images, readable, unreadable)),
            ("recipe", list(reasons)),
            *describe_recipe(recipe),
        ],
        rows=[
            PreviewRow(
                key=readable.keys[i],
                original=to_rgb(readable.read(i)),
                views=[to_rgb(column[i]) for column in columns[:views]],
            )
            for i in range(len(readable))
        ],
    )


def pick_readable(images: Images, count: int) -> tuple[Images, list[tuple[str, str]]]:
    """Pick readable images that are evenly spaced in a set of images.

    Args:
        images: The images to choose from.
        count: The number of images to pick.

    Returns:
        `count` readable images, or all readable ones if there are fewer; and the key and the
        reason of each unreadable image that was tried.

    Raises:
        WorkFailed: No image can be read.
    """
    num_tried = count
    while True:
        candidates, readable, unreadable = sample(images, num_tried), [], []
        for i in range(len(candidates)):
            try:
                candidates.read(i)
                readable.append(i)
            except Unreadable as error:
                unreadable.append((candidates.keys[i], str(error)))
        if len(readable) >= count or len(candidates) == len(images):
            break
        num_tried *= 2
    if not readable:
        raise none_readable(len(images), *unreadable[0])
    chosen = np.array(readable)[evenly_spaced(len(readable), count)]
    return candidates.take(chosen), unreadable


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Turn an image of any number of channels into RGB.

    Args:
        pixels: (H, W, C).

    Returns:
        (H, W, 3): the first three channels, or the first as gray if there are fewer than three.
    """
    return np.ascontiguousarray(
        pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)
    )


def describe_images(
    images: Images, shown: Images, unreadable: Sequence[tuple[str, str]]
) -> list[str]:
    """Describe the images as lines of text.

    Args:
        images: The training images.
        shown: Those on the sheet.
        unreadable: The key and the reason of images that could not be read.
    """
    classes = f" in {len(images.classes)} classes" if images.classes else ""
    lines = [f"{len(images):,} training images{classes}; {len(shown)} shown, spread over the set"]
    if unreadable:
        key, reason = unreadable[0]
        lines.append(
            f"{len(unreadable)} unreadable images were skipped; the first, {printable(key)}: "
            f"{reason}"
        )
    return lines


def describe_recipe(recipe: ResolvedRecipe) -> list[tuple[str, list[str]]]:
    """Describe the settings that the views depend on, and how the pictures show the views.

    Args:
        recipe: The recipe.

    Returns:
        Headings, each with its lines of text.
    """
    size, channels = recipe.view_size, recipe.channels
    network = recipe.backbone
    if recipe.backbone in RESNETS:
        network += f", width {recipe.width}, {recipe.resnet_stem} stem"
    mean, std = (" ".join(f"{v:.3f}" for v in values) for values in (recipe.mean, recipe.std))
    augmentations = [
        # Images without three channels have no color, so these operations are not applied to them.
        views if channels == 3 else replace(views, jitter=(*views.jitter[:2], 0, 0), gray=0)
        for views in recipe.method.views
    ]
    last = len(augmentations) - 1
    first, second = (augmentations[min(view, last)] for view in range(DEFAULT_VIEW_COUNT))
    by_view = {"both views": first} if first == second else {"view 1": first, "view 2": second}
    if count := recipe.method.small_crops:
        by_view[f"{count} small crops of {recipe.small_crop_size} px"] = recipe.method.small_views
    return [
        ("network", [f"{network}, views of {size} x {size} pixels", f"mean {mean}", f"std {std}"]),
        *((name, describe_augmentation(views)) for name, views in by_view.items()),
        ("pictures", _describe_pictures(size, channels)),
    ]


def _describe_pictures(size: int, channels: int) -> list[str]:
    """Describe how the pictures show views of `size` pixels with so many channels."""
    line = "views before normalization, in the pairs that a step compares"
    if size > MAX_SIDE:
        line += f", reduced to {MAX_SIDE} pixels"
    elif size < MIN_SIDE:
        factor = display_side(size) // size
        line += f", each pixel drawn as {factor} x {factor}"
    if channels == 3:
        return [line]
    if channels == 1:
        return [line, "the single channel is shown as gray"]
    colors = "three are shown as red, green and blue" if channels > 3 else "is shown as gray"
    return [line, f"of {channels} channels, the first {colors}"]


# --- drawing --------------------------------------------------------------------------------------


def display_side(size: int) -> int:
    """Compute the side of the picture of a view.

    Args:
        size: The side of the view in pixels.

    Returns:
        The side in pixels: that of the view; for a small view a multiple of it, and for a large
        view `MAX_SIDE`.
    """
    return min(size * -(-MIN_SIDE // size), MAX_SIDE)


def fit_to_square(pixels: np.ndarray, side: int) -> Image.Image:
    """Fit an image into a square and keep its aspect ratio.

    Args:
        pixels: uint8 (H, W, 3).
        side: The side of the square in pixels.

    Returns:
        The image, enlarged by a whole factor without smoothing, or reduced.
    """
    image = Image.fromarray(pixels)
    factor = side // max(image.size)
    if factor > 1:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def draw_sheet(sheet: PreviewSheet) -> Image.Image:
    """Draw the sheet: the text at the top, and below it one row for each image.

    Args:
        sheet: The content of the sheet.
    """
    title, text = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(TEXT_SIZE)
    side = display_side(len(sheet.rows[0].views[0]))
    indent = MARGIN + max(text.getlength(name) for name, _ in sheet.sections) + 2 * GAP
    longest = max(text.getlength(to_ascii(line)) for _, lines in sheet.sections for line in lines)
    text_height = sum(LINE_HEIGHT * len(lines) + GAP // 2 for _, lines in sheet.sections)
    top = MARGIN + TITLE_HEIGHT + text_height + 2 * GAP  # of the headings of the columns
    lefts = [
        MARGIN + (side + GAP) * (column + 1) + 2 * GAP * (column // DEFAULT_VIEW_COUNT + 1)
        for column in range(len(sheet.rows[0].views))
    ]
    right = max(
        lefts[-1] + side, round(indent + longest), MARGIN + round(title.getlength(sheet.title))
    )
    row_height = side + 2 * LINE_HEIGHT + GAP
    height = top + LINE_HEIGHT + row_height * len(sheet.rows) + MARGIN - GAP
    page = Image.new("RGB", (right + MARGIN, height), BACKGROUND_COLOR)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN), to_ascii(sheet.title), TEXT_COLOR, title)
    y = MARGIN + TITLE_HEIGHT
    for name, lines in sheet.sections:
        pen.text((MARGIN, y), name, MUTED_COLOR, text)
        for line in lines:
            pen.text((indent, y), to_ascii(line), TEXT_COLOR, text)
            y += LINE_HEIGHT
        y += GAP // 2
    for column, x in enumerate([MARGIN, *lefts]):
        heading = f"view {(column - 1) % DEFAULT_VIEW_COUNT + 1}" if column else "original"
        pen.text((x, top), heading, MUTED_COLOR, text)
    for number, row in enumerate(sheet.rows):
        _draw_row(page, row, side, top + LINE_HEIGHT + row_height * number, lefts)
    return page


def _draw_row(page: Image.Image, row: PreviewRow, side: int, y: int, lefts: Sequence[int]) -> None:
    """Draw an image with its name and size, and its views beside it, at height y of the page."""
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(SMALL_TEXT_SIZE)

    def paste(pixels: np.ndarray, x: int) -> Image.Image:
        picture = fit_to_square(pixels, side)
        page.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=BORDER_COLOR)
        return picture

    below = y + paste(row.original, MARGIN).height + GAP // 2
    pen.text((MARGIN, below), truncate_start(to_ascii(row.key), font, side), TEXT_COLOR, font)
    size = f"{row.original.shape[1]} x {row.original.shape[0]}"
    pen.text((MARGIN, below + LINE_HEIGHT - 6), size, MUTED_COLOR, font)
    for x, pixels in zip(lefts, row.views, strict=True):
        paste(pixels, x)


def to_ascii(text: str) -> str:
    r"""Escape what the default font of Pillow cannot draw.

    Args:
        text: Any text.

    Returns:
        The text in ASCII; other characters become escapes such as \xfc.
    """
    return printable(text).encode("ascii", "backslashreplace").decode()


def truncate_start(text: str, font: Font, width: int) -> str:
    """Cut off the start of a text that is too long; the end tells file names apart.

    Args:
        text: The text.
        font: The font it is drawn in.
        width: The available width in pixels.

    Returns:
        The text, or "..." and as much of its end as fits.
    """
    result = text
    while font.getlength(result) > width:
        text = text[1:]
        result = f"...{text}"
    return result
