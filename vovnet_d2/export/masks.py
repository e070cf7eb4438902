# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Pasting of masks into an image, by operators that every back end has."""

import torch
import torch.nn.functional as F


def paste_masks(
    masks: torch.Tensor,
    boxes: torch.Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
) -> torch.Tensor:
    """Compute Detectron2's ``paste_masks_in_image`` as two matrix products.

    This is possible because the bilinear sampling grid is separable. Detectron2's function cannot
    be exported to ONNX: its graph has a branch for no boxes with another type.

    Args:
        masks: (N, M, M), probabilities within the boxes.
        boxes: (N, 4), x0, y0, x1, y1 in pixels of the image.
        height, width: the size of the image; tensors with one number in a trace.

    Returns:
        (N, height, width), boolean.
    """
    x0, y0, x1, y1 = boxes.unbind(1)
    rows = _bilinear_weights(y0, y1, height, masks.shape[-2])
    columns = _bilinear_weights(x0, x1, width, masks.shape[-1])
    return rows @ masks @ columns.transpose(1, 2) >= threshold


def _bilinear_weights(low: torch.Tensor, high: torch.Tensor, size: int, cells: int) -> torch.Tensor:
    """Return the weights (N, size, cells) of the cells between ``low`` and ``high`` for pixels."""
    centres = torch.arange(size, device=low.device) + 0.5
    positions = (centres - low[:, None]) / (high - low)[:, None] * cells - 0.5
    distances = positions[:, :, None] - torch.arange(cells, device=low.device)
    return F.relu(1 - distances.abs())
