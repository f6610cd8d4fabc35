"""What is made of a phone's facts: which cores, and whether it is cool enough. No phone needed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_ibtm.errors import DeviceError, UsageError
from edge_ibtm.probe.phone import Condition, Phone, choose_cores, wait_until_cool


def test_cores_come_from_the_clocks() -> None:
    big_little = {**dict.fromkeys(range(4), 1800), **dict.fromkeys(range(4, 7), 2400), 7: 3000}
    phone = Phone("p", ("arm64-v8a",), "14", "34", "", 8, big_little)
    assert choose_cores("all", phone) == ()
    assert choose_cores("little", phone) == (0, 1, 2, 3)
    assert choose_cores("big", phone) == (4, 5, 6, 7)
    assert choose_cores("7,1", phone) == (7, 1)
    for wrong in ("fast", "8", "-1", "1,,2"):
        with pytest.raises(UsageError, match="--cores"):
            choose_cores(wrong, phone)
    with pytest.raises(DeviceError, match="--cores 4,5,6,7"):
        choose_cores("big", replace(phone, max_khz={}))


def test_the_gate_waits_until_it_is_cool() -> None:
    readings = iter([(50.0, 0), (44.0, 2), (44.0, 1), (20.0, 0)])
    said: list[str] = []

    def read() -> Condition:
        temperature, status = next(readings)
        return Condition(80, True, temperature, status, {})

    assert wait_until_cool(read, 45.0, 1.0, said.append).temperature == 44.0
    assert len(said) == 2 and "50.0 Celsius" in said[0] and "status 2" in said[1]
