"""Decode an image file of any supported format to pixels, uint8 (H, W, C), upright.

Pillow decodes photographs and NumPy its own arrays. If they are installed, pillow-heif decodes
HEIC, rawpy the previews in RAW photographs, and tifffile the TIFFs that Pillow does not support.
Broken files are common in large collections, so they have their own exception, `Unreadable`, with a
short reason, and do not stop a run.

This is the only way in which images are read from files or bytes. Ordinary JPEG, PNG and NumPy
files are decoded at once. All others are decoded in a process with limits of memory and time.
"""

import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from io import BytesIO
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from simsiam.data.decoder_process import MEMORY_LIMIT, Answer, Request, Work, call_decoder
from simsiam.data.plain_images import MAX_SCANS, count_scans, open_plain
from simsiam.errors import UsageError, printable
from simsiam.utils.read_files import open_regular

# The extensions of each format, by the name that a header gives it; `simsiam shard` writes the
# first one.
FORMAT_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
    "NPY": (".npy",),
    "JPEG2000": (".jp2", ".j2k"),
    "HEIF": (".heif", ".heic", ".hif"),
    "AVIF": (".avif",),
    "RAW": (
        ".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".sr2", ".orf", ".rw2", ".raf", ".pef",
        ".srw", ".3fr", ".iiq", ".rwl", ".erf", ".kdc", ".dcr", ".mrw", ".x3f",
    ),
}  # fmt: skip
# Extensions of images that only an optional package reads: its name, and the module to import.
OPTIONAL_EXTENSIONS = {
    extension: package
    for format, package in {
        "HEIF": ("pillow-heif", "pillow_heif"),
        "AVIF": ("pillow>=11.3", "PIL.AvifImagePlugin"),
        "RAW": ("rawpy", "rawpy"),
    }.items()
    for extension in FORMAT_EXTENSIONS[format]
}
EXTENSIONS = {
    extension
    for extensions in FORMAT_EXTENSIONS.values()
    for extension in extensions
    if extension not in OPTIONAL_EXTENSIONS or find_spec(OPTIONAL_EXTENSIONS[extension][1])
}
MAX_PIXELS = 2**28 // 3  # of one image: 256 MiB in RGB
MAX_FILE_BYTES = 2**29  # of the file of an image
MAX_ARRAY_BYTES = 2**29  # of an image that is stored as an array
MAX_TIFF_TAGS = 2**16  # of a TIFF
MAX_TIFF_VALUES = 2**20  # numbers in one of them: more than the strips of the largest images
TIFF_BYTES = (1, 2, 7)  # types of tags whose values stay bytes
MAX_PNG_TEXT = 2**16  # bytes of a text in a PNG that may hold its orientation
SIGNATURE_BYTES = 64  # at the start of a file, which show its format
# How an image is turned upright, by its orientation in EXIF data.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # the Pillow mode for a number of channels

# Warnings of the decoders about metadata would disturb the output of a run; real damage becomes
# Unreadable.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# LibRaw develops photographs with OpenMP, which may hang in forked workers; previews need none.
warnings.filterwarnings("ignore", category=RuntimeWarning, module="rawpy")
for name in ("PIL", "tifffile"):
    logging.getLogger(name).addHandler(logging.NullHandler())


class Unreadable(Exception):
    """An image could not be decoded; str(error) is a short reason in one line."""


class ImageHeader(NamedTuple):
    """What a file declares before its pixels are decoded.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        format: A key of FORMAT_EXTENSIONS, or "pixels" for images in memory.
    """

    height: int
    width: int
    format: str


def decode_image(
    file: str | os.PathLike[str] | bytes, channels: int = 3, min_side: int = 0
) -> np.ndarray:
    """Decode the first frame of an image file and rotate it as its EXIF data says.

    Three channels are RGB, one is gray, four are RGBA. Unless there are four channels, alpha is
    dropped, not blended. Of more than eight bits per channel, the upper eight are kept: of the 10,
    12, 14 or 16 bits that the largest value of the image needs, since cameras and scanners store 12
    bits in 16. NumPy and TIFF arrays may have any number of channels, first or last; floats must be
    from 0 to 1.

    Args:
        file: A path, or the content of a file.
        channels: Number of channels of the result.
        min_side: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if its shorter side keeps at
            least this many pixels; with 0, only if it would be too large otherwise.

    Returns:
        uint8 (H, W, channels).

    Raises:
        Unreadable: The file is missing, damaged, too large or not supported.
    """
    _, pixels = _read_within_limits("pixels", file, channels, min_side)
    assert pixels is not None
    return pixels


def read_header(file: str | os.PathLike[str] | bytes, channels: int = 3) -> ImageHeader:
    """Read the size and the format of an image; decodes nothing.

    Args:
        file: A path, or the content of a file.
        channels: Number of channels that the image would be decoded to.

    Returns:
        The header; its size is the stored one, before any EXIF rotation.

    Raises:
        Unreadable: The file is missing, damaged or not supported.
    """
    return ImageHeader(*_read_within_limits("header", file, channels)[0]["header"])


def has_alpha(file: str | os.PathLike[str] | bytes) -> bool:
    """Find out whether an image has an alpha channel or a transparent color; decodes nothing.

    Args:
        file: A path, or the content of a file.

    Returns:
        Whether it has. NumPy and multichannel TIFF files are not asked: False.

    Raises:
        Unreadable: The file is missing, damaged or not supported.
    """
    return _read_within_limits("alpha", file, 3)[0]["alpha"]


class _NotPlain(Exception):
    """An image is to be read in a process with limits."""


def _read_within_limits(
    work: Work, file: str | os.PathLike[str] | bytes, channels: int, min_side: int = 0
) -> tuple[Answer, np.ndarray | None]:
    """Read an image here if it is plain, and otherwise in a process with limits."""
    try:
        return _read_here(work, file, channels, min_side, only_plain=True)
    except _NotPlain:
        answer, pixels = call_decoder(work, file, channels, min_side)
    if "reason" in answer:
        raise Unreadable(answer["reason"])
    return answer, pixels


def read_image(file: str | bytes, request: Request) -> tuple[Answer, np.ndarray | None]:
    """Read an image in a process with limits; see `decoder_process`.

    Args:
        file: A path, or the content of a file.
        request: What to find out.

    Returns:
        The answer, and the pixels if they are asked for.
    """
    try:
        return _read_here(
            request["work"], file, request["channels"], request["min_side"], only_plain=False
        )
    except Unreadable as error:
        return Answer(reason=str(error)), None


def _read_here(
    work: Work, file: str | os.PathLike[str] | bytes, channels: int, min_side: int, only_plain: bool
) -> tuple[Answer, np.ndarray | None]:
    with _open_image(file, channels, work, only_plain) as opened:
        if work == "header":
            return Answer(header=(opened.height, opened.width, str(opened.format))), None
        if work == "alpha":
            has = isinstance(opened, Image.Image) and opened.has_transparency_data
            return Answer(alpha=has), None
        if isinstance(opened, JpegImageFile) and not only_plain:
            _check_scans(opened)
        if isinstance(opened, Image.Image):
            pixels = _image_to_array(_apply_draft(opened, min_side), channels)
        else:
            pixels = opened.read_pixels()
        return Answer(shape=pixels.shape), pixels


class _ArrayImage(NamedTuple):
    """An image that is stored as an array and has not been read yet."""

    height: int
    width: int
    format: str
    read_pixels: Callable[[], np.ndarray]


_OpenedImage: TypeAlias = Image.Image | _ArrayImage


def _make_array_image(
    shape: tuple[int, ...],
    dtype: np.dtype,
    channels: int,
    format: str,
    read_array: Callable[[], np.ndarray],
) -> _ArrayImage:
    """Make an image of the array that `read_array` returns.

    Its channels may be the first or the last axis; a single channel may have no axis. Raises
    Unreadable if the number of channels is another one, or the image is too large.
    """
    shape_3d = (*shape, 1) if len(shape) == 2 else shape
    if len(shape_3d) != 3 or 0 in shape_3d or channels not in (shape_3d[2], shape_3d[0]):
        fewest = min(shape_3d[0], shape_3d[-1]) if len(shape_3d) == 3 else 0
        hint = f"; give --channels {fewest}" if 0 < fewest <= 16 and fewest != channels else ""
        raise Unreadable(f"an array of shape {shape}, not an image of {channels} channels{hint}")
    axes = (0, 1, 2) if shape_3d[2] == channels else (1, 2, 0)
    height, width = shape_3d[axes[0]], shape_3d[axes[1]]
    _check_pixel_count(height, width, MAX_PIXELS)
    if (size := height * width * channels * dtype.itemsize) > MAX_ARRAY_BYTES:
        raise Unreadable(f"{size:,} bytes of {dtype} pixels; at most {MAX_ARRAY_BYTES:,}")

    def read_pixels() -> np.ndarray:
        return np.ascontiguousarray(_to_uint8(read_array()).reshape(shape_3d).transpose(axes))

    return _ArrayImage(height, width, format, read_pixels)


def _open_npy(stream: BinaryIO, channels: int) -> _ArrayImage:
    """Open a .npy file after checking that its size matches its header. Never unpickles."""
    if np.lib.format.read_magic(stream) == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise Unreadable("an array of Python objects, not of numbers")
    start, end = stream.tell(), stream.seek(0, os.SEEK_END)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if end - start != size:
        raise Unreadable(
            f"damaged NPY: {dtype} {shape} takes {size:,} bytes, and there are {end - start:,}"
        )
    stream.seek(0)
    return _make_array_image(
        shape, dtype, channels, "NPY", lambda: np.load(stream, allow_pickle=False)
    )


def _missing(what: str, package: str) -> Unreadable:
    return Unreadable(f"{what}, which only {package} reads: pip install {package}")


def _open_png(stream: BinaryIO, _: int) -> Image.Image:
    """Open a PNG without what Pillow refuses in it and no pixel needs.

    Of the chunks between the pixels, those of transparency and orientation are kept, if they are
    undamaged: text and color profiles may be large, or have a wrong checksum.
    """
    content = stream.read()
    kept, position = [content[:8]], 8
    while position < len(content):
        head = content[position : position + 8]
        size, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"IEND")
        chunk = content[position : position + 12 + size]
        position += len(chunk)
        is_critical = not kind[0] & 32  # its first letter is a capital
        is_orientation = chunk[8:].startswith((b"Raw profile type ", b"XML:com.adobe.xmp"))
        if is_critical or (
            (kind in (b"tRNS", b"eXIf") or (is_orientation and size < MAX_PNG_TEXT))
            and zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]
        ):
            kept.append(chunk)
    return PngImageFile(BytesIO(b"".join(kept)))


def _open_heif(stream: BinaryIO, _: int) -> Image.Image:
    """Open a HEIC or an AVIF; some AVIFs begin like HEIC and list their own brand later."""
    start = stream.read(SIGNATURE_BYTES)
    stream.seek(0)
    if b"avi" in start[8 : int.from_bytes(start[:4], "big")]:
        try:
            from PIL.AvifImagePlugin import AvifImageFile
        except ImportError:
            raise _missing("an AVIF", "pillow>=11.3") from None
        return AvifImageFile(stream)
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise _missing("a HEIC", "pillow-heif") from None
    return HeifImageFile(stream)


def _open_raw(stream: BinaryIO, channels: int) -> _ArrayImage:
    """Open the preview that a camera has put into a RAW photograph, upright."""
    try:
        import rawpy
    except ImportError:
        raise _missing("a RAW photograph", "rawpy") from None
    with rawpy.imread(stream) as raw:
        preview, flip = raw.extract_thumb(), raw.sizes.flip
    image: Image.Image
    if isinstance(preview.data, bytes):
        image = JpegImageFile(
            BytesIO(preview.data)
        )  # with EXIF: LibRaw adds it where it is missing
    else:
        # LibRaw's codes for a half turn, and for a quarter turn against and with the clock.
        image = Image.fromarray(np.rot90(preview.data, {3: 2, 5: 1, 6: 3}.get(flip, 0)).copy())
    _check_pixel_count(image.height, image.width, MAX_PIXELS)
    return _ArrayImage(image.height, image.width, "RAW", lambda: _image_to_array(image, channels))


def _open_tiff(stream: BinaryIO, channels: int) -> _OpenedImage:
    """Open a TIFF with Pillow if it can; it reads only the colors of a TIFF with more channels."""
    _check_tags(stream)
    if channels in (1, 3):
        with suppress(SyntaxError):  # what Pillow raises for a TIFF that it does not support
            image = TiffImageFile(stream)
            tags = image.tag_v2
            # A RAW photograph: a version of DNG, or a thumbnail before pictures in sub-directories.
            if 50706 in tags or (tags.get(254) == 1 and 330 in tags):
                stream.seek(0)
                return _open_raw(stream, channels)
            return image
        stream.seek(0)
    try:
        import tifffile
    except ImportError:
        raise Unreadable("a TIFF that only tifffile may read: pip install tifffile") from None
    series = tifffile.TiffFile(stream).series[0]
    return _make_array_image(series.shape, np.dtype(series.dtype), channels, "TIFF", series.asarray)


def _check_tags(stream: BinaryIO) -> None:
    """Check how many numbers the tags of a TIFF have: each becomes an object of Python."""
    start = stream.read(16)
    order, is_big = "<" if start[:1] == b"I" else ">", start[2:4] in (b"+\0", b"\0+")
    place, entry = ("8x Q", "HHQ8x") if is_big else ("4x I", "HHI4x")
    stream.seek(struct.unpack_from(order + place, start)[0])
    (tags,) = struct.unpack(order + ("Q" if is_big else "H"), stream.read(8 if is_big else 2))
    size = struct.calcsize(order + entry)
    entries = stream.read(min(tags, MAX_TIFF_TAGS) * size)
    entries = entries[: len(entries) // size * size]
    for _, kind, values in struct.iter_unpack(order + entry, entries):
        if values > MAX_TIFF_VALUES and kind not in TIFF_BYTES:
            raise Unreadable(f"a TIFF tag of {values:,} values; at most {MAX_TIFF_VALUES:,}")
    stream.seek(0)


# The first bytes of each format (a regular expression), and what opens it. `Image.open` is not used
# because it has its own limits and gives no reasons.
FORMATS: dict[str, tuple[bytes, Callable[[BinaryIO, int], _OpenedImage]]] = {
    "JPEG": (rb"\xff\xd8\xff", lambda stream, _: JpegImageFile(stream)),
    "PNG": (rb"\x89PNG\r\n\x1a\n", _open_png),
    "BMP": (rb"BM", lambda stream, _: BmpImageFile(stream)),
    "GIF": (rb"GIF8[79]a", lambda stream, _: GifImageFile(stream)),
    "WEBP": (rb"RIFF....WEBP", lambda stream, _: WebPImageFile(stream)),
    "PPM": (rb"P[1-6]\s", lambda stream, _: PpmImageFile(stream)),
    "HEIC or AVIF": (rb"....ftyp(hei|hev|mif1|msf1|avi[fs])", _open_heif),
    "JPEG 2000": (
        rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
        lambda stream, _: Jpeg2KImageFile(stream),
    ),
    "RAW": (
        rb"II\*\0....CR\x02|II(RO|RS|U\0)|MMOR|FUJIFILMCCD-RAW|....ftypcrx |FOVb|\0MRM",
        _open_raw,
    ),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", _open_tiff),
    "NPY": (rb"\x93NUMPY", _open_npy),
}


def find_format(start: bytes) -> str | None:
    """Find the format of a file by its first bytes.

    Args:
        start: At least SIGNATURE_BYTES of it, or all.

    Returns:
        A key of FORMATS; None if it is none of them.
    """
    matching = (name for name, (pattern, _) in FORMATS.items() if re.match(pattern, start, re.S))
    return next(matching, None)


def open_regular_file(file: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read from, without blocking on a pipe or a device.

    Args:
        file: Its path.

    Returns:
        The open file.

    Raises:
        Unreadable: The path is not a regular file.
        OSError: The file cannot be opened.
    """
    try:
        return open_regular(file)
    except UsageError:
        reason = "Is a directory" if os.path.isdir(file) else "not a regular file"
        raise Unreadable(reason) from None


def read_file(file: str | os.PathLike[str]) -> bytes:
    """Read the file of an image.

    Args:
        file: Its path.

    Returns:
        Its bytes.

    Raises:
        Unreadable: The path is not a regular file, or the file is too large to be an image.
        OSError: The file cannot be read.
    """
    with open_regular_file(file) as stream:
        _check_file_size(stream)
        return stream.read()


def _check_file_size(stream: BinaryIO) -> None:
    """Reject a file that is too large; return to its beginning."""
    if (size := stream.seek(0, os.SEEK_END)) > MAX_FILE_BYTES:
        raise Unreadable(f"a file of {size:,} bytes; at most {MAX_FILE_BYTES:,}")
    stream.seek(0)


@contextmanager
def _open_image(
    file: str | os.PathLike[str] | bytes, channels: int, work: Work, only_plain: bool
) -> Iterator[_OpenedImage]:
    """Open an image without decoding it; any error, here or in the body, becomes Unreadable.

    Raises _NotPlain if the image is not plain and `only_plain` is true.
    """
    format = "file"
    try:
        with BytesIO(file) if isinstance(file, bytes) else open_regular_file(file) as stream:
            start = stream.read(SIGNATURE_BYTES)
            if not start:
                raise Unreadable("an empty file")
            _check_file_size(stream)
            found = find_format(start)
            if found is None:
                raise Unreadable(f"not one of {', '.join(FORMATS)}")
            format = found
            checked = open_plain(stream, format, header=work == "header") if only_plain else stream
            if checked is None:
                raise _NotPlain
            yield FORMATS[format][1](checked, channels)
    except (Unreadable, _NotPlain):
        raise
    except MemoryError:
        limit = f"{MEMORY_LIMIT / 2**30:g} GiB of memory"
        raise Unreadable(f"decoding it takes more than {limit}") from None
    except Exception as error:  # a damaged file makes decoders raise anything
        if isinstance(error, OSError) and error.strerror:
            raise Unreadable(error.strerror) from error  # its str would repeat the path
        text = printable(" ".join(str(error).split())[:120]) or type(error).__name__
        raise Unreadable(f"damaged or unsupported {format}: {text}") from error


def _apply_draft(image: Image.Image, min_side: int) -> Image.Image:
    """Let a JPEG be decoded at a smaller scale if that is enough; reject images too large."""
    width, height = image.size
    if "progressive" in image.info:  # at any scale, all its coefficients are in memory at once
        _check_pixel_count(height, width, 2 * MAX_PIXELS)
    # The largest scale that keeps `min_side`, and the smallest that keeps MAX_PIXELS.
    largest = min(width, height) // min_side if min_side else 1
    smallest = next((s for s in (1, 2, 4) if -(-width // s) * -(-height // s) <= MAX_PIXELS), 8)
    scale = max(largest, smallest)
    image.draft(None, (max(1, width // scale), max(1, height // scale)))
    _check_pixel_count(image.height, image.width, MAX_PIXELS)
    return image


def _check_scans(image: JpegImageFile) -> None:
    """Reject a JPEG whose scans are too many, or too large to be in memory together."""
    stream: BinaryIO = vars(image)["fp"]
    scans = count_scans(_read_file(image), stream.tell())
    if scans > MAX_SCANS:
        raise Unreadable(f"{scans:,} scans of a JPEG; at most {MAX_SCANS}")
    if scans > 1:
        _check_pixel_count(image.height, image.width, 2 * MAX_PIXELS)


def _read_file(image: Image.Image) -> bytes:
    """Read the file of an image that Pillow has opened and not decoded yet."""
    stream: BinaryIO = vars(image)["fp"]
    position = stream.tell()
    stream.seek(0)
    content = stream.read()
    stream.seek(position)
    return content


def _check_pixel_count(height: int, width: int, limit: int) -> None:
    if height * width > limit:
        raise Unreadable(f"{width}x{height} is more than {limit:,} pixels")


def _image_to_array(image: Image.Image, channels: int) -> np.ndarray:
    if channels not in PIL_MODES:
        fewer = 1 if Image.getmodebase(image.mode) == "L" else 3
        raise Unreadable(
            f"{image.format or 'an image'} in {image.mode}, not {channels} channels; give "
            f"--channels {fewer}"
        )
    image.load()
    with suppress(Exception):  # the pixels are good even if the EXIF data is broken
        if (orientation := image.getexif().get(ExifTags.Base.Orientation)) in TURNS:
            image = image.transpose(TURNS[orientation])
    if image.mode == "F":
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    elif image.mode.startswith("I"):  # 16-bit gray, which `convert` would clip at 255
        image = Image.fromarray(_upper_byte(np.asarray(image).clip(0, 65535)))
    mode = PIL_MODES[channels]
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if channels == 1 else pixels


def _upper_byte(pixels: np.ndarray) -> np.ndarray:
    """Keep the upper eight of the bits that integers up to 65,535 use: 8, 10, 12, 14 or 16."""
    bits = max(8, int(pixels.max()).bit_length()) if pixels.size else 8
    return (pixels >> (bits + bits % 2 - 8)).astype(np.uint8)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels to uint8: the upper bits of uint16; floats and booleans are from 0 to 1."""
    kind = pixels.dtype.kind
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "u" and pixels.dtype.itemsize == 2:  # of either byte order
        return _upper_byte(pixels)
    if kind == "b" or (kind == "f" and pixels.min() >= 0 and pixels.max() <= 1):  # nan is neither
        result = np.empty(pixels.shape, np.uint8)
        for part, rounded in zip(pixels, result):  # not at once, which would need much memory
            rounded[...] = np.rint(part.astype(np.float32) * 255)
        return result
    raise Unreadable(f"{pixels.dtype} pixels: they should be uint8, uint16, or floats from 0 to 1")


# What a single image may be: a path, the bytes of a file, an image of Pillow, or pixels.
AnyImage: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


def to_pixels(image: AnyImage, channels: int = 3, min_side: int = 0) -> np.ndarray:
    """Make of an image in any form the pixels that `decode_image` makes of its file.

    Args:
        image: A path, the bytes of a file, a Pillow image, which stays as it is and whose current
            frame is taken, or an array as in a NumPy file.
        channels: Number of channels of the result.
        min_side: As in `decode_image`; a Pillow image that is decoded already keeps its size.

    Returns:
        uint8 (H, W, channels).

    Raises:
        Unreadable: The image is missing, damaged or not supported.
    """
    if isinstance(image, np.ndarray):
        opened = _make_array_image(image.shape, image.dtype, channels, "array", lambda: image)
        return opened.read_pixels()
    if not isinstance(image, Image.Image):
        return decode_image(image, channels, min_side)
    try:
        if isinstance(image, JpegImageFile) and image.tile and image.tell() == 0:
            return decode_image(_read_file(image), channels, min_side)  # it is not decoded yet
        return _image_to_array(image.copy(), channels)
    except Unreadable:
        raise
    except Exception as error:  # a damaged file makes decoders raise anything
        text = printable(" ".join(str(error).split())[:120]) or type(error).__name__
        raise Unreadable(f"a Pillow image that cannot be decoded: {text}") from error
