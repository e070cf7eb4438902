#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Time backbones with FPN, and whole detectors, in torch, OpenVINO and ONNX Runtime, and in INT8.

    python benchmarks/backends_on_cpu.py --fpn V_39_eSE V_19_slim_dw_eSE --detector V_19_slim_eSE

Every case of a network is timed in turn, on one image of 480×640, with random weights, which change
no time but that of a detector's heads, by the number of boxes. INT8 is the default of
tools/export_model.py, calibrated on two photographs. Each time is divided by that of the network
itself in the same round; the table has the median of these ratios.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import numpy as np
import onnx
import torch
from detectron2.modeling import build_model
from PIL import Image
from sklearn.datasets import load_sample_images

from vovnet_d2.backends import BACKENDS, use_backend
from vovnet_d2.backends.cache import model_key
from vovnet_d2.backends.quantized import mark_quantized
from vovnet_d2.benchmark.protocol import (
    describe_environment,
    ratios,
    time_interleaved,
    write_csv,
)
from vovnet_d2.engine import load_config
from vovnet_d2.export import export, select_target
from vovnet_d2.export.int8 import Quantizer
from vovnet_d2.modeling.inference import optimize_for_inference

SIZE = (480, 640)
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fpn", nargs="*", default=[], metavar="VARIANT")
    parser.add_argument("--detector", nargs="*", default=[], metavar="VARIANT")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default="benchmarks/backends_on_cpu/cpu.csv")
    args = parser.parse_args()
    rows = []
    for kind, build, names in (
        ("FPN", fpn_cases, args.fpn),
        ("Mask R-CNN", detector_cases, args.detector),
    ):
        for name in names:
            torch.manual_seed(0)
            options = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
            config = f"COCO-InstanceSegmentation/mask_rcnn_{name}_FPN_3x.yaml"
            model = build_model(load_config(config, options)).eval()
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                cases = build(model, Path(folder))
                times = time_interleaved(cases, device=CPU, warmup=3, repeats=args.repeats)
            for case, values in times.items():
                row = {
                    "network": f"{name} {kind}",
                    "case": case,
                    "ms": round(1e3 * median(values), 1),
                    "of eager": round(median(ratios(values, times["eager"])), 3),
                }
                rows.append(row)
                print(*row.values(), flush=True)
            protocol = describe_environment(CPU) | {
                "size": "1×3×{}×{}".format(*SIZE),
                "timing": f"3 rounds of warm-up, median of {args.repeats}, interleaved",
                **{name: version(name) for name in ("openvino", "onnxruntime")},
            }
            write_csv(args.output, rows, protocol)


def photographs(model: Any) -> list[torch.Tensor]:
    """Each (1, 3, 480, 640), normalised."""
    images = [
        np.asarray(Image.fromarray(image[:, :, ::-1].copy()).resize(SIZE[::-1]))
        for image in load_sample_images().images
    ]
    tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images]
    return [model.preprocess_image([{"image": image}]).tensor for image in tensors]


def fpn_cases(model: Any, folder: Path) -> dict[str, Callable[[], object]]:
    target = select_target(model, "fpn", preprocessing=False)
    path = export(target, "onnx", folder / "fpn.onnx").path
    images = photographs(model)
    quantizer = Quantizer(path, images)
    onnx.save(quantizer.quantize(quantizer.select()), folder / "int8.onnx")
    onnx.save(quantizer.quantize(quantizer.select([])), folder / "int8_all.onnx")
    optimized = optimize_for_inference(model.backbone)
    cases: dict[str, Callable[..., object]] = {"eager": model.backbone, "torch": optimized}
    for backend in ("openvino", "onnxruntime"):
        for name, file in (("", path), (" INT8", "int8.onnx"), (" INT8 all", "int8_all.onnx")):
            cases[backend + name] = BACKENDS[backend].load(folder / file, CPU)
    return {name: partial(case, images[0]) for name, case in cases.items()}


def detector_cases(model: Any, folder: Path) -> dict[str, Callable[[], object]]:
    target = select_target(model, "dense", preprocessing=False)
    quantizer = Quantizer(export(target, "onnx", folder / "dense.onnx").path, photographs(model))
    quantized = quantizer.quantize(quantizer.select())
    mark_quantized(quantized, model_key(model))
    onnx.save(quantized, folder / "int8.onnx")
    os.environ["VOVNET_D2_CACHE"] = str(folder)
    cases = {"eager": model, "torch": optimize_for_inference(model)}
    for backend in ("openvino", "onnxruntime"):
        cases[backend] = use_backend(model, backend)
        cases[f"{backend} INT8"] = use_backend(model, backend, int8=folder / "int8.onnx")
    image = torch.from_numpy(load_sample_images().images[0].transpose(2, 0, 1).copy())
    image = torch.nn.functional.interpolate(image[None].float(), SIZE)[0]
    return {name: partial(case, [{"image": image}]) for name, case in cases.items()}


if __name__ == "__main__":
    main()
