# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detectors whose dense part runs in OpenVINO, ONNX Runtime or TensorRT, in float32 or INT8."""

from .cache import CACHE, cache_folder
from .programs import AUTO, BACKENDS, TORCH, check_backend, choose_precision
from .use import rank_backends, use_backend

__all__ = [
    "AUTO",
    "BACKENDS",
    "CACHE",
    "TORCH",
    "cache_folder",
    "check_backend",
    "choose_precision",
    "rank_backends",
    "use_backend",
]
