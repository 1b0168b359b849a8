"""One image file to pixels: uint8 (H, W, C), upright, whatever the format, or `Unreadable` with a short reason.

Pillow decodes photographs, NumPy its own arrays, tifffile (where installed) the TIFFs that Pillow does not know.
A broken file is an ordinary event in a pile of photographs, so it has its own exception, and need not stop a run.
"""

import logging
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from simsiam.errors import printable

EXTENSIONS = {
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".npy",
}  # fmt: skip
MAX_PIXELS = 2**28 // 3  # of one image: 256 MiB in RGB
MAX_SCANS = 100  # of a progressive JPEG; encoders make ten
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels to the mode of Pillow's that has as many

# The decoders' own remarks on odd metadata would fall into the progress of a run; what matters becomes Unreadable.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
for name in ("PIL", "tifffile"):
    logging.getLogger(name).addHandler(logging.NullHandler())


class Unreadable(Exception):
    """One image could not be decoded; str(error) is a short reason in one line."""


class ImageHeader(NamedTuple):
    """What a file says of itself before its pixels are decoded."""

    height: int
    width: int
    format: str


def decode_image(
    file: str | os.PathLike[str] | bytes, channels: int = 3, min_side: int = 0
) -> np.ndarray:
    """Pixels uint8 (H, W, channels) of a path or a file's bytes: the first frame, turned upright as EXIF says.

    RGB for three channels, gray for one, RGBA for four; 16 bits a channel keep the upper eight; otherwise alpha is
    dropped, not blended. NumPy and TIFF arrays may have any number of channels, first or last; floats lie in 0..1.
    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side keeps `least` pixels (0: only where
    it would be too large).
    """
    with _open_image(file, channels) as opened:
        if isinstance(opened, Image.Image):
            return _image_to_array(_apply_draft(opened, min_side), channels)
        return opened.read_pixels()


def read_header(file: str | os.PathLike[str] | bytes, channels: int = 3) -> ImageHeader:
    """Size and format of an image; decodes nothing. The size is the stored one, before any EXIF rotation."""
    with _open_image(file, channels) as opened:
        return ImageHeader(opened.height, opened.width, str(opened.format))


class _ArrayImage(NamedTuple):
    """An image that is stored as an array, before it is read."""

    height: int
    width: int
    format: str
    read_pixels: Callable[[], np.ndarray]


def _make_array_image(
    shape: tuple[int, ...], channels: int, format: str, read_array: Callable[[], np.ndarray]
) -> _ArrayImage:
    """The array that `read` returns, of this shape, as an image; its channels are first or last, or one and left out.

    Raises Unreadable if they are not as many as wanted, or the image is too large.
    """
    whole = (*shape, 1) if len(shape) == 2 else shape
    if len(whole) != 3 or 0 in whole or channels not in (whole[2], whole[0]):
        few = min(whole[0], whole[-1]) if len(whole) == 3 else 0
        hint = f"; give --channels {few}" if 0 < few <= 16 and few != channels else ""
        raise Unreadable(f"an array of shape {shape}, not an image of {channels} channels{hint}")
    axes = (0, 1, 2) if whole[2] == channels else (1, 2, 0)
    height, width = whole[axes[0]], whole[axes[1]]
    _check_pixel_count(height, width, MAX_PIXELS)

    def pixels() -> np.ndarray:
        return np.ascontiguousarray(_to_uint8(read_array()).reshape(whole).transpose(axes))

    return _ArrayImage(height, width, format, pixels)


def _open_npy(stream: BinaryIO, channels: int) -> _ArrayImage:
    """A .npy file that holds what its header announces. Never unpickles."""
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, kind = read(stream)
    if kind.hasobject:
        raise Unreadable("an array of Python objects, not of numbers")
    start, end = stream.tell(), stream.seek(0, os.SEEK_END)
    size = int(np.prod(shape, dtype=object)) * kind.itemsize
    if end - start != size:
        raise Unreadable(
            f"damaged NPY: {kind} {shape} takes {size:,} bytes, and there are {end - start:,}"
        )
    stream.seek(0)
    return _make_array_image(shape, channels, "NPY", lambda: np.load(stream, allow_pickle=False))


def _open_tiff(stream: BinaryIO, channels: int) -> Image.Image | _ArrayImage:
    """By Pillow where it knows the kind; it takes only the colors of a TIFF with more channels."""
    if channels in (1, 3):
        with suppress(SyntaxError):  # Pillow's word for a kind that it does not know
            return TiffImageFile(stream)
        stream.seek(0)
    try:
        import tifffile
    except ImportError:
        raise Unreadable("a TIFF that only tifffile may read: pip install tifffile") from None
    series = tifffile.TiffFile(stream).series[0]
    return _make_array_image(series.shape, channels, "TIFF", series.asarray)


# How a file of each format begins, and what opens it. Not Image.open: it has limits of its own, and no reasons.
FORMATS: dict[str, tuple[bytes, Callable[[BinaryIO, int], Any]]] = {
    "JPEG": (rb"\xff\xd8\xff", lambda stream, _: JpegImageFile(stream)),
    "PNG": (rb"\x89PNG\r\n\x1a\n", lambda stream, _: PngImageFile(stream)),
    "BMP": (rb"BM", lambda stream, _: BmpImageFile(stream)),
    "GIF": (rb"GIF8[79]a", lambda stream, _: GifImageFile(stream)),
    "WEBP": (rb"RIFF....WEBP", lambda stream, _: WebPImageFile(stream)),
    "PPM": (rb"P[1-6]\s", lambda stream, _: PpmImageFile(stream)),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", _open_tiff),
    "NPY": (rb"\x93NUMPY", _open_npy),
}


def open_regular_file(file: str | os.PathLike[str]) -> BinaryIO:
    """A file opened to be read. Raises Unreadable for a pipe or a device, which would keep whoever reads it waiting."""
    stream = open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise Unreadable("not a regular file")
    return stream


@contextmanager
def _open_image(
    file: str | os.PathLike[str] | bytes, channels: int
) -> Iterator[Image.Image | _ArrayImage]:
    """An image opened and not yet decoded. Whatever goes wrong, here or within, is Unreadable."""
    format = "file"
    try:
        with BytesIO(file) if isinstance(file, bytes) else open_regular_file(file) as stream:
            start = stream.read(12)
            stream.seek(0)
            if not start:
                raise Unreadable("an empty file")
            found = [
                name
                for name, (pattern, _) in FORMATS.items()
                if re.match(pattern, start, re.DOTALL)
            ]
            if not found:
                raise Unreadable(f"not one of {', '.join(FORMATS)}")
            format = found[0]
            yield FORMATS[format][1](stream, channels)
    except Unreadable:
        raise
    except Exception as error:  # a damaged file makes decoders raise anything
        if isinstance(error, OSError) and error.strerror:
            raise Unreadable(error.strerror) from error  # its str would repeat the path
        text = printable(" ".join(str(error).split())[:120]) or type(error).__name__
        raise Unreadable(f"damaged or unsupported {format}: {text}") from error


def _apply_draft(image: Image.Image, min_side: int) -> Image.Image:
    """The image, a JPEG set to decode at a smaller scale where that suffices; refuses what is too large."""
    width, height = image.size
    if "progressive" in image.info:  # at any scale its coefficients are held all at once
        _check_pixel_count(height, width, 2 * MAX_PIXELS)
        if (scans := _count_scans(image)) > MAX_SCANS:
            raise Unreadable(f"{scans:,} scans of a progressive JPEG; at most {MAX_SCANS}")
    suffices = min(width, height) // min_side if min_side else 1
    fits = next((s for s in (1, 2, 4) if -(-width // s) * -(-height // s) <= MAX_PIXELS), 8)
    scale = max(suffices, fits)
    image.draft(None, (max(1, width // scale), max(1, height // scale)))
    _check_pixel_count(image.height, image.width, MAX_PIXELS)
    return image


def _count_scans(image: Image.Image) -> int:
    """How often a progressive JPEG goes over its coefficients: a small file can ask for it a thousand times."""
    stream: BinaryIO = vars(image)["fp"]
    here = stream.tell()
    stream.seek(0)
    count = stream.read().count(b"\xff\xda")
    stream.seek(here)
    return count


def _check_pixel_count(height: int, width: int, limit: int) -> None:
    if height * width > limit:
        raise Unreadable(f"{width}x{height} is more than {limit:,} pixels")


def _image_to_array(image: Image.Image, channels: int) -> np.ndarray:
    if channels not in PIL_MODES:
        fewer = 1 if Image.getmodebase(image.mode) == "L" else 3
        raise Unreadable(
            f"{image.format} in {image.mode}, not {channels} channels; give --channels {fewer}"
        )
    image.load()
    with suppress(Exception):  # broken EXIF is no reason to lose good pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    elif image.mode.startswith("I"):  # 16-bit gray, which `convert` would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    pixels = np.array(
        image if image.mode == PIL_MODES[channels] else image.convert(PIL_MODES[channels])
    )
    return pixels[..., None] if channels == 1 else pixels


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Any type's pixels as uint8: the upper byte of uint16, floats and booleans from 0..1."""
    kind = pixels.dtype.kind
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "u" and pixels.dtype.itemsize == 2:  # of either byte order
        return (pixels >> 8).astype(np.uint8)
    if kind == "b" or (kind == "f" and pixels.min() >= 0 and pixels.max() <= 1):  # nan is neither
        return np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
    raise Unreadable(f"{pixels.dtype} pixels: they should be uint8, uint16, or floats from 0 to 1")
