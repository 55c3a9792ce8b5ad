"""Durations and sizes as people write them, and back."""

from __future__ import annotations

from krun.errors import KrunError

_SIZES = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "KB": 10**3,
    "M": 10**6,
    "MB": 10**6,
    "G": 10**9,
    "GB": 10**9,
    "T": 10**12,
    "TB": 10**12,
    "KI": 1 << 10,
    "KIB": 1 << 10,
    "MI": 1 << 20,
    "MIB": 1 << 20,
    "GI": 1 << 30,
    "GIB": 1 << 30,
    "TI": 1 << 40,
    "TIB": 1 << 40,
}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _split(text: str) -> tuple[str, str]:
    end = 0
    while end < len(text) and (text[end] in "0123456789."):
        end += 1
    return text[:end], text[end:].strip()


def parse_size(text: str, where: str) -> int:
    """Return the bytes of "20GiB", "500M" or "1024"; `where` names it in the error."""
    number, unit = _split(text.strip())
    factor = _SIZES.get(unit.upper())
    try:
        if factor is None:
            raise ValueError
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise KrunError(f"{where}: {text!r} is no size", "for example 20GiB or 500MB") from None


def parse_duration(text: str, where: str) -> float:
    """Return the seconds of Go's "1h30m", "5m", "90s", "1d"; `where` names it in the error."""
    rest = text.strip()
    total = 0.0
    try:
        if not rest:
            raise ValueError
        while rest:
            number, after = _split(rest)
            unit = after[:2] if after[:2] == "ms" else after[:1]
            total += float(number) * _SECONDS[unit]
            rest = after[len(unit) :]
    except (ValueError, KeyError):
        if text.strip() == "0":
            return 0.0
        raise KrunError(f"{where}: {text!r} is no duration", "for example 15m or 1h30m") from None
    return total


def show_size(size: float) -> str:
    """Return a size in binary units, as podman and ctr print it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
