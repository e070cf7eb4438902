# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights for download, by name: where they are, what they are, and under which licence."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vovnet_d2.modeling.specs import VOVNET_SPECS, VoVNetSpec

from ..errors import UserValueError
from ..words import suggest
from .metadata import BGR_255, BGR_IMAGENET, RGB_IMAGENET, InputConvention, Metadata
from .recognition import Description

HUB_FILE = "model.safetensors"
_DD3D_HEADS = ("fcos2d_head", "fcos3d_head")


@dataclass(frozen=True)
class ZooEntry:
    """Weights of one network: in a repository of the Hugging Face hub, or behind links.

    Attributes:
        variant: the nearest variant, a key of ``VOVNET_SPECS``.
        spec: the exact architecture.
        input: the input that the weights expect.
        license: the SPDX identifier, or "non-commercial" with the reason.
        trained_on: the data sets of the training, in their order.
        top1: published ImageNet-1k top-1 accuracy, in percent, by the size of the test images.
        repo: the repository on the hub; empty without one.
        revision: the commit in ``repo``; None takes the newest.
        links: addresses of one file. The first that answers is taken.
        checksum: "sha256:", "sha1:" or "md5:" and all or the first hexadecimal digits; empty if
            none is known. For a .pth.zip it is that of the .pth inside. Files of the hub are always
            compared with the hub's own record.
    """

    variant: str
    spec: VoVNetSpec
    input: InputConvention
    license: str
    trained_on: str
    top1: dict[int, float]
    repo: str = ""
    revision: str | None = None
    links: tuple[str, ...] = ()
    checksum: str = ""

    @property
    def urls(self) -> tuple[str, ...]:
        if not self.repo:
            return self.links
        revision = self.revision or "main"
        return (f"https://huggingface.co/{self.repo}/resolve/{revision}/{HUB_FILE}",)

    @property
    def file_names(self) -> tuple[str, ...]:
        """The possible names of the file in a folder or on a mirror of the user."""
        if self.repo:  # the hub calls all its files the same
            return (f"{self.repo.partition('/')[2]}.safetensors",)
        names = dict.fromkeys(link.rpartition("/")[2] for link in self.links)
        return tuple(names)

    @property
    def source(self) -> str:
        return self.repo or self.file_names[0]

    @property
    def commercial(self) -> bool:
        """True if the licence allows commercial use."""
        return not self.license.startswith("non-commercial")

    @property
    def metadata(self) -> Metadata:
        return Metadata(self.spec.stem, self.spec.residual, self.input, self.source)


def _timm(name: str, variant: str, **fields: object) -> tuple[str, ZooEntry]:
    # timm has eSE in the last block of each stage.
    spec = replace(VOVNET_SPECS[variant], ese="last")
    entry = {"input": RGB_IMAGENET, "license": "Apache-2.0", "trained_on": "ImageNet-1k", **fields}
    return f"timm://{name}", ZooEntry(variant, spec, repo=f"timm/{name}", **entry)  # type: ignore[arg-type]


def _osmr(name: str, variant: str, release: str, file: str, sha1: str, top1: float) -> ZooEntry:
    """Make an entry for a file of pytorchcv. Its table has the SHA-1 of each .pth, and the file's
    name has the first digits.
    """
    link = f"https://github.com/osmr/imgclsmob/releases/download/{release}/{name}-{file}.pth"
    return ZooEntry(
        variant,
        VOVNET_SPECS[variant],
        RGB_IMAGENET,
        "MIT",
        "ImageNet-1k",
        {224: top1},
        links=(f"{link}.zip", link),
        checksum=f"sha1:{sha1}",
    )


def _v99(trained_on: str, *links: str, checksum: str = "") -> ZooEntry:
    return ZooEntry(
        "V-99-eSE",
        VOVNET_SPECS["V-99-eSE"],
        BGR_IMAGENET,
        "non-commercial (DDAD, nuScenes)",
        trained_on,
        {},
        links=links,
        checksum=checksum,
    )


_EXIAWSH = "https://github.com/exiawsh/storage/releases/download/v1.0"
_FCOS3D = "fcos3d_vovnet_imgbackbone-remapped.pth"
_DD3D = "dd3d_det_final.pth"

ZOO: dict[str, ZooEntry] = {
    **dict(
        [
            _timm(
                "ese_vovnet19b_dw.ra_in1k",
                "V-19-dw-eSE",
                top1={224: 76.83},
                revision="aa57bf7516f34af5780d983b4ee679bcba5c344c",
            ),
            _timm("ese_vovnet39b.ra_in1k", "V-39-eSE", top1={224: 79.31}),
            _timm(
                "ese_vovnet57b.ra4_e3600_r256_in1k",
                "V-57-eSE",
                input=InputConvention("RGB", (127.5,) * 3, (127.5,) * 3),
                top1={256: 82.46, 320: 83.30},
                revision="4ef6c6f07c1ca01d4a970d002e98e147ed933f46",
            ),
        ]
    ),
    "osmr://vovnet27s": _osmr(
        "vovnet27s",
        "V-27-slim",
        "v0.0.551",
        "0997-b7a5bf67",
        "b7a5bf677bd3431bbed44b439fde7a01d699ace1",
        70.22,
    ),
    "osmr://vovnet39": _osmr(
        "vovnet39",
        "V-39",
        "v0.0.493",
        "0564-63bfa613",
        "63bfa613870b37bd4fb5b71412e7875392aa4f66",
        78.29,
    ),
    "osmr://vovnet57": _osmr(
        "vovnet57",
        "V-57",
        "v0.0.505",
        "0518-c080e471",
        "c080e47169a176043f298b1e909ddd8776d5aa76",
        79.67,
    ),
    "v99://fcos3d": _v99(
        "DDAD15M (depth), then nuScenes train (FCOS3D)",
        f"{_EXIAWSH}/{_FCOS3D}",
        f"https://su.bcebos.com/v1/klx-sdk-release-public/xav/data/PETR_nuscenes_data/{_FCOS3D}",
        checksum="md5:ff1ac3040eabf0f0e54c3c594c26021e",
    ),
    # Trained on nuScenes' validation images, too: figures on these are inflated.
    "v99://dd3d": _v99(
        "DDAD15M (depth), then nuScenes trainval (DD3D)",
        f"{_EXIAWSH}/{_DD3D}",
        f"https://huggingface.co/Zzxxxxxxxx/gtrs/resolve/main/{_DD3D}",
        f"https://huggingface.co/alkaid-2000/DriveSuprim/resolve/main/pretrained_backbones/{_DD3D}",
    ),
}
"""The entries of the zoo, by the name that ``MODEL.WEIGHTS`` takes."""


def in_zoo(weights: str) -> bool:
    """Return True if a value of ``MODEL.WEIGHTS`` has the form of a name in the zoo."""
    return weights.startswith(tuple({re.sub("//.*", "//", name) for name in ZOO}))


def get_entry(name: str) -> ZooEntry:
    """Return an entry of the zoo. Raise ValueError, with the known names, if there is none."""
    if name in ZOO:
        return ZOO[name]
    raise UserValueError(
        f"No weights {name} in the zoo.{suggest(name, ZOO, cutoff=0.5)} There are: "
        f"{', '.join(ZOO)}. Other VoVNets of timm have no trained weights."
    )


def metadata_of_layout(found: Description, names: Iterable[str]) -> Metadata:
    """Return the metadata that the layout of a file implies, for a file that has none itself.
    ``names`` are those of all its tensors, also outside the VoVNet.

    Such metadata are conventions of the publishers, so they are less certain than metadata in the
    file.
    """
    if found.layout == "timm":
        # timm's v1 models have no residual; all its VoVNets have the strided stem by default.
        residual = found.fields["ese"] != "none"
        same = [e for e in ZOO.values() if e.repo and not found.differences(e.spec)]
        convention = same[0].input if same else RGB_IMAGENET
        return Metadata("strided", residual, convention, "timm's convention")
    if found.layout == "osmr":
        return Metadata("strided", True, RGB_IMAGENET, "osmr's convention")
    if found.layout == "detectron2":
        return _metadata_of_published(found, list(names))
    return Metadata()


def _metadata_of_published(found: Description, names: list[str]) -> Metadata:
    if any(part in _DD3D_HEADS for name in names for part in name.split(".")):
        return Metadata("strided", True, BGR_IMAGENET, "DD3D's convention")
    # Only the v2 weights in Detectron2's own prefix are known to agree: v1 came as classifiers in
    # RGB, and detectors outside Detectron2 differ in their deviations.
    known = (
        found.fields["ese"] != "none"
        and found.num_classes is None
        and not found.prefix.endswith("img_backbone.")
    )
    told = Metadata("strided", True, source="the published weights' convention")
    if not known:
        return told
    # DD3D's own V-99-eSE was published without heads, too. An FPN is no head.
    bare = all(name.startswith(found.prefix.removesuffix("bottom_up.")) for name in names)
    if bare and not found.differences(VOVNET_SPECS["V-99-eSE"]):
        return replace(told, candidates=(BGR_255, BGR_IMAGENET))
    return replace(told, input=BGR_255)
