#!/usr/bin/env python
# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of the readers of user files, with atheris (`pip install .[fuzz]`).

    python tests/fuzz/fuzz_readers.py annotations -max_total_time=60

The arguments after the name of the reader are those of libFuzzer. An input is a finding if the
reader hangs, or raises an error other than the errors of this package. A finding is saved in the
current folder. All other files are written to a temporary folder.
"""

import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris
import detectron2.data  # noqa: F401 (imported first, so that it is not instrumented)
import torch
from PIL import Image

# Only the readers are instrumented. Instrumenting all imported modules takes minutes.
with atheris.instrument_imports(include=["vovnet_d2.checkpoint", "vovnet_d2.data.check"]):
    from vovnet_d2.checkpoint.reading import read_checkpoint
    from vovnet_d2.data.check import Severity, Source, check_data_sets
    from vovnet_d2.data.check.files import inspect_files
    from vovnet_d2.engine.config import load_config
    from vovnet_d2.errors import UserError

FOLDER = Path(tempfile.mkdtemp())
Read = Callable[[Path], object]


def read_annotations(path: Path) -> None:
    """Check annotations without an error. A corrected copy must have no problems."""
    source = Source("fuzz", path, FOLDER / "images")
    ((checked,), _) = check_data_sets([source])
    if checked.fixed is None:
        return
    again = FOLDER / "fixed.json"
    again.write_text(json.dumps(checked.fixed))
    ((checked,), _) = check_data_sets([Source("fixed", again, FOLDER / "images")])
    problems = set(checked.findings.found(Severity.ERROR, Severity.WARNING))
    assert problems <= {"empty"}, problems


def read_image(path: Path) -> None:
    inspect_files([str(path)], "fuzz")


def good_annotations() -> bytes:
    record = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 9, 9], "area": 81}
    record |= {"iscrowd": 0, "segmentation": [[1, 2, 10, 2, 10, 11]], "keypoints": [3, 3, 2]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 24, "width": 32}],
        "categories": [{"id": 1, "name": "a", "keypoints": ["b"]}],
        "annotations": [record | {"num_keypoints": 1}],
    }
    return json.dumps(content).encode()


def good_weights() -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"stem.conv1.weight": torch.zeros(2)}}, file)
    return file.getvalue()


def good_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24)).save(file, "PNG")
    return file.getvalue()


CONFIG = b"MODEL:\n  VOVNET: {CONV_BODY: V-39-eSE, STAGE_MID_CHANNELS: [8, 8, 8, 8]}\n"
READERS: dict[str, tuple[Read, Callable[[], bytes]]] = {
    "annotations": (read_annotations, good_annotations),
    "config": (lambda path: load_config(str(path)), lambda: CONFIG),
    "weights": (lambda path: read_checkpoint(str(path), allow_pickle=True), good_weights),
    "image": (read_image, good_image),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"error: say what to fuzz: {', '.join(READERS)}.")
    read, make_good = READERS[sys.argv.pop(1)]
    (FOLDER / "images").mkdir()
    (FOLDER / "images" / "a.png").write_bytes(good_image())
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    (corpus / "good").write_bytes(make_good())
    logging.disable()

    def test_one(data: bytes) -> None:
        path = FOLDER / "input"
        path.write_bytes(data)
        with suppress(UserError):
            read(path)

    atheris.Setup([*sys.argv, str(corpus), "-timeout=20"], test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
