# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""MODEL_ZOO.md, from the zoo: ``python -m vovnet_d2.checkpoint.zoo_page > MODEL_ZOO.md``."""

from __future__ import annotations

from tabulate import tabulate

from vovnet_d2.modeling.specs import VOVNET_SPECS

from .zoo import ZOO

__all__ = ["render"]

_HEAD = """\
# Weights

<!-- Generated: python -m vovnet_d2.checkpoint.zoo_page > MODEL_ZOO.md -->

Backbones trained on ImageNet-1k, by the name that `MODEL.WEIGHTS` takes. They come from the Hugging
Face hub through `huggingface_hub` (`pip install 'huggingface_hub' 'safetensors'`), which keeps them
in its cache; with `HF_HUB_OFFLINE=1` only the cache is asked.
"""

_CONVENTIONS = """\
## What a config must say for them

The configs named after these variants say it already. `ESE: "last"` stands for timm's way, eSE in
the last block of each stage alone. To feed a network BGR, or values with a standard deviation of 1,
convert the weights with `tools/convert_weights.py` (`--to-bgr`, `--fold-normalization std`).
"""

_FILES = """\
## Where they are

A file is compared with the SHA-256 here where there is one, else with the one that the hub gave
when it was downloaded. Where no revision is pinned, the newest is taken; where the hub is out of
reach, the one in the cache.
"""

_OTHERS = """\
## Other weights

The weights that were published for VoVNet on Dropbox are gone. If you have a file of them, or of a
detector that was trained from them, name it in `MODEL.WEIGHTS`: it is recognised, whichever project
it comes from, and compared with the config. Those published with Detectron2 projects are under
CC BY-NC 4.0.

No weights can be had for the other variants:
{variants}.
The configs named after these variants train from nothing, with norms that learn
(`configs/Base-No-Weights.yaml`). With weights of yours in `MODEL.WEIGHTS`, set
`MODEL.VOVNET.NORM` to `FrozenBN` for the recipe that was published with them.
"""


def render() -> str:
    """The page, in Markdown."""
    names = {name: f"`{name}`" for name in ZOO}
    accuracies = [
        [
            names[name],
            entry.variant,
            ", ".join(f"{top1:.2f} at {size}×{size}" for size, top1 in entry.top1.items()),
            entry.license,
        ]
        for name, entry in ZOO.items()
    ]
    lines = [
        [
            names[name],
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
        [
            names[name],
            f"[{entry.repo}]({entry.url})",
            f"`{entry.revision}`" if entry.revision else "not pinned",
            f"`{entry.sha256}`" if entry.sha256 else "not known",
        ]
        for name, entry in ZOO.items()
    ]
    have = {entry.variant for entry in ZOO.values()}
    without = ", ".join(name for name in VOVNET_SPECS if name not in have)
    return "\n".join(
        [
            _HEAD,
            _table(["`MODEL.WEIGHTS`", "variant", "top-1 (%)", "licence"], accuracies),
            _CONVENTIONS,
            _table(["`MODEL.WEIGHTS`", "config"], lines),
            _FILES,
            _table(["`MODEL.WEIGHTS`", "file", "revision", "SHA-256"], files),
            _OTHERS.format(variants=without).rstrip(),
        ]
    )


def _table(headers: list[str], rows: list[list[str]]) -> str:
    return tabulate(rows, headers, tablefmt="github") + "\n"


if __name__ == "__main__":
    print(render())
