# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Several processes give the results of one process with the whole batch. Slurm can start them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from engine_runs import FASTER_RCNN, TINY
from fault_runs import free_port, load
from mean_loss_training import TRAINERS, parse, train
from test_averaging import EMA, check_average
from test_distillation import write_teacher

from vovnet_d2.data import build_digits

pytest_plugins = ["engine_fixtures"]

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("mean_loss_training.py")
DOCS = ROOT / "docs" / "several_machines.md"
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
    "VOVNET_D2_TIMEOUT": "120",
}
LAUNCHERS = {
    "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []),
    "detectron2": ([], ["--num-gpus", "2", "--dist-url", "auto"]),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write a small training set, and return the arguments for it."""
    root = tmp_path_factory.mktemp("data")
    build_digits(root, num_train=16, num_val=1, image_size=96, digit_size=(16, 48))
    images = root / "vovnet_d2_digits" / "train"
    annotations = root / "vovnet_d2_digits" / "annotations" / "instances_train.json"
    return ["--train-json", str(annotations), "--train-images", str(images)]


@pytest.fixture(scope="module")
def alone(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return all parameters after the training in one process, by precision."""
    folder = tmp_path_factory.mktemp("alone")
    train(parse(*files, "OUTPUT_DIR", str(folder)))
    return read_parameters(folder)


def read_parameters(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in TRAINERS:
        model = torch.load(folder / name / "model_final.pth", weights_only=True)["model"]
        assert {str(tensor.dtype) for tensor in model.values()} == {f"torch.{name}"}
        found[name] = torch.cat([tensor.double().flatten() for tensor in model.values()])
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def tolerance(alone: dict[str, torch.Tensor], name: str) -> float:
    """Return a hundred times the rounding error of the largest parameter."""
    return 100 * torch.finfo(getattr(torch, name)).eps * float(alone[name].abs().max())


NORMS = ["SOLVER.ACCUMULATE", "2", "MODEL.VOVNET.NORM", "naiveSyncBN"]


def shared_by_two(launcher: str, files: list[str], folder: Path) -> Path:
    """Return the folder of the trainings of two processes.

    Processes of torchrun train with whole batches, with batches in two parts, and with synchronised
    norms.
    """
    before, after = LAUNCHERS[launcher]
    options = ["SOLVER.ACCUMULATE", "1", "OUTPUT_DIR", str(folder / "1")]
    if launcher == "torchrun":
        options += ["THEN", "SOLVER.ACCUMULATE", "2", "OUTPUT_DIR", str(folder / "2")]
        options += ["THEN", *NORMS, "OUTPUT_DIR", str(folder / "norms")]
    command = [sys.executable, *before, str(SCRIPT), *after, *files, *options]
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def shared(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of the trainings of a launcher."""
    return cache(lambda name: shared_by_two(name, files, tmp_path_factory.mktemp(name)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "parts"), [*((launcher, 1) for launcher in LAUNCHERS), ("torchrun", 2)]
)
def test_two_processes_give_the_parameters_of_one(
    shared: Callable[[str], Path], alone: dict[str, torch.Tensor], launcher: str, parts: int
) -> None:
    """Compare two processes with one process, also if each process splits its batch.

    Only the order of sums of gradients differs. The rounding errors are smaller in float64.
    """
    folder = shared(launcher) / str(parts)
    for name in TRAINERS:
        assert "World size: 2" in (folder / name / "log.txt").read_text()
    found = read_parameters(folder)
    differences = {name: distance(found[name], alone[name]) for name in TRAINERS}
    print(f"{launcher}: {differences}")
    for name in TRAINERS:
        assert differences[name] < tolerance(alone, name)


@pytest.mark.slow
def test_half_the_batch_gives_other_parameters(
    files: list[str], alone: dict[str, torch.Tensor], tmp_path: Path, fresh_logging: None
) -> None:
    """Check that half the batch gives other parameters, as without shared gradients."""
    train(parse(*files, "SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", str(tmp_path)))
    difference = distance(read_parameters(tmp_path)["float64"], alone["float64"])
    assert difference > 100 * tolerance(alone, "float32")


def run_two(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *LAUNCHERS["torchrun"][0], *command],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_parts_with_synchronised_norms(
    files: list[str], shared: Callable[[str], Path], tmp_path: Path, fresh_logging: None
) -> None:
    """Compare two processes with one process.

    The processes share the statistics of each part, so a part has the same images as in one
    process with the whole batch.
    """
    train(parse(*files, *NORMS, "OUTPUT_DIR", str(tmp_path)))
    found, expected = (
        load(folder / "float64" / "model_final.pth")["model"]
        for folder in (shared("torchrun") / "norms", tmp_path)
    )
    for name, tensor in expected.items():
        # Detectron2's norm does not count batches, and its running variance is biased.
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.slow
def test_an_average_and_a_teacher(files: list[str], tmp_path: Path) -> None:
    """Compare the average with the checkpoints, and check the logged loss of the teacher."""
    teacher = write_teacher(tmp_path / "t", FASTER_RCNN)
    options = [*TINY, *EMA, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    script = str(ROOT / "tools" / "train_net.py")
    config = ["--config-file", FASTER_RCNN, "--teacher", *teacher]
    run_two([script, *config, *files, *options])
    check_average(tmp_path / "out", 5)
    rows = map(json.loads, (tmp_path / "out" / "metrics.json").read_text().splitlines())
    assert [0 < row["loss_distillation"] < 100 for row in rows] == [True]
    assert "World size: 2" in (tmp_path / "out" / "log.txt").read_text()


# Slurm

SRUN = """#!/bin/bash
# Stands for the srun of Slurm. Both nodes are this machine.
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""
SCONTROL = "#!/bin/bash\necho localhost\necho localhost\n"


def slurm_script() -> str:
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", DOCS.read_text(), flags=re.DOTALL)
    return script


@pytest.mark.slow
def test_the_slurm_script_of_the_docs(files: list[str], tmp_path: Path) -> None:
    """Run the lines of the page for 20 steps, on two nodes with one process each."""
    script = slurm_script()
    assert script.count("--nproc-per-node 8") == 1
    script = script.replace("--nproc-per-node 8", "--nproc-per-node 1")
    script = re.sub(r"tools/train_net\.py.*", "", script, flags=re.DOTALL)
    script += f"{SCRIPT} {' '.join(files)} OUTPUT_DIR {tmp_path / 'run'}\n"
    script = script.replace("29500", str(free_port()))
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "job.sh": script}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    search = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a[1-2]"}
    done = subprocess.run(
        ["bash", str(tmp_path / "job.sh")],
        env={**os.environ, **ENVIRONMENT, **slurm, "PATH": search},
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "World size: 2" in (tmp_path / "run" / "float32" / "log.txt").read_text()
    assert (tmp_path / "run" / "float64" / "model_final.pth").is_file()
