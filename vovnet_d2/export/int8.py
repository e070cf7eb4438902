# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Static post-training quantization of an exported network to INT8, by ONNX Runtime's tools."""

import tempfile
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserValueError
from .formats import load_onnxruntime

KEEP_FLOAT = ("stage5", "fpn_outputs", "ese")
"""The parts that stay in float by default. The last stage and the outputs of FPN lose the most
accuracy: NVIDIA's INT8 version of PETR with V-99-eSE keeps them in float16. eSE has little work."""

_PLURALS = {"fpn_outputs": "fpn_output", "fpn_laterals": "fpn_lateral"}
"""Names of groups of layers, and the beginning of the names of their layers."""

_OPERATORS = ["Conv", "Relu"]  # an activation moves into the quantized convolution before it

# TensorRT quantizes weights itself, so they stay in float before their QuantizeLinear node.
_SYMMETRIC = {
    "ActivationSymmetric": True,
    "QuantizeBias": False,
    "AddQDQPairToWeight": True,
}


class Quantizer:
    """Quantizes convolutions of an ONNX file, by ranges of values that are measured on images.

    Weights have a scale for each output channel, and activations have 8 bits and one scale. ONNX
    Runtime and OpenVINO run the QDQ form of the file in INT8. For them, activations have a zero
    point and weights have 7 bits, because the sum of two products of 8 bits does not fit into the
    16 bits of processors without VNNI.

    TensorRT needs a symmetric form: every zero point is 0, weights have 8 bits, and biases stay in
    float. ONNX Runtime and OpenVINO run this form correctly on processors with VNNI only.

    Attributes:
        layers: the names of the nodes of each layer with a convolution, by the name of the layer,
            in the order of the graph.
        symmetric: whether files get the form for TensorRT.
    """

    def __init__(self, path: Path, images: Iterable[Tensor], *, symmetric: bool = False):
        """Read an ONNX file of :class:`.targets.BackboneTarget`, in float32. The images are as the
        input of the file takes them, (N, C, H, W) each. ``symmetric`` is the form for TensorRT."""
        import onnx

        self.symmetric = symmetric
        self._model = onnx.load(path)
        self.layers: dict[str, list[str]] = {}
        for node in self._model.graph.node:
            if node.op_type == "Conv":
                self.layers.setdefault(_layer_name(node.input[1]), []).append(node.name)
        self._measure = partial(_measure_ranges, path, images, self._model.graph.input[0].name)

    @cached_property
    def _ranges(self) -> Any:
        # Measured when needed: this takes minutes, and wrong names of layers are found before.
        return self._measure()

    def select(self, keep_float: Sequence[str] | None = None) -> list[str]:
        """Return the layers to quantize: all except some groups.

        Args:
            keep_float: names of groups (``"stem"``, ``"stage2"`` to ``"stage5"``,
                ``"fpn_laterals"``, ``"fpn_outputs"``, ``"head"``, ``"ese"``), or of layers and
                modules; by default :data:`KEEP_FLOAT`, as far as the network has them.

        Raises:
            ValueError: no layer has one of these names, or no layer is left to quantize.
        """
        groups = KEEP_FLOAT if keep_float is None else keep_float
        for group in groups if keep_float is not None else ():
            if not any(_is_in(layer, group) for layer in self.layers):
                raise UserValueError(
                    f"There is no {group} in the network to be kept in float: choose from "
                    f"{', '.join(self._groups())}, or the layers that --sensitivity lists."
                )
        chosen = [name for name in self.layers if not any(_is_in(name, g) for g in groups)]
        if not chosen:
            raise UserValueError(
                f"With {', '.join(groups)} in float nothing is left to quantize: name fewer layers."
            )
        return chosen

    def _groups(self) -> list[str]:
        parts = {part for layer in self.layers for part in layer.split(".")}
        named = ["stem", *(f"stage{number}" for number in range(2, 6)), "head", "ese"]
        plurals = [g for g in _PLURALS if any(_is_in(layer, g) for layer in self.layers)]
        return [name for name in named if name in parts] + plurals

    def quantize(self, layers: Collection[str]) -> Any:
        """Return the ONNX model with some layers, keys of :attr:`layers`, quantized. Raise
        ValueError if there are no images to calibrate on."""
        from onnxruntime.quantization import QDQQuantizer, QuantType

        excluded = [
            node for name, nodes in self.layers.items() if name not in layers for node in nodes
        ]
        model = type(self._model)()
        model.CopyFrom(self._model)
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=not self.symmetric,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if self.symmetric else QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=excluded,
            op_types_to_quantize=_OPERATORS,
            extra_options=_SYMMETRIC if self.symmetric else {},
        )
        quantizer.quantize_model()
        return quantizer.model.model

    def sensitivity(self, images: Sequence[Tensor]) -> dict[str, float]:
        """Measure the error of the network on a few images if one layer is quantized, for each
        layer.

        Returns:
            for each layer the largest relative error of an output: its root mean square error
            divided by its root mean square. The worst layer comes first.
        """
        expected = _run(self._model, images)
        errors = {}
        for layer in self.layers:
            found = _run(self.quantize([layer]), images)
            errors[layer] = max(map(_relative_error, found, expected))
        return dict(sorted(errors.items(), key=lambda item: -item[1]))


class _Images:
    """Gives the images of a calibration to ONNX Runtime."""

    def __init__(self, images: Iterable[Tensor], input_name: str):
        self._images = iter(images)
        self._input_name = input_name

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next image by the name of the graph's input; None after the last."""
        image = next(self._images, None)
        return None if image is None else {self._input_name: image.cpu().numpy()}


def _measure_ranges(path: Path, images: Iterable[Tensor], input_name: str) -> Any:
    """Measure the least and the largest value of each input and output of a convolution."""
    from onnxruntime.quantization import create_calibrator

    images = iter(images)
    if (first := next(images, None)) is None:
        raise UserValueError("There are no images to calibrate on.")
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            path, _OPERATORS, augmented_model_path=str(Path(folder, "augmented.onnx"))
        )
        calibrator.collect_data(_Images(chain([first], images), input_name))
        return calibrator.compute_data()


def _run(model: Any, images: Sequence[Tensor]) -> list[Tensor]:
    """Run an ONNX model on images, and return all values of each of its outputs."""
    program = load_onnxruntime(model.SerializeToString(), torch.device("cpu"))
    outputs = zip(*(program(image) for image in images), strict=True)
    return [torch.cat([value.flatten() for value in values]) for values in outputs]


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def _layer_name(weight: str) -> str:
    """Return the name, in the detector, of the layer that a weight of the graph belongs to."""
    return weight.removeprefix("backbone.").removesuffix(".weight")


def _is_in(layer: str, group: str) -> bool:
    if layer == group or layer.startswith(f"{group}."):
        return True
    parts = layer.split(".")
    if group in _PLURALS:
        return any(part.startswith(_PLURALS[group]) for part in parts)
    return group in parts
