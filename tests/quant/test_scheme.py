"""Schemes: JSON round trip, and one SchemeError with the value in it for everything that makes no sense."""

from __future__ import annotations

import json
import math

import pytest

from bitpalette.quant.codec import get_codec
from bitpalette.quant.float import FloatScheme
from bitpalette.quant.int import IntScheme
from bitpalette.quant.lut import LutScheme
from bitpalette.quant.scheme import Scheme, SchemeError
from bitpalette.quant.solver import get_solver, plan_solver, quantize_tensor
from bitpalette.quant.tensor import QuantizedTensor, field_specs
from bitpalette.quant.transform import get_transform

GOOD = [
    {"codec": "int"},
    {"codec": "int", "bits": 3, "group_size": 64, "symmetric": False, "transforms": ["rotate"]},
    {"codec": "int", "bits": 8, "per_input_channel": True, "transforms": ["scale", "rotate"]},
    {"codec": "int", "group_size": 128, "symmetric": False, "progressive": True},
    {"codec": "float"},
    {"codec": "float", "element": "e3m2", "scale_format": "e8m0", "group_size": 32},
    {"codec": "float", "scale_format": "e4m3", "group_size": 16, "transforms": ["rotate"]},
    {"codec": "lut", "table": "nf4", "group_size": 64},
    {"codec": "lut", "table": "kmeans", "table_scope": "row", "entries": 5, "scaled": False},
    {"codec": "lut", "table": "values", "entries": 4, "values": [-1.5, -0.5, 0.5, 2.0]},
]

BAD = [
    ({"codec": "int", "bits": 0}, "0"),
    ({"codec": "int", "bits": 9}, "9"),
    ({"codec": "int", "bits": True}, "True"),
    ({"codec": "int", "bits": "4"}, "'4'"),
    ({"codec": "int", "bits": 4.0}, "4.0"),
    ({"codec": "int", "bits": None}, "None"),
    ({"codec": "int", "bits": [4]}, "4"),
    ({"codec": "int", "group_size": 3}, "3"),
    ({"codec": "int", "group_size": -1}, "-1"),
    ({"codec": "int", "group_size": 64.0}, "64.0"),
    ({"codec": "int", "symmetric": 1}, "1"),
    ({"codec": "int", "symmetric": "no"}, "no"),
    ({"codec": "int", "per_input_channel": True, "group_size": 64}, "64"),
    ({"codec": "int", "bit": 4}, "bit"),
    ({"codec": "int", "transforms": ["rotat"]}, "rotat"),
    ({"codec": "int", "transforms": ["rotate", "rotate"]}, "rotate"),
    ({"codec": "int", "transforms": [1]}, "1"),
    ({"codec": "int", "transforms": None}, "None"),
    ({"codec": "nit"}, "nit"),
    ({"codec": "float", "element": "e5m2"}, "e5m2"),
    ({"codec": "float", "element": 4}, "4"),
    ({"codec": "float", "group_size": 7}, "7"),
    ({"codec": "float", "scale_format": "bf16"}, "bf16"),
    ({"codec": "float", "scale_format": "e8m0", "group_size": 64}, "64"),
    ({"codec": "float", "scale_format": "e4m3", "group_size": 32}, "32"),
    ({"codec": "float", "scale_format": "e4m3", "group_size": 16, "element": "e4m3"}, "e2m1"),
    ({"codec": 4}, "4"),
    ({"bits": 4}, "bits"),
    ({}, "{}"),
    ([], "[]"),
    ("int", "int"),
    (None, "None"),
    ({"codec": "lut", "entries": 3}, "3"),
    ({"codec": "lut", "entries": 257}, "257"),
    ({"codec": "lut", "entries": True}, "True"),
    ({"codec": "lut", "table": "nf5"}, "nf5"),
    ({"codec": "lut", "table": ["nf4"]}, "nf4"),
    ({"codec": "lut", "table": "nf4", "entries": 8}, "8"),
    ({"codec": "lut", "table_scope": "column"}, "column"),
    ({"codec": "lut", "table": "lloyd", "table_scope": "row"}, "lloyd"),
    ({"codec": "lut", "table": "lloyd", "scaled": False}, "lloyd"),
    ({"codec": "lut", "table": "kmeans", "scaled": 0}, "0"),
    ({"codec": "lut", "table": "kmeans", "scaled": False, "group_size": 64}, "64"),
    ({"codec": "lut", "group_size": 7}, "7"),
    ({"codec": "lut", "table": "lloyd", "values": [1, 2, 3, 4]}, "lloyd"),
    ({"codec": "lut", "table": "values"}, "16"),
    ({"codec": "lut", "table": "values", "entries": 4, "values": [1, 2, 3]}, "3"),
    ({"codec": "lut", "table": "values", "entries": 4, "values": 4}, "4"),
    ({"codec": "lut", "table": "values", "entries": 4, "values": [0, 1, 2, "3"]}, "3"),
    ({"codec": "lut", "table": "values", "entries": 4, "values": [0, 1, 2, math.nan]}, "nan"),
    ({"codec": "lut", "table": "values", "entries": 4, "values": [0, 1, 2, 1e6]}, "1000000"),
    ({"codec": "lut", "table": "values", "entries": 4, "values": [0, 1, 1, 2]}, "distinct"),
    ({"codec": "lut", "table": "values", "entries": 4, "values": [0, 1, 1 + 1e-6, 2]}, "fp16"),
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_json_round_trip(values: dict) -> None:
    scheme = Scheme.from_dict(values)
    text = json.dumps(scheme.to_dict())
    assert Scheme.from_dict(json.loads(text)) == scheme
    assert hash(Scheme.from_dict(json.loads(text))) == hash(scheme)
    assert json.loads(text) == {k: v for k, v in values.items() if (k, v) != ("table", "lloyd")}
    assert Scheme.from_dict(scheme) is scheme


@pytest.mark.parametrize(("values", "named"), BAD, ids=str)
def test_what_makes_no_sense_is_refused_by_value(values: object, named: str) -> None:
    with pytest.raises(SchemeError) as error:
        Scheme.from_dict(values)  # type: ignore[arg-type]
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scheme", [FloatScheme(group_size=64), IntScheme(group_size=64), LutScheme(group_size=64)])
def test_group_wider_than_the_weight(scheme: Scheme) -> None:
    scheme.check_shape((8, 64))
    with pytest.raises(SchemeError, match=r"64.*63"):
        scheme.check_shape((8, 63))


@pytest.mark.parametrize("shape", [(8,), (8, 0), (0, 8), (1, 2, 3, 4)])
def test_a_weight_has_two_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(SchemeError):
        field_specs(IntScheme(), shape)


def test_replace_validates() -> None:
    assert IntScheme().replace(bits=3) == IntScheme(bits=3)
    with pytest.raises(SchemeError):
        IntScheme().replace(bits=11)


def test_unknown_names_list_what_there_is() -> None:
    for get, known in ((get_codec, "int"), (get_transform, "rotate"), (get_solver, "rtn")):
        with pytest.raises(SchemeError, match=f"(?s)nothing.*{known}"):
            get("nothing")


def test_awq_is_the_scale_transform_then_rounding() -> None:
    scheme, solver = plan_solver(IntScheme(transforms=("rotate",)), "awq+gptq")
    assert scheme.transforms == ("scale", "rotate") and solver.name == "gptq"
    scheme, solver = plan_solver(IntScheme(transforms=("scale",)), "awq")
    assert scheme.transforms == ("scale",) and solver.name == "rtn"
    with pytest.raises(SchemeError, match=r"gptq\+awq"):
        plan_solver(IntScheme(), "gptq+awq")


def test_fields_are_checked(rng_weight) -> None:
    qt = quantize_tensor(rng_weight(4, 16), IntScheme())
    with pytest.raises(SchemeError, match=r"scale.*missing"):
        QuantizedTensor(qt.scheme, qt.shape, {"codes": qt.fields["codes"]})
    with pytest.raises(SchemeError, match="codes"):
        QuantizedTensor(qt.scheme, (4, 18), qt.fields)
    with pytest.raises(SchemeError, match="float32"):
        QuantizedTensor(qt.scheme, qt.shape, {**qt.fields, "scale": qt.fields["scale"].float()})
