# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import errno
import hashlib
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from devices import shapes_alone
from huggingface_hub import constants
from pytorchcv.models.common.model_store import get_model_name_suffix_data, imgclsmob_repo_url
from reference import thin
from safetensors.torch import save_file
from state_dicts import snapshot

from vovnet_d2 import VOVNET_SPECS, VoVNet, VoVNetCheckpointer, convert_state_dict, zoo_page
from vovnet_d2.checkpoint import zoo
from vovnet_d2.checkpoint.download import MIRROR
from vovnet_d2.checkpoint.zoo import ZOO, get_entry

ROOT = Path(__file__).parent.parent
SMALLEST = "timm://ese_vovnet19b_dw.ra_in1k"

each_entry = pytest.mark.parametrize("name", ZOO)
each_of_timm = pytest.mark.parametrize("name", [n for n in ZOO if n.startswith("timm://")])


# The table


def test_every_trained_vovnet_of_timm_is_in_the_zoo():
    trained = timm.list_pretrained("*vovnet*")
    assert {f"timm://{name}" for name in trained} == {n for n in ZOO if n.startswith("timm://")}


@each_of_timm
def test_entries_agree_with_the_table_of_timm(name):
    """Compare the input and the licence of each entry with the table in timm."""
    entry, record = ZOO[name], timm.get_pretrained_cfg(name.removeprefix("timm://"))
    assert entry.repo == record.hf_hub_id
    assert entry.license.lower() == record.license
    assert entry.input.format == "RGB"
    assert entry.input.pixel_mean == pytest.approx([255 * v for v in record.mean])
    assert entry.input.pixel_std == pytest.approx([255 * v for v in record.std])
    sizes = {record.input_size[1], record.test_input_size[1]}
    assert set(entry.top1) <= sizes


@each_of_timm
def test_specs_match_the_networks_of_timm(name):
    with shapes_alone():
        peer = timm.create_model(name.removeprefix("timm://"), pretrained=False)
        model = VoVNet(ZOO[name].spec, norm="BN", num_classes=1000)
    model.load_state_dict(peer.state_dict(), assign=True)
    assert ZOO[name].spec == replace(VOVNET_SPECS[ZOO[name].variant], ese="last")
    residual = [b.residual for stage in peer.stages for b in stage.blocks]
    ours = [b.residual for s in model.stage_names for b in getattr(model, s)]
    assert residual == ours


@each_of_timm
def test_urls_of_the_hub(name):
    entry = ZOO[name]
    revision = entry.revision or "main"
    url = f"https://huggingface.co/{entry.repo}/resolve/{revision}/model.safetensors"
    assert entry.urls == (url,)
    assert revision == "main" or len(revision) == 40


@pytest.mark.parametrize("name", [n for n in ZOO if n.startswith("osmr://")])
def test_entries_agree_with_the_table_of_pytorchcv(name):
    """Compare the names and SHA-1 sums of files with the table in pytorchcv."""
    entry, short = ZOO[name], name.removeprefix("osmr://")
    error, sha1, release = get_model_name_suffix_data(short)
    url = f"{imgclsmob_repo_url}/releases/download/{release}/{short}-{error}-{sha1[:8]}.pth"
    assert entry.urls == (f"{url}.zip", url)
    assert entry.checksum == f"sha1:{sha1}"
    assert entry.license == "MIT"


@each_entry
def test_fields_of_an_entry(name):
    entry = ZOO[name]
    assert entry.urls
    assert all(url.startswith("https://") for url in entry.urls)
    assert entry.commercial == (entry.license in ("MIT", "Apache-2.0"))
    assert entry.commercial or "nuScenes" in entry.trained_on
    algorithm, _, digits = entry.checksum.partition(":")
    assert re.fullmatch("[0-9a-f]*", digits)
    assert len(digits) == {"": 0, "md5": 32, "sha1": 40}[algorithm]
    same = [n for n, other in ZOO.items() if set(other.file_names) & set(entry.file_names)]
    assert same == [name], "file names must differ, because one folder may hold all files"


def test_the_error_of_an_unknown_name_lists_all_names():
    with pytest.raises(ValueError, match=r"Close to it: 'timm://ese_vovnet39b\.ra_in1k'") as caught:
        get_entry("timm://ese_vovnet39b")
    listed = str(caught.value).partition("There are: ")[2].partition(". Other VoVNets")[0]
    assert listed.split(", ") == list(ZOO)
    with pytest.raises(ValueError, match="Other VoVNets of timm have no trained weights"):
        VoVNetCheckpointer(VoVNet("V-27-slim")).load("timm://ese_vovnet99b")


# The page


def test_the_page_is_up_to_date():
    """Compare the page. Run ``python -m vovnet_d2.zoo_page > MODEL_ZOO.md`` if this fails."""
    assert (ROOT / "MODEL_ZOO.md").read_text() == zoo_page.render() + "\n"


@each_entry
def test_the_page_names_everything(name):
    page, entry = (ROOT / "MODEL_ZOO.md").read_text(), ZOO[name]
    lines = entry.input.config_lines()
    for part in (name, entry.variant, *entry.urls, entry.license, entry.trained_on, *lines):
        assert part in page
    assert all(part in page for part in (*entry.file_names, entry.checksum))
    assert all(variant in page for variant in VOVNET_SPECS)


# Files from a cache in the layout of the hub


def fill_cache(root: Path, name: str, state, revision: str | None, content=None) -> Path:
    """Put weights into a cache in the layout of huggingface_hub; return the file of the content."""
    entry = ZOO[name]
    repo = root / f"models--{entry.repo.replace('/', '--')}"
    commit = revision or 40 * "1"
    snapshots, blobs = repo / "snapshots" / commit, repo / "blobs"
    for folder in (snapshots, blobs, repo / "refs"):
        folder.mkdir(parents=True)
    save_file(state, root / "file")
    digest = hashlib.sha256((root / "file").read_bytes()).hexdigest()
    if content is not None:
        (root / "file").write_bytes(content)
    (root / "file").rename(blobs / digest)
    (snapshots / "model.safetensors").symlink_to(Path("../../blobs") / digest)
    (repo / "refs" / "main").write_text(commit)
    return blobs / digest


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Use an empty cache, and let all connections fail."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(MIRROR, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    name = SMALLEST.removeprefix("timm://")
    return timm.create_model(name, pretrained=False, num_classes=3).state_dict()


@pytest.fixture(scope="module")
def model() -> VoVNet:
    return VoVNet(ZOO[SMALLEST].spec)


@pytest.mark.parametrize("revision", [ZOO[SMALLEST].revision, None], ids=["pinned", "another"])
def test_cached_weights_load_offline(cache, state, model, revision, caplog):
    fill_cache(cache, SMALLEST, state, revision)
    torch.nn.init.zeros_(model.stem.conv1.weight)
    checkpointer = VoVNetCheckpointer(model)
    checkpointer.load(SMALLEST)
    assert torch.equal(model.stem.conv1.weight, state["stem.0.conv.weight"])
    assert checkpointer.input_convention == ZOO[SMALLEST].input
    # A warning names a revision other than the pinned one.
    warnings = [r.getMessage() for r in caplog.records if "Revision" in r.getMessage()]
    assert len(warnings) == (revision is None)
    for warning in warnings:
        assert f"Revision {ZOO[SMALLEST].revision} of timm/ese_vovnet19b_dw" in warning
        assert f"revision {40 * '1'} in the cache is used" in warning


def test_the_pinned_revision_is_preferred_to_the_newest(cache, state, model):
    fill_cache(cache, SMALLEST, state, ZOO[SMALLEST].revision)
    (main,) = cache.glob("*/refs/main")
    main.write_text(40 * "2")
    VoVNetCheckpointer(model).load(SMALLEST)


def test_a_full_disk_is_an_error(cache, state, model, monkeypatch):
    """Fill the disk, while another revision is in the cache."""
    fill_cache(cache, SMALLEST, state, None)
    download = huggingface_hub.hf_hub_download

    def fail(*args, local_files_only=False, **kwargs):
        if local_files_only:
            return download(*args, local_files_only=True, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match="No space left on device"):
        VoVNetCheckpointer(model).load(SMALLEST)


def test_an_empty_cache(cache, model):
    with pytest.raises(FileNotFoundError, match="not in the cache") as caught:
        VoVNetCheckpointer(model).load(SMALLEST)
    assert ZOO[SMALLEST].urls[0] in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    way_out = (
        f"name the file {ZOO[SMALLEST].file_names[0]} and set the environment variable {MIRROR}"
    )
    assert way_out in str(caught.value)
    assert "offline mode is enabled" in str(caught.value)  # the reason of the hub


def test_a_damaged_file_in_the_cache(cache, state, model):
    blob = fill_cache(cache, SMALLEST, state, ZOO[SMALLEST].revision)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 0xFF  # a wrong byte in a tensor, which safetensors does not notice
    blob.write_bytes(content)
    before = snapshot(model)
    with pytest.raises(ValueError, match="is not the file that timm/ese_vovnet19b_dw"):
        VoVNetCheckpointer(model).load(SMALLEST)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_pinned_checksum(cache, state, model, monkeypatch):
    fill_cache(cache, SMALLEST, state, ZOO[SMALLEST].revision)
    monkeypatch.setitem(zoo.ZOO, SMALLEST, replace(ZOO[SMALLEST], checksum="sha256:00"))
    with pytest.raises(ValueError, match=r"\(sha256:00\): delete it"):
        VoVNetCheckpointer(model).load(SMALLEST)


def test_weights_of_another_variant_are_refused(cache, state):
    fill_cache(cache, SMALLEST, state, ZOO[SMALLEST].revision)
    with pytest.raises(ValueError, match=r'MODEL\.VOVNET\.CONV_BODY: "V-19-dw-eSE"'):
        VoVNetCheckpointer(VoVNet("V-19-slim-eSE")).load(SMALLEST)


def test_the_zoo_gives_the_residual(cache, monkeypatch):
    name = "timm://ese_vovnet39b.ra_in1k"
    monkeypatch.setitem(zoo.ZOO, name, replace(ZOO[name], spec=thin(ZOO[name].spec)))
    state = convert_state_dict(VoVNet(ZOO[name].spec).state_dict(), "timm")
    fill_cache(cache, name, state, ZOO[name].revision)
    spec = replace(ZOO[name].spec, residual=False)
    with pytest.raises(
        ValueError, match=r"residual is True \(timm/ese_vovnet39b.ra_in1k\).*: True"
    ):
        VoVNetCheckpointer(VoVNet(spec)).load(name)


def test_without_huggingface_hub(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub safetensors"):
        VoVNetCheckpointer(model).load(SMALLEST)


@pytest.mark.slow
def test_offline_mode_by_the_environment(tmp_path, state):
    """Set the variable in another process, as a user does."""
    fill_cache(tmp_path, SMALLEST, state, ZOO[SMALLEST].revision)
    program = (
        "from vovnet_d2.checkpoint.sources import read_weights;"
        f"print(len(read_weights({SMALLEST!r})[0]['model']))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == str(len(state)), run.stderr
