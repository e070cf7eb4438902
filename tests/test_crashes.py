# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Inputs that have crashed similar programs, each in a process with Python's faulthandler.

The process succeeds or ends with one sentence, and takes no more memory than with good data.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from engine_runs import FASTER_RCNN, MASK_RCNN, TINY
from input_kinds import INF, NAN, Data, first_file, image_ids, in_polygons, resized
from test_voc import OBJECTS, write_tree

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ADDRESS_SPACE = 16 << 30  # limits the harm of a fault; torch alone maps 5 GB
MORE_MEMORY = 300 << 20  # allowed in addition to that with good data
SECONDS = 150

GRAPHS = """
import torch
from torch.fx import symbolic_trace
from vovnet_d2 import VOVNET_SPECS, VoVNet
for training in (False, True):
    net = VoVNet("V-19-slim-eSE", norm="BN", num_classes=3, out_features=["linear"])
    net.train(training)
    image = torch.rand(2, 3, 64, 64)
    expected = net(image)["linear"]
    for graph in (symbolic_trace(net), torch.jit.script(net)):
        torch.testing.assert_close(graph(image)["linear"], expected)
"""


@dataclass(frozen=True)
class Ended:
    status: int
    output: str
    peak: int  # resident bytes

    @property
    def last_line(self) -> str:
        return self.output.strip().rpartition("\n")[2]


def run(command: list[str], folder: Path, **environment: str) -> Ended:
    """Run Python in a separate process, and return its status, output and peak memory."""
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            cwd=folder,
            preexec_fn=_limit_memory,
        )
        end = time.monotonic() + SECONDS
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > end:
                process.kill()
                os.wait4(process.pid, 0)
                pytest.fail(f"takes longer than {SECONDS} s:\n{output.read_text()[-2000:]}")
            time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)  # otherwise Popen would wait for it
    return Ended(process.returncode, output.read_text(errors="replace"), 1024 * usage.ru_maxrss)


@cache
def server() -> subprocess.Popen:
    """Return the process that forks runs of tools (see :mod:`crash_server`)."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("crash_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module", autouse=True)
def end_of_the_server() -> Iterator[None]:
    yield
    if server.cache_info().currsize:
        server().communicate()
    server.cache_clear()


def run_in_a_fork(command: list[str], folder: Path) -> Ended:
    """Run a script in a fork of the server; return its status, output and peak memory."""
    request = {"command": command, "folder": str(folder)}
    request |= {"memory": ADDRESS_SPACE, "seconds": SECONDS}
    print(json.dumps(request), file=server().stdin, flush=True)
    status, peak = json.loads(server().stdout.readline())
    output = (folder / "output.txt").read_text(errors="replace")
    assert status is not None, f"takes longer than {SECONDS} s:\n{output[-2000:]}"
    return Ended(status, output, 1024 * peak)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


def train(config: str, folder: Path, *options: str, **environment: str) -> Ended:
    command = [str(ROOT / "tools/train_net.py"), "--config-file", config]
    own = [o for o in options if o.startswith("--") or Path(o).is_absolute()]
    options = (*TINY, "SOLVER.MAX_ITER", "2", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", "out", *options)
    command += [*own, *(o for o in options if o not in own)]
    # Detectron2 reads variables of the environment when it is imported.
    return run(command, folder, **environment) if environment else run_in_a_fork(command, folder)


def train_on(data: Data, config: str, *options: str) -> Ended:
    data.write()
    words = []
    for split in ("train", "val"):
        words += [f"--{split}-json", str(data.path(split)), f"--{split}-images", str(data.images)]
    return train(config, data.folder, *words, *options)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Train on good data with each config."""
    found = {}
    for name, config in (("box", FASTER_RCNN), ("mask", MASK_RCNN)):
        found[name] = train_on(Data(tmp_path_factory.mktemp("good") / name), config)
        assert found[name].status == 0, found[name].output[-2000:]
    return found


def require(ended: Ended, limit: Ended, status: int, sentence: str) -> None:
    assert ended.status == status, ended.output[-2000:]
    for word in ("Traceback", "Fatal Python error", "Segmentation fault"):
        assert word not in ended.output, ended.output[-2000:]
    assert sentence in ended.last_line
    if status:
        assert ended.last_line.startswith("error: ")
        assert ended.output.count("error: ") == 1
    assert ended.peak < limit.peak + MORE_MEMORY


@pytest.mark.parametrize(
    "number", [NAN, INF, -1e12, 10**400], ids=["NaN", "infinity", "-1e12", "1e400"]
)
def test_a_number_of_a_polygon(tmp_path: Path, good: dict[str, Ended], number: float) -> None:
    """Train with a bad number in polygons. A NaN once took 15 GB of memory."""
    data = Data(tmp_path / "data")
    in_polygons(number)(data)
    require(train_on(data, MASK_RCNN), good["mask"], 2, "tools/check_dataset.py lists all")


def test_the_size_of_an_image(tmp_path: Path, good: dict[str, Ended]) -> None:
    """Train with a huge declared size, which masks would have. Pillow accepts the second size."""
    for side in (1_000_000, 13_000):
        data = Data(tmp_path / str(side))
        data.content["val"]["images"][0].update(width=side, height=side)
        ended = train_on(data, MASK_RCNN)
        require(ended, good["mask"], 2, "tools/check_dataset.py lists all")
        assert f"{side:g} x {side:g}" in ended.last_line


def test_ids_of_images_as_text(tmp_path: Path, good: dict[str, Ended]) -> None:
    data = Data(tmp_path / "data")
    image_ids(lambda number: f"image {number}")(data)
    require(train_on(data, FASTER_RCNN), good["box"], 0, "The report is in")


@pytest.mark.parametrize("name", ["voc_2007_trainval", "voc_2007_trainval_no_difficult"])
def test_voc_with_an_empty_element(tmp_path: Path, good: dict[str, Ended], name: str) -> None:
    folder = write_tree(tmp_path / "VOC2007", OBJECTS, "trainval") / "Annotations"
    for path in folder.glob("*.xml"):
        text = path.read_text().replace("<difficult>0</difficult>", "<difficult/>")
        path.write_text(text)
    options = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", "20"]
    ended = train(FASTER_RCNN, tmp_path, *options, DETECTRON2_DATASETS=str(tmp_path))
    require(ended, good["box"], 0, "The report is in")


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000), (1, 1)], ids=str)
def test_thin_pictures(tmp_path: Path, good: dict[str, Ended], size: tuple[int, int]) -> None:
    data = Data(tmp_path / "data")
    resized(*size)(data)
    options = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.SIZE", "[0.1, 0.1]"]
    options += ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(32,)"]
    require(train_on(data, MASK_RCNN, *options), good["mask"], 0, "The report is in")


def test_graphs_of_the_network(tmp_path: Path) -> None:
    ended = run(["-W", "ignore", "-c", GRAPHS], tmp_path)
    assert (ended.status, ended.output) == (0, "")


@pytest.mark.parametrize("damage", ["cut", "missing", "no picture"])
def test_an_error_of_a_data_worker(tmp_path: Path, good: dict[str, Ended], damage: str) -> None:
    damages: dict[str, Callable[[Path], object]] = {
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-200]),
        "missing": Path.unlink,
        "no picture": lambda path: path.write_text("404"),
    }
    data = Data(tmp_path / "data")
    first_file(damages[damage])(data)
    ended = train_on(data, FASTER_RCNN, "DATALOADER.NUM_WORKERS", "2")
    require(ended, good["box"], 2, "cannot be used: ")
