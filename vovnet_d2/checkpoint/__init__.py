# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Recognise, load and convert weights in every layout of VoVNet's weights."""

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
