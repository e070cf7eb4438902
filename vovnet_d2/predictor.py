# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""From images to predictions, in batches."""

from __future__ import annotations

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

from .backends import TORCH, use_backend
from .checkpoint import VoVNetCheckpointer, check_input_convention
from .data.image_file import read_image
from .data.mapper import build_augmentations
from .engine.any_config import AnyConfig, as_cfg, build_network, load_any_config
from .engine.categories import find_metadata
from .engine.checks import check_all_loaded, check_network, check_run, choose_device
from .modeling.inference import optimize_for_inference
from .tiles import TiledDetector

__all__ = ["Predictor", "read_image"]

logger = logging.getLogger(__name__)

ImageLike = np.ndarray | Image.Image | str | os.PathLike[str]
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
        model: the network, made ready for inference by the backend.
        metadata: names and colours of the categories; names are numbers where neither the
            config's data sets nor the weights tell them.
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
            config: a config with this package's keys, a YAML file, or its name among this
                package's; or a LazyConfig, loaded or as a file. Images are brought to the format
                and size that it evaluates at.
            weights: what ``MODEL.WEIGHTS`` takes, and by default the config's.
            device: to compute on, by default the config's; cpu where there is no GPU.
            output_device: where the predictions are put.
            dtype: see :func:`optimize_for_inference`; as is ``compile``. Both are torch's alone.
            backend: what runs the backbone, FPN and dense head, by default the config's
                ``TEST.BACKEND``, which is torch; see :func:`.backends.use_backend`, as for
                ``int8``, by default the config's ``TEST.INT8``.
            tiles: height and width of tiles to detect on beside the whole image, by default the
                config's ``TEST.TILES``, which are none; see :class:`.tiles.TiledDetector`.
            overlap: of the tiles, by default the config's ``TEST.TILE_OVERLAP``, which is 0.2.
            batch_size: the most images to run at once.
            allow_partial: see :class:`VoVNetCheckpointer`; as is ``allow_pickle``.

        Raises:
            FileNotFoundError: there is no such config or weights.
            KeyError: the config has a key that does not exist.
            ModuleNotFoundError: the backend needs a package that is not installed.
            ValueError: the config cannot be run, the weights do not fit or are not those of a
                whole model, an argument is out of range, or the backend cannot be used here.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if isinstance(config, str | os.PathLike):
            config = load_any_config(os.fspath(config))
        cfg = as_cfg(config)
        cfg.MODEL.WEIGHTS = os.fspath(weights) or cfg.MODEL.WEIGHTS
        cfg.MODEL.DEVICE = str(device) or cfg.MODEL.DEVICE
        cfg.TEST.BACKEND = backend or cfg.TEST.BACKEND
        cfg.TEST.INT8 = os.fspath(int8) or cfg.TEST.INT8
        cfg.TEST.TILES = cfg.TEST.TILES if tiles is None else tuple(tiles)
        cfg.TEST.TILE_OVERLAP = cfg.TEST.TILE_OVERLAP if overlap is None else overlap
        choose_device(cfg)
        if cfg.TEST.BACKEND != TORCH and (compile or dtype != torch.float32):
            raise ValueError(
                f"dtype and compile are torch's: leave them out with backend {cfg.TEST.BACKEND}."
            )
        if isinstance(config, CfgNode):
            check_network(cfg)
        check_run(cfg, training=False)
        self.cfg = cfg
        self.batch_size = batch_size
        self.output_device = torch.device(output_device)
        model, names = _load_model(
            config, cfg, allow_partial=allow_partial, allow_pickle=allow_pickle
        )
        if cfg.TEST.BACKEND == TORCH:
            self.model = optimize_for_inference(model, dtype=dtype, compile=compile)
        else:
            self.model = use_backend(model, cfg.TEST.BACKEND, int8=cfg.TEST.INT8)
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
        """
        Args:
            images: one, or several of any sizes. An image is an array (H, W, 3), uint8, BGR, as
                OpenCV reads it; grey, (H, W) or (H, W, 1); with transparency, (H, W, 4), BGRA,
                which is dropped; an image of Pillow's; or a file, see
                :func:`~vovnet_d2.data.image_file.read_image`.

        Returns:
            what the model returns for an image ("instances", "sem_seg", "panoptic_seg"), in its
            own coordinates; a list of these for several images.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: an array is not of that kind, or a file is no picture.
        """
        if isinstance(images, np.ndarray | Image.Image | str | os.PathLike):
            return self._predict([images])[0]
        if isinstance(images, torch.Tensor | dict) or not isinstance(images, Iterable):
            raise ValueError(_no_image(images))
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
        """What Detectron2's models take, from a BGR image (H, W, 3)."""
        height, width = image.shape[:2]
        rgb = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
        pixels = T.AugInput(detection_utils.convert_PIL_to_numpy(rgb, self.cfg.INPUT.FORMAT))
        self._resize(pixels)
        tensor = torch.from_numpy(pixels.image.transpose(2, 0, 1).copy())
        if tensor.dtype != torch.uint8:  # of YUV, in float64
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
        raise ValueError(_no_image(image))
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(_no_image(image))
    return image[:, :, :3]


def _from_pillow(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(
            f"The image of Pillow's has mode {image.mode}, more than 8 bits per pixel: save it to "
            "a file and give that, or convert it to mode L."
        )
    turned = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(turned)[:, :, ::-1]


def _no_image(value: object) -> str:
    kind = type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        kind = f"{kind} of {value.dtype} and shape {tuple(value.shape)}"
    message = (
        f"An image is a uint8 array (H, W, 3) of values from 0 to 255, an image of Pillow's or a "
        f"file, not {kind}"
    )
    if value is None:
        return f"{message}, which cv2.imread returns for a file that it cannot read."
    if isinstance(value, torch.Tensor):
        return f"{message}: give tensor.permute(1, 2, 0).byte().numpy() of a (C, H, W) tensor."
    if getattr(value, "ndim", 0) == 4:
        return f"{message}: give a list of several images."
    return f"{message}."


def _load_model(
    config: AnyConfig, cfg: CfgNode, *, allow_partial: bool, allow_pickle: bool
) -> tuple[torch.nn.Module, dict[str, list[str]]]:
    """The model with its weights, and the names of the categories that these tell."""
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(
            "There are no weights: set MODEL.WEIGHTS to a file (of a training, "
            "OUTPUT_DIR/model_final.pth)."
        )
    model = build_network(config, cfg)
    checkpointer = VoVNetCheckpointer(model, allow_partial=allow_partial, allow_pickle=allow_pickle)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    if not allow_partial:
        check_all_loaded(checkpointer, cfg.MODEL.WEIGHTS)
    if warning := check_input_convention(cfg, checkpointer.input_convention):
        logger.warning(warning)
    return model, checkpointer.loaded_categories


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):  # of a panoptic segmentation
        return tuple(_move(part, device) for part in value)
    return value.to(device) if hasattr(value, "to") else value
