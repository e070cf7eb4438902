# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the demo: its inputs, outputs and messages."""

import json
import math
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
import pytest
import sklearn.datasets
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from export_models import MASK_RCNN, build_detector, small_config
from pycocotools.coco import COCO

from vovnet_d2.demo import main
from vovnet_d2.demo.command import _argument_parser
from vovnet_d2.demo.inputs import Camera, Frame, Picture, Pictures, Video, _find_fps
from vovnet_d2.demo.outputs import PictureFiles, VideoFile, plan_pictures, refuse_overwriting
from vovnet_d2.demo.selection import Selection
from vovnet_d2.drawing.artist import Artist, Shown
from vovnet_d2.predictor import Predictor

pytest_plugins = ["engine_fixtures"]

TOOL = Path(__file__).parents[1] / "tools" / "demo.py"
PHOTO = cv2.imread(str(Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"))

SMALL = {
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 40,
    "TEST.DETECTIONS_PER_IMAGE": 10,
    "MODEL.ROI_HEADS.NUM_CLASSES": 10,
    "DATASETS.TEST": "('digits_val',)",
}
STUFF = {
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 7,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16,
    "MODEL.SEM_SEG_HEAD.NORM": "",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": 0.2,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": 100,
    "DATASETS.TEST": "()",
    "DATASETS.TRAIN": "()",
}


def save(folder: Path, **options) -> CfgNode:
    torch.manual_seed(0)  # without it, detections depend on earlier tests
    cfg = small_config(MASK_RCNN, **(SMALL | options))
    DetectionCheckpointer(build_detector(cfg), str(folder)).save("weights")
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return cfg


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    """A Mask R-CNN with the classes of the digits, which finds objects in every image."""
    return save(tmp_path_factory.mktemp("network"))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, catalogs: None) -> None:
    monkeypatch.chdir(tmp_path)


def demo(network: CfgNode, *words: object, opts: tuple[str, ...] = ()) -> int:
    config = Path(network.MODEL.WEIGHTS).with_name("config.yaml")
    with pytest.raises(SystemExit) as exit:
        main(["--config-file", str(config), *map(str, words), *(["--opts", *opts] if opts else [])])
    return exit.value.code


def patch(index: int, size: tuple[int, int] = (60, 80)) -> np.ndarray:
    """Return a part of the photograph. Each index gives another part."""
    y, x = 15 * index % 300, 23 * index % 500
    return PHOTO[y : y + size[0], x : x + size[1]]


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        cv2.imwrite(str(folder / f"{index:02d}.png"), patch(index, (60 + index % 3, 80)))


# Pictures


def test_folder_with_all_sorts_of_files(
    network: CfgNode, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path("pictures")
    write_pictures(folder, 6)
    good = sorted(path.name for path in folder.iterdir())
    (folder / "03_cut.png").write_bytes((folder / "03.png").read_bytes()[:2000])
    (folder / "05_empty.jpg").touch()
    (folder / "06_phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "labels.txt").write_text("of no interest")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / ".hidden").write_text("of no interest")
    cv2.imwrite("x.png", patch(20))
    Path("x.png").rename(folder / "without_suffix")
    assert demo(network, "--input", folder, "--output", "drawn") == 1
    drawn = sorted(path.name for path in Path("drawn").glob("[!.]*"))
    assert drawn == [*good, "without_suffix.png"]
    for name in good:
        before, after = (cv2.imread(f"{f}/{name}") for f in (folder, "drawn"))
        assert before.shape == after.shape
        assert (before != after).any()
    out, err = capsys.readouterr()
    end = r"Done: 7 of 10 images, [\d,]+ objects shown\. Not read: 3, named above\."
    assert re.fullmatch(end, out.splitlines()[-1])
    for name in ("03_cut.png", "05_empty.jpg", "06_phone.heic"):
        assert f"pictures/{name} is not a picture that can be read" in err
    assert "hidden" not in err
    assert " 10/10 " in err  # the bar also counts unreadable files
    told = "Skipped 2 files in pictures, not a picture by name or content: Thumbs.db, labels.txt."
    assert caplog.messages.count(told) == 1
    assert demo(network, "--input", folder / "labels.txt", "--output", "drawn") == 1  # now named
    assert "Traceback" not in err


def test_the_command_that_make_demo_prints_is_valid() -> None:
    recipe = (Path(__file__).parents[1] / "Makefile").read_text()
    _, command = recipe.split("To draw on a picture of yours: $(PY) tools/demo.py ")
    words = shlex.split(command.partition("\n\n")[0].replace('" \\\n\t\t"', " ").rstrip('"'))
    args = _argument_parser().parse_args(words)
    assert (args.input, args.output) == (["PICTURE"], "drawn")
    assert args.opts == ["MODEL.WEIGHTS", "output/demo/model_final.pth"]


def test_several_inputs_are_drawn(network: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(Path("pictures"), 3)
    words = ("--input", "pictures/0[01].png", "pictures", "pictures/02.png", "--output", "drawn")
    assert demo(network, *words, "--batch-size", 2, "--json", "found.json") == 0
    count = len(json.loads(Path("found.json").read_text()))
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"Done: 3 of 3 images, {count:,} objects shown."
    )


def test_config_options_without_the_word_before_them(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("MODEL.WEIGHTS a.pth", "SEED 3", "train.init_checkpoint=a.pth", "+train.seed=3")
    for words in (*options, "--outptu a"):
        with pytest.raises(SystemExit, match="2"):
            main(["--config-file", "a.yaml", "--webcam", "0", *words.split()])
        assert ("after the word --opts" in capsys.readouterr().err) is (words in options)


def test_nothing_to_draw_leaves_the_pixels(
    network: CfgNode, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(Path("pictures"), 2)
    assert demo(network, "--input", "pictures", "--output", "out", "--score-threshold", 1) == 0
    for name in ("00.png", "01.png"):
        assert np.array_equal(cv2.imread(f"pictures/{name}"), cv2.imread(f"out/{name}"))
    done, hint = capsys.readouterr().out.splitlines()[-2:]
    assert done == "Done: 2 of 2 images, 0 objects shown."
    assert "lower --score-threshold" in hint


def test_one_picture_to_one_file(network: CfgNode) -> None:
    write_pictures(Path("pictures"), 1)
    assert demo(network, "--input", "pictures/00.png", "--output", "a/b/drawn.jpg") == 0
    assert cv2.imread("a/b/drawn.jpg").shape == (60, 80, 3)


def test_folders_in_a_folder(network: CfgNode) -> None:
    Path("pictures").mkdir()
    write_pictures(Path("pictures/a"), 2)
    write_pictures(Path("pictures/b"), 1)
    write_pictures(Path("pictures/.thumbnails"), 1)
    assert demo(network, "--input", "pictures", "--output", "out") == 2
    assert demo(network, "--input", "pictures", "--recursive", "--output", "out") == 0
    found = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*.png"))
    assert found == ["a/00.png", "a/01.png", "b/00.png"]


@pytest.mark.parametrize("recursive", [False, True])
def test_pictures_are_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recursive: bool
) -> None:
    """List the files in another order than by name."""
    names = ["b.png", "c.png", "a.png"]
    for name in names:
        cv2.imwrite(str(tmp_path / name), patch(0, (20, 30)))
    files = [tmp_path / name for name in names]
    monkeypatch.setattr(Path, "rglob" if recursive else "iterdir", lambda *_: iter(files))
    assert Pictures([str(tmp_path)], recursive=recursive).files == sorted(files)


def test_a_picture_with_several_names_is_read_once() -> None:
    write_pictures(Path("pictures"), 1)
    os.symlink("pictures/00.png", "link.png")
    names = ["pictures", str(Path("pictures/00.png").absolute()), "link.png"]
    assert Pictures(names).files == [Path("pictures/00.png")]


def test_a_missing_file_among_others(network: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(Path("pictures"), 1)
    assert demo(network, "--input", "pictures", "gone*.jpg", "--output", "out") == 1
    assert "There is no file gone*.jpg." in capsys.readouterr().err


def test_a_slash_ends_a_folder_on_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sep", "\\")
    for name in ("pics/", "pics\\"):
        with pytest.raises(FileNotFoundError, match=r"^There is no folder pics.\.$"):
            Pictures([name])


@pytest.mark.parametrize("wrong", ["file/b/x.png", f"new/c/{'n' * 300}/x.png"])
def test_no_folder_is_left_if_another_cannot_be_made(wrong: str) -> None:
    Path("file").touch()
    with pytest.raises(ValueError, match=r"^The folder .* cannot be made"):
        PictureFiles([Path("new/a/x.png"), Path("new/b/x.png"), Path(wrong)])
    assert [*Path().iterdir()] == [Path("file")]


def test_names_of_results() -> None:
    names = ["a/x.png", "b/x.png", "c/x.png", "x.gif", "y.JPG", "z"]
    pictures = [Picture(Path(name), Path(Path(name).name)) for name in names]
    assert [str(path) for path in plan_pictures("out", pictures)] == [
        *("out/x.png", "out/x_2.png", "out/x_3.png"),
        *("out/x.gif.png", "out/y.JPG", "out/z.png"),
    ]


# JSON


@pytest.mark.parametrize("batch_size", [1, 3])
def test_json_has_the_output_of_the_model(network: CfgNode, batch_size: int) -> None:
    write_pictures(Path("pictures"), 4)
    Path("pictures/01_text.jpg").touch()
    words = ("--input", "pictures", "--json", "new/results.json", "--score-threshold", 0.3)
    assert demo(network, *words, "--batch-size", batch_size) == 1
    results = json.loads(Path("new/results.json").read_text())
    refuse_overwriting([Path("new/results.json")], [])  # a second run may replace the file
    peer = DefaultPredictor(network)
    for number, name in [(1, "00"), (2, "01"), (4, "02"), (5, "03")]:
        mine = [r for r in results if r["image_id"] == number]
        expected = peer(cv2.imread(f"pictures/{name}.png"))["instances"]
        expected = expected[expected.scores >= 0.3]
        assert len(mine) == len(expected) > 0
        assert {r["file_name"] for r in mine} == {f"pictures/{name}.png"}
        # The category ids of the digits count from 1.
        assert [r["category_id"] - 1 for r in mine] == expected.pred_classes.tolist()
        np.testing.assert_allclose([r["score"] for r in mine], expected.scores, rtol=1e-3)
        boxes = np.array([r["bbox"] for r in mine])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, expected.pred_boxes.tensor, atol=0.02)
        masks = np.stack([pycocotools.mask.decode(r["segmentation"]) for r in mine])
        assert (masks != expected.pred_masks.numpy()).mean() < 0.002

    truth = COCO()
    images = [{"id": n, "height": 60 + i % 3, "width": 80} for i, n in enumerate((1, 2, 4, 5))]
    categories = [{"id": n + 1, "name": str(n)} for n in range(10)]
    truth.dataset = {"info": {}, "images": images, "categories": categories, "annotations": []}
    truth.createIndex()
    loaded = truth.loadRes("new/results.json")
    assert len(loaded.getAnnIds()) == len(results)
    assert loaded.anns[1]["file_name"] == "pictures/00.png"


def test_classes(network: CfgNode) -> None:
    write_pictures(Path("pictures"), 4)

    def found(*words: object) -> list[dict]:
        words = ("--input", "pictures", "--json", "r.json", "--score-threshold", 0.1, *words)
        assert demo(network, *words, opts=("TEST.DETECTIONS_PER_IMAGE", "100")) == 0
        return json.loads(Path("r.json").read_text())

    everything = found()
    (name, *others) = sorted({str(r["category_id"] - 1) for r in everything})
    assert others
    chosen = found("--classes", name)
    assert 0 < len(chosen) < len(everything)
    assert chosen == [r for r in everything if str(r["category_id"] - 1) == name]


def test_numbers_of_an_unknown_data_set(network: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(Path("pictures"), 2)
    opts = ("DATASETS.TEST", "('mine',)", "DATASETS.TRAIN", "()")
    words = ("--input", "pictures", "--json", "r.json", "--classes", *map(str, range(10)))
    assert demo(network, *words, opts=opts) == 0
    assert {r["category_id"] for r in json.loads(Path("r.json").read_text())} <= set(range(10))
    assert caplog.text.count("mine is not registered here") == 1
    assert "mine" not in MetadataCatalog


def test_no_detections_are_an_empty_list(network: CfgNode) -> None:
    write_pictures(Path("pictures"), 1)
    words = ("--input", "pictures", "--json", "r.json", "--score-threshold", 1)
    assert demo(network, *words) == 0
    assert json.loads(Path("r.json").read_text()) == []


# Videos


def write_video(path: str, count: int = 12, size: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    """Write frames of rising brightness, so that tests can tell them apart."""
    codec = cv2.VideoWriter.fourcc(*("MJPG" if path.endswith("avi") else "mp4v"))
    # This backend can write odd sizes, but rounds the frame rate.
    backend = cv2.CAP_OPENCV_MJPEG if any(side % 2 for side in size) else cv2.CAP_ANY
    writer = cv2.VideoWriter(path, backend, codec, 12.5, size[::-1])
    base = cv2.GaussianBlur(patch(5, size), (0, 0), 2) // 4
    for index in range(count):
        writer.write(base + np.uint8(180 * index // count))
    writer.release()
    return read_video(path)


def read_video(path: str) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(path), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames


@pytest.mark.parametrize(
    ("source", "output", "codec", "fourcc"),
    [
        ("in.avi", "out.avi", (), "MJPG"),
        ("in.mp4", "out.mp4", ("--codec", "mp4v"), "FMP4"),  # the name in ffmpeg
        ("in.avi", "new/out.mkv", ("--codec", "MJPG"), "MJPG"),
        ("in.avi", "folder", ("--codec", "mp4v"), "FMP4"),
    ],
)
def test_video(
    network: CfgNode, source: str, output: str, codec: tuple[str, ...], fourcc: str
) -> None:
    before = write_video(source)
    assert len(before) == 12
    words = ("--video", source, "--output", output, *codec, "--batch-size", 5)
    assert demo(network, *words, "--score-threshold", 1) == 0
    path = "folder/in.mp4" if output == "folder" else output
    capture = cv2.VideoCapture(path)
    assert capture.get(cv2.CAP_PROP_FPS) == 12.5
    assert int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").decode() == fourcc
    refuse_overwriting([Path(path)], [])  # a second run may replace the file
    after = read_video(path)
    assert len(after) == 12
    for index, frame in enumerate(after):
        assert frame.shape == (48, 64, 3)
        errors = [np.abs(frame.astype(int) - other).mean() for other in before]
        assert np.argmin(errors) == index
        assert errors[index] < 4


@pytest.mark.parametrize("has_h264", [True, False])
def test_the_codec_is_playable_in_browsers_if_available(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_h264: bool
) -> None:
    opened = []

    class Writer:
        def __init__(self, path: str, fourcc: int, fps: float, size: tuple[int, int]):
            self.codec = fourcc.to_bytes(4, "little").decode()

        def isOpened(self) -> bool:
            return has_h264 or self.codec != "avc1"

        def write(self, pixels: np.ndarray) -> None:
            opened.append(self.codec)

        def release(self) -> None:
            pass

    fourcc = lambda *letters: int.from_bytes("".join(letters).encode(), "little")  # noqa: E731
    Writer.fourcc = staticmethod(fourcc)  # type: ignore[attr-defined]
    monkeypatch.setattr(cv2, "VideoWriter", Writer)
    with VideoFile(Path("out.mp4"), fps=9) as sink:
        sink.write(Frame(1, "", patch(0)), patch(0))
        sink.write(Frame(2, "", patch(0)), patch(0))
    assert opened == 2 * ["avc1" if has_h264 else "mp4v"]
    assert caplog.text.count("Browsers do not play it") == (not has_h264)


def test_predictions_are_drawn_on_the_right_frames(
    network: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a detector that finds objects on every third frame only."""
    before = write_video("in.avi")
    predict, seen = Predictor._predict, []

    def every_third(self: Predictor, images: list[np.ndarray]) -> list[dict]:
        (prediction,) = predict(self, images)
        seen.append(images[0])
        if len(seen) % 3:
            prediction["instances"].scores[:] = 0
        return [prediction]

    monkeypatch.setattr(Predictor, "_predict", every_third)
    assert demo(network, "--video", "in.avi", "--output", "out.avi") == 0
    for index, (a, b) in enumerate(zip(before, read_video("out.avi"), strict=True)):
        changed = np.abs(a.astype(int) - b).max()
        assert changed > 60 if index % 3 == 2 else changed < 40
    assert all(np.array_equal(a, b) for a, b in zip(seen, before, strict=True))


def test_json_of_a_video(network: CfgNode) -> None:
    write_video("in.avi", count=4)
    assert demo(network, "--video", "in.avi", "--json", "r.json") == 0
    results = json.loads(Path("r.json").read_text())
    assert {r["image_id"] for r in results} == {1, 2, 3, 4}
    assert {r["file_name"] for r in results} == {"in.avi"}


def test_odd_size(network: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    for output, (height, width) in (("out.avi", (47, 65)), ("out.mp4", (48, 65))):
        before = write_video("in.avi", count=3, size=(height, width))
        assert demo(network, "--video", "in.avi", "--output", output, "--score-threshold", 1) == 0
        for a, b in zip(before, read_video(output), strict=True):
            assert b.shape == (48, 66, 3)
            assert np.abs(a.astype(int) - b[:height, :width]).mean() < 4
    assert "the video is 66x48, not 65x47" in caplog.text


def test_truncated_video(network: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    write_video("whole.avi", count=40)
    Path("cut.avi").write_bytes(
        Path("whole.avi").read_bytes()[: Path("whole.avi").stat().st_size // 2]
    )
    readable = len(read_video("cut.avi"))
    assert 2 < readable < 30
    assert demo(network, "--video", "cut.avi", "--output", "out.avi") == 1
    assert len(read_video("out.avi")) == readable
    assert f"cut.avi ends after {readable} of the 40 frames" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "is_told"), [(30, False), (27, True)])
def test_a_video_may_be_a_second_shorter_than_announced(
    number: int, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Capture:
        def __init__(self, path: str):
            self.left = number

        def get(self, name: int) -> float:
            return {cv2.CAP_PROP_FRAME_COUNT: 40.0, cv2.CAP_PROP_FPS: 12.5}[name]

        def read(self) -> tuple[bool, np.ndarray]:
            self.left -= 1
            return self.left >= 0, GREY

        def release(self) -> None:
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    (tmp_path / "a.avi").touch()
    told: list[str] = []
    assert len(list(Video(str(tmp_path / "a.avi")).frames(told.append))) == number
    assert len(told) == is_told


def test_not_a_video(network: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.mp4").write_text("not a video")
    assert demo(network, "--video", "text.mp4", "--output", "out.avi") == 1
    out, err = capsys.readouterr()
    assert "text.mp4 is not a video that can be read." in err
    assert out.splitlines()[-1] == "Done: 0 frames. Not read: 1, named above."


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    predict, calls = Predictor._predict, []

    def interrupted(self: Predictor, images: list[np.ndarray]) -> list[dict]:
        calls.append(images)
        if len(calls) > count:
            raise KeyboardInterrupt
        return predict(self, images)

    monkeypatch.setattr(Predictor, "_predict", interrupted)


@pytest.mark.parametrize("output", ["out.avi", "out.mp4"])
def test_ctrl_c_completes_the_files(
    network: CfgNode, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video("in.avi")
    interrupt_after(4, monkeypatch)
    assert demo(network, "--video", "in.avi", "--output", output, "--json", "r.json") == 130
    assert len(read_video(output)) == 4
    assert {r["image_id"] for r in json.loads(Path("r.json").read_text())} == {1, 2, 3, 4}


# Cameras and windows


class FakeCamera:
    def __init__(self, index: int):
        self.index, self.left = index, 3

    def isOpened(self) -> bool:
        return self.index == 0

    def get(self, key: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (True, patch(self.left)) if self.left >= 0 else (False, None)

    def release(self) -> None:
        self.left = 0


def test_camera(
    network: CfgNode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as faked:
        faked.setattr(cv2, "VideoCapture", FakeCamera)
        assert demo(network, "--webcam", 0, "--output", "out", "--json", "r.json") == 1
        assert demo(network, "--webcam", 1, "--output", "out") == 2
    assert len(read_video("out/camera.mp4")) == 3
    assert {r["file_name"] for r in json.loads(Path("r.json").read_text())} == {"camera 0"}
    err = capsys.readouterr().err
    assert "camera 0 gives no more images." in err
    assert "error: Camera 1 cannot be opened" in err


def test_ctrl_c_is_the_end_of_a_camera(network: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(2, monkeypatch)
    with monkeypatch.context() as faked:
        faked.setattr(cv2, "VideoCapture", FakeCamera)
        assert demo(network, "--webcam", 0, "--output", "out.avi") == 0
    assert len(read_video("out.avi")) == 2


@pytest.mark.parametrize(("said", "taken"), [(25, 25), (0, 30), (-1, 30), (math.inf, 30)])
def test_invalid_frame_rates_become_30_per_second(said: float, taken: float) -> None:
    assert _find_fps(SimpleNamespace(get=lambda _: said)) == taken


def test_a_camera_is_released_when_its_frames_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", FakeCamera)
    camera = Camera(0)
    frames = camera.frames(print)
    next(frames)
    assert camera._capture.left == 2
    frames.close()
    assert camera._capture.left == 0


def test_no_screen(
    network: CfgNode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(Path("pictures"), 1)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert demo(network, "--input", "pictures", "--show") == 2
    monkeypatch.setenv("DISPLAY", ":99")

    def without_windows(*args: object) -> None:
        raise cv2.error("The function is not implemented.")

    monkeypatch.setattr(cv2, "namedWindow", without_windows)
    assert demo(network, "--input", "pictures", "--show") == 2
    screen, windows = capsys.readouterr().err.splitlines()
    assert screen.startswith("error: --show needs a screen")
    assert windows.startswith("error: --show needs an OpenCV that can open windows")


def test_window_closes_at_q(network: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(Path("pictures"), 4)
    shown, keys = [], [-1, ord("q")]
    monkeypatch.setenv("DISPLAY", ":99")
    for name in ("namedWindow", "destroyWindow"):
        monkeypatch.setattr(cv2, name, lambda *args: None)
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda milliseconds: keys[len(shown) - 1])
    assert demo(network, "--input", "pictures", "--show", "--output", "out") == 0
    assert len(shown) == len(list(Path("out").glob("[!.]*"))) == 2
    assert np.array_equal(cv2.imread("out/01.png"), shown[1])


# Drawing on frames


NAMES = {"thing_classes": ["cat", "Füßchen"], "thing_colors": [[250, 0, 0], [0, 0, 250]]}
GREY = np.full((120, 160, 3), 100, np.uint8)


def shown(**fields: Any) -> Shown:
    boxes = torch.tensor([[90.0, 60.0, 130.0, 100.0], [20.0, 40.0, 60.0, 80.0]])
    numbers, scores = torch.tensor([1, 0]), torch.tensor([0.5, 0.9])
    instances = Instances((120, 160), pred_boxes=Boxes(boxes), pred_classes=numbers, scores=scores)
    for name, value in fields.items():
        instances.set(name, value)
    return Shown(instances, None, None)


def changes(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return (pixels == color).all(axis=2)


def test_boxes_on_a_frame() -> None:
    drawn = Artist(Metadata(**NAMES)).draw(GREY, shown())
    for color, (x1, y1, x2, y2) in (
        ((0, 0, 250), (20, 40, 60, 80)),
        ((250, 0, 0), (90, 60, 130, 100)),
    ):
        rows, columns = np.nonzero(changes(drawn, color))
        # The label only covers a part of the upper edge.
        assert (rows.max(), columns.min(), columns.max()) == (y2, x1, x2)
        assert rows.min() in (y1, y1 + 1) or rows.min() < y1 + 25
        assert not changes(drawn, color)[y1 + 25 : y2 - 1, x1 + 2 : x2 - 1].any()
    assert (GREY == 100).all()


def test_masks_on_a_frame() -> None:
    masks = torch.zeros(2, 120, 160, dtype=torch.bool)
    masks[0, 80:100, 90:130] = True
    drawn = Artist(Metadata(**NAMES)).draw(GREY, shown(pred_masks=masks))
    mixed = np.zeros((120, 160), bool)
    mixed[80:100, 91:130] = True
    assert np.array_equal(changes(drawn, (175, 50, 50)), mixed)  # half grey, half blue


def test_names_are_written_in_any_letters() -> None:
    """Draw Cyrillic names, for which OpenCV would write question marks."""
    pictures = []
    for name in ("кошка", "?????", "кашка"):
        metadata = Metadata(**NAMES | {"thing_classes": ["cat", name]})
        pictures.append(Artist(metadata).draw(GREY, shown()))
    for i, j in ((0, 1), (0, 2)):
        assert (pictures[i] != pictures[j]).any()


def test_a_label_that_does_not_fit() -> None:
    drawn = Artist(Metadata(**NAMES)).draw(GREY[:9, :20], shown())
    assert drawn.shape == (9, 20, 3)
    assert (drawn != 100).any()


def test_keypoints_on_a_frame() -> None:
    metadata = Metadata(
        **NAMES,
        keypoint_names=["nose", "tail", "paw"],
        keypoint_connection_rules=[("nose", "tail", (10, 250, 90)), ("nose", "paw", (1, 2, 3))],
    )
    points = torch.zeros(2, 3, 3)
    points[1] = torch.tensor([[30.0, 70.0, 0.9], [50.0, 70.0, 0.9], [30.0, 50.0, 0.01]])
    drawn = Artist(metadata).draw(GREY, shown(pred_keypoints=points))
    assert changes(drawn, (90, 250, 10))[70, 35:45].all()
    assert changes(drawn, (0, 0, 255))[70, [30, 50]].all()
    assert not changes(drawn, (3, 2, 1)).any()  # one of its ends is not visible


def test_segments_and_label_maps_on_a_frame() -> None:
    stuff = {"stuff_classes": ["sky", "grass"], "stuff_colors": [[0, 250, 0], [250, 250, 0]]}
    artist = Artist(Metadata(**NAMES, **stuff))
    labels = torch.full((120, 160), 2)  # a category that is not selected
    labels[:50] = 1
    drawn = artist.draw(GREY, Shown(None, labels, None))
    assert 0.5 < changes(drawn, (50, 175, 175))[:50].mean() < 1  # the name covers the rest
    assert changes(drawn, (100, 100, 100))[50:].all()
    ids = torch.zeros(120, 160, dtype=torch.int32)
    ids[:40], ids[80:] = 1, 2
    segments = [
        {"id": 1, "isthing": False, "category_id": 0},
        {"id": 2, "isthing": True, "category_id": 0, "score": 0.9},
    ]
    drawn = artist.draw(GREY, Shown(None, None, (ids, segments)))
    assert 0.5 < changes(drawn, (50, 175, 50))[:40].mean() < 1
    assert changes(drawn, (100, 100, 100))[40:80].all()
    assert 0.5 < changes(drawn, (50, 50, 175))[80:].mean() < 1  # the label covers the rest


# Segmentation


@pytest.mark.parametrize("architecture", ["SemanticSegmentor", "PanopticFPN"])
def test_segmentation(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = save(tmp_path, **STUFF, **{"MODEL.META_ARCHITECTURE": architecture})
    write_pictures(Path("pictures"), 2)
    write_video("in.avi", count=2)
    assert demo(network, "--input", "pictures", "--output", "out") == 0
    assert demo(network, "--video", "in.avi", "--output", "out.avi") == 0
    before, after = cv2.imread("pictures/00.png"), cv2.imread("out/00.png")
    assert (before != after).any(axis=2).mean() > 0.5

    # A drawing of one category covers the pixels of the category, and almost no others.
    labels = Predictor(network)(before)["sem_seg"].argmax(dim=0)
    number = int(torch.bincount(labels.flatten(), minlength=7).argmax())
    words = ("--classes", number, "--score-threshold", 1)
    assert demo(network, "--input", "pictures/00.png", "--output", "one.png", *words) == 0
    changed = (before != cv2.imread("one.png")).any(axis=2)
    if architecture == "SemanticSegmentor":
        assert changed[(labels == number).numpy()].mean() > 0.9
        capsys.readouterr()
        assert demo(network, "--input", "pictures", "--json", "r.json") == 2
        assert "error: The network predicts no instances" in capsys.readouterr().err
    assert changed.mean() < (before != after).any(axis=2).mean()


def test_a_score_at_the_threshold_is_shown() -> None:
    scores = torch.tensor([0.5, 0.499])
    instances = Instances((9, 9), scores=scores, pred_classes=torch.zeros(2).long())
    segments = [
        {"id": 1, "isthing": True, "category_id": 0, "score": 0.5},
        {"id": 2, "isthing": True, "category_id": 0, "score": 0.499},
        {"id": 3, "isthing": False, "category_id": 0},  # stuff has no score
    ]
    prediction = {"instances": instances, "panoptic_seg": (torch.zeros(9, 9), segments)}
    found = Selection(Metadata(), min_score=0.5)(prediction)
    assert found.instances.scores.tolist() == [0.5]
    assert [segment["id"] for segment in found.panoptic[1]] == [1, 3]


# Mistakes


def test_inputs_are_never_overwritten(network: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(Path("pictures"), 2)
    write_video("in.avi", count=2)
    os.symlink("pictures", "link")
    os.link("pictures/00.png", "hard.png")
    config = Path(network.MODEL.WEIGHTS).with_name("config.yaml")
    files = [Path("in.avi"), config, Path(network.MODEL.WEIGHTS), *Path("pictures").iterdir()]
    before = {file: file.read_bytes() for file in files}
    for words in (
        ("--input", "pictures", "--output", "pictures"),
        ("--input", "pictures", "--output", "link"),
        ("--input", "pictures/00.png", "--output", "hard.png"),
        ("--input", "pictures", "--json", "pictures/01.png"),
        ("--video", "in.avi", "--output", "in.avi"),
        ("--video", "in.avi", "--json", config),
        ("--video", "in.avi", "--json", network.MODEL.WEIGHTS),
    ):
        assert demo(network, *words) == 2
        assert "is an input, and would be overwritten" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in files} == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--input", "p"], "Nothing would be kept of the results"),
        (["--input", "gone.jpg", "--output", "o"], "There is no file gone.jpg."),
        (["--input", "q/", "--output", "o"], "There is no folder q/."),
        (["--input", "fil", "--output", "o"], "no file or folder fil. Close to it: 'file'."),
        (
            ["--input", "fil", "filee", "--output", "o"],
            "'file'. There is no file or folder filee.\n",
        ),
        (["--video", "empty", "--output", "o"], "There is no file empty. 'empty' is a folder.\n"),
        (["--video", "w.avi", "--output", "o"], "no file w.avi. Close to it: 'v.avi'."),
        (["--input", "empty", "--output", "o"], "There is no picture in the folder empty."),
        (["--video", "gone.mp4", "--output", "o"], "There is no file gone.mp4."),
        (["--input", "p", "--output", "one.png"], "is one picture and there are 2 inputs"),
        (["--input", "p", "--output", "file/o"], "The folder file/o cannot be made"),
        (["--input", "p", "--json", "file/r.json"], "file/r.json cannot be written"),
        (["--input", "p", "--json", "empty"], "empty cannot be written (Is a directory)"),
        (["--input", "p", "--output", "o", "--classes", "cat"], "There is no category 'cat'"),
        (["--input", "p", "--output", "o", "--device", "gpu"], "MODEL.DEVICE 'gpu' is no device"),
        (["--video", "v.avi", "--output", "o", "--codec", "MJPEG"], "must be four characters"),
        (["--video", "v.avi", "--output", "o", "--codec", "????"], "cannot write o/v.mp4"),
        (["--input", "p", "--output", "o", "--opts", "MODEL.WEIGHTS", "x.pth"], "x.pth"),
        (["--input", "p", "--output", "o", "--opts", "MODEL.WEIGHTS", "file"], "file"),
        (["--input", "p", "--output", "o", "--opts", "MODEL.WEIGHTS", ""], "There are no weights"),
        (["--input", "p", "--output", "o", "--opts", "MODEL.WEIGHT", "x"], "MODEL.WEIGHTS"),
        (["--input", "p", "--output", "o", "--config-file", "gone.yaml"], "gone.yaml"),
        (["--input", "p", "--output", "o", "--score-threshold", "2"], "2 is not from 0 to 1"),
        (["--input", "p", "--output", "o", "--score-threshold", "x"], "--score-threshold"),
        (["--input", "p", "--output", "o", "--batch-size", "0"], "0 is not at least 1"),
        (["--input", "p", "--output", "o", "--dtype", "int8"], "--dtype"),
        (["--input", "p", "--video", "v.avi", "--output", "o"], "not allowed with"),
        (["--output", "o"], "required"),
        (["--webcam", "one", "--output", "o"], "--webcam"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_a_sentence_and_status_2(
    words: list[str], sentence: str, network: CfgNode, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(Path("p"), 2)
    write_video("v.avi", count=2)
    Path("empty").mkdir()
    Path("file").write_text("a file")
    assert demo(network, *words) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "error: " in err
    assert "Traceback" not in err
    assert not Path("o").exists()  # no empty folder is left


def test_help_lists_the_exit_statuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert exit.value.code == 0
    statuses = capsys.readouterr().out.partition("exit status:")[2]
    for status in (0, 1, 2, 130):
        assert f"\n  {status} " in statuses
