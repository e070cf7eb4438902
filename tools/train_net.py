#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Train and evaluate a detector from a YAML config; ``--help`` lists the arguments."""

import os

# torch reads this when it is imported: threads that wait leave the processor to other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from vovnet_d2.engine import main

if __name__ == "__main__":
    main()
