"""Scopes for systemd: names, properties of limits and devices, annotations."""

from __future__ import annotations

from typing import Any

import pytest

from krun.errors import BadSpec
from krun.plan.cgroups import plan_writes
from krun.plan.devices import DEFAULT_RULES
from krun.plan.model import Rule, Unit
from krun.plan.units import of_resources, plan_unit, variant

NOTHING = Rule(False, "a", -1, -1, "rwm")


def unit(path: str = "", rules: tuple[Rule, ...] = (), **annotations: str) -> Unit:
    named = {f"org.systemd.property.{key}": value for key, value in annotations.items()}
    return plan_unit(path, "box", version=2, writes=(), rules=rules, annotations=named)


def properties(version: int, resources: dict[str, Any]) -> dict[str, Any]:
    writes = tuple(plan_writes(version, resources))
    return {name: value for name, _, value in of_resources(writes, version)}


def test_names() -> None:
    assert unit()[:2] == ("krun-box.scope", "")
    assert unit("user.slice:libpod:ab")[:2] == ("libpod-ab.scope", "user.slice")
    assert unit("a-b.slice::ab")[:2] == ("ab.scope", "a-b.slice")
    assert unit(":x:ab")[:2] == ("x-ab.scope", "")
    for path in (
        "/a",
        "a:b",
        "a.slice:b:",
        "a:b:c",
        ".slice:b:c",
        "a/b.slice:b:c",
        "a.slice:b:c d",
    ):
        with pytest.raises(BadSpec):
            unit(path)


def test_limits() -> None:
    resources = {
        "memory": {"limit": 1 << 20, "swap": 3 << 20, "reservation": 1 << 19},
        "cpu": {"shares": 1024, "quota": 12345, "period": 50000, "cpus": "0,9", "mems": "0"},
        "pids": {"limit": -1},
    }
    infinity = (1 << 64) - 1
    assert properties(2, resources) == {
        "MemoryMax": 1 << 20,
        "MemorySwapMax": 2 << 20,
        "MemoryLow": 1 << 19,
        "CPUWeight": 39,
        "CPUQuotaPeriodUSec": 50000,
        # 246.9 ms a second, in steps of 10.
        "CPUQuotaPerSecUSec": 250000,
        "AllowedCPUs": b"\x01\x02",
        "AllowedMemoryNodes": b"\x01",
        "TasksMax": infinity,
    }
    assert properties(1, resources) == {
        "MemoryLimit": 1 << 20,
        "CPUShares": 1024,
        "CPUQuotaPeriodUSec": 50000,
        "CPUQuotaPerSecUSec": 250000,
        "TasksMax": infinity,
    }
    assert properties(2, {"cpu": {"quota": -1}}) == {"CPUQuotaPerSecUSec": infinity}
    assert properties(2, {"unified": {"memory.high": "5", "memory.min": "x", "io.max": "y"}}) == {
        "MemoryHigh": 5
    }


def test_devices() -> None:
    def allowed(*rules: Rule) -> list[Any]:
        return [value for _, _, value in unit(rules=rules).properties]

    assert allowed() == ["strict", []]
    assert allowed(NOTHING, Rule(True, "a", -1, -1, "rwm")) == ["auto", []]
    assert allowed(Rule(True, "c", 1, 3, "rwm"), Rule(True, "b", 8, -1, "r")) == [
        "strict",
        [("/dev/char/1:3", "rwm"), ("block-8", "r")],
    ]
    assert allowed(Rule(True, "c", 1, 3, "rwm"), NOTHING) == ["strict", []]
    assert allowed(Rule(True, "c", 1, 3, "r"), Rule(False, "c", 1, 3, "r")) == ["strict", []]
    assert ("char-*", "m") in allowed(*DEFAULT_RULES)[1]


def test_annotations() -> None:
    found = unit(TimeoutStopUSec="uint64 5", After="['a.service', \"b\"]", RestartSec="2")
    assert found.properties[-3:] == (
        ("TimeoutStopUSec", "t", 5),
        ("After", "as", ["a.service", "b"]),
        ("RestartUSec", "t", 2_000_000),
    )
    assert variant("true", "") == ("b", True)
    assert variant("-7", "") == ("i", -7)
    assert variant("int64 -7", "") == ("x", -7)
    assert variant("[]", "") == ("as", [])
    for text in ("", "word", "'", "uint32 -1", "byte 256", "2147483648", "[1]", "double 1"):
        with pytest.raises(BadSpec):
            variant(text, "annotations")
    for name in ("a", "A b", "1"):
        with pytest.raises(BadSpec):
            unit(**{name: "true"})
