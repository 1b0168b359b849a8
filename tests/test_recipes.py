"""A recipe survives YAML, refuses what it does not know, and never rewrites a value."""

import pytest
import yaml
from PIL import Image

from simsiam.config import recipes
from simsiam.config.recipes import RECIPES, Recipe
from simsiam.errors import UsageError
from simsiam.runs.choose import SPRINT_REASON
from simsiam.runs.compose import compose_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_yaml(name):
    recipe = Recipe().replace(**RECIPES[name]())
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_the_baseline_is_the_papers():
    m = Recipe().method
    assert (m.dim, m.pred_dim, m.proj_layers, m.proj_hidden) == (2048, 512, 3, 2048)
    assert (m.base_lr, m.momentum, m.weight_decay, m.predictor_lr) == (0.05, 0.9, 1e-4, "constant")
    assert m.head_bn == ("proj_hidden", "proj_out", "pred_hidden") and not m.output_bn_affine
    v = m.views[0]
    assert (v.crop_min, v.flip, v.jitter, v.jitter_p, v.gray) == (
        0.2,
        0.5,
        (0.4, 0.4, 0.4, 0.1),
        0.8,
        0.2,
    )
    assert (Recipe().batch_size, Recipe().epochs, Recipe().peak_lr) == (512, 100, 0.1)


def test_appendix_d():
    r = Recipe().replace(**recipes.cifar_recipe())
    assert r.peak_lr == pytest.approx(0.06) and r.epochs == 800 and r.method.weight_decay == 5e-4
    assert r.method.proj_layers == 2 and r.method.views[0].blur == 0 and r.backbone == "resnet18"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bas_lr": 1}, "unknown setting 'bas_lr': did you mean 'base_lr'"),
        ({"method": "simsian"}, "unknown method 'simsian': did you mean 'simsiam'"),
        ({"epochs": "many"}, "epochs is 'many'; it takes a whole number"),
        ({"epochs": 1.5}, "epochs is 1.5; it takes a whole number"),
        ({"epochs": 0}, "epochs is 0; it is at least 1"),
        ({"predictor": "mpl"}, "unknown predictor 'mpl': did you mean 'mlp'"),
        ({"jitter": (0.4, 0.4)}, "jitter takes 4 values, not 2"),
        ({"stop_gradient": "off"}, "stop_gradient is 'off'; it takes true or false"),
        ({"base_lr": True}, "base_lr is True; it takes a number"),
        ({"head_bn": ["proj_in"]}, "unknown head_bn 'proj_in'"),
        ({"crop_min": 0.0}, "crop_min is 0.0; it lies between"),
        ({"flip": 1.5}, "flip is 1.5; it lies between"),
        ({"base_lr": float("nan")}, "base_lr is nan"),
        ({"base_lr": float("inf")}, "base_lr is inf"),
        ({"std": (0.0, 0.2, 0.2)}, "std is 0.0"),
        ({"mean": (0.5,)}, "mean has 1 values for 3 channels"),
        ({"epochs": 5, "warmup_epochs": 10}, "warmup_epochs is 10 and epochs 5"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(UsageError, match=message) as error:
        Recipe().replace(**settings)
    assert "\n" not in str(error.value)


def test_unknown_keys_of_a_file_are_refused():
    data = Recipe().to_dict()
    data["method"]["stop_grad"] = False
    with pytest.raises(UsageError, match="did you mean 'stop_gradient'"):
        Recipe.from_dict(data)


def test_text_and_numbers_mean_the_same():
    assert Recipe().replace(
        epochs="7", base_lr="0.3", jitter=["0.1"] * 4, limit="none", head_bn=[]
    ) == Recipe().replace(epochs=7, base_lr=0.3, jitter=(0.1,) * 4, limit=None, head_bn=())


def test_naming_the_method_it_already_has_keeps_changed_settings():
    recipe = Recipe().replace(**recipes.cifar_recipe())
    assert recipe.replace(method="simsiam") == recipe


def test_a_setting_of_the_views_changes_every_view():
    assert all(v.blur == 0.0 for v in Recipe().replace(blur=0).method.views)


@pytest.mark.parametrize(
    ("count", "side", "size", "batch"),
    [(9469, 224, 128, 256), (300, 1000, 224, 16), (50_000, 64, 64, 256), (2000, 375, 224, 64)],
)
def test_a_folders_recipe_follows_its_images(count, side, size, batch):
    settings = recipes.folder_recipe(count, side)
    assert (settings["image_size"], settings["batch_size"]) == (size, batch)


def test_sprint_changes_how_a_source_is_learned_but_not_its_images_and_network():
    chosen, _, _ = compose_recipe("shapes", None, {})
    sprint, _, _ = compose_recipe("shapes", "sprint", {"tau": 0.3})
    for name in ("backbone", "width", "stem", "image_size", "mean", "std", "batch_size"):
        assert getattr(sprint, name) == getattr(chosen, name)
    assert sprint.method.views == chosen.method.views and sprint.method.criterion == "nt_xent"
    assert sprint.method.tau == 0.3  # a flag is stronger
    assert chosen.view_ratio == 1 and sprint.view_size == 24


def test_a_folder_with_a_network_for_one_size_has_views_of_that_size(tmp_path):
    for i in range(40):
        Image.new("RGB", (40, 40), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
    sizes = {}
    for backbone in ("resnet50", "vit_b_32"):
        recipe, _, reasons = compose_recipe(str(tmp_path), None, {"backbone": backbone})
        sizes[backbone] = recipe.view_size
        assert f"views of {recipe.view_size} px" in reasons[0]
    assert sizes == {"resnet50": 24, "vit_b_32": 32}


def test_sprint_with_another_method_is_refused():
    with pytest.raises(UsageError, match="leave out --method or --recipe"):
        compose_recipe("shapes", "sprint", {"method": "byol"})


def test_sprint_keeps_small_batches():
    sizes = [recipes.sprint_recipe(batch, 32)["batch_size"] for batch in (16, 512)]
    assert sizes == [16, 128]


def test_sprint_has_smaller_views_of_small_images_only():
    ratios = [recipes.sprint_recipe(256, side)["view_ratio"] for side in (32, 64)]
    assert ratios == [0.75, 1.0]


@pytest.mark.parametrize(
    ("settings", "sprint"),
    [
        ({}, True),
        ({"base_lr": 0.1, "crop_min": 0.3, "epochs": 3, "init": None}, True),
        ({"method": "simsiam"}, False),
        ({"stop_gradient": False}, False),
        ({"init": "patches"}, False),
    ],
)
def test_a_folder_is_learned_by_sprint_unless_a_component_or_weights_are_given(
    tmp_path, settings, sprint
):
    for i in range(40):
        Image.new("RGB", (40, 40), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
    folder = str(tmp_path)
    recipe, _, reasons = compose_recipe(folder, None, settings)
    assert (recipe.method.criterion == "nt_xent") == sprint == (SPRINT_REASON in reasons)
    explicit, _, _ = compose_recipe(folder, "sprint", {"seed": 0})
    default, _, _ = compose_recipe(folder, None, {"seed": 0})
    assert explicit == default
