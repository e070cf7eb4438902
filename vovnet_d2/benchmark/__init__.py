# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure networks side by side, and write tables and plots of the results."""
