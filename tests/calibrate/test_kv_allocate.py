"""Plans within a budget: gains are counted, classes are few, the bits go where they are worth most."""

from __future__ import annotations

import pytest

from bitpalette.calibrate.kv_allocate import (
    CLASSES,
    PAIRS,
    cost_of,
    name_of,
    sinks_that_pay,
    stored_bits,
    within_bits,
    within_bytes,
)
from bitpalette.formats.kv_plan_file import LayerSensitivity
from bitpalette.quant.kv_format import KVError, KVFormat


def layer(slope_k: float = 1.0, slope_v: float = 1.0, weight_k: float = 2.0, width: int = 64) -> LayerSensitivity:
    """A layer whose errors fall by 4 with every bit."""
    errors = {
        name_of((k, v)): weight_k * (4.0**-k if k < 16 else 0) + (4.0**-v if v < 16 else 0)
        for k, v in PAIRS
        if (k, v) != (16, 16)
    }
    longer = {pair: 3 * error for pair, error in errors.items()}
    return LayerSensitivity(
        kv_heads=2,
        head_dim=width,
        head_dim_v=width,
        slope_k=slope_k,
        slope_v=slope_v,
        errors={512: errors, 4096: longer},
    )


def mixed(count: int = 24) -> dict[int, LayerSensitivity]:
    return {i: layer(1.3**i, 1.4 ** (count - i), 1.0 + i % 5) for i in range(count)}


@pytest.mark.parametrize("bits", [2.25, 2.5, 3.25, 4.0, 5.7, 16])
def test_average_bits_count_gains(bits: float) -> None:
    layers = mixed()
    found = within_bits(layers, bits)
    assert set(found.pairs) == set(layers)
    stored = sum(stored_bits(layers[n], pair) for n, pair in found.pairs.items())
    by_format = [KVFormat(*found.pairs[n]).bits_per_element(64) for n in layers]
    assert stored / (24 * 2 * 128) == pytest.approx(sum(by_format) / 24) == pytest.approx(found.bits)
    assert found.bits <= bits + 1e-9
    assert len(set(found.pairs.values())) <= CLASSES
    assert found.predicted == pytest.approx(sum(cost_of(layers[n], p) for n, p in found.pairs.items()))


def test_smallest_plan_is_the_smallest() -> None:
    assert set(within_bits(mixed(), 2.25).pairs.values()) == {(2, 2)}
    with pytest.raises(KVError, match=r"no plan has 2\.2 bits an element; the smallest has 2\.250"):
        within_bits(mixed(), 2.2)


def test_beats_every_format_for_all_layers() -> None:
    layers = mixed()
    found = within_bits(layers, 3.25)
    for pair in ((3, 3), (4, 2), (2, 4)):
        assert found.predicted < 0.9 * sum(cost_of(one, pair) for one in layers.values())


def test_the_limit_of_classes_costs_little() -> None:
    layers = mixed()
    free, six, one = (within_bits(layers, 3.6, classes=n) for n in (99, 6, 1))
    assert len(set(free.pairs.values())) > 6 >= len(set(six.pairs.values()))
    assert len(set(one.pairs.values())) == 1
    assert free.predicted <= six.predicted < one.predicted
    assert six.predicted < 1.1 * free.predicted


def test_costly_layers_and_sides_get_the_bits() -> None:
    found = within_bits({0: layer(1e-3, 1e-3), 1: layer(10, 10)}, 3.25)
    assert sum(found.pairs[0]) < sum(found.pairs[1])
    keys, values = within_bits({0: layer(1, 1, weight_k=300.0)}, 3.25).pairs[0]
    assert keys > values


def test_sides_have_slopes_of_their_own() -> None:
    one = layer(slope_k=5.0, slope_v=0.5, weight_k=2.0)
    assert cost_of(one, (16, 16)) == 0
    assert cost_of(one, (3, 16), 512) == pytest.approx(5.0 * 2 * 4.0**-3)
    assert cost_of(one, (16, 2), 512) == pytest.approx(0.5 * 4.0**-2)
    assert cost_of(one, (3, 2), 512) == pytest.approx(5.0 * 2 * 4.0**-3 + 0.5 * 4.0**-2)
    assert cost_of(one, (3, 2), 2000) == pytest.approx(
        cost_of(one, (3, 2), 512)
    )  # the nearest length that was measured
    assert cost_of(one, (3, 2), 3000) == pytest.approx(3 * cost_of(one, (3, 2), 512)) == cost_of(one, (3, 2))


def test_bytes() -> None:
    layers = mixed(8)

    def bytes_of(one: LayerSensitivity, pair: tuple[int, int]) -> int:
        return 1000 + 100 * stored_bits(one, pair) // 8

    most = sum(bytes_of(one, (3, 3)) for one in layers.values())
    found = within_bytes(layers, most, bytes_of)
    assert sum(bytes_of(layers[n], pair) for n, pair in found.pairs.items()) <= most
    assert found.predicted < sum(cost_of(one, (3, 3)) for one in layers.values())
    least = sum(bytes_of(one, (2, 2)) for one in layers.values())
    with pytest.raises(KVError, match=f"the smallest has {least:,}"):
        within_bytes(layers, least - 1, bytes_of)


def test_widths_that_do_not_pack_stay_exact() -> None:
    errors = {512: {name_of((k, 16)): 4.0**-k for k in (8, 4, 3, 2)}}
    odd = LayerSensitivity(kv_heads=1, head_dim=64, head_dim_v=60, slope_k=1, slope_v=0, errors=errors)
    assert within_bits({0: odd}, 10).pairs[0] == (4, 16)


def test_sinks_are_bought_where_they_pay() -> None:
    assert sinks_that_pay({0: 0.03, 1: 0.0089, 4: 0.0082, 8: 0.0081, 16: 0.008}, 2048) == 4
    assert sinks_that_pay({0: 0.03, 1: 0.0300, 4: 0.0301, 8: 0.0302, 16: 0.030}, 2048) == 0
    assert sinks_that_pay({0: 0.03, 1: 0.0300, 4: 0.0300, 8: 0.0300, 16: 0.005}, 2048) == 16
