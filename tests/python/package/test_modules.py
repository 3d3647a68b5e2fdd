"""Modules: what cannot be loaded into, or is no tensor, is said."""

from pathlib import Path
from typing import Any

import maptensors as mt
import maptensors.torch
import pytest
import torch
from support import names_in
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor


def test_a_module_on_the_meta_device_is_not_reported_as_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    source = torch.nn.Linear(3, 2)
    maptensors.torch.save_model(source, path)
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    for strict in (True, False):
        with pytest.raises(mt.MapTensorsError, match=r"'weight' and 1 more.*to_empty"):
            maptensors.torch.load_model(model, path, strict=strict)
    partly = torch.nn.Linear(3, 2)
    partly.bias = torch.nn.Parameter(partly.bias.to("meta"))
    before = partly.weight.detach().clone()
    with pytest.raises(mt.MapTensorsError, match="'bias'"):
        maptensors.torch.load_model(partly, path)
    assert torch.equal(partly.weight, before)
    model.to_empty(device="cpu")
    assert maptensors.torch.load_model(model, path) == (set(), [])
    assert torch.equal(model.weight, source.weight)


def test_buffers_on_the_meta_device_and_fake_modules_are_not_either(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    maptensors.torch.save_model(torch.nn.BatchNorm1d(3), path)
    model = torch.nn.BatchNorm1d(3)
    model.running_mean = torch.zeros(3, device="meta")
    with pytest.raises(mt.MapTensorsError, match="'running_mean'"):
        maptensors.torch.load_model(model, path)
    with FakeTensorMode():
        fake = torch.nn.BatchNorm1d(3)
    with pytest.raises(mt.MapTensorsError, match="cannot be loaded into"):
        maptensors.torch.load_model(fake, path)
    real = torch.nn.BatchNorm1d(3)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(mt.MapTensorsError, match="FakeTensorMode"),
    ):
        maptensors.torch.load_model(real, path)
    # What the file does not have is missing, and said to be.
    maptensors.torch.save_file({"weight": torch.ones(3)}, path)
    missing, _ = maptensors.torch.load_model(model, path, strict=False)
    assert "running_mean" in missing


def test_a_state_that_is_more_than_tensors_is_refused_by_name(tmp_path: Path) -> None:
    class Extra(torch.nn.Linear):
        def get_extra_state(self) -> Any:
            return {"version": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(mt.MapTensorsError, match=r"'0._extra_state'"):
        maptensors.torch.save_model(torch.nn.Sequential(Extra(2, 2)), tmp_path / "x")
    assert names_in(tmp_path) == []


def test_a_module_with_wrapped_parameters_is_refused_by_name(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight = torch.nn.Parameter(TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2)))
    for force in (True, False):
        with pytest.raises(mt.MapTensorsError, match='"weight" is a TwoTensor'):
            maptensors.torch.save_model(model, tmp_path / "x", force_contiguous=force)
