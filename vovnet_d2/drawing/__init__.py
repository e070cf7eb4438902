# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Draw objects and label maps on images, contact sheets, and the curves of a training."""
