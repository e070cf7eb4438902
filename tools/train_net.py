#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Train and evaluate a detector from a YAML config; ``--help`` lists the arguments."""

from vovnet_d2.engine import main

if __name__ == "__main__":
    main()
