# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights: recognised, loaded and converted, from every layout that VoVNet's come in."""

from .checkpointer import VoVNetCheckpointer
from .conversion import convert_state_dict
from .metadata import InputConvention, check_input_convention
from .recognition import describe_state_dict

__all__ = [
    "InputConvention",
    "VoVNetCheckpointer",
    "check_input_convention",
    "convert_state_dict",
    "describe_state_dict",
]
