# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import gc
import io
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# pytest-xdist runs several tests at a time. Each test, and each process that it starts, computes in
# one thread, and a waiting thread leaves the processor to others. torch reads these variables when
# it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# With the usual thresholds, garbage collection takes a twelfth of the time of the tests.
gc.set_threshold(20_000, 10, 10)

import numpy as np
import pytest
import setuptools  # noqa: F401 (the import fails once some other code has looked for pip)
import yaml


def load_yaml_fast(stream: object) -> object:
    """Read YAML with PyYAML's parser in C, which is ten times as fast as the parser in Python.

    The parser in Python reads the text if the parser in C refuses it, or if the text is nested so
    deeply that the parser in C would crash. So an error has the message that users see.

    The parser in C also accepts some text that the parser in Python refuses. Text with tabs is
    therefore read in Python, and so are bytes. Differences remain for ``>#`` and ``|#``, for a tag
    that is only ``!``, and for a byte order mark inside a text. Tests of malformed files use the
    fixture ``yaml_in_python``.
    """
    if not isinstance(stream, str | io.TextIOBase):
        return load_yaml_in_python(stream)
    text = stream if isinstance(stream, str) else stream.read()
    nested = len(re.findall(r"[\[{]", text)) >= 100 or re.search(r"^[ ?-]{100}", text, re.M)
    if not nested and "\t" not in text:
        try:
            return yaml.load(text, Loader=yaml.CSafeLoader)
        except (ValueError, yaml.YAMLError):
            pass
    if stream is not text:
        stream.seek(0)
    return load_yaml_in_python(stream)


def dump_yaml_fast(data: object, stream: object = None, **options: object) -> object:
    """Write YAML with PyYAML's emitter in C, which takes a quarter of the time."""
    return yaml.dump_all([data], stream, Dumper=yaml.CSafeDumper, **options)


load_yaml_in_python, dump_yaml_in_python = yaml.safe_load, yaml.safe_dump
if yaml.__with_libyaml__:
    yaml.safe_load = load_yaml_fast
    yaml.safe_dump = dump_yaml_fast


@pytest.fixture
def yaml_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read and write YAML as users do, with PyYAML's parser and emitter in Python."""
    monkeypatch.setattr(yaml, "safe_load", load_yaml_in_python)
    monkeypatch.setattr(yaml, "safe_dump", dump_yaml_in_python)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # imported here: the process of pytest-xdist that distributes tests needs no torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_collected() -> None:
    """Exclude the objects that exist before the tests of a file from garbage collection.

    Otherwise the many objects of imports and of earlier tests add up to a third of a second to each
    full collection, of which a study makes several.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use an empty cache folder instead of the cache of the person who runs the tests.

    The processes of pytest-xdist share the exported networks, so that only one of them exports a
    network. Each process has its own folder for the measured times of backends.
    """
    folder = tmp_path_factory.getbasetemp()
    own, shared = folder / "cache", folder / "exports"
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = folder.parent / "exports"
    os.environ["VOVNET_D2_CACHE"] = str(own)

    from vovnet_d2.backends import cache_folder

    def folder_of_exports() -> Path:
        return shared if cache_folder() == own else cache_folder()

    with mock.patch("vovnet_d2.backends.cache.cache_folder", folder_of_exports):
        yield


@pytest.fixture(scope="session", autouse=True)
def freed_memory_is_returned() -> Iterator[None]:
    """Keep the demo and the studies that tests run from changing the settings of the C library.

    With their settings, each process that runs tests would keep the most memory that any test
    needed, and several of them would fill a small machine.
    """
    library = SimpleNamespace(mallopt=lambda name, value: 1)
    ctypes = SimpleNamespace(CDLL=lambda name: library)
    with mock.patch("vovnet_d2.modeling.allocation.ctypes", ctypes):
        yield


@pytest.fixture(scope="session", autouse=True)
def meta_tensors_are_not_initialised() -> Iterator[None]:
    """Build networks on the meta device faster, for tools that need their shapes alone."""
    from devices import initialisation_without_meta

    with initialisation_without_meta():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """Give every test the same random numbers, whichever tests run before it.

    Without a GPU, torch.manual_seed would also record its call stack for CUDA, which takes longer
    than most of the tests.
    """
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries use this global generator)
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)
