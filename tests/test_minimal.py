"""examples/simsiam_minimal.py computes what the package computes, and it learns."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import simsiam

PATH = Path(__file__).parents[1] / "examples" / "simsiam_minimal.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("simsiam_minimal", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loss_and_gradients_are_the_packages(minimal):
    """The same weights, copied in order, and the same views, in float64."""
    torch.manual_seed(0)
    small = minimal.SimSiam(width=16, hidden=32, d=64).double()
    method = replace(simsiam.METHODS["simsiam"], dim=64, proj_layers=2, proj_hidden=32, pred_dim=32)
    package = simsiam.build(method, backbone="resnet10", width=16, image_size=32).double()
    with torch.no_grad():
        for weight in small.parameters():  # also those that start at zero
            weight.add_(0.1 * torch.randn_like(weight))
    theirs, ours = package.state_dict(), small.state_dict()
    assert [value.shape for value in theirs.values()] == [value.shape for value in ours.values()]
    package.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))
    x1, x2 = torch.randn(2, 16, 3, 32, 32, dtype=torch.float64)
    loss, z1 = small(x1, x2)
    output = package(x1, x2)
    loss.backward()
    output.loss.backward()
    torch.testing.assert_close(loss, output.loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(z1, output.projections[0], rtol=0, atol=1e-12)
    for ours, theirs in zip(small.parameters(), package.parameters(), strict=True):
        assert ours.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_it_learns(minimal, capsys):
    """A short run on 1,000 images; kNN on 1,000 test images, compared with the start."""
    torch.manual_seed(0)
    model = minimal.SimSiam(width=8, hidden=128, d=256)
    train, test = minimal.load("train", 1000), minimal.load("test", 1000)
    before = minimal.knn_accuracy(model.backbone, train, test)
    minimal.train(model, train[0], epochs=8, batch_size=64)
    after = minimal.knn_accuracy(model.backbone, train, test)
    assert after > before + 8, (before, after)
    assert capsys.readouterr().out.count("z std") == 8
