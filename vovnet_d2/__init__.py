# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""VoVNet and VoVNetV2 as backbones for Detectron2. Importing the package registers them."""

import warnings
from typing import TYPE_CHECKING, Any

try:
    import detectron2
except ModuleNotFoundError as error:
    if error.name != "detectron2":  # Detectron2 is there; something that it needs is not
        raise
    raise ModuleNotFoundError(
        "vovnet_d2 needs Detectron2, which is not on PyPI: run `vovnet-install-detectron2`, or "
        "`python tools/install_detectron2.py` in vovnet_d2's repository."
    ) from error

with warnings.catch_warnings():
    # torch 2.15 warns twice of how Detectron2 is written, which no user of it can fix.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
    import detectron2.modeling  # noqa: F401

from .checkpoint import VoVNetCheckpointer, convert_state_dict
from .config import add_vovnet_config, get_config_file
from .modeling import fcos as _fcos  # noqa: F401 - registers FCOS
from .modeling import single_shot as _single_shot  # noqa: F401 - RefineDet, SSD
from .modeling.build import register_backbones
from .modeling.inference import optimize_for_inference
from .modeling.specs import VOVNET_SPECS, VoVNetSpec
from .modeling.vovnet import VoVNet

if TYPE_CHECKING:
    from .predictor import Predictor

__version__ = "0.1.0"

__all__ = [
    "VOVNET_SPECS",
    "Predictor",
    "VoVNet",
    "VoVNetCheckpointer",
    "VoVNetSpec",
    "add_vovnet_config",
    "convert_state_dict",
    "get_config_file",
    "optimize_for_inference",
    "register_backbones",
]


def __getattr__(name: str) -> Any:
    # What trains and evaluates stands behind it, which a user of the backbones need not wait for.
    if name == "Predictor":
        from .predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
