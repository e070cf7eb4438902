# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""From images to predictions, in batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data.transforms import ResizeTransform
from detectron2.modeling import build_model
from PIL import Image

from .checkpoint import VoVNetCheckpointer, check_input_convention
from .data.image_file import read_image
from .data.mapper import build_augmentations
from .engine.categories import find_metadata
from .engine.checks import check_all_loaded, check_config, choose_device
from .engine.config import load_config
from .modeling.inference import optimize_for_inference

__all__ = ["Predictor", "read_image"]

logger = logging.getLogger(__name__)

ImageLike = np.ndarray | str | os.PathLike[str]
Prediction = dict[str, Any]


class Predictor:
    """Detectron2's :class:`DefaultPredictor`, for several images at once and made fast.

    It takes whatever detector Detectron2 builds from a config. The predictions for an image are
    the same in any company: only images that are padded to the same size run together.

    ::

        predictor = Predictor("output/config.yaml", "output/model_final.pth")
        for prediction in predictor(["street.jpg", "park.jpg"]):
            print(prediction["instances"].pred_boxes)

    Attributes:
        cfg: the config, with the weights and the device that were chosen.
        model: the network, by :func:`optimize_for_inference`.
        metadata: names and colours of the categories; names are numbers where the config's data
            sets do not tell them.
    """

    def __init__(
        self,
        config: CfgNode | str | os.PathLike[str],
        weights: str | os.PathLike[str] = "",
        *,
        device: str | torch.device = "",
        output_device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        batch_size: int = 8,
        allow_partial: bool = False,
        allow_pickle: bool = False,
    ):
        """
        Args:
            config: a config with this package's keys, a YAML file, or its name among this
                package's. Images are brought to the format and size that it evaluates at.
            weights: what ``MODEL.WEIGHTS`` takes, and by default the config's.
            device: to compute on, by default the config's; cpu where there is no GPU.
            output_device: where the predictions are put.
            dtype: see :func:`optimize_for_inference`; as is ``compile``.
            batch_size: the most images to run at once.
            allow_partial: see :class:`VoVNetCheckpointer`; as is ``allow_pickle``.

        Raises:
            FileNotFoundError: there is no such config or weights.
            KeyError: the config has a key that does not exist.
            ValueError: the config cannot be run, the weights do not fit or are not those of a
                whole model, or an argument is out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        cfg = config.clone() if isinstance(config, CfgNode) else load_config(os.fspath(config))
        cfg.defrost()
        cfg.MODEL.WEIGHTS = os.fspath(weights) or cfg.MODEL.WEIGHTS
        cfg.MODEL.DEVICE = str(device) or cfg.MODEL.DEVICE
        choose_device(cfg)
        check_config(cfg, training=False)
        self.cfg = cfg
        self.batch_size = batch_size
        self.output_device = torch.device(output_device)
        model = _load_model(cfg, allow_partial=allow_partial, allow_pickle=allow_pickle)
        self.model = optimize_for_inference(model, dtype=dtype, compile=compile)
        self.metadata = find_metadata(cfg)

    @overload
    def __call__(self, images: ImageLike) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, images: Sequence[ImageLike]) -> list[Prediction]: ...

    @torch.no_grad()
    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Prediction | list[Prediction]:
        """
        Args:
            images: one, or several of any sizes. An image is an array (H, W, 3), uint8, BGR, as
                OpenCV reads it, or a file, see
                :func:`~vovnet_d2.data.image_file.read_image`.

        Returns:
            what the model returns for an image ("instances", "sem_seg", "panoptic_seg"), in its
            own coordinates; a list of these for several images.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an array is not of that kind, or a file is no picture.
        """
        if isinstance(images, np.ndarray | str | os.PathLike):
            return self._predict([images])[0]
        chunks = range(0, len(images), self.batch_size)
        return [p for i in chunks for p in self._predict(images[i : i + self.batch_size])]

    def _predict(self, images: Sequence[ImageLike]) -> list[Prediction]:
        inputs = [self._to_input(_to_array(image)) for image in images]
        together: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(inputs):
            together.setdefault(self._padded_size(image["image"]), []).append(index)
        predictions: dict[int, Prediction] = {}
        for indices in together.values():
            outputs = self.model([inputs[index] for index in indices])
            for index, output in zip(indices, outputs, strict=True):
                predictions[index] = {k: _move(v, self.output_device) for k, v in output.items()}
        return [predictions[index] for index in range(len(inputs))]

    def _to_input(self, image: np.ndarray) -> dict[str, Any]:
        """What Detectron2's models take, from a BGR image (H, W, 3)."""
        height, width = image.shape[:2]
        rgb = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
        pixels = self._resize(detection_utils.convert_PIL_to_numpy(rgb, self.cfg.INPUT.FORMAT))
        tensor = torch.from_numpy(pixels.astype("float32").transpose(2, 0, 1).copy())
        return {"image": tensor, "height": height, "width": width}

    def _resize(self, image: np.ndarray) -> np.ndarray:
        for augmentation in build_augmentations(self.cfg, is_train=False):
            transform = augmentation.get_transform(image)
            if isinstance(transform, ResizeTransform):
                # Of an image that is a thin line, a pixel of width is left.
                transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
            image = transform.apply_image(image)
        return image

    def _padded_size(self, image: torch.Tensor) -> tuple[int, int]:
        backbone = getattr(self.model, "backbone", None)
        divisor = max(1, getattr(backbone, "size_divisibility", 1))
        height, width = (-(-side // divisor) * divisor for side in image.shape[1:])
        return height, width


def _to_array(image: ImageLike) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    kind = f"{image.dtype} of shape {image.shape}" if hasattr(image, "dtype") else type(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"An image is a uint8 array (H, W, 3) or a file, not {kind}.")
    if image.shape[2] != 3 or not image.size:
        raise ValueError(f"An image is an array (H, W, 3) with pixels in it, not {kind}.")
    return image


def _load_model(cfg: CfgNode, *, allow_partial: bool, allow_pickle: bool) -> torch.nn.Module:
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "There are no weights: set MODEL.WEIGHTS to a file (of a training, "
            "OUTPUT_DIR/model_final.pth)."
        )
    model = build_model(cfg)
    checkpointer = VoVNetCheckpointer(model, allow_partial=allow_partial, allow_pickle=allow_pickle)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    if not allow_partial:
        check_all_loaded(checkpointer, cfg.MODEL.WEIGHTS)
    if warning := check_input_convention(cfg, checkpointer.input_convention):
        logger.warning(warning)
    return model


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):  # of a panoptic segmentation
        return tuple(_move(part, device) for part in value)
    return value.to(device) if hasattr(value, "to") else value
