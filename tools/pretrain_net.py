#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Train a classifier, whose checkpoints are MODEL.WEIGHTS for detectors: on a folder of images in
ImageNet's layout, on CIFAR-10, or on the embedded digits; ``--help`` lists the arguments.

    python tools/pretrain_net.py --config-file configs/Classification/V_19_slim_eSE_digits.yaml
    python tools/pretrain_net.py --config-file configs/Classification/Base-Classification.yaml \\
        --num-gpus 8 PRETRAIN.DATA /data/imagenet MODEL.VOVNET.CONV_BODY V-39-eSE
"""

import os

# torch reads this when it is imported: threads that wait leave the processor to other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from vovnet_d2.engine.pretrain import main

if __name__ == "__main__":
    main()
