# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""The network: specs, layers, VoVNet, FPN, and the builders that Detectron2 finds by name."""
