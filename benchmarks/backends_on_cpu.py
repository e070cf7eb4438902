#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Time backbones with FPN, and whole detectors, in torch, OpenVINO and ONNX Runtime, and in INT8.

    python benchmarks/backends_on_cpu.py --work output/backends_on_cpu

All cases of a network are timed in turn on one image, with random weights. These change no time but
that of a detector's heads, which get as many proposals as the config allows. INT8 is the default of
tools/export_model.py, calibrated on two photographs. Each time is divided by that of the network in
torch, neither optimized nor compiled (eager), in the same round, and by that of the best float32
backend; the tables have the median of these ratios over all processes. On a CPU with instructions
for bfloat16, OpenVINO computes the layers of an INT8 file in it that are not quantized. Run this
from the repository's root, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tabulate import tabulate

from vovnet_d2.backends import BACKENDS, rank_backends, use_backend
from vovnet_d2.benchmark.networks import calibrate_norms, detector
from vovnet_d2.benchmark.workload import random_images
from vovnet_d2.engine.quantization import write_quantized
from vovnet_d2.export import export, select_target
from vovnet_d2.export.int8 import Quantizer
from vovnet_d2.modeling.inference import optimize_for_inference
from vovnet_d2.timing import describe_environment, ratios, time_interleaved, write_csv

Size = tuple[int, int]
Cases = dict[str, Callable[[], object]]
Times = dict[str, list[float]]

CPU = torch.device("cpu")
SIZES: list[Size] = [(480, 640), (640, 480), (448, 672), (672, 448), (416, 736), (736, 416)]
"""Heights and widths in pixels. The numbers of pixels differ by at most 2 %."""


class Network(NamedTuple):
    """A network whose cases are compared.

    Attributes:
        config: name of the config.
        whole: whether the whole detector is timed, and not only the backbone with its FPN.
        size: height and width of the image in pixels.
        stream: whether each case takes the images of :data:`SIZES` in turn.
    """

    config: str
    whole: bool = False
    size: Size = SIZES[0]
    stream: bool = False


MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_{}_FPN_3x.yaml"
RETINANET = "COCO-Detection/retinanet_{}_FPN_3x.yaml"
NETWORKS = {
    "V-39-eSE, 480×640": Network(MASK_RCNN.format("V_39_eSE")),
    "V-99-eSE, 480×640": Network(MASK_RCNN.format("V_99_eSE")),
    "V-19-slim-dw-eSE, 480×640": Network(MASK_RCNN.format("V_19_slim_dw_eSE")),
    "V-39-eSE, 800×1344": Network(MASK_RCNN.format("V_39_eSE"), size=(800, 1344)),
    "V-99-eSE, 800×1344": Network(MASK_RCNN.format("V_99_eSE"), size=(800, 1344)),
    "V-39-eSE, six sizes": Network(MASK_RCNN.format("V_39_eSE"), stream=True),
    "Mask R-CNN V-19-slim-eSE": Network(MASK_RCNN.format("V_19_slim_eSE"), whole=True),
    "Mask R-CNN V-39-eSE": Network(MASK_RCNN.format("V_39_eSE"), whole=True),
    "Mask R-CNN R-50": Network(MASK_RCNN.format("R_50"), whole=True),
    "RetinaNet V-39-eSE": Network(RETINANET.format("V_39_eSE"), whole=True),
    "RetinaNet R-50": Network(RETINANET.format("R_50"), whole=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the exported files")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--processes", type=int, default=5, help="fresh ones for each network")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each process")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/backends_on_cpu"))
    args = parser.parse_args()
    times: dict[str, list[Times]] = {name: [] for name in args.only}
    for _ in range(args.processes):
        for name in args.only:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                task = pool.submit(measure, NETWORKS[name], args.work.resolve(), args.repeats)
                times[name].append(task.result())
            print(name, summarize(times[name][-1:]), flush=True)
    write_results(args, {name: summarize(found) for name, found in times.items()})


def summarize(processes: list[Times]) -> dict[str, dict[str, float]]:
    """Return for each case its ratios to "eager" and to the best float backend, over the medians of
    the processes, and its median milliseconds."""
    rows = {}
    for case in processes[0]:
        of_eager = [median(ratios(times[case], times["eager"])) for times in processes]
        of_best = [median(ratios(times[case], best_float(times))) for times in processes]
        seconds = [value for times in processes for value in times[case]]
        rows[case] = {
            "of eager": round(median(of_eager), 3),
            "lowest": round(min(of_eager), 3),
            "highest": round(max(of_eager), 3),
            "of best float": round(median(of_best), 3),
            "ms": round(1e3 * median(seconds), 1),
            "processes": len(processes),
        }
    return rows


def best_float(times: Times) -> list[float]:
    """Return the times of the fastest backend in float32 that a user can choose by hand."""
    names = ("openvino", "onnxruntime", "compiled, frozen")
    return min((times[name] for name in names if name in times), key=median)


def write_results(args: argparse.Namespace, rows: dict[str, dict[str, dict[str, float]]]) -> None:
    protocol = describe_environment(CPU) | {
        "timing": f"{args.processes} processes, each with a round of warm-up and {args.repeats} "
        "rounds that are timed, all cases of a network in turn",
        "of eager": "median, lowest and highest of the ratios of the processes",
        "of best float": "median of the ratios of the processes to OpenVINO, ONNX Runtime or "
        "compiled, whichever was the fastest of these in the process",
        **{name: version(name) for name in ("openvino", "onnxruntime")},
    }
    lines = [
        {"network": name, "case": case, **values}
        for name, cases in rows.items()
        for case, values in cases.items()
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    write_csv(args.output / "cpu.csv", lines, protocol)
    for whole, column in product((False, True), ("of eager", "of best float")):
        chosen = {name: cases for name, cases in rows.items() if NETWORKS[name].whole == whole}
        headers = list(dict.fromkeys(case for cases in chosen.values() for case in cases))
        table = [
            [name, *(cases[case][column] if case in cases else "–" for case in headers)]
            for name, cases in chosen.items()
        ]
        print(
            tabulate(table, [f"network ({column})", *headers], tablefmt="pipe", floatfmt=".2f"),
            "\n",
        )


def measure(network: Network, work: Path, repeats: int) -> Times:
    """Time the cases of a network. Exported files are kept in ``work`` for the next process."""
    torch.manual_seed(0)
    built = detector(network.config, ["MODEL.DEVICE", "cpu"])
    model: Any = built.build().eval()
    calibrate_norms(model, random_images(2, SIZES[0], CPU))
    folder = work / Path(network.config).stem
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["VOVNET_D2_CACHE"] = str(folder)
    with torch.no_grad():
        cases = (detector_cases if network.whole else fpn_cases)(model, network, folder)
        return time_interleaved(cases, device=CPU, warmup=1, repeats=repeats)


def photographs(size: Size) -> list[torch.Tensor]:
    """Return two photographs as images in BGR, (3, height, width), from 0 to 255."""
    images = [
        np.asarray(Image.fromarray(image).resize(size[::-1]))[:, :, ::-1]
        for image in load_sample_images().images
    ]
    return [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images]


def fpn_cases(model: Any, network: Network, folder: Path) -> Cases:
    path = folder / "fpn.onnx"
    if not path.exists():
        export(select_target(model, "fpn", preprocessing=False), "onnx", path)
    int8 = quantize(path, folder / "fpn.int8.onnx", model)
    forwards: dict[str, Callable[..., object]] = {
        "eager": model.backbone,
        "torch": optimize_for_inference(model.backbone),
    }
    for backend in ("openvino", "onnxruntime"):
        files = {"": path, " INT8": int8}
        if not network.stream:
            files[" INT8 of all"] = quantize(
                path, folder / "fpn.int8_all.onnx", model, keep_float=[]
            )
        for name, file in files.items():
            precision = "int8" if name else "float32"
            forwards[backend + name] = BACKENDS[backend].load(file, CPU, precision)
    forwards["openvino bfloat16"] = BACKENDS["openvino"].load(path, CPU, "half")
    forwards["auto"] = forwards[rank_backends(model)[0]]
    sizes = SIZES if network.stream else [network.size]
    images = [preprocess(model, photographs(size)[0]) for size in sizes]
    if not network.stream:
        forwards["compiled, frozen"] = compile_frozen(model.backbone, images[0])
        return {name: partial(forward, images[0]) for name, forward in forwards.items()}
    cases: Cases = {}
    for name, forward in forwards.items():
        cases[name] = partial(call_with_each, forward, images[:1] * len(images))
        cases[f"{name}, six sizes"] = partial(call_with_each, forward, images)
    return cases


def call_with_each(forward: Callable[..., object], images: list[torch.Tensor]) -> None:
    for image in images:
        forward(image)


def compile_frozen(backbone: torch.nn.Module, image: torch.Tensor) -> Callable[..., object]:
    """Compile a backbone for one size by torch's own means, as a user would do by hand."""
    compiled = torch.compile(copy.deepcopy(backbone))
    with torch._inductor.config.patch(freezing=True):
        compiled(image)
    return compiled


def preprocess(model: Any, image: torch.Tensor) -> torch.Tensor:
    return model.preprocess_image([{"image": image}]).tensor


def quantize(path: Path, to: Path, model: Any, keep_float: list[str] | None = None) -> Path:
    """Quantize a float file on two photographs, unless this is done; ``keep_float`` None is the
    default of tools/export_model.py."""
    if not to.exists():
        quantizer = Quantizer(path, [preprocess(model, image) for image in photographs(SIZES[0])])
        write_quantized(model, quantizer, quantizer.select(keep_float), to)
    return to


def detector_cases(model: Any, network: Network, folder: Path) -> Cases:
    path = folder / "dense.onnx"
    if not path.exists():
        export(select_target(model, "dense", preprocessing=False), "onnx", path)
    int8 = quantize(path, folder / "dense.int8.onnx", model)
    detectors = {"eager": model, "torch": optimize_for_inference(model)}
    for backend in ("openvino", "onnxruntime"):
        detectors[backend] = use_backend(model, backend)
        detectors[f"{backend} INT8"] = use_backend(model, backend, int8=int8)
    detectors["openvino bfloat16"] = use_backend(model, "openvino", dtype=torch.bfloat16)
    detectors["auto"] = use_backend(model)
    inputs = [{"image": photographs(network.size)[0]}]
    return {name: partial(detector, inputs) for name, detector in detectors.items()}


if __name__ == "__main__":
    main()
