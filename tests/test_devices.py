"""What depends on the type of device, with stand-ins where there is no such device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK

import simsiam
from simsiam.errors import UsageError, WorkFailed
from simsiam.model import precision
from simsiam.model.precision import bfloat16_speedup, pick_device, pick_precision
from simsiam.runs.run_folder import Run
from simsiam.runs.weight_files import load_weights
from simsiam.training.step import GradientStep
from simsiam.utils.devices import DEVICE_TRAITS, OTHER_DEVICE, device_traits

MPS = torch.device("mps")


@pytest.fixture
def untrusted(monkeypatch):
    """The CPU as a device whose first step is compared with the CPU's."""
    monkeypatch.setitem(DEVICE_TRAITS, "cpu", DEVICE_TRAITS["cpu"]._replace(trusted=False))


def test_comparing_the_first_step_does_not_change_the_run(tmp_path, untrusted, monkeypatch):
    compared = []
    compare = GradientStep._compare_with_cpu
    monkeypatch.setattr(
        GradientStep, "_compare_with_cpu", lambda *a: compared.append(1) or compare(*a)
    )
    settings = QUICK | {"precision": "float32"}
    a = simsiam.pretrain("shapes", out=tmp_path / "a", **settings)
    assert compared == [1]  # the first step alone
    monkeypatch.undo()
    b = simsiam.pretrain("shapes", out=tmp_path / "b", **settings)
    weights = [load_weights(run / "backbone.safetensors") for run in (a, b)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0] | weights[1])


@pytest.mark.parametrize("factor", [1.01, np.nan])
def test_a_device_that_errs_stops_the_run(tmp_path, untrusted, monkeypatch, factor):
    """One weight tensor of a stand-in device gets a wrong gradient; the CPU is asked second."""
    calls, compute = [], GradientStep.compute_gradients

    def err(self, *arguments):
        output = compute(self, *arguments)
        calls.append(self)
        if len(calls) == 2:
            largest = max((p.grad for p in self.network.parameters()), key=lambda g: g.norm())
            largest *= factor
        return output

    monkeypatch.setattr(GradientStep, "compute_gradients", err)
    with pytest.raises(WorkFailed, match=r"first step on cpu differs.*--device cpu"):
        simsiam.pretrain("shapes", out=tmp_path / "run", **QUICK)
    assert not Run(tmp_path / "run").json("summary.json")


def test_apples_gpu_is_taken_where_torch_has_it_and_in_one_process_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match="'mps' cannot be used here"):  # it was tried
        pick_device("auto")
    monkeypatch.setattr(precision, "world_size", lambda: 2)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UsageError, match="one process"):
        pick_device("mps")


def test_apples_gpu_computes_in_float32_and_contiguous():
    assert pick_precision("auto", MPS) == "float32" == pick_precision("float32", MPS)
    with pytest.raises(UsageError, match="float32"):
        pick_precision("bfloat16", MPS)
    assert device_traits(MPS).memory_format == torch.contiguous_format
    assert not device_traits(MPS).trusted and device_traits(torch.device("xpu")) is OTHER_DEVICE


def test_a_cpu_without_instructions_for_bfloat16_takes_what_it_is_faster_in(monkeypatch):
    cpu = torch.device("cpu")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    for speedup, expected in ((1.2, "float32"), (2.0, "bfloat16")):
        monkeypatch.setattr(precision, "bfloat16_speedup", lambda speedup=speedup: speedup)
        assert pick_precision("auto", cpu) == expected


def test_the_speed_of_both_precisions_is_measured():
    assert 0 < bfloat16_speedup() < np.inf


def test_no_module_but_the_table_names_a_memory_format():
    """The format is wrong or slow on some devices, so it is looked up."""
    sources = Path(simsiam.__file__).parent.rglob("*.py")
    named = [path.name for path in sources if "torch.channels_last" in path.read_text("utf-8")]
    assert named == ["devices.py"]
