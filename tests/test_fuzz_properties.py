# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
"""Properties of random specs, configs and state dicts.

Valid ones work. All others raise an error that this package raises on purpose, with one sentence.
"""

from contextlib import suppress
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_dicts import COMPLETE_LAYOUTS

from vovnet_d2 import VoVNet, VoVNetCheckpointer, VoVNetSpec, convert_state_dict
from vovnet_d2.checkpoint.reading import read_checkpoint
from vovnet_d2.engine import load_config
from vovnet_d2.errors import UserError

FUZZ: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
few = settings(max_examples=25, **FUZZ)
many = settings(max_examples=200, **FUZZ)


# Specs

widths = st.integers(1, 6).map(lambda half: 2 * half)  # even, because a bottleneck halves them
four = st.tuples(widths, widths, widths, widths)
GOOD_FIELDS = {
    "stage_mid_channels": four,
    "stage_out_channels": four,
    "blocks_per_stage": st.tuples(*[st.integers(1, 2)] * 4),
    "layers_per_block": st.integers(1, 3),
    "stem_channels": st.tuples(widths, widths, widths),
    "stem": st.sampled_from(["strided", "pooled"]),
    "residual": st.booleans(),
    "ese": st.sampled_from(["all", "last", "none"]),
    "depthwise": st.booleans(),
    "bottleneck": st.booleans(),
}
specs = (
    st.fixed_dictionaries(GOOD_FIELDS)
    .filter(lambda f: not (f["depthwise"] and f["bottleneck"]))
    .map(lambda f: VoVNetSpec(**f))
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def check_spec(spec: VoVNetSpec) -> None:
    model = VoVNet(spec, norm="BN", out_features=["stem", "stage2", "stage3", "stage4", "stage5"])
    with torch.no_grad():
        outputs = model.eval()(torch.rand(1, 3, 64, 96))
    channels = [spec.stem_channels[-1], *spec.stage_out_channels]
    strides = [4 if spec.stem == "strided" else 2, 4, 8, 16, 32]
    for (name, map_), width, stride in zip(outputs.items(), channels, strides, strict=True):
        assert map_.shape == (1, width, 64 // stride, 96 // stride), name
        assert model.output_shape()[name].stride == stride


@few
@given(specs)
def test_networks_match_their_specs(spec: VoVNetSpec) -> None:
    check_spec(spec)


@pytest.mark.slow
@many
@given(specs)
def test_many_networks_match_their_specs(spec: VoVNetSpec) -> None:
    check_spec(spec)


@settings(max_examples=100, **FUZZ)
@given(specs, st.sampled_from(list(GOOD_FIELDS)), anything)
def test_other_values_of_a_field_are_refused(spec: VoVNetSpec, field: str, value: Any) -> None:
    fields = {**vars(spec), field: value}
    try:
        VoVNetSpec(**fields)
    except UserError:
        pass
    else:
        hash(VoVNetSpec(**fields))  # the fields are no lists or dicts of YAML


# State dicts


def small_state(spec: VoVNetSpec) -> dict[str, torch.Tensor]:
    return VoVNet(spec, norm="BN").state_dict()


def check_round_trip(spec: VoVNetSpec, layout: str) -> None:
    state = small_state(spec)
    try:
        there = convert_state_dict(state, layout)
    except UserError:  # for example, timm has no bottleneck
        return
    back = convert_state_dict(there, "native")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    return None


@few
@given(specs, st.sampled_from(COMPLETE_LAYOUTS))
def test_conversions_can_be_reversed(spec: VoVNetSpec, layout: str) -> None:
    check_round_trip(spec, layout)


@pytest.mark.slow
@many
@given(specs, st.sampled_from(COMPLETE_LAYOUTS))
def test_many_conversions_can_be_reversed(spec: VoVNetSpec, layout: str) -> None:
    check_round_trip(spec, layout)


SPEC = VoVNetSpec((2,) * 4, (2,) * 4, (1, 1, 2, 1), 1, (2, 2, 2), ese="all")
NAMES = sorted(small_state(SPEC))
tensors = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.ones(2),
        torch.ones(2, 2, 3, 3),
        torch.full((2,), torch.nan),
        torch.ones(2, dtype=torch.int32),
        torch.ones(2, dtype=torch.bool),
    ]
)
edits = st.lists(
    st.tuples(
        st.sampled_from(["drop", "rename", "replace", "add"]),
        st.sampled_from(NAMES),
        st.one_of(st.sampled_from(NAMES), st.text(max_size=8)),
        tensors,
    ),
    max_size=5,
)


def check_edited(tmp_path: Any, changes: list) -> None:
    state = small_state(SPEC)
    for what, name, other, tensor in changes:
        if what == "drop":
            state.pop(name, None)
        elif what == "rename" and name in state:
            state[other] = state.pop(name)
        elif what == "replace":
            state[name] = tensor
        else:
            state[other] = tensor
    path = tmp_path / "weights.pth"
    torch.save({"model": dict(state)}, path)
    model = VoVNet(SPEC, norm="BN")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        VoVNetCheckpointer(model).load(str(path))
    except UserError:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])


@few
@given(changes=edits)
def test_edited_weights_load_or_are_refused(tmp_path: Any, changes: list) -> None:
    check_edited(tmp_path, changes)


@pytest.mark.slow
@many
@given(changes=edits)
def test_many_edited_weights_load_or_are_refused(tmp_path: Any, changes: list) -> None:
    check_edited(tmp_path, changes)


def check_bytes(tmp_path: Any, data: bytes, place: float, drop: int) -> None:
    """Read a file of weights in which some bytes are replaced."""
    path = tmp_path / "weights.pth"
    torch.save({"model": {"a": torch.arange(9)}}, path)
    content = path.read_bytes()
    start = int(place * len(content))
    path.write_bytes(content[:start] + data + content[start + drop :])
    with suppress(UserError):
        read_checkpoint(str(path), allow_pickle=True)


@settings(max_examples=60, **FUZZ)
@given(data=st.binary(max_size=20), place=st.floats(0, 1), drop=st.integers(0, 20))
def test_damaged_files_are_read_or_refused(
    tmp_path: Any, data: bytes, place: float, drop: int
) -> None:
    check_bytes(tmp_path, data, place, drop)


@pytest.mark.slow
@settings(max_examples=1500, **FUZZ)
@given(data=st.binary(max_size=20), place=st.floats(0, 1), drop=st.integers(0, 20))
def test_many_damaged_files_are_read_or_refused(
    tmp_path: Any, data: bytes, place: float, drop: int
) -> None:
    check_bytes(tmp_path, data, place, drop)


# Configs


def keys(node: CfgNode, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in node.items():
        found.append((*prefix, key))
        if isinstance(value, CfgNode):
            found += keys(value, (*prefix, key))
    return found


KEYS = keys(load_config())


def check_config_value(tmp_path: Any, key: tuple[str, ...], value: Any) -> None:
    content = value
    for part in reversed(key):
        content = {part: content}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    try:
        cfg = load_config(str(path))
    except UserError:
        return
    path.write_text(cfg.dump())  # a run writes this file, and another run may read it
    again = load_config(str(path))
    assert repr(yaml.safe_load(again.dump())) == repr(yaml.safe_load(cfg.dump()))
    return None


@few
@given(key=st.sampled_from(KEYS), value=anything)
def test_config_values_load_or_are_refused(tmp_path: Any, key: tuple[str, ...], value: Any) -> None:
    check_config_value(tmp_path, key, value)


@pytest.mark.slow
@many
@given(key=st.sampled_from(KEYS), value=anything)
def test_many_config_values_load_or_are_refused(
    tmp_path: Any, key: tuple[str, ...], value: Any
) -> None:
    check_config_value(tmp_path, key, value)


@few
@given(text=st.text(alphabet="ab:-[]{}&*!|>'\"#%@, \n\t1.~?", max_size=40))
def test_config_texts_load_or_are_refused(tmp_path: Any, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with suppress(UserError):
        load_config(str(path))


@few
@given(words=st.lists(st.sampled_from([".".join(key) for key in KEYS]) | st.text(), max_size=4))
def test_options_are_taken_or_refused(words: list[str]) -> None:
    with suppress(UserError):
        load_config("", words)
