"""Files made by hand to cost much: small, and each takes far more memory or time than it should.

The campaign `fuzz.py` reads them all, and `tests/test_hostile_files.py` the quickest ones.
"""

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

GIB = 2**30
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(executed) (w) file\n"


def encode(kind: str, side: int = 48, **options: object) -> bytes:
    """Encode a picture of two gradients."""
    y, x = np.mgrid[:side, :side] * (255 // side or 1)
    pixels = np.stack([x, y, x], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


# --- JPEG ---


def jpeg_with(before: bytes) -> bytes:
    """Put bytes between the start of a JPEG and the rest of it."""
    return b"\xff\xd8" + before + encode("JPEG")[2:]


def jpeg_scans(count: int, side: int, *, progressive: bool = False) -> bytes:
    """Make a JPEG of many scans without data: a decoder goes through all pixels for each."""
    whole = encode("JPEG", progressive=progressive, quality=75)
    start = whole.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    whole = whole[: start + 5] + struct.pack(">2H", side, side) + whole[start + 9 :]
    last = b"\0" if progressive else b"\x3f"
    scan = b"\xff\xda\0\x08\x01\x01\0\0" + last + b"\0\0"
    return whole[: whole.index(b"\xff\xda")] + scan * count + b"\xff\xd9"


def exif_block(tags: int, size: int, kind: int = 7) -> bytes:
    """Make EXIF data whose tags all refer to the same bytes, and are read one by one."""
    entry = struct.pack("<2H2I", 0x9000, kind, size, 8 + 2 + 12 * tags + 4)
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", tags) + entry * tags + bytes(4)
    return block + bytes(size)


def jpeg_exif(tags: int, segments: int = 1) -> bytes:
    block = b"Exif\0\0" + exif_block(tags, 65_000 - 14 - 12 * tags)
    more = b"Exif\0\0" + bytes(65_000)
    parts = [block, *[more] * (segments - 1)]
    return jpeg_with(b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 2) + p for p in parts))


# --- PNG, GIF, others ---


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunks: bytes) -> bytes:
    """Put chunks between the header of a PNG and its pixels."""
    whole = encode("PNG")
    return whole[:33] + chunks + whole[33:]


def png_exif_text(tags: int) -> bytes:
    """Put EXIF data into a text, as ImageMagick does."""
    block = b"Exif\0\0" + exif_block(tags, 400_000)
    text = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    return png_with(png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text, 9)))


def gif_with_comments(count: int) -> bytes:
    whole = encode("GIF")
    start = 13 + 3 * 2 ** ((whole[10] & 7) + 1)
    return whole[:start] + b"!\xfe\1a\0" * count + whole[start:]


# --- TIFF ---


def tiff_of_tags(tags: list[tuple[int, int, int, int]], rest: bytes) -> bytes:
    """Make a TIFF of tags (number, type, count, value or place); `rest` follows them."""
    entries = b"".join(struct.pack("<2H2I", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + rest


def tiff_of_strips(count: int) -> bytes:
    """Make a TIFF with so many strips: the places of all of them become numbers of Python."""
    first = 8 + 2 + 12 * 9 + 4
    tags = [
        (256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, count, first), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, count, first),
    ]  # fmt: skip
    return tiff_of_tags(tags, bytes(4 * count))


def tiff_of_equal_places(tags: int, size: int) -> bytes:
    """Make a TIFF whose tags all refer to the same bytes, which are read for each."""
    first = 8 + 2 + 12 * (tags + 9) + 4
    needed = [
        (256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, 1, first), (277, 3, 1, 1), (278, 4, 1, 8), (279, 4, 1, 64),
    ]  # fmt: skip
    more = [(40_000 + i % 20_000, 7, size, first) for i in range(tags)]
    return tiff_of_tags([*needed, *more], bytes(size))


def tiff_of_zeros(side: int, channels: int, bits: int, *, floats: bool = False) -> bytes:
    """Make a TIFF of zeros whose strips are all the same few bytes."""
    rows = max(1, 2**24 // (side * channels * bits // 8))
    strip = zlib.compress(bytes(rows * side * channels * bits // 8), 9)
    count = -(-side // rows)
    places, beyond = 8 + 2 + 12 * 12 + 4 + len(strip), b""

    def add(values: bytes) -> int:
        nonlocal beyond
        beyond += values
        return places + len(beyond) - len(values)

    def shorts(value: int, number: int = channels) -> int:
        return add(struct.pack(f"<{number}H", *[value] * number)) if number > 2 else value * 65537

    def longs(value: int) -> int:
        return add(struct.pack(f"<{count}I", *[value] * count)) if count > 1 else value

    first = 8 + 2 + 12 * 12 + 4
    is_color = channels == 3
    tags = [
        (256, 4, 1, side), (257, 4, 1, side), (258, 3, channels, shorts(bits)), (259, 3, 1, 8),
        (262, 3, 1, 2 if is_color else 1), (273, 4, count, longs(first)), (277, 3, 1, channels),
        (278, 4, 1, rows), (279, 4, count, longs(len(strip))), (284, 3, 1, 1),
        (338, 3, max(1, channels - 1), shorts(0, max(1, channels - 1))),
        (339, 3, channels, shorts(3 if floats else 1)),
    ]  # fmt: skip
    if is_color:  # without further channels
        tags[10] = (305, 2, 1, 0)
        tags.sort()
    return tiff_of_tags(tags, strip + beyond)


# --- containers ---


def write_zip(path: Path, data: bytes, name: str) -> Path:
    """Pack one file, as small as it gets."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr(name, data)
    return path


def write_sparse(path: Path, start: bytes, size: int) -> Path:
    """Write a file that takes no place on the disk and has so many bytes."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def write_tar_of_negative_size(path: Path, size: int = -1536) -> Path:
    """Write a tar whose second header says that its file ends before it begins."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        picture = encode("PNG")
        info = tarfile.TarInfo("a.png")
        info.size = len(picture)
        archive.addfile(info, io.BytesIO(picture))
        info = tarfile.TarInfo("b.png")
        info.pax_headers = {"size": str(size)}
        archive.addfile(info)
    return path


def write_tar_cut_in_a_sparse_header(path: Path) -> Path:
    """Write a tar that ends where the places of a sparse file go on."""
    info = tarfile.TarInfo("a.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1  # more places follow
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header))
    return path


def write_vectors(path: Path, rows: int, dim: int) -> Path:
    """Write an embedding of zeros, which takes a thousandth of its size."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(1024 * dim, np.float32)), dim)
    schema = pa.schema({"path": pa.string(), "vector": vectors.type})
    with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=False) as writer:
        for start in range(0, rows, 1024):
            names = [f"{start + i}.jpg" for i in range(1024)]
            writer.write_table(pa.table({"path": names, "vector": vectors}, schema))
    return path


def write_repeated_text(path: Path, rows: int, size: int, column: str = "path") -> Path:
    """Write an embedding in which one long text stands in each row, and once in the file."""
    numbers = np.random.default_rng(0).random(2 * rows, np.float32)  # so that a row takes a byte
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers), 2)
    columns = {"path": pa.array([f"{i}.jpg" for i in range(rows)]), "vector": vectors}
    columns[column] = pa.DictionaryArray.from_arrays(
        np.zeros(rows, np.int32), pa.array(["a" * size])
    )
    pq.write_table(
        pa.table(columns),
        path,
        compression="zstd",
        store_schema=False,
        dictionary_pagesize_limit=GIB,
    )
    return path


def write_shared_beginnings(path: Path, rows: int, size: int) -> Path:
    """Write texts of which each repeats all of the one before it, and adds a character."""
    numbers = np.random.default_rng(0).random(2 * rows, np.float32)  # so that a row takes a byte
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers), 2)
    texts = ["a" * (size + i) for i in range(rows)]
    table = pa.table({"path": texts, "vector": vectors})
    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=["vector"],
        column_encoding={"path": "DELTA_BYTE_ARRAY"},
        data_page_size=GIB,
        write_statistics=False,
    )
    return path


def write_lying_footer(path: Path, size: int) -> Path:
    """Write images of zeros in one page, in a file whose footer says that they are few bytes."""
    table = pa.table({"image": pa.array([bytes(size)], pa.large_binary())})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    footer = pq.ParquetFile(path).metadata.row_group(0).column(0)
    true = _varint(2 * footer.total_uncompressed_size)
    path.write_bytes(path.read_bytes().replace(true, _varint(2 * 1000, len(true))))
    return path


def _varint(value: int, length: int = 0) -> bytes:
    groups = []
    while value or not groups:
        groups.append(value & 127)
        value >>= 7
    groups += [0] * (length - len(groups))
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


# --- all of them ---


def images() -> dict[str, Callable[[], bytes]]:
    """Return what makes each hostile image, by its name; some take hundreds of MiB."""
    return {
        "jpeg of empty segments.jpg": lambda: jpeg_with(b"\xff\xe0\0\2" * 2**26),
        "jpeg of padding.jpg": lambda: jpeg_with(b"\xff" * 2**28),
        "jpeg of junk.jpg": lambda: jpeg_with(b"a" * 2**28),
        "jpeg of 20000 scans.jpg": lambda: jpeg_scans(20_000, 4000),
        "jpeg of 90 scans.jpg": lambda: jpeg_scans(90, 9000),
        "jpeg of 9 progressive scans.jpg": lambda: jpeg_scans(9, 13_000, progressive=True),
        "jpeg of 65500 x 65500.jpg": lambda: jpeg_scans(2, 65_500),
        "jpeg of equal tags.jpg": lambda: jpeg_exif(2000),
        "jpeg of much exif.jpg": lambda: jpeg_exif(2000, 1000),
        "png of empty chunks.png": lambda: png_with(png_chunk(b"abCd") * 2**24),
        "png of equal tags.png": lambda: png_with(png_chunk(b"eXIf", exif_block(20_000, 400_000))),
        "png of equal tags in a text.png": lambda: png_exif_text(20_000),
        "gif of comments.gif": lambda: gif_with_comments(2**24),
        "tiff of 32 Mi strips.tif": lambda: tiff_of_strips(2**25),
        "tiff of equal places.tif": lambda: tiff_of_equal_places(20_000, 2**21),
        "tiff of doubles.tif": lambda: tiff_of_zeros(9400, 3, 64, floats=True),
        "tiff of floats.tif": lambda: tiff_of_zeros(9400, 3, 32, floats=True),
        "tiff of 16 channels.tif": lambda: tiff_of_zeros(9400, 16, 16),
        "tiff of 17 channels.tif": lambda: tiff_of_zeros(9400, 17, 64, floats=True),
        "bmp of runs.bmp": lambda: (
            encode("BMP")[:18]
            + struct.pack("<2i", 9400, 9400)
            + encode("BMP")[26:30]
            + struct.pack("<I", 1)
            + bytes(20)
            + b"\0\1" * 1000
        ),
        "ppm of text.ppm": lambda: b"P3 9000 9000 255\n" + b"1 " * 10**7,
        "eps.jpg": lambda: EPS,
    }


def write_packed(folder: Path) -> None:
    """Write each hostile image into a .zip of its own."""
    for name, make in images().items():
        write_zip(folder / f"packed {name}.zip", make(), name)
