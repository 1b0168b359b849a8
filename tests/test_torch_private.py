"""What the package uses of PyTorch and torchvision that these do not document.

Tested with torch 2.11 and torchvision 0.26. The package allows torch 2.6 and later; whether 2.6 to
2.10 behave in the same way was not tested. If a test fails with another version, the module that it
names has to be changed.
"""

import ast
from pathlib import Path

import torch
import torchvision
from torch import nn

import simsiam

# Private names of other packages in src, with the test that holds what is relied upon.
PRIVATE_NAMES = {
    "_apply": "test_a_module_moves_what_it_holds_in_a_method_of_its_own",
    "_cdata": "test_storages_have_an_identity_on_the_meta_device",
    "_is_amx_tile_supported": "test_the_cpu_says_whether_it_is_fast_at_bfloat16",
    "_is_avx512_bf16_supported": "test_the_cpu_says_whether_it_is_fast_at_bfloat16",
    "_check_input_dim": "test_batch_norm_checks_its_input_in_a_method_of_its_own",
    "_make_layer": "test_resnet_makes_its_stages_in_a_method_of_its_own",
    "_modules": "test_submodules_are_in_one_dictionary",
    "_utils": "test_intermediate_layers_of_a_network_by_name",
    "native_batch_norm": "test_native_batch_norm_normalizes_into_given_memory",
    "native_batch_norm_backward": "test_native_batch_norm_backward_returns_the_sums",
    "batch_norm_update_stats": "test_batch_norm_update_stats_returns_mean_and_biased_variance",
}
UNDOCUMENTED = {"native_batch_norm", "native_batch_norm_backward", "batch_norm_update_stats"}
OWN_OR_PYTHON = {"_asdict", "_replace", "_exit", "_proc_member"}  # namedtuple, os, tarfile
OVERRIDDEN = {"_apply", "_check_input_dim", "_make_layer"}


def private_names(path: Path) -> set[str]:
    """Return the private or undocumented names that a file takes from other objects."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not f"{node.module}.".startswith("simsiam."):
            names |= {*str(node.module).split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.FunctionDef):
            names |= {node.name} & OVERRIDDEN
    private = {name for name in names if name.startswith("_") and not name.startswith("__")}
    return private | names & UNDOCUMENTED


def test_every_private_name_in_src_has_a_test():
    found = set().union(*map(private_names, Path(simsiam.__file__).parent.rglob("*.py")))
    assert found - OWN_OR_PYTHON == PRIVATE_NAMES.keys()
    assert all(test in globals() for test in PRIVATE_NAMES.values())


# --- distributed/sync_batch_norm.py ---------------------------------------------------------------


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance (C,) of x (n, C, h, w)."""
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


def channels_last(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last)


def test_batch_norm_update_stats_returns_mean_and_biased_variance():
    """It takes running statistics, which a momentum of 0 leaves alone."""
    x, running = channels_last(5, 3, 4, 4), torch.zeros(2, 3, dtype=torch.float64)
    mean, var = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
    torch.testing.assert_close((mean, var), moments(x), rtol=1e-12, atol=1e-14)
    assert not running.any()
    unused = torch.zeros(2, 3)
    for tensor in torch.batch_norm_update_stats(x.bfloat16(), unused[0], unused[1], 0.0):
        assert tensor.dtype == torch.float32


def test_native_batch_norm_normalizes_into_given_memory():
    x, (weight, bias) = channels_last(6, 3, 4, 4), torch.randn(2, 3, dtype=torch.float64)
    (mean, var), y = moments(x), torch.empty_like(x)
    none = mean.new_empty(0)
    half = y.chunk(2)[1]
    torch.ops.aten.native_batch_norm.out(
        x.chunk(2)[1], weight, bias, mean, var, False, 0.0, 1e-5,
        out=half, save_mean=none, save_invstd=none,
    )  # fmt: skip
    expected = nn.functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)
    torch.testing.assert_close(y[3:], expected[3:], rtol=1e-12, atol=1e-14)


def test_native_batch_norm_backward_returns_the_sums():
    """With the mean and the inverse standard deviation: the sums of g x^ and of g."""
    x, g = channels_last(5, 3, 4, 4), channels_last(5, 3, 4, 4).flip(0)
    mean, var = moments(x)
    inv_std = (var + 1e-5).rsqrt()
    _, sum_gx, sum_g = torch.ops.aten.native_batch_norm_backward(
        g, x, torch.ones_like(mean), None, None, mean, inv_std, True, 1e-5, [False, True, True]
    )
    normalized = (x - mean.view(-1, 1, 1)) * inv_std.view(-1, 1, 1)
    torch.testing.assert_close(sum_gx, (g * normalized).sum((0, 2, 3)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum_g, g.sum((0, 2, 3)), rtol=1e-10, atol=1e-12)


def test_batch_norm_checks_its_input_in_a_method_of_its_own():
    class AnyInput(nn.BatchNorm1d):
        def _check_input_dim(self, x):
            pass

    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(AnyInput(3)(x), nn.BatchNorm2d(3)(x), rtol=0, atol=0)


# --- model, training, detection -------------------------------------------------------------------


def test_storages_have_an_identity_on_the_meta_device():
    """model/memory.py counts each storage once; data_ptr is 0 for all of them there."""
    with torch.device("meta"):
        x, y = torch.empty(4, 3), torch.empty(4, 3)
    assert x.untyped_storage()._cdata == x[1:].t().untyped_storage()._cdata
    assert x.untyped_storage()._cdata != y.untyped_storage()._cdata
    assert x.untyped_storage().nbytes() == 48


def test_the_cpu_says_whether_it_is_fast_at_bfloat16():
    """model/precision.py; PyTorch documents no function for it."""
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)


def test_resnet_makes_its_stages_in_a_method_of_its_own():
    """model/backbones.py sets the width of each stage there."""
    planes = []

    class Recorder(torchvision.models.ResNet):
        def _make_layer(self, block, channels, *args, **kwargs):
            planes.append((channels, self.inplanes))
            return super()._make_layer(block, channels, *args, **kwargs)

    Recorder(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    assert planes == [(64, 64), (128, 64), (256, 128), (512, 256)]


def test_submodules_are_in_one_dictionary():
    """training/step.py replaces the backbone in a shallow copy of the model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert list(model._modules.values()) == list(model)


def test_intermediate_layers_of_a_network_by_name():
    """detection/detector.py takes the fourth stage of a ResNet."""
    from torchvision.models._utils import IntermediateLayerGetter

    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    x = torch.randn(1, 2)
    (output,) = IntermediateLayerGetter(network, {"1": "second"})(x).items()
    assert output[0] == "second" and torch.equal(output[1], network[:2](x))


def test_a_module_moves_what_it_holds_in_a_method_of_its_own():
    class Holder(nn.Module):
        moved = 0

        def _apply(self, fn, recurse=True):
            self.moved += fn(torch.ones(1)).dtype == torch.float64
            return super()._apply(fn, recurse)

    inner = Holder()
    nn.Sequential(inner).double()
    assert inner.moved == 1
