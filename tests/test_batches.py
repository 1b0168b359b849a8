"""Order and views are functions of (seed, step): nothing else has a say."""

import numpy as np
import pytest
import torch
from PIL import Image

from simsiam.config.recipes import Recipe
from simsiam.data.batches import (
    batch_indices,
    epoch_order,
    iter_batches,
    min_decode_side,
    sequential_batches,
)
from simsiam.data.images import from_arrays
from simsiam.errors import UsageError
from simsiam.runs.preprocessing import eval_transform
from simsiam.sources.open_source import open_source

CPU = torch.device("cpu")


def recipe(**words) -> Recipe:
    return Recipe().replace(image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=8, **words)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return from_arrays("train", rng.integers(0, 256, (50, 3, 20, 20), dtype=np.uint8))


def test_an_epoch_sees_each_image_once_at_most(images):
    r = recipe()
    for epoch in range(3):
        seen = np.concatenate([batch_indices(6 * epoch + i, r, images) for i in range(6)])
        assert len(seen) == len(set(seen)) == 48
    assert sorted(epoch_order(0, 0, 50)) == list(range(50))
    assert (epoch_order(0, 0, 50) != epoch_order(0, 1, 50)).any() and (
        epoch_order(0, 0, 50) != epoch_order(1, 0, 50)
    ).any()


def test_a_step_is_the_same_whatever_ran_before(images):
    torch.manual_seed(1)
    straight = list(iter_batches(images, recipe(), 0, 10, CPU))
    torch.manual_seed(2)
    np.random.seed(3)
    jumped = next(iter_batches(images, recipe(), 7, 10, CPU))
    assert jumped.step == straight[7].step == 7
    assert torch.equal(jumped.index, straight[7].index)
    assert all(torch.equal(a, b) for a, b in zip(jumped.views, straight[7].views))
    assert not torch.equal(jumped.views[0], jumped.views[1])
    other_seed = next(iter_batches(images, recipe(seed=1), 7, 10, CPU))
    assert not torch.equal(other_seed.index, jumped.index)


def test_batches_larger_than_the_set_are_refused(images):
    with pytest.raises(UsageError, match="take a smaller --batch-size"):
        next(iter_batches(images, recipe().replace(batch_size=64), 0, 1, CPU))


def test_a_sweep_sees_every_image_in_order(images):
    """The last batch steps back to be whole."""
    swept = list(sequential_batches(images, recipe(), CPU))
    assert torch.equal(
        torch.cat([batch.index for batch in swept]),
        torch.cat([torch.arange(48), torch.arange(42, 50)]),
    )
    assert all(len(batch.views[0]) == 8 for batch in swept)


def test_a_row_says_how_many_views_it_takes(images):
    for count, words in [(1, {"method": "supervised"}), (4, {"pairs": "asymmetric_2x"}), (2, {})]:
        batch = next(iter_batches(images, recipe(**words), 0, 1, CPU))
        assert len(batch.views) == count


@pytest.fixture(params=["in memory", "files"])
def anywhere(request, images, tmp_path):
    """The images, in memory and as files."""
    if request.param == "in memory":
        return images
    for i, pixels in enumerate(images.pixels):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
    files = open_source(tmp_path).train
    assert files.pixels is None
    return files


def test_smaller_views_of_larger_images(anywhere):
    """Their views are those of smaller images; images that are measured whole keep their size."""
    cells = {"small_crops": 1, "small_crop_size": 8, "workers": 0}
    ours = recipe(view_ratio=0.75, **cells).resolve()
    small = recipe(**cells).replace(image_size=12).resolve()
    assert ours.view_sizes == small.view_sizes == [12, 12, 8] and eval_transform(ours).size == 16
    batches = [next(iter_batches(anywhere, r, 3, 4, CPU)) for r in (ours, small)]
    for view, expected in zip(*(batch.views for batch in batches), strict=True):
        assert torch.equal(view, expected)
    whole = recipe(view_ratio=0.5, crop_min=1.0).resolve()
    assert min_decode_side(whole) == 16


def test_small_crops_come_last_with_their_own_size_and_scale(anywhere):
    """The full views are those of a run without small crops."""
    cells = {"small_crops": 2, "small_crop_scale": (0.04, 0.09), "jitter_p": 0.0}
    cells |= {"gray": 0.0, "blur": 0.0, "flip": 0.0, "workers": 0}
    batch = next(iter_batches(anywhere, recipe(**cells, small_crop_size=12).resolve(), 3, 4, CPU))
    assert [view.shape[2:] for view in batch.views] == [(16, 16)] * 2 + [(12, 12)] * 2
    plain = {name: value for name, value in cells.items() if not name.startswith("small")}
    for view, expected in zip(
        batch.views[:2], next(iter_batches(anywhere, recipe(**plain), 3, 4, CPU)).views, strict=True
    ):
        assert torch.equal(view, expected)
    # Of noise, a crop of 4 to 6 of 20 pixels that is enlarged to 12 varies slowly.
    roughness = [view.diff(dim=3).abs().mean() / view.std() for view in batch.views]
    assert max(roughness[2:]) < 0.7 * min(roughness[:2])
    assert not torch.equal(batch.views[2], batch.views[3])
    assert recipe(small_crops=1).replace(image_size=224).resolve().small_crop_size == 96
