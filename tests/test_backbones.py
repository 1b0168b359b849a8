"""Backbones by name: their random weights, the width of their features, the images they take."""

import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from simsiam.errors import UsageError
from simsiam.model.backbones import create_backbone, input_size, remove_classifier

TIMM = {  # width of the features, from the table of each architecture
    "timm/resnet18": 512,
    "timm/vit_tiny_patch16_224": 192,
    "timm/convnext_atto": 320,
    "timm/mobilenetv3_small_050": 1024,
}


def drawn(make) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the weights of a network made with seed 5, and the random state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = make().state_dict()
        return state, torch.get_rng_state()


def assert_same(ours, theirs):
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][k], theirs[0][k]) for k in theirs[0])
    assert torch.equal(ours[1], theirs[1])


def refusal(*args, **kwargs) -> str:
    """Return the one-line error for a network that cannot be created."""
    with pytest.raises(UsageError) as caught:
        create_backbone(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    return str(caught.value)


# --- a seed gives the weights it always gave ------------------------------------------------------


def test_a_resnet_draws_torchvisions_weights_and_then_its_stem():
    def reference():
        net = models.ResNet(BasicBlock, [1, 1, 1, 1], zero_init_residual=True)
        net.fc = nn.Identity()
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        return net

    assert_same(drawn(lambda: create_backbone("resnet10", image_size=32)), drawn(reference))


# Measured before a stem could have other than three channels. Sums and not a hash, because the last
# bits of normal random numbers differ between processors; those of the state afterwards do not.
@pytest.mark.parametrize(
    "name, kwargs, total, following",
    [
        ("resnet10", {"image_size": 32, "width": 4}, 294.1261, 0.8656758666),
        ("resnet10", {"image_size": 224, "width": 4}, 296.1305, 0.6538541913),
        ("resnet50", {"image_size": 224, "width": 4, "stem": "small"}, 2388.1556, 0.1067206860),
    ],
)
def test_initialization_is_pinned(name, kwargs, total, following):
    state, after = drawn(lambda: create_backbone(name, **kwargs))
    assert sum(v.double().sum() for v in state.values()).item() == pytest.approx(total, abs=2e-3)
    assert torch.rand(1, generator=torch.Generator().set_state(after)).item() == pytest.approx(
        following, abs=1e-7
    )


def test_finding_the_width_draws_nothing_and_moves_no_statistics():
    import timm

    for name in ("resnet18", "mobilenetv3_small_050"):
        ours = drawn(lambda name=name: create_backbone(f"timm/{name}", image_size=32))
        assert_same(ours, drawn(lambda name=name: timm.create_model(name, num_classes=0)))
    ours = drawn(lambda: create_backbone("mobilenet_v3_small", image_size=32))
    weights, after = drawn(lambda: models.mobilenet_v3_small())
    assert_same(
        ours, ({k: v for k, v in weights.items() if not k.startswith("classifier.3")}, after)
    )


def test_a_network_that_draws_on_its_way_leaves_the_stream_alone():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    noisy = Noisy(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    before = torch.get_rng_state()
    model = remove_classifier(noisy, "noisy", 8)
    assert model.dim == 3 * 8 * 8 and model.training
    assert torch.equal(torch.get_rng_state(), before)


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIMM)
def test_timm_by_name(name):
    model = create_backbone(name, image_size=48)  # not the 224 px that a ViT is made for by default
    assert model.dim == TIMM[name]
    assert all(m.training for m in model.modules())
    h = model(torch.randn(2, 3, 48, 48))
    assert h.shape == (2, model.dim)
    h.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), (
        "a classifier was left in"
    )


def test_timm_is_imported_only_for_its_own_models(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # its import fails from now on
    anew = runpy.run_path(sys.modules["simsiam.model.backbones"].__file__)
    assert anew["create_backbone"]("resnet10", image_size=32, width=4).dim == 32
    assert anew["input_size"]("vgg11") is None
    with pytest.raises(ImportError):
        anew["input_size"]("timm/resnet18")


def test_input_size_is_what_the_model_was_designed_for(monkeypatch):
    monkeypatch.setattr(nn.Module, "__init__", None)  # no network is built
    assert input_size("timm/vit_tiny_patch16_224") == 224
    assert input_size("timm/crossvit_9_240") == 240
    assert input_size("timm/vit_base_patch16_sapiens2") == 768  # of 1024 x 768
    assert input_size("resnet10") is None and input_size("mobilenet_v3_small") is None
    with pytest.raises(UsageError, match="did you mean 'timm/resnet18'"):
        input_size("timm/resnet_18")


def test_what_timm_cannot_give_is_refused_in_a_line():
    assert "did you mean 'timm/resnet18'" in refusal("timm/resnet18.a1_in1k", image_size=32)
    assert (
        refusal("timm/" + 20 * "q", image_size=32).count("timm/") == 6
    )  # the nearest five of a thousand names
    assert (
        "timm/crossvit_9_240 does not take images of 64 px (it is made for 240 px): The size"
        in refusal("timm/crossvit_9_240", image_size=64)
    )
    assert refusal("timm/halonet26t", image_size=64).endswith(
        "px): AssertionError"
    )  # timm says nothing more
    assert "(it is made for 224 px)" in refusal("timm/vit_tiny_patch16_224", image_size=8)
    assert "width and stem belong to" in refusal("timm/resnet18", image_size=32, width=16)


def test_a_model_with_no_clear_feature_output_is_refused(monkeypatch):
    import timm

    # Like timm's gemma4_vit_167m_enc, qwen3_vit_88m_enc and mobilenetv5_300m_enc, but small.
    class Encoder(nn.Conv2d):
        head_hidden_size = 4

    class Pyramid(Encoder):
        def forward(self, x):
            return [super().forward(x)]

    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Encoder(3, 4, 3))
    message = refusal("timm/mobilenetv5_300m_enc", image_size=8)
    assert message.endswith("has no clear feature output: (1, 4, 6, 6) where (1, 4) was expected")
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Pyramid(3, 4, 3))
    assert "no clear feature output: list where (1, 4)" in refusal(
        "timm/mobilenetv5_300m_enc", image_size=8
    )


# --- channels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 5, 16])
@pytest.mark.parametrize(
    "name, size, width", [("resnet10", 32, 4), ("resnet10", 96, 4), ("timm/convnext_atto", 32, 64)]
)
def test_a_stem_has_as_many_channels_as_the_images(name, size, width, channels):
    model = create_backbone(name, image_size=size, width=width, channels=channels)
    x = torch.randn(2, channels, size, size, requires_grad=True)
    h = model.eval()(x)
    assert h.shape == (2, model.dim)
    h.square().sum().backward()
    assert x.grad.abs().amax((0, 2, 3)).min() > 0, "a channel is not seen"


@pytest.mark.filterwarnings("ignore:CSATv2")
def test_channels_are_1_to_16_and_3_where_the_stem_is_fixed():
    for channels in (0, 17):
        assert "between 1 and 16" in refusal("resnet18", image_size=32, channels=channels)
    assert "mobilenet_v3_small takes 3 channels, not 4" in refusal(
        "mobilenet_v3_small", image_size=32, channels=4
    )
    assert "timm/csatv2 does not take images of 64 px with 5 channels" in refusal(
        "timm/csatv2", image_size=64, channels=5
    )


NARROW = """
import torch
from simsiam.model.backbones import create_backbone
torch.set_num_threads(2)
for width in (2, 4, 8) * 4:
    model = create_backbone("resnet10", image_size=32, width=width)
    model = model.to(memory_format=torch.channels_last)
    model(torch.randn(27, 3, 32, 32).to(memory_format=torch.channels_last)).sum().backward()
"""


def test_a_narrow_network_writes_inside_its_memory():
    """In another process, because oneDNN's bug ends it; an odd batch and two threads show it."""
    subprocess.run([sys.executable, "-c", NARROW], check=True)


def test_a_subsampled_shortcut_is_the_strided_convolution():
    model, x = (
        create_backbone("resnet10", image_size=32, width=4).double(),
        torch.randn(5, 4, 15, 15, dtype=torch.float64),
    )
    ours = model.layer2[0].downsample[0]
    assert torch.equal(ours(x), nn.functional.conv2d(x, ours.weight, stride=2))
    assert (
        type(create_backbone("resnet10", image_size=32, width=16).layer2[0].downsample[0])
        is nn.Conv2d
    )
