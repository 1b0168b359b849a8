"""Every file is accounted for: read, unreadable, or passed over, with its kind and the reason."""

import io
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import ExifTags, Image
from test_decode import npy
from test_sources import is_the_same

from simsiam.data import decode, decoder_process
from simsiam.data.decode import FORMAT_EXTENSIONS, Unreadable, decode_image
from simsiam.sources import file_kinds
from simsiam.sources.open_source import open_source
from simsiam.sources.write_shards import write_shards
from simsiam.training.inspect import inspect

RNG = np.random.default_rng(0)


def picture(width=64, height=48):
    """A smooth picture whose halves differ, so that a turn or a mirror image shows."""
    x = np.linspace(0, 1, width)[None, :, None] * [255, 120, 0]
    y = np.linspace(0, 1, height)[:, None, None] * [0, 100, 255]
    return Image.fromarray((x + y).clip(0, 255).astype(np.uint8))


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def encode_heic(image, **options):
    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, quality=95, **options)
    return stream.getvalue()


def make_dng(preview, orientation=1, jpeg=True):
    """Write a DNG as a camera does: a small thumbnail, the values of the sensor, a JPEG preview."""
    out = bytearray(b"II*\0\0\0\0\0")

    def put(data):
        start = len(out)
        out.extend(data + bytes(len(data) % 2))
        return start

    def directory(tags):
        entries = b""
        for tag, (kind, values) in sorted(tags.items()):
            values = values if isinstance(values, bytes | tuple) else (values,)
            code = {1: "B", 2: "B", 3: "H", 4: "I"}[kind]
            data = struct.pack(f"<{len(values)}{code}", *values)
            place = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", put(data))
            entries += struct.pack("<HHI", tag, kind, len(values)) + place
        return put(struct.pack("<H", len(tags)) + entries + bytes(4))

    def plane(size, bits, photometric, compression, subtype, data, samples):
        return {
            254: (4, subtype), 256: (4, size[0]), 257: (4, size[1]), 258: (3, (bits,) * samples),
            259: (3, compression), 262: (3, photometric), 273: (4, put(data)), 277: (3, samples),
            278: (4, size[1]), 279: (4, len(data)), 284: (3, 1),
        }  # fmt: skip

    small, values = preview.resize((32, 24)), RNG.integers(0, 4096, (480, 640)).astype("<u2")
    sensor = plane((640, 480), 16, 32803, 1, 0, values.tobytes(), 1)
    sensor |= {33421: (3, (2, 2)), 33422: (1, (0, 1, 1, 2)), 50717: (4, 4095)}
    large = plane(preview.size, 8, 6, 7, 1, encode(preview, "JPEG", quality=95), 3)
    first = plane(small.size, 8, 2, 1, 1, small.tobytes(), 3)
    directories = (directory(sensor), directory(large))
    first |= {
        271: (2, b"Test\0"), 272: (2, b"Test Camera\0"), 274: (3, orientation),
        330: (4, directories if jpeg else directories[:1]), 50706: (1, (1, 4, 0, 0)),
        50707: (1, (1, 1, 0, 0)), 50708: (2, b"Test Camera\0"),
    }  # fmt: skip
    struct.pack_into("<I", out, 4, directory(first))
    return bytes(out)


def near(pixels, image, tolerance=8):
    expected = np.asarray(image).astype(int)
    return pixels.shape == expected.shape and np.abs(pixels - expected).mean() < tolerance


# --- formats ------------------------------------------------------------------------------------


def test_shards_give_images_of_every_format_back(tmp_path):
    """The format in a header decides the extension in a tar, which decides whether it is read."""
    files = {
        f"{kind}.{extension}": encode(picture(), kind)
        for kind, extension in {
            "JPEG": "jpg", "PNG": "png", "BMP": "bmp", "GIF": "gif", "WEBP": "webp", "PPM": "ppm",
            "TIFF": "tif", "JPEG2000": "jp2", "AVIF": "avif",
        }.items()
    }  # fmt: skip
    files |= {"a.heic": encode_heic(picture()), "a.dng": make_dng(picture(640, 480))}
    files["a.npy"] = npy(np.asarray(picture()))
    assert {decode.read_header(data).format for data in files.values()} == set(FORMAT_EXTENSIONS)
    found = {decode.find_format(data[: decode.SIGNATURE_BYTES]) for data in files.values()}
    assert found | {"RAW"} == set(decode.FORMATS)  # a DNG begins as a TIFF does
    (tmp_path / "photos").mkdir()
    for name, data in files.items():
        (tmp_path / "photos" / name).write_bytes(data)
    is_the_same(
        open_source(write_shards(tmp_path / "photos", out=tmp_path / "tars")),
        open_source(tmp_path / "photos"),
    )


@pytest.mark.parametrize("make", [
    encode_heic,
    lambda image: encode(image, "AVIF", quality=95),
    lambda image: encode(image, "JPEG2000"),
])  # fmt: skip
def test_photographs_of_phones_and_scanners_are_read(make):
    assert near(decode_image(make(picture())), picture())
    assert decode_image(make(picture()), channels=1).shape == (48, 64, 1)


def test_a_heic_is_upright_and_one_that_begins_like_an_avif_is_read():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = picture().transpose(Image.Transpose.ROTATE_90)
    assert near(decode_image(encode_heic(turned, exif=exif.tobytes())), picture())
    avif = encode(picture(), "AVIF", quality=95)
    assert avif[8:12] == b"avif"
    assert near(decode_image(avif[:8] + b"mif1" + avif[12:]), picture())


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, None), (3, "ROTATE_180"), (6, "ROTATE_270"), (8, "ROTATE_90")],
)
def test_of_a_raw_photograph_the_preview_is_read_upright(orientation, turn):
    preview = picture(640, 480)
    upright = preview.transpose(Image.Transpose[turn]) if turn else preview
    assert near(decode_image(make_dng(preview, orientation)), upright)
    size = (32, 24) if orientation in (1, 3) else (24, 32)
    small = decode_image(make_dng(preview, orientation, jpeg=False))
    assert near(small, upright.resize(size))


@pytest.mark.parametrize(
    ("data", "module", "package"),
    [
        (encode_heic(picture()), "pillow_heif", "pillow-heif"),
        (make_dng(picture(640, 480)), "rawpy", "rawpy"),
    ],
)
def test_a_missing_package_is_named(data, module, package, monkeypatch):
    missing = f"import sys; sys.modules[{module!r}] = None; "
    monkeypatch.setattr(decoder_process, "START", missing + decoder_process.START)
    monkeypatch.setattr(decoder_process, "_idle", [])
    with pytest.raises(Unreadable, match=f"only {package} reads: pip install {package}$"):
        decode_image(data)


def chunk(kind, data, checksum=None):
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


@pytest.mark.parametrize("after_pixels", [False, True])
@pytest.mark.parametrize("extra", [
    chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000)),
    chunk(b"iTXt", b"prompt\0\0\0\0\0" + b"x" * 2_000_000),
    chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
    chunk(b"tEXt", b"Software\0scanner", checksum=1),
    chunk(b"eXIf", b"II*\0broken", checksum=1),
    chunk(b"pHYs", b"12"),
])  # fmt: skip
def test_what_is_odd_in_a_png_beside_its_pixels_loses_no_pixel(extra, after_pixels):
    data = encode(picture(), "PNG")
    at = data.rindex(b"IEND") - 4 if after_pixels else 33
    assert near(decode_image(data[:at] + extra + data[at:]), picture(), 1e-9)


def test_transparency_and_orientation_of_a_png_are_kept():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = picture().transpose(Image.Transpose.ROTATE_90)
    assert near(decode_image(encode(turned, "PNG", exif=exif)), picture(), 1e-9)
    data = encode(Image.new("P", (2, 1)), "PNG", transparency=0)
    assert decode_image(data, channels=4)[0, 0, 3] == 0
    damaged = bytearray(encode(picture(), "PNG"))
    damaged[damaged.index(b"IDAT") + 9] ^= 1
    with pytest.raises(Unreadable, match="damaged"):
        decode_image(bytes(damaged))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_upper_eight_of_the_bits_that_an_image_uses_are_kept(bits):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) << (bits - 8)
    gray = decode_image(encode(Image.fromarray(values), "PNG"), channels=1)
    assert (gray[..., 0] == values >> (bits - 8)).all()
    stream = io.BytesIO()
    np.save(stream, values)
    assert (decode_image(stream.getvalue(), channels=1) == gray).all()


# --- names --------------------------------------------------------------------------------------


def mixed(folder, count=3):
    """Write a folder of files of many kinds; return how many there are of each."""
    jpeg = encode(picture(), "JPEG")
    readable = {
        "a.jpg": jpeg, "b.jpe": jpeg, "c.heic": encode_heic(picture()),
        "d.avif": encode(picture(), "AVIF"), "e.jp2": encode(picture(), "JPEG2000"),
        "f.dng": make_dng(picture(640, 480)), "g": jpeg, "h.jpg_large": jpeg, "i.dat": jpeg,
        "Screenshot at 3.04\u202fPM": encode(picture(), "PNG"), "sub dir/j.png": jpeg,
    }  # fmt: skip
    broken = {f"broken {name}": data[: len(data) // 2] for name, data in list(readable.items())[:5]}
    others = {
        "film.mp4": b"\0\0\0\x18ftypmp42", "film.MOV": b"", "notes.txt": jpeg,
        "a.jpg.json": b"{}", "a.xmp": b"<x/>", "drawing.psd": b"8BPS", "unknown": b"BM, and more",
        "Makefile": b"",
        ".hidden.jpg": jpeg, ".thumbnails/a.jpg": jpeg, ".thumbnails/deep/b.jpg": jpeg,
    }  # fmt: skip
    for i in range(count):
        for name, data in (readable | broken | others).items():
            path = folder / f"{i}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    kinds = {
        ".mp4": 1, ".mov": 1, ".txt": 1, ".json": 1, ".xmp": 1, ".psd": 1,
        "without extension": 2, "hidden": 3,
    }  # fmt: skip
    kinds = {kind: count * number for kind, number in kinds.items()}
    return count * len(readable), count * len(broken), kinds


def test_inspect_accounts_for_every_file(tmp_path, capsys):
    readable, broken, kinds = mixed(tmp_path / "photos")
    facts = inspect(tmp_path / "photos", no_labels=True)["files"]
    assert facts == {
        "total": sum(len(files) for *_, files in os.walk(tmp_path / "photos")),
        "read": readable,
        "unreadable": broken,
        "passed_over": kinds,
    }
    assert facts["total"] == readable + broken + sum(kinds.values())
    told = capsys.readouterr()
    line = f"files that are not read: {sum(kinds.values())} of {facts['total']}: "
    assert line + "9 hidden, 6 without extension, 3 .json, 3 .mov (videos)" in told.err
    assert "are images although their names do not say so, and are read: 12: 6 with" in told.err
    assert "passed over:\n              9 hidden\n" in told.out


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_account_for_every_file_as_folders_do(kind, tmp_path):
    readable, broken, kinds = mixed(tmp_path / "photos")
    path = tmp_path / f"photos.{kind}"
    files = [file for file in sorted((tmp_path / "photos").rglob("*")) if file.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, file.relative_to(tmp_path))
    else:
        with tarfile.open(path, "w") as archive:
            for file in files:
                archive.add(file, file.relative_to(tmp_path))
    source = open_source(path, no_labels=True)
    assert len(source.train) == readable + broken
    assert dict(source.passed_over) == kinds


def test_a_zip_of_windows_has_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in ("cat\\1.png", "cat\\2.png", "dog\\1.png", "dog\\deep\\2.png"):
            info = zipfile.ZipInfo("x")
            info.filename, info.create_system = name, 0
            archive.writestr(info, encode(picture(), "PNG"))
    images = open_source(tmp_path / "photos.zip").train
    assert images.classes == ("cat", "dog")
    assert list(images.keys) == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/deep/2.png"]


def test_without_a_package_its_files_are_passed_over_and_the_package_is_named(
    tmp_path, monkeypatch, capsys
):
    fewer = decode.EXTENSIONS - {".heic", ".dng"}
    monkeypatch.setattr(file_kinds, "EXTENSIONS", fewer)
    suffixes = tuple(extension.encode() for extension in fewer)
    monkeypatch.setattr(file_kinds, "IMAGE_SUFFIXES", suffixes)
    mixed(tmp_path, 1)
    source = open_source(tmp_path)
    assert source.passed_over[".heic"] == 2 and source.passed_over[".dng"] == 1
    line = capsys.readouterr().err
    assert "2 .heic (pip install pillow-heif to read them)" in line
    assert "1 .dng (pip install rawpy to read them)" in line


def test_images_beside_shards_are_counted(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    mixed(tmp_path, 1)
    table = pa.table({"image": [encode(picture(), "PNG")] * 3})
    pq.write_table(table, tmp_path / "features.parquet")
    assert len(open_source(tmp_path).train) == 3
    assert "images beside the shards, which are not read: 16" in capsys.readouterr().err


def test_a_webdataset_names_the_images_that_it_cannot_read(tmp_path):
    with tarfile.open(tmp_path / "00.tar", "w") as archive:
        for name in ("0.JPG", "0.cls", "1.mp4", "1.cls", "2.mov"):
            data = encode(picture(), "JPEG") if name.endswith("JPG") else b"1"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = open_source(tmp_path)
    assert source.damage == (("00.tar", "not read: 1 .mov (videos), 1 .mp4 (videos)"),)


def test_a_label_may_have_a_name_before_its_extension_as_the_image_has(tmp_path):
    with tarfile.open(tmp_path / "00.tar", "w") as archive:
        for i in range(4):
            for name, data in (
                ("image.jpg", encode(picture(), "JPEG")),
                ("Label.cls", b"%d" % (i % 2)),
            ):
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    images = open_source(tmp_path).train
    assert images.classes == ("0", "1") and images.labels.tolist() == [0, 1, 0, 1]
