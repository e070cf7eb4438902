# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Pasting masks into a picture, in operators that every back end has."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["paste_masks"]


def paste_masks(
    masks: torch.Tensor,
    boxes: torch.Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
) -> torch.Tensor:
    """What Detectron2's ``paste_masks_in_image`` computes, as two matrix products: its bilinear
    sampling grid is separable. (Traced, that function loops over boxes, and its ONNX graph is
    invalid: the branch without boxes has another type.)

    Args:
        masks: (N, M, M), probabilities within the boxes.
        boxes: (N, 4), x0, y0, x1, y1 in pixels of the picture.
        height: of the picture, as is ``width``; while tracing, a tensor with one number.

    Returns:
        (N, height, width), boolean.
    """
    x0, y0, x1, y1 = boxes.unbind(1)
    rows = _bilinear_weights(y0, y1, height, masks.shape[-2])
    columns = _bilinear_weights(x0, x1, width, masks.shape[-1])
    return rows @ masks @ columns.transpose(1, 2) >= threshold


def _bilinear_weights(low: torch.Tensor, high: torch.Tensor, size: int, cells: int) -> torch.Tensor:
    """(N, size, cells): how much each cell between ``low`` and ``high`` counts for each pixel."""
    centres = torch.arange(size, device=low.device) + 0.5
    positions = (centres - low[:, None]) / (high - low)[:, None] * cells - 0.5
    distances = positions[:, :, None] - torch.arange(cells, device=low.device)
    return F.relu(1 - distances.abs())
