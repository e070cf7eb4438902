# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Malformed and hostile configs and images, by name. Malformed weights and annotations are in the
test files of weights and annotations."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

# Configs. If a config manages to run code, the code creates the file {mark}.

_PAYLOADS = {
    "os.system": "!!python/object/apply:os.system ['touch {mark}']",
    "subprocess": "!!python/object/apply:subprocess.Popen [[touch, '{mark}']]",
    "eval": "!!python/object/apply:eval [\"open('{mark}', 'w')\"]",
    "exec": "!!python/object/apply:builtins.exec [\"open('{mark}', 'w')\"]",
    "open": "!!python/object/apply:builtins.open ['{mark}', w]",
    "new": "!!python/object/new:subprocess.Popen [[touch, '{mark}']]",
    "state": "!!python/object/new:type {{args: [a, !!python/tuple [], {{}}], state: {{}}}}",
    "name": "!!python/name:os.system",
    "module": "!!python/module:os",
    "object": "!!python/object:collections.OrderedDict {{}}",
    "tuple": "!!python/tuple [1, 2]",
    "own tag": "!touch '{mark}'",
}
_PLACES = {
    "a value": "OUTPUT_DIR: {}\n",
    "deep inside": "MODEL:\n  VOVNET:\n    NORM: {}\n",
    "a list": "SOLVER:\n  STEPS: [1, {}]\n",
    "the base": "_BASE_: {}\n",
    "the whole": "{}\n",
}
HOSTILE_CONFIGS = {
    f"{payload} in {place}": text.format(_PAYLOADS[payload])
    for payload in _PAYLOADS
    for place, text in _PLACES.items()
}

_NO_YAML = {
    "empty": "",
    "a word": "word",
    "a number": "3",
    "a list": "- 1\n- 2\n",
    "null": "null",
    "tabs": "MODEL:\n\tVOVNET: 1\n",
    "unclosed list": "MODEL: [1, 2",
    "unclosed mapping": "MODEL: {VOVNET: ",
    "unclosed text": "OUTPUT_DIR: 'x",
    "two colons": "MODEL: VOVNET: 3",
    "bad indent": "MODEL:\n    VOVNET: {}\n  FPN: {}\n",
    "unknown alias": "OUTPUT_DIR: *nobody",
    "zero byte": "OUTPUT_DIR: a\0b",
    "bell": "OUTPUT_DIR: a\x07b",
    "two documents": "MODEL: {}\n---\nMODEL: {}\n",
    "HTML": "<!DOCTYPE html><html></html>",
    "percent": "% not a directive\n",
    "deeply nested": "[" * 1000,
    "deep mappings": "{a: " * 2000 + "1" + "}" * 2000,
    "holds itself": "&a [*a]",
    "a mapping that holds itself": "MODEL: &a {VOVNET: *a}",
    "a key of a list": "? [1, 2]\n: 3\n",
    "a key of a mapping": "? {a: 1}\n: 3\n",
    "a key of a number": "3: 4\n",
    "a date that is none": "OUTPUT_DIR: 2001-99-99\n",
}
_BASES = {
    "missing": "_BASE_: nowhere.yaml",
    "itself": "_BASE_: config.yaml",
    "a folder": "_BASE_: .",
    "a number": "_BASE_: 3",
    "null": "_BASE_: null",
    "a mapping": "_BASE_: {a: 1}",
    "numbers": "_BASE_: [1, 2]",
    "far away": "_BASE_: /nowhere/at/all.yaml",
    "a file that is no config": "_BASE_: /etc/hostname",
    "a zero byte": '_BASE_: "a\\0b"',
}
# Keys of MODEL.VOVNET
_NETWORKS = {
    "no variant": "CONV_BODY: V-40",
    "no stem": "STEM: round",
    "no eSE": "ESE: some",
    "widths of 0": "STAGE_MID_CHANNELS: [0, 8, 8, 8]",
    "three widths": "STAGE_MID_CHANNELS: [8, 8, 8]",
    "widths of text": "STAGE_OUT_CHANNELS: [a, b, c, d]",
    "negative layers": "LAYERS_PER_BLOCK: -1",
    "residual of text": "RESIDUAL: maybe",
    "no norm": "NORM: Nothing",
    "no output": "OUT_FEATURES: [stage9]",
    "no outputs": "OUT_FEATURES: []",
    "no deformable groups": "DEFORMABLE_GROUPS: 0",
    "no dilation": "STAGE5_DILATION: 3",
    "deformable stages of two": "STAGE_WITH_DCN: [true, false]",
}
_BACKBONE = "BACKBONE: {FREEZE_AT: 0, NAME: build_vovnet_fpn_backbone}"
_TRAINABLE = f"MODEL: {{VOVNET: {{NORM: BN}}, {_BACKBONE}}}\n"
_VALUES = {
    "unknown key": "MODEL: {VOVNETT: {}}",
    "unknown deep key": "MODEL: {VOVNET: {CONV_BODDY: V-39}}",
    "number for a node": "MODEL: 3",
    "null for a node": "MODEL: null",
    "list for a node": "MODEL: {VOVNET: [1]}",
    "node for a number": "SOLVER: {MAX_ITER: {a: 1}}",
    "text for a number": "SOLVER: {MAX_ITER: soon}",
    "float for an integer": "SOLVER: {MAX_ITER: 1.5}",
    "list for a number": "SOLVER: {BASE_LR: [1]}",
    "number for text": "OUTPUT_DIR: 3",
    "number for a list": "DATASETS: {TRAIN: 3}",
    "a date": "OUTPUT_DIR: 2001-01-01",
    "binary": "OUTPUT_DIR: !!binary aGVsbG8=",
    "a set": "OUTPUT_DIR: !!set {a}",
    "no meta-architecture": "MODEL: {META_ARCHITECTURE: Nothing}",
    "no backbone": "MODEL: {BACKBONE: {NAME: __import__}}",
    "no batch": "SOLVER: {IMS_PER_BATCH: 0}",
    "no device": "MODEL: {DEVICE: abacus}",
    "no data": _TRAINABLE + "DATASETS: {TRAIN: []}",
    "unknown data": _TRAINABLE + "DATASETS: {TRAIN: [nothing]}",
    "a name for names": _TRAINABLE + "DATASETS: {TRAIN: digits_train}",
    "no precision": "SOLVER: {AMP: {ENABLED: true, DTYPE: float8}}",
    "missing weights": "MODEL: {WEIGHTS: nowhere.pth}",
    **{k: f"MODEL: {{{_BACKBONE}, VOVNET: {{{v}}}}}" for k, v in _NETWORKS.items()},
}
MALFORMED_CONFIGS: dict[str, bytes] = {
    **{f"no YAML: {k}": v.encode() for k, v in _NO_YAML.items()},
    **{f"base: {k}": v.encode() for k, v in _BASES.items()},
    **{f"value: {k}": v.encode() for k, v in _VALUES.items()},
    "no YAML: latin-1": "OUTPUT_DIR: ä".encode("latin-1"),
    "no YAML: UTF-16 cut": "MODEL: {}".encode("utf-16")[:-1],
    "no YAML: random": bytes(range(256)),
    "no YAML: zeros": bytes(300),
}
# These two are valid.
for _harmless in ("no YAML: empty", "no YAML: null"):
    del MALFORMED_CONFIGS[_harmless]

# Options of the command line, which follow the options of a good config.
MALFORMED_OPTIONS = {
    "one word": ["MODEL.DEVICE"],
    "unknown key": ["MODEL.DEVIC", "cpu"],
    "no key": ["", "cpu"],
    "a dot": [".", "cpu"],
    "a flag": ["--eval-only", "x"],
    "a node": ["MODEL", "3"],
    "attribute": ["MODEL.__class__", "3"],
    "inside text": ["MODEL.DEVICE.x", "3"],
    "a call": ["SOLVER.MAX_ITER", "__import__('os').system('touch {mark}')"],
    "a lambda": ["SOLVER.MAX_ITER", "(lambda: open('{mark}', 'w'))()"],
    "unclosed": ["SOLVER.STEPS", "(1, 2"],
    "braces": ["SOLVER.MAX_ITER", "{{1: [}}"],
    "a dict": ["SOLVER.MAX_ITER", "{{'a': 1}}"],
    "a float": ["SOLVER.MAX_ITER", "1e3"],
    "text": ["SOLVER.BASE_LR", "fast"],
    "None": ["OUTPUT_DIR", "None"],
    "deep": ["SOLVER.MAX_ITER", "(" * 500],
    "negative": ["SOLVER.IMS_PER_BATCH", "-2"],
    "minus of a list": ["SOLVER.MAX_ITER", "-[1]"],
    "huge": ["SOLVER.IMS_PER_BATCH", "9" * 5000],
}


# Images


def _encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def _png(width: int, height: int, depth: int, color: int, pixels: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", head)
        + _chunk(b"IDAT", pixels)
        + _chunk(b"IEND", b"")
    )


def _flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


_PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
).resize((64, 48))
_GOOD = {
    kind: _encode(_PICTURE, kind)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO")
}
# No decoder can read these.
UNREADABLE_IMAGES: dict[str, bytes] = {
    "empty": b"",
    "text": b"404 Not Found",
    "HTML": b"<html></html>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='48'/>",
    "JSON": b"{}",
    "zeros": bytes(5000),
    "random": np.random.default_rng(1).bytes(5000),
    "pickle": b"\x80\x04cposix\nsystem\n(S'touch mark'\ntR.",
    "PNG of 0 x 0": _png(0, 0, 8, 2, zlib.compress(b"")),
    "PNG without pixels": _png(64, 48, 8, 2, b""),
    "PNG with rubbish for pixels": _png(64, 48, 8, 2, b"rubbish" * 9),
    "PNG of too few pixels": _png(64, 48, 8, 2, zlib.compress(bytes(100))),
    "PNG of an unknown depth": _png(64, 48, 7, 2, zlib.compress(bytes(9999))),
    "PNG of 2**31 pixels": _png(2**31 - 1, 1, 8, 2, zlib.compress(bytes(9))),
    "PNG that would fill memory": _png(60000, 60000, 8, 2, zlib.compress(bytes(9))),
    **{
        f"{kind} cut after {part:.0%}": content[: int(len(content) * part)]
        for kind, content in _GOOD.items()
        if kind in ("JPEG", "PNG", "BMP", "TIFF", "PPM")
        for part in (0.02, 0.1, 0.5)
    },
    **{f"{kind} without its first byte": c[1:] for kind, c in _GOOD.items() if kind != "TGA"},
}
# Some decoders read these, and others do not.
DOUBTFUL_IMAGES: dict[str, bytes] = {
    f"{kind} with byte {place} flipped": _flip(content, place)
    for kind, content in _GOOD.items()
    for place in (3, 9, 20, 33, 50, len(content) // 2)
}
