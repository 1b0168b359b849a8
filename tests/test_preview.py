"""The sheet shows the views of training, pixel by pixel, and describes the recipe behind them."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from simsiam.config.methods import Views
from simsiam.data import views
from simsiam.errors import UsageError, WorkFailed
from simsiam.pages.preview import build_sheet, draw_sheet, preview
from simsiam.runs.compose import compose_recipe

# (height, width); since they differ, the images are streamed.
SIZES = [(70, 40), (48, 64), (50, 50), (33, 90), (64, 48)]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    return tmp_path


def sheet(source, recipe=None, rows=8, views=6, **settings):
    return build_sheet(*compose_recipe(str(source), recipe, settings), rows=rows, views=views)


def reference(image: np.ndarray, recipe, place: int, step: int, view: int) -> np.ndarray:
    """View `view` of the image at position `place` of the batch of `step`."""
    kinds, size = recipe.method.views, np.array([image.shape[:2]])
    address = {"seed": recipe.seed, "step": step, "view": view, "positions": np.array([place])}
    d = views.sample_view_params(kinds[min(view, len(kinds) - 1)], size, **address)
    crop = views.resized_crop_one(
        image, d.top[0], d.left[0], d.height[0], d.width[0], d.flip[0], recipe.view_size
    )
    return (
        (views.augment_color(crop[None] / 255, d)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    )


def contains(page: np.ndarray, picture: np.ndarray) -> bool:
    height, width = picture.shape[:2]
    corners = np.argwhere((page == picture[0, 0]).all(axis=2))
    return any(np.array_equal(page[y : y + height, x : x + width], picture) for y, x in corners)


def test_the_pictures_are_the_views_of_training(folder):
    recipe, _, _ = compose_recipe(str(folder), None, {"seed": 3, "image_size": 32})
    recipe = replace(
        recipe, method=replace(recipe.method, views=(Views(), Views(solarize=1.0, blur=0.0)))
    )
    result = sheet(folder, recipe, views=5)
    page = np.asarray(draw_sheet(result))
    assert [row.key for row in result.rows] == [f"{i}.png" for i in range(5)]
    for place, row in enumerate(result.rows):
        image = np.asarray(Image.open(folder / row.key))
        assert np.array_equal(row.original, image) and len(row.views) == 5
        assert contains(page, image if max(image.shape) > 48 else image.repeat(2, 0).repeat(2, 1))
        for column, picture in enumerate(row.views):
            assert np.array_equal(picture, reference(image, recipe, place, column // 2, column % 2))
            assert contains(page, picture.repeat(4, 0).repeat(4, 1))  # 24 pixels are drawn as 96


def test_images_in_memory_are_cropped_as_in_training():
    recipe, source, reasons = compose_recipe("shapes", None, {})
    row = build_sheet(recipe, source, reasons, rows=1, views=2).rows[0]
    settings = {
        "view_count": 2,
        "size": 32,
        "mean": (0,) * 3,
        "std": (1,) * 3,
        "seed": 0,
        "step": 0,
        "positions": np.array([0]),
    }
    pair = views.make_views(
        views.torch.from_numpy(source.train.pixels[:1]), recipe.method.views, **settings
    )
    for x, picture in zip(pair, row.views, strict=True):
        assert np.array_equal(picture, (x[0] * 255).round().byte().permute(1, 2, 0).numpy())


def test_the_text_describes_the_recipe(folder):
    recipe, source, reasons = compose_recipe(
        str(folder), None, {"jitter": (0.1, 0.2, 0.3, 0.05), "std": (0.2, 0.3, 0.4)}
    )
    result = build_sheet(recipe, source, reasons, rows=2, views=2)
    text = dict(result.sections)
    assert [row.key for row in result.rows] == [
        "0.png",
        "2.png",
    ]  # evenly spaced, not the first two
    assert text["recipe"] == reasons and text["both views"] == views.describe_augmentation(
        recipe.method.views[0]
    )
    size = recipe.view_size
    assert size < recipe.image_size
    assert text["network"][0] == f"resnet18, width 64, small stem, views of {size} x {size} pixels"
    assert text["network"][2] == "std 0.200 0.300 0.400"
    assert text["images"] == ["5 training images; 2 shown, spread over the set"]
    kinds = (Views(crop_min=0.3), Views(blur=0.0))
    recipe = replace(recipe, method=replace(recipe.method, views=kinds))
    text = dict(sheet(folder, recipe).sections)
    assert [text["view 1"], text["view 2"]] == list(
        map(views.describe_augmentation, kinds)
    ) and "both views" not in text


def test_the_text_and_the_classes_of_shapes():
    result = sheet("shapes", rows=10, views=1)
    assert {int(row.key.removeprefix("train#")) % 10 for row in result.rows} == set(
        range(10)
    )  # the labels take turns
    assert dict(result.sections)["images"] == [
        "4,000 training images in 10 classes; 10 shown, spread over the set"
    ]


@pytest.mark.parametrize(
    ("channels", "note"),
    [(1, "shown as gray"), (2, "the first is shown as gray"), (5, "the first three")],
)
def test_other_channels_than_three_show_the_first(tmp_path, channels, note):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 50, channels), dtype=np.uint8)
    for i, image in enumerate(pixels):
        np.save(tmp_path / f"{i}.npy", image)
    result = sheet(tmp_path, channels=channels)
    text = dict(result.sections)
    assert note in text["pictures"][-1]
    assert not [
        line for line in text["both views"] if "gray" in line or "hue" in line
    ]  # only operations that are applied
    for row, image in zip(result.rows, pixels, strict=True):
        assert np.array_equal(row.original, image[..., [0, 1, 2] if channels > 2 else [0, 0, 0]])
    draw_sheet(result)


def test_unreadable_images_are_replaced_and_named(folder):
    (folder / "4.png").write_bytes(b"")
    assert (
        len(sheet(folder, rows=2, views=1).sections[0][1]) == 1
    )  # only as many as needed are tried
    Image.new("RGB", (40, 40)).save(folder / "4.png")
    (folder / "0.png").write_bytes(b"no image")
    (folder / "2\n.png").write_bytes(b"")
    result = sheet(folder, rows=3, views=1)
    assert len(result.rows) == 3 and {row.key for row in result.rows} <= {
        "1.png",
        "2.png",
        "3.png",
        "4.png",
    }
    assert "unreadable images were skipped; the first, 0.png: " in result.sections[0][1][1]
    everything = sheet(folder, rows=8, views=1)
    assert [row.key for row in everything.rows] == ["1.png", "2.png", "3.png", "4.png"]
    assert everything.sections[0][1][1].startswith("2 unreadable images")
    recipe, source, reasons = compose_recipe(str(folder), None, {})
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(WorkFailed, match=r"none of the 6 images can be read; the first, 0.png: "):
        build_sheet(recipe, source, reasons, rows=2, views=2)


def test_a_picture_is_replaced_and_has_the_same_bytes_each_time(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("sheets") / "sheet.PNG"
    out.write_text("an older picture")
    assert preview(str(folder), out=out, rows=2, views=3) == out
    first = out.read_bytes()
    preview(str(folder), out=out, rows=2, views=3)
    assert out.read_bytes() == first and list(out.parent.iterdir()) == [out]
    assert preview(str(folder), out=out, rows=2, views=3, seed=1).read_bytes() != first


def test_large_views_long_names_and_other_scripts_fit_on_the_page(folder):
    (folder / "4.png").rename(folder / ("x" * 200 + "ü中\n.png"))
    result = sheet(folder, image_size=600, views=1, rows=5)
    page = np.asarray(draw_sheet(result))
    assert "reduced to 320 pixels" in dict(result.sections)["pictures"][0]
    assert (page[:30] == 255).all() and (page[:, :30] == 255).all() and (page[:, -30:] == 255).all()
    assert (page[-30:] == 255).all()
    assert contains(
        page,
        np.asarray(
            Image.fromarray(result.rows[0].views[0]).resize((320, 320), Image.Resampling.LANCZOS)
        ),
    )
    assert draw_sheet(replace(result, title="ü中")) == draw_sheet(
        replace(result, title="\\xfc\\u4e2d")
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"out": "sheet.jpg"}, "sheet.jpg: give the name of a file ending in .png"),
        ({"out": "nowhere/sheet.png"}, "there is no folder nowhere"),
        ({"out": "sheet.png", "rows": 0}, "rows is 0; it lies between 1 and 100"),
        ({"out": "sheet.png", "views": 21}, "views is 21; it lies between 1 and 20"),
        ({"out": "sheet.png", "crop_mni": 0.5}, "did you mean 'crop_min'"),
    ],
)
def test_a_wrong_request_is_one_line(request_, message):
    with pytest.raises(UsageError, match=message) as error:
        preview("shapes", **request_)
    assert "\n" not in str(error.value)
