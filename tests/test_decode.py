"""Decoded pixels equal a reference decoder's, upright; else there is one short reason."""

import os
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision import io as torchvision_io

from simsiam.data import decode as module
from simsiam.data.decode import EXTENSIONS, FORMATS, Unreadable, decode_image, read_header


def picture(seed, height=8, width=8, channels=3):
    """Noise: no two pixels alike, so none can be misplaced unseen."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height, width):
    """Two gradients: what JPEG keeps."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], -1).astype(np.uint8)


def encode(image, kind="PNG", **options):
    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, kind, **options
    )
    return file.getvalue()


def npy(array, **options):
    file = BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def png(pixels, interlaced=False, size=None):
    """Write PNGs that Pillow cannot: interlaced, 16-bit RGB, or with a wrong size in the header."""
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]  # Adam7
    data = b""
    for y, x, down, right in passes if interlaced else [(0, 0, 1, 1)]:
        part = pixels[y::down, x::right]
        data += b"".join(
            b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in part if part.size
        )
    height, width = size or pixels.shape[:2]
    kind = struct.pack(
        ">IIBBBBB",
        width,
        height,
        8 * pixels.itemsize,
        0 if pixels.ndim == 2 else 2,
        0,
        0,
        interlaced,
    )
    chunks = [(b"IHDR", kind), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def tiff(pixels, photometric=None, size=None):
    """Write (H, W, C) uncompressed in one strip, little-endian.

    Gray with extra samples, unless `photometric` says otherwise.
    """
    height, width = size or pixels.shape[:2]
    count, data = pixels.shape[2], pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    colors = 3 if photometric == 2 else 1
    tags = [
        (256, [width]),
        (257, [height]),
        (258, [8 * pixels.itemsize] * count),
        (259, [1]),
        (262, [photometric or 1]),
        (273, [8]),
        (277, [count]),
        (278, [height]),
        (279, [len(data)]),
        (338, [0] * (count - colors)),
        (339, [3 if pixels.dtype.kind == "f" else 1] * count),
    ]
    entries, beyond = b"", b""
    start = 8 + len(data) + 2 + 12 * sum(bool(values) for _, values in tags) + 4
    for tag, values in tags:
        packed = struct.pack(f"<{len(values)}I", *values)  # all LONG
        if values:
            place = struct.pack("<I", start + len(beyond)) if len(values) > 1 else packed
            beyond += packed if len(values) > 1 else b""
            entries += struct.pack("<HHI", tag, 4, len(values)) + place
    return (
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data
        + struct.pack("<H", len(entries) // 12) + entries + bytes(4) + beyond
    )  # fmt: skip


def reference(data):
    """Decode with torchvision to RGB (H, W, 3): the upper 8 of 16 bits, the first frame."""
    image = torchvision_io.decode_image(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), torchvision_io.ImageReadMode.RGB, True
    )
    image = image[0] if image.ndim == 4 else image
    pixels = image.numpy()
    return (
        (pixels >> 8 if pixels.dtype == np.uint16 else pixels).astype(np.uint8).transpose(1, 2, 0)
    )


def reason(data, *args, **options):
    with pytest.raises(Unreadable) as error:
        decode_image(data, *args, **options)
    text = str(error.value)
    assert 0 < len(text) <= 200 and text.isprintable() and " at 0x" not in text
    return text


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


# Formats


def odd_files():
    rgb, gray, deep = (
        picture(0, 9, 14),
        picture(1, 9, 14, 1)[..., 0],
        np.arange(126, dtype=np.uint16).reshape(9, 14) * 519,
    )
    rgba = np.concatenate([rgb, picture(2, 9, 14, 1)], -1)
    palette = Image.fromarray(rgb).quantize(32)
    more = {"save_all": True, "append_images": [Image.fromarray(picture(3, 9, 14))]}
    cmyk = encode(Image.fromarray(picture(4, 9, 14, 4), "CMYK"), "JPEG", quality=95)
    adobe = cmyk.index(b"Adobe") + 11  # its last byte: 0 for CMYK, 2 for YCCK
    return {
        "rgb.png": encode(rgb),
        "rgb.jpg": encode(rgb, "JPEG"),
        "progressive.jpg": encode(rgb, "JPEG", progressive=True),
        "gray.jpg": encode(gray, "JPEG"),
        "gray.png": encode(gray),
        "bits.png": encode(Image.fromarray(gray).convert("1")),
        "gray alpha.png": encode(Image.fromarray(np.dstack([gray, gray]), "LA")),
        "alpha.png": encode(rgba),
        "palette.png": encode(palette),
        "palette transparency.png": encode(palette, transparency=bytes(range(0, 256, 8))),
        "color key.png": encode(rgb, transparency=tuple(rgb[0, 0].tolist())),
        "16-bit gray.png": encode(Image.fromarray(deep)),
        "16-bit rgb.png": png(np.dstack([deep, deep[::-1], deep[:, ::-1]])),
        "interlaced.png": png(rgb, interlaced=True),
        "interlaced 16-bit gray.png": png(deep, interlaced=True),
        "cmyk.jpg": cmyk,
        "ycck.jpg": cmyk[:adobe] + b"\2" + cmyk[adobe + 1 :],
        "animated.gif": encode(palette, "GIF", **more),
        "animated.png": encode(rgb, "PNG", **more),
        "lossy.webp": encode(smooth(9, 14), "WEBP"),
        "wrong extension.jpg": encode(rgb, "PNG"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", odd_files())
def test_every_odd_format_is_what_torchvision_decodes(tmp_path, name):
    data = odd_files()[name]
    (tmp_path / name).write_bytes(data)
    pixels = decode_image(tmp_path / name)
    assert pixels.dtype == np.uint8 and pixels.shape == (9, 14, 3) and pixels.flags.writeable
    # No standard converts CMYK to RGB: both decoders multiply by black, and round differently.
    tolerance = 1 if name in ("cmyk.jpg", "ycck.jpg") else 0
    assert np.abs(pixels.astype(int) - reference(data)).max() <= tolerance
    assert same(decode_image(data), pixels)
    assert read_header(data)[:2] == read_header(tmp_path / name)[:2] == (9, 14)


@pytest.mark.parametrize("kind, suffix", [("PNG", "png"), ("JPEG", "jpg")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(kind, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth(6, 10), kind, exif=exif)
    assert same(decode_image(data), reference(data))
    assert read_header(data) == (6, 10, kind)  # as stored
    # EXIF 2.32, tag Orientation: which row and column of the stored array are at the top and left.
    turn = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: np.rot90,
    }
    assert same(decode_image(data), turn[orientation](decode_image(encode(smooth(6, 10), kind))))


def test_formats_that_torchvision_does_not_know_keep_their_pixels():
    rgb, gray = picture(0, 9, 14), picture(1, 9, 14, 1)
    deep = rgb.astype(np.uint16) * 256 + 255
    white = np.dstack([rgb, np.full((9, 14, 1), 255, np.uint8)])
    frames = {"save_all": True, "append_images": [Image.fromarray(picture(3, 9, 14))]}
    for data in (
        encode(rgb, "BMP"),
        encode(rgb, "PPM"),
        encode(rgb, "TIFF"),
        encode(rgb, "TIFF", compression="tiff_lzw"),
        encode(rgb, "TIFF", **frames),
        encode(rgb, "WEBP", lossless=True),
        encode(white, "WEBP", lossless=True),
        encode(rgb, "WEBP", lossless=True, **frames),
        tiff(rgb, photometric=2),
        tiff(deep, photometric=2),
    ):
        assert same(decode_image(data), rgb)
    for data in (
        encode(gray[..., 0], "PPM"),
        encode(gray[..., 0], "BMP"),
        tiff(gray),
        tiff(gray.astype("u2") * 256),
    ):
        assert same(decode_image(data), gray.repeat(3, 2)) and same(decode_image(data, 1), gray)
    stereo = encode(
        smooth(9, 14), "MPO", save_all=True, append_images=[Image.fromarray(picture(3, 9, 14))]
    )
    assert same(
        decode_image(stereo), decode_image(encode(smooth(9, 14), "JPEG"))
    )  # two pictures in one JPEG, as of some cameras


def test_16_bit_gray_is_scaled_not_clipped():
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    ppm = b"P5\n8 8\n65535\n" + deep.astype(">u2").tobytes()
    for data in (encode(Image.fromarray(deep)), encode(Image.fromarray(deep), "TIFF"), ppm):
        assert same(decode_image(data), np.stack([deep >> 8] * 3, -1)) and same(
            decode_image(data, 1)[..., 0], deep >> 8
        )


def test_32_bit_gray_is_scaled_as_16_bits_and_floats_from_0_to_1():
    deep = np.array([[-5, 0, 300], [40_000, 65_535, 70_000]], np.int32)
    assert same(
        decode_image(encode(Image.fromarray(deep), "TIFF"))[..., 0], [[0, 0, 1], [156, 255, 255]]
    )
    light = np.array([[0, 0.25, 0.5, 1]], np.float32)
    assert same(decode_image(encode(Image.fromarray(light), "TIFF"))[..., 2], [[0, 64, 128, 255]])
    assert "from 0 to 1" in reason(encode(Image.fromarray(255 * light), "TIFF"))


def test_broken_exif_does_not_cost_the_image(recwarn):
    for exif in (b"Exif\0\0MM\0*\xff\xff\xff\xff broken", b"Exif\0\0no header"):
        assert same(decode_image(encode(picture(0), exif=exif)), picture(0))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_one_channel_is_gray_and_four_are_rgba():
    rgb, alpha = Image.fromarray(picture(0)), picture(1, channels=1)
    assert same(decode_image(encode(rgb), 1)[..., 0], rgb.convert("L"))
    assert same(decode_image(encode(np.dstack([rgb, alpha])), 4), np.dstack([rgb, alpha]))
    assert same(decode_image(encode(rgb), 4)[..., 3], np.full((8, 8), 255))
    palette = rgb.quantize(4)
    assert same(
        decode_image(encode(palette, transparency=bytes([0, 50, 100, 150])), 4)[..., 3],
        np.asarray(palette) * 50,
    )
    red = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).astype(int)
    assert np.abs(red - (255, 0, 0)).max() < 10  # ink, not light
    for name, data in odd_files().items():
        assert decode_image(data, 1).shape == (9, 14, 1) and decode_image(data, 4).shape == (
            9,
            14,
            4,
        ), name


# Arrays


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 16])
def test_numpy_arrays_of_any_number_of_channels_first_or_last(channels):
    pixels = picture(0, 20, 30, channels)
    first = pixels.transpose(2, 0, 1)
    everything = [
        pixels,
        first,
        np.asfortranarray(pixels),
        pixels.astype("<u2") * 257,
        (first.astype("<u2") * 257).astype(">u2"),
        pixels / 255,
        (first / 255).astype(np.float32),
        (pixels / 255).astype(np.float16),
    ]
    for array in everything + [pixels[..., 0]] * (channels == 1):
        data = npy(array)
        assert same(decode_image(data, channels), pixels) and read_header(data, channels) == (
            20,
            30,
            "NPY",
        )
        other = 4
        assert reason(data, other).endswith(
            f"not an image of {other} channels; give --channels {channels}"
        )
    assert same(decode_image(npy(pixels > 127), channels), (pixels > 127) * np.uint8(255))


def test_arrays_that_are_no_images_are_refused():
    assert "int64 pixels: they should be uint8, uint16, or floats" in reason(
        npy(picture(0).astype(int))
    )
    for bad in (255.0, -0.1, np.nan):
        assert "from 0 to 1" in reason(npy(np.full((8, 8, 3), bad)))
    for shape in ((), (3,), (0, 8, 3), (2, 8, 8, 3), (30, 20, 17)):
        assert "not an image of 3 channels" in (text := reason(npy(np.zeros(shape, np.uint8))))
        assert "--channels" not in text


def test_a_lying_array_is_refused_before_memory_is_asked_for():
    whole = npy(np.zeros((40, 40, 3), np.uint8))
    for lie in (b"(40, 41, 3)", b"(40, 39, 3)", b"(40, 9**,3)", b"(-4, -4, 3)"):
        assert len(lie) == 11
        assert "damaged" in reason(whole.replace(b"(40, 40, 3)", lie))
    huge = whole.replace(b"(40, 40, 3), }      ", b"(99999999, 9999, 3),}")
    assert len(huge) == len(whole) + 1 and "damaged" in reason(huge)
    assert (
        "damaged NPY" in reason(whole[:-1])
        and "damaged" in reason(whole[:9])
        and "damaged" in reason(whole[:60])
    )


def test_python_objects_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    data = npy(np.array([[Trap()]], object), allow_pickle=True)
    assert reason(data, 1) == "an array of Python objects, not of numbers"
    with pytest.raises(Unreadable):
        read_header(data, 1)
    assert not (tmp_path / "sprung").exists()
    np.load(BytesIO(data), allow_pickle=True)
    assert (tmp_path / "sprung").exists()  # the trap was set


@pytest.mark.parametrize("channels", [2, 5, 16])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_tiff_of_many_channels(channels, kind, caplog):
    tifffile = pytest.importorskip("tifffile")
    pixels = picture(0, 20, 30, channels)
    stored = pixels.astype(kind) * {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[kind]
    planes = BytesIO()
    tifffile.imwrite(
        planes, stored.astype(kind).transpose(2, 0, 1), photometric="minisblack"
    )  # a page a channel
    for data in (tiff(stored.astype(kind)), planes.getvalue()):
        assert same(decode_image(data, channels), pixels) and read_header(data, channels) == (
            20,
            30,
            "TIFF",
        )
    if channels > 2:
        assert reason(tiff(stored.astype(kind))).endswith(f"give --channels {channels}")
    for data in (tiff(stored.astype(kind)), planes.getvalue()):
        assert "damaged or unsupported TIFF" in reason(data[: len(data) // 2], channels)


def test_a_tiff_with_a_fourth_band_keeps_it():
    pytest.importorskip("tifffile")
    pixels = picture(0, 20, 30, 4)
    for data in (tiff(pixels), tiff(pixels, photometric=2)):
        assert same(decode_image(data, 4), pixels)
    assert same(decode_image(tiff(pixels, photometric=2)), pixels[..., :3])


def read_in_this_process(monkeypatch):
    """Patches are in this process only."""

    def read_here(work, file, channels, min_side=0):
        request = {"work": work, "channels": channels, "min_side": min_side}
        return module.read_image(file, request)

    monkeypatch.setattr(module, "call_decoder", read_here)


def test_without_tifffile_its_images_are_unreadable_and_say_what_to_install(monkeypatch):
    read_in_this_process(monkeypatch)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert "pip install tifffile" in reason(tiff(picture(0, 20, 30, 5)), 5)
    assert same(decode_image(tiff(picture(0), photometric=2)), picture(0))


def test_another_number_of_channels_gives_the_one_to_give():
    assert reason(encode(picture(0)), 5) == "PNG in RGB, not 5 channels; give --channels 3"
    assert (
        reason(encode(picture(0)[..., 0], "JPEG"), 2)
        == "JPEG in L, not 2 channels; give --channels 1"
    )
    assert reason(npy(picture(0, 8, 8, 2)), 5).endswith("give --channels 2")


# Broken files


def test_reasons(tmp_path):
    whole = encode(picture(0, 64, 64))
    assert reason(b"") == "an empty file"
    for data in (
        b"<html>404</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        b"\x89PN",
        bytes(100),
    ):
        assert reason(data) == f"not one of {', '.join(FORMATS)}"
    for data in (whole[:33], whole[: len(whole) // 2], whole[:200] + bytes(100) + whole[300:]):
        assert reason(data).startswith("damaged or unsupported PNG: ")
    assert reason(b"RIFF\n\n\n\nWEBP").startswith(
        "damaged or unsupported WEBP"
    )  # any size, and so any byte
    assert (
        reason(tmp_path) == "Is a directory"
        and reason(tmp_path / "gone.png") == "No such file or directory"
    )
    assert "null byte" in reason("a\0.png")
    (tmp_path / "a\x1b[31m\n.png").write_bytes(whole[:40])
    reason(tmp_path / "a\x1b[31m\n.png")


def small_files():
    """One of each format, with the number of channels to ask for."""
    rgb = Image.fromarray(picture(0, 24, 24))
    files = {
        kind: encode(rgb, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM", "TIFF")
    }
    files |= {"NPY": npy(picture(0, 24, 24))}
    return {kind: (data, 3) for kind, data in files.items()} | {
        "TIFF of 5": (tiff(picture(0, 24, 24, 5)), 5)
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File")
@pytest.mark.parametrize("name", small_files())
def test_a_file_cut_anywhere_is_unreadable_or_whole(name):
    data, channels = small_files()[name]
    if channels == 5:
        pytest.importorskip("tifffile")
    whole, refused = decode_image(data, channels), 0
    cuts = [*range(0, min(len(data), 100)), *np.linspace(100, len(data) - 1, 100, dtype=int)]
    for cut in cuts:
        try:
            assert same(
                decode_image(data[:cut], channels), whole
            )  # lost metadata behind the pixels is no loss
        except Unreadable as error:
            refused += 1
            kinds = (
                "an empty file",
                "not one of",
                f"damaged or unsupported {name[:4].strip()}",
                "damaged NPY",
            )
            assert str(error).startswith(kinds)
    assert refused > 0.9 * len(cuts)


def test_a_bomb_is_refused_by_its_size():
    bomb = png(np.zeros((0, 0), np.uint8), size=(20_000, 20_000))
    assert reason(bomb) == "20000x20000 is more than 89,478,485 pixels"
    assert "16000x30000 is more" in reason(tiff(picture(0), photometric=2, size=(30_000, 16_000)))
    gif, bmp = encode(picture(0), "GIF"), encode(picture(0), "BMP")
    assert "is more than" in reason(bmp[:18] + struct.pack("<ii", 60_000, 60_000) + bmp[26:])
    assert "60000x60000 is more" in reason(gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:])
    jpeg = encode(picture(0), "JPEG", progressive=True)
    at = jpeg.index(b"\xff\xc2") + 5
    assert "is more than" in reason(jpeg[:at] + struct.pack(">HH", 60_000, 60_000) + jpeg[at + 4 :])


def test_what_is_too_large_is_refused_unless_it_is_a_jpeg(monkeypatch):
    read_in_this_process(monkeypatch)
    monkeypatch.setattr(module, "MAX_PIXELS", 64 * 96)
    assert decode_image(encode(smooth(64, 96))).shape == (64, 96, 3)
    for data in (encode(smooth(64, 97)), npy(smooth(64, 97)), encode(smooth(64, 97), "TIFF")):
        assert reason(data) == "97x64 is more than 6,144 pixels"
    assert decode_image(encode(smooth(64, 96), "JPEG")).shape == (64, 96, 3)
    for height, width, scale in (
        (64, 97, 2),
        (128, 192, 2),
        (128, 193, 4),
        (256, 385, 8),
        (512, 768, 8),
    ):
        data = encode(smooth(height, width), "JPEG")
        pixels = decode_image(data)
        assert pixels.shape == (-(-height // scale), -(-width // scale), 3) and read_header(data)[
            :2
        ] == (height, width)
        exact = np.asarray(
            Image.fromarray(smooth(height, width)).resize(pixels.shape[1::-1], Image.Resampling.BOX)
        )
        assert np.abs(pixels.astype(int) - exact).max() <= 8
    assert "100x67 is more" in reason(encode(smooth(536, 800), "JPEG"))
    assert decode_image(encode(smooth(128, 96), "JPEG", progressive=True)).shape == (64, 48, 3)
    assert "more than 12,288" in reason(encode(smooth(129, 96), "JPEG", progressive=True))


def test_a_phones_200_megapixels_are_read():
    black = Image.new("L", (16_320, 12_240))
    assert decode_image(encode(black, "JPEG"), min_side=224).shape == (1530, 2040, 3)


def test_a_jpeg_is_reduced_as_far_as_its_shorter_side_allows():
    photo, still = encode(smooth(200, 310), "JPEG"), encode(smooth(200, 310))
    for least in (*range(1, 30), 49, 50, 51, 99, 100, 101, 199, 200, 201, 1000):
        pixels = decode_image(photo, min_side=least)
        scale = next((s for s in (8, 4, 2) if 200 // s >= least), 1)
        assert pixels.shape == (-(-200 // scale), -(-310 // scale), 3)
        assert decode_image(still, min_side=least).shape == (200, 310, 3)
    assert same(decode_image(photo, min_side=0), decode_image(photo, min_side=101)) and same(
        decode_image(photo), reference(photo)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(smooth(200, 310), "JPEG", exif=exif), min_side=50).shape == (
        78,
        50,
        3,
    )


@pytest.mark.filterwarnings("ignore")  # Pillow and NumPy warn of odd metadata
def test_damage_anywhere_is_unreadable_or_an_image():
    """No file makes `decode` raise anything else: 2,700 mutants of nine formats."""
    rng = np.random.default_rng(0)
    files, read = list(small_files().values()), 0
    for i in range(2700):
        whole, channels = files[i % len(files)]
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        data[rng.integers(min(40, len(data)))] = rng.choice([0, 255])
        with suppress(Unreadable):
            pixels = decode_image(
                bytes(data[: rng.integers(1, len(data) + 1)] if i % 3 == 0 else data), channels
            )
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == channels
            read += 1
    assert 100 < read < 2600


def test_odd_files_leave_no_line_on_the_terminal(tmp_path):
    (tmp_path / "exif.png").write_bytes(
        encode(picture(0), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    )
    (tmp_path / "bands.tif").write_bytes(tiff(picture(0, channels=16))[:-100])
    (tmp_path / "cut.tif").write_bytes(encode(picture(0), "TIFF")[:-150])
    (tmp_path / "bomb.png").write_bytes(png(np.zeros((0, 0), np.uint8), size=(10_000, 10_000)))
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from simsiam.data.decode import Unreadable, decode_image\n"
        "for file in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    for channels in (3, 16):\n"
        "        try: decode_image(file, channels)\n"
        "        except Unreadable: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_extension_has_a_format_and_pillow_is_left_as_it_was():
    names = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "NPY", "RAW"]
    assert {*names, "JPEG 2000", "HEIC or AVIF"} == set(FORMATS)
    assert {Path(name).suffix for name in odd_files()} < EXTENSIONS
    assert not ImageFile.LOAD_TRUNCATED_IMAGES and Image.MAX_IMAGE_PIXELS == 2**28 // 3
