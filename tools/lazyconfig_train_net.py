#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Train and evaluate a detector from a LazyConfig; ``--help`` lists the arguments.

    python tools/lazyconfig_train_net.py --num-gpus 8 \\
        --config-file lazy/COCO-InstanceSegmentation/mask_rcnn_V_39_eSE_FPN_1x.py \\
        train.output_dir=output/mask_rcnn optimizer.lr=0.01
"""

import os

# torch reads this when it is imported: threads that wait leave the processor to other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from vovnet_d2.engine.lazy import main

if __name__ == "__main__":
    main()
