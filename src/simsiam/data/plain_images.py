"""Tell the images that are plainly harmless to decode from all others, by their structure.

Decoding a plain image takes memory and time in proportion to its pixels: its metadata is small, and
a JPEG has few scans. Most photographs are plain. All others are decoded in a process of its own, by
`simsiam.data.decoder_process`.
"""

import os
import re
import struct
from io import BytesIO
from typing import BinaryIO

import numpy as np

MAX_PLAIN_BYTES = 2**25  # of a file
MAX_PLAIN_WORK = 2**27  # pixels times scans; a second or two
MAX_SCANS = 100  # of a JPEG; encoders make about ten
MAX_SEGMENTS = 500  # of a JPEG before its first scan
MAX_METADATA = 2**22  # bytes before its first scan
MAX_EXIF_BYTES = 2**16
MAX_TAGS = 64  # of an EXIF block: each may refer to all bytes of it
MAX_CHUNKS = 2**13  # of a PNG
HEAD_BYTES = 2**15  # of a JPEG; they hold its size, unless it has much metadata
SIZE_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # of a JPEG: they begin its size
START_OF_SCAN, END_OF_IMAGE, APP1 = 0xDA, 0xD9, 0xE1
# The markers between the scans of a JPEG; 0xFF before another byte is a part of the pixels.
MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.S)


def open_plain(stream: BinaryIO, format: str, *, header: bool) -> BinaryIO | None:
    """Check whether an image can be decoded in this process.

    Args:
        stream: The open file, at its beginning.
        format: A key of FORMATS.
        header: Whether only its header will be read.

    Returns:
        What to read the image from; None unless it is plain.
    """
    if format == "JPEG" and header:
        content = stream.read(HEAD_BYTES)
        if _first_scan(content) is not None:
            return BytesIO(content)
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if format not in ("JPEG", "PNG", "NPY") or size > MAX_PLAIN_BYTES:
        return None
    if format == "NPY":
        return stream
    content = stream.read()
    is_plain = _is_plain_jpeg(content) if format == "JPEG" else _is_plain_png(content)
    return BytesIO(content) if is_plain else None


def count_scans(content: bytes, start: int) -> int:
    """Count the scans of a JPEG: a small file can have thousands, all slow.

    Args:
        content: The file.
        start: The byte after the marker of its first scan.

    Returns:
        Their number, at least 1.
    """
    values = np.frombuffer(content, np.uint8, offset=start)  # ten times as fast as bytes.find
    if not ((values[:-1] == 0xFF) & (values[1:] == START_OF_SCAN)).any():
        return 1
    scans = 1
    for marker in MARKER.finditer(content, start):
        scans += marker[1][0] == START_OF_SCAN
        if marker[1][0] == END_OF_IMAGE:  # other images may follow
            break
    return scans


def _is_plain_jpeg(content: bytes) -> bool:
    found = _first_scan(content)
    if found is None:
        return False
    start, pixels = found
    scans = count_scans(content, start + 2)
    return scans <= MAX_SCANS and pixels * scans <= MAX_PLAIN_WORK


def _first_scan(content: bytes) -> tuple[int, int] | None:
    """Find where the first scan of a JPEG begins, and its pixels; None if what is before is odd."""
    position, pixels, exif_bytes = 2, 0, 0
    for _ in range(MAX_SEGMENTS):
        head = content[position : position + 9]
        if len(head) < 9 or head[0] != 0xFF or not 0xC0 <= head[1] <= 0xFE:
            return None
        marker, size = head[1], 2 + int.from_bytes(head[2:4], "big")
        if marker == START_OF_SCAN:
            return position, pixels
        if 0xD0 <= marker <= END_OF_IMAGE or position > MAX_METADATA:
            return None
        if marker in SIZE_MARKERS:
            height, width = struct.unpack(">2H", head[5:])
            pixels = height * width
        elif marker == APP1 and content.startswith(b"Exif\0", position + 4):
            exif_bytes += size
            exif = content[position + 10 : position + size]
            if exif_bytes > MAX_EXIF_BYTES or not _has_few_tags(exif):
                return None
        position += size
    return None


def _is_plain_png(content: bytes) -> bool:
    width, height = struct.unpack(">2I", content[16:24].ljust(8, b"\0"))
    position = 8
    for _ in range(MAX_CHUNKS):
        size, kind = int.from_bytes(content[position : position + 4], "big"), position + 4
        data = position + 8
        # A text may hold EXIF data in a compressed form.
        if content.startswith(b"Raw profile", data):
            return False
        if content.startswith(b"eXIf", kind) and not (
            size <= MAX_EXIF_BYTES and _has_few_tags(content[data : data + size])
        ):
            return False
        position += 12 + size
        if position >= len(content):
            return width * height <= MAX_PLAIN_WORK
    return False


def _has_few_tags(exif: bytes) -> bool:
    """Check the number of tags that a reader of EXIF data reads before it looks for one."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif.startswith(b"II") else ">"
    if 43 in exif[2:4]:  # the header of a BigTIFF
        return False
    start = exif[4:8]
    if len(start) < 4:
        return True  # damaged, and not read
    count = exif[(at := struct.unpack(f"{order}I", start)[0]) : at + 2]
    return len(count) < 2 or struct.unpack(f"{order}H", count)[0] <= MAX_TAGS
