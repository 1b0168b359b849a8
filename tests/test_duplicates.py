"""Duplicates: what is to spare is a copy of the image that is kept, and copies are found."""

import csv
import io
import json
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUICK
from PIL import Image, ImageDraw, ImageFont

import simsiam
from simsiam.commands.main import main
from simsiam.embeddings.copies import originals as module
from simsiam.embeddings.copies.distance import make_detail, tile_distance
from simsiam.embeddings.duplicates import duplicates
from simsiam.embeddings.embed import embed
from simsiam.embeddings.table import read_embeddings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simsiam.pretrain("shapes", out=tmp_path_factory.mktemp("runs") / "run", **QUICK)


@pytest.fixture
def groups_of(run, tmp_path):
    """Embeds a source and returns the paths of each group, the image to keep first."""

    def find(source=tmp_path / "images", **options) -> list[list[str]]:
        file = tmp_path / "images.parquet"
        if not file.exists():
            embed(run, source, out=file, device="cpu")
        return [[copy.path for copy in group] for group in duplicates(file, **options)]

    (tmp_path / "images").mkdir()
    return find


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def photographs(count: int, seed: int = 0, size=(160, 120)) -> list[Image.Image]:
    """Pictures of colored clouds, which differ as much as photographs do."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 6, 8, 3), np.uint8)
    return [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x in small]


def textured(seed: int, size=(240, 180)) -> Image.Image:
    """A picture with detail of every size, as photographs have."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (side * 3, side * 4, 3), np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        for side in (2, 5, 12, 30)
    ]
    weights = np.array([0.4, 0.25, 0.2, 0.15])
    return Image.fromarray(np.einsum("n,nhwc->hwc", weights, np.stack(layers)).astype(np.uint8))


def distance(a: Image.Image, b: Image.Image) -> float:
    """The distance of two pictures."""
    return tile_distance(*(make_detail(np.asarray(x.convert("RGB"))).pixels for x in (a, b)))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return Image.open(file)


def test_only_copies_are_found(groups_of, tmp_path):
    """Resized and recompressed copies, pictures of one color, and 60 pictures without a copy."""
    source = tmp_path / "images"
    pictures = photographs(70)
    for i, picture in enumerate(pictures):
        picture.save(source / f"{i:02}.png")
    for i, (size, quality) in enumerate(
        [((80, 60), 90), ((320, 240), 20), ((160, 120), 10), ((53, 40), 50)]
    ):
        pictures[i].resize(size, Image.Resampling.LANCZOS).save(
            source / f"{i:02} copy.jpg", quality=quality
        )
    pictures[0].save(source / "00 third.jpg", quality=40)
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), (200, 30, 30)).save(source / f"plain {name}.png")
    Image.new("RGB", (64, 64), (30, 30, 200)).save(source / "plain blue.png")
    options = {"out": tmp_path / "copies.csv", "html": tmp_path / "copies.html"}
    groups = groups_of(**options)
    file = tmp_path / "images.parquet"
    sizes = {Image.open(io.BytesIO(x)).size for x in read_embeddings(file).thumbnails}
    assert sizes == {(96, 96), (64, 64), (60, 60), (40, 40)}  # the network is given 32 pixels
    # The image with the most pixels is kept; the nearest copy stands first.
    assert groups == [
        ["00.png", "00 copy.jpg", "00 third.jpg"],
        ["01 copy.jpg", "01.png"],
        ["02.png", "02 copy.jpg"],
        ["03.png", "03 copy.jpg"],
        ["plain a.png", "plain b.png"],
    ]
    lines = rows_of(options["out"])
    assert [(line["group"], line["path"]) for line in lines] == [
        (str(n), path) for n, group in enumerate(groups, 1) for path in group
    ]
    assert [line["note"] for line in lines] == [""] * 9 + ["one color"] * 2
    assert [float(line["distance"]) for line in lines][::9] == [0, 0]
    assert options["html"].read_text().count("<img ") == 11
    assert groups_of(threshold=0.0) == [["plain a.png", "plain b.png"]]


def pan() -> list[Image.Image]:
    wide = textured(0, (600, 180))
    return [wide.crop((x, 0, x + 240, 180)) for x in range(0, 80, 2)]


def fade() -> list[Image.Image]:
    return [Image.blend(textured(0), textured(1), i / 40) for i in range(41)]


def nightfall() -> list[Image.Image]:
    day = np.asarray(textured(0)).astype(float)
    return [Image.fromarray((day * (1 - i / 50)).astype(np.uint8)) for i in range(40)]


def zoom() -> list[Image.Image]:
    picture = textured(0)
    return [
        picture.resize(picture.size, Image.Resampling.BICUBIC, (i, i, 240 - i, 180 - i))
        for i in range(30)
    ]


@pytest.mark.parametrize("frames", [pan, fade, nightfall, zoom])
@pytest.mark.parametrize("threshold", [0.18, 0.35])
def test_no_image_is_farther_from_the_kept_one_than_the_threshold(
    groups_of, tmp_path, frames, threshold
):
    """Neighboring frames are alike, the first and the last are not; links would join them all."""
    pictures = frames()
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "images" / f"{i:03}.png")
    assert distance(pictures[0], pictures[1]) < 0.35 < distance(pictures[0], pictures[-1])
    groups = groups_of(threshold=threshold)
    for group in groups:
        kept = pictures[int(group[0][:3])]
        assert max(distance(kept, pictures[int(name[:3])]) for name in group) <= threshold
    kept = {group[0] for group in groups}
    spared = {name for group in groups for name in group} - kept
    assert not kept & spared and len(spared) < len(pictures) - 1
    assert threshold < 0.35 or groups  # there was something to group


def page(lines: list[str]) -> Image.Image:
    image = Image.new("L", (424, 600), 255)
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((30, 30 + 14 * i), line, fill=0)
    return image


def random_lines(rng, count: int = 38) -> list[str]:
    letters = list("abcdefghijklmnopqrstuvwxyz    ")
    return ["".join(rng.choice(letters, 55)) for _ in range(count)]


def pages(rng) -> list[Image.Image]:
    return [page(random_lines(rng)) for _ in range(25)]


def drafts(rng) -> list[Image.Image]:
    """A page of which one line is written anew, again and again."""
    lines, found = random_lines(rng), []
    for i in range(25):
        lines[i] = random_lines(rng, 1)[0]
        found.append(page(lines))
    return found


def forms(rng) -> list[Image.Image]:
    found = []
    for number in rng.permutation(10_000)[:25]:
        image = page(["Invoice"] + ["_" * 50] * 30)
        draw = ImageDraw.Draw(image)
        draw.text((250, 480), f"{number} EUR", fill=0, font=ImageFont.load_default(16))
        found.append(image)
    return found


def fixed_camera(rng) -> list[Image.Image]:
    """Something small stands at another place each time."""
    found = []
    for i in range(25):
        image = textured(0)
        x, y = 8 + 45 * (i % 5), 8 + 33 * (i // 5)
        ImageDraw.Draw(image).rectangle((x, y, x + 9, y + 14), fill=(200, 40, 40))
        found.append(image)
    return found


def subtitles(rng) -> list[Image.Image]:
    found = []
    for line in random_lines(rng, 25):
        image = textured(0)
        ImageDraw.Draw(image).text((40, 160), line[:25], fill=(255, 255, 255))
        found.append(image)
    return found


@pytest.mark.parametrize("scenes", [pages, drafts, forms, fixed_camera, subtitles])
def test_small_differences_are_seen_and_copies_still_found(groups_of, tmp_path, scenes):
    pictures = scenes(np.random.default_rng(0))
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "images" / f"{i:03}.png")
    pictures[3].convert("RGB").save(tmp_path / "images" / "003 copy.jpg", quality=60)
    smaller = pictures[7].convert("RGB").resize([x * 3 // 4 for x in pictures[7].size])
    smaller.save(tmp_path / "images" / "007 copy.jpg", quality=90)
    assert groups_of() == [["003.png", "003 copy.jpg"], ["007.png", "007 copy.jpg"]]


def shapes_in_alpha(mode: str, ink: int) -> list[Image.Image]:
    """Different shapes, all of one color, on a transparent ground of the same color."""
    found = []
    for i in range(30):  # more than the candidates of an image
        alpha = Image.new("L", (48, 48), 0)
        draw = ImageDraw.Draw(alpha)
        x, y, side = 2 + 6 * (i % 5), 2 + 6 * (i // 5 % 3), 14 + 8 * (i // 15)
        (draw.ellipse, draw.rectangle)[i % 2]((x, y, x + side, y + side), fill=255)
        image = Image.new("RGBA", (48, 48), (ink, ink, ink, 0))
        image.putalpha(alpha)
        if mode == "P":  # one index is transparent, and all colors are equal
            shape = np.asarray(alpha) // 255
            image = Image.fromarray(shape.astype(np.uint8), "L").convert("P")
            image.putpalette([ink] * 6)
            image.info["transparency"] = 0
        found.append(image if mode == "P" else image.convert(mode))
    return found


@pytest.mark.parametrize("mode, ink", [("RGBA", 0), ("RGBA", 255), ("LA", 128), ("P", 0)])
def test_what_is_in_the_alpha_channel_alone_is_seen(groups_of, tmp_path, mode, ink):
    pictures = shapes_in_alpha(mode, ink)
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "images" / f"{i:02}.png")
    pictures[29].convert("RGBA").save(tmp_path / "images" / "29 copy.webp", quality=60)
    assert [sorted(group) for group in groups_of()] == [["29 copy.webp", "29.png"]]


def test_a_picture_in_another_color_is_no_copy(groups_of, tmp_path):
    """The brightness is equal; only red and blue are exchanged, in a part or everywhere."""
    pixels = np.asarray(textured(0)).astype(float)
    pixels[..., 2] = pixels[..., 0] * 0.3
    for name, width in (("none", 0), ("part", 24), ("all", 240)):
        other = pixels.copy()
        gray = pixels[:, :width] @ [0.299, 0.587, 0.114]
        other[:, :width] = other[:, :width, ::-1]
        other[:, :width, 1] += (gray - other[:, :width] @ [0.299, 0.587, 0.114]) / 0.587
        image = Image.fromarray(other.clip(0, 255).astype(np.uint8))
        image.save(tmp_path / "images" / f"{name}.png")
        image.save(tmp_path / "images" / f"{name} copy.jpg", quality=75)
    assert [[name.split(".")[0] for name in group] for group in groups_of()] == [
        ["all", "all copy"],
        ["none", "none copy"],
        ["part", "part copy"],
    ]


def test_an_opaque_alpha_channel_changes_nothing(groups_of, tmp_path):
    for i in range(4):
        textured(i).convert("RGBA").save(tmp_path / "images" / f"{i}.png")
        textured(i).save(tmp_path / "images" / f"{i} copy.jpg", quality=50)
    assert len(groups_of()) == 4


def test_images_of_one_color_are_apart(groups_of, tmp_path):
    """Each color is a group of its own; a page with one word, or with a dot, is no empty page."""
    source, rng = tmp_path / "images", np.random.default_rng(0)
    for i in range(25):  # more than the candidates of an image
        Image.new("RGB", (60 + i, 48), (255, 255, 255)).save(source / f"white {i:02}.png")
        noise = rng.normal(4, 1.5, (48, 64, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(source / f"black {i:02}.png")
    for i, gray in enumerate((245, 235, 128)):
        Image.new("L", (60, 48), gray).save(source / f"gray {i}.png")
    for name in ("word", "other"):
        image = Image.new("RGB", (300, 300), (255, 255, 255))
        ImageDraw.Draw(image).text((40, 40), name, fill=(0, 0, 0))
        image.save(source / f"page {name}.png")
    for i in range(2):
        image = Image.new("RGB", (96, 96), (255, 255, 255))
        ImageDraw.Draw(image).rectangle((20 + 40 * i, 30, 23 + 40 * i, 33), fill=(90, 90, 90))
        image.save(source / f"dot {i}.png")
    textured(0).save(source / "photograph.png")
    textured(0).save(source / "photograph copy.jpg")
    groups = groups_of()
    assert groups[0] == ["photograph.png", "photograph copy.jpg"]  # though the others are larger
    names = [{name[:5] for name in group} for group in groups]
    assert names == [{"photo"}, {"black"}, {"white"}] and groups[2][0] == "white 24.png"
    assert [len(group) for group in groups] == [2, 25, 25]


def test_more_copies_than_candidates_are_one_group(groups_of, tmp_path):
    for i in range(45):
        size = (240 - i, 180 - i * 3 // 4)
        textured(0).resize(size).save(tmp_path / "images" / f"{i:02}.jpg", quality=40 + i)
        textured(i + 1).save(tmp_path / "images" / f"other {i:02}.jpg")
    groups = groups_of()
    assert len(groups) == 1 and len(groups[0]) == 45 and groups[0][0] == "00.jpg"


def test_a_copy_goes_to_the_nearest_kept_image(groups_of, tmp_path):
    """A small copy has lost what tells two pictures apart; it is nearer to its own original."""
    for i, picture in enumerate(pan()[:3:2]):
        picture.save(tmp_path / "images" / f"{i}.png")
        picture.resize((72, 54)).save(tmp_path / "images" / f"{i} small.png")
    assert groups_of() == [["0.png", "0 small.png"], ["1.png", "1 small.png"]]


def exif_rotated(image: Image.Image, path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, quality=90, exif=exif.tobytes())


def sixteen_bits(image: Image.Image, path) -> None:
    gray = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(path.with_suffix(".png"))


def in_cmyk(image: Image.Image, path) -> None:
    image.convert("CMYK").save(path, quality=90)


def as_array(image: Image.Image, path) -> None:
    np.save(path.with_suffix(".npy"), np.asarray(image))


@pytest.mark.parametrize("save", [exif_rotated, sixteen_bits, in_cmyk, as_array])
def test_copies_in_other_files(groups_of, tmp_path, save):
    for i in range(5):
        picture = textured(i).convert("L") if save is sixteen_bits else textured(i)
        picture.save(tmp_path / "images" / f"{i}.png")
    save(textured(2), tmp_path / "images" / "2 copy.jpg")
    assert [sorted(group)[-1] for group in groups_of()] == ["2.png"]


@pytest.mark.parametrize("kind", ["tar", "parquet", "list"])
def test_files_are_read_again_from_every_kind_of_source(groups_of, tmp_path, capsys, kind):
    """Pages that differ in one line, which no thumbnail shows, and a copy."""
    files = {f"{i}.png": picture for i, picture in enumerate(drafts(np.random.default_rng(0))[:6])}
    files["5 copy.jpg"] = jpeg(files["5.png"], 80)
    contents = {}
    for name, picture in files.items():
        picture.save(tmp_path / "images" / name)
        contents[name] = (tmp_path / "images" / name).read_bytes()
    source = tmp_path / f"source.{'txt' if kind == 'list' else kind}"
    if kind == "tar":
        with tarfile.open(source, "w") as archive:
            archive.add(tmp_path / "images", "images")
    elif kind == "parquet":
        column = [{"bytes": content, "path": name} for name, content in contents.items()]
        pq.write_table(pa.table({"image": column}), source)
    else:
        source.write_text("".join(f"images/{name}\n" for name in files))
    (group,) = groups_of(source)
    assert len(group) == 2 and capsys.readouterr().err == ""


def test_what_cannot_be_read_again_is_said(groups_of, run, tmp_path, capsys):
    for i in range(3):
        textured(i).save(tmp_path / "images" / f"{i}.png")
        jpeg(textured(i), 60).save(tmp_path / "images" / f"{i} copy.jpg")
    assert len(groups_of()) == 3 and not capsys.readouterr().err
    (tmp_path / "images" / "1 copy.jpg").unlink()
    out = tmp_path / "copies.csv"
    assert len(groups_of(out=out)) == 3
    said = capsys.readouterr().err
    assert said.startswith("1 of 6 images cannot be read again (the first, 1 copy.jpg: no")
    assert "thumbnails were compared, which do not show text" in said
    notes = {row["path"]: row["note"] for row in rows_of(out)}
    assert [path for path, note in notes.items() if note == "by thumbnail"] == ["1.png"] or [
        path for path, note in notes.items() if note == "by thumbnail"
    ] == ["1 copy.jpg"]
    (tmp_path / "images" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    groups_of()
    assert capsys.readouterr().err.startswith("2 of 6 images cannot be read again")
    (tmp_path / "images").rename(tmp_path / "moved")
    assert len(groups_of(out=out)) == 3  # by thumbnail
    said = capsys.readouterr().err
    assert said.startswith("the images cannot be read again (no such file or folder")
    assert sum(row["note"] == "by thumbnail" for row in rows_of(out)) == 3
    older = pq.read_table(tmp_path / "images.parquet")
    metadata = json.loads(older.schema.metadata[b"simsiam"])
    del metadata["sources"]
    older = older.replace_schema_metadata({"simsiam": json.dumps(metadata)})
    pq.write_table(older, tmp_path / "older.parquet")
    assert len(duplicates(tmp_path / "older.parquet")) == 3
    assert "does not say where they are: embed them again" in capsys.readouterr().err


def test_an_image_in_memory_is_not_decoded_again(groups_of, tmp_path, monkeypatch):
    for i, picture in enumerate(photographs(5)):
        picture.save(tmp_path / "images" / f"{i}.png")
    assert groups_of() == []
    decoded, read_detail = [], module._read_detail

    def recording(images, i):
        decoded.append(i)
        return read_detail(images, i)

    monkeypatch.setattr(module, "CACHE_SIZE", 4)
    monkeypatch.setattr(module, "_read_detail", recording)
    originals = module.Originals(read_embeddings(tmp_path / "images.parquet"), tmp_path / "x")
    for rows in ([0, 1, 2], [0, 1], [1, 2], [2, 3]):
        assert list(originals.read(rows)) == rows
    assert sorted(decoded) == [0, 1, 2, 3]
    originals.read([3, 4])  # there is room for 3 besides
    assert sorted(originals._details) == [3, 4] and sorted(decoded) == [0, 1, 2, 3, 4]


def test_the_image_that_is_kept_is_the_best_copy(groups_of, tmp_path):
    """By pixels, then without loss, then by bytes; never the thumbnail whose name comes first."""
    for i in range(2):
        picture = textured(i, (400, 300))
        picture.save(tmp_path / "images" / f"{i} z original.jpg", quality=95)
        picture.save(tmp_path / "images" / f"{i} b compressed.jpg", quality=40)
        picture.resize((100, 75)).save(tmp_path / "images" / f"{i} a thumbnail.png")
    text = page(random_lines(np.random.default_rng(0)))
    text.save(tmp_path / "images" / "text.png")
    text.save(tmp_path / "images" / "text.jpg")  # has more bytes
    assert [group[0] for group in groups_of()] == [
        "0 z original.jpg",
        "1 z original.jpg",
        "text.png",
    ]


def test_a_raw_photograph_is_kept(groups_of, tmp_path):
    """Only its preview is read, which has fewer pixels than the photograph and than other files."""
    pytest.importorskip("rawpy")
    test_file_kinds = pytest.importorskip("test_file_kinds")  # which needs pillow-heif
    picture = textured(0, (800, 600))
    preview = picture.resize((640, 480))
    (tmp_path / "images" / "raw.dng").write_bytes(test_file_kinds.make_dng(preview))
    picture.save(tmp_path / "images" / "developed.jpg")
    textured(1).save(tmp_path / "images" / "other.jpg")
    assert groups_of() == [["raw.dng", "developed.jpg"]]


def test_crops_and_mirrored_copies_are_found_with_an_option(groups_of, tmp_path):
    pytest.importorskip("cv2")
    source = tmp_path / "images"
    for i in range(10):
        textured(i, (400, 300)).save(source / f"{i}.jpg", quality=90)
    mirrored = Image.Transpose.FLIP_LEFT_RIGHT
    textured(0, (400, 300)).crop((30, 20, 330, 250)).save(source / "0 crop.jpg")
    textured(1, (400, 300)).transpose(mirrored).save(source / "1 mirrored.jpg")
    part = textured(2, (400, 300)).crop((0, 60, 280, 300)).transpose(mirrored)
    part.save(source / "2 both.jpg")
    part = textured(3, (400, 300)).crop((100, 80, 330, 260))
    part.resize((460, 360)).save(source / "3 larger crop.jpg")  # has more pixels than the whole
    for i, frame in enumerate(pan()[::8]):  # share a part, but none lies in another one
        frame.save(source / f"frame {i}.jpg")
    assert groups_of() == []
    out = tmp_path / "copies.csv"
    assert groups_of(crops=True, out=out) == [
        ["0.jpg", "0 crop.jpg"],
        ["1.jpg", "1 mirrored.jpg"],
        ["2.jpg", "2 both.jpg"],
        ["3.jpg", "3 larger crop.jpg"],
    ]
    notes = [row["note"] for row in rows_of(out)]
    assert notes == ["", "crop", "", "mirrored", "", "mirrored, crop", "", "crop"]


def test_without_opencv_one_line_says_what_to_install(groups_of, tmp_path, capsys, monkeypatch):
    textured(0).save(tmp_path / "images" / "0.png")
    textured(1).save(tmp_path / "images" / "1.png")
    groups_of()
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr("simsiam.embeddings.copies.crops.find_spec", lambda name: None)
    assert main(["duplicates", str(tmp_path / "images.parquet"), "--crops"]) == 2
    assert capsys.readouterr().err.strip().endswith('pip install "simsiam[crops]"')


def test_the_distance_is_that_of_the_most_different_tile():
    a = np.asarray(textured(0, (512, 512))).copy()
    b = a.copy()
    assert tile_distance(make_detail(a).pixels, make_detail(b).pixels) == 0
    b[100:116, 200:216] = 255 - b[100:116, 200:216]
    small = tile_distance(make_detail(a).pixels, make_detail(b).pixels)
    b[300:500, 100:400] = 255 - b[300:500, 100:400]
    large = tile_distance(make_detail(a).pixels, make_detail(b).pixels)
    assert 0.18 < small <= large
    gray = make_detail(np.full((64, 64, 1), 7, np.uint8))
    assert gray.is_flat and torch.equal(gray.pixels[0], gray.pixels[2])
