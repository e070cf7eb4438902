# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
# What vovnet_d2.engine.lazy does with the rest; beside each, the key of a YAML file.
train = dict(
    output_dir="./output",  # OUTPUT_DIR
    init_checkpoint="",  # MODEL.WEIGHTS
    max_iter="${lr_multiplier.scheduler.milestones.2}",  # SOLVER.MAX_ITER
    seed=-1,  # SEED; -1 draws one
    device="cuda",  # MODEL.DEVICE
    channels_last=None,  # MODEL.CHANNELS_LAST
    amp=dict(enabled=False, dtype="auto"),  # SOLVER.AMP
    compile=dict(enabled=False, memory_budget=1.0),  # SOLVER.COMPILE
    clip_gradients=dict(  # SOLVER.CLIP_GRADIENTS
        enabled=False, clip_type="norm", clip_value=1.0, norm_type=2.0
    ),
    accumulate=1,  # SOLVER.ACCUMULATE
    ema=0.0,  # SOLVER.EMA
    max_skipped_steps=0,  # SOLVER.MAX_SKIPPED_STEPS
    checkpointer=dict(period=5000, max_to_keep=0),  # SOLVER.CHECKPOINT_PERIOD, CHECKPOINTS_KEPT
    eval_period=10000,  # TEST.EVAL_PERIOD
    patience=0,  # TEST.PATIENCE
    backend="torch",  # TEST.BACKEND, for --eval-only
    int8="",  # TEST.INT8
    distillation=dict(teacher="", weights="", loss_weight=6.0, in_features=[]),  # DISTILLATION
    loggers=[],  # LOGGERS
)
