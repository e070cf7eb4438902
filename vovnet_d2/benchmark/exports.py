# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Export networks for the backends, in float32 and in INT8."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ..backends import CACHE, use_backend
from ..backends.cache import export_dense_part
from ..engine.quantization import (
    CALIBRATION_IMAGES,
    CALIBRATION_SEED,
    check_evaluation,
    draw_images,
    find_images,
    preprocess,
    write_quantized,
)
from ..errors import UserValueError
from ..export.int8 import Quantizer
from .networks import Network
from .treatments import Treatment
from .workload import detector_inputs

_STRIDE = 32  # of the last feature map


class Exports:
    """Exports each network once, to files in a folder.

    INT8 is calibrated on training images of a detector that is evaluated, as
    ``tools/export_model.py --int8`` does, and on the images of the benchmark otherwise.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def use_backend(
        self, network: Network, model: nn.Module, treatment: Treatment, images: Tensor
    ) -> tuple[nn.Module, Path]:
        """Copy a network for inference, with its dense part in the backend of a treatment.

        Args:
            model: the network with its weights. It is not changed.
            images: normalised images (N, 3, H, W), on the device to compute on.

        Returns:
            the copy, which takes the same inputs, and the file that the backend has loaded.

        Raises:
            ValueError: see :func:`.backends.use_backend`.
        """
        model = copy.deepcopy(model).eval().to(images.device)
        detector: Any = model if network.is_detector else _headless(model, images)
        # These files are of random weights, so they go neither to the user's cache nor stay.
        with _cache_in(self._folder):
            path = _export(detector, images)
            if treatment.int8:
                symmetric = treatment.backend == "tensorrt"
                path = self._quantize(network, detector, path, images, symmetric=symmetric)
            int8 = path if treatment.int8 else ""
            found = use_backend(detector, treatment.backend, int8=int8, dtype=treatment.dtype)
            return found, path

    def _quantize(
        self, network: Network, model: Any, path: Path, images: Tensor, *, symmetric: bool
    ) -> Path:
        to = path.with_suffix(".symmetric.onnx" if symmetric else ".int8.onnx")
        if not to.exists():
            calibration = _calibration_images(network, model, images)
            quantizer = Quantizer(path, calibration, symmetric=symmetric)
            write_quantized(model, quantizer, quantizer.select(), to)
        return to


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Set the folder of the cache in the context."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = str(folder)
    try:
        yield
    finally:
        del os.environ[CACHE]
        if before is not None:
            os.environ[CACHE] = before


def is_evaluated(network: Network) -> bool:
    """Return whether a network has trained weights and a data set to evaluate it on."""
    cfg = network.cfg
    return network.load is not None and cfg is not None and len(cfg.DATASETS.TEST) > 0


def check_images(network: Network, *, int8: bool) -> None:
    """Check that the images for AP are there, and with ``int8`` the images for the calibration. For
    the errors see :func:`find_images`."""
    cfg: Any = network.cfg
    if is_evaluated(network) and int8:
        find_images(cfg, _training_images(cfg), CALIBRATION_IMAGES, CALIBRATION_SEED)
    elif is_evaluated(network):
        check_evaluation(cfg)


def _training_images(cfg: CfgNode) -> str:
    """Return the name of the data set to calibrate on."""
    return (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)[0]


def _calibration_images(network: Network, model: Any, images: Tensor) -> Iterator[Tensor]:
    """Yield images (1, 3, H, W) as the exported file takes them."""
    cfg: Any = network.cfg
    if is_evaluated(network):
        records = draw_images(_training_images(cfg), CALIBRATION_IMAGES, CALIBRATION_SEED)
        yield from preprocess(model, cfg, records)
    elif network.is_detector:
        for record in detector_inputs(model, images):
            yield model.preprocess_image([record]).tensor
    else:
        yield from images.split(1)


def _export(detector: Any, images: Tensor) -> Path:
    try:
        return export_dense_part(detector)[0]
    except AssertionError as error:  # of torch.export, about sizes that it cannot compare
        if _is_aligned(images):
            raise
        height, width = images.shape[-2:]
        raise UserValueError(
            f"torch.export fails for images of {height}x{width}: give --sizes of multiples of "
            f"{_STRIDE}."
        ) from error


def _headless(backbone: nn.Module, images: Tensor) -> nn.Module:
    body = _Aligned(backbone) if _is_aligned(images) else backbone
    return _Headless(body).to(images.device)


def _is_aligned(images: Tensor) -> bool:
    return all(side % _STRIDE == 0 for side in images.shape[-2:])


class _Aligned(Backbone):
    """A backbone for images whose sides are multiples of 32.

    torch.export then knows that the windows of a pooling layer fit, which it needs to know for the
    VoVNets of timm.
    """

    size_divisibility = _STRIDE

    def __init__(self, backbone: Any):
        super().__init__()
        self.body = backbone

    def output_shape(self) -> Any:
        return self.body.output_shape()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.body(images)


class _Headless(nn.Module):
    """A detector that is only a backbone. The functions for backends take detectors."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        for name, value in (("pixel_mean", 0.0), ("pixel_std", 1.0)):
            self.register_buffer(name, torch.full((3, 1, 1), value), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.backbone(images)
