"""The package as a library: names are visible and typed, parts work in a loop of one's own."""

import inspect
import pydoc
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch

import simsiam
from simsiam.config.keyword_settings import (
    EvaluationSettings,
    PretrainSettings,
    ScheduleSettings,
)
from simsiam.config.protocols import Settings
from simsiam.config.recipes import SETTING_TYPES, Recipe
from simsiam.detection.schedules import Schedule

PACKAGE = Path(simsiam.__file__).parent
FUNCTIONS = [name for name in simsiam.__all__ if inspect.isfunction(getattr(simsiam, name))]
SMALL = {"backbone": "resnet10", "width": 4, "image_size": 16}
NARROW = {"dim": 12, "proj_hidden": 10, "pred_dim": 6}


# --- names ---


def test_dir_shows_the_public_names_and_loads_nothing():
    code = (
        "import sys, simsiam\n"
        "assert set(simsiam.__all__) <= set(dir(simsiam))\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "from simsiam import METHODS, Recipe\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_for_type_checkers():
    """What is loaded lazily is imported under TYPE_CHECKING, and the package says it has types."""
    assert sorted(simsiam.__all__) == sorted(simsiam._MODULES)
    text = (PACKAGE / "__init__.py").read_text()
    for name, module in simsiam._MODULES.items():
        assert f"    from simsiam.{module} import {name} as {name}\n" in text
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("name", simsiam.__all__)
def test_no_module_hides_a_public_name(name):
    """Importing the module that defines a name, or a module of that name, changes nothing."""
    value = getattr(simsiam, name)
    import_module(f"simsiam.{simsiam._MODULES[name]}")
    import_module("simsiam.training.pretrain")
    assert getattr(simsiam, name) is value and not inspect.ismodule(value)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        simsiam.pretrian  # noqa: B018


def test_help_shows_every_function_with_its_arguments():
    text = pydoc.plain(pydoc.render_doc(simsiam))
    for name in FUNCTIONS:
        function = getattr(simsiam, name)
        assert f"    {name}({next(iter(inspect.signature(function).parameters))}" in text
        assert inspect.getdoc(function).splitlines()[0] in text
    assert {"pretrain", "inspect", "preview", "plan", "evaluate", "transfer"} <= set(FUNCTIONS)
    assert {"build", "make_views", "negative_cosine"} <= set(FUNCTIONS)


# --- settings as keyword arguments ---


def test_keyword_arguments_are_the_settings_of_a_recipe():
    expected = {name: kind for name, kind in SETTING_TYPES.items() if name != "source"}
    assert get_type_hints(PretrainSettings) == expected
    assert not PretrainSettings.__required_keys__


@pytest.mark.parametrize(
    ("typed", "owner"), [(EvaluationSettings, Settings), (ScheduleSettings, Schedule)]
)
def test_keyword_arguments_are_the_settings_of_protocols_and_schedules(typed, owner):
    assert get_type_hints(typed) == get_type_hints(owner)
    assert set(get_type_hints(typed)) == {field.name for field in fields(owner)}


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("pretrain", PretrainSettings),
        ("preview", PretrainSettings),
        ("plan", PretrainSettings),
        ("evaluate", EvaluationSettings),
        ("transfer", ScheduleSettings),
    ],
)
def test_functions_declare_their_settings(name, typed):
    *named, settings = inspect.signature(getattr(simsiam, name)).parameters.values()
    assert settings.kind is inspect.Parameter.VAR_KEYWORD
    assert typed.__name__ in str(settings.annotation)
    assert not {parameter.name for parameter in named} & set(get_type_hints(typed))


# --- parts ---


def make_batch(step: int, method: simsiam.Method, images: torch.Tensor) -> list[torch.Tensor]:
    return simsiam.make_views(
        images,
        method.views,
        view_count=method.view_count,
        size=16,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        seed=0,
        step=step,
        positions=np.arange(len(images)),
    )


@pytest.fixture
def images():
    """Four colors of noise: 64 images that a network can tell apart."""
    generator = torch.Generator().manual_seed(0)
    colors = torch.randint(0, 256, (64, 3, 1, 1), generator=generator)
    noise = torch.randint(-20, 20, (64, 3, 24, 24), generator=generator)
    return (colors + noise).clamp(0, 255).to(torch.uint8)


def test_views_are_the_same_inside_of_autocast(images):
    method = simsiam.METHODS["byol"]  # with every operation
    expected = make_batch(0, method, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = make_batch(0, method, images)
        assert torch.is_autocast_enabled("cpu")
    assert all(x.dtype == torch.float32 and x.equal(y) for x, y in zip(views, expected))


@pytest.mark.parametrize("name", ["simsiam", "byol", "moco_v2"])
def test_the_parts_train_in_a_loop_of_ones_own_under_autocast(name, images):
    """Views, model, loss and `after_step`, all of it inside of torch.autocast in bfloat16."""
    from dataclasses import replace

    method = replace(simsiam.METHODS[name], **NARROW, queue=128)
    model = simsiam.build(method, **SMALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.begin(steps=12)
    losses = []
    for step in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = make_batch(0, method, images)
            output = model(*x)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            model.after_step(output, step)
        losses.append(output.loss.item())
    assert output.features[0].dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    # MoCo's loss rises while its queue of random vectors is filled with keys.
    assert np.isfinite(losses).all() and (losses[-1] < losses[0] or name == "moco_v2")
    if name == "simsiam":
        p, t = output.predictions, output.targets
        d = simsiam.negative_cosine
        assert output.loss.item() == pytest.approx((d(p[0], t[1]) + d(p[1], t[0])).item() / 2)


# --- tables that users extend ---


def test_a_target_and_a_criterion_from_outside_train_and_are_read_back(monkeypatch):
    """A new target and a new criterion are added to their tables, and nothing else knows them."""
    from conftest import QUICK

    class Mean(simsiam.TARGETS["shared"]):
        """The mean of z over all views."""

        def forward(self, x, z, index):
            mean = torch.stack([z[j] for j in self.views]).mean(0)
            return dict.fromkeys(self.views, mean)

    class Distance(simsiam.Criterion):
        """The mean squared distance, divided by a temperature."""

        def forward(self, p, t):
            return (p - t).square().mean() / self.method.tau

    monkeypatch.setitem(simsiam.TARGETS, "toy_mean", Mean)
    monkeypatch.setitem(simsiam.CRITERIA, "toy_distance", Distance)
    settings = {"target": "toy_mean", "criterion": "toy_distance", "tau": 0.5, "target_decay": 0.9}
    run = simsiam.Run(simsiam.pretrain("shapes", **QUICK | settings | {"steps": 2}))
    assert len(run.metrics()) == 2
    method = run.recipe.method
    assert {name: getattr(method, name) for name in settings} == settings
    assert Recipe.from_dict(run.recipe.to_dict()).method == method
    assert simsiam.load(run.path).dim > 0


@pytest.mark.parametrize("name", ["target", "criterion"])
def test_a_wrong_target_or_criterion_names_the_nearest(name):
    value = {"target": "momentun", "criterion": "nt_xnet"}[name]
    nearest = {"target": "momentum", "criterion": "nt_xent"}[name]
    with pytest.raises(simsiam.UsageError, match=f"unknown {name} '{value}': .* '{nearest}'"):
        simsiam.pretrain("shapes", **{name: value}, epochs=1)
    assert not list(Path().iterdir())
    with pytest.raises(simsiam.UsageError, match=f"did you mean '{nearest}'"):
        simsiam.build(simsiam.Method(name="wrong", **{name: value}), **SMALL)
