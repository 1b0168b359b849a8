"""Thumbnails of many images, packed into a few sheets in WebP for one page."""

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import TypedDict

import numpy as np
from PIL import Image, ImageOps

from simsiam.data.decode import Unreadable
from simsiam.data.images import Images, measure_sizes
from simsiam.errors import none_readable, printable
from simsiam.pages.preview import to_rgb
from simsiam.utils.names import utf8_name
from simsiam.utils.workers import CPU_CORES

# Sides of a thumbnail in pixels: the largest with which all of them have at most
# MAX_THUMBNAIL_PIXELS is used, and none larger than the images need.
THUMBNAIL_SIDES = (96, 64, 48, 32)
MAX_THUMBNAIL_PIXELS = 42_000_000  # 10,000 thumbnails of 64 x 64; a browser takes 4 bytes for each
SHEET_SIDE = 1920  # pixels; a multiple of each of THUMBNAIL_SIDES
WEBP_QUALITIES = (80, 60, 40, 20)  # the first with which all sheets of a page fit is used


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The readable images of one source, and their thumbnails.

    Attributes:
        images: The images.
        thumbnails: A thumbnail of each, uint8 (side, side, 3).
        pixelated: Whether the thumbnails have the images' own pixels, none left out.
    """

    images: Images
    thumbnails: list[np.ndarray]
    pixelated: bool


class GalleryData(TypedDict):
    """A gallery as the page reads it."""

    names: list[str]  # true names: a list of them can be downloaded
    labels: list[int] | None
    classes: list[str]
    side: int  # of a thumbnail in pixels
    across: int  # thumbnails in a row of a sheet
    pixelated: bool
    sheets: list[str]  # data URIs


def build_gallery(images: Images) -> Gallery:
    """Read images and make a thumbnail of each, from its center: the part that a backbone sees.

    Args:
        images: The images; unreadable ones are left out.

    Raises:
        WorkFailed: No image can be read.
    """
    side, sizes = _choose_side(images)

    def make_thumbnail(i: int) -> np.ndarray | str:
        try:
            image = Image.fromarray(to_rgb(images.read(i, min_side=side)))
        except Unreadable as error:
            return str(error)
        return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))

    with ThreadPoolExecutor(CPU_CORES) as pool:
        results = list(pool.map(make_thumbnail, range(len(images))))
    readable = [i for i, result in enumerate(results) if isinstance(result, np.ndarray)]
    if not readable:
        raise none_readable(len(images), images.keys[0], str(results[0]))
    thumbnails = [result for result in results if isinstance(result, np.ndarray)]
    pixelated = bool(len(sizes)) and bool((sizes == side).all())
    images = images.take(np.array(readable))
    return Gallery(images=images, thumbnails=thumbnails, pixelated=pixelated)


def _choose_side(images: Images) -> tuple[int, np.ndarray]:
    """Choose the side of the thumbnails; also return the sizes (M, 2) it was chosen by."""
    fitting = [side for side in THUMBNAIL_SIDES if len(images) * side**2 <= MAX_THUMBNAIL_PIXELS]
    largest = fitting[0] if fitting else THUMBNAIL_SIDES[-1]
    sizes = measure_sizes(images)
    needed = THUMBNAIL_SIDES[0]
    if len(sizes):
        median = np.median(sizes.min(1))
        needed = next((side for side in reversed(THUMBNAIL_SIDES) if side >= median), needed)
    return min(needed, largest), sizes


def encode_gallery(gallery: Gallery, limit_bytes: int) -> GalleryData:
    """Encode names, labels and thumbnails of a gallery for the page.

    The thumbnails fill as few sheets as possible, row by row, in the order of the images.

    Args:
        gallery: The images and their thumbnails.
        limit_bytes: Bytes that the sheets should not exceed; if the lowest quality still takes
            more, they exceed it.
    """
    images, side = gallery.images, len(gallery.thumbnails[0])
    across = SHEET_SIDE // side
    sheets = [
        _draw_sheet(gallery.thumbnails[start : start + across**2], side, across)
        for start in range(0, len(images), across**2)
    ]
    for quality in WEBP_QUALITIES:
        encoded = [encode_webp(sheet, quality) for sheet in sheets]
        if sum(map(len, encoded)) <= limit_bytes:
            break
    return {
        "names": [utf8_name(images.keys[i]) for i in range(len(images))],
        "labels": None if images.labels is None else images.labels.tolist(),
        "classes": [printable(name) for name in images.classes],
        "side": side,
        "across": across,
        "pixelated": gallery.pixelated,
        "sheets": [webp_data_uri(sheet) for sheet in encoded],
    }


def _draw_sheet(thumbnails: list[np.ndarray], side: int, across: int) -> Image.Image:
    """Put thumbnails side by side, `across` of them in a row."""
    rows, columns = -(-len(thumbnails) // across), min(across, len(thumbnails))
    pixels = np.zeros((rows * side, columns * side, 3), np.uint8)
    for i, thumbnail in enumerate(thumbnails):
        y, x = side * (i // across), side * (i % across)
        pixels[y : y + side, x : x + side] = thumbnail
    return Image.fromarray(pixels)


def shrink_to_image(pixels: np.ndarray, max_side: int) -> Image.Image:
    """Turn pixels into an image, reduced if it is too large.

    Args:
        pixels: uint8 (H, W, 3).
        max_side: The largest side in pixels.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return image


def encode_webp(image: Image.Image, quality: int) -> bytes:
    """Encode an image as a WebP file.

    Args:
        image: The image.
        quality: 0 to 100.
    """
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def webp_data_uri(image: bytes) -> str:
    """Turn a WebP file into a URI that contains it.

    Args:
        image: The bytes of the file.
    """
    return "data:image/webp;base64," + base64.b64encode(image).decode()
