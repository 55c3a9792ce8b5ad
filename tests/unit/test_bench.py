"""What the bench prints and draws is what was measured."""

from __future__ import annotations

from xml.etree import ElementTree

from bench import picture, runtime

MEDIANS = {"crun": 0.010, "runc": 0.020, "krun": 0.0186, "krun native, km": 0.0186}


def test_verdicts_compare_with_the_right_column() -> None:
    assert runtime.verdicts("krun", "run", MEDIANS) == [
        "+8.60 of 9 ms over crun",
        "0.93 of 1 × runc",
    ]
    assert runtime.verdicts("krun native, km", "run", MEDIANS) == ["0.93 of 0.9 × runc MISSED"]
    assert runtime.verdicts("krun native, km", "state", MEDIANS) == ["18.60 of 9 ms MISSED"]
    assert runtime.verdicts("krun", "exec", MEDIANS) == ["+8.60 of 7 ms over crun MISSED"]


def test_verdicts_of_what_was_left_out() -> None:
    assert runtime.verdicts("krun", "run", {"krun": 0.01}) == []
    assert runtime.verdicts("krun", "run", {"crun": 0.01, "runc": 0.01}) == []


def test_bars_are_as_long_as_their_values() -> None:
    text = picture.bars({"run": {"a": 10.0, "b & c": 5.0}, "kill": {"b & c": 1.0}}, "ms")
    root = ElementTree.fromstring(text)
    space = {"s": "http://www.w3.org/2000/svg"}
    lengths = [
        (one[0].text, float(one.attrib["width"]))
        for one in root.findall("s:rect", space)
        if len(one)
    ]
    longest = picture.WIDTH - picture.LABEL - 70
    assert lengths == [("a", longest), ("b & c", longest / 2), ("b & c", longest)]
    said = [one.text for one in root.findall("s:text", space)]
    assert "10.0 ms" in said and "5.0 ms" in said and "1.0 ms" in said
