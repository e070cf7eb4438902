# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The classifiers of torchvision as backbones."""

import math
from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import nn
from torchvision import models

from ...errors import UserFileNotFoundError, UserValueError
from ...words import suggest
from .features import (
    FeatureBackbone,
    convert_norms,
    freeze,
    maps_on_meta,
    parameters_behind,
    stage_name,
)

_IMAGE_SIZE = (512, 512)


class TorchvisionBackbone(FeatureBackbone):
    """A network of torchvision that returns the outputs of some of its nodes."""

    def __init__(
        self,
        name: str,
        nodes: Sequence[str],
        *,
        norm: str = "BN",
        pretrained: bool = False,
        freeze_at: int = 0,
    ):
        """
        Args:
            name: the name for ``torchvision.models.get_model``, such as "shufflenet_v2_x1_0".
            nodes: the nodes to return, the finest first, by the names that
                ``torchvision.models.feature_extraction.get_graph_node_names`` gives, or parts of
                these names up to a dot. Layers that none of them needs are left out.
            norm: see :func:`convert_norms`.
            pretrained: download torchvision's default weights, except on the meta device. Images
                must be normalised as ``transforms()`` of these weights does.
            freeze_at: see :func:`freeze`.

        Raises:
            ValueError: there is no such network, node or weights, the output of a node is not a
                feature map, or two nodes have the same stride.
            FileNotFoundError: the weights cannot be downloaded.
        """
        network = _extract(_create(name, pretrained), name, nodes)
        # This comes after tracing, which cannot follow Detectron2's frozen norms.
        network = convert_norms(network, norm, nn.SyncBatchNorm.convert_sync_batchnorm)
        shapes = _shapes(network, nodes)
        freeze(
            network,
            freeze_at,
            [shape.stride or 0 for shape in shapes.values()],
            lambda maps: parameters_behind(network, _IMAGE_SIZE, 3, maps),
        )
        super().__init__(network, shapes, image_shape=(3, *_IMAGE_SIZE))


class _Nodes(nn.Module):
    """A traced network whose outputs are a list."""

    def __init__(self, graph: nn.Module):
        super().__init__()
        self.graph = graph

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(self.graph(x).values())


def _create(name: str, pretrained: bool) -> nn.Module:
    if name not in (available := models.list_models(module=models)):
        hint = suggest(name, available) or f" There are {', '.join(available)}."
        raise UserValueError(f"torchvision has no network {name!r}.{hint}")
    # torch.get_default_device() of torch 2.6 does not see `with torch.device("meta")`.
    loads = pretrained and not torch.empty(0).is_meta
    try:
        return models.get_model(name, weights="DEFAULT" if loads else None)
    except OSError as error:
        if not loads or (error.errno and not isinstance(error, ConnectionError)):
            raise  # such as a full disk
        raise UserFileNotFoundError(
            f"torchvision's weights of {name!r} are not on this machine and cannot be downloaded "
            f"({error}). Put them into the folder checkpoints of torch.hub.get_dir(), or set "
            "PRETRAINED to False and MODEL.WEIGHTS to your own file."
        ) from error


def _extract(network: nn.Module, name: str, nodes: Sequence[str]) -> nn.Module:
    # Imported here, because torch.fx takes long to import.
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    try:
        if nodes:
            return _Nodes(create_feature_extractor(network, list(nodes)))
    except ValueError as error:
        known = get_graph_node_names(network)[1]
        for node in nodes:
            if not any(other == node or other.startswith(f"{node}.") for other in known):
                hint = suggest(node, known, cutoff=0.4) or f" There are {', '.join(known)}."
                raise UserValueError(
                    f"{name} of torchvision has no node {node!r}.{hint}"
                ) from error
        raise
    raise UserValueError(
        f"NODES is empty: choose what {name} returns from "
        f"{', '.join(get_graph_node_names(network)[1])}."
    )


def _shapes(network: nn.Module, nodes: Sequence[str]) -> dict[str, ShapeSpec]:
    """Return the shapes of the feature maps of a network, from a forward pass."""
    maps, _ = maps_on_meta(network, _IMAGE_SIZE, 3)
    shapes: dict[str, ShapeSpec] = {}
    for node, output in zip(nodes, maps, strict=True):
        if output.dim() != 4 or min(output.shape[2:]) < 2:
            raise UserValueError(
                f"Node {node} gives {tuple(output.shape)}, which is no feature map: choose an "
                "earlier one."
            )
        # Without padding, feature maps are a little smaller than their stride says.
        stride = 2 ** round(math.log2(_IMAGE_SIZE[0] / output.shape[2]))
        feature = stage_name(stride)
        if feature in shapes:
            raise UserValueError(
                f"Node {node} has stride {stride}, and so has another node: choose one node for "
                "each stride."
            )
        shapes[feature] = ShapeSpec(channels=output.shape[1], stride=stride)
    return shapes
