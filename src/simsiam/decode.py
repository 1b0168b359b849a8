"""One image file to pixels: uint8 (H, W, C), upright, whatever the format, or `Unreadable` with a short reason.

Pillow decodes photographs, NumPy its own arrays, tifffile (where installed) TIFF with more channels than Pillow knows.
A broken file is an ordinary event in a pile of photographs, so it has its own exception, and need not stop a run.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by content; Pillow would run Ghostscript on an EPS
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".npy"}
MAX_PIXELS = 89_478_485  # where Pillow starts to warn of a decompression bomb: 256 MiB in RGB; at twice it refuses
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels to the mode of Pillow's that has as many
NUMPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Pillow's own failures are OSErrors, but its parsers let through whatever a damaged header made them raise.
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, NotImplementedError,
    AssertionError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip


class Unreadable(Exception):
    """One image could not be decoded; str(error) is a short reason in one line."""


class Header(NamedTuple):
    """What a file says of itself before its pixels are decoded."""

    height: int
    width: int
    format: str


def decode(file: str | os.PathLike[str] | bytes, channels: int = 3, least: int = 0) -> np.ndarray:
    """Pixels uint8 (H, W, channels) of a path or a file's bytes: the first frame, turned upright as EXIF says.

    RGB for three channels, gray for one, RGBA for four; 16 bits a channel keep the upper eight; alpha is dropped.
    NumPy and TIFF arrays may have any number of channels, first or last; floats lie in 0..1. A JPEG may be decoded at
    1/2, 1/4 or 1/8 of its size as long as its shorter side keeps `least` pixels (0: only where it would be too large).
    """
    with _open(file) as opened:
        if isinstance(opened, Image.Image):
            return _pixels(_reduced(opened, least), channels)
        return _array(opened, channels)


def header(file: str | os.PathLike[str] | bytes, channels: int = 3) -> Header:
    """Size and format of an image; decodes nothing. The size is the stored one, before any EXIF rotation."""
    with _open(file) as opened:
        if isinstance(opened, Image.Image):
            return Header(opened.height, opened.width, str(opened.format))
        shape = _hwc(_array_header(opened)[0], channels)
        return Header(*shape[:2], "NPY")


@contextmanager
def _open(file: str | os.PathLike[str] | bytes) -> Iterator[Image.Image | BinaryIO]:
    """An image opened by Pillow, or the stream of a NumPy array. Whatever goes wrong, here or within, is Unreadable."""
    try:
        with BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as stream:
            start = stream.read(6)
            stream.seek(0)
            if start == NUMPY:
                yield stream
                return
            with Image.open(stream, formats=FORMATS) as image:
                yield image
    except BROKEN as error:
        raise Unreadable(_reason(error)) from error


def _reduced(image: Image.Image, least: int) -> Image.Image:
    """The image, a JPEG set to decode at a smaller scale where that suffices; refuses what is too large."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.draft(None, (width // 2, height // 2))
    elif least:
        image.draft(None, (least, least))  # neither side gets smaller than that
    if image.width * image.height > MAX_PIXELS:
        raise Unreadable(f"{width}x{height} is more than {MAX_PIXELS:,} pixels")
    return image


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    if channels not in MODES:
        file = image.fp
        if image.format == "TIFF" and file is not None:
            file.seek(0)
            return _tiff(file, channels)
        raise Unreadable(f"{image.mode} pixels, not {channels} channels")
    image.load()
    with suppress(*BROKEN):  # broken EXIF is no reason to lose good pixels
        ImageOps.exif_transpose(image, in_place=True)
    image.info.pop("transparency", None)  # `convert` drops it too, and warns
    if image.mode == "F":
        return _hwc(_bytes(np.asarray(image))[..., None].repeat(channels, 2), channels)
    if image.mode.startswith("I"):  # 16-bit gray, which `convert` would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if channels == 4 and image.mode in ("CMYK", "RGBX"):
        return np.asarray(image)  # four channels as they are, not as colors
    pixels = np.asarray(image.convert(MODES[channels]))
    return pixels[..., None] if channels == 1 else pixels


def _array_header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type that a .npy file announces, if it also holds them; leaves the stream at its beginning."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(stream)
    start, end = stream.tell(), stream.seek(0, os.SEEK_END)
    stream.seek(0)
    size = int(np.prod(shape, dtype=object)) * kind.itemsize
    if kind.hasobject or not shape or end - start != size:
        raise Unreadable(f"an array of {kind} {shape} in {end - start} bytes")
    return shape, kind


def _array(stream: BinaryIO, channels: int) -> np.ndarray:
    shape, _ = _array_header(stream)
    _hwc(shape, channels)  # refused before it is read
    return np.ascontiguousarray(_bytes(_hwc(np.load(stream, allow_pickle=False), channels)))


def _tiff(stream: BinaryIO, channels: int) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        raise Unreadable(f"TIFF with {channels} channels needs tifffile: pip install tifffile") from None
    with tifffile.TiffFile(stream) as file:
        series = file.series[0]
        _hwc(series.shape, channels)
        return np.ascontiguousarray(_bytes(_hwc(series.asarray(), channels)))


def _hwc(image, channels: int):
    """An array, or a shape, as (H, W, channels); the channels may come first. Refuses any other, and what is large."""
    shape = image if isinstance(image, tuple) else image.shape
    if len(shape) == 2 and channels == 1:
        order, found = [0, 1], True
    else:
        last = len(shape) == 3 and shape[2] == channels
        order, found = ([0, 1, 2] if last else [1, 2, 0]), len(shape) == 3 and (last or shape[0] == channels)
    if not found:
        few = [n for n in (shape[-1], shape[0]) if n <= 16] if len(shape) == 3 else [1] * (len(shape) == 2)
        hint = f"; give --channels {few[0]}" if few else ""
        raise Unreadable(f"an array of shape {shape}, not an image of {channels} channels{hint}")
    height, width = shape[order[0]], shape[order[1]]
    if not 0 < height * width <= MAX_PIXELS:
        raise Unreadable(f"{width}x{height} is not between 1 and {MAX_PIXELS:,} pixels")
    if isinstance(image, tuple):
        return height, width, channels
    return image.reshape(height, width, 1) if image.ndim == 2 else image.transpose(order)


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """Any type's pixels as uint8: the upper byte of uint16, floats and booleans from 0..1."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    if pixels.dtype == bool or (pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1):  # nan is neither
        return np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
    raise Unreadable(f"{pixels.dtype} pixels: they should be uint8, uint16, or floats from 0 to 1")


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text shows the address of a buffer
        return f"empty, or not one of {', '.join(FORMATS)}"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__  # strerror leaves the path out
    return " ".join(text.split())[:200]
