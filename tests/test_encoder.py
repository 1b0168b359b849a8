"""An encoder is its backbone, then a linear map, beside an optional branch of patches.

Its parts but the backbone are in head.safetensors. Protocols of the backbone do not see them.
"""

import json
import shutil

import pytest
import torch
import yaml
from conftest import QUICK
from torch import nn

import simsiam
from simsiam.commands.main import main
from simsiam.evaluation.evaluate import evaluate
from simsiam.model.encoder import Encoder
from simsiam.runs import encoder as encoders
from simsiam.runs.encoder import load
from simsiam.runs.run_folder import HEAD_FILE, Run

PATCHES = "patches/8"  # the name of the stand-in below


class StandIn(nn.Module):
    """Means of the quarters of an image in 8 channels: a branch with weights and a buffer."""

    def __init__(self, channels=3):
        super().__init__()
        self.filters = nn.Conv2d(channels, 8, 3)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.pool, self.dim = nn.AdaptiveAvgPool2d(2), 32

    def forward(self, x):
        return self.pool(self.filters(x - self.mean).relu()).flatten(1)


@pytest.fixture(autouse=True)
def with_stand_in(monkeypatch):
    """`create_backbone` knows the stand-in."""
    create = encoders.create_backbone
    monkeypatch.setattr(
        encoders,
        "create_backbone",
        lambda name, **kw: StandIn(kw["channels"]) if name == PATCHES else create(name, **kw),
    )


def random_linear(dim, out, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(dim, out)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    return layer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return simsiam.pretrain("shapes", out=out, **QUICK | {"precision": "float32"})


@pytest.fixture
def run(trained, tmp_path):
    """A run with a head."""
    path = shutil.copytree(trained, tmp_path / "run")
    backbone = load(path)
    Run(path).write_head(Encoder(backbone, random_linear(backbone.dim, 12)))
    return path


def images(n=5, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_an_encoder_is_the_backbone_then_the_map_and_the_patches_beside_it():
    x, backbone, patches = images(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 6)), StandIn()
    backbone.dim = 6
    head, patches_head = random_linear(6, 4, 1), random_linear(32, 5, 2)
    with torch.no_grad():
        h, p = backbone(x), patches(x)
        left, right = h @ head.weight.T + head.bias, p @ patches_head.weight.T + patches_head.bias
        cases = {
            Encoder(backbone): h,
            Encoder(backbone, head): left,
            Encoder(backbone, None, patches): torch.cat([h, p], 1),
            Encoder(backbone, head, patches, patches_head): torch.cat([left, right], 1),
        }
        for encoder, expected in cases.items():
            assert torch.allclose(encoder(x), expected, atol=1e-5)
            assert encoder.dim == expected.shape[1]


def test_with_a_weight_the_cosine_is_the_weighted_mean_of_both_and_the_file_keeps_it(run):
    """Against `torch.cosine_similarity` of the parts, before and after head.safetensors."""
    x, backbone, patches = images(), load(run, head=False), StandIn()
    patches_head = random_linear(32, 5, 2)
    encoder = Encoder(backbone, None, patches, patches_head, patches_weight=2.0)
    Run(run).write_head(encoder, patches=PATCHES)
    with torch.no_grad():
        h, p = backbone(x), patches_head(patches(x))
        h_cosine, p_cosine = (torch.cosine_similarity(y[:, None], y, dim=2) for y in (h, p))
        for features in (encoder(x), load(run)(x)):
            cosine = torch.cosine_similarity(features[:, None], features, dim=2)
            torch.testing.assert_close(cosine, (h_cosine + 2 * p_cosine) / 3)


def test_the_map_has_full_precision_where_the_backbone_has_not():
    """A direction of variance 1e-4 beside a mean of 100 is lost in bfloat16."""
    backbone, head = nn.Identity(), nn.Linear(2, 1)
    backbone.dim = 2
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4, -1e4]])), head.bias.fill_(5.0)
        h = torch.tensor([[100.0, 100.0001]])
        expected = h.double() @ head.weight.T.double() + 5
        with torch.autocast("cpu", torch.bfloat16):
            got = Encoder(backbone, head)(h)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(expected.item(), abs=0.1)


def test_a_head_is_read_back_and_the_backbone_alone_has_none(run, trained):
    x, encoder, backbone = images(), load(run), load(run, head=False)
    assert isinstance(encoder, Encoder) and not isinstance(backbone, Encoder)
    with torch.no_grad():
        assert torch.equal(backbone(x), load(trained)(x))
        assert torch.allclose(encoder(x), encoder.head(backbone(x)))
    assert encoder.dim == 12 and encoder.transform == backbone.transform
    names = set(torch.nn.Module.state_dict(backbone))
    assert set(encoders.load_weights(run / "backbone.safetensors")) == names
    assert set(encoders.load_weights(run / HEAD_FILE)) == {"head.weight", "head.bias"}


def test_a_second_branch_is_read_back(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "run")
    backbone, patches = load(path), StandIn()
    encoder = Encoder(
        backbone, random_linear(backbone.dim, 7), patches, random_linear(patches.dim, 9)
    )
    Run(path).write_head(encoder, patches=PATCHES)
    with torch.no_grad():
        assert torch.equal(load(path)(images()), encoder.eval()(images()))
    assert load(path).dim == 16


def test_finishing_a_run_again_deletes_the_head_of_the_old_backbone(run):
    Run(run).finish(load(run, head=False).state_dict(), {"verdict": "healthy", "steps": 1})
    assert not isinstance(load(run), Encoder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), "cannot be used"),
        (lambda p: p.write_bytes(p.read_bytes()[:-4] + b"flip"), "do not match their checksum"),
        (lambda p: p.write_bytes(b""), "cannot be used"),
    ],
)
def test_a_damaged_head_is_one_line(run, damage, reason, capsys):
    damage(run / HEAD_FILE)
    out = str(run.parent / "e.parquet")
    for verb in (["embed", str(run), "--out", out], ["evaluate", str(run), "--protocol", "knn"]):
        assert main(verb) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and f"{run / HEAD_FILE} cannot be used" in error
        assert reason in error and "delete it to use the backbone alone" in error


def test_a_head_of_other_weights_is_refused(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    with torch.no_grad():
        backbone = load(other, head=False)
        backbone.bn1.bias[0] += 1
    Run(other).finish(backbone.state_dict(), {"verdict": "healthy", "steps": 1})
    shutil.copy(run / HEAD_FILE, other)
    with pytest.raises(simsiam.UsageError, match="fitted for other weights of the backbone"):
        load(other)


def test_each_frozen_protocol_adds_a_record_with_the_head(run, trained, monkeypatch, capsys):
    from simsiam.evaluation import protocol_linear

    monkeypatch.setattr(protocol_linear, "MIN_STEPS", 2)
    settings = {"labels": ("1",), "draws": 1, "linear_epochs": 1, "baselines": False, "limit": 40}
    settings |= {"device": "cpu", "precision": "float32"}
    without = evaluate(trained, **settings)
    records = evaluate(run, **settings)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    times = {"measured", "seconds"}

    def timeless(record):
        return {k: v for k, v in record.items() if k not in times}

    h = [timeless(r) for r in records if r["features"] == "h"]
    assert h == [timeless(r) for r in without]
    mapped = [r for r in records if r["features"] == "h after the map"]
    assert [r["protocol"] for r in mapped] == [r["protocol"] for r in h]
    assert all(timeless(r).keys() == s.keys() for r, s in zip(mapped, h, strict=True))


def test_the_record_with_the_head_is_that_of_the_encoder(run):
    """A head that keeps one coordinate of h only: kNN sees one number and its sign."""
    backbone, dim = load(run, head=False), load(run, head=False).dim
    head = nn.Linear(dim, 1)
    with torch.no_grad():
        head.weight.zero_(), head.bias.fill_(1.0)
    Run(run).write_head(Encoder(backbone, head))
    (h, mapped) = evaluate(run, protocols=["knn"], baselines=False, k=1, device="cpu", limit=100)
    assert mapped["features"] == "h after the map"
    assert h["top1"] > mapped["top1"], "all images are equal after this head"


def test_a_head_is_left_out_of_other_checkpoints_and_it_is_said(run, capsys):
    state = Run(run).checkpoint()
    state["model"]["backbone.bn1.bias"] += 1
    Run(run).save("epoch-0001", {k: v for k, v in state.items() if k not in ("format", "recipe")})
    settings = {"protocols": ["knn"], "baselines": False, "limit": 60, "device": "cpu"}
    assert [r["features"] for r in evaluate(run, checkpoint="epoch-0001", **settings)] == ["h"]
    assert "head.safetensors was fitted for other weights and is left out" in (
        capsys.readouterr().out
    )


def test_embeddings_are_those_of_the_encoder_and_know_its_head(run, tmp_path, capsys):
    import pyarrow.parquet as pq
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((32, 32), 50 + i).convert("RGB").save(folder / f"{i}.png")
    out = tmp_path / "e.parquet"
    simsiam.embed(run, folder, out=out, device="cpu", precision="float32")
    table, encoder = pq.read_table(out), load(run)
    with torch.no_grad():
        expected = encoder(encoder.transform(Image.open(folder / "0.png")))[0]
    assert torch.allclose(torch.tensor(table["vector"][0].as_py()), expected, atol=1e-4)
    assert "head_sha256" in json.loads(table.schema.metadata[b"simsiam"])
    query = tmp_path / "query.png"
    Image.effect_noise((32, 32), 60).convert("RGB").save(query)
    assert main(["neighbors", str(out), str(query)]) == 0
    Run(run).write_head(Encoder(encoder.backbone, random_linear(encoder.backbone.dim, 12, 9)))
    capsys.readouterr()
    assert main(["neighbors", str(out), str(query)]) == 2
    assert "has changed since" in capsys.readouterr().err


def test_fine_tuning_starts_from_the_backbone_alone(run):
    from simsiam.evaluation.finetune import build_classifier

    classifier = build_classifier(Run(run), 10, seed=0, from_scratch=False)
    assert not isinstance(classifier.backbone, Encoder)


def test_a_run_from_before_the_settings_of_preprocessing_continues(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "run")
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    state = torch.load(path / "checkpoints" / "last.pt", weights_only=True)
    for content in (recipe, state["recipe"]):
        for name in ("eval_resize", "eval_interpolation"):
            del content[name]
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    torch.save(state, path / "checkpoints" / "last.pt")
    assert Run(path).recipe == Run(trained).recipe and Run(path).checkpoint()["step"] == 3
    simsiam.resume(path)
    ours, before = (load(p, head=False).state_dict() for p in (path, trained))
    assert all(torch.equal(ours[name], before[name]) for name in before)
    assert load(path).transform == load(trained).transform
