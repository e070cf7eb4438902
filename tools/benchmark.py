#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Compare the speed, memory, energy and computation efficiency of networks; ``--help`` lists the
arguments."""

from vovnet_d2.benchmark.command import main

if __name__ == "__main__":
    main()
