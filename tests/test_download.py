# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Downloads of weights from a local server, which fails in the ways in which servers fail."""

import hashlib
import http.server
import re
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import TABLE, random_state, thin

from vovnet_d2 import VoVNet, VoVNetCheckpointer, VoVNetSpec, convert_state_dict
from vovnet_d2.checkpoint import zoo
from vovnet_d2.checkpoint.download import MIRROR
from vovnet_d2.checkpoint.fetching import fetch
from vovnet_d2.checkpoint.zoo import ZOO

CONTENT = bytes(range(256)) * 4096
SHA1 = f"sha1:{hashlib.sha1(CONTENT).hexdigest()}"
HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


class Server:
    """Server of some files. It records requests, and can end answers too early."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.breaks: list[int] = []  # the lengths in bytes of the next answers
        self.ranges = True

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.answer(handler)

            def log_message(handler, *args) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        name = handler.path.removeprefix("/").partition("?")[0]
        wanted = handler.headers.get("Range", "")
        self.asked.append((name, wanted))
        if name not in self.files:
            return handler.send_error(404)
        content = self.files[name]
        start = int(wanted[len("bytes=") : -1]) if wanted and self.ranges else 0
        if start and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        sent = self.breaks.pop(0) if self.breaks else len(content)
        handler.wfile.write(content[start : start + sent])
        return None


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


# One file


def test_a_download_and_its_progress_bar(server, tmp_path, capsys):
    server.files["a.pth"] = CONTENT
    path = fetch([f"{server.url}/a.pth?dl=1"], tmp_path)
    assert Path(path) == tmp_path / "a.pth"
    assert Path(path).read_bytes() == CONTENT
    bar = capsys.readouterr().err
    assert "a.pth: 100%" in bar
    assert "1.00M/1.00M" in bar
    assert fetch([f"{server.url}/a.pth"], tmp_path) == path
    assert len(server.asked) == 1  # the second call sends no request


def test_a_broken_connection_is_resumed_at_once(server, tmp_path):
    server.files["a.pth"] = CONTENT
    server.breaks = [1000, 2000]
    path = fetch([f"{server.url}/a.pth"], tmp_path, checksum=SHA1)
    assert Path(path).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == ["", "bytes=1000-", "bytes=3000-"]
    assert files_in(tmp_path) == ["a.pth"]


def test_an_interrupted_download_is_resumed_later(server, tmp_path, capsys):
    server.files["a.pth"] = CONTENT
    half = len(CONTENT) // 2
    server.breaks = [half, 0]
    with pytest.raises(FileNotFoundError, match=rf"ended after {half} of {len(CONTENT)} bytes"):
        fetch([f"{server.url}/a.pth"], tmp_path, checksum=SHA1)
    (partial,) = files_in(tmp_path)
    assert partial.endswith(".partial")
    server.asked.clear()
    capsys.readouterr()
    path = fetch([f"{server.url}/a.pth"], tmp_path, checksum=SHA1)
    assert Path(path).read_bytes() == CONTENT
    assert server.asked == [("a.pth", f"bytes={half}-")]
    assert re.search(r"a.pth:  50%.*512k/1.00M", capsys.readouterr().err)


def test_a_server_that_cannot_resume_sends_the_whole_file(server, tmp_path):
    server.files["a.pth"] = CONTENT
    server.ranges = False
    server.breaks = [1000]
    path = fetch([f"{server.url}/a.pth"], tmp_path, checksum=SHA1)
    assert Path(path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("left", "asked_from"),
    [
        (CONTENT, len(CONTENT)),  # the process was killed after the last byte, before the renaming
        (bytes(5000), 0),  # a part of another file, which the checksum shows
        (bytes(2 * len(CONTENT)), 0),
    ],
    ids=["all but the name", "part of another", "too long"],
)
def test_files_of_an_interrupted_download(server, tmp_path, left, asked_from):
    server.files["a.pth"] = CONTENT
    server.breaks = [1, 0]
    with pytest.raises(FileNotFoundError):
        fetch([f"{server.url}/a.pth"], tmp_path)
    (partial,) = files_in(tmp_path)
    (tmp_path / partial).write_bytes(left)
    path = fetch([f"{server.url}/a.pth"], tmp_path, checksum=SHA1)
    assert Path(path).read_bytes() == CONTENT
    assert server.asked[-1] == ("a.pth", f"bytes={asked_from}-" if asked_from else "")


def test_parts_of_two_addresses_are_not_mixed(server, tmp_path):
    """Use two servers with different files of the same name, and no checksum."""
    server.files |= {"one/a.pth": CONTENT, "two/a.pth": CONTENT[::-1]}
    server.breaks = [1000, 0]
    with pytest.raises(FileNotFoundError):
        fetch([f"{server.url}/one/a.pth"], tmp_path)
    path = fetch([f"{server.url}/two/a.pth"], tmp_path)
    assert Path(path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(
    ("served", "checksum", "reason"),
    [
        (None, SHA1, "HTTP Error 404: Not Found"),
        (HTML, "", "the server answers with an HTML page"),
        (CONTENT[1:], SHA1, f"another checksum than {SHA1}"),
        (CONTENT, "md5:00", "another checksum than md5:00"),
    ],
    ids=["404", "HTML", "wrong SHA-1", "wrong md5"],
)
def test_the_next_address_is_tried(server, tmp_path, served, checksum, reason, caplog):
    if served is not None:
        server.files["a.pth"] = served
    with pytest.raises(FileNotFoundError, match=reason):
        fetch([f"{server.url}/a.pth"], tmp_path, checksum=checksum)
    assert files_in(tmp_path) == []
    server.files["b.pth"] = CONTENT
    checksum = checksum if "md5" not in checksum else f"md5:{hashlib.md5(CONTENT).hexdigest()[:8]}"
    path = fetch([f"{server.url}/{n}.pth" for n in "ab"], tmp_path, checksum=checksum)
    assert Path(path).read_bytes() == CONTENT
    assert reason in caplog.text


def test_no_network(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"http://127.0.0.1:9/a.pth: .*[Rr]efused"):
        fetch(["http://127.0.0.1:9/a.pth"], tmp_path)


def test_several_processes_download_once(server, tmp_path):
    """Use threads instead of processes, because the lock is the same."""
    server.files["a.pth"] = CONTENT
    results = []

    def run() -> None:
        results.append(fetch([f"{server.url}/a.pth"], tmp_path, checksum=SHA1))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [str(tmp_path / "a.pth")] * 4
    assert len(server.asked) == 1


# Files of the zoo

NET = thin(TABLE["V-39"])
NAME = "osmr://vovnet39"


@pytest.fixture
def entry(server, tmp_path, monkeypatch):
    """Put a thin V-39 of osmr on the server as a .pth.zip, and use an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(MIRROR, raising=False)
    torch.save(convert_state_dict(random_state(NET), "osmr"), tmp_path / "vovnet39.pth")
    content = (tmp_path / "vovnet39.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "vovnet39.pth.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "vovnet39.pth", "vovnet39.pth")
    server.files["vovnet39.pth.zip"] = (tmp_path / "vovnet39.pth.zip").read_bytes()
    entry = replace(
        ZOO[NAME],
        spec=VoVNetSpec(**vars(NET)),
        links=(f"{server.url}/vovnet39.pth.zip", f"{server.url}/vovnet39.pth"),
        checksum=f"sha1:{hashlib.sha1(content).hexdigest()}",
    )
    monkeypatch.setitem(zoo.ZOO, NAME, entry)
    return entry


def load(name: str = NAME) -> VoVNetCheckpointer:
    model = VoVNet(VoVNetSpec(**vars(NET)))
    torch.nn.init.zeros_(model.stem.conv1.weight)
    checkpointer = VoVNetCheckpointer(model)
    checkpointer.load(name)
    assert model.stem.conv1.weight.any()
    return checkpointer


def test_weights_by_name(server, entry, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        assert load().input_convention == entry.input
    assert not caplog.text
    assert load().input_convention == entry.input
    assert server.asked == [("vovnet39.pth.zip", "")]
    assert files_in(tmp_path / "torch" / "hub" / "checkpoints") == ["vovnet39.pth.zip"]


def test_a_licence_that_forbids_commercial_use_is_logged(server, entry, monkeypatch, caplog):
    licence = ZOO["v99://fcos3d"].license
    monkeypatch.setitem(zoo.ZOO, NAME, replace(entry, license=licence))
    load()
    assert f"The licence of {NAME} is non-commercial (DDAD, nuScenes)." in caplog.text


def test_a_damaged_file_in_the_cache(server, entry, tmp_path):
    load()
    path = tmp_path / "torch" / "hub" / "checkpoints" / "vovnet39.pth.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vovnet39.pth", b"other")
    with pytest.raises(ValueError, match=rf"{path} is not the file that .*: delete it"):
        load()


def test_weights_that_no_address_has(server, entry):
    server.files.clear()
    with pytest.raises(FileNotFoundError, match=r"zip: HTTP Error 404.*pth: HTTP Error 404") as e:
        load()
    assert MIRROR in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["vovnet39.pth", "vovnet39.pth.zip"])
def test_a_folder_for_machines_without_a_network(server, entry, tmp_path, monkeypatch, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / name).rename(tmp_path / "mine" / name)
    monkeypatch.setenv(MIRROR, str(tmp_path / "mine"))
    load()
    assert server.asked == []
    torch.save({}, tmp_path / "mine" / name)
    with pytest.raises(ValueError, match="is not the file that"):
        load()
    (tmp_path / "mine" / name).unlink()
    load()  # missing files are downloaded
    assert len(server.asked) == 1
    monkeypatch.setenv(MIRROR, str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=rf"{MIRROR} is .*nothing, which is no folder"):
        load()


def test_a_mirror(server, entry, monkeypatch):
    """Check that a mirror is used before the addresses of a file, also for files of the hub."""
    server.files["own/vovnet39.pth.zip"] = server.files.pop("vovnet39.pth.zip")
    monkeypatch.setenv(MIRROR, f"{server.url}/own/")
    load()
    assert server.asked == [("own/vovnet39.pth.zip", "")]
    name = "timm://ese_vovnet39b.ra_in1k"
    monkeypatch.setitem(zoo.ZOO, name, replace(ZOO[name], spec=entry.spec))
    server.files["own/ese_vovnet39b.ra_in1k.safetensors"] = server.files["own/vovnet39.pth.zip"]
    load(name)
    assert server.asked[1] == ("own/ese_vovnet39b.ra_in1k.safetensors", "")
