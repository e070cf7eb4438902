# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Functions that make, copy and compare state dicts, for the tests of weights."""

import reference
import torch
from torch import nn

from vovnet_d2.layouts import LAYOUTS

# The layouts that have a name for every tensor of every published variant. The layout "osmr" has no
# names for eSE and depthwise convolutions (see test_checkpoint_osmr.py).
COMPLETE_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != "osmr")


def random_state(net: reference.Net, **options) -> dict[str, torch.Tensor]:
    """Return the state dict of reference.py in float32, as weight files have it."""
    state = reference.random_state(net, **options)
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def features(
    net: reference.Net, state: dict[str, torch.Tensor], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the features of reference.py in float64, so that comparisons can be close."""
    return reference.features(net, {name: t.double() for name, t in state.items()}, x.double())


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
