"""What this program writes can be given back to it: runs, checkpoints, exports, at any size."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

import simsiam
from simsiam.commands.main import main
from simsiam.config.methods import METHODS
from simsiam.config.recipes import Recipe
from simsiam.errors import UsageError
from simsiam.exports.export import export
from simsiam.model.backbones import create_backbone, fit_positions, vit_image_size
from simsiam.model.siamese import build
from simsiam.runs.checkpoints.convert import convert, format_conversion
from simsiam.runs.encoder import load
from simsiam.runs.run_folder import Run, new_state
from simsiam.runs.weights import load_init_weights, open_weights
from simsiam.sources.open_source import open_source

PREPROCESSING = {"mean": (0.4, 0.3, 0.2), "std": (0.3, 0.2, 0.25), "eval_interpolation": "bicubic"}
SMALL = {"dim": 12, "proj_hidden": 10, "proj_layers": 2}
VIT = {"backbone": "timm/test_vit", "image_size": 32}
RESNET = {"backbone": "resnet10", "width": 32, "image_size": 32}


def make_run(folder, **settings):
    """A run folder as if a network had been trained, with its last checkpoint."""
    recipe = Recipe().replace(**SMALL | PREPROCESSING | settings)
    run = Run.create(folder, recipe)
    recipe = run.recipe
    model = build(
        recipe.method, backbone=recipe.backbone, image_size=recipe.image_size, width=recipe.width,
        stem=recipe.stem, channels=recipe.channels, seed=3,
    )  # fmt: skip
    run.save("last", new_state({}, 8) | {"model": model.state_dict()})
    run.finish(model.backbone.state_dict(), {"verdict": "healthy", "steps": 7})
    return run.path


def forms_of(run, folder):
    """Every form in which the backbone of a run can be given back."""
    yield run
    yield run / "backbone.safetensors"
    yield run / "checkpoints" / "last.pt"
    yield shutil.copy(run / "backbone.safetensors", folder / "a copy.safetensors")
    for format, file in {
        "safetensors": "backbone.safetensors", "timm": "model.safetensors",
        "torchvision": "backbone.pth", "huggingface": "backbone.safetensors",
    }.items():  # fmt: skip
        try:
            exported = export(run, format=format, out=folder / format).path
        except UsageError:  # a network that the library does not have
            continue
        yield exported
        yield exported / file


@pytest.mark.parametrize(
    "settings",
    [
        VIT,
        VIT | {"image_size": 96, "eval_resize": 100},
        RESNET | {"stem": "large", "channels": 1, "mean": (0.4,), "std": (0.3,)},
        {"backbone": "resnet18", "image_size": 72},
        RESNET,
    ],
)
def test_every_form_brings_its_network_and_its_preprocessing(settings, tmp_path):
    run = make_run(tmp_path / "run", **settings)
    (tmp_path / "forms").mkdir()
    encoder, own = load(run), Run(run).recipe
    x = torch.randn(2, own.channels, own.image_size, own.image_size)
    forms = [*forms_of(run, tmp_path / "forms")]
    assert len(forms) >= 8
    for form in forms:
        folder = open_weights(form)
        again, recipe = load(folder), Run(folder).recipe
        with torch.no_grad():
            assert torch.allclose(again(x), encoder(x), atol=1e-6), form
        assert again.transform.resize == encoder.transform.resize, form
        for name in ("backbone", "width", "channels", "image_size", "mean", "std"):
            assert getattr(recipe, name) == getattr(own, name), (form, name)
        assert again.transform.interpolation == "bicubic"
        notes = Run(folder).json("converted.json").get("notes", [])
        assert not any("assumed" in note for note in notes), form


def test_what_weights_leave_over_and_assume_is_printed_once(tmp_path, capsys):
    state = create_backbone("resnet10", image_size=96, width=4, stem="large").state_dict()
    save_file(state | {"loss.weight": torch.zeros(3)}, "theirs.safetensors")
    open_weights("theirs.safetensors")
    lines = capsys.readouterr().err.splitlines()
    assert "license: unknown; kept in" in lines[0] and lines[1] == "tensors that are not used: loss"
    assert lines[2].startswith(
        "assumed, because no flag says otherwise: image_size 224, mean (0.485"
    )
    open_weights("theirs.safetensors")
    assert not capsys.readouterr().err and len(lines) == 3


def test_an_embedding_beside_its_images_is_not_taken_for_them(tmp_path):
    """It has thumbnails, a column of image files."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(photos / f"{i}.png")
    before = open_source(photos)
    out = photos / "photos.parquet"
    run = make_run(tmp_path / "run", **RESNET)
    assert main(["embed", str(run), str(photos), "--out", str(out)]) == 0
    after = open_source(photos)
    assert list(after.train.keys) == list(before.train.keys) == ["0.png", "1.png", "2.png"]
    assert after.passed_over == {".parquet": 1}
    (tmp_path / "alone").mkdir()
    out = out.rename(tmp_path / "alone" / "photos.parquet")
    for source in (out, out.parent):
        with pytest.raises(UsageError, match="holds no images: `simsiam embed` wrote it"):
            open_source(source)


def test_an_export_without_weights_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", **RESNET)
    folder = export(run, format="torch_export", out=tmp_path / "out").path
    out = str(tmp_path / "e.parquet")
    assert main(["embed", str(folder), "shapes", "--out", out]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "has no weights that can be read: backbone.safetensors" in error
    assert "Of the exports, safetensors, torchvision, timm and huggingface have them" in error


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_every_method_can_be_converted(method, tmp_path):
    settings = {} if method == "supervised" else SMALL
    recipe = Recipe().replace(
        method=method, backbone="resnet10", width=4, image_size=32, **settings | PREPROCESSING
    )
    run = Run.create(tmp_path / "run", recipe)
    model = build(run.recipe.method, backbone="resnet10", width=4, image_size=32, seed=3)
    run.save("last", new_state({}, 8) | {"model": model.state_dict()})
    again = Run(convert(tmp_path / "run" / "checkpoints" / "last.pt", out=tmp_path / "again"))
    state, report = again.checkpoint()["model"], again.json("converted.json")
    assert again.recipe.method == run.recipe.method and report["layout"] == "this program"
    assert {k.split(".")[0] for k in state} <= {"backbone", "projector", "predictor"}
    assert all(torch.equal(state[k], model.state_dict()[k]) for k in state)
    assert report["left_over"] == [k for k in model.state_dict() if k not in state]
    assert report["placed"] == len(state) and "heads" in format_conversion(again.path)


def test_a_damaged_description_is_one_line(tmp_path):
    run = make_run(tmp_path / "run", **VIT)
    exported = export(run, format="timm", out=tmp_path / "out").path
    file = shutil.move(exported / "model.safetensors", exported / "weights.safetensors")
    (exported / "preprocessing.json").write_text('{"mean": 3}')
    with pytest.raises(UsageError, match="the description of its preprocessing is damaged"):
        convert(file, out=tmp_path / "again", backbone="timm/test_vit")
    (exported / "preprocessing.json").write_text("no JSON")
    with pytest.raises(UsageError, match="the description of its preprocessing is damaged"):
        convert(file, out=tmp_path / "again", backbone="timm/test_vit")


# --- position embeddings at another image size ---


def test_position_embeddings_are_resampled_as_timm_does():
    from timm.layers import resample_abs_pos_embed

    torch.manual_seed(0)
    before = create_backbone("timm/test_vit", image_size=32).state_dict()
    for size in (96, 64, 16):
        after = create_backbone("timm/test_vit", image_size=size)
        state, resampled = fit_positions(
            "timm/test_vit", before, after.state_dict(), image_size=size
        )
        assert resampled == ["pos_embed"]
        expected = resample_abs_pos_embed(before["pos_embed"], [size // 16] * 2)
        torch.testing.assert_close(state["pos_embed"], expected, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(state[k], before[k]) for k in before if k != "pos_embed")
        after.load_state_dict(state)
    generator = torch.get_rng_state()
    fit_positions("timm/test_vit", before, after.state_dict(), image_size=16)
    assert torch.equal(torch.get_rng_state(), generator), "nothing is drawn"


def test_a_swins_tables_are_resampled_and_nothing_else():
    name = "timm/swin_tiny_patch4_window7_224"
    torch.manual_seed(0)
    before = create_backbone(name, image_size=64).state_dict()
    with torch.device("meta"):
        expected = create_backbone(name, image_size=128).state_dict()
    state, resampled = fit_positions(name, before, expected, image_size=128)
    assert resampled and all("relative_position_bias_table" in k for k in resampled)
    assert all(state[k].shape == expected[k].shape for k in expected)
    assert all(torch.equal(state[k], before[k]) for k in before if k not in resampled)
    means = [(before[k].mean(), state[k].mean()) for k in resampled]
    assert all(abs(a - b) < 0.02 for a, b in means)


def small_vit(size):
    return VisionTransformer(size, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)


def test_torchvisions_vit_takes_other_sizes():
    torch.manual_seed(0)
    with torch.device("meta"):
        assert create_backbone("vit_b_16", image_size=32).dim == 768
        with pytest.raises(UsageError, match="vit_b_16 does not take images of 40 px: Input shape"):
            create_backbone("vit_b_16", image_size=40)
    before, after = small_vit(64).state_dict(), small_vit(96)
    assert vit_image_size(before) == 64
    state, resampled = fit_positions("vit_b_16", before, after.state_dict(), image_size=96)
    assert resampled == ["encoder.pos_embedding"]
    positions = state["encoder.pos_embedding"]
    assert torch.equal(positions[:, 0], before["encoder.pos_embedding"][:, 0])
    after.load_state_dict(state)


def test_what_cannot_be_resampled_names_the_flag():
    name = "timm/mixer_s32_224"
    before = create_backbone(name, image_size=224).state_dict()
    with torch.device("meta"):
        expected = create_backbone(name, image_size=96).state_dict()
    with pytest.raises(UsageError, match=r"resampled to 96 px: give --image-size 224 \(") as error:
        fit_positions(name, before, expected, image_size=96)
    assert "\n" not in str(error.value)


def test_a_file_is_built_at_the_size_of_its_positions(tmp_path):
    torch.manual_seed(0)
    network = create_backbone("timm/test_vit", image_size=96).eval()
    save_file(network.state_dict(), "vit.safetensors")
    run = convert("vit.safetensors", out="same", backbone="timm/test_vit")
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(load(run)(x), network(x))
    assert (Run(run).recipe.image_size, load(run).transform.resize) == (96, round(96 * 8 / 7))
    run = convert("vit.safetensors", out="other", backbone="timm/test_vit", image_size=64)
    assert "position embeddings of 96 px are resampled to 64 px" in format_conversion(run)
    assert load(run)(x[..., :64, :64]).shape == (2, network.dim)


def test_a_folder_of_timms_is_read_with_timms_preprocessing_at_any_size(tmp_path):
    """An export without its preprocessing.json is what the hub's cache and `timm` have."""
    run = make_run(tmp_path / "run", **VIT)
    exported = export(run, format="timm", out=tmp_path / "out").path
    (exported / "preprocessing.json").unlink()
    for form in (exported, exported / "model.safetensors"):
        encoder = load(open_weights(form))
        assert encoder.transform.mean == (0.4, 0.3, 0.2) and encoder.transform.size == 32
    again = convert(exported, out=tmp_path / "again", image_size=64)
    assert "embeddings of 32 px are resampled to 64 px, as timm does" in format_conversion(again)
    assert load(again).transform.size == 64 and load(again).transform.mean == (0.4, 0.3, 0.2)


# --- as initial weights ---

INIT = QUICK | {"steps": 1, "device": "cpu", "workers": 0, "batch_size": 2, "limit": 4}
INIT = {name: value for name, value in INIT.items() if name not in ("backbone", "width")}


@pytest.fixture
def photos(tmp_path):
    for i in range(4):
        path = tmp_path / "photos" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((70 + i, 64), 60).convert("RGB").save(path)
    return tmp_path / "photos"


def test_a_vit_is_started_from_at_its_own_and_at_another_size(photos, tmp_path, capsys):
    run = make_run(tmp_path / "vit", **VIT)
    for init in (run, run / "checkpoints" / "last.pt"):
        out = tmp_path / f"same{Path(init).name}"
        recipe = Run(simsiam.pretrain(photos, out=out, **INIT | {"init": str(init)})).recipe
        assert (recipe.backbone, recipe.image_size) == ("timm/test_vit", 32)
        assert recipe.mean == (0.4, 0.3, 0.2) and "resampled" not in capsys.readouterr().err
    settings = INIT | {"init": str(run), "image_size": 64}
    other = Run(simsiam.pretrain(photos, out=tmp_path / "other", **settings))
    assert "position embeddings of 32 px are resampled to 64 px, as timm does" in (
        capsys.readouterr().err
    )
    start = create_backbone("timm/test_vit", image_size=64)
    load_init_weights(start, other.recipe)
    positions = start.state_dict()["pos_embed"]
    assert positions.shape[1] == 17 and torch.equal(positions[:, 0], load(run).pos_embed[:, 0])
    assert main(["embed", str(other.path), str(photos), "--out", str(tmp_path / "e.parquet")]) == 0


@pytest.mark.parametrize("file", ["", "checkpoints/last.pt", "backbone.safetensors"])
def test_a_run_brings_width_stem_backbone_and_channels(file, photos, tmp_path, capsys):
    gray = {"channels": 1, "mean": (0.4,), "std": (0.3,)}
    run = make_run(tmp_path / "run", **RESNET | gray | {"stem": "large"})
    init = {"init": str(run / file)}
    recipe = Run(simsiam.pretrain(photos, out=tmp_path / "out", **INIT | init)).recipe
    assert (recipe.backbone, recipe.width, recipe.stem) == ("resnet10", 32, "large")
    assert (recipe.channels, recipe.mean) == (1, (0.4,))
    for name, value in {"width": 64, "stem": "small", "channels": 3}.items():
        with pytest.raises(
            UsageError, match=rf"does not fit --{name} {value}.* leave --{name} out"
        ):
            simsiam.pretrain(photos, out=tmp_path / "no", **INIT | init | {name: value})
    with pytest.raises(UsageError, match=r"leave --backbone out|is a resnet10, not resnet18"):
        simsiam.pretrain(photos, out=tmp_path / "no", **INIT | init | {"backbone": "resnet18"})
    with pytest.raises(UsageError, match=r"does not fit --channels 3: .* leave --channels out"):
        simsiam.adapt(photos, init=str(run / file), channels=3)


def test_a_detector_takes_the_width_of_its_initial_weights_and_no_vit(tmp_path):
    from simsiam.detection.initialization import Initialization

    run = Run(make_run(tmp_path / "run", backbone="resnet18", width=4, image_size=32))
    wide = make_run(tmp_path / "wide", **RESNET)
    for init in (wide, wide / "checkpoints" / "last.pt", wide / "backbone.safetensors"):
        origin = Initialization(run, str(init), False)
        assert origin.network == "resnet10, width 32" and origin.mean == (0.4, 0.3, 0.2)
        state = origin.build_backbone().state_dict()
        assert all(torch.equal(state[k], x) for k, x in load(wide).state_dict().items())
    with pytest.raises(
        UsageError, match="is timm/test_vit; a detector is built on one of resnet10"
    ):
        Initialization(run, str(make_run(tmp_path / "vit", **VIT)), False)


def test_weights_that_share_memory_are_written_and_read(tmp_path):
    """As in timm's CoaT, where several blocks have one position encoding."""
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    run = Run.create(tmp_path / "run", Recipe().replace(**RESNET | PREPROCESSING))
    run.finish(network.state_dict(), {"verdict": "healthy", "steps": 1})
    assert (run.path / "backbone.safetensors").exists()
