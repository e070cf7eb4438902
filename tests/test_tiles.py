# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Detection on tiles with a stand-in detector, which finds bright rectangles in known images."""

import itertools
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from engine_runs import MASK_RCNN as MINIATURE
from engine_runs import launch
from export_models import MASK_RCNN
from predictor_runs import PICTURES, SMALL, assert_close, save
from torch import nn

from vovnet_d2 import Predictor
from vovnet_d2.data.image_file import read_image
from vovnet_d2.demo import command
from vovnet_d2.engine import load_config
from vovnet_d2.engine.run_checks import check_run
from vovnet_d2.tiles import TiledDetector, cut_tiles

pytest_plugins = ["engine_fixtures"]

AS_IT_IS = T.AugmentationList([])
SMALLEST = 6  # side in pixels of the smallest rectangle that it finds


class BrightRectangles(nn.Module):
    """Stand-in detector that finds the visible part of each bright rectangle."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[tuple[int, int]]] = []

    def forward(self, inputs: list[dict]) -> list[dict]:
        self.batches.append([(one["height"], one["width"]) for one in inputs])
        return [{"instances": self.detect(one)} for one in inputs]

    def detect(self, one: dict) -> Instances:
        size = height, width = one["height"], one["width"]
        pixels = one["image"][0].numpy()
        scale = width / pixels.shape[1]
        found, masks, classes = [], [], []
        for number, level in enumerate((120, 240)):
            bright = (np.abs(pixels.astype(int) - level) < 8).astype(np.uint8)
            count, labels, stats, _ = cv2.connectedComponentsWithStats(bright)
            for label in range(1, count):
                x, y, w, h, _ = stats[label]
                if min(w, h) >= SMALLEST:
                    found.append([x * scale, y * scale, (x + w) * scale, (y + h) * scale])
                    mask = (labels == label).astype(np.uint8)
                    masks.append(cv2.resize(mask, (width, height), interpolation=0) > 0)
                    classes.append(number)
        boxes = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
        corners = torch.cat([boxes, torch.ones(len(boxes), 2)], 1)
        instances = Instances(size, pred_boxes=Boxes(boxes), pred_classes=torch.tensor(classes))
        # Detectors have lower scores for objects that are cut.
        instances.scores = 0.5 + (boxes[:, 2] - boxes[:, 0]) / 1e4
        instances.pred_masks = torch.tensor(np.array(masks).reshape(-1, *size))
        instances.pred_keypoints = corners[:, [0, 1, 4, 2, 3, 5]].reshape(-1, 2, 3)
        return instances


def composite(height: int, width: int, rectangles: list[tuple[int, ...]]) -> torch.Tensor:
    """Return an image (3, H, W) with rectangles (x0, y0, x1, y1, category)."""
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    for x0, y0, x1, y1, category in rectangles:
        pixels[:, y0:y1, x0:x1] = (120, 240)[category]
    return pixels


def assert_found(found: Instances, rectangles: list[tuple[int, ...]], within: float = 0) -> None:
    assert len(found) == len(rectangles)
    boxes = found.pred_boxes.tensor
    assert (found.scores.diff() <= 0).all()
    for x0, y0, x1, y1, category in rectangles:
        distance = (boxes - boxes.new_tensor([x0, y0, x1, y1])).abs().amax(1)
        index = int(distance.argmin())
        assert distance[index] <= within
        assert found.pred_classes[index] == category
        mask = torch.zeros(found.image_size, dtype=torch.bool)
        mask[y0:y1, x0:x1] = True
        different = (found.pred_masks[index] != mask).sum()
        assert different <= within * 2 * (x1 - x0 + y1 - y0)
        points = found.pred_keypoints[index]
        expected = points.new_tensor([[x0, y0, 1], [x1, y1, 1]])
        assert (points - expected).abs().max() <= within
        assert (points[:, 2] == 1).all()


@pytest.mark.parametrize(
    ("side", "tile", "overlap", "expected"),
    [
        (100, 100, 0.2, [(0, 100)]),
        (70, 100, 0.2, [(0, 70)]),
        (180, 100, 0.2, [(0, 100), (80, 180)]),
        (181, 100, 0.2, [(0, 100), (40, 140), (81, 181)]),
        (200, 100, 0.0, [(0, 100), (100, 200)]),
        (26, 10, 0.25, [(0, 10), (5, 15), (10, 20), (16, 26)]),  # three would overlap by 2
        (5, 2, 0.6, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    ],
)
def test_sides_are_cut(side: int, tile: int, overlap: float, expected: list) -> None:
    tiles = cut_tiles(side, 10, (tile, 10), overlap)
    assert [(t.top, t.bottom) for t in tiles] == expected
    assert {(t.left, t.right) for t in tiles} == {(0, 10)}


def test_the_default_overlap_is_the_documented_one() -> None:
    documentation = Predictor.__init__.__doc__ or ""
    (documented,) = re.findall(r"``TEST.TILE_OVERLAP``, which is ([\d.]+)\.", documentation)
    assert float(documented) == load_config().TEST.TILE_OVERLAP


def test_tiles_cover_an_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width, *tile = rng.integers(1, 90, 4).tolist()
        overlap = float(rng.choice([0, 0.1, 0.25, 0.5, 0.9]))
        tiles = cut_tiles(height, width, tile, overlap)
        covered = np.zeros((height, width), bool)
        for t in tiles:
            covered[t.top : t.bottom, t.left : t.right] = True
            assert t.bottom - t.top == min(tile[0], height)
            assert t.right - t.left == min(tile[1], width)
        assert covered.all()
        lefts = sorted({t.left for t in tiles})
        for one, following in itertools.pairwise(lefts):
            common = one + tile[1] - following
            assert common >= overlap * tile[1] or following == one + 1


# Objects inside one tile, on the border of two tiles, on a corner of four tiles, in an overlap, at
# the border of the image, and larger than a tile.
RECTANGLES = [
    (20, 30, 40, 52, 0),
    (95, 60, 112, 80, 1),
    (150, 92, 168, 108, 0),
    (85, 10, 95, 20, 1),
    (0, 150, 14, 200, 0),
    (286, 0, 300, 9, 0),
    (130, 120, 270, 170, 1),
]


def test_each_object_is_found_once_as_a_whole() -> None:
    model = BrightRectangles().eval()
    tiled = TiledDetector(model, (100, 100), 0.3, resize=AS_IT_IS, batch_size=4)
    image = composite(200, 300, RECTANGLES)
    (output,) = tiled([{"image": image}])
    assert output.keys() == {"instances"}
    assert output["instances"].image_size == (200, 300)
    assert_found(output["instances"], RECTANGLES)
    # There are 3 × 4 tiles and the whole image, four at a time.
    assert [len(batch) for batch in model.batches] == [4, 4, 4, 1]
    assert model.batches[-1] == [(200, 300)]


def test_small_objects_of_a_large_image() -> None:
    """Check that tiles find small objects, which have two pixels in the whole resized image."""
    model = BrightRectangles().eval()
    resize = T.AugmentationList([T.ResizeShortestEdge([200, 200], 400)])
    small = [(x, y, x + 8, y + 8, (x + y) % 2) for x in range(15, 990, 61) for y in (7, 333, 780)]
    large = [(200, 400, 700, 700, 0)]
    image = composite(800, 1000, small + large)
    whole = model([{"image": resized(image, resize), "height": 800, "width": 1000}])[0]["instances"]
    assert_found(whole, large, within=4)
    tiled = TiledDetector(model, (200, 200), 0.2, resize=resize)
    assert_found(tiled([{"image": image}])[0]["instances"], small + large, within=4)


def resized(image: torch.Tensor, resize: T.AugmentationList) -> torch.Tensor:
    pixels = T.AugInput(image.permute(1, 2, 0).numpy())
    resize(pixels)
    return torch.from_numpy(pixels.image.transpose(2, 0, 1).copy())


class Given(nn.Module):
    """Stand-in detector that returns the given (x0, y0, x1, y1, score, category) of each call."""

    def __init__(self, *outputs: list[tuple[float, ...]]):
        super().__init__()
        self.outputs = iter(outputs)
        self.sizes: list[tuple[int, int]] = []

    def forward(self, inputs: list[dict]) -> list[dict]:
        (one,) = inputs
        self.sizes.append((one["height"], one["width"]))
        values = torch.tensor(next(self.outputs)).reshape(-1, 6)
        instances = Instances(self.sizes[-1], pred_boxes=Boxes(values[:, :4]))
        instances.scores, instances.pred_classes = values[:, 4], values[:, 5].long()
        return [{"instances": instances}]


def merge(size: tuple[int, int], tiles: tuple[int, int], model: Given) -> set[tuple[float, ...]]:
    """Return the merged boxes with their categories."""
    tiled = TiledDetector(model.eval(), tiles, 0.1, resize=AS_IT_IS, batch_size=1)
    found = tiled([{"image": torch.zeros(3, *size, dtype=torch.uint8)}])[0]["instances"]
    boxes = [tuple(round(x, 2) for x in box) for box in found.pred_boxes.tensor.tolist()]
    return {(*box, label) for box, label in zip(boxes, found.pred_classes.tolist(), strict=True)}


def test_boxes_at_borders_of_tiles_inside_the_image_are_dropped() -> None:
    """Merge tiles that begin at 0 and 80, and at 0 and 180. Borders are 1 pixel high, 2 wide."""
    first = [(0, 0, 8, 8), (10, 10, 50, 98.9), (100, 10, 197.9, 50)]
    last = [(2.1, 20, 40, 40), (80, 1.1, 120, 30), (150, 80, 200, 100)]
    cut_first = [(60, 10, 90, 99), (100, 60, 198, 90)]
    cut_last = [(1.9, 50, 40, 70), (130, 0.9, 145, 30)]
    outputs = [[(*box, 0.9, 0) for box in boxes] for boxes in (first + cut_first, last + cut_last)]
    model = Given(outputs[0], [], [], outputs[1], [])
    expected = {(*box, 0) for box in first}
    expected |= {(x0 + 180, y0 + 80, x1 + 180, y1 + 80, 0) for x0, y0, x1, y1 in last}
    assert merge((180, 380), (100, 200), model) == expected
    assert model.sizes == [(100, 200)] * 4 + [(180, 380)]


def test_boxes_of_one_category_are_merged_from_an_iou_of_a_half_on() -> None:
    """Merge boxes of 100 pixels with distances of 33 and 34, whose IoU is 67 / 133 and 66 / 134.

    With two tiles or more, the detector also sees the whole image."""
    apart = [(0, 0, 0.9), (33, 0, 0.8), (-34, 0, 0.7), (0, 1, 0.6)]
    boxes = [(100 + x, 20, 200 + x, 60, score, label) for x, label, score in apart]
    model = Given([], [], boxes)
    left = {(x0, y0, x1, y1, label) for x0, y0, x1, y1, _, label in boxes}
    assert merge((100, 380), (100, 200), model) == left - {(133, 20, 233, 60, 0)}
    assert model.sizes[-1] == (100, 380)


def test_image_without_detections() -> None:
    tiled = TiledDetector(BrightRectangles().eval(), (50, 50), 0.2, resize=AS_IT_IS)
    found = tiled([{"image": composite(100, 120, [])}])[0]["instances"]
    assert len(found) == 0
    assert found.pred_masks.shape == (0, 100, 120)
    assert found.pred_keypoints.shape == (0, 2, 3)


def test_an_image_of_one_tile_is_predicted_as_without_tiles(tmp_path: Path) -> None:
    cfg = save(tmp_path)
    image = read_image(PICTURES[0])[::3, ::3]
    expected = Predictor(cfg)(image)
    for options in ({"tiles": (640, 640)}, {"tiles": [640, 300], "backend": "onnxruntime"}):
        assert_close(Predictor(cfg, **options)(image), expected)


def test_predictor_and_evaluation_agree(coco: Path, tmp_path: Path) -> None:
    launch(MINIATURE, tmp_path, "SOLVER.MAX_ITER", "1")
    options = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), "TEST.TILES", "(40, 50)"]
    launch(MINIATURE, tmp_path / "tiled", "--eval-only", *options)
    evaluated = torch.load(
        tmp_path / "tiled/inference/instances_predictions.pth", weights_only=False
    )
    cfg = load_config(str(tmp_path / "config.yaml"))
    cfg.MODEL.WEIGHTS = options[1]
    folder = coco / "coco/val2017"
    predictor = Predictor(cfg, tiles=(40, 50))
    for image in evaluated:
        found = predictor(folder / f"{image['image_id']:012d}.jpg")["instances"]
        scores = sorted(i["score"] for i in image["instances"])
        assert len(scores) > 10  # more than the limit of one tile
        np.testing.assert_allclose(sorted(found.scores.tolist()), scores, atol=1e-4)


@pytest.mark.parametrize(
    ("tiles", "overlap", "message"),
    [
        ((640,), 0.2, r"Tiles of \(640,\) cannot be cut: give a height and a width in pixels"),
        ((640, 0), 0.2, r"Tiles of \(640, 0\) cannot be cut"),
        ((64.0, 64.0), 0.2, "cannot be cut"),
        ((64, 64), 1.0, "The overlap of tiles is 1.0: give a share of their side from 0 to below"),
        ((64, 64), -0.1, "The overlap of tiles is -0.1"),
    ],
)
def test_tiles_that_cannot_be_cut(tiles: tuple, overlap: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(load_config(MASK_RCNN), tiles=tiles, overlap=overlap, device="cpu")


def test_networks_whose_outputs_are_not_merged(tmp_path: Path) -> None:
    cfg = load_config(MASK_RCNN, ["TEST.TILES", "(64, 64)", "TEST.AUG.ENABLED", "True"])
    with pytest.raises(ValueError, match=r"TEST.TILES and TEST.AUG.ENABLED cannot be combined"):
        check_run(cfg, training=False)

    class Semantic(nn.Module):
        def forward(self, inputs: list[dict]) -> list[dict]:
            return [{"sem_seg": torch.zeros(3, 9, 9)} for _ in inputs]

    tiled = TiledDetector(Semantic(), (9, 9), 0.2, resize=AS_IT_IS)
    with pytest.raises(ValueError, match="returns sem_seg: run it without tiles"):
        tiled([{"image": composite(9, 9, [])}])


def test_image_sizes_of_the_config_hold_for_tiles(tmp_path: Path) -> None:
    short, long = SMALL["INPUT.MIN_SIZE_TEST"], SMALL["INPUT.MAX_SIZE_TEST"]
    assert short > 85
    cfg = save(tmp_path)
    for options, number in (({"batch_size": 6}, 3 * 3), ({"overlap": 0.5}, 4 * 4)):
        predictor = Predictor(cfg, tiles=(200, 300), **options)
        seen: list[list[tuple[int, ...]]] = []
        predictor.model.model.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append([tuple(x["image"].shape) for x in args[0]])
        )
        predictor(PICTURES[0])
        # the longer sides of 200 × 300 and 427 × 640 are limited
        assert {shape for batch in seen for shape in batch} == {(3, 85, long)}
        assert sum(map(len, seen)) == number + 1
        assert len(seen[0]) == options.get("batch_size", 8)


def test_the_demo_passes_its_arguments_to_tiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    given = {}

    def predictor(config: object, **arguments: object) -> None:
        given.update(arguments)
        raise SystemExit("no network is needed")

    monkeypatch.setattr(command, "Predictor", predictor)
    words = ["--config-file", MASK_RCNN, "--input", str(PICTURES[0])]
    words += ["--json", str(tmp_path / "found.json")]
    more = ["--tiles", "640x512", "--overlap", "0.1", "--backend", "auto", "--int8", "a.onnx"]
    more += ["--device", "cpu", "--dtype", "bfloat16", "--compile", "--batch-size", "3"]
    more += ["--allow-partial", "--allow-pickle"]
    with pytest.raises(SystemExit, match="no network is needed"):
        command.main([*words, *more])
    assert given == {
        "tiles": (640, 512),
        "overlap": 0.1,
        "backend": "auto",
        "int8": "a.onnx",
        "device": "cpu",
        "dtype": torch.bfloat16,
        "compile": True,
        "batch_size": 3,
        "allow_partial": True,
        "allow_pickle": True,
    }
    with pytest.raises(SystemExit, match="2"):
        command.main([*words, "--tiles", "640"])
    assert "--tiles: '640' is not of the form HxW, such as 640x640" in capsys.readouterr().err
