"""What a source asks for, and what a run is given of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from simsiam.config.recipes import Recipe, folder_recipe
from simsiam.data.images import sample
from simsiam.errors import UsageError
from simsiam.runs.compose import compose_recipe
from simsiam.sources.open_source import open_source
from simsiam.training.prepare import check_view_sizes, prepare_data


@pytest.mark.parametrize("limit", [100, 400, 512, 1000])
def test_a_limit_keeps_every_class_in_proportion(limit):
    """The labels of shapes come in turn: an even stride through them would skip whole classes."""
    counts = np.bincount(sample(open_source("shapes").train, limit).labels, minlength=10)
    assert counts.sum() == limit and counts.max() - counts.min() <= 1


def test_a_name_wins_over_a_folder_of_that_name_and_stays_a_name(tmp_path):
    (tmp_path / "shapes").mkdir()
    recipe, _, why = compose_recipe("shapes", None, {})
    assert recipe.source == ("shapes",) and "the recipe for shapes" in why


def test_a_folder_called_like_a_named_source_gets_a_folders_recipe(tmp_path):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(folder / f"{i}.png")
    recipe, _, why = compose_recipe(str(folder), None, {})
    assert recipe.image_size == 64 and "40 images" in why[1] and recipe.mean[1] == 0


def test_mean_and_std_are_measured_and_what_is_given_is_kept():
    measured, source, _ = compose_recipe("shapes", None, {})
    pixels = torch.from_numpy(source.train.pixels[:, 0]).double() / 255
    assert measured.mean[0] == pytest.approx(pixels.mean().item(), abs=2e-3)
    assert measured.std[0] == pytest.approx(pixels.std().item(), abs=2e-3)
    given, _, _ = compose_recipe("shapes", None, {"mean": (0.5, 0.5, 0.5)})
    assert given.mean == (0.5, 0.5, 0.5) and given.std == measured.std


def test_tiny_images_take_larger_crops_and_large_ones_the_papers(tmp_path):
    """No crop is enlarged more than one of a fifth of a CIFAR image: 1 / sqrt(0.2) times."""
    for side, size in ((20, 32), (32, 32), (50, 32), (64, 64), (96, 96), (300, 224)):
        words = folder_recipe(1000, side)
        assert words["image_size"] == size
        assert size / (side * words["crop_min"] ** 0.5) < 0.2**-0.5 + 0.03, side
        assert words["crop_min"] == 0.2 or side < 32


def test_where_only_val_is_labeled_it_is_split_into_voters_and_voted_on():
    """STL-10: unlabeled images to learn from; the test set stays out of it."""
    shapes = open_source("shapes")
    source = replace(shapes, train=replace(shapes.train, labels=None, classes=()))
    recipe = Recipe().replace(batch_size=32, image_size=32)
    data = prepare_data(recipe, source)
    assert len(data.train) == 4000 and (len(data.bank), len(data.held_out)) == (800, 200)
    assert np.bincount(data.held_out.labels).tolist() == [20] * 10
    assert {key.split("#")[0] for key in [*data.bank.keys, *data.held_out.keys]} == {"val"}
    assert prepare_data(recipe.replace(holdout=0), source).held_out is None


def test_another_network_does_not_inherit_the_recipes_width():
    recipe, _, _ = compose_recipe("shapes", None, {"backbone": "timm/resnet10t"})
    assert (
        recipe.width == 64
        and compose_recipe("shapes", None, {"backbone": "resnet18"})[0].width == 16
    )
    assert (
        compose_recipe("shapes", None, {"backbone": "timm/resnet10t", "width": 8})[0].width == 8
    )  # and is refused later


def test_images_are_held_out_of_training():
    recipe, source, _ = compose_recipe("shapes", None, {"limit": 1000, "holdout": 200})
    data = prepare_data(recipe, source)
    assert (len(data.train), len(data.held_out)) == (800, 200)
    assert not set(data.train.keys[i] for i in range(800)) & set(
        data.held_out.keys[i] for i in range(200)
    )
    recipe, source, _ = compose_recipe("shapes", None, {"limit": 1000})
    assert len(prepare_data(recipe, source).held_out) == 1000  # its own val split
    recipe, source, _ = compose_recipe("shapes", None, {"holdout": 0})
    assert prepare_data(recipe, source).held_out is None


@pytest.mark.parametrize("cells", [{"view_ratio": 0.5}, {"small_crops": 1, "small_crop_size": 16}])
def test_views_of_another_size_need_a_network_for_any_size(cells):
    """Without them, a network for one size is taken."""
    recipe = Recipe(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
    vit = recipe.replace(backbone="vit_b_32")
    for fine in (vit, recipe.replace(**cells)):
        check_view_sizes(fine.resolve())
    with pytest.raises(UsageError, match="vit_b_32 does not take views of 16 px beside images of"):
        check_view_sizes(vit.replace(**cells).resolve())
