"""The label-free monitor uses the same images and views every time and does not change the model.

It also gives advice on how long to train.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from simsiam.data.batches import make_training_views
from simsiam.data.images import sample
from simsiam.model.precision import Compute
from simsiam.monitoring.label_free_monitor import (
    MONITOR_STEP,
    advise_training_length,
    label_free_monitor,
)
from simsiam.monitoring.signals import neighbor_stability, rankme, view_retrieval
from simsiam.runs.compose import compose_recipe
from simsiam.runs.encoder import eval_transform
from simsiam.sources.open_source import open_source
from simsiam.training.prepare import build_training_setup

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts():
    """A recipe, 600 images, and a model as it is at the start of training."""
    recipe, source, _ = compose_recipe("shapes", None, TINY | {"precision": "float32"})
    return recipe, sample(source.train, 600), build_training_setup(recipe).model


def measure(parts, previous=None, images=None):
    recipe, all_images, model = parts
    images = all_images if images is None else images
    compute = Compute(CPU, "float32")
    return label_free_monitor(
        model, images, recipe, eval_transform(recipe), previous, compute=compute
    )


def test_it_is_a_function_of_the_weights_and_leaves_them_alone(parts):
    model = parts[2]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = measure(parts)
    torch.manual_seed(1)
    again = measure(parts, first.neighbors)
    assert again.values == first.values | {"neighbor_stability": 100.0}
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_signals_are_those_of_h_and_of_the_two_views(parts):
    recipe, images, model = parts
    signals = measure(parts)
    model.eval()
    with torch.no_grad():
        h = model.backbone(eval_transform(recipe).normalize(torch.from_numpy(images.pixels)))
        index = np.array_split(np.arange(600), 3)
        pairs = [make_training_views(images, part, recipe, MONITOR_STEP, CPU) for part in index]
        a, b = (torch.cat([model.backbone(pair[side]) for pair in pairs]) for side in (0, 1))
    model.train()
    assert signals.values["h_rankme"] == pytest.approx(rankme(h), rel=1e-4)
    assert signals.values["view_retrieval"] == pytest.approx(view_retrieval(a, b), abs=0.5)
    assert not torch.equal(pairs[0][0], pairs[0][1])


def test_weights_that_moved_move_neighbors(parts):
    recipe, images, _ = parts
    first = measure(parts)
    moved = build_training_setup(recipe.replace(seed=7)).model
    second = measure((recipe, images, moved), first.neighbors)
    expected = round(neighbor_stability(first.neighbors, second.neighbors), 4)
    assert second.values["neighbor_stability"] == expected < 90


def test_a_set_that_changed_has_no_stability(parts):
    first = measure(parts)
    fewer = measure(parts, first.neighbors, parts[1].take(slice(300)))
    assert "neighbor_stability" not in fewer.values


def test_streamed_and_resident_images_give_the_same_signals(parts, tmp_path):
    """Pillow and torch round crops differently by half a level, so the bits differ."""
    images = parts[1].take(slice(60))
    for i in range(60):
        Image.fromarray(images.read(i)).save(tmp_path / f"{i:03}.png")
    (tmp_path / "broken.png").write_bytes(b"")
    streamed = measure(parts, images=open_source(tmp_path).train)
    resident = measure(parts, images=replace(images, labels=None))
    assert [key for key, _ in streamed.skipped] == ["broken.png"]
    assert streamed.values["h_rankme"] == pytest.approx(resident.values["h_rankme"], rel=1e-3)
    assert streamed.values["view_retrieval"] == pytest.approx(
        resident.values["view_retrieval"], abs=4
    )


def advice(**curves):
    """The advice on records with these curves."""
    records = [
        dict(zip(curves, values, strict=True)) for values in zip(*curves.values(), strict=True)
    ]
    return advise_training_length(records)


def test_the_advice_follows_the_curve_and_gives_its_numbers():
    rising = advice(view_retrieval=[1, 2, 3, 4, 5, 6, 7, 8, 9.0])
    assert rising.startswith("Still rising")
    assert "1.0 at first, 6.0 at two thirds, 9.0 at the end" in rising
    for curve, beginning in (
        ([1, 5, 8, 9, 9.5, 9.6, 9.7, 9.7, 9.8], "Leveled off"),
        ([1, 5, 9, 8, 6, 5, 4, 3, 2], "Past its best"),
        ([5, 4, 3, 2, 2, 2, 2, 2, 2], "Past its best"),
        ([5.0] * 9, "Leveled off"),
    ):
        assert advice(view_retrieval=curve).startswith(beginning)
    few = [{"view_retrieval": value} for value in (1, 2, 3, 4, 5)] + [{"loss": 0.0}] * 9
    assert "at least 6 measurements" in advise_training_length(few)


def test_labels_join_the_advice_if_there_are_any():
    knn = [30, 31, 32, 33, 34, 35, 36, 37, 38]
    both = advice(view_retrieval=[5.0] * 9, knn_top1=knn)
    assert both.startswith("Still rising") and "kNN" in both and "views" in both
