# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""A miniature of PASCAL VOC: the layout of VOC2007, with grey images."""

from pathlib import Path

from PIL import Image

Object = tuple[str, int, tuple[float, float, float, float]]

OBJECTS: dict[str, list[Object]] = {
    "000001": [("dog", 0, (1, 1, 40, 30)), ("person", 1, (50, 10, 80, 60))],
    "000002": [("dog", 0, (10, 20, 60, 59)), ("dog", 1, (62, 20, 70, 40))],
    "000003": [],
    "000004": [("cat", 0, (5, 5, 45, 50)), ("dog", 0, (50, 5, 79, 50))],
}


def write_tree(root: Path, objects: dict[str, list[Object]], split: str) -> Path:
    """Write the layout of VOC2007 with grey images of 80x60.

    The annotations only have the elements that detection needs."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, found in objects.items():
        Image.new("RGB", (80, 60)).save(root / "JPEGImages" / f"{name}.jpg")
        items = "".join(
            f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox>"
            + "".join(
                f"<{k}>{v}</{k}>"
                for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            )
            + "</bndbox></object>"
            for label, difficult, box in found
        )
        size = "<size><width>80</width><height>60</height><depth>3</depth></size>"
        text = f"<annotation>{size}{items}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(objects) + "\n")
    return root
