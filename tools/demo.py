#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a detector on pictures, a video or a camera; ``--help`` lists the arguments."""

from vovnet_d2.demo import main

if __name__ == "__main__":
    main()
