"""The images of benchmarks/duplicates.py: scenes of eleven kinds, and copies planted among them.

Each scene is an image that is no copy of any other, though many are made to look like one: frames
of a burst and of a slow pan, pages with one line changed, forms filled in differently, frames of a
fixed camera, variants of a logo. Everything depends on the seed alone.
"""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

NUM_SCENES = 100  # of each kind
PAN_FRAMES = 25  # of each pan
NUM_COPIED = 30  # scenes that each edit makes a copy of
TEXT = """
about above across after again against almost along already although always among answer
around because before began behind being below better between bring brought business call
carry change children city close color come common complete country course cover cross cut
decide deep different direct door draw early earth east enough example face family farm father
field figure final find fire first follow food form found four friend front garden general
give gold govern great green ground group grow half hand happen head hear heard help high hold
home horse hour house hundred idea inch interest island keep kind knew land large last late
laugh lead learn leave left letter life light line list listen little live long machine main
many mark mean measure men might mile mind minute money morning mother mountain move music
name near need never night north note notice number object ocean often open order paper part
pass pattern people perhaps person picture piece place plain plane plant play point port power
press problem produce product pull question quick rain reach ready record remember rest river
road rock room round rule same school science second seem sentence serve several shape ship
short show side simple sing sleep slow small sound south special spell stand star start state
stay step still stood story street strong study surface table tail talk teach tell test thing
think thought thousand through time together toward town travel tree true turn under unit
until usual value voice vowel wait walk warm watch water west wheel while white whole wind
winter wonder wood word work world write year young
"""
WORDS = TEXT.split()


def random_text(rng: np.random.Generator, words: int) -> str:
    """Draw words that make no sense."""
    return " ".join(rng.choice(WORDS, words))


def read_tar(path: Path, pattern: str, count: int, rng: np.random.Generator) -> list[Image.Image]:
    """Draw images from a .tar, those whose name contains `pattern`.

    Args:
        path: The archive.
        pattern: Part of the names.
        count: Number of images.
        rng: Chooses them.

    Returns:
        Images as RGB, no two with equal files.
    """
    with tarfile.open(path) as archive:
        members = [m for m in archive if m.isfile() and pattern in m.name and m.size > 0]
        chosen = [members[i] for i in rng.permutation(len(members))[: 2 * count]]
        files = dict.fromkeys(archive.extractfile(member).read() for member in chosen)
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in list(files)[:count]]


# --- scenes ---------------------------------------------------------------------------------------


def photographs(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Photographs, and bursts: the camera is held by hand, or a subject moves."""
    found = read_tar(data / "imagenette224.tar", "train/", NUM_SCENES - 36, rng)
    photos = found[4:]
    for photo in found[:4]:  # the hand moves the camera a little between two frames
        x, y = rng.uniform(2, 6, 2)
        for _ in range(5):
            angle, zoom = rng.normal(0, 0.4), rng.normal(1, 0.004)
            x, y = np.add([x, y], rng.uniform(1, 3, 2))
            frame = photo.rotate(angle, Image.Resampling.BICUBIC)
            size = 200 * zoom
            frame = frame.resize((200, 200), Image.Resampling.BICUBIC, (x, y, x + size, y + size))
            photos.append(add_noise(frame, 3, rng))
    for photo, other in zip(photos[4:8], photos[8:12]):  # a subject moves before a fixed camera
        subject = other.crop((60, 60, 110, 120))
        x, y = rng.uniform(10, 90, 2)
        for _ in range(5):
            frame = photo.copy()
            x, y = np.add([x, y], rng.uniform(3, 12, 2))
            frame.paste(subject, (int(x), int(y)), oval(subject.size))
            photos.append(add_noise(frame, 3, rng))
    return photos


def pans(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Frames of slow pans over photographs that stand side by side, and over soft clouds."""
    frames = []
    for step in (1, 2, 4):  # pixels of 200 between two frames
        parts = read_tar(data / "flowers.tar", "/train/", 3, rng)
        wide = Image.new("RGB", (600, 200))
        for i, part in enumerate(parts):
            wide.paste(part.resize((200, 200), Image.Resampling.BICUBIC), (200 * i, 0))
        frames += [wide.crop((x, 0, x + 200, 200)) for x in range(0, PAN_FRAMES * step, step)]
    clouds = Image.fromarray(rng.integers(0, 256, (12, 40, 3), np.uint8))
    clouds = clouds.resize((800, 240), Image.Resampling.BICUBIC)
    frames += [clouds.crop((4 * i, 0, 4 * i + 240, 240)) for i in range(PAN_FRAMES)]
    return frames


def flowers(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Photographs of flowers."""
    return read_tar(data / "flowers.tar", "/train/", NUM_SCENES, rng)


def mri_slices(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Slices of brains, as a tomograph makes them."""
    return read_tar(data / "brain_mri.tar", "/train/", NUM_SCENES, rng)


def solar_cells(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Electroluminescence images of solar cells, all with the same bars."""
    return read_tar(data / "solar_cells.tar", "/train/", NUM_SCENES, rng)


def hand_signs(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Hands before the same wall."""
    return read_tar(data / "hand_signs.tar", "/train/", NUM_SCENES, rng)


def text_pages(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Pages of one book; drafts of a page with one line changed; forms that are filled in."""
    pages = [draw_page(rng, [random_text(rng, 11) for _ in range(46)]) for _ in range(50)]
    for _ in range(5):
        lines = [random_text(rng, 11) for _ in range(46)]
        for _ in range(5):
            lines[rng.integers(46)] = random_text(rng, 11)
            pages.append(draw_page(rng, lines, number=7))
    labels = [random_text(rng, 2).capitalize() for _ in range(14)]
    return pages + [draw_form(rng, labels) for _ in range(NUM_SCENES - len(pages))]


def draw_page(rng: np.random.Generator, lines: list[str], number: int = 0) -> Image.Image:
    """Draw a page of A4 at 75 dots per inch."""
    page = Image.new("L", (620, 877), 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    draw.text((60, 30), "The book of many words", fill=0, font=ImageFont.load_default(14))
    for i, line in enumerate(lines):
        draw.text((60, 70 + 16 * i), line[:80], fill=0, font=font)
    draw.text((300, 840), str(number or rng.integers(1, 999)), fill=0, font=font)
    return page


def draw_form(rng: np.random.Generator, labels: list[str]) -> Image.Image:
    """Draw a form; most of it is the same whatever is filled in."""
    page = Image.new("L", (620, 877), 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    draw.text((60, 40), "Request for many things", fill=0, font=ImageFont.load_default(22))
    for i, label in enumerate(labels):
        y = 110 + 48 * i
        draw.text((60, y), label, fill=0, font=font)
        draw.rectangle((220, y - 8, 560, y + 24), outline=0)
        draw.text((230, y), random_text(rng, int(rng.integers(1, 4))), fill=40, font=font)
    return page


def screenshots(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Windows of three programs, with other lists, and of one with other messages."""
    scenes = []
    for program in range(3):
        bar = [random_text(rng, 1) for _ in range(9)]
        color = tuple(int(c) for c in rng.integers(30, 160, 3))
        for _ in range(25):
            rows = [random_text(rng, 3) + f".{program}" for _ in range(20)]
            scenes.append(draw_window(bar, color, rows))
    for _ in range(NUM_SCENES - len(scenes)):
        window = draw_window(bar, color, rows)
        draw = ImageDraw.Draw(window)
        draw.rectangle((200, 150, 500, 260), fill=(250, 250, 250), outline=(90, 90, 90))
        draw.text((220, 170), random_text(rng, 4), fill=0, font=ImageFont.load_default(14))
        draw.text((220, 200), random_text(rng, 5), fill=0, font=ImageFont.load_default(14))
        scenes.append(window)
    return scenes


def draw_window(bar: list[str], color: tuple[int, ...], rows: list[str]) -> Image.Image:
    """Draw the window of a program: a title, a bar of menus, and rows of a list."""
    window = Image.new("RGB", (720, 450), (236, 238, 241))
    draw, font = ImageDraw.Draw(window), ImageFont.load_default(12)
    draw.rectangle((0, 0, 720, 28), fill=color)
    draw.text((12, 6), "File  Edit  View  Help", fill=(255, 255, 255), font=font)
    draw.rectangle((0, 28, 150, 450), fill=(214, 219, 226))
    for i, word in enumerate(bar):
        draw.ellipse((14, 50 + 40 * i, 26, 62 + 40 * i), fill=color)
        draw.text((36, 49 + 40 * i), word, fill=(40, 40, 40), font=font)
    for i, row in enumerate(rows):
        draw.text((170, 40 + 20 * i), row, fill=(20, 20, 20), font=font)
        draw.text((560, 40 + 20 * i), f"{len(row) * 37} KB", fill=(110, 110, 110), font=font)
    return window


def spectrograms(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Spectrograms of calls in noise; of each fourth call the same, a little later."""
    scenes = []
    while len(scenes) < NUM_SCENES:
        chirps = [(rng.uniform(0, 1), *rng.uniform(0.05, 0.45, 2), rng.uniform(0.1, 0.4))
                  for _ in range(rng.integers(2, 6))]  # fmt: skip
        scenes += [draw_spectrogram(chirps, 0.1 * i, rng) for i in range(4)]
    return scenes[:NUM_SCENES]


def draw_spectrogram(
    chirps: list[tuple[float, ...]], delay: float, rng: np.random.Generator
) -> Image.Image:
    """Draw the spectrogram of chirps: start in s, first and last frequency, length in s."""
    rate = 16_000  # samples a second; 2 s in all
    wave, time = rng.normal(0, 0.05, 2 * rate), np.arange(2 * rate) / rate
    for start, first, last, length in chirps:
        t = (time - start - delay) / length
        phase = 2 * np.pi * rate * length * (first * t + (last - first) * t**2 / 2)
        wave += np.sin(phase) * np.exp(-(((t - 0.5) * 3) ** 4))
    frames = np.lib.stride_tricks.sliding_window_view(wave, 512)[::96] * np.hanning(512)
    power = np.log(np.abs(np.fft.rfft(frames, axis=1))[:, :240].T[::-1] + 1e-2)
    level = np.clip((power + 2) / 7, 0, 1)[..., None]
    stops = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
    below = np.minimum((level * 4).astype(int), 3)
    colors = stops[below[..., 0]] * (1 - level * 4 + below) + stops[below[..., 0] + 1] * (
        level * 4 - below
    )
    return Image.fromarray(colors.astype(np.uint8))


def time_lapse(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """A camera that never moves: four places, on which light and small things change."""
    frames = []
    for place in read_tar(data / "imagenette224.tar", "val/", 4, rng):
        place = place.resize((320, 240), Image.Resampling.BICUBIC)
        spots = rng.uniform(0.1, 0.8, (4, 2)) * [320, 240]
        colors = rng.integers(0, 256, (4, 3))
        for i in range(NUM_SCENES // 4):
            light = 0.85 + 0.15 * np.sin(i / 6)
            frame = Image.fromarray((np.asarray(place) * light).astype(np.uint8))
            draw = ImageDraw.Draw(frame)
            spots = np.clip(spots + rng.normal(0, 18, (4, 2)), 4, [300, 220])
            for (x, y), color in zip(spots, colors):
                draw.rounded_rectangle((x, y, x + 16, y + 10), 4, tuple(map(int, color)))
            frames.append(add_noise(frame, 2, rng))
    return frames


def logos(data: Path, rng: np.random.Generator) -> list[Image.Image]:
    """Logos whose shape is in the alpha channel, each with three variants."""
    scenes = []
    while len(scenes) < NUM_SCENES:
        corners = rng.uniform(20, 180, (rng.integers(3, 8), 2))
        hole = (*rng.uniform(60, 100, 2), *rng.uniform(110, 160, 2))
        color = (0, 0, 0) if len(scenes) % 3 == 0 else tuple(map(int, rng.integers(0, 256, 3)))
        name, tagline = random_text(rng, 1).upper(), random_text(rng, 2)
        other = tuple((c + 128) % 256 for c in color)
        for ink, words, dot in (
            (color, tagline, False),
            (other, tagline, False),
            (color, random_text(rng, 2), False),
            (color, tagline, True),
        ):
            scenes.append(draw_logo(corners, hole, ink, name, words, dot))
    return scenes[:NUM_SCENES]


def draw_logo(corners, hole, ink, name: str, words: str, dot: bool) -> Image.Image:
    """Draw a logo: a shape with a hole, a name, a line below it, and perhaps a dot."""
    alpha = Image.new("L", (200, 260), 0)
    draw = ImageDraw.Draw(alpha)
    draw.polygon([tuple(corner) for corner in corners], fill=255)
    draw.ellipse(hole, fill=0)
    draw.text((20, 190), name, fill=255, font=ImageFont.load_default(30))
    draw.text((20, 230), words, fill=255, font=ImageFont.load_default(15))
    if dot:
        draw.ellipse((160, 195, 185, 220), fill=255)
    logo = Image.new("RGBA", alpha.size, (*ink, 0))
    logo.putalpha(alpha)
    return logo


def add_noise(image: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    """Add the noise of a sensor, in gray levels."""
    pixels = np.asarray(image) + rng.normal(0, deviation, np.asarray(image).shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def oval(size: tuple[int, int]) -> Image.Image:
    """A mask of an oval with soft edges."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse((4, 4, size[0] - 4, size[1] - 4), fill=255)
    return mask.filter(ImageFilter.GaussianBlur(2))


KINDS: dict[str, Callable[[Path, np.random.Generator], list[Image.Image]]] = {
    "photographs and bursts": photographs,
    "frames of pans": pans,
    "flowers": flowers,
    "MRI slices": mri_slices,
    "solar cells": solar_cells,
    "hand signs": hand_signs,
    "pages of text": text_pages,
    "screenshots": screenshots,
    "spectrograms": spectrograms,
    "time lapse": time_lapse,
    "logos in alpha": logos,
}


# --- copies ---------------------------------------------------------------------------------------

# An edited image, and how it is saved; see `Image.save`.
Edited = tuple[Image.Image, dict[str, object]]


def recompressed(image: Image.Image, rng: np.random.Generator) -> Edited:
    """Compress it at a quality of 20 to 95."""
    return image, {"quality": int(rng.integers(20, 96))}


def resized(image: Image.Image, rng: np.random.Generator) -> Edited:
    """Resize it to 0.35 to 2 times its width and height, with one of four kernels."""
    factor = np.exp(rng.uniform(np.log(0.35), np.log(2)))
    kernel = Image.Resampling(int(rng.choice([1, 2, 3, 4])))  # Lanczos, bilinear, bicubic, box
    size = [max(1, round(side * factor)) for side in image.size]
    return image.resize(size, kernel), {}


def rotated_by_exif(image: Image.Image, rng: np.random.Generator) -> Edited:
    """Turn or mirror its pixels, with the EXIF orientation that undoes this."""
    orientation = int(rng.integers(2, 9))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # a Transpose that inverts it
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image.transpose(Image.Transpose(undo)), {"exif": exif.tobytes()}


def watermarked(image: Image.Image, rng: np.random.Generator) -> Edited:
    """Write words across its lower right corner, half transparent."""
    over = Image.new("RGBA", image.size, (0, 0, 0, 0))
    width, height = image.size
    font = ImageFont.load_default(max(9, height // 14))
    text = f"photo by {random_text(rng, 1)}"
    ImageDraw.Draw(over).text((width * 0.45, height * 0.88), text, (255, 60, 60, 140), font)
    marked = Image.alpha_composite(image.convert("RGBA"), over)
    return marked if image.mode == "RGBA" else marked.convert("RGB"), {}


def cropped(image: Image.Image, rng: np.random.Generator) -> Edited:
    """Keep 65 to 95 % of its width and of its height."""
    width, height = np.rint(np.multiply(image.size, rng.uniform(0.65, 0.95, 2))).astype(int)
    x, y = (int(rng.integers(0, image.size[i] - side)) for i, side in enumerate((width, height)))
    return image.crop((x, y, x + int(width), y + int(height))), {}


def mirrored(image: Image.Image, rng: np.random.Generator) -> Edited:
    """Exchange left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), {}


EDITS = {
    "recompressed": recompressed,
    "resized": resized,
    "rotated by EXIF": rotated_by_exif,
    "watermarked": watermarked,
    "cropped": cropped,
    "mirrored": mirrored,
}


def contains(scene: Image.Image, part: Image.Image) -> bool:
    """Find out whether the pixels of a part occur in a scene, at any place."""
    a, b = np.asarray(scene), np.asarray(part)
    height, width = b.shape[:2]
    row = int(b.reshape(height, -1).std(1).argmax())  # it has so much detail that it is unique
    for y in range(len(a) - height + 1):
        x = a[y + row].tobytes().find(b[row].tobytes()) // b[row, 0].nbytes
        if x >= 0 and np.array_equal(a[y : y + height, x : x + width], b):
            return True
    return False


def write_images(kind: str, data: Path, folder: Path, seed: int) -> dict[str, set[int]]:
    """Write the scenes of a kind and their copies to a folder: JPEG, with alpha PNG and WebP.

    A file is named `SCENE.EXTENSION` or `SCENE EDIT.EXTENSION`; SCENE is a number of three digits.

    Args:
        kind: A key of KINDS.
        data: The folder of the archives.
        folder: The folder to write to.
        seed: The seed.

    Returns:
        The scenes that show what a file shows: its own one; for a crop also others that have the
        same pixels, such as the next frames of a pan.
    """
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    folder.mkdir(parents=True)
    scenes = KINDS[kind](data, rng)
    copied = {edit: set(rng.permutation(len(scenes))[:NUM_COPIED].tolist()) for edit in EDITS}
    shown = dict[str, set[int]]()
    for i, scene in enumerate(scenes):
        has_alpha = scene.mode == "RGBA"
        name = f"{i:03}.{'png' if has_alpha else 'jpg'}"
        scene.save(folder / name, quality=95, subsampling=0)
        shown[name] = {i}
        for edit in [edit for edit in EDITS if i in copied[edit]]:
            image, options = EDITS[edit](scene, rng)
            name = f"{i:03} {edit}.{'webp' if has_alpha else 'jpg'}"
            image.save(folder / name, **{"quality": 90} | options)
            shown[name] = {i}
            if edit == "cropped":
                shown[name] |= {j for j, other in enumerate(scenes) if contains(other, image)}
    return shown
