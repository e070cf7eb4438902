# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Training steps and inference of detectors on a device that stands for a GPU.

Targets, losses, the backward pass and the selection of boxes give the same values as on the CPU.
"""

import copy
from typing import Any

import pytest
import torch
from detector_inputs import DETECTORS, detector_config, make_it_detect, samples
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from stand_in_gpu import DEVICE, DeviceTensor, device_that_stands_for_a_gpu, move_to_device
from torch import nn


def train(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    with EventStorage():
        losses = model.train()(samples(name, labelled=True))
    sum(losses.values()).backward()
    return losses


def on_cpu(value: Any) -> torch.Tensor:
    assert value.device.type == DEVICE
    return value.content


@pytest.mark.parametrize("name", DETECTORS)
def test_training_and_inference_equal_those_on_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model = make_it_detect(build_model(detector_config(name)))
    moved = move_to_device(copy.deepcopy(model))
    losses = train(name, model)
    with device_that_stands_for_a_gpu():
        losses_on_device = train(name, moved)
    assert losses_on_device.keys() == losses.keys()
    for key, loss in losses.items():
        torch.testing.assert_close(on_cpu(losses_on_device[key]), loss)
    for (key, parameter), found in zip(model.named_parameters(), moved.parameters(), strict=True):
        assert (found.grad is None) == (parameter.grad is None), key
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(
                on_cpu(found.grad), parameter.grad, rtol=1e-3, atol=1e-4 * scale, msg=key
            )

    with torch.no_grad():
        expected = model.eval()(samples(name, labelled=False))
        with device_that_stands_for_a_gpu():
            outputs = moved.eval()(samples(name, labelled=False))
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.keys() == wanted.keys()
        found_tensors = _tensors(output)
        for key, value in _tensors(wanted).items():
            found_value = on_cpu(found_tensors[key])
            if value.dtype == torch.bool:  # masks; another function pastes them on a GPU
                assert (found_value != value).double().mean() < 1e-3, key
            else:
                torch.testing.assert_close(found_value, value, rtol=1e-3, atol=1e-3, msg=key)


def _tensors(output: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in output.items():
        if isinstance(value, Instances):
            for key, field in value.get_fields().items():
                found[key] = getattr(field, "tensor", field)
        else:
            found[name] = value[0] if isinstance(value, tuple) else value
    return found


def test_a_tensor_that_stays_on_the_cpu_is_noticed() -> None:
    x = DeviceTensor(torch.ones(2))
    with device_that_stands_for_a_gpu():
        assert (x * torch.tensor(3.0)).content.tolist() == [3, 3]
        assert torch.tensor([4.0], device=x.device).content.item() == 4
        assert (x + torch.ones(2, device=DEVICE)).sum().item() == 4
        with pytest.raises(AssertionError, match="on the CPU and on another device"):
            x + torch.ones(2)
        with pytest.raises(AssertionError, match="on the CPU and indices on another device"):
            torch.ones(2)[DeviceTensor(torch.tensor([0]))]
        with pytest.raises((TypeError, RuntimeError)):
            x.numpy()
