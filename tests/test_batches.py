"""Order and views are functions of (seed, step): nothing else has a say."""

import numpy as np
import pytest
import torch

from simsiam.config.recipes import Recipe
from simsiam.data.batches import batch_indices, epoch_order, iter_batches, sequential_batches
from simsiam.data.images import from_arrays
from simsiam.errors import UsageError

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
