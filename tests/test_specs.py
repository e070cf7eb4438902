# Copyright (c) the vovnet_d2 authors.
# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from reference import STRUCTURES, TABLE

from vovnet_d2 import VOVNET_SPECS, VoVNetSpec
from vovnet_d2.modeling.specs import get_spec

SPEC = VOVNET_SPECS["V-39-eSE"]
WIDTH_FIELDS = ("stage_mid_channels", "stage_out_channels", "blocks_per_stage", "stem_channels")


def test_variants_equal_those_of_the_papers():
    expected = {name: VoVNetSpec(**vars(net)) for name, net in TABLE.items()}
    assert expected == VOVNET_SPECS


def test_specs_are_values():
    assert VOVNET_SPECS["V-57"] == replace(
        VOVNET_SPECS["V-39"], blocks_per_stage=[1, 1, 4, 3]
    )  # a list, as in YAML
    assert len({hash(spec) for spec in VOVNET_SPECS.values()}) == len(VOVNET_SPECS)
    with pytest.raises(FrozenInstanceError):
        SPEC.ese = "none"


@pytest.mark.parametrize("net", STRUCTURES.values(), ids=STRUCTURES)
def test_overrides_give_all_structures(net):
    assert get_spec("V-19-eSE", **vars(net)) == VoVNetSpec(**vars(net))
    assert get_spec(VoVNetSpec(**vars(net))) == VoVNetSpec(**vars(net))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("V-39-ese", "V-39-eSE"), ("V-19-slim-dw", "V-19-slim-dw-eSE"), ("V57-eSE", "V-57-eSE")],
)
def test_unknown_variant(name, meant):
    with pytest.raises(ValueError, match=rf"'{name}'\. Close to it: '{meant}'") as error:
        get_spec(name)
    assert all(variant in str(error.value) for variant in VOVNET_SPECS)


def test_unknown_variant_like_no_other():
    with pytest.raises(ValueError, match=r"^Unknown VoVNet variant 'R50'\. Choose from: V-27-slim"):
        get_spec("R50")


def test_unknown_field():
    with pytest.raises(ValueError, match=r"no field stem_width\. Its fields: blocks_per_stage, b"):
        get_spec("V-39", stem_width=64)


@pytest.mark.parametrize("field", WIDTH_FIELDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda widths: widths[:-1],
        lambda widths: (*widths, 64),
        lambda widths: (0, *widths[1:]),
        lambda widths: (-64, *widths[1:]),
        lambda widths: (64.0, *widths[1:]),
        lambda widths: (True, *widths[1:]),
        lambda widths: ("64", *widths[1:]),
        lambda widths: 64,
    ],
    ids=["short", "long", "zero", "negative", "float", "bool", "text", "number"],
)
def test_wrong_widths(field, change):
    value = change(getattr(SPEC, field))
    count = len(getattr(SPEC, field))
    message = f"VoVNetSpec.{field} is {value!r}: expected {count} positive integers."
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(SPEC, **{field: value})


@pytest.mark.parametrize("value", [0, -1, 2.5, None, True])
def test_wrong_number_of_layers(value):
    message = f"VoVNetSpec.layers_per_block is {value!r}: expected a positive integer."
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(SPEC, layers_per_block=value)


@pytest.mark.parametrize(
    ("field", "choices"), [("stem", "strided, pooled"), ("ese", "all, last, none")]
)
@pytest.mark.parametrize("value", ["All", "", None, True])
def test_wrong_choice(field, choices, value):
    message = f"VoVNetSpec.{field} is {value!r}: choose from {choices}."
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(SPEC, **{field: value})


@pytest.mark.parametrize("field", [f.name for f in fields(VoVNetSpec) if f.type in (bool, "bool")])
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_wrong_flag(field, value):
    message = f"VoVNetSpec.{field} is {value!r}: expected True or False."
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(SPEC, **{field: value})


def test_fields_that_exclude_each_other():
    with pytest.raises(ValueError, match="depthwise and bottleneck exclude each other"):
        replace(SPEC, depthwise=True, bottleneck=True)
    with pytest.raises(ValueError, match=r"\(65, 80, 96, 112\): a bottleneck halves"):
        replace(SPEC, stage_mid_channels=(65, 80, 96, 112), bottleneck=True)
