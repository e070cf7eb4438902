# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Write the page MODEL_ZOO.md: ``python -m vovnet_d2.zoo_page > MODEL_ZOO.md``."""

import torch
from tabulate import tabulate

from .analysis import analyze
from .checkpoint.download import MIRROR
from .checkpoint.zoo import ZOO, ZooEntry
from .modeling.specs import VOVNET_SPECS, VoVNetSpec
from .modeling.vovnet import VoVNet

_HEAD = """\
# Weights for download

<!-- Generated: python -m vovnet_d2.zoo_page > MODEL_ZOO.md -->

These weights can be had, by the name that `MODEL.WEIGHTS` takes. Those under MIT and Apache-2.0 are
free to use. **V-99-eSE's are for non-commercial use only**, as are the data sets that they were
trained on; the log says so whenever they are loaded. Parameters and multiply-adds are the
backbone's, the latter for an image of 224×224.
"""

_NOTES = f"""\
`v99://dd3d` was trained on nuScenes' validation images, too, so figures on these come out too
high: use `v99://fcos3d` there. `python tools/convert_weights.py --list` prints this table.

`timm://` files come from the Hugging Face hub through `huggingface_hub` (`pip install
'huggingface_hub' 'safetensors'`), which keeps them in its cache; with `HF_HUB_OFFLINE=1` only the
cache is asked. The others are kept beside torch.hub's (`TORCH_HOME`, else
`~/.cache/torch/hub/checkpoints`); a download that breaks off goes on where it was.

**Without a network**, or with a mirror of your own, set `{MIRROR}` to a folder with the files, or
to the URL that they lie below (`https://mirror.example/vovnet`). It is asked first. The table of
files says what they are called there.
"""

_CONVENTIONS = """\
## What a config must say for them

The configs named after these variants say it already. `ESE: "last"` stands for timm's way, eSE in
the last block of each stage alone. To feed a network BGR, or values with a standard deviation of
1, convert the weights with `tools/convert_weights.py` (`--to-bgr`, `--fold-normalization std`).
"""

_FILES = """\
## Where they are

Links are tried in their order. A file is compared with the checksum here where there is one (of a
.pth.zip, it is the checksum of the .pth in it), and a file of the hub with the SHA-256 that the
hub gave when it was downloaded. Where no revision is pinned, the newest is taken; where the hub
is out of reach, the one in the cache.
"""

_HGNET = """\
## HGNet and HGNetV2

PP-HGNet and HGNetV2, the backbones of RT-DETR and D-FINE, are made of VoVNet's blocks:
convolutions in a chain, concatenated once. timm has them with weights (Apache-2.0), and
`COCO-InstanceSegmentation/mask_rcnn_{HGNet_T,HGNetV2_B4}_FPN_3x.yaml` and
`COCO-Detection/retinanet_…` start from these (`MODEL.TIMM.PRETRAINED`), in RGB with ImageNet's
mean and standard deviation. Top-1 is timm's, at 224×224, of weights distilled from a larger
network.

| `MODEL.TIMM.NAME`                    | top-1 (%) | licence    |
|--------------------------------------|-----------|------------|
| `hgnet_tiny.ssld_in1k`               | 81.94     | Apache-2.0 |
| `hgnetv2_b4.ssld_stage2_ft_in1k`     | 83.70     | Apache-2.0 |
"""

_OTHERS = """\
## Other weights

The weights that were published for VoVNet on Dropbox are gone. If you have a file of them, or of a
detector that was trained from them, name it in `MODEL.WEIGHTS`: it is recognised, whichever project
it comes from, and compared with the config. Those published with Detectron2 projects are under
CC BY-NC 4.0.

No weights can be had for the other variants:
{variants}.
The configs named after these variants train from scratch, with norms that learn
(`configs/Base-No-Weights.yaml`). With weights of yours in `MODEL.WEIGHTS`, set
`MODEL.VOVNET.NORM` to `FrozenBN` for the recipe that was published with them.
"""


def table_of_weights(quote: str = "") -> str:
    """Return the table of the weights for download, in Markdown, with ``quote`` around names."""
    rows = []
    for name, entry in ZOO.items():
        parameters, multiply_adds = _costs(entry.spec)
        top1 = ", ".join(f"{top1:.2f} at {size}×{size}" for size, top1 in entry.top1.items())
        rows.append(
            [
                f"{quote}{name}{quote}",
                entry.variant,
                f"{parameters / 1e6:.2f}",
                f"{multiply_adds / 1e9:.2f}",
                entry.trained_on,
                top1 or "–",
                entry.license,
            ]
        )
    weights = f"{quote}MODEL.WEIGHTS{quote}"
    headings = ["parameters (M)", "multiply-adds (G)", "trained on", "top-1 (%)", "licence"]
    return _table([weights, "variant", *headings], rows)


def _costs(spec: VoVNetSpec) -> tuple[int, int]:
    """Return the parameters of a backbone, and its multiply-adds for an image of 224×224."""
    with torch.device("meta"):
        total = analyze(VoVNet(spec), (224, 224)).total
    return total.parameters, total.multiply_adds


def render() -> str:
    """Return the page, in Markdown."""
    lines = [
        [
            f"`{name}`",
            "<br>".join(
                f"`{line}`"
                for line in (
                    f'MODEL.VOVNET.CONV_BODY: "{entry.variant}"',
                    f'MODEL.VOVNET.ESE: "{entry.spec.ese}"',
                    *entry.input.config_lines(),
                )
            ),
        ]
        for name, entry in ZOO.items()
    ]
    files = [
        [f"`{name}`", _links(entry), "<br>".join(f"`{n}`" for n in entry.file_names), _check(entry)]
        for name, entry in ZOO.items()
    ]
    have = {entry.variant for entry in ZOO.values()}
    without = ", ".join(name for name in VOVNET_SPECS if name not in have)
    return "\n".join(
        [
            _HEAD,
            table_of_weights("`"),
            _NOTES,
            _CONVENTIONS,
            _table(["`MODEL.WEIGHTS`", "config"], lines),
            _FILES,
            _table(
                ["`MODEL.WEIGHTS`", "links", f"name below `{MIRROR}`", "revision or checksum"],
                files,
            ),
            _HGNET,
            _OTHERS.format(variants=without).rstrip(),
        ]
    )


def _links(entry: ZooEntry) -> str:
    return "<br>".join(f"[{url.split('/')[2]}]({url})" for url in entry.urls)


def _check(entry: ZooEntry) -> str:
    if entry.checksum:
        return f"`{entry.checksum}`"
    if not entry.repo:
        return "checksum not known"
    return f"revision `{entry.revision}`" if entry.revision else "revision not pinned"


def _table(headers: list[str], rows: list[list[str]]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n"


if __name__ == "__main__":
    print(render())
