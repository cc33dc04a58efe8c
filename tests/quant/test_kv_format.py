"""Names of cache formats, what is refused, and bits an element."""

from __future__ import annotations

import pytest

from bitpalette.quant.kv_format import KVError, KVFormat


@pytest.mark.parametrize(
    ("text", "bits"), [("k4v4", (4, 4)), ("K3V2", (3, 2)), ("16", (16, 16)), (" 4 ", (4, 4)), ("k16v8", (16, 8))]
)
def test_parse(text: str, bits: tuple[int, int]) -> None:
    form = KVFormat.parse(text, sinks=2)
    assert (form.bits_k, form.bits_v, form.sinks, form.window, form.kind) == (*bits, 2, 64, "token")
    assert KVFormat.from_dict(form.to_dict()) == form
    assert form.dense == (text == "16")


@pytest.mark.parametrize("text", ["", "k4", "v4k4", "k4v", "int4", "k4v4x", "-4"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(KVError, match="say k4v4"):
        KVFormat.parse(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits_k": 5}, "bits_k=5"),
        ({"bits_v": 1}, "bits_v=1"),
        ({"sinks": -1}, "sinks=-1"),
        ({"window": True}, "window=True"),
        ({"window": 1.5}, "window=1.5"),
        ({"kind": "row"}, "kind='row'"),
        ({"bit_k": 4}, "bit_k"),
    ],
)
def test_what_makes_no_sense(values: dict[str, object], message: str) -> None:
    with pytest.raises(KVError, match=message):
        KVFormat.from_dict(values)


def test_bits_per_element() -> None:
    assert KVFormat(4, 4).bits_per_element(64) == 4.25
    assert KVFormat(2, 2).bits_per_element(128) == 2.125
    assert KVFormat(4, 2).bits_per_element(64) == 3.25
    assert KVFormat(16, 16).bits_per_element(80) == 16
    assert KVFormat(4, 3).bits_per_element(128, 64) == (128 * 4 + 16 + 64 * 3 + 16) / 192
    assert KVFormat(2, 2, kind="channel").bits_per_element(64) == 3


def test_head_dim() -> None:
    KVFormat(3, 16).check_head_dim(80, 20)
    with pytest.raises(KVError, match="not 20"):
        KVFormat(16, 4).check_head_dim(80, 20)
