# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Hundreds of malformed and hostile files are given to the tools. Each file ends with one sentence,
no file runs code, and no tool changes a file outside its output folder."""

import shutil
import sys
from functools import cache
from pathlib import Path

import check_dataset
import convert_weights
import pytest
from cases import case
from dataset_faults import FAULTS, SIZE, DataSet, require_trainable, spoil
from engine_runs import FASTER_RCNN
from malformed import (
    DOUBTFUL_IMAGES,
    HOSTILE_CONFIGS,
    MALFORMED_CONFIGS,
    MALFORMED_OPTIONS,
    UNREADABLE_IMAGES,
)
from test_checkpoint_reading import MALFORMED, WRITERS, Payload

from vovnet_d2.engine import main

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.usefixtures("yaml_in_python")

# Python cannot remove an audit hook, so there is only one. Tests switch it on and off.
_WRITING = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod"}
_RUNNING = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.spawn"}
_FORBIDDEN = _RUNNING | {"socket.connect", "socket.getaddrinfo", "urllib.Request"}
_watched: list["Watch"] = []


class Watch:
    """List of changes outside the output folder, and of started programs and connections."""

    def __init__(self, output: Path):
        self.output = str(output)
        self.seen: list[str] = []

    def note(self, event: str, args: tuple) -> None:
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {args}")
        elif event in _WRITING or (event == "open" and self._writes(args)):
            path = args[0].decode() if isinstance(args[0], bytes) else str(args[0])
            if not path.startswith((self.output, "/dev/")):
                self.seen.append(f"{event} {args}")

    @staticmethod
    def _writes(args: tuple) -> bool:
        path, mode, flags = args
        if not isinstance(path, str | bytes | Path):
            return False  # a file that is already open
        return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & 3)


def _audit(event: str, args: tuple) -> None:
    for watch in _watched:
        watch.note(event, args)


@cache
def add_audit_hook() -> None:
    """Add the hook when the first test needs it, because it slows everything that runs later."""
    sys.addaudithook(_audit)


def snapshot(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def sandbox(tmp_path: Path, fresh_logging: None, monkeypatch) -> Path:
    """Return a folder in which only ``output`` may change while :func:`watching` is active."""
    (tmp_path / "bystander").write_text("unharmed")
    (tmp_path / "output").mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "output" / "datasets"))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "output" / "cache"))
    return tmp_path


class watching:
    """Context that fails if anything changes outside the output folder, or if a program starts."""

    def __init__(self, sandbox: Path):
        self.sandbox = sandbox
        self.watch = Watch(sandbox / "output")

    def __enter__(self) -> None:
        add_audit_hook()
        self.before = self._others()
        _watched.append(self.watch)

    def __exit__(self, *error: object) -> None:
        _watched.remove(self.watch)
        if error[0] is None:
            assert self.watch.seen == []
            assert self._others() == self.before

    def _others(self) -> dict[str, bytes | str]:
        output = str(self.sandbox / "output")
        return {k: v for k, v in snapshot(self.sandbox).items() if not k.startswith(output)}


def require_a_sentence(capsys: pytest.CaptureFixture) -> None:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert len(lines[0]) < 2000
    assert "are frozen" not in lines[0]  # the error of any good config


def test_the_watch_notices_changes(sandbox: Path) -> None:
    """Check that the watch notices changes and programs."""
    for act in (
        lambda: (sandbox / "bystander").write_text("x"),
        lambda: (sandbox / "new").touch(),
        lambda: (sandbox / "bystander").unlink(),
        lambda: __import__("subprocess").run(["true"]),
        lambda: __import__("os").system("true"),
    ):
        with pytest.raises(AssertionError), watching(sandbox):
            act()
    with watching(sandbox):
        (sandbox / "output" / "a").write_text("x")


# Configs


def run_config(sandbox: Path, text: bytes, options: tuple[str, ...] = ()) -> None:
    path = sandbox / "config.yaml"
    path.write_bytes(text)
    with watching(sandbox), pytest.raises(SystemExit) as caught:
        main(["--config-file", str(path), *options, "OUTPUT_DIR", str(sandbox / "output")])
    assert caught.value.code == 2


def test_hostile_configs(sandbox: Path, capsys) -> None:
    mark = sandbox / "mark"
    for name, text in HOSTILE_CONFIGS.items():
        with case(name):
            run_config(sandbox, text.format(mark=mark).encode())
            assert not mark.exists()
            require_a_sentence(capsys)


def test_malformed_configs(sandbox: Path, capsys) -> None:
    for name, text in MALFORMED_CONFIGS.items():
        with case(name):
            run_config(sandbox, text)
            require_a_sentence(capsys)


def test_malformed_options(sandbox: Path, capsys) -> None:
    mark = sandbox / "mark"
    good = ["--config-file", FASTER_RCNN, "OUTPUT_DIR", str(sandbox / "output")]
    for name, words in MALFORMED_OPTIONS.items():
        with case(name):
            with watching(sandbox), pytest.raises(SystemExit) as caught:
                main([*good, *(word.format(mark=mark) for word in words)])
            assert caught.value.code == 2
            assert not mark.exists()
            if "unrecognized" not in (error := capsys.readouterr().err):
                assert error.startswith("error: ") or "\nerror: " in error
            assert "Traceback" not in error


# Weights


def convert(sandbox: Path, path: Path) -> None:
    words = [str(path), str(sandbox / "output" / "converted.pth"), "--allow-pickle"]
    with watching(sandbox), pytest.raises((ValueError, FileNotFoundError)) as caught:
        convert_weights.run(convert_weights.argument_parser().parse_args(words))
    message = str(caught.value)
    assert message.endswith((".", ")."))
    assert "\n" not in message
    assert not (sandbox / "output" / "converted.pth").exists()


# These are weights of other VoVNets than the model of the test, so they can be converted.
_CONVERTIBLE = {
    *["another VoVNet", "no stage2", "no stage5", "a block missing", "running statistics missing"],
    *["a kernel of another size", "a layer missing", "statistics of one norm missing"],
    *["another number of input channels", "not a number", "whole numbers"],
}


def test_malformed_weights(sandbox: Path) -> None:
    path = sandbox / "weights.pth"
    for name in sorted(MALFORMED.keys() - _CONVERTIBLE):
        with case(name):
            path.write_bytes(MALFORMED[name][0](path))
            convert(sandbox, path)


def test_hostile_weights(sandbox: Path) -> None:
    path = sandbox / "weights.pth"
    for write in WRITERS:
        with case(write.__name__):
            write(path, Payload(sandbox / "mark"))
            convert(sandbox, path)
            assert not (sandbox / "mark").exists()


# Annotations and images


def check(sandbox: Path, data: DataSet) -> int:
    words = ["--train-json", data.json, "--train-images", data.images]
    words += ["--json", sandbox / "output" / "report.json"]
    words += ["--fix", sandbox / "output" / "fixed.json"]
    with watching(sandbox):
        try:
            return check_dataset.main(list(map(str, words)))
        except SystemExit as ended:
            return int(ended.code or 0)


def test_malformed_annotations(sandbox: Path, capsys) -> None:
    for name, (fault, _) in FAULTS.items():
        data = DataSet(sandbox / "data")
        spoil(data, fault)
        with case(name):
            status = check(sandbox, data)
            captured = capsys.readouterr()
            assert "Traceback" not in captured.err
            if name == "mask missing":  # a detector of boxes only needs the box
                assert status == 0
            else:
                assert "error " in captured.out or "warning " in captured.out
                if status != 1:
                    assert status == 2  # no object is left
                    assert "error: Nothing of" in captured.err
        shutil.rmtree(data.folder)
        shutil.rmtree(sandbox / "output")
        (sandbox / "output").mkdir()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Write a data set of all malformed images and four good images."""
    data = DataSet(tmp_path_factory.mktemp("pictures") / "data")
    for number, content in enumerate([*UNREADABLE_IMAGES.values(), *DOUBTFUL_IMAGES.values()]):
        name = f"{number}.jpg"
        (data.images / name).write_bytes(content)
        image = {"id": 100 + number, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        data.content["images"].append(image)
        annotation = data.content["annotations"][0] | {"id": 100 + number, "image_id": image["id"]}
        data.content["annotations"].append(annotation)
    data.write()
    return data


def test_malformed_images(sandbox: Path, pictures: DataSet, capsys) -> None:
    assert check(sandbox, pictures) == 1
    assert "Traceback" not in capsys.readouterr().err
    data = DataSet(sandbox / "good")
    data.json, data.images = sandbox / "output" / "fixed.json", pictures.images
    left = data.json.read_text()
    for number in range(len(UNREADABLE_IMAGES)):
        assert f'"{number}.jpg"' not in left, list(UNREADABLE_IMAGES)[number]
    require_trainable(data)  # all remaining images can be read


def test_there_are_at_least_300_files() -> None:
    configs = len(HOSTILE_CONFIGS) + len(MALFORMED_CONFIGS) + len(MALFORMED_OPTIONS)
    weights = len(MALFORMED) - len(_CONVERTIBLE) + len(WRITERS)
    images = len(UNREADABLE_IMAGES) + len(DOUBTFUL_IMAGES)
    assert configs + weights + len(FAULTS) + images >= 300
