"""One preprocessing: a path, a file's bytes, a Pillow image and an array give the same input."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

import simsiam
from simsiam.config.recipes import Recipe
from simsiam.data.decode import decode_image
from simsiam.data.transform import Transform, iter_crops
from simsiam.embeddings.neighbors import neighbors
from simsiam.errors import UsageError
from simsiam.exports.export import export
from simsiam.runs.encoder import build_backbone, load
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source

STATISTICS = {1: ((0.4,), (0.3,)), 3: ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), 4: ((0.5,) * 4,) * 2}


def transform(channels=3, size=32, **settings):
    return Transform(size, *STATISTICS[channels], **settings)


def picture(width=70, height=50, channels=3):
    """Waves: what JPEG keeps, and what is another picture when it is turned."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (7 + 3 * c) + y / (23 - 4 * c)) for c in range(channels)]
    return np.stack(waves, 2).astype(np.uint8)


def turned(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def files(folder):
    """Write a file of each kind that a preprocessing of its own got wrong."""
    rgb, gray = Image.fromarray(picture()), Image.fromarray(picture(channels=1)[..., 0])
    for orientation in range(1, 9):
        rgb.save(folder / f"turned{orientation}.jpg", exif=turned(orientation), quality=95)
    for suffix in ("png", "webp", "tiff"):
        rgb.save(folder / f"turned.{suffix}", exif=turned(6))
    gray.save(folder / "gray.png")
    deep = (picture(channels=1)[..., 0].astype(np.uint16) << 8) + 77
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tiff")
    clear = Image.fromarray(picture(channels=4))
    clear.save(folder / "clear.png")
    clear.convert("LA").save(folder / "clear gray.png")
    rgb.quantize(7).save(folder / "palette.png", transparency=3)
    rgb.convert("CMYK").save(folder / "print.jpg")
    rgb.convert("1").save(folder / "bits.png")
    rgb.save(folder / "moves.gif", save_all=True, append_images=[ImageOps.invert(rgb)])
    large = rgb.resize((1300, 900))
    large.save(folder / "large.jpg", exif=turned(6))
    large.save(folder / "large progressive.jpg", progressive=True)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    files(folder)
    return folder


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_form_of_an_image_is_prepared_as_the_file_is_for_embed(channels, folder):
    prepare, images = transform(channels), open_source([str(folder)], channels).train
    skipped = []
    crops = [crops for _, crops in iter_crops(images, prepare, skipped)]
    wrong_channels = [name for name, _ in skipped]
    assert set(wrong_channels) <= {"turned.tiff", "deep.tiff"} and (channels == 4 or not skipped)
    expected = prepare.normalize(torch.cat(crops))
    names = [key for key in images.keys if key not in wrong_channels]
    assert len(names) == len(expected) >= 19
    for name, x in zip(names, expected, strict=True):
        path = folder / name
        for form in (path, str(path), path.read_bytes(), Image.open(path)):
            assert torch.equal(prepare(form)[0], x), (name, type(form))
        loaded = Image.open(path)
        loaded.load()
        assert torch.equal(prepare(loaded)[0], x) or name.startswith("large")
    together = prepare([str(folder / names[0]), Image.open(folder / names[1])])
    assert torch.equal(together, expected[:2])


def test_a_large_jpeg_that_is_decoded_already_differs_by_rounding_only(folder):
    """A file is decoded at a reduced size, as `embed` does; a decoded image has its full size."""
    for name in ("large.jpg", "large progressive.jpg"):
        image = Image.open(folder / name)
        image.load()
        scale = torch.tensor(STATISTICS[3][1]).view(-1, 1, 1) * 255
        difference = ((transform()(image) - transform()(folder / name)) * scale).abs()
        assert 0 < difference.max() < 4 and difference.mean() < 1, "in gray levels"


def test_arrays_are_prepared_as_their_npy_files_are(tmp_path):
    rgb, gray = picture(), picture(channels=1)
    arrays = {
        "rgb": (3, rgb),
        "channels first": (3, rgb.transpose(2, 0, 1)),
        "16 bits": (3, (rgb.astype(">u2") << 8) + 200),
        "floats": (3, rgb / 255),
        "gray": (1, gray),
        "gray without axis": (1, gray[..., 0]),
        "bits": (1, gray > 100),
        "four channels": (4, picture(channels=4)),
    }
    for name, (channels, array) in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        expected = transform(channels)(tmp_path / f"{name}.npy")
        assert torch.equal(transform(channels)(array), expected), name
        if array.dtype != ">u2":  # which torch has not
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            assert torch.equal(transform(channels)(tensor), expected), name
        assert torch.equal(transform(channels)([array, array]), expected.repeat(2, 1, 1, 1))
    rgb_file = tmp_path / "rgb.npy"
    assert torch.equal(transform()(decode_image(rgb_file)), transform()(rgb_file))


def test_an_image_of_the_caller_is_left_as_it_is(folder):
    for name in ("turned6.jpg", "turned.png", "turned.tiff", "moves.gif", "deep.png"):
        image, same = Image.open(folder / name), Image.open(folder / name)
        transform()(image)
        assert (image.size, image.mode) == (same.size, same.mode) or name == "turned.tiff"
        assert np.array_equal(np.asarray(image), np.asarray(same))
        assert image.getexif() == same.getexif()
    second = Image.open(folder / "moves.gif")
    second.seek(1)
    difference = (transform()(second) - transform()(folder / "moves.gif")).abs()
    assert difference.mean() > 0.5 and second.tell() == 1, "the frame that the caller chose"


def test_what_is_no_image_gets_one_line(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    closed = Image.open(io.BytesIO((tmp_path / "cut.jpg").read_bytes() and jpeg()))
    closed.close()
    cases = {
        "no such": (tmp_path / "no such.jpg", "no such.jpg cannot be read: No such file"),
        "cut": (tmp_path / "cut.jpg", "cut.jpg cannot be read: damaged or unsupported JPEG"),
        "cut bytes": (jpeg()[:300], "the image cannot be read: damaged or unsupported JPEG"),
        "in a list": ([picture(), tmp_path / "cut.jpg"], "cut.jpg cannot be read"),
        "closed": (closed, "the image cannot be read: "),
        "channels": (
            picture(channels=1),
            r"an array of shape \(50, 70, 1\), not an image of 3 channels$",
        ),
        "floats": (picture() * 2.0, "they should be uint8, uint16, or floats from 0 to 1"),
        "objects": ([{"an": "image"}], "an image is a path, the bytes of a file, a Pillow image"),
        "stream": ([io.BytesIO(jpeg())], "an array or a tensor, not BytesIO"),
    }
    for image, message in cases.values():
        with pytest.raises(UsageError, match=message) as error:
            transform()(image)
        assert "\n" not in str(error.value)
    six = Transform(32, (0.5,) * 6, (0.5,) * 6)
    with pytest.raises(
        UsageError, match=r"the image cannot be read: an image in RGB, not 6 channels$"
    ):
        six(Image.fromarray(picture()))
    assert six(picture(channels=6)).shape == (1, 6, 32, 32)


def jpeg():
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "JPEG")
    return file.getvalue()


def make_run(folder, channels=3, **settings):
    """A run folder as if a small network had been trained."""
    mean, std = STATISTICS[channels]
    network = {"backbone": "resnet10", "width": 4, "image_size": 32, "channels": channels}
    recipe = Recipe().replace(**network | {"mean": mean, "std": std} | settings)
    run = Run.create(folder, recipe)
    torch.manual_seed(0)
    run.finish(build_backbone(recipe).state_dict(), {"verdict": "healthy", "steps": 7})
    return run.path


@pytest.mark.parametrize("channels", [1, 3])
def test_a_loaded_encoder_gives_the_features_of_embed(channels, folder, tmp_path):
    import pyarrow.parquet as pq

    run, out = make_run(tmp_path / "run", channels), tmp_path / "e.parquet"
    simsiam.embed(run, folder, out=out, device="cpu", precision="float32")
    table, encoder = pq.read_table(out), load(run)
    assert len(table) == len(list(folder.iterdir()))
    for name, vector in zip(table["path"].to_pylist(), table["vector"].to_pylist(), strict=True):
        for form in (folder / name, Image.open(folder / name)):
            h = encoder(encoder.transform(form))  # needs no detach
            assert np.allclose(h.numpy()[0], vector, atol=1e-5), name


def test_a_query_that_is_a_copy_of_an_image_has_its_feature(tmp_path):
    run, photos = make_run(tmp_path / "run"), tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.fromarray(np.roll(picture(1300, 900), 60 * i, axis=1)).save(photos / f"{i}.jpg")
    simsiam.embed(run, photos, out="e.parquet", device="cpu", precision="float32")
    copy = tmp_path / "a copy.jpg"
    copy.write_bytes((photos / "1.jpg").read_bytes())
    nearest = neighbors("e.parquet", str(copy), k=1)[0]
    assert nearest.path == "1.jpg" and nearest.cosine > 1 - 1e-6


def test_a_loaded_encoder_has_no_gradients_until_asked(tmp_path):
    encoder = load(make_run(tmp_path / "run"))
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(torch.randn(1, 3, 32, 32)).requires_grad
    assert encoder.requires_grad_(True)(torch.randn(1, 3, 32, 32)).requires_grad


def test_fine_tuning_and_detection_train_all_of_a_loaded_backbone(tmp_path):
    from simsiam.detection.initialization import Initialization
    from simsiam.evaluation.finetune import build_classifier

    run = Run(make_run(tmp_path / "run"))
    for network in (
        build_classifier(run, 3, seed=0, from_scratch=False),
        Initialization(run, None, False).build_backbone(),
    ):
        assert all(p.requires_grad for p in network.parameters())


def prepared_by_hand(path, config):
    """Follow preprocessing.json with Pillow and torchvision."""
    assert config["exif_orientation"] == "applied"
    assert config["alpha"] == ("kept" if config["color"] == "RGBA" else "dropped")
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):
        assert config["bits_16"] == "upper 8"
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert(config["color"])
    pixels = TF.pil_to_tensor(image)
    mode = TF.InterpolationMode(config["interpolation"])
    pixels = TF.resize(pixels, config["resize_shorter_side"], mode, antialias=config["antialias"])
    pixels = TF.center_crop(pixels, config["center_crop"])
    return TF.normalize(pixels / 255, config["mean"], config["std"])


@pytest.mark.parametrize(
    ("channels", "settings"),
    [(1, {}), (3, {"eval_resize": 40, "eval_interpolation": "bicubic"}), (4, {})],
)
def test_preprocessing_json_says_all_that_another_program_needs(channels, settings, tmp_path):
    run = make_run(tmp_path / "run", channels, **settings)
    folder = export(run, format="safetensors", out=tmp_path / "out").path
    config = json.loads((folder / "preprocessing.json").read_text())
    encoder = load(run)
    (tmp_path / "kinds").mkdir()
    for path in files(tmp_path / "kinds"):
        if path.name.startswith("large") or (channels == 4 and path.suffix == ".tiff"):
            continue  # decoded at a reduced size; read as arrays
        x = prepared_by_hand(path, config)
        assert torch.allclose(encoder.transform(path)[0], x, atol=1e-5), path.name


def test_preprocessing_json_of_many_channels_names_no_colors(tmp_path):
    words = {"mean": (0.5,) * 6, "std": (0.5,) * 6, "channels": 6}
    recipe = Recipe().replace(backbone="resnet10", width=4, image_size=32, **words)
    run = Run.create(tmp_path / "run", recipe)
    run.finish(build_backbone(recipe).state_dict(), {"verdict": "healthy", "steps": 7})
    folder = export(run.path, format="safetensors", out=tmp_path / "out").path
    config = json.loads((folder / "preprocessing.json").read_text())
    assert config["color"] is None and config["channels"] == 6
