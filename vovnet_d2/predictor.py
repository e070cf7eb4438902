# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Predictions of a trained detector for images, in batches."""

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image, ImageOps

from .backends import AUTO, TORCH, check_backend, use_backend
from .data.image_file import read_image
from .data.mapper import build_augmentations
from .engine.any_config import AnyConfig, as_cfg, load_any_config, load_network
from .engine.categories import find_metadata
from .engine.devices import choose_device
from .engine.run_checks import check_network, check_run
from .errors import UserValueError
from .modeling.inference import optimize_for_inference
from .tiles import TiledDetector

logger = logging.getLogger(__name__)

ImageLike = np.ndarray | Image.Image | str | os.PathLike[str]
Prediction = dict[str, Any]


class Predictor:
    """A faster :class:`DefaultPredictor` of Detectron2 for several images at once.

    It takes any detector that Detectron2 builds from a config. The predictions for an image do not
    depend on the other images: only images that are padded to the same size run together.

    ::

        predictor = Predictor("output/config.yaml", "output/model_final.pth")
        for prediction in predictor(["street.jpg", "park.jpg"]):
            print(prediction["instances"].pred_boxes)

    Attributes:
        cfg: the config, with the weights and the device that were chosen.
        model: the network, made ready for inference by the backend.
        metadata: names and colours of the categories. Names are numbers if neither the data sets of
            the config nor the weights have them.
    """

    def __init__(
        self,
        config: AnyConfig | str | os.PathLike[str],
        weights: str | os.PathLike[str] = "",
        *,
        device: str | torch.device = "",
        output_device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        backend: str = "",
        int8: str | os.PathLike[str] = "",
        tiles: Sequence[int] | None = None,
        overlap: float | None = None,
        batch_size: int = 8,
        allow_partial: bool = False,
        allow_pickle: bool = False,
    ):
        """
        Args:
            config: a config with the keys of this package, a YAML file, the name of a config of
                this package, or a LazyConfig, loaded or as a file. Images get the format and the
                size of its evaluation.
            weights: a value for ``MODEL.WEIGHTS``; by default the value of the config.
            device: the device to compute on; by default ``MODEL.DEVICE``, or cpu without a GPU.
            output_device: the device of the predictions.
            dtype: see :func:`.backends.use_backend`.
            compile: see :func:`optimize_for_inference`. Only the backend torch compiles.
            backend: the program that runs backbone, FPN and dense head; by default
                ``TEST.BACKEND``. See :func:`.backends.use_backend`.
            int8: a quantized file for the backend, which then is ``"auto"`` by default; by default
                ``TEST.INT8``.
            tiles: height and width of tiles to detect on, in addition to the whole image; by
                default ``TEST.TILES``. See :class:`.tiles.TiledDetector`.
            overlap: the overlap of the tiles; by default ``TEST.TILE_OVERLAP``, which is 0.2.
            batch_size: the largest number of images to run at once.
            allow_partial, allow_pickle: see :class:`VoVNetCheckpointer`.

        Raises:
            FileNotFoundError: there is no such config or weights.
            KeyError: the config has a key that does not exist.
            ModuleNotFoundError: the backend needs a package that is not installed.
            ValueError: the config cannot be run, the weights do not fit or lack a part of the
                model, an argument is out of range, or the backend cannot be used here.
        """
        if batch_size < 1:
            raise UserValueError(f"batch_size must be at least 1, not {batch_size}.")
        if isinstance(config, str | os.PathLike):
            config = load_any_config(os.fspath(config))
        cfg = as_cfg(config)
        cfg.MODEL.WEIGHTS = os.fspath(weights) or cfg.MODEL.WEIGHTS
        cfg.MODEL.DEVICE = str(device) or cfg.MODEL.DEVICE
        if int8 and TORCH == cfg.TEST.BACKEND:  # torch does not run INT8
            cfg.TEST.BACKEND = AUTO
        cfg.TEST.BACKEND = backend or cfg.TEST.BACKEND
        cfg.TEST.INT8 = os.fspath(int8) or cfg.TEST.INT8
        if tiles is not None and not isinstance(tiles, Iterable):
            raise UserValueError(f"tiles is {tiles}: give (height, width), such as (640, 640).")
        cfg.TEST.TILES = cfg.TEST.TILES if tiles is None else tuple(tiles)
        cfg.TEST.TILE_OVERLAP = cfg.TEST.TILE_OVERLAP if overlap is None else overlap
        choose_device(cfg)
        if cfg.TEST.BACKEND != TORCH and compile:
            raise UserValueError(
                "Only the backend torch can be compiled: leave out compile, or the backend "
                f"{cfg.TEST.BACKEND}."
            )
        cfg.TEST.AMP.ENABLED = False  # dtype decides
        if isinstance(config, CfgNode):
            check_network(cfg)
        check_run(cfg, training=False)
        check_backend(
            cfg.TEST.BACKEND,
            torch.device(cfg.MODEL.DEVICE),
            int8=bool(cfg.TEST.INT8),
            half=dtype != torch.float32,
        )
        self.cfg = cfg
        self.batch_size = batch_size
        self.output_device = torch.device(output_device)
        model, names = load_network(
            config, cfg, allow_partial=allow_partial, allow_pickle=allow_pickle
        )
        if cfg.TEST.BACKEND == TORCH:
            self.model = optimize_for_inference(model, dtype=dtype, compile=compile)
        else:
            self.model = use_backend(model, cfg.TEST.BACKEND, int8=cfg.TEST.INT8, dtype=dtype)
        self._resize = T.AugmentationList(build_augmentations(cfg, is_train=False))
        if cfg.TEST.TILES:
            self.model = TiledDetector(
                self.model,
                cfg.TEST.TILES,
                cfg.TEST.TILE_OVERLAP,
                resize=self._resize,
                batch_size=batch_size,
            )
            self._resize = T.AugmentationList([])  # tiles are cut from an image as it is
        self.metadata = find_metadata(cfg, names)

    @overload
    def __call__(self, images: ImageLike) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, images: Sequence[ImageLike]) -> list[Prediction]: ...

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Prediction | list[Prediction]:
        """Predict what is in one image or several.

        Args:
            images: one image, or several of any sizes. An image is a uint8 array: (H, W, 3) in BGR,
                as OpenCV reads it, (H, W) or (H, W, 1) in grey, or (H, W, 4) in BGRA, whose
                transparency is ignored. Or it is an image of Pillow, or a file for
                :func:`~vovnet_d2.data.image_file.read_image`.

        Returns:
            the output of the model for an image ("instances", "sem_seg", "panoptic_seg"), in the
            coordinates of the image; a list of outputs for several images.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an array has another shape or dtype, or a file is no picture.
        """
        if isinstance(images, np.ndarray | Image.Image | str | os.PathLike):
            return self._predict([images])[0]
        if isinstance(images, torch.Tensor | dict) or not isinstance(images, Iterable):
            raise UserValueError(_no_image(images))
        images = list(images)
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
        """Turn a BGR image (H, W, 3) into the input of Detectron2's models."""
        height, width = image.shape[:2]
        rgb = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
        pixels = T.AugInput(detection_utils.convert_PIL_to_numpy(rgb, self.cfg.INPUT.FORMAT))
        self._resize(pixels)
        tensor = torch.from_numpy(pixels.image.transpose(2, 0, 1).copy())
        if tensor.dtype != torch.uint8:  # YUV is float64
            tensor = tensor.float()
        return {"image": tensor, "height": height, "width": width}

    def _padded_size(self, image: torch.Tensor) -> tuple[int, int]:
        backbone = getattr(self.model, "backbone", None)
        divisor = max(1, getattr(backbone, "size_divisibility", 1))
        height, width = (-(-side // divisor) * divisor for side in image.shape[1:])
        return height, width


def _to_array(image: ImageLike) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or not image.size:
        raise UserValueError(_no_image(image))
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise UserValueError(_no_image(image))
    return image[:, :, :3]


def _from_pillow(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise UserValueError(
            f"The Pillow image has mode {image.mode}, with more than 8 bits per pixel: save it to "
            "a file and give the file, or convert the image to mode L."
        )
    turned = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(turned)[:, :, ::-1]


def _no_image(value: object) -> str:
    kind = type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        kind = f"{kind} of {value.dtype} and shape {tuple(value.shape)}"
    message = (
        f"An image is a uint8 array (H, W, 3) of values from 0 to 255, a Pillow image or a file, "
        f"not {kind}"
    )
    if value is None:
        return f"{message}. cv2.imread returns None for a file that it cannot read."
    if isinstance(value, torch.Tensor):
        return f"{message}: give tensor.permute(1, 2, 0).byte().numpy() of a (C, H, W) tensor."
    if getattr(value, "ndim", 0) == 4:
        return f"{message}: give a list of several images."
    return f"{message}."


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):  # a panoptic segmentation
        return tuple(_move(part, device) for part in value)
    return value.to(device) if hasattr(value, "to") else value
